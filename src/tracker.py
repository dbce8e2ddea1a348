"""An MLflow server or database: opened by one process after the other, and told rows of what a run says.

What it answers too late, or not at all, is `Unreachable`; the rows wait, and are sent again.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .redaction import redacted, without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)
_SQLITE = "sqlite:///"
_SERVERS = ("http://", "https://", "databricks")
_DATABASES = ("postgresql", "mysql", "mssql", "sqlite")
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Of the client, unless the user says otherwise; who tries again is the spool. The printed address has a password."""
_REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}
_METRICS, _TOLD = 1000, 100
"""What MLflow takes at once: metrics, and parameters or tags."""


class Unreachable(Exception):  # noqa: N818 - it says what is so
    """The tracker did not answer, or answered that it cannot."""


def absolute(uri: str) -> str:
    """The address, checked; that of a database file does not depend on where a command runs."""
    if uri.startswith(_SQLITE) and len(uri) > len(_SQLITE):
        path, mark, query = uri.removeprefix(_SQLITE).partition("?")
        return f"{_SQLITE}{Path(path).resolve()}{mark}{query}"
    allowed = uri.startswith("file:") and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in {"true", "1"}
    if not allowed and (uri.startswith("sqlite") or not uri.startswith((*_SERVERS, *_DATABASES))):
        raise ValueError(
            f"tracking: expected a database or a server, such as sqlite:///mlflow.db or http://127.0.0.1:5000, got "
            f"{redacted(uri)!r}"
        )
    return uri


def with_credentials(uri: str) -> str:
    """An address that was stored, with user and password where MLFLOW_TRACKING_URI is the same one and has them."""
    known = os.environ.get("MLFLOW_TRACKING_URI", "")
    return known if known and without_credentials(known) == uri else uri


def database_file(uri: str) -> Path | None:
    """Where the database lies, if it is a file."""
    return Path(uri.removeprefix(_SQLITE).partition("?")[0]) if uri.startswith(_SQLITE) else None


@contextmanager
def answering(uri: str) -> Iterator[None]:
    """Make `Unreachable`, without secrets, of whatever goes wrong with the tracker."""
    try:
        yield
    except Unreachable:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a tracker does wrong must not end a training
        told = " ".join(redacted(f"{type(error).__name__}: {error}").split())
        raise Unreachable(f"{without_credentials(uri)}: {told:.400}") from None  # what is chained has the password


def client_of(uri: str) -> MlflowClient:
    """A client of what is there already."""
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    # MLflow's database tells of its tables.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    path = database_file(uri)
    if path is not None:
        _probe(path)
    return MlflowClient(uri)


def _probe(path: Path) -> None:
    """Find out at once whether a file can be written: MLflow tries for minutes, and makes a new one of a lost one."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such database")
    with closing(sqlite3.connect(path, timeout=5, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")


def made(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """A client and the id of an experiment; database and experiment are made if need be, by one process alone."""
    path = database_file(uri)
    if path is None:
        client = client_of(uri)
        location = None if uri.startswith(_SERVERS) or uri.startswith("file:") else Path("mlartifacts").resolve()
        return client, _experiment(client, experiment, location)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:  # MLflow's tables break if two make them
        fcntl.flock(lock, fcntl.LOCK_EX)
        path.touch()
        client = client_of(uri)
        return client, _experiment(client, experiment, path.parent / "mlartifacts")


def _experiment(client: MlflowClient, name: str, location: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    there = client.get_experiment_by_name(name)
    if there is None:
        try:
            made_id: str = client.create_experiment(name, artifact_location=None if location is None else str(location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another machine was faster
                raise
            there = client.get_experiment_by_name(name)
        else:
            return made_id
    if there is None or there.lifecycle_stage == "deleted":
        raise ValueError(f"experiment {name}: it was deleted; restore it, or give another name")
    found: str = there.experiment_id
    return found


def new_run(uri: str, experiment: str, name: str, tags: Mapping[str, str], started: int) -> str:
    """Make a run, or find the one that was made under the same tag `mmrlhf.mark` before a kill; return its id."""
    client, where = made(uri, experiment)
    there = client.search_runs([where], f"tags.`mmrlhf.mark` = '{tags['mmrlhf.mark']}'")
    run = there[0] if there else client.create_run(where, start_time=started, tags=dict(tags), run_name=name)
    found: str = run.info.run_id
    return found


def tell(client: MlflowClient, run: str, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Send rows of a run's spool, neighbouring metrics at once; what the tracker refuses for good is left out."""
    from mlflow.exceptions import MlflowException

    for task in _tasks(rows):
        try:
            _tell(client, run, folder, task)
        except MlflowException as error:
            if error.error_code not in _REFUSED:
                raise
            what = " and ".join(key for key in task if key not in {"time", "step"})
            _log.warning("%s: MLflow refused %s, which is left out: %s", folder, what, redacted(str(error)))


