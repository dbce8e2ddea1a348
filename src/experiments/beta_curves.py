"""What β makes of a margin: the rule itself, and its curves over the margins that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from numpy.typing import ArrayLike, NDArray

from .. import jsonl
from ..fingerprint import of_text
from ..records import PairStrategy, RankedQuery, ResponseScore
from .look import DASHES, INK, PALE, SOFT, WIDE, finish, new_figure, place_key, say, shades

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BARS = 48
_MOST = 0.995
"""Of the margins so many stand in the picture; a few far ones would press all others together."""


def beta_at(margin: ArrayLike, beta0: float, w: float, k: float) -> NDArray[np.float64]:
    """β₀ (1 + w (1 - exp(-k δ))), and β₀ for margins below 0 (MM-RLHF, section 4.2).

    >>> beta_at([-3.0, 0.0, 1e9], beta0=0.1, w=0.5, k=1.0).round(3).tolist()
    [0.1, 0.1, 0.15]
    """
    known = np.clip(np.asarray(margin, dtype=np.float64), 0, None)
    return np.asarray(beta0 * (1 - w * np.expm1(-k * known)))


def margins_of_files(ranked: Path, scores: Path, pairs: PairStrategy = "all") -> pd.DataFrame:
    """The measured δ of every pair, from rankings and a file of rewards: delta, pairs (1), category, rank_gap, id."""
    rewards = {(score.id, score.response): score for score in jsonl.read(scores, _score) if score.reward is not None}
    rows = []
    for query in jsonl.read(ranked, RankedQuery.from_json):
        known = [_reward(rewards, query, place) for place in range(len(query.responses))]
        for pair in query.pairs(pairs):
            better, worse = known[pair.winner], known[pair.loser]
            if better is not None and worse is not None:
                gap = query.ranks[pair.loser] - query.ranks[pair.winner]
                rows.append((better - worse, 1, query.query.category, gap, query.query.id))
    if not rows:
        raise ValueError(
            f"{scores}: expected rewards of the responses in {ranked}, got none that fit; run `mmrlhf score`"
        )
    return pd.DataFrame(rows, columns=["delta", "pairs", "category", "rank_gap", "id"])


def _score(row: object) -> ResponseScore:
    """A row of `mmrlhf score`, or of another tool that has more fields."""
    names = ("id", "response", "digest", "reward", "reference_logp", "critique")
    known = {name: row[name] for name in names if name in row} if isinstance(row, Mapping) else row
    return ResponseScore.from_json(known)


def _reward(rewards: Mapping[tuple[str, int], ResponseScore], query: RankedQuery, place: int) -> float | None:
    """The reward of a response, if there is one, and if it is about this text."""
    score = rewards.get((query.query.id, place))
    digest = of_text(query.responses[place].text)
    return score.reward if score is not None and digest.startswith(score.digest[: len(digest)]) else None


def draw_beta_curves(rules: pd.DataFrame, margins: pd.DataFrame, *, title: str = "") -> Figure:
    """β over δ: a panel per w, a line per k, behind them how the measured margins lie.

    `rules` has rows of cell, beta0, w and k (k is missing where w is 0); `margins` has delta and pairs.
    """
    rules = rules.dropna(subset=["beta0", "w"]).drop_duplicates(["beta0", "w", "k"])
    panels = sorted(rules.loc[rules["w"] > 0, "w"].unique())
    wide = min(max(len(panels), 1), WIDE)
    high = -(-max(len(panels), 1) // wide)
    figure = new_figure(max(3.1 * wide + 1.0, 5.5), 3.0 * high + 1.2, title)
    every = figure.subplots(high, wide, squeeze=False, sharex=True, sharey=True).ravel()
    if not len(rules):
        finish(every[0], "", "δ", "β")
        say(every[0], "no cell has a β that follows the margin")
        return figure
    strengths = sorted(rules.loc[rules["w"] > 0, "k"].dropna().unique())
    colours = dict(zip(strengths, shades(len(strengths)), strict=True))
    low, high_end = _bounds(margins)
    across = np.linspace(low, high_end, 400)
    for axes, w in zip(every, panels or [0.0], strict=False):
        of_panel = rules[rules["w"] == w]
        _histogram(axes, margins, low, high_end)
        for beta0 in sorted(rules["beta0"].unique()):
            axes.axhline(beta0, color=INK, linewidth=1.2, linestyle=":", zorder=3, label=f"β₀ = {beta0:g}")
        for _, rule in of_panel.dropna(subset=["k"]).sort_values("k").iterrows():
            place = strengths.index(rule["k"])
            look = {
                "color": colours[rule["k"]],
                "linestyle": DASHES[place % len(DASHES)],
                "linewidth": 2.0,
                "zorder": 4,
            }
            axes.plot(across, beta_at(across, rule["beta0"], w, rule["k"]), label=f"k = {rule['k']:g}", **look)
        finish(axes, f"w = {w:g}", "δ", "")
    for axes in every[max(len(panels), 1) :]:
        axes.set_visible(False)
    _name_betas(every[::wide], rules)
    place_key(figure, every, _told(margins))
    return figure


def _bounds(margins: pd.DataFrame) -> tuple[float, float]:
    """From where to where margins are shown; without any, where β moves."""
    known = margins["delta"].to_numpy(dtype=np.float64)
    known = np.repeat(known, margins["pairs"].to_numpy(dtype=int))[: 10**7]
    known = known[np.isfinite(known)]
    if not len(known):
        return -1.0, 6.0
    low, high = np.quantile(known, [1 - _MOST, _MOST])
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    room = 0.03 * (high - low) or 1.0
    return low - room, high + room


def _histogram(axes: Any, margins: pd.DataFrame, low: float, high: float) -> None:  # noqa: ANN401
    """Bars behind the curves, on an axis of their own that nobody has to read."""
    if not len(margins):
        return
    behind = axes.twinx()
    width = (high - low) / _BARS
    edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)  # they break at 0
    for sign, colour in ((1, PALE), (-1, SOFT)):
        of_sign = margins[(margins["delta"] < 0) == (sign < 0)]
        behind.hist(of_sign["delta"], edges, weights=of_sign["pairs"], color=colour, alpha=0.9 if sign > 0 else 0.55)
    behind.set_ylim(0, 1.15 * behind.get_ylim()[1])
    behind.set_yticks([])
    for spine in behind.spines.values():
        spine.set_visible(False)
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.set_xlim(low, high)


def _name_betas(firsts: Any, rules: pd.DataFrame) -> None:  # noqa: ANN401
    for axes in firsts:
        axes.set_ylabel("β", fontsize=11, color=INK, rotation=0, labelpad=10)
    top = float((rules["beta0"] * (1 + rules["w"])).max())
    least = float(rules["beta0"].min())
    room = 0.08 * (top - least) or 0.1 * least
    firsts[0].set_ylim(least - room, top + room)


def _told(margins: pd.DataFrame) -> dict[str, Any]:
    """What is known of the margins, for the legend."""
    from matplotlib.patches import Patch

    total = int(margins["pairs"].sum())
    if not total:
        return {}
    negative = margins.loc[margins["delta"] < 0, "pairs"].sum() / total
    every = {f"{total:,} pairs by δ": Patch(facecolor=PALE)}
    return every | {f"δ < 0: {negative:.1%}": Patch(facecolor=SOFT, alpha=0.55)}
