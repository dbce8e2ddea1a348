"""What a result cost: performance against device-seconds and floating-point operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from .choosing import short_names
from .heatmap import tick
from .look import INK, MARKERS, RED, SOFT, finish, new_figure, place_key, say, shades
from .summary import COSTS, axis_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

_EQUAL = 1e-3
_SHOWN = ("ledger/device_seconds", "ledger/flops")


def draw_cost(
    cells: pd.DataFrame,
    used: pd.DataFrame,
    up: str | None,
    across: str | None,
    *,
    metric: str,
    percent: bool = True,
    selected: str | None = None,
    title: str = "",
) -> Figure:
    """Result against cost, two panels: every run a small dot, every cell a mark at its means, with its interval.

    Colours tell the value of `up`, marks that of `across`; the baseline is a ring.
    """
    figure = new_figure(11.0, 5.0, title)
    styles = _styles(cells, up, across)
    for axes, cost in zip(figure.subplots(1, 2), _SHOWN, strict=True):
        finish(axes, "", COSTS[cost], f"{metric}{', %' if percent else ''}")
        known = cells[np.isfinite(cells[cost].astype(float))]
        if not len(known):
            say(axes, f"no run has {cost}")
            continue
        ends = known[cost].min(), known[cost].max()
        if len(known) > 1 and ends[1] <= (1 + _EQUAL) * ends[0]:
            say(axes, f"the same for every cell: {ends[0]:.3g}")
            continue
        _points(axes, known, used, (cost, metric), styles, 100 if percent else 1)
        if selected is not None and len(known[known["cell"] == selected]):
            one = known[known["cell"] == selected].iloc[0]
            place = (one[cost], one["mean"] * (100 if percent else 1))
            axes.plot(*place, "o", markersize=20, markerfacecolor="none", color=RED, markeredgewidth=1.8, zorder=2)
        if ends[0] > 0 and ends[1] > 10 * ends[0]:
            axes.set_xscale("log")
        axes.margins(0.08)
    _key(figure, styles, cells, up, across, selected)
    return figure


def _styles(cells: pd.DataFrame, up: str | None, across: str | None) -> dict[str, dict[str, Any]]:
    """Colour and mark of every cell."""
    others = cells[cells["verdict"] != "baseline"]
    ups = sorted(others[up].dropna().unique(), key=axis_key) if up else []
    acrosses = sorted(others[across].dropna().unique(), key=axis_key) if across else []
    colours = shades(len(ups))
    found = {}
    for _, cell in cells.iterrows():
        colour = colours[ups.index(cell[up])] if up and cell[up] in ups else SOFT
        mark = MARKERS[acrosses.index(cell[across]) % len(MARKERS)] if across and cell[across] in acrosses else "o"
        style = {"marker": mark, "color": colour, "markerfacecolor": colour}
        if cell["verdict"] == "baseline":
            style = {"marker": "o", "color": INK, "markerfacecolor": "white", "markeredgewidth": 2.0}
        found[cell["cell"]] = style
    return found


def _points(
    axes: Any,  # noqa: ANN401
    cells: pd.DataFrame,
    used: pd.DataFrame,
    names: tuple[str, str],
    styles: Mapping[str, dict[str, Any]],
    scale: int,
) -> None:
    cost, metric = names
    for cell, runs in used.groupby("cell"):
        if cell in styles:
            axes.plot(runs[cost], scale * runs[metric], ".", color=styles[cell]["color"], markersize=4, alpha=0.6)
    for _, cell in cells.iterrows():
        look = styles[cell["cell"]]
        axes.vlines(
            cell[cost], scale * cell["low"], scale * cell["high"], color=look["color"], linewidth=1.0, alpha=0.5
        )
        axes.plot(cell[cost], scale * cell["mean"], markersize=8, linestyle="none", zorder=3, **look)


def _key(
    figure: Any,  # noqa: ANN401
    styles: Mapping[str, dict[str, Any]],
    cells: pd.DataFrame,
    up: str | None,
    across: str | None,
    selected: str | None,
) -> None:
    from matplotlib.lines import Line2D

    found: dict[str, Any] = {}
    short = short_names([axis for axis in (up, across) if axis])
    others = cells[cells["verdict"] != "baseline"]
    for axis, kept in ((up, "color"), (across, "marker")):
        for value in sorted(others[axis].dropna().unique(), key=axis_key) if axis else []:
            style = styles[others.loc[others[axis] == value, "cell"].iloc[0]]
            look: dict[str, Any] = {"marker": "s", "color": INK} | {kept: style[kept]}
            found[f"{short[axis or '']} = {tick(value)}"] = Line2D([], [], linestyle="none", **look)
    for name in cells.loc[cells["verdict"] == "baseline", "cell"]:
        found[f"{name} (baseline)"] = Line2D([], [], linestyle="none", **styles[name])
    if selected is not None:
        ring: dict[str, Any] = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "color": RED}
        found[f"selected: {selected}"] = Line2D([], [], linestyle="none", **ring)
    place_key(figure, [], found)
