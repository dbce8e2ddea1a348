"""What a step costs, from shapes alone: the multiplications of weights and of attention, each counted twice."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..reports import Work
from .packed import lengths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..batches import PackedQueries
    from .backbone import Backbone

Lengths = tuple[int, tuple[int, ...]]
"""Of one query: the tokens of its prefix, and of each continuation."""


def seen_pairs(lengths: Lengths, shared: bool) -> int:
    """How many (looking, looked at) pairs of tokens attention computes for a query.

    >>> seen_pairs((2, (1, 1)), shared=True), seen_pairs((2, (1, 1)), shared=False)
    (9, 12)
    """
    prefix, segments = lengths
    own = sum(length * prefix + length * (length + 1) // 2 for length in segments)
    return own + prefix * (prefix + 1) // 2 * (1 if shared else len(segments))


def tokens_of(lengths: Lengths, shared: bool) -> int:
    """How many tokens of a query go through the decoder.

    >>> tokens_of((5, (1, 2)), shared=True), tokens_of((5, (1, 2)), shared=False)
    (8, 13)
    """
    prefix, segments = lengths
    return sum(segments) + prefix * (1 if shared else len(segments))


def pixels_of(batch: PackedQueries) -> int:
    """The numbers in which pictures and films come."""
    return sum(seen.numel() for name, seen in batch.rows.features.items() if name.startswith("pixel_values"))


def supervised_of(batch: PackedQueries) -> int:
    """Tokens whose log-probs are computed."""
    return int((batch.rows.labels >= 0).sum())


class Cost:
    """The cost of a backbone per token, per look and per patch."""

    def __init__(self, backbone: Backbone) -> None:
        config: Any = backbone.config.get_text_config()
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        layers = [weight for name, weight in backbone.part("language") if ".layers." in name and weight.ndim >= 2]
        self.per_token = 2.0 * sum(weight.numel() for weight in layers)
        self.per_look = 4.0 * width * config.num_hidden_layers
        self.per_logits = 2.0 * backbone.head.weight.numel()
        tower = [weight for _, weight in backbone.part("vision") if weight.ndim >= 2]
        self.per_patch = 0.0 if backbone.tower_kept else 2.0 * sum(weight.numel() for weight in tower)
        self.tower_trains = any(weight.requires_grad for weight in tower)
        side = backbone.config.vision_config.patch_size
        frames = getattr(backbone.config.vision_config, "temporal_patch_size", 1)
        self.pixels_per_patch = 3 * frames * (math.prod(side) if isinstance(side, (list, tuple)) else side**2)
        trained = sum(weight.numel() for weight in layers if weight.requires_grad)
        self.backward = 1 + trained / max(1, sum(weight.numel() for weight in layers))
        """Of the decoder's layers, over their forward pass: the gradient of states, and of the weights that learn."""

    def work(self, batch: PackedQueries, shared: bool, again: bool) -> Work:
        """What a micro-batch costs; `again`: the layers are computed once more in the backward pass."""
        sizes: list[Lengths] = lengths(batch.rows)
        flops = self.step(sizes, supervised_of(batch), pixels_of(batch), shared, again)
        tokens, unique = (sum(tokens_of(size, way) for size in sizes) for way in (shared, True))
        return Work(sum(map(bool, batch.ids)), len(batch.pairs), tokens, unique, flops)

    def step(self, lengths: Sequence[Lengths], supervised: int, pixels: int, shared: bool, again: bool) -> float:
        """Forward and backward of a batch; `again`: the layers are computed once more in the backward pass."""
        decoder = sum(
            self.per_token * tokens_of(each, shared) + self.per_look * seen_pairs(each, shared) for each in lengths
        )
        tower = self.per_patch * pixels / self.pixels_per_patch * (3 if self.tower_trains else 1)
        return float(decoder * (1 + again + self.backward) + self.per_logits * supervised * 3 + tower)
