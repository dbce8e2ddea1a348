"""What a training will need of each GPU, from shapes alone, and which layouts of ranks cannot work at all.

Bytes of weights, gradients and optimiser states are counted; those of activations follow from what the layers of a
decoder keep for their backward pass. Nothing is read but the shapes of a backbone, so it may be built without weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.nn import Parameter

    from .backbone import Backbone

Ways = Literal["one", "ddp", "sharded"]
_GIB = 2**30


@dataclass(frozen=True)
class Layout:
    """How ranks divide the work.

    Args:
        ranks: Processes in all, each with a device.
        way: One process; a copy of everything per rank; or a part of everything per rank.
        replicas: Groups of ranks each of which holds everything together.
        mixed: Whether it is computed in bfloat16.
        offload: Whether weights and optimiser states lie in the memory of the host.
    """

    ranks: int = 1
    way: Ways = "one"
    replicas: int = 1
    mixed: bool = False
    offload: bool = False

    @property
    def shards(self) -> int:
        """Among how many ranks weights are divided."""
        return self.ranks // self.replicas if self.way == "sharded" else 1


@dataclass(frozen=True)
class Batches:
    """What a rank computes at once, and how often.

    Args:
        tokens: Put through the decoder in the largest micro-batch.
        global_batch: Queries per optimizer step, of all ranks.
        micro_batch: Queries that a rank computes at once.
        steps: Optimizer steps.
        mean_tokens: Put through the decoder per query.
        patches: Of pictures, in the largest micro-batch.
        chunk: At most so many rows of logits exist at once.
        again: Whether activations are computed again in the backward pass.
    """

    tokens: int
    global_batch: int
    micro_batch: int
    steps: int
    mean_tokens: float = 0.0
    patches: int = 0
    chunk: int = 512
    again: bool = False


def require_possible(layout: Layout, batches: Batches, accelerator: Literal["cpu", "gpu"], gpus: int) -> None:
    """Refuse what cannot work, before a weight is read; `gpus` are those of this machine."""
    at_once = batches.micro_batch * layout.ranks
    if layout.way == "one" and layout.ranks > 1:
        raise ValueError(f"trainer.strategy: expected ddp or sharded for {layout.ranks} ranks, got none; see configs")
    if batches.global_batch % at_once:
        raise ValueError(
            f"data.global_batch: expected a multiple of micro_batch x ranks = {batches.micro_batch} x {layout.ranks}, "
            f"got {batches.global_batch}; choose one, such as {max(1, round(batches.global_batch / at_once)) * at_once}"
        )
    if layout.replicas < 1 or layout.ranks % layout.replicas:
        raise ValueError(
            f"strategy.replicas: expected a divisor of {layout.ranks} ranks, got {layout.replicas}; take the number of "
            "nodes, or 1"
        )
    if layout.replicas > 1 and layout.way != "sharded":
        raise ValueError(f"strategy.replicas: expected 1 without shards, got {layout.replicas}; leave it off")
    if accelerator == "gpu" and not gpus:
        raise ValueError("trainer.accelerator: expected a GPU, found none that torch can use; say cpu, or mend it")


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device at the highest point, and what is trained on."""

    layout: Layout
    batches: Batches
    parameters: int
    trained: int
    weights: float
    gradients: float
    optimiser: float
    gathered: float
    """Whole weights and gradients of what is computed at the moment, or copies of weights in bfloat16."""
    activations: float
    logits: float
    stepping: float
    """What AdamW makes for itself during a step, when activations are gone."""

    @property
    def device(self) -> float:
        """On each GPU."""
        kept = 0.0 if self.layout.offload else self.weights + self.gradients + self.optimiser
        stepping = 0.0 if self.layout.offload else self.stepping
        return kept + max(self.gathered + self.activations + self.logits, stepping)

    def require_fits(self, capacity: int, usable: float = 0.92) -> None:
        """Refuse what needs more than this part of a device's memory; the rest goes to kernels and to gaps."""
        if self.device > usable * capacity:
            cure = "micro_batch, max_tokens" + ("" if self.batches.again else ", activation_checkpointing")
            raise ValueError(
                f"memory: expected at most {usable * capacity / _GIB:.1f} GiB per GPU, this needs about "
                f"{self.device / _GIB:.1f} GiB; shard over more ranks (configs/trainer/fsdp.yaml), train adapters "
                f"(lora), or see {cure}"
            )

    def rows(self) -> list[tuple[str, str]]:
        """What there is to tell, with its name."""
        parts = ("weights", "gradients", "optimiser", "gathered", "activations", "logits", "stepping")
        where = "host" if self.layout.offload else "GPU"
        names = [f"{name} ({where if name in parts[:3] else 'GPU'})" for name in parts]
        memory = [(name, f"{getattr(self, part) / _GIB:.2f} GiB") for name, part in zip(names, parts, strict=True)]
        at_once = self.batches.micro_batch * self.layout.ranks
        queries = self.batches.steps * self.batches.global_batch
        return [
            ("ranks", f"{self.layout.ranks}, {self.layout.way}"),
            ("shards", f"{self.layout.shards} in {self.layout.replicas} replicas"),
            ("parameters", f"{self.parameters:,}, of which {self.trained:,} are trained"),
            *memory,
            ("per GPU", f"{self.device / _GIB:.2f} GiB"),
            ("steps", f"{self.batches.steps:,} of {self.batches.global_batch // at_once} micro-batches per rank"),
            ("tokens", f"{queries * self.batches.mean_tokens:,.0f}"),
        ]


