"""The optimiser of both trainings: AdamW with a short warm-up, then a straight line to zero."""

from __future__ import annotations

from typing import Any

import torch

WARM_UP = 20
PEAK_RATE = 3e-3


def adamw(module: torch.nn.Module, steps: int) -> dict[str, Any]:
    """What `configure_optimizers` returns; gains and biases are not decayed, frozen weights are left out."""
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in trained if weight.ndim >= 2], "weight_decay": 0.05},
        {"params": [weight for weight in trained if weight.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_peak(step, steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


def share_of_peak(step: int, steps: int) -> float:
    """The learning rate of a step, as a share of the peak.

    >>> [round(share_of_peak(step, 100), 2) for step in (0, 19, 50, 100)]
    [0.05, 0.81, 0.5, 0.0]
    """
    return min((step + 1) / WARM_UP, 1 - step / steps)
