"""Before the first step: do packed rows and separate ones agree on this checkpoint, on these data?

A backbone that looks across a packed row would train on wrong gradients without any error; its loss would look right.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..batches import PackedRows
    from .scorer import ResponseScorer

FINE, COARSE = 1e-3, 0.1
"""Nats per square root of a response's tokens: what rounding may do in float32, and in bfloat16."""


class Agreement(NamedTuple):
    """How far two ways to the same log-probs are apart."""

    apart: float
    """The largest difference, in nats per square root of the tokens."""
    allowed: float

    def __str__(self) -> str:
        return f"packed and separate rows differ by {self.apart:.2g} nats per root of tokens, expected {self.allowed:g}"

    @property
    def holds(self) -> bool:
        """Whether rounding explains it; not a number is no agreement."""
        return self.apart <= self.allowed


def agreement(scorer: ResponseScorer, rows: PackedRows) -> Agreement:
    """Compare the log-probs of shared prefixes with those of separate rows, without dropout."""
    with torch.no_grad(), _resting(scorer):
        packed = scorer.by("shared_prefix", rows)
        apart = scorer.by("separate", rows)
    if not apart.sums.isfinite().all():
        raise ValueError(f"first batch: expected finite log-probs, got {apart.sums.tolist()}; check weights and dtype")
    per_root = (packed.sums - apart.sums).abs() / apart.tokens.clamp(min=1).sqrt()
    coarse = scorer.backbone.whole.dtype != torch.float32 or torch.is_autocast_enabled(packed.sums.device.type)
    return Agreement(float(per_root.max()), COARSE if coarse else FINE)


def require_agreement(scorer: ResponseScorer, rows: PackedRows) -> None:
    """Refuse to share prefixes where that is not exact."""
    found = agreement(scorer, rows)
    if not found.holds:
        raise ValueError(f"step: {found}: this checkpoint looks across a packed row; say separate")


@contextmanager
def _resting(module: torch.nn.Module) -> Iterator[None]:
    """The module without dropout, and each of its parts as it was afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
