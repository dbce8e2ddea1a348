"""A grid in numbers: means, intervals over items, spread over seeds, and what can be told from the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from numpy.typing import NDArray

from ..stats import Interval, bootstrap_mean, detectable_difference, holm, mcnemar_power, paired_permutation, wilson

COSTS = {"ledger/device_seconds": "device seconds", "ledger/tokens": "tokens", "ledger/flops": "FLOPs"}
_ROUNDING = 1e-6
_POWER = 0.8


def items_frame(used: pd.DataFrame, outcomes: Mapping[str, pd.DataFrame], metric: str) -> pd.DataFrame | None:
    """All answers of all runs, (items, runs) with clusters as the second level of the index.

    None where the metric is not the share of correct items of every run: then items say nothing about it.
    """
    found = {run: outcomes[run] for run in used["run"] if len(outcomes.get(run, ()))}
    if len(found) < len(used):
        return None
    shares = {run: float(rows["correct"].mean()) for run, rows in found.items()}
    if any(abs(shares[run] - value) > _ROUNDING for run, value in zip(used["run"], used[metric], strict=True)):
        return None
    first = used.iloc[0]
    index = pd.MultiIndex.from_frame(found[first["run"]][["item", "cluster"]].astype(str))
    columns = {}
    for run, name in zip(used["run"], used["name"], strict=True):
        rows = found[run]
        if not pd.MultiIndex.from_frame(rows[["item", "cluster"]].astype(str)).equals(index):
            raise ValueError(
                f"outcomes: expected the same items in every run, got others in {name} than in {first['name']}; "
                "evaluate both on the same split"
            )
        columns[run] = rows["correct"].to_numpy()
    return pd.DataFrame(columns, index=index)


def baseline_of(used: pd.DataFrame, wanted: str | None = None) -> str | None:
    """The cell that all others are compared with: the one that is named, or the only one with that role."""
    cells = list(dict.fromkeys(used["cell"]))
    if wanted is not None:
        if wanted not in cells:
            raise ValueError(f"baseline: expected a finished cell, got {wanted!r}; there are {', '.join(cells)}")
        return wanted
    found = list(dict.fromkeys(used.loc[used["role"] == "baseline", "cell"]))
    if len(found) > 1:
        raise ValueError(f"baseline: expected one, got {', '.join(found)}; name one of them with --baseline")
    return found[0] if found else None


def cell_table(
    used: pd.DataFrame,
    items: pd.DataFrame | None,
    metric: str,
    *,
    axes: Sequence[str],
    baseline: str | None = None,
    greatest: bool = True,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per cell, in the order of its axes.

    `mean`, `sd` and `seeds` are of the runs; `low` and `high` of the mean, clustered by item, over pooled seeds;
    `difference` (with `difference_low`, `difference_high`, `p`, `p_holm`) from the baseline on the same items;
    `verdict` is `baseline`, `above`, `below`, `same` (not distinguishable) or empty where nothing was tested;
    `seeds_better` of `seeds_paired` seeds are better than the same seed of the baseline; costs are means.
    """
    drawing: dict[str, Any] = {"resamples": resamples, "seed": seed}
    _require_enough(resamples, used["cell"].nunique() - 1, 1 - level)
    rows = []
    for cell, runs in used.groupby("cell", sort=False):
        values = runs[metric].to_numpy(dtype=float)
        row: dict[str, Any] = {"cell": cell, "role": runs["role"].iloc[0]}
        row |= {axis: runs[axis].iloc[0] for axis in axes}
        row |= {"seeds": len(runs), "mean": values.mean(), "sd": values.std(ddof=1) if len(runs) > 1 else np.nan}
        row |= _interval(_of_cell(items, runs), level, drawing)
        if baseline is not None and cell != baseline:
            rival = used[used["cell"] == baseline]
            row |= _difference(items, runs, rival, level, drawing) | _seeds(runs, rival, metric, greatest)
        row |= {name: runs[name].mean() if name in runs else np.nan for name in COSTS}
        rows.append(row)
    table = pd.DataFrame(rows)
    for name in ("difference", "difference_low", "difference_high", "p", "seeds_better", "seeds_paired"):
        table[name] = table.get(name, np.nan)
    table = _judged(table, baseline, 1 - level)
    order = sorted(range(len(table)), key=lambda place: [axis_key(table[axis].iloc[place]) for axis in axes])
    return table.iloc[order].reset_index(drop=True)


