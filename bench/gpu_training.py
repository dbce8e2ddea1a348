"""What bench/gpu.py and the tests on a GPU train: models of real shapes with random weights, and how that is watched.

A model is built from its config alone, on the device, part by part, as shards are: nothing is downloaded, and nobody
holds more than it trains with. Weights follow from their names, so that all ways to train begin alike.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import dpo_shapes as shapes
import lightning
import torch
from gpu_memory import Memory
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmrlhf.batches import Continuation, PackedQueries, pack
from mmrlhf.callbacks.resuming import newest
from mmrlhf.callbacks.saving import LocalFile, SaveWhole
from mmrlhf.callbacks.sharding import Sharded
from mmrlhf.modules.backbone import Backbone
from mmrlhf.modules.flops import Cost, tokens_of
from mmrlhf.modules.loading import BackboneConfig, Lora, _ready
from mmrlhf.modules.memory import Batches, Estimate, estimate
from mmrlhf.modules.mmdpo import MMDPOModule, Plan
from mmrlhf.modules.optimiser import Optimiser
from mmrlhf.modules.packed import Step, lengths
from mmrlhf.modules.weights import empty_model
from mmrlhf.ranks import Layout

_REAL = shapes.SHAPES["0.5b"]
TINY = shapes.Shape(
    64, 2, 256, 500, heads=4, tower_width=32, tower_layers=2, tower_inner=64, tower_heads=2, side=56, prompt=20,
    response=16,
)  # fmt: skip
MIDDLE = shapes.Shape(
    896, 8, 4864, 32_000, heads=14, tied=True, tower_width=384, tower_inner=1536, tower_heads=6, side=378,
    prompt=60, response=150,
)  # fmt: skip
SHAPES = {"tiny": TINY, "middle": MIDDLE, "0.5b": _REAL, "7b": shapes.SHAPES["7b"]}


# The model --------------------------------------------------------------------------------------------------


class Chance:
    """Weights that follow from their names, in place of those that a checkpoint's files hold."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.names, self.device = {weight: name for name, weight in model.named_parameters()}, device

    def fill(self, module: nn.Module) -> None:
        """Make the weights of a part that have no memory yet; those that are tied stay one."""
        made: dict[nn.Parameter, nn.Parameter] = {}
        for part in module.modules():
            for name, weight in part.named_parameters(recurse=False):
                if weight.is_meta:
                    made[weight] = made[weight] if weight in made else self._new(weight)
                    setattr(part, name, made[weight])

    def _new(self, weight: nn.Parameter) -> nn.Parameter:
        name = self.names[weight]
        values = torch.zeros(weight.shape, dtype=weight.dtype, device=self.device)
        if weight.ndim >= 2:
            values.normal_(0, 0.02, generator=torch.Generator(self.device).manual_seed(zlib.crc32(name.encode())))
        elif "norm" in name and name.endswith("weight"):
            values.fill_(1)
        return nn.Parameter(values, requires_grad=weight.requires_grad)


@dataclass(frozen=True)
class RandomBackbone(BackboneConfig):
    """A backbone of random weights; its `path` holds a config and nothing else.

    Args:
        device: Where its weights are made.
    """

    device: str = "cpu"

    def empty(self) -> tuple[Backbone, Any]:
        """Without weights, and what makes them."""
        model = empty_model(Path(self.path), getattr(torch, self.dtype), self.vision_attention, False)
        weights = Chance(model, self.device)
        return _ready(model, self.freeze, self.lora, self.activation_checkpointing), weights

    def load(self) -> Backbone:
        """All of it."""
        body, weights = self.empty()
        weights.fill(body)
        return body.to(self.device)


@dataclass(frozen=True)
class Case:
    """One way to train.

    Args:
        shape: Of the model and its queries.
        folder: For configs and checkpoints.
        device: cpu or cuda.
        mixed: Computed in bfloat16.
        sharded: By FSDP2, on one device; otherwise as one process alone.
        step: One packed row per query, or a row per response.
        kernel: How responses look back at a shared prefix.
        lora: Adapters over weights in bfloat16 in place of everything.
        again: Activations are computed again.
        accumulated: Micro-batches per optimizer step.
        queries: Per micro-batch.
        compiled: With which backend the decoder's layers are compiled; none: not at all.
    """

    shape: shapes.Shape
    folder: Path
    device: str = "cpu"
    mixed: bool = False
    sharded: bool = False
    step: Step = "shared_prefix"
    kernel: Any = "auto"
    lora: bool = False
    again: bool = False
    accumulated: int = 1
    queries: int = 1
    compiled: str | None = None

    @property
    def backbone(self) -> RandomBackbone:
        """The model's config, which is written down."""
        shapes.build_config(self.shape).save_pretrained(self.folder)
        return RandomBackbone(
            str(self.folder),
            dtype="bfloat16" if self.lora else "float32",
            lora=Lora() if self.lora else None,
            activation_checkpointing=self.again,
            device=self.device,
        )

    def module(self) -> MMDPOModule:
        """What is trained, without weights yet."""
        optimiser = Optimiser(learning_rate=1e-4, warmup=0.0)
        module = MMDPOModule(self.backbone, step=self.step, kernel=self.kernel, margin="annotated", optimiser=optimiser)
        module.expect(Plan(1000, mean_pairs=6.0))
        return module

    def batch(self) -> PackedQueries:
        """A micro-batch."""
        return batch_of(self.shape, self.queries)

    def estimate(self, batch: PackedQueries) -> Estimate:
        """What `--dry-run` says of it."""
        body, _ = self.backbone.empty()
        shared = self.step == "shared_prefix"
        cost, tokens = Cost(body), sum(tokens_of(each, shared) for each in lengths(batch.rows))
        patches = batch.rows.features["pixel_values"].numel() / cost.pixels_per_patch
        layout = Layout(way="sharded" if self.sharded else "one", mixed=self.mixed)
        global_batch = self.queries * self.accumulated
        batches = Batches(
            tokens, global_batch, self.queries, steps=1, mean_tokens=tokens / self.queries, patches=round(patches),
            again=self.again,
        )  # fmt: skip
        return estimate(body, layout, batches)


