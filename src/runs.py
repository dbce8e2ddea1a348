"""Where a training goes, and what makes it this one and no other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .jsonl import loads
from .settings import write_json

_FREE = {"shards", "scores", "processor", "workers", "cache", "micro_batch", "resume_inexact"}
"""Of the data, what may change from one start to the next: where the files lie (their contents are checked when the
training continues), and how, not what, is computed."""
_TRAINED_WITH = (
    *("max_epochs", "max_steps", "limit_train_batches", "overfit_batches"),
    *("precision", "gradient_clip_val", "gradient_clip_algorithm"),
)


@dataclass(frozen=True)
class Run:
    """Where a training goes, and how it is kept.

    Args:
        out: Folder of the run; the same command continues there.
        seed: Decides the order of the data, dropout and controls.
        tracking: Where MLflow keeps the run: a database or a server; null for nowhere.
        experiment: Under which name.
        name: Of the run; default: of its folder.
        save_every: Optimizer steps between checkpoints.
        any_reference: Accept log-probs of another reference than the checkpoint that is trained.
    """

    out: Path
    seed: int = 0
    tracking: str | None = "sqlite:///mlflow.db"
    experiment: str = "mm-dpo"
    name: str | None = None
    save_every: int = 50
    any_reference: bool = False


def identity(settings: dict[str, Any]) -> dict[str, Any]:
    """What makes a training this one: another start may not change it."""
    data = {name: value for name, value in settings["data"].items() if name not in _FREE}
    bounds = {name: settings["trainer"][name] for name in _TRAINED_WITH}
    if str(settings["model"]["beta"].get("class_path")).endswith("ImplicitBeta"):
        data["micro_batch"] = settings["data"]["micro_batch"]  # whose pairs are its batch
    told = {"model": _without_features(settings["model"]), "data": data, "beta_schedule": settings["beta_schedule"]}
    return told | bounds | {"seed": settings["run"]["seed"]}


def _without_features(model: dict[str, Any]) -> dict[str, Any]:
    """The settings of the model but for where cached features lie: their contents are checked."""
    return model | {"backbone": {name: value for name, value in model["backbone"].items() if name != "features"}}


def require_same_data(record: Path, digest: str) -> None:
    """Refuse to go on, or to be done, with other data, scores or processor than the run began with."""
    if not record.exists():
        write_json(record, {"admission": digest})
    elif (there := loads(record.read_bytes())) != {"admission": digest}:
        raise ValueError(
            f"{record}: expected the data that the run began with, got others ({digest:.8}.. instead of {there}): "
            "shards, scores or the processor have changed; give another --run.out"
        )
