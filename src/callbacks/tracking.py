"""The MLflow run of a training: made once, continued by whoever continues the training, and never in its way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from .. import environment
from ..jsonl import loads
from ..parallel import is_rank_zero
from ..provenance import model_digest
from ..tracked import FIRST, Sender, Tracked
from ..tracker import metric_name
from ..worktree import changes

COMPARED = (
    *("model.backbone.path", "model.backbone.revision", "model.backbone.freeze", "model.backbone.lora"),
    *("model.beta", "beta_schedule", "model.loss", "model.margin", "model.sft_weight", "model.weighting"),
    *("model.weights", "model.dimensions", "model.optimiser"),
    *("data.global_batch", "data.pairs", "data.layout", "data.max_tokens", "data.frames", "data.critique", "data.fold"),
    *("trainer.max_epochs", "trainer.max_steps", "trainer.limit_train_batches"),
    *("trainer.precision", "trainer.gradient_clip_val", "run.seed"),
)
"""By what people compare trainings, with all that is nested below; the rest stands in config.yaml."""
_PARENT = "mlflow.parentRunId"
_DATA = "data.json"


def mlflow_logger(
    folder: Path, uri: str, experiment: str, name: str, settings: Mapping[str, Any], parent: str | None = None
) -> TrackedLogger:
    """The logger of the run that belongs to a folder, told what it stands on; a child of the run `parent`."""
    if not is_rank_zero():
        return TrackedLogger(None, experiment)
    tracked = Tracked.begin(folder, uri, experiment, name, {_PARENT: parent} if parent else {})
    if tracked.is_new:
        tracked.put({"tags": fingerprints(folder, settings)})
    tracked.put({"params": compared(settings)})
    tracked.put({"dict": settings, "path": "config.yaml"})
    tracked.put({"dict": environment.describe(), "path": "env.json"})
    for path, text in changes(Path(environment.__file__).parents[1]).items():
        tracked.put({"text": text, "path": f"git/{path}"})
    tracked.flush(FIRST)
    return TrackedLogger(tracked, experiment)


class TrackedLogger(Logger):
    """Writes metrics into the spool of a run, from which they are sent in the background; other ranks write nothing."""

    def __init__(self, tracked: Tracked | None, experiment: str) -> None:
        super().__init__()
        self.tracked = tracked
        self._experiment = experiment
        self._sender: Sender | None = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep metrics; this waits for no tracker."""
        if self.tracked is None:
            return
        if self._sender is None:
            self._sender = Sender(self.tracked)
        self.tracked.put({"metrics": {metric_name(name): value for name, value in metrics.items()}, "step": step or 0})

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:  # noqa: ANN401 - Lightning's
        """Keep nothing: the settings were told when the run began."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send nothing more in the background; how the run ended says whoever saves its model."""
        if self._sender is not None:
            self._sender.stop()
        self._sender = None

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return self._experiment

    @property
    def version(self) -> str | None:
        """The id of the run, once there is one."""
        return None if self.tracked is None else self.tracked.run


def compared(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings by which trainings are compared, by dotted names; those that are not set are left out.

    >>> compared({"model": {"beta": {"w": 0.5}, "chunk": 512}, "run": {"seed": 0, "out": "x"}})
    {'model.beta.w': '0.5', 'run.seed': '0'}
    """
    below = tuple(f"{name}." for name in COMPARED)
    found = ((name, value) for name, value in flat(settings) if name in COMPARED or name.startswith(below))
    return {name: str(value) for name, value in found if value is not None}


def fingerprints(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """What the training begins with: a digest of its data, if known, and of its model, or the model's name."""
    backbone = settings.get("model", {}).get("backbone", {})
    found = {}
    if (folder / _DATA).exists():
        found["mmrlhf.fingerprint.data"] = loads((folder / _DATA).read_bytes())["admission"]
    if path := backbone.get("path"):
        named = f"{path}@{backbone['revision']}" if backbone.get("revision") else path
        found["mmrlhf.fingerprint.model"] = model_digest(Path(path)) if Path(path).is_dir() else named
    return found


def flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested settings by dotted names.

    >>> dict(flat({"beta": {"w": 0.5}, "seed": 0}))
    {'beta.w': 0.5, 'seed': 0}
    """
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
