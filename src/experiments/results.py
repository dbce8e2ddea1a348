"""What a sweep found, read from MLflow and computed: all that a report or a notebook shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from ..progress import bar
from .choosing import Chosen, choose, two_axes
from .collect import Parent, cells_frame, margins_of_runs, outcomes, parent_of
from .summary import baseline_of, cell_table, items_frame


@dataclass(frozen=True)
class Results:
    """All that a report is made of."""

    uri: str
    parent: Parent
    metric: str
    chosen: Chosen
    items: pd.DataFrame | None
    """Every answer of every run; None where they do not make up the metric."""
    cells: pd.DataFrame
    baseline: str | None
    up: str | None
    across: str | None
    test: pd.DataFrame | None
    """The cells that were evaluated on the test split."""
    promoted: pd.DataFrame | None
    """The means of cells that were trained again on all data: cell, mean, seeds."""
    margins: pd.DataFrame
    margins_from: str
    level: float

    @property
    def selected(self) -> str | None:
        """The cell that was chosen by what had been declared."""
        found = (self.parent.selection or {}).get("selected")
        return None if found is None else str(found)


def collected(
    uri: str,
    parent_run: str,
    metric: str | None = None,
    *,
    baseline: str | None = None,
    fix: Mapping[str, Any] | None = None,
    margins: pd.DataFrame | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Results:
    """Read a sweep from MLflow, and compute all that its report tells."""
    parent = parent_of(uri, parent_run)
    if metric is None and parent.metric is None:
        raise ValueError(f"run {parent_run}: expected a declared metric, found none; say what to compare with --metric")
    metric = metric or str(parent.metric)
    frame = cells_frame(uri, parent_run)
    errors = {str(cell.get("name")): str(cell.get("error") or "") for cell in parent.cells}
    chosen = choose(frame, metric, fix=fix, errors=errors)
    axes = list(frame.attrs["axes"])
    up, across = two_axes(chosen.used, axes)
    rival = baseline_of(chosen.used, baseline)
    drawing: dict[str, Any] = {"level": level, "resamples": resamples, "seed": seed}
    items = _items(uri, chosen.used, metric, "outcomes")
    cells = cell_table(chosen.used, items, metric, axes=axes, baseline=rival, greatest=parent.greatest, **drawing)
    measured = margins_of_runs(uri, chosen.used["run"]) if margins is None else margins
    return Results(
        *(uri, parent, metric, chosen, items, cells, rival, up, across),
        test=_tested(uri, frame, parent, metric, axes, rival, drawing),
        promoted=_promoted(frame, metric),
        margins=measured,
        margins_from="files" if margins is not None else "runs" if len(measured) else "nowhere",
        level=level,
    )


def _items(uri: str, used: pd.DataFrame, metric: str, folder: str) -> pd.DataFrame | None:
    """The answers of all runs, joined."""
    benchmark = metric.partition("/")[0]
    with bar() as shown:
        rows = shown.track(list(used["run"]), description="reading outcomes")
        return items_frame(used, {run: outcomes(uri, run, benchmark, folder) for run in rows}, metric)


def _tested(
    uri: str,
    frame: pd.DataFrame,
    parent: Parent,
    metric: str,
    axes: Sequence[str],
    baseline: str | None,
    drawing: Mapping[str, Any],
) -> pd.DataFrame | None:
    """The cells that were opened the test split for, compared as the grid was."""
    name = f"{parent.test_split}/{metric}"
    if parent.test_split is None or name not in frame or not frame[name].notna().any():
        return None
    runs = frame[frame[name].notna() & frame["run"].notna()].sort_values("fraction", kind="stable")
    runs = runs.drop_duplicates(["cell", "seed"], keep="last")  # what was promoted counts, not what led to it
    # The metric stands under the split's name, and the answers lie in a folder of that name.
    items = _items(uri, runs.assign(**{metric: runs[name]}), metric, f"{parent.test_split}/outcomes")
    rival = baseline if baseline in set(runs["cell"]) else None
    return cell_table(runs, items, name, axes=axes, baseline=rival, greatest=parent.greatest, **drawing)


def _promoted(frame: pd.DataFrame, metric: str) -> pd.DataFrame | None:
    """The cells that were trained again on all data."""
    runs = frame[(frame["role"] == "promoted") & (frame["status"] == "done") & frame[metric].notna()]
    if not len(runs):
        return None
    return runs.groupby("cell", sort=False)[metric].agg(mean="mean", seeds="count").reset_index()
