"""What is answered and judged: responses, rankings and scores, frozen, checked on construction.

A record that exists is a record that is right: every rule about texts, scores, ranks and margins is kept here,
so nothing downstream checks again. `RankedQuery.pairs` is the only place where rankings become pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from . import text
from .fields import Fields, RecordError, one_of, own
from .queries import Query

PairStrategy = Literal["all", "adjacent", "best_worst", "hardest"]
DIMENSIONS = ("helpfulness", "faithfulness", "ethics")


class Pair(NamedTuple):
    """Indices of two responses of one query, the better one first."""

    winner: int
    loser: int


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to a query, and what people said of it."""

    text: str
    """May be empty: a model may answer nothing."""
    model: str = ""
    rank: int | None = None
    """As the annotator gave it, smaller is better, equal is a tie; None before annotation."""
    scores: Mapping[str, int | None] = field(default_factory=dict)
    """1 to 5 per dimension; None or absent is "not scored", never a number."""
    reason: str = ""
    """The annotator's own words."""
    critique: str = ""
    """The reason, enhanced; empty where there is none."""
    constructed: Literal["", "positive", "negative"] = ""
    """Written by an annotator to break a tie of all-bad or all-good answers."""

    def __post_init__(self) -> None:
        own(self, "scores")
        for name in ("text", "model", "reason", "critique"):
            text.check_text(getattr(self, name), name)
        if self.rank is not None and (type(self.rank) is not int or self.rank < 0):
            raise RecordError(f"rank: expected a whole number of 0 or more, got {self.rank!r}")
        for dimension, score in self.scores.items():
            one_of(dimension, DIMENSIONS, "scores")
            if score is not None and (type(score) is not int or not 1 <= score <= 5):
                raise RecordError(
                    f"scores.{dimension}: expected a whole number from 1 to 5, or null for 'not scored', got {score!r}"
                )
        one_of(self.constructed, ("", "positive", "negative"), "constructed")

    def to_json(self) -> dict[str, Any]:
        """The response as plain JSON values, defaults left out."""
        row: dict[str, Any] = {"model": self.model, "text": self.text}
        if self.rank is not None:
            row["rank"] = self.rank
        row |= {dimension: self.scores[dimension] for dimension in DIMENSIONS if dimension in self.scores}
        return row | {name: value for name in ("reason", "critique", "constructed") if (value := getattr(self, name))}

    @classmethod
    def from_json(cls, row: object) -> Response:
        """The response of `to_json`; an unknown field is refused, for there is no place to keep it."""
        with Fields(row, "response") as fields:
            response = cls(
                text=fields.text("text"),
                model=fields.text("model", ""),
                rank=fields.optional("rank"),
                scores={dimension: fields.optional(dimension) for dimension in DIMENSIONS if dimension in fields},
                reason=fields.text("reason", ""),
                critique=fields.text("critique", ""),
                constructed=fields.text("constructed", ""),  # type: ignore[arg-type]
            )
            fields.refuse_rest()
            return response


@dataclass(frozen=True, slots=True)
class Candidates:
    """A query with the responses that models gave to it, not yet annotated."""

    query: Query
    responses: tuple[Response, ...]

    def __post_init__(self) -> None:
        own(self, "responses")
        if not self.responses:
            raise RecordError(f"responses: expected at least one for query {self.query.id!r}, got none")

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object: the query's fields and its responses."""
        return self.query.to_json() | {"responses": [response.to_json() for response in self.responses]}

    @classmethod
    def from_json(cls, row: object) -> Candidates:
        """The candidates of `to_json`."""
        with Fields(row, "candidates") as fields:
            responses = tuple(Response.from_json(response) for response in fields.items("responses"))
            return cls(Query.take(fields), responses)


