"""AdamW with a warm-up and a cosine, over a number of steps that the data decide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Optimiser:
    """How weights are moved.

    Args:
        learning_rate: At its highest.
        warmup: The part of the steps in which it rises.
        weight_decay: Of matrices; gains and biases have none.
        betas: Momenta of the gradient and of its square.
        least: The part of the learning rate at which the cosine ends.
    """

    learning_rate: float = 1e-6
    warmup: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    least: float = 0.0

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise ValueError(f"optimiser: expected learning_rate > 0 and weight_decay of 0 or more, got {self}")
        if not 0 <= self.warmup < 1 or not 0 <= self.least <= 1:
            raise ValueError(f"optimiser: expected warmup from 0 to below 1 and least from 0 to 1, got {self}")

    def over(self, module: torch.nn.Module, steps: int) -> dict[str, Any]:
        """What Lightning's `configure_optimizers` returns; frozen weights are left out."""
        trained = [weight for weight in module.parameters() if weight.requires_grad]
        groups = [
            {"params": [weight for weight in trained if weight.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [weight for weight in trained if weight.ndim < 2], "weight_decay": 0.0},
        ]
        # Torch itself takes many weights at once where they lie on a GPU, but for shards: those one after another.
        at_once = True if trained and all(isinstance(weight, DTensor) for weight in trained) else None
        adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.learning_rate, betas=self.betas, foreach=at_once
        )
        warm = math.ceil(self.warmup * steps)
        rate = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: share_of_peak(step, steps, warm, self.least))
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


def share_of_peak(step: int, steps: int, warm: int, least: float) -> float:
    """The learning rate of a step as a part of the highest: up in a straight line, then down a cosine.

    >>> [round(share_of_peak(step, 100, 10, 0.1), 2) for step in (0, 9, 10, 55, 100)]
    [0.1, 1.0, 1.0, 0.55, 0.1]
    """
    if step < warm:
        return (step + 1) / warm
    done = min(1.0, (step - warm) / max(1, steps - warm))
    return least + (1 - least) * (1 + math.cos(math.pi * done)) / 2


def require_fine(module: torch.nn.Module) -> None:
    """Refuse to train weights whose type rounds the optimiser's steps away."""
    coarse = [weight.dtype for weight in module.parameters() if weight.requires_grad and weight.dtype.itemsize < 4]
    if coarse:
        raise ValueError(
            f"model.backbone.dtype: expected float32 for weights that are trained, got {coarse[0]}: steps of AdamW are "
            "smaller than its rounding; say float32 with trainer.precision bf16-mixed, or train adapters (lora)"
        )