def _require_enough(resamples: int, tests: int, alpha: float) -> None:
    """A drawn p value is no smaller than 1 / (resamples + 1), which Holm multiplies by the number of tests."""
    if (needed := math.ceil(tests / alpha - _ROUNDING) - 1) > resamples:
        raise ValueError(
            f"resamples: expected {needed:,} or more for {tests} tests at {alpha:.2g}, got {resamples:,}; with fewer, "
            "nothing could be told from the baseline"
        )


def axis_key(value: object) -> tuple[int, float, str]:
    """An order of the values of an axis: none, then numbers, then words."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return 0, 0.0, ""
    if isinstance(value, int | float | np.number):
        return 1, float(value), ""
    return 2, 0.0, str(value)


def _of_cell(items: pd.DataFrame | None, runs: pd.DataFrame) -> pd.Series | None:
    """The mean over seeds of every item; the seeds of an item share its cluster, so nothing else is to be pooled."""
    return None if items is None else items[list(runs["run"])].mean(axis=1)


def _interval(values: pd.Series | None, level: float, drawing: Mapping[str, Any]) -> dict[str, float]:
    if values is None:
        return {"low": np.nan, "high": np.nan}
    clusters = values.index.get_level_values("cluster").tolist()
    found = _bootstrap(values.to_numpy(), clusters, level, drawing, (0.0, 1.0))
    share = found.value
    if share in (0, 1):  # resampling sees no spread among equal values
        number = len(set(clusters))
        found = wilson(number if share else 0, number, level)
    return {"low": found.low, "high": found.high}


def _difference(
    items: pd.DataFrame | None, runs: pd.DataFrame, rival: pd.DataFrame, level: float, drawing: Mapping[str, Any]
) -> dict[str, float]:
    one, two = _of_cell(items, runs), _of_cell(items, rival)
    if one is None or two is None:
        return {}
    clusters = one.index.get_level_values("cluster").tolist()
    apart = (one - two).to_numpy()
    found = _bootstrap(apart, clusters, level, drawing, (-1.0, 1.0))
    p = paired_permutation(one.to_numpy(), two.to_numpy(), clusters, **drawing)
    return {"difference": found.value, "difference_low": found.low, "difference_high": found.high, "p": p}


def _bootstrap(
    values: NDArray[np.float64],
    clusters: list[str],
    level: float,
    drawing: Mapping[str, Any],
    all_there_is: tuple[float, float],
) -> Interval:
    if len(set(clusters)) == 1:  # one question tells nothing of others
        return Interval(float(values.mean()), *all_there_is, level)
    return bootstrap_mean(values, clusters, level=level, **drawing)


def _seeds(runs: pd.DataFrame, rival: pd.DataFrame, metric: str, greatest: bool) -> dict[str, float]:
    """How many seeds are better than the same seed of the baseline, of those that both have."""
    both = runs.merge(rival, on="seed", suffixes=("", ".rival"))
    apart = both[metric] - both[f"{metric}.rival"]
    return {"seeds_better": float((apart > 0 if greatest else apart < 0).sum()), "seeds_paired": float(len(both))}


def _judged(table: pd.DataFrame, baseline: str | None, alpha: float) -> pd.DataFrame:
    """Holm over all cells that were compared."""
    tested = table["p"].notna()
    table["p_holm"] = np.nan
    if tested.any():
        table.loc[tested, "p_holm"] = holm(table.loc[tested, "p"].to_numpy())
    verdict = np.where(table["difference"] > 0, "above", "below")
    verdict = np.where(table["p_holm"] <= alpha * (1 + _ROUNDING), verdict, "same")
    table["verdict"] = np.where(tested, verdict, "")
    table.loc[table["cell"] == baseline, "verdict"] = "baseline"
    return table


def detectable(items: pd.DataFrame | None, rate: float, tests: int, level: float = 0.95) -> dict[str, float | None]:
    """The least gain over a rate that a paired test of two trainings would find four times in five.

    `items` if all items were independent, `clusters` if those of a cluster always agreed; each for one test alone, and
    `..._holm` for the strictest step of Holm over so many tests. None where no gain would be found.
    """
    if items is None or not 0 < rate < 1:
        return {}
    sizes = {"items": len(items), "clusters": items.index.get_level_values("cluster").nunique()}
    alphas = {"": 1 - level, "_holm": (1 - level) / max(tests, 1)}
    return {
        f"{name}{end}": _detectable(number, rate, alpha)
        for name, number in sizes.items()
        for end, alpha in alphas.items()
    }


def _detectable(number: int, rate: float, alpha: float) -> float | None:
    if mcnemar_power(1.0, rate, number, alpha=alpha) < _POWER:
        return None
    return detectable_difference(number, p=rate, alpha=alpha)
