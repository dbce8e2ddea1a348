"""Moves beta0 over the steps of a training."""

from __future__ import annotations

from dataclasses import replace
from math import cos, inf, pi
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, cast, get_args

from lightning.pytorch import Callback

from .limits import planned_steps

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Kind = Literal["constant", "linear", "cosine"]


class HasBeta0(Protocol):
    """A frozen dataclass, one of whose fields is beta0."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def beta0(self) -> float:
        """The beta of a pair that gains nothing."""


class HasBeta(Protocol):
    """A module whose beta can be replaced."""

    beta: HasBeta0


def beta0_at(step: int, total: int, kind: Kind, start: float, end: float) -> float:
    """Return beta0 before optimizer step `step` of `total`; `end` is reached when all are done, and kept.

    >>> [round(beta0_at(step, 4, "linear", 0.1, 0.5), 6) for step in range(6)]
    [0.1, 0.2, 0.3, 0.4, 0.5, 0.5]
    >>> [round(beta0_at(step, 4, "cosine", 0.1, 0.5), 6) for step in (0, 2, 4)]
    [0.1, 0.3, 0.5]
    """
    if kind == "constant":
        return start
    share = min(step / total, 1.0)
    done = share if kind == "linear" else (1 - cos(pi * share)) / 2
    return (1 - done) * start + done * end  # both ends exactly


class BetaSchedule(Callback):
    """Set the module's beta0 before every step, from the configured value to `end`; logged as `beta/beta0`.

    It follows from the step and the number of steps alone, so a resume needs no state. The module has its
    configured beta back when the training ends or fails: whoever fits it again, or validates it, begins from there.
    """

    def __init__(self, kind: Kind = "constant", end: float | None = None, total: int | None = None) -> None:
        """Reach `end` after `total` steps; without a total, after those that the trainer will take."""
        if kind not in get_args(Kind):
            raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}, got {kind!r}; choose one")
        if (kind == "constant") != (end is None):
            wanted = "none, as nothing moves" if kind == "constant" else "the last beta0"
            raise ValueError(f"end: expected {wanted} (kind: {kind}), got {end}; change either")
        if end is not None and not 0 < end < inf:
            raise ValueError(f"end: expected a number above 0, got {end}; 0.1 is usual for beta0")
        if total is not None and total < 1:
            raise ValueError(f"total: expected 1 step or more, got {total}; leave it out to take the trainer's")
        self.kind, self.end, self.total = kind, end, total
        self._configured: HasBeta0 | None = None
        self._steps = 0  # none before training starts

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what was configured."""
        self._configured, self._steps = cast("HasBeta", pl_module).beta, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the steps to come."""
        self._steps = self.total or planned_steps(trainer, trainer.num_training_batches)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Set and log beta0."""
        beta0 = self._set(trainer, pl_module)
        pl_module.log("beta/beta0", beta0, on_step=True, on_epoch=False, batch_size=1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set beta0 for the step that training has come to, or at which it has ended."""
        if self.total and self._configured is None:
            self._configured, self._steps = cast("HasBeta", pl_module).beta, self.total
        if self._steps:
            self._set(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its configured beta back."""
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its configured beta back."""
        self._restore(pl_module)

    def _set(self, trainer: Trainer, pl_module: LightningModule) -> float:
        configured, module = cast("HasBeta0", self._configured), cast("HasBeta", pl_module)
        start = configured.beta0
        beta0 = beta0_at(trainer.global_step, self._steps, self.kind, start, start if self.end is None else self.end)
        module.beta = replace(configured, beta0=beta0)
        return beta0

    def _restore(self, pl_module: LightningModule) -> None:
        if self._configured is not None:
            cast("HasBeta", pl_module).beta = self._configured
        self._configured, self._steps = None, 0
