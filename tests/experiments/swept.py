"""A sweep whose truth is known, as MLflow keeps one: planted effects, a failed cell, runs outside the grid."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

W, K = "model.beta.w", "model.beta.k"
METRIC = "world/true"
WS, KS, SEEDS = (0.25, 0.5, 0.75, 1.0), (0.25, 0.5, 1.0, 2.0), (0, 1, 2)
BASELINE, BETTER, FAILED = "w0", "w0.5-k1", "w1-k2"
BASE, GAIN = 0.55, 0.1
STEPS = (10, 20, 30, 40, 50)


@dataclass
class Made:
    """One run as it should be found again."""

    name: str
    cell: str
    seed: int
    overrides: dict[str, Any]
    role: str = "cell"
    status: str = "done"
    error: str = ""
    logged: bool = True
    """Whether it ever reached MLflow."""
    fraction: float = 1.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    test_rows: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    histories: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


def sweep(items: int = 240, ws=WS, ks=KS, seeds=SEEDS, gains=None, failed=FAILED) -> list[Made]:
    """A baseline and a grid; `gains` says which cells are better than the baseline, and by how much."""
    draw = np.random.default_rng(7)
    gains = {BETTER: GAIN} if gains is None else gains
    ease = draw.random(items // 2).repeat(2)  # two items stand on one question, and are as easy as each other
    cells = {BASELINE: {W: 0.0}} | {f"w{w:g}-k{k:g}": {W: w, K: k} for w in ws for k in ks}
    made = []
    for cell, overrides in cells.items():
        for seed in seeds:
            run = Made(f"{cell}-seed{seed}", cell, seed, overrides, "baseline" if cell == BASELINE else "cell")
            if cell == failed:
                run.status, run.error = "failed", "ValueError: loss <nan> at step 3 & no more\n"
                run.logged = seed == 0  # the others did not even come so far
            else:
                right = 0.8 * ease + 0.2 * draw.random(items) < BASE + gains.get(cell, 0.0)
                fill(run, right, draw)
            made.append(run)
    return made


def rows_of(right) -> list[dict[str, Any]]:
    """The answers to items, two of which stand on each question."""
    kinds = ("mcq", "long", "short")
    places = [(f"i{n:04}", f"q{n // 2:04}", kinds[n % 3]) for n in range(len(right))]
    names = ("item", "cluster", "category")
    return [
        dict(zip(names, place, strict=True)) | {"correct": bool(good), "status": "judged"}
        for place, good in zip(places, right, strict=True)
    ]


def fill(run: Made, right, draw) -> None:
    """What a training and an evaluation log."""
    run.rows = rows_of(right)
    w, k = run.overrides[W], run.overrides.get(K, 1.0)
    run.metrics = {
        METRIC: float(np.mean(right)),
        "ledger/device_seconds": float(60 + 2 * draw.random()),
        "ledger/tokens": 81920.0,
        "ledger/flops": 3.1e12,
    }
    bent = [1 - np.exp(-step / 20) for step in STEPS]
    run.histories = {
        "val/rewards/accuracies": [(s, 0.5 + 0.2 * b + 0.01 * draw.normal()) for s, b in zip(STEPS, bent, strict=True)],
        "val/rewards/margins": [
            (s, b * (0.4 + w * (1 - np.exp(-k))) + 0.02 * draw.normal()) for s, b in zip(STEPS, bent, strict=True)
        ],
    }


def used_of(runs: list[Made]) -> pd.DataFrame:
    """The finished runs as `collect.cells_frame` and `choosing.choose` would give them."""
    rows = [
        {"run": run.name, "name": run.name, "cell": run.cell, "seed": run.seed, "role": run.role, "status": run.status}
        | {"fraction": run.fraction, "seconds": 60.0, "started": 0, W: np.nan, K: np.nan}
        | {"rule.beta0": 0.1, "rule.w": run.overrides[W], "rule.k": run.overrides.get(K, np.nan)}
        | run.overrides
        | run.metrics
        for run in runs
        if run.status == "done" and run.role in ("cell", "baseline")
    ]
    frame = pd.DataFrame(rows)
    frame.attrs["axes"] = (W, K)
    return frame


def outcomes_of(runs: list[Made]) -> dict[str, pd.DataFrame]:
    """The answers of each run, with the correct ones as numbers."""
    return {run.name: pd.DataFrame(run.rows).astype({"correct": float}) for run in runs if run.rows}


def histories_of(runs: list[Made]) -> pd.DataFrame:
    rows = [
        (run.name, metric, step, value)
        for run in runs
        for metric, points in run.histories.items()
        for step, value in points
    ]
    return pd.DataFrame(rows, columns=["run", "metric", "step", "value"])


def cell_json(run: Made) -> dict[str, Any]:
    """The account that the launcher keeps of a cell."""
    told = {
        "name": run.name,
        "cell": run.cell,
        "overrides": run.overrides,
        "seed": run.seed,
        "status": run.status,
        "role": run.role,
    }
    return told | {"fraction": run.fraction, "seconds": 61.5, "error": run.error, "metrics": run.metrics}


def write(folder: Path, runs: list[Made], **more: Any) -> tuple[str, str]:
    """Put a sweep into a new database: its URI and the parent run. `more` are artifacts of the parent, as JSON."""
    from mlflow.tracking import MlflowClient
    from sqlalchemy import Engine, event

    folder.mkdir(parents=True, exist_ok=True)
    # A test's database need not survive a power cut, and waiting for the disk takes most of the time.
    event.listen(Engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("sweeps", artifact_location=str(folder / "artifacts"))
    parent = client.create_run(experiment, run_name="wk").info.run_id
    for name, value in (("metric", METRIC), ("split", "val"), ("test_split", "test"), ("greatest", "True")):
        client.log_param(parent, name, value)
    client.log_text(parent, json.dumps([cell_json(run) for run in runs]), "cells.json")
    client.log_text(parent, f"metric: {METRIC}\nname: <wk>\n", "sweep.yaml")
    for name, value in more.items():
        client.log_text(parent, json.dumps(value), f"{name}.json")
    for run in runs:
        if run.logged:
            write_run(client, experiment, parent, run, folder)
    client.set_terminated(parent)
    return uri, parent


def write_run(client, experiment: str, parent: str, run: Made, folder: Path) -> None:
    from mlflow.entities import Metric, Param, RunTag

    tags = {"cell": run.cell, "seed": run.seed, "overrides": json.dumps(run.overrides), "role": run.role}
    tags |= {"status": run.status, "fraction": run.fraction, "sweep": "wk"}
    beta = {"class_path": "mmrlhf.modules.betas.RewardMarginBeta"}
    beta |= {
        f"init_args.{name}": value
        for name, value in (("beta0", 0.1), ("w", run.overrides[W]), ("k", run.overrides.get(K, 0.5)))
    }
    started = client.create_run(experiment, run_name=run.name, tags={"mlflow.parentRunId": parent}).info.run_id
    metrics = [Metric(name, value, 0, STEPS[-1]) for name, value in run.metrics.items()]
    metrics += [Metric(name, value, step, step) for name, points in run.histories.items() for step, value in points]
    client.log_batch(
        started,
        metrics,
        [Param(f"model.beta.{name}", str(value)) for name, value in beta.items()],
        [RunTag(f"mmrlhf.{name}", str(value)) for name, value in tags.items()],
    )
    if run.rows:
        log_rows(client, started, folder, run.rows, "outcomes")
    if run.test_rows:
        log_rows(client, started, folder, run.test_rows, "test/outcomes")
    client.set_terminated(started)


def log_rows(client, run: str, folder: Path, rows: list[dict[str, Any]], to: str) -> None:
    path = folder / "world.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    client.log_artifact(run, str(path), to)
