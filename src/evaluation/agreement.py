"""How far rewards agree with people's rankings: pure functions of pairs, whose queries are the clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import numpy as np
from numpy.typing import NDArray

from ..stats import Interval, kendall_tau_b
from .face import Grade
from .joining import Judged
from .rates import Drawing, Line, Summary, as_json, clustered_mean, clustered_rate, line_of, summary_of
from .rewardbench import CATEGORIES

Floats = NDArray[np.float64]
NO_CATEGORY = "(none)"
BINS = 8


@dataclass(frozen=True)
class Pairs:
    """The pairs of some queries as columns, each (pairs,)."""

    names: Sequence[str]
    queries: Sequence[str]
    categories: Sequence[str]
    deltas: Floats
    """δ: by how much the chosen response has more reward."""
    seen: Floats
    """The same by models that were trained on the query; NaN where nobody asked one."""
    gaps: Floats
    """How many ranks people put between the two."""
    longer: Floats
    """By how many characters the chosen response is the longer one."""

    def where(self, wanted: NDArray[np.bool_]) -> Pairs:
        """Some of the pairs."""
        places = np.flatnonzero(wanted)
        names, queries, categories = (
            [column[int(place)] for place in places] for column in (self.names, self.queries, self.categories)
        )
        return Pairs(names, queries, categories, *(column[places] for column in self._numbers()))

    def _numbers(self) -> tuple[Floats, ...]:
        return self.deltas, self.seen, self.gaps, self.longer


def pairs_of(judged: Sequence[Judged]) -> Pairs:
    """All pairs that the rankings make."""
    rows = [row for one in judged for row in _rows(one)]
    if not rows:
        raise ValueError("ranked: expected two responses of different rank in some query, got none; rank them first")
    names, queries, categories, *numbers = zip(*rows, strict=True)
    return Pairs(names, queries, categories, *(np.array(column, dtype=np.float64) for column in numbers))


def _rows(one: Judged) -> list[tuple[Any, ...]]:
    query, ranks = one.ranked.query, one.ranked.ranks
    seen = one.seen or [float("nan")] * len(ranks)
    lengths = [len(response.text) for response in one.ranked.responses]
    return [
        (
            f"{query.id}:{winner}>{loser}",
            query.id,
            query.category or NO_CATEGORY,
            one.rewards[winner] - one.rewards[loser],
            seen[winner] - seen[loser],
            ranks[loser] - ranks[winner],
            lengths[winner] - lengths[loser],
        )
        for winner, loser in one.ranked.pairs()
    ]


def grades_of(pairs: Pairs) -> list[Grade]:
    """Right if the chosen response has strictly more reward."""
    columns = (pairs.names, pairs.queries, pairs.categories, pairs.deltas.tolist(), pairs.gaps, pairs.longer)
    return [
        Grade(
            name,
            query,
            category,
            delta > 0,
            "judged" if delta else "tied",
            {"delta": delta, "rank_gap": int(gap), "longer": int(longer)},
        )
        for name, query, category, delta, gap, longer in zip(*columns, strict=True)
    ]


# Single numbers ---------------------------------------------------------------------------------------------


def confidences(deltas: Floats) -> tuple[Floats, Floats]:
    """The confidence that each margin claims, sigmoid(abs δ), and whether its sign is right, or half so.

    >>> [values.tolist() for values in confidences(np.array([0.0, -800.0]))]
    [[0.5, 1.0], [0.5, 0.0]]
    """
    return 1 / (1 + np.exp(-np.abs(deltas))), (deltas > 0) + (deltas == 0) / 2


def equal_bins(values: Floats, bins: int) -> list[NDArray[np.intp]]:
    """The places of about equally many values each; equal ones stay together, or a bin would sort them by chance."""
    edges = np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1])
    numbers = np.searchsorted(edges, values, side="right")
    return [np.flatnonzero(numbers == number) for number in np.unique(numbers)]


def calibration_error(deltas: Floats, bins: int = BINS) -> float:
    """How far, on average over pairs, the share that is right in a bin is from the confidence that is claimed there.

    >>> calibration_error(np.array([800.0, 800.0, 800.0, -800.0]))
    0.25
    """
    confidence, right = confidences(deltas)
    found = [abs(right[at].mean() - confidence[at].mean()) * len(at) for at in equal_bins(confidence, bins)]
    return float(sum(found) / len(deltas))


def prefers_longer(margins: Floats, longer: Floats) -> Floats:
    """Whether each margin is on the side of the longer response, or half so where it prefers neither.

    >>> prefers_longer(np.array([2.0, 2.0, 0.0]), np.array([9.0, -9.0, 9.0])).tolist()
    [1.0, 0.0, 0.5]
    """
    return np.asarray((1 + np.sign(margins) * np.sign(longer)) / 2)


def tau_of(rewards: Sequence[float], ranks: Sequence[int]) -> float | None:
    """Kendall's τ-b of rewards with people's order: 0 where all rewards are equal, None where people's ranks are.

    >>> tau_of([3.0, 1.0, 2.0], [1, 3, 2]), tau_of([1.0, 1.0], [1, 2]), tau_of([1.0, 2.0], [1, 1])
    (1.0, 0.0, None)
    """
    if len(set(ranks)) == 1:
        return None
    return 0.0 if len(set(rewards)) == 1 else kendall_tau_b(rewards, [-rank for rank in ranks])


# What they amount to ----------------------------------------------------------------------------------------


class Gap(NamedTuple):
    """The pairs that people put so many ranks apart."""

    line: Line
    delta: Interval


class Tau(NamedTuple):
    """Kendall's τ-b, the mean over queries."""

    queries: int
    value: Interval


