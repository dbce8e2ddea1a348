"""What bench/dpo_step.py computes with: models of random weights, and ranked queries of random words."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

PAD, END, UNKNOWN, IMAGE, VIDEO = range(5)
SPECIAL = ("<pad>", "<end>", "<unknown>", "<image>", "<video>")
LEAST_BETA, MOST_BETA = 0.1, 0.15
"""Between these lie the pairs' betas: each pair has another one."""


@dataclass(frozen=True)
class Shape:
    """A LLaVA-OneVision, and the lengths of a query; an image is an overview and `tiles` tiles of it."""

    width: int
    layers: int
    inner: int
    vocabulary: int
    heads: int = 8
    kv_heads: int = 2
    tied: bool = False
    tower_width: int = 192
    tower_layers: int = 4
    tower_inner: int = 768
    tower_heads: int = 4
    side: int = 266
    patch: int = 14
    tiles: tuple[int, int] = (1, 1)
    prompt: int = 40
    response: int = 60
    responses: int = 4
    louder: float = 2.0
    """Random weights of small models are scaled up, so that log-probs depend on the image by more than rounding."""
    gpu: bool = False


_REAL: dict[str, Any] = {
    "tower_width": 1152,
    "tower_layers": 26,
    "tower_inner": 4304,
    "tower_heads": 16,
    "side": 384,
    "tiles": (1, 3),
    "prompt": 60,
    "response": 150,
    "louder": 1.0,
    "gpu": True,
}
SHAPES = {
    "lite": Shape(256, 4, 1344, 8_000),
    "brief": Shape(256, 5, 1344, 32_000),
    "prop": Shape(512, 6, 2688, 4_000),
    "long": Shape(256, 4, 1344, 8_000, response=400),
    "0.5b": Shape(896, 24, 4864, 151_936, heads=14, kv_heads=2, tied=True, **_REAL),
    "7b": Shape(3584, 28, 18_944, 152_064, heads=28, kv_heads=4, **_REAL),
}


def build_config(shape: Shape) -> Any:  # noqa: ANN401 - transformers is untyped
    """LLaVA-OneVision's architecture in other sizes."""
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    tower = SiglipVisionConfig(
        hidden_size=shape.tower_width,
        intermediate_size=shape.tower_inner,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads,
        image_size=shape.side,
        patch_size=shape.patch,
        vision_use_head=False,
    )
    text = Qwen2Config(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=32_768,
        tie_word_embeddings=shape.tied,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
    )
    return LlavaOnevisionConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[_grid(shape)],
        tie_word_embeddings=shape.tied,
    )


def build_model(shape: Shape, device: str, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """The policy: random weights, the tower frozen as the paper has it, ordinary attention."""
    from transformers import LlavaOnevisionForConditionalGeneration

    config = build_config(shape)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaOnevisionForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")  # noqa: SLF001
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "embed_tokens" not in name and "lm_head" not in name:
                weight.mul_(shape.louder)
    model.model.vision_tower.requires_grad_(requires_grad=False)
    return model.train()


def reference_of(model: nn.Module) -> nn.Module:
    """A policy nearby, so that log-ratios are not all nought."""
    reference = copy.deepcopy(model).requires_grad_(requires_grad=False).eval()
    generator = torch.Generator(next(model.parameters()).device).manual_seed(1)
    with torch.no_grad():
        for weight in reference.model.language_model.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype, device=weight.device)
            weight.mul_(1 + 0.01 * noise)
    return reference


# Queries ----------------------------------------------------------------------------------------------------


class Query(NamedTuple):
    """One ranked query in the words of a data set, the best response first."""

    image: Image.Image
    prompt: str
    responses: list[str]


class Problem(NamedTuple):
    """Queries as tokens, and what the loss needs to know of their responses; responses are numbered through."""

    queries: list[Query]
    prefixes: list[Tensor]
    responses: list[list[Tensor]]
    pixel_values: Tensor  # (queries, tiles, 3, side, side)
    image_sizes: Tensor  # (queries, 2)
    pairs: Tensor  # (pairs, 2): the winner first
    betas: Tensor  # (pairs,)
    reference: Tensor  # (responses,): log-probs

    @property
    def unique_tokens(self) -> int:
        return sum(map(len, self.prefixes)) + self.response_tokens

    @property
    def response_tokens(self) -> int:
        return sum(len(response) for responses in self.responses for response in responses)


