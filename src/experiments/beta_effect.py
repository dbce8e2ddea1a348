"""What a w and a k would do to the pairs that there are, before anything is trained with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from .beta_curves import beta_at, draw_beta_curves
from .look import BLUE, INK, SOFT, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS = 40


def beta_effect(margins: pd.DataFrame, beta0: float, w: float, k: float, by: str = "category") -> pd.DataFrame:
    """Per group of pairs: how many there are, their mean δ, mean β, and the share whose β is β₀ since δ is not above 0.

    >>> margins = pd.DataFrame({"delta": [0.0, 1e9, -1.0], "category": ["a", "a", "b"]})
    >>> beta_effect(margins, beta0=0.1, w=0.5, k=1.0)[["pairs", "beta", "at_beta0"]].round(3).values.tolist()
    [[2.0, 0.125, 0.5], [1.0, 0.1, 1.0]]
    """
    told = margins.assign(beta=beta_at(margins["delta"], beta0, w, k), at_beta0=margins["delta"] <= 0)
    found = told.groupby(by, sort=True).agg(
        pairs=("delta", "size"), delta=("delta", "mean"), beta=("beta", "mean"), at_beta0=("at_beta0", "mean")
    )
    return found.reset_index()


def draw_beta_effect(margins: pd.DataFrame, beta0: float, w: float, k: float, *, title: str = "") -> Figure:
    """How β spreads over the pairs, and its mean by category and by the number of ranks between the two responses."""
    figure = new_figure(11, 3.6, title)
    spread, *groups = figure.subplots(1, 3, width_ratios=(1.4, 1.2, 1))
    low, high = beta0, beta0 * (1 + w) if w else beta0 * 1.01
    spread.hist(beta_at(margins["delta"], beta0, w, k), np.linspace(low, high, _BINS).tolist(), color=BLUE)
    for place in (low, high):
        spread.axvline(place, color=SOFT, linewidth=1, linestyle=":")
    finish(spread, f"β of {len(margins):,} pairs, w = {w:g}, k = {k:g}", "β, from β₀ to (1 + w) β₀", "pairs")
    for axes, by, name in zip(groups, ("category", "rank_gap"), ("category", "ranks apart"), strict=True):
        found = beta_effect(margins, beta0, w, k, by)
        axes.barh([str(value) for value in found[by]], found["beta"], color=BLUE, height=0.6)
        for place, row in enumerate(found.itertuples()):
            axes.text(row.beta, place, f" {row.beta:.3f} ({row.pairs:,})", va="center", fontsize=8, color=INK)
        axes.set_xlim(low * 0.98, high + 0.45 * (high - low))
        axes.invert_yaxis()
        finish(axes, f"mean β by {name}", "β (pairs)", "")
    return figure


def draw_beta_rule(margins: pd.DataFrame, beta0: float, w: float, k: float) -> Figure:
    """β(δ) of one w and k over the margins that were measured."""
    rules = pd.DataFrame([{"cell": "this", "beta0": beta0, "w": w, "k": k if w else None}])
    return draw_beta_curves(rules, margins)
