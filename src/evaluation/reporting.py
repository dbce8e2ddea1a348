"""The result as people read it: tables on the terminal, and the same as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from ..stats import Interval
from .agreement import Agreement, Folds
from .comparing import Contrast
from .rates import Line, Summary
from .table4 import table4

RULE = (
    "A pair is right if the chosen answer has strictly the larger reward; a tie, a missing reward and one that could "
    "not be read are wrong. ACC counts pairs, ACC+ ids all of whose pairs are right. Intervals: bootstrap over ids for "
    "ACC (Wilson over ids where all pairs agree), Wilson for ACC+, bootstrap over ids within each category for macro."
)
_BENCH = "MM-RLHF-RewardBench"
_PAPER = "The paper's Table 4 (its numbers, not made here)"


class Grid(NamedTuple):
    """A table before anybody has drawn it."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def rates_grid(summaries: Mapping[str, Summary], title: str = _BENCH) -> Grid:
    """A line per category, then all and their mean, for each system."""
    rows: list[tuple[str, ...]] = []
    for name, summary in summaries.items():
        lines = [*summary.categories.items(), ("all", summary.overall)]
        for place, (category, line) in enumerate(lines):
            rows.append(("" if place else name, category, *_of_line(line)))
        macro = (*_of_interval(summary.macro_acc), "", *_of_interval(summary.macro_acc_plus))
        rows.append(("", "macro", "", *macro))
    level = next(iter(summaries.values())).overall.acc.level
    within = f"{level:.0%}"
    headings = ("system", "category", "pairs", "ACC", within, "ids", "ACC+", within)
    return Grid(title, headings, rows)


def coverage_grid(summaries: Mapping[str, Summary]) -> Grid:
    """What became of the pairs, and which gain could be found with so many."""
    rows = []
    for name, summary in summaries.items():
        counts, gain = summary.counts, summary.detectable
        told = (str(counts[status]) for status in ("judged", "tied", "missing", "unparsable"))
        least = (_gain(gain[key]) for key in ("acc_low", "acc_high", "acc_plus"))
        rows.append((name, *told, f"{summary.coverage:.1%}", *least))
    headings = ("system", "judged", "tied", "missing", "unparsable", "covered", "ACC from", "to", "ACC+")
    return Grid("Coverage, and the least gain that a paired test would find (power 0.8)", headings, rows)


def contrasts_grid(found: Sequence[Contrast]) -> Grid:
    """The tests of the family."""
    rows = [
        (
            f"{one.one} - {one.two}",
            "ACC" if one.metric == "acc" else "ACC+",
            f"{one.difference.value:+.3f}",
            f"{one.difference.low:+.3f} to {one.difference.high:+.3f}",
            f"{one.only_one}:{one.only_two}",
            f"{one.p:.4f}",
            f"{one.p_holm:.4f}",
        )
        for one in found
    ]
    headings = ("difference", "of", "value", "interval", "only", "p", "p (Holm)")
    return Grid(f"Paired comparisons, a family of {len(found)}", headings, rows)


def paper_grid() -> Grid:
    """What the paper prints and what its categories add up to."""
    rows = [
        (
            row.system,
            f"{row.overall.acc:.2f}",
            f"{row.acc:.3f} ({row.counts[0]})",
            f"{row.overall.acc_plus:.2f}",
            f"{row.acc_plus:.3f} ({row.counts[1]})",
        )
        for row in table4()
    ]
    return Grid(_PAPER, ("system", "ACC printed", "recomputed", "ACC+ printed", "recomputed"), rows)


def paper_cells_grid() -> Grid:
    """The paper's values per category, as printed, ACC and ACC+."""
    categories = tuple(table4()[0].cells)
    rows = [
        (row.system, *(f"{row.cells[name].acc:.2f} / {row.cells[name].acc_plus:.2f}" for name in categories))
        for row in table4()
    ]
    return Grid("The paper's categories as printed, ACC / ACC+", ("system", *categories), rows)


def gaps_grid(found: Agreement) -> Grid:
    """Margins and accuracy by how many ranks people put between the two."""
    rows = [
        (str(gap), str(of.line.pairs), str(of.line.ids), *_of_signed(of.delta), *_of_interval(of.line.acc))
        for gap, of in found.gaps.items()
    ]
    line = found.accuracy.overall
    rows.append(("all", str(line.pairs), str(line.ids), *_of_signed(found.delta), *_of_interval(line.acc)))
    within = f"{found.delta.level:.0%}"
    return Grid("By rank gap", ("gap", "pairs", "queries", "mean δ", within, "ACC", within), rows)


