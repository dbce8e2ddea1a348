"""Figures of what a training does, from plain arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Numbers = NDArray[Any]

# Of Okabe and Ito (2008), which the colour-blind can tell apart; grey values differ too, for print.
BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"
INK, SOFT = "#222222", "#8a8f98"
_BARS = 40
_ROWS = 12
_LETTERS = 24
_LEGEND: dict[str, Any] = {"fontsize": 9, "facecolor": "white", "edgecolor": "none", "framealpha": 1.0}
"""Lines behind a legend must not go through its words."""


class Spread(NamedTuple):
    """How the margins and betas of a group of pairs lie."""

    pairs: int
    mean_delta: float
    mean_beta: float
    std_beta: float


class Ranked(NamedTuple):
    """How well a group of pairs is ranked by its rewards."""

    pairs: int
    mean_margin: float
    std_margin: float
    accuracy: float


def draw_rewards(
    margins: Numbers,
    gaps: Numbers,
    counts: Numbers,
    *,
    accuracy: float,
    rank_gaps: Mapping[str, Ranked],
    categories: Mapping[str, Ranked],
    title: str,
) -> Figure:
    """Three panels: margins of rewards, margins by rank gap, and accuracy by category.

    `counts` says how many pairs have a margin and a rank gap.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained", facecolor="white")
    figure.suptitle(f"{title}: {int(counts.sum()):,} pairs, {accuracy:.1%} right", fontsize=13, color=INK)
    left, middle, right = figure.subplots(1, 3)
    known = np.isfinite(margins)
    _margins(left, margins[known], counts[known])
    _by_gap(middle, margins[known], gaps[known], counts[known], rank_gaps)
    _accuracies(right, categories, accuracy)
    return figure


def _by_gap(axes: Any, margins: Numbers, gaps: Numbers, counts: Numbers, groups: Mapping[str, Ranked]) -> None:  # noqa: ANN401
    """Every margin as a line beside its rank gap, and the mean of each gap with the deviation."""
    across, up = "ranks between the two, and right pairs", "δ; mean ± standard deviation"
    _finish(axes, "margin by ranks between the two", across, up)
    places = np.array([int(name) for name in groups])
    means = np.array([each.mean_margin for each in groups.values()])
    spans = np.array([each.std_margin for each in groups.values()])
    width = 0.06 + 0.24 * counts / max(int(counts.max(initial=1)), 1)
    look = {"linewidth": 1.0, "alpha": 0.35, "rasterized": True}
    axes.hlines(margins, gaps - width, gaps + width, colors=np.where(margins <= 0, RED, BLUE), **look)
    axes.errorbar(places, means, yerr=spans, fmt="o", color=INK, capsize=4, markersize=6)
    axes.axhline(0, color=SOFT, linewidth=1.0, linestyle=":")
    axes.set_xticks(places, [f"{name}\n{each.accuracy:.0%} of {each.pairs:,}" for name, each in groups.items()])
    axes.set_xlim(places.min() - 0.6, places.max() + 0.6)


def _accuracies(axes: Any, groups: Mapping[str, Ranked], accuracy: float) -> None:  # noqa: ANN401
    """The share of right pairs per category; of many those with most pairs."""
    shown = set(sorted(groups, key=lambda name: -groups[name].pairs)[:_ROWS])
    names = [name for name in groups if name in shown][::-1]
    more = f" (of {len(groups)} those with most pairs)" if len(groups) > _ROWS else ""
    _finish(axes, f"right pairs by category{more}", "share of pairs with δ > 0", "")
    if not names:
        _say(axes, "none is told")
        return
    rows = np.arange(len(names))
    axes.barh(rows, [groups[name].accuracy for name in names], height=0.6, color=GREEN)
    axes.set_yticks(rows, [_label(name, groups[name]) for name in names])
    axes.set_ylim(-0.6, max(len(names), 4) - 0.4)
    axes.set_xlim(0, 1)
    axes.axvline(accuracy, color=INK, linewidth=1.2, linestyle="--", label=f"all: {accuracy:.1%}")
    axes.axvline(0.5, color=SOFT, linewidth=1.0, linestyle=":", label="by chance")
    axes.figure.legend(*axes.get_legend_handles_labels(), **_LEGEND, loc="outside lower right", ncols=2)


