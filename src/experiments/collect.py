"""What MLflow keeps of a sweep, as tables: nothing is read from anywhere else."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd  # type: ignore[import-untyped]

from .. import jsonl
from ..fields import Fields
from ..redaction import without_credentials
from ..tracker import absolute, client_of, with_credentials

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

PARENT = "mlflow.parentRunId"
ROLES = ("cell", "baseline")
"""Whose results stand in the grid; promoted runs and those on the test split are told apart from it."""
FIXED = ("run", "name", "cell", "seed", "role", "status", "fraction", "seconds", "started")
RULE = ("rule.beta0", "rule.w", "rule.k")
_TAG = "mmrlhf."
_MARGINS = "figures/margins.csv"
"""Of the last validation, as a training keeps them."""
_PAGE = 1000
_SELECTION = re.compile(r"selection(-\d+)?\.json")
_STATUS = {"FINISHED": "done", "RUNNING": "running", "SCHEDULED": "running"}


class Parent(NamedTuple):
    """What the parent run of a sweep tells."""

    run: str
    name: str
    metric: str | None
    """What was declared before any cell began; None where nothing was."""
    split: str | None
    test_split: str | None
    greatest: bool
    cells: tuple[Mapping[str, Any], ...]
    """The accounts of all cells, also of those that failed."""
    selection: Mapping[str, Any] | None
    """The last record of which cell was chosen, by what, and when the test split was opened."""
    settings: str
    """The sweep's YAML; empty where it is not kept."""


def sweep_record(folder: Path) -> tuple[str, str]:
    """Where a sweep's folder says that its results are kept: the tracking URI and the parent run."""
    path = folder / "parent.json"
    if not path.is_file():
        raise ValueError(f"{folder}: expected the folder of a sweep with parent.json, found none; give the sweep's out")
    with Fields(jsonl.loads(path.read_bytes()), str(path)) as fields:
        return fields.text("uri"), fields.text("run")


