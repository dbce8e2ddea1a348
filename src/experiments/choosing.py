"""Which runs of a sweep stand in its grid, and on which axes; whatever is left out has a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd  # type: ignore[import-untyped]

from ..ledger import Ledger
from ..options import did_you_mean
from .collect import ROLES

REASONS = {
    "failed": "the cell failed",
    "unfinished": "not finished yet",
    "not_in_mlflow": "finished, but MLflow does not know it",
    "no_metric": "finished, but without the metric of this report",
    "superseded": "another run of the same cell and seed is newer",
    "promoted": "trained on another part of the data, after the grid; told apart",
    "test": "an evaluation on the test split, after the selection; told apart",
    "not_fixed": "has another value of an axis that was fixed",
}


class Chosen(NamedTuple):
    """The runs of the grid and the others."""

    used: pd.DataFrame
    excluded: pd.DataFrame
    """name, cell, role, reason, error, run."""
    ledger: Ledger


def choose(
    frame: pd.DataFrame, metric: str, *, fix: Mapping[str, Any] | None = None, errors: Mapping[str, str] | None = None
) -> Chosen:
    """Divide the runs of a sweep into those that its grid shows and those that it does not; none is lost."""
    fix, errors, ledger = fix or {}, errors or {}, Ledger("runs")
    _require_known(frame, metric, fix)
    reasons = [_reason(row, metric, fix) for _, row in frame.iterrows()]
    frame = frame.assign(reason=reasons)
    done = frame["reason"] == ""
    newest = frame[done].sort_values("started", kind="stable").drop_duplicates("name", keep="last")
    frame.loc[done & ~frame.index.isin(newest.index), "reason"] = "superseded"
    # An attempt that failed before another one succeeded is history.
    retried = frame["reason"].isin(["failed", "unfinished"]) & frame["name"].isin(newest["name"])
    frame.loc[retried, "reason"] = "superseded"
    ledger.took(len(frame))
    used = frame[frame["reason"] == ""].drop(columns="reason").reset_index(drop=True)
    excluded = frame[frame["reason"] != ""].reset_index(drop=True)
    ledger.gave(len(used))
    for reason, name in zip(excluded["reason"], excluded["name"], strict=True):
        ledger.skip(reason, name)
    ledger.check()
    if not len(used):
        raise ValueError(
            f"{ledger}: expected at least one finished run with {metric}; wait, or look at the cells' logs"
        )
    order = {reason: place for place, reason in enumerate(REASONS)}
    excluded = excluded.sort_values("reason", key=lambda reasons: reasons.map(order), kind="stable", ignore_index=True)
    excluded["error"] = [errors.get(name, "") for name in excluded["name"]]
    return Chosen(used, excluded[["name", "cell", "role", "reason", "error", "run"]], ledger)


def _require_known(frame: pd.DataFrame, metric: str, fix: Mapping[str, Any]) -> None:
    metrics = [name for name in frame.columns if "/" in name]
    if metric not in frame.columns:
        known = ", ".join(metrics[:12]) + (", ..." if len(metrics) > 12 else "") or "none"
        raise ValueError(
            f"metric: expected one that the runs have, got {metric!r}{did_you_mean(metric, metrics)} ({known})"
        )
    axes = [*frame.attrs["axes"], "fraction"]
    if unknown := [name for name in fix if name not in axes]:
        raise ValueError(f"fix: unknown axis {unknown[0]!r}{did_you_mean(unknown[0], axes)} (axes: {', '.join(axes)})")


def _reason(row: pd.Series, metric: str, fix: Mapping[str, Any]) -> str:
    """Why a run does not stand in the grid; empty where it does."""
    if row["status"] == "failed":
        return "failed"
    if row["role"] in ("promoted", "test"):
        return str(row["role"])
    if row["status"] == "not in MLflow":
        return "not_in_mlflow"
    if row["status"] != "done" or row["role"] not in ROLES:  # what it is for is said at its end
        return "unfinished"
    if pd.isna(row[metric]):
        return "no_metric"
    # Where an axis means nothing, as k does for w = 0, a cell belongs to all its values.
    return "not_fixed" if any(not pd.isna(row[axis]) and row[axis] != value for axis, value in fix.items()) else ""


def two_axes(used: pd.DataFrame, axes: Sequence[str]) -> tuple[str | None, str | None]:
    """The axes of a picture, up and across, in the order of the sweep; one or both None where nothing varies.

    >>> grid = pd.DataFrame({"a.w": [0.5, 1.0], "a.k": [0.5, 0.5], "fraction": [1.0, 1.0]})
    >>> two_axes(grid, ["a.w", "a.k"])
    (None, 'a.w')
    """
    names = [*axes, *(["fraction"] if "fraction" in used and "fraction" not in axes else [])]
    values = {name: used[name].dropna().nunique() for name in names}
    varying = [name for name in names if values[name] > 1]
    if len(varying) > 2:
        by_values = sorted(varying, key=lambda name: -values[name])
        told = ", ".join(
            f"{name} ({', '.join(map(str, sorted(used[name].dropna().unique(), key=str)))})" for name in by_values[2:]
        )
        raise ValueError(
            f"axes: expected two that vary in one picture, got {len(varying)}; fix the others to one value each with "
            f"--fix '{{\"NAME\": VALUE}}': {told}"
        )
    up, across = [None, None, *varying][-2:]
    return up, across


def short_names(axes: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted name, or as many as tell it from the others.

    >>> short_names(["model.beta.w", "model.beta.k", "model.gamma.k"])
    {'model.beta.w': 'w', 'model.beta.k': 'beta.k', 'model.gamma.k': 'gamma.k'}
    """
    found = {}
    for axis in axes:
        parts = axis.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        alone = (end for end in ends if sum(f".{other}".endswith(f".{end}") for other in axes) == 1)
        found[axis] = next(alone, axis)
    return found
