"""What a report tells in rows, and the same as HTML and as Markdown; every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import pandas as pd  # type: ignore[import-untyped]

from .choosing import REASONS
from .heatmap import number
from .summary import COSTS

_VERDICTS = {
    "baseline": "the baseline",
    "above": "above",
    "below": "below",
    "same": "not distinguishable",
    "": "not tested",
}
_LONGEST = 400


class Table(NamedTuple):
    """A table before anybody has drawn it."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: frozenset[int] = frozenset({0})
    """The columns of words; the others hold numbers."""

    def html(self) -> str:
        """The table as HTML."""
        head = "".join(f"<th{self._look(place)}>{escape(name)}</th>" for place, name in enumerate(self.headings))
        body = "".join(
            "<tr>"
            + "".join(f"<td{self._look(place)}>{escape(value)}</td>" for place, value in enumerate(row))
            + "</tr>\n"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"

    def markdown(self) -> str:
        """The table as Markdown."""
        rules = tuple("---" if place in self.words else "---:" for place in range(len(self.headings)))
        return "\n".join("| " + " | ".join(map(in_cell, row)) + " |" for row in (self.headings, rules, *self.rows))

    def _look(self, place: int) -> str:
        return "" if place in self.words else ' class="number"'


def in_cell(value: str) -> str:
    r"""A text that keeps its place in a table of Markdown, and is no mark-up.

    >>> in_cell("a|b <i>")
    'a\\|b &lt;i&gt;'
    """
    safe = escape(value, quote=False)
    for sign in "\\|`*_[":
        safe = safe.replace(sign, f"\\{sign}")
    return " ".join(safe.split())


def cells_table(cells: pd.DataFrame, metric: str, percent: bool, level: float) -> Table:
    """A line per cell: mean, interval, seeds, and how it compares with the baseline."""
    rows = []
    for _, cell in cells.iterrows():
        tested = pd.notna(cell["p"])
        span = _span(cell["low"], cell["high"], percent) if pd.notna(cell["low"]) else ""
        apart = (
            f"{'+' if cell['difference'] >= 0 else ''}{number(cell['difference'], percent)}",
            _span(cell["difference_low"], cell["difference_high"], percent),
            f"{cell['p']:.4f}",
            f"{cell['p_holm']:.4f}",
        )
        seeds = "" if pd.isna(cell["seeds_paired"]) else f"{cell['seeds_better']:.0f} of {cell['seeds_paired']:.0f}"
        spread = "" if pd.isna(cell["sd"]) else number(cell["sd"], percent)
        told = (number(cell["mean"], percent), span, spread, str(cell["seeds"]))
        rows.append((cell["cell"], *told, *(apart if tested else ("",) * 4), seeds, _VERDICTS[cell["verdict"]]))
    unit, within = ", %" if percent else "", f"{level:.0%} interval"
    headings = ("cell", f"mean{unit}", within, "sd", "seeds", "difference", within, "p", "p (Holm)", "seeds better")
    return Table(f"Cells: {metric}", (*headings, "than the baseline"), rows, frozenset({0, 10}))


def promoted_table(promoted: pd.DataFrame, cells: pd.DataFrame, metric: str, percent: bool) -> Table:
    """A line per cell that was trained again on all data, beside its mean in the grid."""
    before = dict(zip(cells["cell"], cells["mean"], strict=True))
    rows = [
        (
            row["cell"],
            number(before[row["cell"]], percent) if row["cell"] in before else "",
            number(row["mean"], percent),
        )
        for _, row in promoted.iterrows()
    ]
    return Table(f"Trained again on all data: {metric}", ("cell", "in the grid", "on all data"), rows)


def runs_table(used: pd.DataFrame, metric: str, percent: bool) -> Table:
    """A line per run, with what it cost."""
    rows = []
    for _, run in used.iterrows():
        costs = (_amount(run.get(name)) for name in COSTS)
        seed = "" if pd.isna(run["seed"]) else f"{run['seed']:.0f}"
        rows.append((run["cell"], seed, number(run[metric], percent), *costs, f"{run['seconds']:,.0f}", run["run"]))
    headings = ("cell", "seed", f"{metric}{', %' if percent else ''}", *COSTS.values(), "seconds in all", "MLflow run")
    return Table("Runs and their cost", headings, rows, frozenset({0, 7}))


def excluded_table(excluded: pd.DataFrame) -> Table:
    """A line per run that is not in the grid, with the reason."""
    rows = [
        (row["name"], REASONS[row["reason"]], " ".join(str(row["error"]).split())[-_LONGEST:])
        for _, row in excluded.iterrows()
    ]
    return Table(
        "Failed and excluded runs", ("run", "why it is not in the grid", "last words"), rows, frozenset({0, 1, 2})
    )


def record_table(title: str, record: Mapping[str, Any]) -> Table:
    """A record as names and values; what is nested gets dotted names."""
    return Table(title, ("what", "value"), list(_flat(record)), frozenset({0, 1}))


def _flat(record: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            yield from _flat({str(place): one for place, one in enumerate(value)}, f"{before}{name}.")
        else:
            told = ", ".join(map(str, value)) if isinstance(value, list) else value
            yield f"{before}{name}", f"{told:.6g}" if isinstance(told, float) else str(told)


def _span(low: float, high: float, percent: bool) -> str:
    return f"{number(low, percent)} to {number(high, percent)}"


def _amount(value: float | None) -> str:
    """A cost that may be seconds or quadrillions.

    >>> _amount(61.52), _amount(81920.0), _amount(3.1e12), _amount(None)
    ('61.5', '81,920', '3.1e+12', '')
    """
    if value is None or pd.isna(value):
        return ""
    if value >= 1e9:
        return f"{value:.3g}"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