def _client(uri: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one per file, of which there are many
    return client_of(absolute(with_credentials(uri)))


def parent_of(uri: str, run: str) -> Parent:
    """The parent run: what was declared, and the accounts of its cells."""
    client = _client(uri)
    found = _found(client, uri, run)
    params = found.data.params
    files = {file.path for file in client.list_artifacts(run)}
    chosen = sorted(filter(_SELECTION.fullmatch, files), key=lambda name: (len(name), name))
    cells = jsonl.loads(_bytes(client, run, "cells.json")) if "cells.json" in files else []
    if not isinstance(cells, list) or not all(isinstance(cell, Mapping) for cell in cells):
        raise ValueError(f"run {run}: expected a list of cells in the artifact cells.json, got {cells!r:.60}")
    return Parent(
        run,
        found.info.run_name or run,
        params.get("metric"),
        params.get("split"),
        params.get("test_split"),
        params.get("greatest", "True").lower() == "true",
        tuple(cells),
        jsonl.loads(_bytes(client, run, chosen[-1])) if chosen else None,
        _bytes(client, run, "sweep.yaml").decode("utf-8") if "sweep.yaml" in files else "",
    )


def cells_frame(uri: str, parent_run: str) -> pd.DataFrame:
    """One row per run of a sweep: `FIXED`, `RULE` (its β₀, w and k), a column per override and one per metric.

    A cell that never reached MLflow has a row too, without a run. `frame.attrs["axes"]` names the overrides.
    """
    client, parent = _client(uri), parent_of(uri, parent_run)
    told = {str(cell.get("name")): cell for cell in parent.cells}
    rows, axes = [], dict[str, None]()
    for run in _children(client, uri, parent_run):
        name = run.info.run_name or run.info.run_id
        overrides = _overrides(run)
        axes |= dict.fromkeys(overrides)
        rows.append(_row(run, name, told.get(name, {})) | overrides | dict(run.data.metrics))
    known = {row["name"] for row in rows}
    for name, cell in told.items():
        overrides = _plain(cell.get("overrides") or {})
        axes |= dict.fromkeys(overrides)
        if name not in known:
            rows.append(_without_run(name, cell) | overrides | dict(cell.get("metrics") or {}))
    if not rows:
        raise ValueError(f"run {parent_run}: expected the parent of a sweep, got a run without children; give another")
    frame = pd.DataFrame(rows)
    first = [*FIXED, *RULE, *axes]
    rest = sorted(set(frame.columns) - set(first))
    frame = frame.reindex(columns=[*first, *rest]).sort_values("name", kind="stable", ignore_index=True)
    frame.attrs["axes"] = tuple(axes)
    return frame


def histories_frame(uri: str, runs: Iterable[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Every logged value: run, metric, step, value; of a step that was logged twice, the later one."""
    client, rows = _client(uri), []
    for run in runs:
        for metric in metrics:
            points = sorted(client.get_metric_history(run, metric), key=lambda point: point.timestamp)
            last = {int(point.step): float(point.value) for point in points}
            rows += [(run, metric, step, value) for step, value in sorted(last.items())]
    return pd.DataFrame(rows, columns=["run", "metric", "step", "value"])


def outcomes(uri: str, run: str, benchmark: str, folder: str = "outcomes") -> pd.DataFrame:
    """How a run answered every item of a benchmark: item, cluster, category, correct; empty where nothing is kept.

    `folder` is that of the run's artifacts; what was answered on the test split lies in another one.
    """
    client, columns = _client(uri), ["item", "cluster", "category", "correct"]
    files = [file.path for file in client.list_artifacts(run, folder) if file.path.endswith(".jsonl")]
    named = [path for path in files if Path(path).stem == benchmark] or files
    if len(named) > 1:
        raise ValueError(
            f"run {run}: expected {folder}/{benchmark}.jsonl, got {', '.join(files)}; name it as the metric begins"
        )
    rows = [row for path in named for row in _jsonl(client, run, path)]
    frame = pd.DataFrame(rows).reindex(columns=columns)
    if frame.isna().any(axis=None):
        raise ValueError(
            f"run {run}: expected {', '.join(columns)} in every row of {named[0]}; evaluate the cell again"
        )
    frame["correct"] = frame["correct"].astype(float)
    if twice := frame.loc[frame["item"].duplicated(), "item"].tolist():
        raise ValueError(f"run {run}: expected each item once in {named[0]}, got {twice[0]!r} again")
    return frame.sort_values("item", ignore_index=True)


def margins_of_runs(uri: str, runs: Iterable[str]) -> pd.DataFrame:
    """The measured δ of the first run that keeps them as a file (delta, pairs); empty where none does."""
    client = _client(uri)
    for run in runs:
        if any(file.path == _MARGINS for file in client.list_artifacts(run, "figures")):
            with tempfile.TemporaryDirectory() as folder:
                return pd.read_csv(client.download_artifacts(run, _MARGINS, folder))[["delta", "pairs"]]
    return pd.DataFrame({"delta": [], "pairs": []}, dtype=float)


def _found(client: MlflowClient, uri: str, run: str) -> Run:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run)
    except MlflowException as error:
        where = without_credentials(uri)
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise ValueError(
                f"{where}: expected a tracker that answers, got {error.error_code}; is it there?"
            ) from None
        raise ValueError(f"{where}: expected a run {run!r}, found none; `mmrlhf runs` lists them") from error


def _children(client: MlflowClient, uri: str, parent: str) -> Iterator[Run]:
    experiment = _found(client, uri, parent).info.experiment_id
    token = None
    while True:
        page = client.search_runs([experiment], f"tags.`{PARENT}` = '{parent}'", max_results=_PAGE, page_token=token)
        yield from page
        if not (token := page.token):
            return


def _row(run: Run, name: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of any run; times are the launcher's, for a run may be opened again long after its training."""
    tags = {key.removeprefix(_TAG): value for key, value in run.data.tags.items() if key.startswith(_TAG)}
    ended = run.info.end_time or run.info.start_time
    return {
        "run": run.info.run_id,
        "name": name,
        "cell": tags.get("cell") or told.get("cell") or cell_of(name),
        "seed": int(tags["seed"]) if "seed" in tags else told.get("seed"),
        "role": tags.get("role", told.get("role")),
        "status": tags.get("status") or told.get("status") or _STATUS.get(run.info.status, "failed"),
        "fraction": float(tags.get("fraction", told.get("fraction", 1.0))),
        "seconds": float(told.get("seconds") or (ended - run.info.start_time) / 1000),
        "started": run.info.start_time,
        **_rule(run.data.params),
    }


def _without_run(name: str, cell: Mapping[str, Any]) -> dict[str, Any]:
    told = {key: cell.get(key) for key in ("seed", "role", "seconds")}
    status = "failed" if cell.get("status") == "failed" else "not in MLflow"
    return (
        {"run": None, "name": name, "cell": cell.get("cell") or cell_of(name), "status": status}
        | told
        | {"fraction": float(cell.get("fraction") or 1.0)}
    )


def cell_of(name: str) -> str:
    """The name of a run without its seed.

    >>> cell_of("w0.25-k1-seed0")
    'w0.25-k1'
    """
    head, seed, number = name.rpartition("-seed")
    return head if seed and number.isdigit() else name


def _overrides(run: Run) -> dict[str, Any]:
    """Parameters are texts in MLflow; the tag keeps what they were."""
    return _plain(jsonl.loads(run.data.tags.get(f"{_TAG}overrides", "{}").encode()))


def _plain(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Values that a table can be grouped by: lists and objects as JSON."""
    return {key: jsonl.dumps(value) if isinstance(value, list | dict) else value for key, value in overrides.items()}


def _rule(params: Mapping[str, str]) -> dict[str, float]:
    """β₀, w and k of a training whose β follows the margin; a constant β has w = 0; others have none."""
    kind = params.get("model.beta.class_path", "").rpartition(".")[2]
    told = {key.rpartition(".")[2]: value for key, value in params.items() if key.startswith("model.beta.")}
    if kind == "FixedBeta" and "beta0" in told:
        return {"rule.beta0": float(told["beta0"]), "rule.w": 0.0}
    if kind != "RewardMarginBeta":
        return {}
    return {f"rule.{name}": float(told[name]) for name in ("beta0", "w", "k") if name in told}


def _jsonl(client: MlflowClient, run: str, path: str) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        return list(jsonl.read(client.download_artifacts(run, path, folder)))


def _bytes(client: MlflowClient, run: str, path: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run, path, folder)).read_bytes()
