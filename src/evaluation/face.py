"""The face of a benchmark: what it asks (`items`), how one answer is marked (`grade`), what it all says (`summarize`).

Whoever runs a model knows nothing of a benchmark but these three, and a benchmark knows nothing of models: an outcome
is a plain value that was made somewhere else. A grade is a row of a file, so a summary can be made again without
the model, and two runs can be compared item by item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

from ..fields import Fields, RecordError, one_of, own
from ..ledger import Ledger

Status = Literal["judged", "tied", "missing", "unparsable"]
"""An item has one of them: an opinion, an opinion that prefers nothing, no outcome, or one that says nothing."""

Item = TypeVar("Item")
Outcome_contra = TypeVar("Outcome_contra", contravariant=True)
Summary_co = TypeVar("Summary_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Grade:
    """How one item was answered.

    >>> Grade("a1", "a", "mcq", correct=True, status="missing")
    Traceback (most recent call last):
        ...
    mmrlhf.fields.RecordError: correct: expected false for an item that is missing, got true
    """

    item: str
    """Names the item, the same in every run and whatever the order of the file."""
    cluster: str
    """Items of one cluster share their question, so they are not independent."""
    category: str
    correct: bool
    status: Status
    detail: Mapping[str, Any] = field(default_factory=dict)
    """What the benchmark wants to keep beside it, as plain JSON."""

    def __post_init__(self) -> None:
        own(self, "detail")
        one_of(self.status, get_args(Status), "status")
        if type(self.correct) is not bool:
            raise RecordError(f"correct: expected true or false, got {self.correct!r:.60}")
        if self.correct and self.status != "judged":
            raise RecordError(f"correct: expected false for an item that is {self.status}, got true")

    def to_json(self) -> dict[str, Any]:
        """The grade as plain JSON values."""
        names = ("item", "cluster", "category", "correct", "status")
        row: dict[str, Any] = {name: getattr(self, name) for name in names}
        return row | ({"detail": dict(self.detail)} if self.detail else {})

    @classmethod
    def from_json(cls, row: object) -> Grade:
        """The grade of `to_json`."""
        with Fields(row, "grade") as fields:
            grade = cls(
                item=fields.text("item"),
                cluster=fields.text("cluster"),
                category=fields.text("category"),
                correct=fields.optional("correct"),
                status=fields.text("status"),  # type: ignore[arg-type]
                detail=fields.optional("detail") or {},
            )
            fields.refuse_rest()
            return grade


class Benchmark(Protocol[Item, Outcome_contra, Summary_co]):
    """What every benchmark can do."""

    name: str
    """Stands before its metrics: `NAME/acc`."""

    def items(self, path: Path, ledger: Ledger | None = None) -> Sequence[Item]:
        """Read what is asked; a malformed row is an error, or, with a ledger, skipped and counted."""

    def grade(self, item: Item, outcome: Outcome_contra | None) -> Grade:
        """Mark one outcome; None is an item that has none."""

    def summarize(self, grades: Sequence[Grade]) -> Summary_co:
        """Say what the grades amount to, with intervals; their order does not matter."""
