"""Checkpoints of a training that are whole or not there: at the end of a step, on all ranks or on none."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from torch.distributed.checkpoint.api import CheckpointException

from .. import durable
from ..preemption import Preempted, heard, listen
from .compute import gathered
from .limits import planned_steps
from .resuming import LAST, STATE, by_step, folder_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

KEPT = 2
"""Checkpoints that are kept: should the newest be damaged, there is another."""

_SHARD = re.compile(r"__(\d+)_\d+\.distcp")
_log = logging.getLogger(__name__)
T = TypeVar("T")


class LocalFile(TorchCheckpointIO):
    """Checkpoints as local files: written in their place, and read without running what they say.

    Lightning's own writes into the system's temporary folder first, often on another disk, and may download.
    """

    def save_checkpoint(self, checkpoint: Any, path: str | Path, storage_options: Any = None) -> None:  # noqa: ANN401
        """Write a checkpoint."""
        try:
            with Path(path).open("wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # of which torch says only that the file came out too short
                raise error.__context__ from None
            raise

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = "cpu",  # noqa: ANN401
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint; a URL is refused, and so is a file that would run code, whatever is asked for."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: expected a checkpoint in a local file, found none; download it first")
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        return checkpoint


class SaveWhole(Callback):
    """Save every few optimizer steps, after the last one, and before going where the machine is taken away.

    Last in the list of callbacks, so that what the others count of a step is in it.
    """

    def __init__(self, checkpoints: Path, every: int, kept: int = KEPT) -> None:
        if every < 1:
            raise ValueError(f"save_every: expected 1 step or more, got {every}")
        self.checkpoints, self.every, self.kept = checkpoints, every, kept
        self._seen = self._resumed = self._end = 0
        self._saved: set[int] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not save again where a checkpoint ended, in the middle of the next step."""
        self._seen = self._resumed = trainer.global_step
        self._end = planned_steps(trainer, trainer.num_training_batches)
        self._saved = set()
        listen()  # Lightning's own handlers, which are new, call the other ranks from wherever this one is

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Save at the end of a step that is due, or that is the last before the machine is taken away."""
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        told = trainer.strategy.reduce_boolean_decision(heard() is not None, all=False)
        if told or step % self.every == 0 or step == self._end:
            self._save(trainer, step)
        if told:
            why = heard() or "another rank was"
            _log.warning("%s: told to go (%s), step %d is saved; the same command continues", self.run, why, step)
            raise Preempted(trainer.is_global_zero)

    @property
    def run(self) -> Path:
        """The folder of the training."""
        return self.checkpoints.parent

    def _save(self, trainer: Trainer, step: int) -> None:
        """Write a draft together, tell the first rank what is in it, and let that one put it in its place."""
        folder = folder_of(self.checkpoints, step)
        draft = self._first(trainer, lambda: durable.begin(folder))
        written = self._each(trainer, lambda: _written(trainer, draft))
        files = {name: told for part in written for name, told in part.items()}
        about = {"step": step, "ranks": trainer.world_size}
        self._first(trainer, lambda: durable.publish(draft, folder, files, about))
        self._saved.add(step)
        if trainer.is_global_zero:
            self._tidy()

    def _tidy(self) -> None:
        """Remove all but the newest; one of a later step than this start began with was passed over by it."""
        found = by_step(self.checkpoints)
        good = [step for step in found if step <= self._resumed or step in self._saved][: self.kept]
        left = [path for ending in (durable.DRAFT, durable.GONE) for path in self.checkpoints.glob(f"step-*{ending}")]
        for folder in [*left, *(found[step] for step in found.keys() - good)]:
            try:
                durable.remove(folder)
            except OSError as error:  # on a network's disk a file may still be open elsewhere
                _log.warning("%s: could not be removed (%s); the next checkpoint tries again", folder, error)
        if len(good) == self.kept:
            (self.checkpoints / LAST).unlink(missing_ok=True)

    def _first(self, trainer: Trainer, act: Callable[[], T]) -> T:
        """What the first rank returns."""
        return cast("T", self._each(trainer, lambda: act() if trainer.is_global_zero else None)[0])

    def _each(self, trainer: Trainer, act: Callable[[], T]) -> list[T]:
        """What every rank returns. If the disk fails one of them, all end, and none waits for it for ever."""
        mine: tuple[T | None, str | None]
        try:
            mine = act(), None
        except (OSError, CheckpointException) as failure:
            _log.debug("saving failed", exc_info=True)
            mine = None, f"rank {trainer.global_rank}: {_cause(failure)}"
        results = gathered(mine)
        if failures := [told for _, told in results if told]:
            raise ValueError(self._given_up(trainer, failures))
        return [cast("T", found) for found, _ in results]

    def _given_up(self, trainer: Trainer, failures: list[str]) -> str:
        """What to tell, once the room that the draft took is free again."""
        if trainer.is_global_zero:
            shutil.rmtree(durable.draft_of(folder_of(self.checkpoints, self._seen)), ignore_errors=True)
        before = max(self._saved, default=self._resumed)
        return (
            f"{self.checkpoints}: the checkpoint of step {self._seen} could not be written: {'; '.join(failures)}; "
            f"there are {_free(self.checkpoints)} free: make room, and the same command continues from step {before}"
        )


def _written(trainer: Trainer, draft: Path) -> Mapping[str, Any]:
    """Save, and return what the seal says of the files that are this rank's."""
    try:
        trainer.save_checkpoint(draft / STATE)
    except OSError:
        trainer.strategy.barrier()  # the one with which saving ends, at which the other ranks wait
        raise
    mine = [name for name in durable.contents(draft) if _writer_of(name) == trainer.global_rank]
    return durable.settle(draft, mine)


def _writer_of(name: str) -> int:
    """The rank that has written a file.

    >>> _writer_of("state/__3_0.distcp"), _writer_of("state/meta.pt"), _writer_of("state")
    (3, 0, 0)
    """
    shard = _SHARD.fullmatch(name.rpartition("/")[2])
    return int(shard[1]) if shard else 0


def _cause(failure: BaseException) -> str:
    """What went wrong, on one line; of shards, for the first rank that it went wrong for."""
    if isinstance(failure, CheckpointException):
        rank, (cause, _) = min(failure.failures.items())
        return f"shard {rank}: {cause}"
    return str(failure)


def _free(folder: Path) -> str:
    """The room on the disk of a folder, which need not be there."""
    while not folder.is_dir():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MB"