def measures_grid(found: Agreement) -> Grid:
    """Rank correlation, calibration and length, each with the number of things that it is made of."""
    pairs = str(found.accuracy.overall.pairs)
    rows = [
        (f"Kendall's tau-b, {name}", *_of_signed(tau.value), f"{tau.queries} queries")
        for name, tau in found.taus.items()
    ]
    rows.append(("log loss (a coin has 0.693)", *_of_interval(found.log_loss), f"{pairs} pairs"))
    rows.append(("calibration error", f"{found.calibration_error:.3f}", "", f"{pairs} pairs"))
    if found.lengths:
        each = f"{found.lengths.pairs} pairs"
        rows.append(("the longer one preferred by people", *_of_interval(found.lengths.people), each))
        rows.append(("the longer one preferred by rewards", *_of_interval(found.lengths.rewards), each))
        rows.append(("rewards less people", *_of_signed(found.lengths.difference), each))
    return Grid("Order, calibration, length", ("measure", "value", f"{found.delta.level:.0%}", "of"), rows)


def folds_grid(found: Folds) -> Grid:
    """What it does to margins that a model was trained on the query."""
    seen = "seen", *_of_signed(found.delta_seen), *_of_interval(found.accuracy_seen)
    unseen = "unseen", *_of_signed(found.delta_unseen), *_of_interval(found.accuracy_unseen)
    gap = "seen less unseen", *_of_signed(found.delta_gap), *_of_signed(found.accuracy_gap)
    within = f"{found.delta_gap.level:.0%}"
    title = f"Queries seen in training, and not ({found.pairs:,} pairs of {found.queries:,} queries)"
    return Grid(title, ("the query is", "mean δ", within, "ACC", within), [seen, unseen, gap])


def is_papers_set(summary: Summary) -> bool:
    """Whether the items have the paper's numbers of pairs and ids in every category."""
    cells = table4()[0].cells
    return {name: (line.pairs, line.ids) for name, line in summary.categories.items()} == {
        name: (cell.pairs, cell.ids) for name, cell in cells.items()
    }


def notes(summaries: Mapping[str, Summary]) -> list[str]:
    """What the tables do not say."""
    first = next(iter(summaries.values()))
    told = [RULE]
    if not is_papers_set(first):
        told.append("These are not the paper's 170 pairs, so its rows are no measure for the ones above.")
    told += [f"Paper, {row.system}: {doubt}." for row in table4() for doubt in row.doubts]
    for name, summary in summaries.items():
        if summary.coverage < 1 and summary.acc_covered is not None:
            told.append(f"{name}: {summary.acc_covered:.3f} of the pairs that have rewards ({summary.coverage:.1%}).")
    return told


def show(grids: Iterable[Grid], console: Console | None = None) -> None:
    """Print tables on the terminal."""
    printer = console or Console()
    for grid in grids:
        table = Table(title=grid.title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for place, heading in enumerate(grid.headings):
            table.add_column(heading, justify="right" if place and place != _text_column(grid) else "left")
        for row in grid.rows:
            table.add_row(*row)
        printer.print(table)


def _text_column(grid: Grid) -> int:
    """The second column of names, where there is one."""
    return 1 if grid.headings[1] in ("category", "of") else 0


def markdown(grids: Iterable[Grid], told: Iterable[str], preamble: Sequence[str], title: str = _BENCH) -> str:
    """The tables and notes as Markdown."""
    lines = [f"# {title}", "", *(f"- {line}" for line in preamble), ""]
    for grid in grids:
        rules = ["---" if place == 0 or place == _text_column(grid) else "---:" for place in range(len(grid.headings))]
        rows = (grid.headings, tuple(rules), *grid.rows)
        lines += [f"## {grid.title}", "", *("| " + " | ".join(map(_cell, row)) + " |" for row in rows), ""]
    return "\n".join([*lines, "## Notes", "", *(f"- {line}" for line in told), ""])


def _cell(value: str) -> str:
    return value.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _of_line(line: Line) -> tuple[str, ...]:
    return str(line.pairs), *_of_interval(line.acc), str(line.ids), *_of_interval(line.acc_plus)


def _of_interval(interval: Interval) -> tuple[str, str]:
    within = "unknown" if math.isinf(interval.low) else f"{interval.low:.2f}-{interval.high:.2f}"
    return f"{interval.value:.3f}", within


def _of_signed(interval: Interval) -> tuple[str, str]:
    if math.isinf(interval.low):
        return f"{interval.value:+.3f}", "unknown"
    return f"{interval.value:+.3f}", f"{interval.low:+.3f} to {interval.high:+.3f}"


def _gain(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
