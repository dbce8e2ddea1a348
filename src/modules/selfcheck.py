"""Before the first step: do packed rows and separate ones agree on this checkpoint, on these data?

A backbone that looks across a packed row would train on wrong gradients without any error; its loss would look right.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..batches import PackedRows
    from .backbone import Backbone
    from .logps import ResponseLogps
    from .packed import PackedReader, Step, Way

log = logging.getLogger(__name__)
FINE, COARSE = 1e-3, 0.1
"""Nats per square root of a response's tokens: what rounding may do in float32, and in bfloat16."""


class TwoWays(Protocol):
    """A module that tells the log-probs of responses from packed rows, and from separate ones."""

    @property
    def backbone(self) -> Backbone:
        """Whose log-probs."""

    def by(self, step: Way, rows: PackedRows) -> ResponseLogps:
        """Sums and counts by a way that is named."""

    def modules(self) -> Iterator[torch.nn.Module]:
        """It and its parts."""

    def eval(self) -> object:
        """Switch dropout off."""


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


def agreement(scorer: TwoWays, rows: PackedRows) -> Agreement:
    """Compare the log-probs of shared prefixes with those of separate rows, without dropout."""
    with torch.no_grad(), _resting(scorer):
        packed = scorer.by("shared_prefix", rows)
        apart = scorer.by("separate", rows)
    if not apart.sums.isfinite().all():
        raise ValueError(f"first batch: expected finite log-probs, got {apart.sums.tolist()}; check weights and dtype")
    per_root = (packed.sums - apart.sums).abs() / apart.tokens.clamp(min=1).sqrt()
    coarse = scorer.backbone.whole.dtype != torch.float32 or torch.is_autocast_enabled(packed.sums.device.type)
    return Agreement(float(per_root.max()), COARSE if coarse else FINE)


def require_agreement(scorer: TwoWays, rows: PackedRows) -> None:
    """Refuse to share prefixes where that is not exact."""
    found = agreement(scorer, rows)
    if not found.holds:
        raise ValueError(f"step: {found}: this checkpoint looks across a packed row; say separate")


def settle(compared: TwoWays, reader: PackedReader, asked: Step, rows: PackedRows) -> None:
    """Before the first step: refuse, or where `asked` leaves the choice, give up, packed rows that are not exact."""
    if reader.step == "separate":
        return
    if asked == "shared_prefix":
        require_agreement(compared, rows)
        return
    found = agreement(compared, rows)
    if found.holds:
        log.info("self-check: packed and separate rows agree (%.1e, allowed %.0e)", *found)
        return
    log.warning("self-check: %s; going on with separate rows", found)
    reader.step = "separate"


@contextmanager
def _resting(module: TwoWays) -> Iterator[None]:
    """The module without dropout, and each of its parts as it was afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
