"""The MLflow run of a training: made once, continued by whoever continues the training."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger

from ..parallel import is_rank_zero
from ..settings import write_json

_RECORD = "mlflow.json"
_LONGEST = 500
_RELATIVE = "sqlite:///"


def mlflow_logger(folder: Path, uri: str, experiment: str, name: str, settings: Mapping[str, Any]) -> MLFlowLogger:
    """The logger of the run that belongs to a folder; the first time, with its settings as parameters and a file."""
    if uri.startswith(_RELATIVE) and not uri.startswith(f"{_RELATIVE}/"):  # another start may come from elsewhere
        uri = f"{_RELATIVE}{Path(uri.removeprefix(_RELATIVE)).resolve()}"
    record = folder / _RECORD
    there = json.loads(record.read_text("utf-8")) if record.exists() else {}
    if there and there["uri"] != uri:
        raise ValueError(
            f"{record}: this run is kept at {there['uri']}, got {uri}; say the former, or take another out"
        )
    # MLflow's database tells of its tables.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logger = MLFlowLogger(experiment_name=experiment, run_name=name, tracking_uri=uri, run_id=there.get("run"))
    if is_rank_zero():
        run = logger.run_id
        write_json(record, {"uri": uri, "run": run})
        known = logger.experiment.get_run(run).data.params  # a start that was killed may have written some
        for key, value in flat(settings):
            if key not in known:
                logger.experiment.log_param(run, key, str(value)[:_LONGEST])
        logger.experiment.log_dict(run, dict(settings), "config.yaml")
    return logger


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
