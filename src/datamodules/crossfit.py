"""Cross-fitting: each training query is judged by a model that never saw it, and by one of its kind that did.

Model I is the one that was trained without fold I. A query of fold I is judged by model I, and by the next one, to
which it was shown. Queries of other splits were shown to none, and their fold only says which model is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..stats import Interval, bootstrap_difference
from .folds import digest_of, folds_of

if TYPE_CHECKING:
    from ..records import RankedQuery
    from .module import ScoredRows

SEEN = "reward_seen"
Told = Mapping[str, Mapping[str, Any]]
"""What a model said of each query, by the query's name."""


class CrossFit:
    """Which of several models is asked about which query.

    Args:
        sets: The queries.
        of: How many folds, and models, there are.
        folds: `folds.digest_of` the folds with which the models were trained.
    """

    def __init__(self, sets: Sequence[ScoredRows], of: int, folds: str) -> None:
        self.sets, self.of = sets, of
        self._folds = [folds_of(rows.shards, of) for rows in sets]
        for rows, found in zip(sets, self._folds, strict=True):
            if rows.shards.split == "train" and digest_of(found) != folds:
                raise ValueError(
                    f"{rows.shards.folder}: expected the folds with which the models were trained, got others: a "
                    "sample is damaged or was mended, or the program has changed; train the folds again"
                )

    def asked(self, model: int) -> list[list[int]]:
        """The numbers of the queries of each set about which a model is asked."""
        return [
            [number for number in range(len(rows)) if model in self._models(rows, folds[rows.admission[number].sample])]
            for rows, folds in zip(self.sets, self._folds, strict=True)
        ]

    def joined(self, told: Sequence[Told]) -> dict[str, Mapping[str, Any]]:
        """What the models said, as of one: the reward of the one that did not see a query, beside the other's."""
        found: dict[str, Mapping[str, Any]] = {}
        for rows, folds in zip(self.sets, self._folds, strict=True):
            for sample in (rows.admission[number].sample for number in range(len(rows))):
                name = f"{rows.shards.split}/{sample}"
                unseen, *seen = self._models(rows, folds[sample])
                found[name] = told[unseen][name]
                for model in seen:
                    found[name] = {**found[name], SEEN: told[model][name]["reward"]}
        return found

    def _models(self, rows: ScoredRows, fold: int) -> tuple[int, ...]:
        """The model that never saw the queries of a fold, and one that did, where there is one."""
        return (fold, (fold + 1) % self.of) if rows.shards.split == "train" else (fold,)


class Difference(NamedTuple):
    """What it does to margins that a model was trained on their queries."""

    seen: float
    """Mean margin of a pair by a model that saw the query."""
    unseen: float
    """The same by one that never did."""
    gap: Interval
    """The first less the second; whole queries are resampled."""
    wrong_seen: float
    """Part of the pairs whose better response has no higher reward, by a model that saw them."""
    wrong_unseen: float
    pairs: int
    queries: int

    def __str__(self) -> str:
        interval = f"{self.gap.value:+.3f} [{self.gap.low:+.3f}, {self.gap.high:+.3f}]"
        return (
            f"{self.pairs:,} pairs of {self.queries:,} queries: mean margin {self.seen:.3f} by a model that saw the "
            f"query, {self.unseen:.3f} by one that did not, a difference of {interval} ({self.gap.level:.0%}, by "
            f"query); sign wrong in {self.wrong_seen:.1%} and {self.wrong_unseen:.1%}"
        )


class Margins:
    """The margins of all pairs, each by both kinds of models."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.unseen: list[float] = []
        self.queries: list[str] = []

    def add(self, ranked: RankedQuery, told: Mapping[str, Any]) -> None:
        """Take in the pairs of one query, if there are rewards of both kinds."""
        if SEEN not in told:
            return
        for winner, loser in ranked.pairs():
            for column, found in (("reward", self.unseen), (SEEN, self.seen)):
                found.append(told[column][winner] - told[column][loser])
            self.queries.append(ranked.query.id)

    def difference(self) -> Difference | None:
        """How far apart the two kinds are; None where fewer than two queries have pairs."""
        pairs, queries = len(self.queries), len({*self.queries})
        if queries < 2:
            return None
        gap = bootstrap_difference(self.seen, self.unseen, self.queries)
        means = (sum(self.seen) / pairs, sum(self.unseen) / pairs)
        wrong = [sum(margin <= 0 for margin in margins) / pairs for margins in (self.seen, self.unseen)]
        return Difference(*means, gap, wrong[0], wrong[1], pairs, queries)
