"""How the figures of this wing look: colours that the colour-blind can tell apart, in grey too; sizes for print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, PALE = "#222222", "#8a8f98", "#e3e6ea"
# Of Okabe and Ito (2008).
BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"
LEGEND: dict[str, Any] = {"fontsize": 9, "facecolor": "white", "edgecolor": "none", "framealpha": 1.0}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
_BESIDE = 8
WIDE = 4
"""Panels beside each other, at most: more would be too small on paper."""


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty figure that belongs to nobody else."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    roomy = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(width, height), layout=roomy, facecolor="white")
    if title:
        figure.suptitle(title, fontsize=13, color=INK)
    return figure


def shades(number: int) -> list[Any]:
    """So many colours in an order that is seen, from dark to light, none of them too pale for a line."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.85 * place / max(number - 1, 1)) for place in range(number)]


def finish(axes: Any, title: str, across: str, up: str) -> None:  # noqa: ANN401
    """Title and names of a panel, without a box around it."""
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    axes.set_xlabel(across, fontsize=9, color=INK)
    axes.set_ylabel(up, fontsize=9, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)
    axes.spines[["left", "bottom"]].set_color(SOFT)


def place_key(figure: Figure, axes: Iterable[Any], more: Mapping[str, Any] | None = None) -> None:
    """One legend below all panels, each name once, in rows of equal length."""
    handles: dict[str, Any] = {}
    for panel in axes:
        found, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    handles |= more or {}
    if handles:
        rows = -(-len(handles) // _BESIDE)
        beside = -(-len(handles) // rows)
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=beside, **LEGEND)


def say(axes: Any, words: str) -> None:  # noqa: ANN401
    """Words where there is nothing to draw."""
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", fontsize=10, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])