def batch_of(shape: shapes.Shape, queries: int) -> PackedQueries:
    """Ranked queries of random words and pictures, annotated from best to worst."""
    problem = shapes.encode(shapes.build_queries(shape, queries), shapes.build_processor(shape))
    none = torch.empty(0, dtype=torch.long)
    segments = [[Continuation(none, response) for response in query] for query in problem.responses]
    features = {"pixel_values": problem.pixel_values, "image_sizes": problem.image_sizes}
    each = shape.responses
    count, unknown = queries * each, torch.full((queries * each, 3), math.nan)
    tokens = torch.tensor([len(response) for query in problem.responses for response in query])
    return PackedQueries(
        rows=pack(problem.prefixes, segments, features, pad=shapes.PAD),
        pairs=problem.pairs,
        ties=torch.empty(0, 2, dtype=torch.long),
        responses=torch.full((queries,), each),
        rewards=torch.linspace(1, -1, each).repeat(queries),
        reference_logps=-tokens * math.log(shape.vocabulary),
        ranks=torch.arange(1, each + 1).repeat(queries),
        annotated=torch.linspace(5, 1, each).repeat(queries),
        scores=unknown,
        categories=("",) * queries,
        ids=tuple(f"q{number}" for number in range(count // each)),
    )


# Training ---------------------------------------------------------------------------------------------------


class Notes(lightning.Callback):
    """Losses and seconds of every optimizer step, and from the second one on the most memory."""

    def __init__(self, memory: Memory, compiled: str | None = None) -> None:
        self.memory, self.compiled = memory, compiled
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.flops, self.tokens, self._since, self._steps = 0.0, 0, 0.0, 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401
        if self.compiled:
            for layer in pl_module.scorer.backbone.decoder.layers:
                layer.compile(backend=self.compiled)
        self._steps, self._since = trainer.global_step, self._now(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:  # noqa: ANN401
        self.losses.append(float(outputs["loss"]))
        self.flops, self.tokens = outputs["work"].flops, outputs["work"].tokens
        if trainer.global_step == self._steps:
            return
        now, self._steps = self._now(pl_module), trainer.global_step
        self.seconds.append(now - self._since)
        if len(self.seconds) == 1:
            self.memory.reset()
        self._since = now

    def _now(self, module: Any) -> float:  # noqa: ANN401
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Trained(NamedTuple):
    """What a training told."""

    losses: list[float]
    seconds: list[float]
    peak: float
    flops: float
    """Of a micro-batch."""
    tokens: int
    module: MMDPOModule

    @property
    def pace(self) -> float:
        """Seconds of a step: the median without the first two, in which libraries choose and compile."""
        return statistics.median(self.seconds[2:] or self.seconds)


def train(case: Case, steps: int, resumed: bool = False, keep: Path | None = None, watch: bool = True) -> Trained:
    """Train on the same micro-batches again and again; `keep`: save at the end, or go on from what is there."""
    warnings.simplefilter("ignore")
    forget()
    memory = Memory(case.device, watch)
    notes, module = Notes(memory, case.compiled), case.module()
    batch = case.batch()
    trainer = lightning.Trainer(
        accelerator="gpu" if case.device == "cuda" else "cpu",
        devices=1,
        strategy=Sharded(minutes=5.0) if case.sharded else "auto",
        precision="bf16-mixed" if case.mixed else "32-true",
        max_steps=steps,
        accumulate_grad_batches=case.accumulated,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        plugins=[LocalFile()],
        callbacks=[notes, *([SaveWhole(keep, every=steps)] if keep else [])],
    )
    loader = torch.utils.data.DataLoader([batch] * (1000 * case.accumulated), batch_size=None)
    state = newest(keep) if keep and resumed else None
    with memory:
        trainer.fit(module, loader, ckpt_path=state, weights_only=True)
    return Trained(notes.losses, notes.seconds, memory.peak, notes.flops, notes.tokens, module)


def forget() -> None:
    """Give back what earlier trainings held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of what is trained; of shards on a single rank, each is the whole."""
    named = ((name, weight.detach()) for name, weight in module.named_parameters() if weight.requires_grad)
    return {name: (each.to_local() if isinstance(each, DTensor) else each).clone() for name, each in named}
