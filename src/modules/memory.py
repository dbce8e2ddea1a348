"""What a training will need of each GPU, from shapes alone.

Bytes of weights, gradients and optimiser states are counted; those of activations follow from what the layers of a
decoder keep for their backward pass. Four moments of a step may be the highest: the end of the forward pass, the
beginning and the end of the backward pass, and the optimiser's step. Nothing is read but the shapes of a backbone, so
it may be built without weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.nn import Parameter

    from ..ranks import Layout
    from .backbone import Backbone

_GIB = 2**30
_MOMENTS = {
    "forward": "at the end of the forward pass",
    "backward": "at the beginning of the backward pass",
    "end": "at the end of the backward pass",
    "step": "in the optimiser's step",
}


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


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device, and what is trained on."""

    layout: Layout
    batches: Batches
    parameters: int
    trained: int
    weights: float
    gradients: float
    optimiser: float
    gathered: float
    """Whole weights of what is computed at the moment, or copies of weights in bfloat16."""
    activations: float
    """What is kept to the end of the forward pass."""
    logits: float
    """A chunk of them, with what makes them."""
    beginning: float
    """What the backward pass makes first: the gradient of the head, with those of logits or of the last layer."""
    ending: float
    """What it makes last, when activations are gone: gradients of all that is in no layer, on their way."""
    stepping: float
    """What AdamW makes for itself during a step."""

    @property
    def moments(self) -> dict[str, float]:
        """Bytes on each GPU at the moments that may be the highest, by their names."""
        gradients = 0.0 if self.layout.offload else self.gradients
        kept = 0.0 if self.layout.offload else self.weights + self.optimiser
        held = kept + self.gathered + self.activations
        # Lightning forgets the last step's gradients between forward and backward; what DDP sends them from stays.
        stays = gradients if self.layout.way == "ddp" or self._accumulated else 0.0
        return {
            "forward": held + gradients + self.logits,
            "backward": held + stays + self.beginning,
            "end": kept + gradients + self.ending,
            "step": kept + gradients + (0.0 if self.layout.offload else self.stepping),
        }

    @property
    def device(self) -> float:
        """On each GPU, at the highest."""
        return max(self.moments.values())

    @property
    def _accumulated(self) -> bool:
        return self.batches.global_batch > self.batches.micro_batch * self.layout.ranks

    def require_fits(self, capacity: int, usable: float = 0.92) -> None:
        """Refuse what needs more than this part of a device's memory; the rest goes to kernels and to gaps."""
        if self.device > usable * capacity:
            cure = "micro_batch, max_tokens" + ("" if self.batches.again else ", activation_checkpointing")
            raise ValueError(
                f"memory: expected at most {size(usable * capacity)} per device, this needs about "
                f"{size(self.device)}; shard over more ranks (configs/trainer/fsdp.yaml), train adapters "
                f"(lora), or see {cure}"
            )

    def rows(self) -> list[tuple[str, str]]:
        """What there is to tell, with its name."""
        kept = [f"{name} (host)" if self.layout.offload else name for name in ("weights", "gradients", "optimiser")]
        numbers = [self.weights, self.gradients, self.optimiser, self.gathered, self.activations, self.logits]
        numbers += [self.beginning, self.ending, self.stepping]
        names = (*kept, "gathered", "activations", "logits", "backward begins", "backward ends", "AdamW steps")
        memory = [(name, size(number)) for name, number in zip(names, numbers, strict=True)]
        at_once = self.batches.micro_batch * self.layout.ranks
        queries = self.batches.steps * self.batches.global_batch
        highest = max(self.moments, key=lambda name: self.moments[name])
        return [
            ("ranks", f"{self.layout.ranks}, {self.layout.way}"),
            ("shards", f"{self.layout.shards} in {self.layout.replicas} replicas"),
            ("parameters", f"{self.parameters:,}, of which {self.trained:,} are trained"),
            *memory,
            ("per device", f"{size(self.device)}, the most, {_MOMENTS[highest]}"),
            ("steps", f"{self.batches.steps:,} of {self.batches.global_batch // at_once} micro-batches per rank"),
            ("tokens", f"{queries * self.batches.mean_tokens:,.0f}"),
        ]


def size(number: float) -> str:
    """Bytes as people read them.

    >>> size(3 * 2**30), size(1.5 * 2**20)
    ('3.00 GiB', '1.5 MiB')
    """
    return f"{number / _GIB:.2f} GiB" if number >= _GIB else f"{number / 2**20:.1f} MiB"


