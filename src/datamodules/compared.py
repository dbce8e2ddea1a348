"""By how much the better response of every training pair is the better one, without encoding anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from .. import jsonl
from .collate import annotated
from .indexing import ranked_of
from .shards import REQUIRED

if TYPE_CHECKING:
    from ..records import RankedQuery
    from .admission import Admitted
    from .module import ScoredRows

Judge = Literal["reward", "rank", "annotated", "implicit"]


def pair_margins(rows: ScoredRows, judge: Judge) -> Iterator[float]:
    """Yield the margin of every pair of the admitted samples, as their batches will have it."""
    if judge == "implicit":
        raise ValueError("margin: expected reward, rank or annotated, got implicit, which nobody knows beforehand")
    for number in range(len(rows)):
        admitted = rows.admission[number]
        ranked = ranked_of(jsonl.loads(rows.shards.parts(admitted.sample)[REQUIRED]))
        if len(ranked.responses) != len(admitted.scores):  # some are left out for their length: encoding tells which
            ranked = rows[number].row.ranked
        values = _values(ranked, admitted, judge)
        for pair in ranked.pairs(rows.terms.pairs):
            yield values[pair.winner] - values[pair.loser]


def _values(ranked: RankedQuery, admitted: Admitted, judge: Judge) -> Sequence[float]:
    if judge == "reward":
        return [reward for reward, _ in admitted.scores]
    if judge == "rank":
        return [-rank for rank in ranked.ranks]
    return [annotated(response) for response in ranked.responses]