def estimate(body: Backbone, layout: Layout, batches: Batches) -> Estimate:
    """What the training of a backbone needs, by its shapes."""
    every = list(body.parameters())
    learning = [weight for weight in every if weight.requires_grad]
    number = 2 if layout.mixed else 4
    return Estimate(
        layout=layout,
        batches=batches,
        parameters=sum(weight.numel() for weight in every),
        trained=sum(weight.numel() for weight in learning),
        weights=_bytes(every) / layout.shards,
        gradients=_bytes(learning) / layout.shards,
        optimiser=2 * _bytes(learning) / layout.shards,
        gathered=_gathered(body, layout, number),
        activations=_activations(body, layout, batches, number),
        logits=_logits(body, batches, number),
        stepping=_bytes(learning) / layout.shards,
    )


def _bytes(weights: Iterable[Parameter], number: int | None = None) -> float:
    return float(sum(weight.numel() * (number or weight.itemsize) for weight in weights))


def _gathered(body: Backbone, layout: Layout, number: int) -> float:
    """What is whole for a while: two layers, one of them ahead, and all that is in no layer, with their gradients."""
    if layout.way != "sharded":
        matrices = (weight for weight in body.parameters() if weight.ndim >= 2 and weight.itemsize > number)
        return _bytes(matrices, number)  # autocast keeps its copies from forward to backward
    layers = [*body.layers(body.decoder), *body.layers(body.tower)]
    in_layers = {id(weight) for layer in layers for weight in layer.parameters()}
    apart = [weight for weight in body.parameters() if id(weight) not in in_layers]
    largest = max((list(layer.parameters()) for layer in layers), key=_bytes)
    sent = [_bytes([weight for weight in part if weight.requires_grad], 4) for part in (apart, largest)]
    grown = [_bytes([weight for weight in part if weight.requires_grad], number) for part in (apart, largest)]
    return _bytes(apart, number) + 2 * _bytes(largest, number) + sum(grown) + max(sent)


def _activations(body: Backbone, layout: Layout, batches: Batches, number: int) -> float:
    """What the layers keep or, where it is computed again, their inputs, and one layer at a time."""
    text, vision = body.config.get_text_config(), body.config.vision_config
    states = 4 if layout.way != "sharded" else number  # autocast adds in float32 where weights are
    of_text = batches.tokens * _kept_per_token(text, states, number)
    inputs = batches.tokens * text.hidden_size * states
    layers = text.num_hidden_layers
    decoder: float = layers * inputs + of_text if batches.again else layers * of_text
    of_tower = batches.patches * _kept_per_token(vision, states, number)
    learning = any(weight.requires_grad for _, weight in body.part("vision"))
    return decoder + of_tower * (len(body.layers(body.tower)) if learning else 1)


def _kept_per_token(config: Any, states: int, number: int) -> float:  # noqa: ANN401
    """Bytes that a layer keeps of a token for its backward pass.

    Two norms keep their input in float32, twice, and what they give; attention its input, queries, keys and values
    before and after they are turned by their positions, and what it gives, twice; the network its two products, the
    gate and what goes on.
    """
    width = getattr(config, "embed_dim", None) or config.hidden_size
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    of_head = getattr(config, "head_dim", None) or width // heads
    queries, keys = heads * of_head, (getattr(config, "num_key_value_heads", None) or heads) * of_head
    inner = getattr(config, "intermediate_size", None) or int(width * config.mlp_ratio)
    norms = 2 * (8 + number) * width
    attention = number * (4 * queries + 4 * keys) + 4 * heads
    return float(norms + attention + number * 4 * inner + 2 * states * width)


def _logits(body: Backbone, batches: Batches, number: int) -> float:
    """A chunk of logits as they are computed, in float32, and as the gradient has them."""
    rows = min(batches.chunk, batches.tokens)
    return float(rows * body.head.weight.shape[0] * (4 + 2 * number))