@dataclass(frozen=True, slots=True)
class RankedQuery:
    """A query whose responses people have ranked; ties are legal."""

    query: Query
    responses: tuple[Response, ...]
    ranking_reason: str = ""

    def __post_init__(self) -> None:
        own(self, "responses")
        if len(self.responses) < 2:
            raise RecordError(f"responses: expected two or more for query {self.query.id!r}, got {len(self.responses)}")
        missing = [index for index, response in enumerate(self.responses) if response.rank is None]
        if missing:
            raise RecordError(
                f"responses: expected a rank for each response of query {self.query.id!r}, none for {missing}"
            )
        keys = [text.key(response.text) for response in self.responses]
        for response, key in zip(self.responses, keys, strict=True):
            if response.constructed and keys.count(key) > 1:
                raise RecordError(
                    f"responses: the constructed {response.constructed} of query {self.query.id!r} "
                    "equals another response; write a different one"
                )
        text.check_text(self.ranking_reason, "ranking_reason")

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks without gaps, 1 for the best: raw (0, 0, 3) is (1, 1, 2)."""
        raw = [response.rank for response in self.responses if response.rank is not None]
        dense = {rank: place for place, rank in enumerate(sorted(set(raw)), start=1)}
        return tuple(dense[rank] for rank in raw)

    @property
    def is_tie(self) -> bool:
        """Whether no response is better than another."""
        return max(self.ranks) == 1

    def pairs(self, strategy: PairStrategy = "all") -> tuple[Pair, ...]:
        """The comparisons that the ranking makes; two responses with the same text make none.

        `all`: every two responses of different rank. `adjacent`: of neighbouring ranks. `best_worst`: of the best
        and the worst rank. `hardest`: per query the closest call, all pairs of the smallest gap between ranks that
        is there, counted from the best downwards (so one winner rank).

        >>> query = Query("q", "How many?")
        >>> ranked = RankedQuery(query, tuple(Response(t, rank=r) for t, r in [("3", 1), ("4", 2), ("5", 2)]))
        >>> ranked.pairs()
        (Pair(winner=0, loser=1), Pair(winner=0, loser=2))
        """
        one_of(strategy, get_args(PairStrategy), "pairs")
        ranks = self.ranks
        pairs = [pair for pair in self._comparable() if ranks[pair.winner] < ranks[pair.loser]]
        gaps = {pair: ranks[pair.loser] - ranks[pair.winner] for pair in pairs}
        if strategy == "adjacent":
            pairs = [pair for pair in pairs if gaps[pair] == 1]
        elif strategy == "best_worst":
            pairs = [pair for pair in pairs if gaps[pair] == max(ranks) - 1]
        elif strategy == "hardest" and pairs:
            closest = min((gaps[pair], ranks[pair.winner]) for pair in pairs)
            pairs = [pair for pair in pairs if (gaps[pair], ranks[pair.winner]) == closest]
        return tuple(pairs)

    def ties(self) -> tuple[Pair, ...]:
        """The pairs of equal rank and different text, each once."""
        ranks = self.ranks
        return tuple(
            pair for pair in self._comparable() if pair.winner < pair.loser and ranks[pair.winner] == ranks[pair.loser]
        )

    def _comparable(self) -> list[Pair]:
        keys = [text.key(response.text) for response in self.responses]
        every = range(len(keys))
        return [Pair(one, two) for one in every for two in every if one != two and keys[one] != keys[two]]

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object: the query's fields, the responses and the reason of the ranking."""
        row = self.query.to_json() | {"responses": [response.to_json() for response in self.responses]}
        return row | ({"ranking_reason": self.ranking_reason} if self.ranking_reason else {})

    @classmethod
    def from_json(cls, row: object) -> RankedQuery:
        """The ranked query of `to_json`."""
        with Fields(row, "ranked query") as fields:
            responses = tuple(Response.from_json(response) for response in fields.items("responses"))
            reason = fields.text("ranking_reason", "")
            return cls(Query.take(fields), responses, reason)


@dataclass(frozen=True, slots=True)
class ResponseScore:
    """A model's opinion about one response, joined to it by query id, place and text."""

    id: str
    response: int
    digest: str
    """`fingerprint.of_text` of the response: a score of another text is a foreign score."""
    reward: float | None = None
    reference_logp: float | None = None
    critique: str = ""
    reward_seen: float | None = None
    """Of a model of the same kind that was trained on the query, where the other was not."""

    def __post_init__(self) -> None:
        text.check_text(self.id, "id")
        if type(self.response) is not int or self.response < 0:
            raise RecordError(f"response: expected its place in the query, from 0, got {self.response!r}")
        for name in ("reward", "reference_logp", "reward_seen"):
            value = getattr(self, name)
            if value is not None and not _is_finite(value):
                raise RecordError(f"{name}: expected a finite number or null, got {value!r}")
        if self.reward is None and self.reference_logp is None:
            raise RecordError(
                f"score of response {self.response} of query {self.id!r}: expected a reward, a "
                "reference_logp or both, got neither"
            )
        text.check_text(self.critique, "critique")

    def to_json(self) -> dict[str, Any]:
        """The score as plain JSON values, absent values left out."""
        row: dict[str, Any] = {"id": self.id, "response": self.response, "digest": self.digest}
        return row | {
            name: value
            for name in ("reward", "reward_seen", "reference_logp", "critique")
            if (value := getattr(self, name)) not in (None, "")
        }

    @classmethod
    def from_json(cls, row: object) -> ResponseScore:
        """The score of `to_json`."""
        with Fields(row, "score") as fields:
            score = cls(
                fields.text("id"),
                fields.integer("response"),
                fields.text("digest"),
                fields.optional("reward"),
                fields.optional("reference_logp"),
                fields.text("critique", ""),
                fields.optional("reward_seen"),
            )
            fields.refuse_rest()
            return score


def _is_finite(value: object) -> bool:
    """Whether it is a number that a float can hold; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max
