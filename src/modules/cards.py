"""What a user of a trained model must know, at the end of its training and of any checkpoint: its card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..fingerprint import of_value
from .saving import model_card

if TYPE_CHECKING:
    from .critic import CritiqueRewardModule
    from .mmdpo import MMDPOModule
    from .rewardmodel import Judging

Told = dict[str, object]
ALIGNED, JUDGES = "aligned by MM-DPO", "a reward model that writes critiques"


def training_card(
    what: str, settings: Mapping[str, Any], steps: int, of_data: Told, of_training: Told, cost: Told
) -> str:
    """Where a model comes from, what it was trained on and how, at which cost."""
    every = {
        "queries per step": settings["data"]["global_batch"],
        "steps": steps,
        "seed": settings["run"]["seed"],
    }
    return model_card(
        f"{Path(settings['model']['backbone']['path']).name}, {what}",
        {
            "Data": of_data,
            "Training": of_training | every,
            "Cost": cost,
            "Config": {name: of_value(settings[name])[:16] for name in ("model", "data", "trainer")},
        },
    )


def of_policy(module: MMDPOModule, settings: Mapping[str, Any]) -> Told:
    """How a policy is aligned."""
    told: Told = {name: getattr(module, name) for name in ("margin", "beta", "loss", "sft_weight", "optimiser")}
    return told | {"beta_schedule": settings["beta_schedule"]}


def of_judge(module: CritiqueRewardModule, judging: Judging) -> Told:
    """How a reward model is asked, and what it learns."""
    template = f"{judging.template.name}, {judging.template.digest[:16]}"
    dimensions = ", ".join(judging.dimensions) or "none"
    return {
        "template": template,
        "frames of a film": judging.frames,
        "weights": module.weights,
        "dimensions": dimensions,
        "optimiser": module.optimiser,
    }
