"""When a training ends: the number of its steps, known before it begins, and whether it has come to them."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import EarlyStopping

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def limited(trainer: Trainer, batches: int) -> int:
    """How many of a rank's batches an epoch has, as `trainer.num_training_batches` will be."""
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def planned_steps(trainer: Trainer, batches: float) -> int:
    """How many optimizer steps a trainer takes where an epoch has so many batches of a rank.

    `trainer.estimated_stepping_batches` would make the loader anew, and lose its position.
    """
    per_epoch = batches if batches == inf else -(-int(batches) // trainer.accumulate_grad_batches)
    limits: list[float] = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs * per_epoch)
    steps = min(limits, default=inf)
    if not 1 <= steps < inf:
        raise ValueError(
            f"trainer: expected a training that ends after one step or more, got max_epochs {trainer.max_epochs}, "
            f"max_steps {trainer.max_steps} and {per_epoch} steps an epoch; set max_steps, or max_epochs"
        )
    return int(steps)


def stopped_early(trainer: Trainer) -> bool:
    """Whether a callback has found that more steps are of no use; a limit of time says nothing of that."""
    stops = [each for each in getattr(trainer, "callbacks", []) if isinstance(each, EarlyStopping)]
    return any(each.wait_count >= each.patience for each in stops)
