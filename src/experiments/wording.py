"""What a report says in words: what was found, and how far that goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd  # type: ignore[import-untyped]

from ..stats import kendall_tau_b
from .heatmap import number
from .summary import detectable

if TYPE_CHECKING:
    from .results import Results

_SOURCES = {
    "files": "δ: the margins of all pairs of the rankings and rewards that were given.",
    "runs": "δ: the margins that a training of this sweep kept.",
    "nowhere": "δ: no run has kept its margins; --ranked and --scores measure them from files.",
}


def findings(found: Results) -> list[str]:
    """The first lines of a report: how many cells differ from the baseline, and what the test split says."""
    told = []
    tested = found.cells[found.cells["p"].notna()]
    if len(tested):
        counts = tested["verdict"].value_counts()
        above, below, same = (int(counts.get(verdict, 0)) for verdict in ("above", "below", "same"))
        told.append(
            f"Of {len(tested)} cells, {above} {_are(above)} above {found.baseline} in {found.metric}, {below} "
            f"{_are(below)} below it, and {same} {_are(same)} not distinguishable from it (paired tests on the same "
            f"items, Holm, {1 - found.level:.0%})."
        )
    if found.selected is not None:
        told.append(_chosen(found, found.selected))
    return told


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _chosen(found: Results, selected: str) -> str:
    """What became of the selected cell."""
    words = f"By {found.parent.metric} on {found.parent.split}, as declared beforehand, {selected} was selected."
    if found.test is None or selected not in set(found.test["cell"]):
        return f"{words} No result on the test split is known."
    row = found.test[found.test["cell"] == selected].iloc[0]
    percent = pd.notna(row["low"])
    words += f" On {found.parent.test_split}: {number(row['mean'], percent)}"
    words += f" ({_span(row['low'], row['high'], percent)})" if percent else ""
    if pd.notna(row["p"]):
        span = _span(row["difference_low"], row["difference_high"], percent)
        tests = int(found.test["p"].notna().sum())
        level = f"p = {row['p']:.4f}" if tests == 1 else f"p = {row['p_holm']:.4f} by Holm over {tests} tests"
        words += f", {_signed(row['difference'], percent)} from {found.baseline} ({span}; {level})"
    again = (found.parent.selection or {}).get("test_opened_before")
    return f"{words}.{' The test split had been opened before, for an earlier selection.' if again else ''}"


def notes(found: Results) -> list[str]:
    """What figures and tables do not say."""
    return [*_of_selection(found), *_of_tests(found), *_of_seeds(found), *_of_promotion(found), *_of_margins(found)]


def _of_selection(found: Results) -> list[str]:
    parent, told = found.parent, []
    if parent.metric is None:
        told.append(f"No metric was declared before the runs; {found.metric} was asked for afterwards.")
    elif parent.metric != found.metric:
        told.append(f"The sweep declared {parent.metric}; {found.metric} was asked for afterwards and selects nothing.")
    best = found.cells["mean"].idxmax() if parent.greatest else found.cells["mean"].idxmin()
    told.append(
        f"The {'highest' if parent.greatest else 'lowest'} mean is that of {found.cells['cell'][best]}. It is the best "
        f"of {len(found.cells)} on the items by which it was found, so it flatters itself; a test split that was not "
        "looked at tells."
    )
    if parent.selection is None:
        told.append("No record of a selection: nothing was selected yet, and no test split was opened by this sweep.")
    return told


def _of_tests(found: Results) -> list[str]:
    if found.items is None:
        told = f"{found.metric} is not the share of correct items in the outcomes of every run, or some have none"
        return [f"{told}: there are no intervals over items and no tests."]
    items, clusters = len(found.items), found.items.index.get_level_values("cluster").nunique()
    method = (
        f"Intervals: {found.level:.0%}, bootstrap over clusters of items ({items:,} items in {clusters:,} clusters), "
        "the seeds of a cell pooled. Tests: signs of the difference flipped cluster by cluster. Both speak of these "
        "trainings and of other items like these; how another seed would differ is told by the standard deviation over "
        "seeds (sd)."
    )
    tests = int(found.cells["p"].notna().sum())
    rate = found.cells.loc[found.cells["cell"] == found.baseline, "mean"]
    if not tests:
        return [method, "There is no baseline to compare with; --baseline names one."]
    return [method, _detectable(found, float(rate.iloc[0]), tests)]


def _detectable(found: Results, rate: float, tests: int) -> str:
    """What this number of items can show at all."""
    least = detectable(found.items, rate, tests, found.level)
    ends = [_points(least.get(name)) for name in ("items", "clusters", "items_holm", "clusters_holm")]
    return (
        f"The least gain over {found.baseline} that a paired test of two single trainings would find four times in "
        f"five (McNemar, outcomes correlated by 0.5): {ends[0]} if items were independent, {ends[1]} if those of a "
        f"cluster always agreed; in the strictest of Holm's {tests} steps {ends[2]} and {ends[3]}."
    )


def _points(gain: float | None) -> str:
    return "none" if gain is None else f"{100 * gain:.1f} points"


def _of_seeds(found: Results) -> list[str]:
    told, seeds = [], found.cells["seeds"]
    if seeds.max() == 1:
        told.append("One seed per cell: nothing is known of how another seed would differ.")
    elif seeds.nunique() > 1:
        few = found.cells.loc[seeds < seeds.max(), "cell"].tolist()
        told.append(f"Fewer seeds than others have: {', '.join(few)}.")
    apart = found.cells[found.cells["verdict"].isin(["above", "below"])]
    agree = apart["seeds_better"].isin([0.0]) | (apart["seeds_better"] == apart["seeds_paired"])
    if len(split := apart.loc[~agree, "cell"].tolist()):
        told.append(f"Told from the baseline by its items, but its seeds disagree about the sign: {', '.join(split)}.")
    return told


def _of_promotion(found: Results) -> list[str]:
    """Whether cells stand in the same order after they were trained on all data."""
    whole = found.promoted
    if whole is None:
        return []
    both = found.cells.merge(whole, on="cell", suffixes=("", ".whole"))
    if min(both["mean"].nunique(), both["mean.whole"].nunique()) < 2:
        return [f"Trained again on all data: {', '.join(whole['cell'])}."]
    tau = kendall_tau_b(both["mean"].to_numpy(), both["mean.whole"].to_numpy())
    return [f"Trained again on all data: {', '.join(whole['cell'])}; rank correlation of their means (τ-b): {tau:.2f}."]


def _of_margins(found: Results) -> list[str]:
    rules = found.chosen.used[["cell", "rule.w"]].drop_duplicates("cell")
    told = [_SOURCES[found.margins_from]]
    if missing := rules.loc[rules["rule.w"].isna(), "cell"].tolist():
        told.append(f"Not among the curves of β, which no margin decides there: {', '.join(missing)}.")
    return told


def _span(low: float, high: float, percent: bool) -> str:
    return f"{number(low, percent)} to {number(high, percent)}"


def _signed(value: float, percent: bool) -> str:
    return f"{'+' if value >= 0 else ''}{number(value, percent)}"