class Lengths(NamedTuple):
    """How often the longer of two responses is preferred, over pairs whose lengths differ."""

    pairs: int
    people: Interval
    rewards: Interval
    difference: Interval
    """Of the rewards from people."""


class Folds(NamedTuple):
    """Margins by models that were trained on a query (seen) and by one that was not (unseen), of the same pairs."""

    pairs: int
    queries: int
    delta_seen: Interval
    delta_unseen: Interval
    delta_gap: Interval
    accuracy_seen: Interval
    accuracy_unseen: Interval
    accuracy_gap: Interval


class Agreement(NamedTuple):
    """All there is to say of the rewards of one file."""

    accuracy: Summary
    delta: Interval
    gaps: Mapping[int, Gap]
    taus: Mapping[str, Tau]
    """By category, and of `all`."""
    log_loss: Interval
    """-log sigmoid(δ); a coin has 0.693."""
    calibration_error: float
    lengths: Lengths | None
    """None where all lengths are equal."""
    folds: Folds | None
    """None where no query has both."""

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        gaps = {str(gap): found.line.to_json() | {"delta": as_json(found.delta)} for gap, found in self.gaps.items()}
        return {
            "accuracy": self.accuracy.to_json(),
            "delta": as_json(self.delta),
            "rank_gaps": gaps,
            "kendall_tau_b": {name: _plain(tau) for name, tau in self.taus.items()},
            "log_loss": as_json(self.log_loss),
            "calibration_error": self.calibration_error,
            "length": self.lengths and _plain(self.lengths),
            "folds": self.folds and _plain(self.folds),
        }


def _plain(found: Tau | Lengths | Folds) -> dict[str, Any]:
    values = found._asdict().items()
    return {name: as_json(value) if isinstance(value, Interval) else value for name, value in values}


def agreement(judged: Sequence[Judged], **drawing: Unpack[Drawing]) -> Agreement:
    """Count and estimate how far the rewards agree with people; the order of the queries does not matter."""
    pairs = pairs_of(judged)
    order: dict[str, int] = {name: place for place, name in enumerate(CATEGORIES)}
    return Agreement(
        summary_of(grades_of(pairs), order, **drawing),
        clustered_mean(pairs.deltas, pairs.queries, **drawing),
        {int(gap): gap_of(pairs.where(pairs.gaps == gap), **drawing) for gap in np.unique(pairs.gaps)},
        taus_of(judged, order, **drawing),
        clustered_mean(np.logaddexp(0, -pairs.deltas), pairs.queries, **drawing),
        calibration_error(pairs.deltas),
        lengths_of(pairs, **drawing),
        folds_of(pairs, **drawing),
    )


def gap_of(pairs: Pairs, **drawing: Unpack[Drawing]) -> Gap:
    """Accuracy and mean margin of pairs of one rank gap."""
    return Gap(line_of(grades_of(pairs), **drawing), clustered_mean(pairs.deltas, pairs.queries, **drawing))


def taus_of(judged: Sequence[Judged], order: Mapping[str, int], **drawing: Unpack[Drawing]) -> dict[str, Tau]:
    """Kendall's τ-b by category and of all; a query whose responses are all of one rank has none."""
    of: dict[str, list[float]] = {}
    for one in judged:
        if (tau := tau_of(one.rewards, one.ranked.ranks)) is not None:
            of.setdefault(one.ranked.query.category or NO_CATEGORY, []).append(tau)
    named = {name: of[name] for name in sorted(of, key=lambda name: (order.get(name, len(order)), name))}
    named["all"] = [tau for members in of.values() for tau in members]
    return {
        name: Tau(len(members), clustered_mean(np.array(members), None, **drawing)) for name, members in named.items()
    }


def lengths_of(pairs: Pairs, **drawing: Unpack[Drawing]) -> Lengths | None:
    """How often people and rewards prefer the longer response, paired."""
    unequal = pairs.where(pairs.longer != 0)
    if not len(unequal.names):
        return None
    people = prefers_longer(np.ones(len(unequal.names)), unequal.longer)
    rewards = prefers_longer(unequal.deltas, unequal.longer)
    return Lengths(
        len(unequal.names),
        clustered_rate(people, unequal.queries, **drawing),
        clustered_rate(rewards, unequal.queries, **drawing),
        clustered_mean(rewards - people, unequal.queries, **drawing),
    )


def folds_of(pairs: Pairs, **drawing: Unpack[Drawing]) -> Folds | None:
    """What having been trained on a query does to its margins, over the pairs that both kinds of model judged."""
    both = pairs.where(np.isfinite(pairs.seen))
    if not len(both.names):
        return None
    seen, unseen = ((deltas > 0).astype(np.float64) for deltas in (both.seen, both.deltas))
    return Folds(
        len(both.names),
        len(set(both.queries)),
        clustered_mean(both.seen, both.queries, **drawing),
        clustered_mean(both.deltas, both.queries, **drawing),
        clustered_mean(both.seen - both.deltas, both.queries, **drawing),
        clustered_rate(seen, both.queries, **drawing),
        clustered_rate(unseen, both.queries, **drawing),
        clustered_mean(seen - unseen, both.queries, **drawing),
    )
