"""How the cells of a sweep went through their training: mean over seeds, one line per cell, small multiples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd  # type: ignore[import-untyped]

from .choosing import short_names
from .heatmap import tick
from .look import DASHES, INK, SOFT, WIDE, finish, new_figure, place_key, say, shades
from .summary import axis_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAINING = ("rewards/accuracies", "rewards/margins")
"""What is drawn of a training, of its validations or, where there are none, of its steps."""
_FEW = 12


def draw_training(
    histories: pd.DataFrame,
    used: pd.DataFrame,
    up: str | None,
    across: str | None,
    *,
    metrics: Sequence[str],
    baseline: str | None = None,
    title: str = "",
) -> Figure:
    """A row of panels per metric, a panel per value of `up`, a line per value of `across`, and in each the baseline.

    A line is the mean over seeds at the steps that all seeds of the cell logged, its band from the lowest to the
    highest seed. `histories` is that of `collect.histories_frame`, `used` the runs.
    """
    data = histories.merge(used[["run", "cell", *[axis for axis in (up, across) if axis]]], on="run")
    others = used[used["cell"] != baseline]
    ups = sorted(others[up].dropna().unique(), key=axis_key) if up else [None]
    acrosses = sorted(others[across].dropna().unique(), key=axis_key) if across else [None]
    wide = min(max(len(ups), 1), WIDE)
    rows = -(-max(len(ups), 1) // wide)
    figure = new_figure(max(3.0 * wide + 1.2, 5.5), 2.5 * rows * len(metrics) + 1.1, title)
    every = figure.subplots(rows * len(metrics), wide, squeeze=False, sharex=True)
    short = short_names([axis for axis in (up, across) if axis])
    for place, metric in enumerate(metrics):
        panels = every[place * rows : (place + 1) * rows].ravel()
        _share_height(panels)
        of_metric = data[data["metric"] == metric]
        for axes, value in zip(panels, ups or [None], strict=False):
            name = f"{short.get(up or '')} = {tick(value)}" if value is not None else ""
            finish(axes, name, "", "")
            _panel(axes, of_metric, used, (up, value), (across, acrosses), short.get(across or "", ""), baseline)
        for axes in panels[max(len(ups), 1) :]:
            axes.set_visible(False)
        for row in panels[::wide]:
            row.set_ylabel(metric, fontsize=10, color=INK)
        for axes in panels[max(len(ups) - wide, 0) : len(ups)]:  # the lowest that are seen
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("step", fontsize=9, color=INK)
    place_key(figure, every.ravel())
    return figure


def _panel(
    axes: Any,  # noqa: ANN401
    data: pd.DataFrame,
    used: pd.DataFrame,
    up: tuple[str | None, Any],
    across: tuple[str | None, Sequence[Any]],
    name: str,
    baseline: str | None,
) -> None:
    """The lines of one value of the axis up."""
    drawn = False
    if baseline is not None:
        look = {"color": INK, "linestyle": (0, (1, 1.2)), "linewidth": 1.6, "zorder": 3}
        drawn |= _line(axes, data[data["cell"] == baseline], baseline, look)
    colours = shades(len(across[1]))
    for place, value in enumerate(across[1]):
        of_cell = used[used["cell"] != baseline]
        for axis, wanted in ((up[0], up[1]), (across[0], value)):
            of_cell = of_cell if axis is None or wanted is None else of_cell[of_cell[axis] == wanted]
        look = {"color": colours[place], "linestyle": DASHES[place % len(DASHES)], "linewidth": 1.8, "zorder": 4}
        label = f"{name} = {tick(value)}" if value is not None else "cell"
        drawn |= _line(axes, data[data["run"].isin(of_cell["run"])], label, look)
    if not drawn:
        say(axes, "not logged")


def _line(axes: Any, data: pd.DataFrame, label: str, look: dict[str, Any]) -> bool:  # noqa: ANN401
    """Mean and range over seeds; steps that a seed lacks would make the mean jump, and are left out."""
    table = data.pivot_table(index="step", columns="run", values="value").dropna()
    if not len(table):
        return False
    mean = table.mean(axis=1)
    axes.plot(mean.index, mean, label=label, marker="o" if len(mean) <= _FEW else "", markersize=3.5, **look)
    if table.shape[1] > 1:
        axes.fill_between(
            mean.index, table.min(axis=1), table.max(axis=1), color=look["color"], alpha=0.13, linewidth=0
        )
    return True


def _share_height(panels: Any) -> None:  # noqa: ANN401
    for axes in panels[1:]:
        axes.sharey(panels[0])


def draw_differences(
    cells: pd.DataFrame, *, percent: bool = True, level: float = 0.95, metric: str = "", title: str = ""
) -> Figure:
    """How far each cell is from the baseline, with its interval; filled where a test tells it apart."""
    tested = cells[cells["p"].notna()].iloc[::-1]
    figure = new_figure(7.2, 0.27 * max(len(tested), 3) + 1.9, title)
    axes = figure.subplots()
    scale, unit = (100, " (points)") if percent else (1, "")
    name = next(iter(cells.loc[cells["verdict"] == "baseline", "cell"]), "baseline")
    finish(axes, "", f"{metric}{unit}: difference from {name}, {level:.0%} interval clustered by item", "")
    if not len(tested):
        say(axes, "nothing was compared")
        return figure
    for place, (_, cell) in enumerate(tested.iterrows()):
        apart = cell["verdict"] != "same"
        colour = INK if apart else SOFT
        axes.hlines(place, scale * cell["difference_low"], scale * cell["difference_high"], color=colour, linewidth=2)
        face = colour if apart else "white"
        axes.plot(scale * cell["difference"], place, "o", color=colour, markerfacecolor=face, markersize=7, zorder=3)
        told = f"{cell['seeds_better']:.0f} of {cell['seeds_paired']:.0f}"
        axes.annotate(told, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=INK)
    axes.annotate("seeds better", (1.02, len(tested) - 0.2), xycoords=("axes fraction", "data"), fontsize=9, color=INK)
    axes.set_yticks(range(len(tested)), tested["cell"].tolist())
    axes.set_ylim(-0.7, len(tested) - 0.3)
    axes.axvline(0, color=INK, linewidth=1.0, linestyle=":")
    return figure
