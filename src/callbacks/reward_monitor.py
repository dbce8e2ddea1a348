"""How well a reward model ranks and speaks: accuracies, margins, ties, losses and critiques, with a figure.

All metrics of a training interval begin with `train/`, those of a validation with `val/`; behind it:

- `pairs`, `queries`, `ties`, `critiques`: how many there were; queries without a pair are not counted;
- `accuracy`, the share of pairs whose better response has the higher reward (equal rewards are wrong), and `equal`, the
  share with equal rewards; `accuracy_plus`, the share of queries all of whose pairs are right;
- `margin/{mean,std}` of the better response's reward above the other's; `tie_distance`, how far the rewards of equally
  good responses are apart, on average; `reward/{mean,std}` of all responses, `reward/{chosen,rejected}` of pairs;
- `loss/{critique,ranking,tie,centre,dimension}`: the mean of each term of the loss over what it is about, not weighed;
- `critique/nll`, per token over all critiques, and `critique/perplexity`, e to its power;
- `pairs`, `accuracy` and `margin/mean`, each followed by `/CATEGORY` or `/rank_gap_N`.

What there was nothing of is left out.
"""

from __future__ import annotations

from collections import Counter
from math import exp, inf
from typing import TYPE_CHECKING

import numpy as np

from ..reports import RewardReport, RewardTerms
from .beta_monitor import Moments, metric_part
from .figures import Ranked, draw_rewards
from .monitor import Monitor

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from .beta_monitor import Floats

_NOTHING = Moments(*np.array([0.0, 0.0, 0.0, inf, -inf]).reshape(5, 1))
_WORDS = "words"  # of critiques, each token of which counts


def moments_of(values: Floats) -> Moments:
    """Return the moments of one or more numbers.

    >>> moments_of(np.array([1.0, 3.0])).mean
    array([2.])
    """
    mean = values.mean()
    found = np.array([len(values), mean, ((values - mean) ** 2).sum(), values.min(), values.max()])
    return Moments(*found.reshape(5, 1))


class RewardTally:
    """What is summed over reports: moments by name, and for pairs by category and rank gap; and a count per margin."""

    def __init__(self) -> None:
        self.moments: dict[tuple[str, str | int], Moments] = {}
        """By name and group; the group of all is an empty word."""
        self.cells: Counter[tuple[int, float]] = Counter()
        """Pairs by rank gap and rounded margin."""

    def add(self, reports: list[RewardReport]) -> None:
        """Add what some micro-batches told."""
        for report in reports:
            self._add_pairs(report)
            self._put("tie_distance", _plain(report.tie_distance))
            self._put("reward", _plain(report.rewards))
            for name, losses in zip(RewardTerms._fields, report.terms, strict=True):
                self._put(f"loss/{name}", _plain(losses))
            self._put(_WORDS, np.repeat(_plain(report.terms.critique), report.critique_tokens.cpu().numpy()))

    def _add_pairs(self, report: RewardReport) -> None:
        margin, right = _plain(report.margin), _plain(report.correct)
        gaps, categories = report.rank_gap.tolist(), list(map(metric_part, report.categories))
        groups: list[str | int] = ["", *sorted(set(categories) - {""}), *sorted(set(gaps))]
        for group in groups:
            labels = gaps if isinstance(group, int) else categories
            chosen = np.array([group in ("", label) for label in labels], dtype=bool)
            self._put("margin", margin[chosen], group)
            self._put("accuracy", right[chosen], group)
        self._put("equal", _plain(report.margin == 0))
        self._put("chosen", _plain(report.chosen))
        self._put("rejected", _plain(report.rejected))
        # All pairs of a query are in one micro-batch.
        wrong = {name for name, correct in zip(report.ids, report.correct.tolist(), strict=True) if not correct}
        self._put("accuracy_plus", np.array([float(name not in wrong) for name in set(report.ids)]))
        self.cells.update((gap, float(f"{value:.4g}")) for gap, value in zip(gaps, margin.tolist(), strict=True))

    def merge(self, other: RewardTally) -> None:
        """Add what another tally has."""
        for (name, group), moments in other.moments.items():
            self._join(name, group, moments)
        self.cells += other.cells

    def _put(self, name: str, values: Floats, group: str | int = "") -> None:
        if len(values):
            self._join(name, group, moments_of(values))

    def _join(self, name: str, group: str | int, moments: Moments) -> None:
        self.moments[name, group] = self.moments.get((name, group), _NOTHING).plus(moments)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return everything by its name; nothing of what was not there."""
        found: dict[str, float] = {}
        for (name, group), moments in self.moments.items():
            behind = f"/rank_gap_{group}" if isinstance(group, int) else f"/{group}" * bool(group)
            told = _told_of(name, moments)
            if group != "":
                told.pop("margin/std", None)
            found |= {f"{each}{behind}": value for each, value in told.items()}
        return {f"{prefix}/{name}": found[name] for name in sorted(found)}

    def groups(self, kind: type[str] | type[int]) -> dict[str, Ranked]:
        """Return how well pairs are ranked in every category or rank gap."""
        of_kind = sorted(group for name, group in self.moments if name == "margin" and isinstance(group, kind))
        return {str(group): self._ranked(group) for group in of_kind if group != ""}

    def _ranked(self, group: str | int) -> Ranked:
        margin, right = self.moments["margin", group], self.moments["accuracy", group]
        return Ranked(int(margin.number[0]), float(margin.mean[0]), _deviation(margin), float(right.mean[0]))


def _told_of(name: str, moments: Moments) -> dict[str, float]:
    """The metrics of one kind of numbers."""
    mean, number, deviation = float(moments.mean[0]), float(moments.number[0]), _deviation(moments)
    if name in ("chosen", "rejected"):
        return {f"reward/{name}": mean}
    if name == _WORDS:
        return {"critique/nll": mean, "critique/perplexity": exp(min(mean, 700.0))}
    counted = {"accuracy": "pairs", "accuracy_plus": "queries", "tie_distance": "ties", "loss/critique": "critiques"}
    told = {counted[name]: number} if name in counted else {}
    if name in ("margin", "reward"):
        return {f"{name}/mean": mean, f"{name}/std": deviation}
    return told | {name: mean}


def _deviation(moments: Moments) -> float:
    return float(np.sqrt(moments.squares[0] / moments.number[0]))


def _plain(values: Tensor) -> Floats:
    """Numbers as an array in double precision."""
    found: Floats = values.detach().double().cpu().numpy()
    return found


class RewardMonitor(Monitor[RewardReport, RewardTally]):
    """Log how well a reward model ranks and speaks, per log interval and, with a figure, per validation."""

    told, figure_name, tally = "report", "reward", RewardTally

    def draw(self, tally: RewardTally, title: str) -> Figure | None:
        """Draw margins and accuracies; nothing where there was no pair."""
        if not tally.cells:
            return None
        gaps, margins = zip(*tally.cells, strict=True)
        return draw_rewards(
            np.array(margins, dtype=np.float64),
            np.array(gaps),
            np.array(list(tally.cells.values())),
            accuracy=float(tally.moments["accuracy", ""].mean[0]),
            rank_gaps=tally.groups(int),
            categories=tally.groups(str),
            title=title,
        )
