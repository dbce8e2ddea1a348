"""What a training has cost so far, on all ranks and through all its resumes; and when it is time to log."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Callback

from ..reports import Work

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_log = logging.getLogger(__name__)
T = TypeVar("T")


def gathered(mine: T) -> list[T]:
    """Return what every rank passes, in the order of the ranks. All ranks must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def log_now(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Hand metrics, the same on all ranks, to the loggers, under the number that Lightning gives this step."""
    for logger in trainer.loggers if trainer.is_global_zero else []:
        logger.log_metrics(dict(metrics), step=max(trainer.global_step - 1, 0))


def log_every(trainer: Trainer) -> int:
    """Return after how many steps Lightning logs; 0 is never."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by the trainer's logger connector
    return every


class LogInterval:
    """Says once, after the last micro-batch, at every step at which Lightning logs; the same on all ranks."""

    def __init__(self) -> None:
        self._last = 0

    def start(self, trainer: Trainer) -> None:
        """Begin an interval at the present step."""
        self._last = trainer.global_step

    def unfinished(self, trainer: Trainer) -> bool:
        """Return whether there were steps since the last interval ended."""
        return trainer.global_step != self._last

    def due(self, trainer: Trainer) -> bool:
        """Return whether an interval ends here, and begin the next one."""
        every = log_every(trainer)
        if not every or trainer.global_step % every or not self.unfinished(trainer):
            return False
        self.start(trainer)
        return True


class Cost(NamedTuple):
    """What training cost. Work is that of training steps; seconds are all, also those of validations."""

    device_seconds: float = 0.0
    tokens: int = 0
    unique_tokens: int = 0
    pairs: int = 0
    queries: int = 0
    flops: float = 0.0
    peak_memory_bytes: int = 0
    """The largest of any rank: allocated on its GPU or, without one, resident in its process."""

    def plus(self, other: Cost) -> Cost:
        """Return both together: sums, and the larger one of two peaks.

        >>> Cost(tokens=2, peak_memory_bytes=5).plus(Cost(tokens=3, peak_memory_bytes=4))[1::5]
        (5, 5)
        """
        sums = Cost._make(one + two for one, two in zip(self, other, strict=True))
        return sums._replace(peak_memory_bytes=max(self.peak_memory_bytes, other.peak_memory_bytes))


class ComputeLedger(Callback):
    """Keep the cost of the training, over all ranks; logged as `ledger/*`, saved with every checkpoint.

    What was computed after a checkpoint and lost in a crash is not in it. A rank counts as one device.
    """

    def __init__(self) -> None:
        self._settled = Cost()  # of all ranks
        self._own = Cost()  # of this rank, since ranks last told each other
        self._since: float | None = None
        self._interrupted = False
        self._interval = LogInterval()

    def totals(self) -> Cost:
        """Return the cost up to the last log interval, checkpoint or end of training."""
        return self._settled

    def state_dict(self) -> dict[str, Any]:
        """Return the cost until now. Collective, as saving a checkpoint is."""
        self._settle()
        return self._settled._asdict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the cost in a checkpoint."""
        self._settled, self._own = Cost(**state_dict), Cost()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since, self._interrupted = perf_counter(), False
        self._interval.start(trainer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401  # Lightning's
        batch: object,
        batch_idx: int,
    ) -> None:
        """Add what a micro-batch cost."""
        work: Work = outputs["work"]
        used = Cost(
            tokens=work.tokens,
            unique_tokens=work.unique_tokens,
            pairs=work.pairs,
            queries=work.queries,
            flops=work.flops,
            peak_memory_bytes=peak_memory(pl_module.device),
        )
        self._own = self._own.plus(used)
        if self._interval.due(trainer):
            self._settle_and_log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the cost of all, and stop the clock."""
        self._settle_and_log(trainer)
        self._since = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the clock, and from here on ask no other rank, which may not be there to answer."""
        self._tick()
        self._since, self._interrupted = None, True

    def _settle_and_log(self, trainer: Trainer) -> None:
        self._settle()
        log_now(trainer, {f"ledger/{name}": value for name, value in self._settled._asdict().items()})

    def _tick(self) -> None:
        if self._since is not None:
            now = perf_counter()
            self._own = self._own.plus(Cost(device_seconds=now - self._since))
            self._since = now

    def _settle(self) -> None:
        """Let all ranks know the cost of all."""
        self._tick()
        alone = self._interrupted and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if alone:
            _log.warning(
                "the training was interrupted: what other ranks did since the last log interval is not counted"
            )
        for cost in [self._own] if alone else gathered(self._own):
            self._settled = self._settled.plus(cost)
        self._own = Cost()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were ever allocated on a GPU or, without one, resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes everywhere but on a Mac
