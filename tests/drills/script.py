"""One rank of a training that writes down its samples, and that may wait to be killed where it is told to."""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback

from mmrlhf import cli, train  # noqa: F401 - the trainer is imported once, by the process that all ranks are forked from
from tests.datamodules.ranks import SampleLog

READY = "ready to be killed"
CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


class Logs(SampleLog, Callback):
    """Write lines of step, rank and query, and of what is being done, in a file that all ranks share."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_start(self, trainer, pl_module):
        """Tell from which step on everything is done again, before any rank does."""
        if trainer.is_global_zero:
            self.log_lines(f"start {trainer.global_step}")
        trainer.strategy.barrier()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Write down what is trained on."""
        self.log_lines(*(f"{trainer.global_step} {trainer.global_rank} {name}" for name in batch.ids))

    def on_validation_start(self, trainer, pl_module):
        """Say that it validates."""
        self.log_lines("now validation")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        """Say that it saves."""
        self.log_lines("now saving")


def waits_while_saving(checkpoints: Path, number: int, ready: Path) -> None:
    """Stop for good before a call of this number that touches the checkpoints, and say that it is time to kill."""
    left = [number]

    def hook(event, args):
        if event in CALLS and str(args[0]).startswith(str(checkpoints)):
            left[0] -= 1
            if left[0] == -1:
                ready.touch()
                time.sleep(3600)

    sys.addaudithook(hook)


def run(folder: Path, *, argv: list[str], dies: dict[int, int]) -> None:
    """Train; `dies` tells of ranks before which of their calls they wait to be killed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if rank in dies:
        waits_while_saving(folder / "out" / "checkpoints", dies[rank], folder / READY)
    if code := cli.main(argv):
        sys.exit(code)
