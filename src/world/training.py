"""Training the tiny policy: resumable, with a progress bar, and examined at the end."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar
from torch.utils.data import DataLoader, Sampler

from .. import jsonl
from .exam import examine, show
from .policy import build_model, build_processor, load_policy
from .sft import ROWS_PER_STEP, SFTModule, TalkRows, collate

if TYPE_CHECKING:
    from .plan import Planned

log = logging.getLogger(__name__)
SAVE_EVERY = 50


class StepBatches(Sampler[list[int]]):
    """The rows of every step from `first` on; it keeps its full length, so Lightning counts on from there."""

    def __init__(self, steps: int, first: int) -> None:
        self.steps = steps
        self.first = first

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.steps):
            yield list(range(step * ROWS_PER_STEP, (step + 1) * ROWS_PER_STEP))


class SaveWhole(lightning.Callback):
    """A checkpoint every few steps, under a passing name until it is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        """Save when the step is due."""
        if trainer.global_step % SAVE_EVERY == 0:
            passing = self.path.with_name(self.path.name + ".tmp")
            trainer.save_checkpoint(passing)
            passing.replace(self.path)


def train_policy(out: Path, planned: Sequence[Planned], seed: int, steps: int) -> None:
    """Train and save `out/policy` unless it is there; then show how often it is right on the test scenes."""
    folder = out / "policy"
    record = folder / "training.json"
    settings = {"seed": seed, "steps": steps}
    if record.exists():
        there = json.loads(record.read_text("utf-8"))
        if there["settings"] != settings:
            raise ValueError(
                f"{folder}: holds a policy trained with {there['settings']}, asked for {settings}; "
                "remove that folder to train anew"
            )
        log.info("%s: the policy is there already", folder)
        show(there["accuracy"])
        return
    _train(out, seed, steps)
    accuracy = examine(*load_policy(folder), out / "media", planned)
    with jsonl.replacing(record) as file:
        file.write(json.dumps({"settings": settings, "accuracy": accuracy}, indent=1).encode() + b"\n")
    show(accuracy)


def _train(out: Path, seed: int, steps: int) -> None:
    """From the last checkpoint, or from nothing, to a saved folder."""
    from transformers import AutoTokenizer

    folder, checkpoint = out / "policy", out / "policy.ckpt"
    if folder.exists():
        return
    processor = build_processor(AutoTokenizer.from_pretrained(out / "tokenizer", local_files_only=True))
    module = SFTModule(build_model(processor.tokenizer, seed), steps)
    first = _steps_done(checkpoint)
    loader: DataLoader[Any] = DataLoader(
        TalkRows(processor, seed),
        batch_sampler=StepBatches(steps, first),
        collate_fn=partial(collate, pad=processor.tokenizer.pad_token_id),
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[SaveWhole(checkpoint), RichProgressBar()],
    )
    trainer.fit(module, loader, ckpt_path=str(checkpoint) if first else None)
    passing = folder.with_name("policy.tmp")
    shutil.rmtree(passing, ignore_errors=True)
    module.model.save_pretrained(passing)
    processor.save_pretrained(passing)
    passing.replace(folder)
    checkpoint.unlink(missing_ok=True)


def _steps_done(checkpoint: Path) -> int:
    import torch

    if not checkpoint.exists():
        return 0
    return int(torch.load(checkpoint, weights_only=True, map_location="cpu")["global_step"])
