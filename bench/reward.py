"""How fast the critique reward model is: a training step against a row per response, and inference against two passes.

    python bench/reward.py                              # under 3 minutes; the last line is one JSON object
    python bench/reward.py --shape prop                 # or brief, long: other small models and lengths
    python bench/reward.py --shape 0.5b --device cuda   # or 7b: real shapes, random weights, bfloat16

The query is a picture, a question and 4 responses, each with a critique. A critique has a 20th of the tokens before the
response, as one of 150 tokens has behind a picture of 2,900; the longer it is, the less a shared prefix gains. A
training step is the loss of all pairs of rewards and of all critiques, forward and backward, without an optimiser: ours
in one packed row, the rival with a row of its own for each response, in which the picture is encoded and the prefix
computed again, and the head scores critiques alone. Inference is a critique and a reward of each response: ours in one
pass, the official way a response at a time by `generate`, then a second full forward over response and critique for the
reward.

Everybody has the same weights, tokens and pixels. Gradients, critiques and rewards are compared first, in the pass that
also warms up; then both take turns, and the median counts: of CPU time on a CPU with one thread, of wall time on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import dpo_shapes as shapes
import torch
from dpo_opponents import difference, twin
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmrlhf.batches import Continuation, PackedRows, pack
from mmrlhf.modules.backbone import backbone_of
from mmrlhf.modules.reward import RewardHead, RewardReader
from mmrlhf.modules.speaking import Saying, spoken

REQUEST = (52, 8)
"""Tokens of the template's words that ask for a critique, before the question and behind the response."""
PREFIX_TO_CRITIQUE = 20
SAME = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""What differs by more is not the same, and nothing is timed."""
AT_LEAST = {"inference_vs_official": 4}
"""The bar, which holds for the default shape on a CPU."""


def main() -> None:
    options = arguments()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    bench = Bench(options)
    print(", ".join(f"{name} {value}" for name, value in bench.told().items()), flush=True)
    result: dict[str, Any] = bench.told()
    for name, contest in (("train_vs_separate", bench.training), ("inference_vs_official", bench.inference)):
        ours, theirs, apart = contest()
        found = bench.in_turn(ours, theirs)
        result |= {name: round(found[1] / found[0], 2), f"{name}_s": [round(each, 4) for each in found]} | apart
        print(f"{name}: {found[0]:.3f} s against {found[1]:.3f} s; {apart}", flush=True)
    if options.shape == "lite" and not bench.gpu:
        result["missed"] = [name for name, bar in AT_LEAST.items() if result[name] < bar]
    print(json.dumps(result))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="lite")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--critique", type=int, help="tokens of a critique")
    parser.add_argument("--repeat", type=int, default=3, help="passes that count")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a GPU that torch can see, got none; run it on a machine that has one")
    if options.device == "cpu" and shapes.SHAPES[options.shape].gpu:
        parser.error(f"--shape {options.shape}: expected --device cuda, got cpu, on which one step takes an hour")
    return options


class Response(NamedTuple):
    """One response as tokens."""

    given: Tensor  # (tokens,): itself, and the request to judge it
    critique: Tensor  # (tokens,): with the end of the turn


class Bench:
    """The model, one query, and both ways through it."""

    def __init__(self, options: argparse.Namespace) -> None:
        shape = shapes.SHAPES[options.shape]
        self.shape = dataclasses.replace(shape, prompt=shape.prompt + REQUEST[0])
        self.options, self.gpu = options, options.device == "cuda"
        self.dtype = getattr(torch, options.dtype or ("bfloat16" if self.gpu else "float32"))
        self.processor = shapes.build_processor(self.shape)
        problem = shapes.encode(shapes.build_queries(self.shape, 1), self.processor)
        model = shapes.build_model(self.shape, options.device, self.dtype)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = shapes.END, shapes.PAD
        self.plain, head = twin(model), RewardHead(self.shape.width, dtype=self.dtype).to(options.device)
        self.reader = RewardReader(backbone_of(model), head, "shared_prefix")
        self.weights = [weight for weight in self.reader.parameters() if weight.requires_grad]
        self.prefix = problem.prefixes[0].to(options.device)
        self.most = options.critique or len(self.prefix) // PREFIX_TO_CRITIQUE
        self.features = {
            "pixel_values": problem.pixel_values.to(options.device, self.dtype),
            "image_sizes": problem.image_sizes.to(options.device),
        }
        words = torch.Generator().manual_seed(2)
        end = torch.tensor([shapes.END])

        def some(length: int) -> Tensor:
            return torch.randint(len(shapes.SPECIAL), self.shape.vocabulary, (length,), generator=words)

        request = some(REQUEST[1])
        self.responses = [
            Response(*(each.to(options.device) for each in (torch.cat([text[:-1], request]), torch.cat([said, end]))))
            for text, said in ((text, some(self.most)) for text in problem.responses[0])
        ]

    def told(self) -> dict[str, Any]:
        """What was run."""
        return {
            "shape": self.options.shape,
            "device": torch.cuda.get_device_name() if self.gpu else "cpu",
            "dtype": str(self.dtype).removeprefix("torch."),
            "prefix_tokens": len(self.prefix),
            "response_tokens": [len(each.given) for each in self.responses],
            "critique_tokens": self.most,
            **{name: version(name) for name in ("torch", "transformers")},
        }

    def rows(self, critiques: bool) -> PackedRows:
        """The query as one packed row."""
        told = [Continuation(each.given, each.critique if critiques else each.given[:0]) for each in self.responses]
        cpu = [Continuation(*(part.cpu() for part in each)) for each in told]
        packed = pack([self.prefix.cpu()], [cpu], {}, shapes.PAD)
        tensors = [value.to(self.options.device) for value in packed[:5]]
        return PackedRows(*tensors, self.features, {})

    # Training ------------------------------------------------------------------------------------------------

    def training(self) -> tuple[Callable[[], Any], Callable[[], Any], dict[str, float]]:
        """Our step and the rival's, and by how much their gradients differ."""
        self.reader.train()
        self.plain.train()
        rows = self.rows(critiques=True)

        def ours() -> None:
            said = self.reader(rows)
            _loss(said.rewards, said.critiques.sums).backward()

        def separate() -> None:
            said = [self.judged_alone(torch.cat(each), len(each.critique)) for each in self.responses]
            _loss(*(torch.stack(each) for each in zip(*said, strict=True))).backward()

        gradients = []
        for step in (ours, separate):
            self.forget()
            step()
            gradients.append([weight.grad for weight in self.weights])
        self.forget()
        apart = difference(*gradients)
        if not apart < SAME[self.dtype]:
            sys.exit(f"training: expected the gradients of separate rows, got some that differ by {apart:.1e}")
        return ours, separate, {"grad_rel_err": apart}

    def judged_alone(self, said: Tensor, critique: int) -> tuple[Tensor, Tensor]:
        """Reward and log-prob of the critique by the family's own forward, whose logits are of the critique alone."""
        states = []
        watch = self.plain.lm_head.register_forward_pre_hook(lambda _, given: states.append(given[0]))
        ids = torch.cat([self.prefix, said])[None]
        mask = torch.ones_like(ids)
        found = self.plain(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=critique + 1, **self.features
        )
        watch.remove()
        reward = self.reader.head(states[0][:, -1])[0, 0]
        logps = found.logits[0, :-1].float().log_softmax(-1)
        return reward, logps.gather(-1, said[-critique:, None]).sum()

    # Inference -----------------------------------------------------------------------------------------------

    def inference(self) -> tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]:
        """Our way and the official one, after their critiques and rewards were found to be the same."""
        self.reader.eval()
        self.plain.eval()
        rows, saying, tokenizer = self.rows(critiques=False), Saying(self.most), self.processor.tokenizer

        def ours() -> list[tuple[list[int], float]]:
            return [(said.tokens.tolist(), said.reward) for (said,) in spoken(self.reader, tokenizer, rows, saying)]

        def official() -> list[tuple[list[int], float]]:
            return [self.official(each.given) for each in self.responses]

        (critiques, rewards), (others, expected) = (zip(*way(), strict=True) for way in (ours, official))
        apart = max(abs(one - other) for one, other in zip(rewards, expected, strict=True))
        same = sum(map(list.__eq__, critiques, others))
        if self.dtype == torch.float32 and (same < len(others) or apart > SAME[self.dtype]):
            sys.exit(f"inference: expected the official outputs, got {same} same critiques, rewards {apart:.1e} apart")
        return ours, official, {"same_critiques": f"{same}/{len(others)}", "rewards_apart": apart}

    @torch.inference_mode()
    def official(self, given: Tensor) -> tuple[list[int], float]:
        """A critique by `generate`, then its reward by a forward from the start."""
        ids = torch.cat([self.prefix, given])[None]
        options = {"max_new_tokens": self.most, "do_sample": False}
        found = self.plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **self.features)[0]
        said = found[ids.shape[1] :]
        said = said[said != shapes.END]
        whole = torch.cat([ids[0], said, ids.new_tensor([shapes.END])])[None]
        mask = torch.ones_like(whole)
        states = self.plain.model(input_ids=whole, attention_mask=mask, use_cache=False, **self.features)
        return said.tolist(), float(self.reader.head(states.last_hidden_state[:, -1])[0, 0])

    # Measuring -----------------------------------------------------------------------------------------------

    def forget(self) -> None:
        for weight in self.weights:
            weight.grad = None
        gc.collect()

    def in_turn(self, *ways: Callable[[], Any]) -> list[float]:
        """The median seconds of each; who begins changes from pass to pass."""
        clock = time.perf_counter if self.gpu else time.process_time
        taken: dict[int, list[float]] = {number: [] for number in range(len(ways))}
        for turn in range(self.options.repeat):
            for number in (0, 1) if turn % 2 else (1, 0):
                self.forget()
                started = clock()
                ways[number]()
                if self.gpu:
                    torch.cuda.synchronize()
                taken[number].append(clock() - started)
        return [statistics.median(each) for each in taken.values()]


def _loss(rewards: Tensor, critiques: Tensor) -> Tensor:
    """Of all pairs, the first response being the best, and of all critiques."""
    better, worse = map(list, zip(*itertools.combinations(range(len(rewards)), 2), strict=True))
    return -logsigmoid(rewards[better] - rewards[worse]).mean() - critiques.mean() / 100


if __name__ == "__main__":
    main()
