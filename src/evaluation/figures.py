"""Figures of what rewards are worth, from plain arrays: one row per response, or one per pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..stats import Interval, kendall_tau_b
from .agreement import BINS, Floats, calibration_error, confidences, equal_bins, prefers_longer
from .rates import Drawing, clustered_mean, clustered_rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of Okabe and Ito (2008), which the colour-blind can tell apart; grey values differ too, for print.
BLUE, RED = "#0072B2", "#D55E00"
INK, SOFT = "#222222", "#8a8f98"
_DRAWING: Drawing = {"level": 0.95, "resamples": 2000, "seed": 0}


def reward_by_rank(
    rewards: ArrayLike, ranks: ArrayLike, queries: Sequence[str] | None = None, *, title: str = ""
) -> Figure:
    """Rewards of single responses under the rank that people gave them, with the mean of each rank."""
    figure, axes = _sheet(title)
    values, places = _arrays(rewards, ranks)
    _columns(axes, values, places, queries)
    _finish(axes, "rank by people (1 is the best)", "reward r")
    return figure


def delta_by_gap(
    deltas: ArrayLike, gaps: ArrayLike, queries: Sequence[str] | None = None, *, title: str = ""
) -> Figure:
    """Margins of pairs, chosen less rejected, by the number of ranks that people put between the two."""
    figure, axes = _sheet(title)
    values, places = _arrays(deltas, gaps)
    axes.axhline(0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    _columns(axes, values, places, queries)
    _finish(axes, "ranks between the two answers", "margin δ (chosen less rejected)")
    return figure


def calibration(
    deltas: ArrayLike, queries: Sequence[str] | None = None, *, bins: int = BINS, title: str = ""
) -> Figure:
    """How often the preferred answer is the better one, against the confidence sigmoid(abs δ) that the margin claims.

    `deltas` are of chosen over rejected, so a negative one is an error; a margin of 0 prefers nothing and counts half.
    Bins hold about equally many pairs. Bars are 95 % intervals over queries, where `queries` names them.
    """
    (values,) = _arrays(deltas)
    confidence, right = confidences(values)
    figure, (axes, below) = _sheet(title, heights=(3.4, 1))
    axes.plot([0.5, 1], [0.5, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)), label="calibrated")
    for members in equal_bins(confidence, bins):
        found = clustered_rate(right[members], _of(queries, members), **_DRAWING)
        place = float(confidence[members].mean())
        axes.errorbar(place, found.value, _reach(found), fmt="o", color=BLUE, markersize=5, capsize=2.5, linewidth=1.3)
    axes.set_ylim(0, 1.03)
    _note(
        axes,
        f"{len(values):,} pairs, {right.mean():.1%} right; mean gap to the line {calibration_error(values, bins):.3f}",
    )
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    _finish(axes, "", "share that is right")
    below.hist(confidence, np.linspace(0.5, 1, 26).tolist(), color=SOFT)
    _finish(below, "confidence, sigmoid of |δ|", "pairs")
    for each in (axes, below):
        each.set_xlim(0.495, 1.005)
    axes.tick_params(labelbottom=False)
    return figure


def length_bias(
    deltas: ArrayLike, longer: ArrayLike, queries: Sequence[str] | None = None, *, bins: int = 6, title: str = ""
) -> Figure:
    """Margins against how much longer the chosen answer is than the rejected one, with means of equal bins.

    A reward that likes length rises from left to right more than people do; the note tells how often either prefers
    the longer one, over pairs whose lengths differ.
    """
    values, lengths = _arrays(deltas, longer)
    figure, axes = _sheet(title)
    for place, kind in ((0, axes.axhline), (0, axes.axvline)):
        kind(place, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    wrong = values <= 0
    for which, colour, name in ((~wrong, BLUE, "δ is right"), (wrong, RED, "δ is wrong")):
        axes.scatter(lengths[which], values[which], s=12, alpha=0.4, color=colour, linewidths=0, label=name)
    for members in equal_bins(lengths, bins):
        found = clustered_mean(values[members], _of(queries, members), **_DRAWING)
        axes.errorbar(
            np.median(lengths[members]), found.value, _reach(found), fmt="o", color=INK, capsize=2.5, markersize=5
        )
    _letters_or_pages(axes, float(np.abs(lengths).max()))
    # Beside the note and not on the points: pages of text stand in any corner.
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
    _note(axes, _lengths_in_words(values, lengths))
    _finish(axes, "characters by which the chosen answer is longer", "margin δ (chosen less rejected)")
    return figure


def in_and_out_of_fold(
    seen: ArrayLike, unseen: ArrayLike, queries: Sequence[str] | None = None, *, title: str = ""
) -> Figure:
    """Margins of a model that was trained on a query against those of one that was not, with the mean of both.

    Above the diagonal stands what training on the pair itself adds; a trainer that scales by δ sees the left axis.
    """
    inside, outside = _arrays(seen, unseen)
    figure, axes = _sheet(title)
    reach = float(max(np.abs(inside).max(), np.abs(outside).max())) * 1.06 or 1.0
    for kind in (axes.axhline, axes.axvline):
        kind(0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.plot([-reach, reach], [-reach, reach], color=SOFT, linewidth=1, zorder=1)
    learned = (inside > 0) & (outside <= 0)
    for which, colour, name in ((~learned, BLUE, "all others"), (learned, RED, "right only if seen")):
        axes.scatter(outside[which], inside[which], s=12, alpha=0.4, color=colour, linewidths=0, label=name)
    across, up = (
        clustered_mean(values, _of(queries, np.arange(len(values))), **_DRAWING) for values in (outside, inside)
    )
    axes.errorbar(
        across.value,
        up.value,
        _reach(up),
        _reach(across),
        fmt="D",
        color=INK,
        capsize=3,
        markersize=5,
        label="mean, 95 %",
    )
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    axes.set_aspect("equal")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
    _note(axes, _folds_in_words(inside, outside, _of(queries, np.arange(len(inside)))))
    _finish(axes, "δ, the query unseen in training", "δ, the query seen in training")
    return figure


def _folds_in_words(inside: Floats, outside: Floats, queries: Sequence[str]) -> str:
    more = clustered_mean(inside - outside, queries, **_DRAWING)
    return (
        f"seen: mean δ {inside.mean():+.3f}, {(inside > 0).mean():.1%} right; "
        f"unseen: {outside.mean():+.3f}, {(outside > 0).mean():.1%}\n"
        f"seen less unseen: {more.value:+.3f} ({more.low:+.3f} to {more.high:+.3f}, 95 % over queries)"
    )


def _letters_or_pages(axes: Any, most: float) -> None:  # noqa: ANN401
    """An axis that is linear near nothing and logarithmic beyond, for lengths differ by letters or by pages."""
    axes.set_xscale("symlog", linthresh=10)
    powers = [10**power for power in range(1, 2 + int(np.log10(max(most, 10))))]
    ticks = [*(-power for power in reversed(powers)), 0, *powers]
    axes.set_xticks(ticks, [f"{tick:+,}" if tick else "0" for tick in ticks])
    axes.set_xticks([], minor=True)
    reach = max(most, 10) * 1.6
    axes.set_xlim(-reach, reach)


def _lengths_in_words(deltas: Floats, lengths: Floats) -> str:
    unequal = lengths != 0
    if not unequal.any():
        return "all answers are equally long"
    people, reward = (lengths[unequal] > 0).mean(), prefers_longer(deltas[unequal], lengths[unequal]).mean()
    words = f"the longer one is preferred by people in {people:.0%}, by the reward in {reward:.0%}"
    if len(set(lengths)) > 1 and len(set(deltas)) > 1:
        words += f"\nKendall's τ of δ and length {kendall_tau_b(deltas, lengths):+.2f}"
    return words


def _arrays(*columns: ArrayLike) -> list[Floats]:
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    if not arrays[0].size or any(array.shape != (arrays[0].size,) for array in arrays):
        raise ValueError(f"expected equally long lists, not empty, got {[array.shape for array in arrays]}")
    if any(not np.isfinite(array).all() for array in arrays):
        raise ValueError("expected finite numbers, got others; leave out what could not be judged")
    return arrays


def _columns(axes: Any, values: Floats, places: Floats, queries: Sequence[str] | None) -> None:  # noqa: ANN401
    """A cloud of points per place, a box around its middle half, and its mean with an interval beside them."""
    kinds = sorted(set(places))
    for at, kind in enumerate(kinds):
        members = np.flatnonzero(places == kind)
        cloud = values[members]
        # The golden ratio spreads points evenly, without chance; sorted first, so that the file's order is not drawn.
        jitter = (np.arange(len(cloud)) * 0.618034) % 1 - 0.5
        size, alpha = (9, 0.3) if len(cloud) > 60 else (16, 0.5)
        axes.scatter(at - 0.13 + 0.3 * jitter, np.sort(cloud), s=size, alpha=alpha, color=BLUE, linewidths=0, zorder=2)
        low, middle, high = np.quantile(cloud, [0.25, 0.5, 0.75])
        axes.plot([at - 0.3, at + 0.04], [middle, middle], color=INK, linewidth=1.4, zorder=3)
        axes.plot([at - 0.3, at + 0.04, at + 0.04, at - 0.3, at - 0.3], [low, low, high, high, low], color=SOFT, lw=0.9)
        found = clustered_mean(cloud, _of(queries, members), **_DRAWING)
        axes.errorbar(at + 0.2, found.value, _reach(found), fmt="D", color=RED, markersize=5, capsize=3, zorder=4)
    labels = [f"{kind:g}\nn = {int((places == kind).sum()):,}" for kind in kinds]
    axes.set_xticks(range(len(kinds)), labels)
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    _note(axes, "points and their middle half; red: mean, 95 % over queries")


def _of(queries: Sequence[str] | None, members: NDArray[np.intp]) -> list[str]:
    """The clusters of these values; by itself each, where nobody names queries."""
    return [str(place) if queries is None else queries[place] for place in members]


def _reach(found: Interval) -> list[list[float]]:
    """How far a bar goes down and up; where there are no bounds, nowhere."""
    low, high = (bound if np.isfinite(bound) else found.value for bound in (found.low, found.high))
    return [[found.value - low], [high - found.value]]


def _sheet(title: str, heights: tuple[float, ...] = (1,)) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 4.8), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=12, color=INK)
    axes = figure.subplots(len(heights), gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]
    return figure, axes[0] if len(heights) == 1 else axes


def _note(axes: Any, words: str) -> None:  # noqa: ANN401
    axes.set_title(words, fontsize=8.5, loc="left", color=INK)


def _finish(axes: Any, across: str, upwards: str) -> None:  # noqa: ANN401
    axes.set_xlabel(across, fontsize=9.5, color=INK)
    axes.set_ylabel(upwards, fontsize=9.5, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5, colors=INK)
    axes.spines[["left", "bottom"]].set_color(SOFT)
