"""The grid as a picture: means, intervals, spread over seeds, and what cannot be told from the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from .choosing import short_names
from .look import INK, PALE, SOFT, new_figure
from .summary import axis_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

_CELL = 1.12, 0.86
"""Inches: what three lines of text need."""
_LIGHT = 0.213
"""The luminance of a colour on which the dark ink and white can be read equally well."""
_SIGNS = {"above": "▲ ", "below": "▼ "}


class _Place(NamedTuple):
    """Where a cell lies: left and lower edge, and width and height, in columns and rows."""

    left: int
    low: int
    width: int = 1
    height: int = 1


def draw_grid(
    cells: pd.DataFrame,
    up: str | None,
    across: str | None,
    *,
    metric: str = "",
    percent: bool = True,
    level: float = 0.95,
    selected: str | None = None,
    title: str = "",
) -> Figure:
    """A heat map of `summary.cell_table`, one axis up and one across.

    A cell for which an axis means nothing, as k does where w = 0, is drawn once, over all values of that axis. Colours
    span no less than a usual interval is wide, so that chance alone does not look like a landscape.
    """
    ups, acrosses = _values(cells, up), _values(cells, across)
    height = len(ups) + bool(_loose(cells, up, across))
    figure = new_figure(max(_CELL[0] * len(acrosses), 3.2) + 2.6, _CELL[1] * height + 2.1, title)
    axes = figure.subplots()
    colour = _Colours(cells)
    free = {(left, low) for left in range(len(acrosses)) for low in range(len(ups))}
    for _, cell in cells.iterrows():
        place = _place(cell, up, across, ups, acrosses)
        _draw_cell(axes, place, cell, colour, percent, cell["cell"] == selected)
        free -= {(place.left + x, place.low + y) for x in range(place.width) for y in range(place.height)}
    for left, low in free:
        _empty(axes, left, low)
    _frame(axes, ups, acrosses, height, _names(up, across), bool(_loose(cells, up, across)))
    _colour_bar(figure, axes, colour, metric, percent)
    _legend(figure, cells, level, selected)
    return figure


class _Colours:
    """Which colour stands for which mean, and how far the colours reach."""

    def __init__(self, cells: pd.DataFrame) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import Normalize

        low, high = float(cells["mean"].min()), float(cells["mean"].max())
        usual = (cells["high"] - cells["low"]).median()
        least = float(usual) if np.isfinite(usual) else 1e-3 * max(abs(low), abs(high), 1e-9)
        room = max(0.0, least - (high - low)) / 2
        self.norm, self.map = Normalize(low - room, high + room), colormaps["cividis"]

    def fill(self, value: float) -> Any:  # noqa: ANN401 - four shares
        """The colour of a mean."""
        return self.map(self.norm(value))


def ink_on(fill: Any) -> str:  # noqa: ANN401 - four shares
    """The ink that can be read on a colour."""
    red, green, blue = (share**2.2 for share in fill[:3])
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > _LIGHT else "white"


def _values(cells: pd.DataFrame, axis: str | None) -> list[Any]:
    return sorted(cells[axis].dropna().unique(), key=axis_key) if axis else [None]


def _loose(cells: pd.DataFrame, up: str | None, across: str | None) -> bool:
    """Whether some cell has a value of neither axis, and so needs a row of its own."""
    return up is not None and bool((cells[up].isna() & (cells[across].isna() if across else True)).any())


def _place(cell: pd.Series, up: str | None, across: str | None, ups: list[Any], acrosses: list[Any]) -> _Place:
    """Where a cell lies; a value that it lacks makes it as wide or as high as the grid."""
    column = None if across is None or pd.isna(cell[across]) else acrosses.index(cell[across])
    row = None if up is None or pd.isna(cell[up]) else ups.index(cell[up])
    if up is not None and row is None and column is None:
        return _Place(0, -1, len(acrosses))
    return _Place(column or 0, row or 0, len(acrosses) if column is None else 1, len(ups) if row is None else 1)


def _empty(axes: Any, left: int, low: int) -> None:  # noqa: ANN401
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, low), 1, 1, facecolor=PALE, edgecolor="white", linewidth=2))
    axes.text(left + 0.5, low + 0.5, "no result", ha="center", va="center", fontsize=9, color=INK)


def _draw_cell(axes: Any, place: _Place, cell: pd.Series, colour: _Colours, percent: bool, chosen: bool) -> None:  # noqa: ANN401
    from matplotlib.patches import Rectangle

    left, low, width, height = place
    fill, ink = colour.fill(cell["mean"]), ink_on(colour.fill(cell["mean"]))
    axes.add_patch(Rectangle((left, low), width, height, facecolor=fill, edgecolor="white", linewidth=2))
    if cell["verdict"] == "same":
        look: dict[str, Any] = {"facecolor": "none", "hatch": "////", "edgecolor": ink, "linewidth": 0, "alpha": 0.55}
        axes.add_patch(Rectangle((left + 0.02, low + 0.02), width - 0.04, height - 0.04, **look))
        half = 0.4  # the middle stays free for the words
        axes.add_patch(
            Rectangle((left + width / 2 - half, low + height / 2 - half), 2 * half, 2 * half, facecolor=fill)
        )
    if chosen:
        for line, shade in ((5.0, "white"), (2.5, "black")):
            edge: dict[str, Any] = {"facecolor": "none", "edgecolor": shade, "linewidth": line}
            axes.add_patch(Rectangle((left + 0.025, low + 0.025), width - 0.05, height - 0.05, zorder=4, **edge))
    middle, centre = left + width / 2, low + height / 2
    for text, rise, size, weight in _words(cell, percent):
        look = {"ha": "center", "va": "center", "fontsize": size, "fontweight": weight, "color": ink, "zorder": 5}
        axes.text(middle, centre + rise, text, **look)


def _words(cell: pd.Series, percent: bool) -> list[tuple[str, float, float, str]]:
    """The lines of a cell: text, how far above the middle, size, weight."""
    seeds = f"sd {number(cell['sd'], percent)}, " if pd.notna(cell["sd"]) else ""
    told = f"{seeds}n {cell['seeds']}"
    mean = f"{_SIGNS.get(cell['verdict'], '')}{number(cell['mean'], percent)}"
    known = pd.notna(cell["low"])
    span = f"{number(cell['low'], percent)}\N{EN DASH}{number(cell['high'], percent)}" if known else ""
    lines = [word for word in (span, told, "baseline" if cell["verdict"] == "baseline" else "") if word]
    top, apart = (0.11 * len(lines), 0.22) if len(lines) < 3 else (0.28, 0.18)
    return [(mean, top, 13, "bold"), *((line, top - 0.04 - apart * n, 9, "normal") for n, line in enumerate(lines, 1))]


def number(value: float, percent: bool) -> str:
    """A number of a cell: per cent with one digit, or three digits that count.

    >>> number(0.6214, percent=True), number(0.6934, percent=False)
    ('62.1', '0.693')
    """
    return f"{100 * value:.1f}" if percent else f"{value:.3g}"


def _names(up: str | None, across: str | None) -> tuple[str, str]:
    short = short_names([axis for axis in (up, across) if axis])
    return short.get(up or "", ""), short.get(across or "", "")


def _frame(
    axes: Any,  # noqa: ANN401
    ups: Sequence[Any],
    acrosses: Sequence[Any],
    rows: int,
    names: tuple[str, str],
    loose: bool,
) -> None:
    axes.set_xlim(0, len(acrosses))
    axes.set_ylim(len(ups) - rows, len(ups))
    axes.set_xticks([place + 0.5 for place in range(len(acrosses))], [tick(value) for value in acrosses])
    lowest = [(-0.5, "apart")] if loose else []
    ticks = [*lowest, *((place + 0.5, tick(value)) for place, value in enumerate(ups))]
    axes.set_yticks([place for place, _ in ticks], [word for _, word in ticks])
    axes.set_xlabel(names[1], fontsize=12, color=INK)
    axes.set_ylabel(names[0], fontsize=12, color=INK, rotation=0, labelpad=14, va="center")
    axes.tick_params(length=0, labelsize=11, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def tick(value: object) -> str:
    """A value as it stands at an axis; of a class its name alone."""
    if value is None:
        return ""
    if isinstance(value, float | np.floating):
        return f"{value:g}"
    word = str(value).rpartition(".")[2] if isinstance(value, str) else str(value)
    return word if len(word) <= 16 else f"{word[:15]}…"


def _colour_bar(figure: Any, axes: Any, colour: _Colours, metric: str, percent: bool) -> None:  # noqa: ANN401
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    bar = figure.colorbar(ScalarMappable(colour.norm, colour.map), ax=axes, fraction=0.05, pad=0.03, aspect=24)
    bar.locator = MaxNLocator(6)
    bar.formatter = FuncFormatter(lambda value, _: f"{100 * value:.3g}" if percent else f"{value:.4g}")
    bar.set_label(f"{metric}{', %' if percent else ''}", fontsize=10, color=INK)
    bar.ax.tick_params(labelsize=9, colors=INK)
    bar.outline.set_edgecolor(SOFT)


def _legend(figure: Any, cells: pd.DataFrame, level: float, selected: str | None) -> None:  # noqa: ANN401
    """What the signs mean, below the grid."""
    from matplotlib.patches import Patch

    tests = int(cells["p"].notna().sum())
    told, handles = [], []
    span = f"mean, {level:.0%} interval (clustered by item), " if cells["low"].notna().any() else "mean, "
    told.append(f"In a cell: {span}standard deviation over n seeds.")
    if tests:
        name = next(iter(cells.loc[cells["verdict"] == "baseline", "cell"]), "the baseline")
        told.append(f"▲ ▼: above, below {name} (paired test on the same items, Holm over {tests}, {1 - level:.0%}).")
        if (cells["verdict"] == "same").any():
            same = f"not distinguishable from {name}"
            handles.append(Patch(facecolor="white", hatch="////", edgecolor=SOFT, label=same))
    if selected is not None and (cells["cell"] == selected).any():
        handles.append(Patch(facecolor="white", edgecolor="black", linewidth=2.5, label=f"selected: {selected}"))
    figure.supxlabel("\n".join(told), fontsize=9, color=INK, x=0.02, ha="left")
    if handles:
        figure.legend(handles=handles, loc="outside upper right", ncols=2, fontsize=9, frameon=False, handleheight=1.3)