def metric_name(name: str) -> str:
    """A name that MLflow takes.

    >>> metric_name("val/Chart (hard)")
    'val/Chart hard'
    """
    return re.sub(r"[^\w/. -]+", "", name, flags=re.ASCII)


def _tasks(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows, with metrics that follow each other as one list, not longer than MLflow takes."""
    waiting: list[tuple[str, float, int, int]] = []
    for row in rows:
        if "metrics" in row:
            waiting += [(name, float(value), row["time"], row["step"]) for name, value in row["metrics"].items()]
        else:
            if waiting:
                yield {"metrics": waiting}
                waiting = []
            yield row
    if waiting:
        yield {"metrics": waiting}


def _tell(client: MlflowClient, run: str, folder: Path, task: Mapping[str, Any]) -> None:
    """Send one task; sent again, it changes nothing."""
    from mlflow.entities import Metric, Param, RunTag

    if "metrics" in task:
        metrics = [Metric(*each) for each in task["metrics"]]
        for at in range(0, len(metrics), _METRICS):
            client.log_batch(run, metrics=metrics[at : at + _METRICS])
    elif "params" in task:
        known = client.get_run(run).data.params  # a parameter cannot be told twice with two values
        params = [Param(name, value) for name, value in task["params"].items() if name not in known]
        for at in range(0, len(params), _TOLD):
            client.log_batch(run, params=params[at : at + _TOLD])
    elif "tags" in task:
        tags = [RunTag(name, value) for name, value in task["tags"].items()]
        for at in range(0, len(tags), _TOLD):
            client.log_batch(run, tags=tags[at : at + _TOLD])
    elif "status" in task:
        _tell_status(client, run, task)
    else:
        _tell_artifact(client, run, folder, task)


def _tell_status(client: MlflowClient, run: str, task: Mapping[str, Any]) -> None:
    """Say that the run runs, or how and when it ended."""
    if task["status"] == "RUNNING":
        client.update_run(run, status="RUNNING")
    else:
        client.set_terminated(run, task["status"], task["time"])


def _tell_artifact(client: MlflowClient, run: str, folder: Path, task: Mapping[str, Any]) -> None:
    """Send values as YAML or JSON, a text, or a file."""
    if "dict" in task:
        client.log_dict(run, task["dict"], task["path"])
    elif "text" in task:
        client.log_text(run, task["text"], task["path"])
    else:
        _tell_file(client, run, folder / task["file"], task["to"])


def _tell_file(client: MlflowClient, run: str, path: Path, to: str) -> None:
    """Send a file; of a text without its secrets."""
    if not path.is_file():
        _log.warning("%s: gone before the tracker could be told of it", path)
        return
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        client.log_artifact(run, str(path), to or None)
        return
    with tempfile.TemporaryDirectory() as copies:
        copy = Path(copies) / path.name
        copy.write_text(redacted(text), encoding="utf-8")
        client.log_artifact(run, str(copy), to or None)