def build_processor(shape: Shape) -> Any:  # noqa: ANN401
    """Words to tokens, one to one, and images to pixels."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        PreTrainedTokenizerFast,
    )

    words = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), shape.vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unknown>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    size = {"height": shape.side, "width": shape.side}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[_grid(shape)]),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",  # noqa: S106 - tokens of text, not secrets
            eos_token="<end>",  # noqa: S106
            unk_token="<unknown>",  # noqa: S106
            extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        ),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(shape.side // shape.patch) ** 2,
        vision_feature_select_strategy="full",
    )


def build_queries(shape: Shape, number: int) -> list[Query]:
    words = random.Random(0)

    def say(length: int) -> str:
        return " ".join(f"w{words.randrange(len(SPECIAL), shape.vocabulary)}" for _ in range(length))

    pixels = np.random.default_rng(0).integers(0, 256, (number, *_grid(shape), 3), np.uint8)
    return [
        Query(
            Image.fromarray(image),
            f"<image> {say(shape.prompt)}",
            [f"{say(shape.response - 1)} <end>" for _ in range(shape.responses)],
        )
        for image in pixels
    ]


def encode(queries: Sequence[Query], processor: Any) -> Problem:  # noqa: ANN401
    """Every prompt and every response becomes tokens by itself; all pairs of a query count."""
    texts, images = [query.prompt for query in queries], [[query.image] for query in queries]
    prompts = processor(images=images, text=texts, return_tensors="pt", add_special_tokens=False)
    responses = [
        [torch.tensor(ids) for ids in processor.tokenizer(query.responses, add_special_tokens=False)["input_ids"]]
        for query in queries
    ]
    starts = itertools.accumulate((len(query) for query in responses), initial=0)
    pairs = [
        (start + winner, start + loser)
        for start, query in zip(starts, responses, strict=False)
        for winner, loser in itertools.combinations(range(len(query)), 2)
    ]
    return Problem(
        list(queries),
        list(prompts["input_ids"]),
        responses,
        prompts["pixel_values"],
        prompts["image_sizes"],
        torch.tensor(pairs),
        torch.linspace(LEAST_BETA, MOST_BETA, len(pairs)),
        torch.zeros(sum(map(len, responses))),
    )


def _grid(shape: Shape) -> list[int]:
    return [shape.side * tiles for tiles in shape.tiles]


# Both -------------------------------------------------------------------------------------------------------


class Setting:
    """The models and the queries of one run, from its command line."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        own = {"response": options.response, "tiles": options.tiles and tuple(options.tiles)}
        self.shape = dataclasses.replace(SHAPES[options.shape], **{name: value for name, value in own.items() if value})
        self.gpu = options.device == "cuda"
        self.dtype = getattr(torch, options.dtype or ("bfloat16" if self.gpu else "float32"))
        self.policy = build_model(self.shape, options.device, self.dtype)
        self.reference = reference_of(self.policy)
        self.processor = build_processor(self.shape)
        queries = build_queries(self.shape, options.queries)
        started = time.perf_counter()
        self.problem = encode(queries, self.processor)
        self.ready = {"ours": time.perf_counter() - started}
        self.tokens = 0
        self.weights = [weight for weight in self.policy.parameters() if weight.requires_grad]

    def told(self) -> dict[str, Any]:
        """What was run."""
        problem, options = self.problem, self.options
        return {
            "shape": options.shape,
            "device": torch.cuda.get_device_name() if self.gpu else "cpu",
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights": sum(weight.numel() for weight in self.policy.parameters()),
            "queries": options.queries,
            "prefix_tokens": len(problem.prefixes[0]),
            "response_tokens": [len(response) for response in problem.responses[0]],
            "pairs": len(problem.pairs),
            "pairs_per_batch": options.pairs_per_batch,
            **{name: version(name) for name in ("torch", "transformers", "trl")},
        }

    def count(self, _: nn.Module, given: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        """A hook of a decoder's first layer: adds the tokens that it is given, padding included."""
        states = given[0] if given else named["hidden_states"]
        self.tokens += states.shape[0] * states.shape[1]