def draw_betas(
    margins: Numbers,
    betas: Numbers,
    counts: Numbers,
    *,
    beta0: float,
    cap: float,
    categories: Mapping[str, Spread],
    rank_gaps: Mapping[str, Spread],
    title: str,
) -> Figure:
    """Six panels: margins, gains, betas, beta against margin, and beta by category and by rank gap.

    `counts` says how many pairs have a margin (not finite where unknown) and a beta; `cap` may be infinite.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.6), layout="constrained", facecolor="white")
    figure.suptitle(f"{title}: {int(counts.sum()):,} pairs", fontsize=13, color=INK)
    panels = figure.subplots(2, 3)
    known = np.isfinite(margins)
    _margins(panels[0][0], margins[known], counts[known])
    _gains(panels[0][1], betas, counts, beta0, cap)
    _betas(panels[0][2], betas, counts, beta0, cap)
    _against(panels[1][0], margins[known], betas[known], counts[known], beta0, cap)
    _groups(panels[1][1], categories, beta0, cap, "by category")
    _groups(panels[1][2], rank_gaps, beta0, cap, "by ranks between the two")
    return figure


def _margins(axes: Any, margins: Numbers, counts: Numbers) -> None:  # noqa: ANN401  # matplotlib
    """Bars that break at 0, so that no bar holds pairs of both signs."""
    _finish(axes, "margin δ", "δ = reward of chosen - reward of rejected", "pairs")
    if not len(margins):
        _say(axes, "no pair has a margin")
        return
    low, high = float(margins.min()), float(margins.max())
    width = (max(high, 0) - min(low, 0)) / _BARS or 1.0
    edges = width * np.arange(np.floor(low / width), np.floor(high / width) + 2)
    negative = margins < 0
    axes.hist(margins[~negative], edges, weights=counts[~negative], color=BLUE, label="0 or more")
    if negative.any():
        share = counts[negative].sum() / counts.sum()
        bars = {"weights": counts[negative], "color": RED, "hatch": "////", "edgecolor": "white", "linewidth": 0}
        axes.hist(margins[negative], edges, label=f"negative: {share:.1%}", **bars)
    median = float(np.median(np.repeat(margins, counts)))
    axes.axvline(median, color=INK, linewidth=1.4, label=f"median {median:.3g}")
    axes.margins(y=0.35)
    axes.legend(**_LEGEND, loc="upper right")


def _gains(axes: Any, betas: Numbers, counts: Numbers, beta0: float, cap: float) -> None:  # noqa: ANN401
    _finish(axes, "gain g", "g = (β - β₀) / (cap - β₀)", "pairs")
    if not beta0 < cap < np.inf:
        _say(axes, "β has no bounds to measure by" if cap > beta0 else "β is constant")
        return
    gains = (betas - beta0) / (cap - beta0)
    axes.hist(np.clip(gains, 0, 1), np.linspace(0, 1, _BARS + 1), weights=counts, color=GREEN)
    axes.set_xlim(-0.02, 1.02)


def _betas(axes: Any, betas: Numbers, counts: Numbers, beta0: float, cap: float) -> None:  # noqa: ANN401
    _finish(axes, "β", "β", "pairs")
    low, high = _range(betas, beta0, cap)
    axes.hist(betas, np.linspace(low, high, _BARS + 1), weights=counts, color=BLUE)
    _bounds(axes.axvline, beta0, cap)
    axes.locator_params(axis="x", nbins=6)
    axes.legend(**_LEGEND)


def _against(axes: Any, margins: Numbers, betas: Numbers, counts: Numbers, beta0: float, cap: float) -> None:  # noqa: ANN401
    _finish(axes, "β against δ", "δ", "β")
    if not len(margins):
        _say(axes, "no pair has a margin")
        return
    area = 12 + 110 * (counts - 1) / max(int(counts.max()) - 1, 20)
    look = {"facecolors": "none", "linewidths": 0.9, "alpha": 0.7}
    axes.scatter(margins, betas, s=area, edgecolors=np.where(margins < 0, RED, BLUE), rasterized=True, **look)
    _bounds(axes.axhline, beta0, cap)
    axes.set_ylim(*_range(betas, beta0, cap))  # no legend: it would lie on points, and the panel above has it


def _groups(axes: Any, groups: Mapping[str, Spread], beta0: float, cap: float, title: str) -> None:  # noqa: ANN401
    """Mean and standard deviation per group; of many groups those with most pairs."""
    shown = set(sorted(groups, key=lambda name: -groups[name].pairs)[:_ROWS])
    names = [name for name in groups if name in shown][::-1]
    more = f" (of {len(groups)} those with most pairs)" if len(groups) > _ROWS else ""
    _finish(axes, f"β {title}{more}", "β: mean ± standard deviation; δ: mean", "")
    if not names:
        _say(axes, "none is told")
        return
    means = np.array([groups[name].mean_beta for name in names])
    spans = np.array([groups[name].std_beta for name in names])
    rows = np.arange(len(names))
    axes.errorbar(means, rows, xerr=spans, fmt="o", color=BLUE, capsize=3, markersize=6)
    axes.set_yticks(rows, [_label(name, groups[name]) for name in names])
    axes.set_ylim(-0.6, max(len(names), 4) - 0.4)  # a single row would stand in the middle of nothing
    low, high = _range(np.concatenate([means - spans, means + spans]), beta0, cap)
    _bounds(axes.axvline, beta0, cap)
    axes.set_xlim(low, high)
    axes.locator_params(axis="x", nbins=6)
    for row, name in enumerate(names):
        if not np.isnan(groups[name].mean_delta):
            told = f"δ {groups[name].mean_delta:.2f}"
            axes.annotate(told, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=INK)


def _label(name: str, group: Spread | Ranked) -> str:
    """A name that leaves room for the panel, and the number of pairs."""
    short = name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"
    return f"{short} ({group.pairs:,})"


def _range(betas: Numbers, beta0: float, cap: float) -> tuple[float, float]:
    """From the smallest to the largest, both bounds among them, with a little room."""
    ends = [*betas[np.isfinite(betas)].tolist(), beta0, *([cap] if cap < np.inf else [])]
    low, high = min(ends), max(ends)
    room = 0.06 * (high - low) if high - low > 1e-3 * beta0 else 0.1 * beta0
    return low - room, high + room


def _bounds(line: Any, beta0: float, cap: float) -> None:  # noqa: ANN401
    line(beta0, color=INK, linewidth=1.2, linestyle=":", label=f"β₀ = {beta0:.4g}")
    if beta0 < cap < np.inf:
        line(cap, color=INK, linewidth=1.2, linestyle="--", label=f"cap = {cap:.4g}")


def _say(axes: Any, words: str) -> None:  # noqa: ANN401
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", fontsize=10, color=SOFT)
    axes.set_xticks([])
    axes.set_yticks([])


def _finish(axes: Any, title: str, across: str, up: str) -> None:  # noqa: ANN401
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    axes.set_xlabel(across, fontsize=9, color=INK)
    axes.set_ylabel(up, fontsize=9, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)
    axes.spines[["left", "bottom"]].set_color(SOFT)
