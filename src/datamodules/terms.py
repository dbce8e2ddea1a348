"""What a query must fulfil to be used, and what is then left of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .rows import DropQueryError, Row, TooLong, fitted

if TYPE_CHECKING:
    from ..records import PairStrategy


@dataclass(frozen=True)
class Terms:
    """What a sample must fulfil to be trained on."""

    max_tokens: int
    too_long: TooLong
    pairs: PairStrategy
    ties_suffice: bool
    """Whether a query without a pair can still be learned from, by its ties."""
    annotated: bool = False
    """Whether every response must have a score that people gave."""

    def apply(self, row: Row) -> tuple[Row, Mapping[str, int]]:
        """The row as it is trained on and what was done to its responses; or the reason why it is not."""
        row, mended = fitted(row, self.max_tokens, self.too_long)
        if not row.ranked.pairs(self.pairs) and not (self.ties_suffice and row.ranked.ties()):
            if mended:
                raise DropQueryError(
                    f"query {row.ranked.query.id!r}: no two responses of at most {self.max_tokens:,} tokens can be "
                    "compared; raise max_tokens, or choose another way with too_long",
                    "too_long",
                )
            raise DropQueryError(f"query {row.ranked.query.id!r}: no two of its responses can be compared", "no_pairs")
        if self.annotated:
            _require_annotated(row)
        return row, mended


@dataclass(frozen=True)
class EveryQuery:
    """The terms of who uses all responses of all queries, whether they can be compared or not."""

    pairs: ClassVar[PairStrategy] = "all"

    def apply(self, row: Row) -> tuple[Row, Mapping[str, int]]:
        """The row as it is."""
        return row, {}


def _require_annotated(row: Row) -> None:
    for place, response in zip(row.places, row.ranked.responses, strict=True):
        if all(score is None for score in response.scores.values()):
            raise DropQueryError(
                f"query {row.ranked.query.id!r}: expected a score from 1 to 5 of every response, response {place} has "
                "none; annotate it, or do not ask for `annotated`",
                "no_annotation",
            )
