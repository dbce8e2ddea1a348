"""Checkpoints of a training that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

LAST = "last.ckpt"


class SaveWhole(Callback):
    """Save every few optimizer steps, under a passing name until the file is complete.

    Last in the list of callbacks, so that what the others count of a step is in it.
    """

    def __init__(self, folder: Path, every: int) -> None:
        if every < 1:
            raise ValueError(f"save_every: expected 1 step or more, got {every}")
        self.path, self.every = folder / LAST, every
        self._saved = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not save again where a checkpoint ended, in the middle of the next step."""
        self._saved = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Save at the end of a step that is due."""
        if trainer.global_step % self.every == 0 and trainer.global_step != self._saved:
            self._saved = trainer.global_step
            draft = self.path.with_name(f"{LAST}.tmp")
            trainer.save_checkpoint(draft)
            if trainer.is_global_zero:
                descriptor = os.open(draft, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                draft.replace(self.path)
            trainer.strategy.barrier()
