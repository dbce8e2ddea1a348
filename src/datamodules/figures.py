"""Figures of data sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .splits import SPLITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .describing import Description

INK, SOFT = "#222222", "#8a8f98"
COLOURS = {"train": "#3b6fb5", "val": "#e0a526", "test": "#c0504d"}
PLACES = {"best": "#2f8f5b", "between": "#9aa3ad", "worst": "#c0504d"}


def drawn(found: Description, title: str) -> Figure:
    """Six panels: categories, sources, responses, ranks, prompt lengths, response lengths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.4), layout="constrained", facecolor="white")
    queries = sum(tally.counts["totals"]["queries"] for tally in found.tallies.values())
    figure.suptitle(f"{title}: {queries:,} ranked queries", fontsize=13, color=INK)
    panels = figure.subplots(2, 3)
    _stacked(panels[0][0], found, "category", "queries per category")
    _stacked(panels[0][1], found, "source", "queries per source", most=12)
    _stacked(panels[0][2], found, "responses", "responses per query")
    _ranks(panels[1][0], found)
    _lengths(panels[1][1], {"prompt": found.prompt_lengths}, {"prompt": COLOURS["train"]}, "prompt length, characters")
    _lengths(panels[1][2], found.response_lengths, PLACES, "response length, characters, by rank")
    return figure


def _stacked(axes: Any, found: Description, kind: str, title: str, most: int = 20) -> None:  # noqa: ANN401 - matplotlib
    """Horizontal bars, one part per split; the rarest names beyond `most` are told in a note."""
    totals: dict[str, int] = {}
    for tally in found.tallies.values():
        for name, number in tally.counts[kind].items():
            totals[name] = totals.get(name, 0) + number
    names = sorted(totals, key=lambda name: (-totals[name], name))
    hidden, names = names[most:], names[:most][::-1]
    left = [0] * len(names)
    for split in (split for split in SPLITS if split in found.tallies):
        width = [found.tallies[split].counts[kind][name] for name in names]
        axes.barh(names, width, left=left, color=COLOURS[split], label=split, height=0.72)
        left = [one + two for one, two in zip(left, width, strict=True)]
    for name, total in zip(names, left, strict=True):
        axes.annotate(f" {total:,}", (total, name), va="center", fontsize=8, color=INK)
    note = f" ({len(hidden)} more)" if hidden else ""
    _finish(axes, title + note)
    axes.margins(x=0.14)
    axes.set_ylim(-0.6, max(len(names), 4) - 0.4)  # a single bar would fill the panel
    if kind == "category":
        axes.legend(frameon=False, fontsize=8, loc="lower right")


def _ranks(axes: Any, found: Description) -> None:  # noqa: ANN401
    ranks = sorted(found.ranks)
    axes.bar([str(rank) for rank in ranks], [found.ranks[rank] for rank in ranks], color=COLOURS["train"], width=0.6)
    for rank in ranks:
        axes.annotate(f"{found.ranks[rank]:,}", (str(rank), found.ranks[rank]), ha="center", va="bottom", fontsize=8)
    _finish(axes, "responses per rank (1 is the best)")


def _lengths(axes: Any, of: dict[str, list[int]], colours: dict[str, str], title: str) -> None:  # noqa: ANN401
    """Outlines over equal bins, so that distributions of different size can be compared."""
    longest = max((max(values) for values in of.values() if values), default=1)
    bins = [longest * step / 40 for step in range(41)]
    for name, colour in colours.items():
        if values := of.get(name):
            axes.hist(
                values,
                bins,
                density=True,
                histtype="step",
                color=colour,
                linewidth=1.6,
                label=f"{name} ({len(values):,})",
            )
    _finish(axes, title)
    axes.set_yticks([])
    axes.legend(frameon=False, fontsize=8)


def _finish(axes: Any, title: str) -> None:  # noqa: ANN401
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["left", "bottom"]].set_color(SOFT)
