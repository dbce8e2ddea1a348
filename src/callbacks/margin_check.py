"""A check of the first batches: what pulls a pair apart follows the pair's margin.

At z = 0 the loss is log 2 whatever beta is, so a beta that ignores the margin cannot be seen in the loss of an
untrained policy. It shows in the gradient, whose size there is beta / 2 for the sigmoid loss: that is looked at.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from lightning.pytorch import Callback
from torch import Tensor

from ..reports import PairReport
from .compute import gathered

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_log = logging.getLogger(__name__)


class Rule(Protocol):
    """A rule for beta."""

    @property
    def needs_margin(self) -> bool:
        """Whether beta follows from each pair's margin."""


class Pulls(Protocol):
    """A module that tells how strongly it pulls pairs apart."""

    beta: Rule

    def pull(self, margin: Tensor) -> Tensor:
        """Return |dloss/dz| of every pair at z = 0, without gradient."""


class Slopes(NamedTuple):
    """How the pull moves with the margin, over pairs that are not clamped."""

    pairs: int = 0
    seen: int = 0
    """Pairs with a margin, clamped or not."""
    low: float = float("inf")
    high: float = float("-inf")
    moved: bool = False
    """Whether the pull at any pair's margin is another than at a margin of 0."""

    def plus(self, other: Slopes) -> Slopes:
        """Return both together."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        return Slopes(self.pairs + other.pairs, self.seen + other.seen, low, high, self.moved or other.moved)


def slopes(module: Pulls, margin: Tensor) -> Slopes:
    """Measure d|pull|/ddelta at margins above 0 by central differences, and whether it moves at all from 0 on."""
    known = margin[~margin.isnan()]
    free = known[known > 0].double()  # small differences are lost in single precision
    if not len(free):
        return Slopes(seen=len(known))
    step = 1e-3 * free.clamp(max=1.0)
    slope = (module.pull(free + step) - module.pull(free - step)) / (2 * step)
    moved = bool((module.pull(free) != module.pull(torch.zeros_like(free))).any())
    return Slopes(len(free), len(known), float(slope.min()), float(slope.max()), moved)


class MarginCheck(Callback):
    """Tell at the first batch whether the gradient moves with the margin, and make an error of it if not.

    Looks where the module's beta needs margins and has a w above 0. In the paper's released code nothing moves,
    because a beta from the batch's log-ratios is written over the one from the margins. A batch in which all
    margins are 0 or less cannot tell: that is a warning, and the next one is asked.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._done = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check this training too."""
        beta = cast("Pulls", pl_module).beta
        self._asked = 0
        self._done = not (beta.needs_margin and getattr(beta, "w", 1.0) > 0)  # a rule without w is checked too

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401  # Lightning's
        batch: object,
        batch_idx: int,
    ) -> None:
        """Check until a batch has told."""
        if self._done:
            return
        report: PairReport = outputs["pairs"]
        found = Slopes()
        for of_rank in gathered(slopes(cast("Pulls", pl_module), report.margin)):
            found = found.plus(of_rank)
        if not found.pairs:
            self._warn(found)
            return
        self._done = True
        if not found.moved:
            raise ValueError(
                f"beta: expected |dloss/dz| to move with the margin (w = {getattr(pl_module.beta, 'w', None)}), got "
                f"the same at a margin of 0 and at those of {found.pairs} pairs; hand each pair's margin to beta and "
                "that beta to the loss, or set w to 0 (the loss would not tell: at z = 0 it is log 2 for every beta)"
            )
        _log.info(
            "beta moves with the margin: d|pull|/ddelta between %.3g and %.3g over %d pairs%s",
            found.low,
            found.high,
            found.pairs,
            "" if found.low or found.high else " (all at the cap, where it moves no more)",
        )

    def _warn(self, found: Slopes) -> None:
        self._asked += 1
        if self._asked == 1 and found.seen:
            _log.warning(
                "beta cannot be seen to move yet: all %d margins of the first batch are 0 or less, so all betas are "
                "beta0; if that goes on, the margins may have the wrong sign",
                found.seen,
            )