def estimate(body: Backbone, layout: Layout, batches: Batches) -> Estimate:
    """What the training of a backbone needs, by its shapes."""
    every = list(body.parameters())
    learning = _learning(every)
    number = 2 if layout.mixed else 4
    whole = _Whole.of(body, layout, number, batches.again)
    activations, working = _activations(body, layout, batches, number)
    rows = min(batches.chunk, batches.tokens) * body.head.weight.shape[0]
    copy = 0.0 if layout.way == "sharded" else _bytes(_coarser([body.head.weight], number), number)
    wide = 4 if _learning([body.head.weight]) and copy else 0  # the gradient of a weight in float32 takes them so
    logits = rows * (4 if number == 4 else 6) + copy
    return Estimate(
        layout=layout,
        batches=batches,
        parameters=sum(weight.numel() for weight in every),
        trained=sum(weight.numel() for weight in learning),
        weights=_bytes(every) / layout.shards,
        gradients=_bytes(learning) / layout.shards,
        optimiser=2 * _bytes(learning) / layout.shards,
        gathered=whole.gathered,
        activations=activations,
        logits=logits,
        beginning=whole.head + max(logits + rows * wide, whole.layer + working),  # one is gone before the other
        ending=whole.ending,
        stepping=_bytes(learning) / layout.shards,
    )


def _bytes(weights: Iterable[Parameter], number: int | None = None) -> float:
    return float(sum(weight.numel() * (number or weight.itemsize) for weight in weights))


def _learning(weights: Iterable[Parameter]) -> list[Parameter]:
    return [weight for weight in weights if weight.requires_grad]


def _coarser(weights: Iterable[Parameter], number: int) -> list[Parameter]:
    """The matrices that autocast makes copies of."""
    return [weight for weight in weights if weight.ndim >= 2 and weight.itemsize > number]


class _Whole(NamedTuple):
    """What is whole for a while, besides what a rank keeps: weights; gradients of head, layer, and what is in none."""

    gathered: float
    head: float
    layer: float
    ending: float

    @staticmethod
    def of(body: Backbone, layout: Layout, number: int, again: bool) -> _Whole:
        """By the layout."""
        return _of_shards(body, number) if layout.way == "sharded" else _of_copies(body, number, again)


def _of_copies(body: Backbone, number: int, again: bool) -> _Whole:
    """Copies in bfloat16 that layers keep for their backward pass; Lightning lets autocast keep no others."""
    layers = [*body.layers(body.decoder), *body.layers(body.tower)]
    kept = [_coarser(layer.parameters(), number) for layer in layers if _learning(layer.parameters())]
    copies = max(map(_bytes, kept), default=0.0) if again else sum(map(_bytes, kept))
    embedding = body.whole.get_input_embeddings().weight
    return _Whole(copies * number / 4, _bytes(_learning([body.head.weight])), 0.0, _bytes(_learning([embedding])))


def _of_shards(body: Backbone, number: int) -> _Whole:
    """Two layers, one of them ahead, and all that is in no layer; gradients are sent in float32."""
    layers = [*body.layers(body.decoder), *body.read_layers]
    in_layers = {id(weight) for layer in layers for weight in layer.parameters()}
    apart = [weight for weight in body.parameters() if id(weight) not in in_layers]
    largest = max((list(layer.parameters()) for layer in layers), key=_bytes)
    sent = number + 4
    return _Whole(
        gathered=_bytes(apart, number) + 2 * _bytes(largest, number),
        head=_bytes(_learning([body.head.weight]), number),
        layer=_bytes(_learning(largest), sent),
        ending=_bytes(apart, number) + _bytes(_learning(apart), sent),
    )


def _activations(body: Backbone, layout: Layout, batches: Batches, number: int) -> tuple[float, float]:
    """What is kept to the end of the forward pass, and what the backward pass of a layer makes for itself.

    The latter is the layer's activations, where they are computed again, and about five gradients as wide as its
    network, as was seen in trainings on a CPU.
    """
    text, vision = body.config.get_text_config(), body.config.vision_config
    # What goes from layer to layer has the type of the embeddings, as they are or as they are gathered.
    stored = body.whole.get_input_embeddings().weight.itemsize
    states = min(stored, number) if layout.way == "sharded" else stored
    of_text = batches.tokens * _kept_per_token(text, states, number)
    inputs = batches.tokens * text.hidden_size * states
    layers = text.num_hidden_layers
    decoder = float(layers * (inputs if batches.again else of_text))
    of_tower = batches.patches * _kept_per_token(vision, states, number)
    learning = any(weight.requires_grad for _, weight in body.part("vision"))
    kept = decoder + of_tower * (len(body.layers(body.tower)) if learning else 1)
    return kept, (of_text if batches.again else 0.0) + 5.0 * batches.tokens * number * text.intermediate_size


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
