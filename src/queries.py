"""What is asked: queries with their media, frozen, checked on construction, one JSON object each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple, get_args

from . import text
from .fields import Fields, RecordError, one_of, own

Category = Literal["mcq", "long", "short", "safety", "video"]
Split = Literal["train", "val", "test"]
MediaKind = Literal["image", "video"]
WRITTEN = frozenset(
    [
        "id",
        "prompt",
        "media",
        "category",
        "system",
        "history",
        "reference_answer",
        "source",
        "group",
        "split",
        "responses",
        "ranking_reason",
    ]
)
"""The fields that records write: those of a query, and those that candidates and ranked queries put beside them."""


@dataclass(frozen=True, slots=True)
class Media:
    """A picture, or a film as one file or as a folder of frames whose names sort in the order of time.

    >>> Media("image", "../secret.png")
    Traceback (most recent call last):
        ...
    mmrlhf.fields.RecordError: path: expected a relative path inside the media folder, got '../secret.png'
    """

    kind: MediaKind
    path: str
    offset: int = 0
    """Where it stands in the prompt, in characters: 0 before the text, `len(prompt)` after it."""

    def __post_init__(self) -> None:
        one_of(self.kind, get_args(MediaKind), "kind")
        text.check_text(self.path, "path")
        parts = PurePosixPath(self.path).parts
        inside = bool(parts) and not self.path.startswith("/") and ".." not in parts and "\\" not in self.path
        if not inside or "://" in self.path:
            raise RecordError(f"path: expected a relative path inside the media folder, got {self.path!r}")
        if type(self.offset) is not int or self.offset < 0:
            raise RecordError(f"offset: expected a character position of 0 or more, got {self.offset!r}")

    def to_json(self) -> dict[str, Any]:
        """The medium as plain JSON values, defaults left out."""
        return {"kind": self.kind, "path": self.path} | ({"offset": self.offset} if self.offset else {})

    @classmethod
    def from_json(cls, row: object) -> Media:
        """The medium of `to_json`."""
        with Fields(row, "media") as fields:
            medium = cls(fields.text("kind"), fields.text("path"), fields.integer("offset", 0))  # type: ignore[arg-type]
            fields.refuse_rest()
            return medium


class Turn(NamedTuple):
    """An earlier turn of the conversation, before the prompt."""

    role: Literal["user", "assistant"]
    text: str

    @classmethod
    def from_json(cls, row: object) -> Turn:
        """The turn of an entry of `history`; an unknown field is refused, for there is no place to keep it."""
        with Fields(row, "history") as fields:
            turn = cls(fields.text("role"), fields.text("text"))  # type: ignore[arg-type]
            fields.refuse_rest()
            return turn


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked: a prompt with its media, and where it comes from."""

    id: str
    prompt: str
    media: tuple[Media, ...] = ()
    category: Category | None = None
    """None until curation has classified the query."""
    system: str = ""
    history: tuple[Turn, ...] = ()
    reference_answer: str = ""
    source: str = ""
    """The data set it was collected from."""
    group: str = ""
    """Queries of one group (the same picture, the same film) never straddle a split."""
    split: Split | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the file that no record knows, kept as they came."""

    def __post_init__(self) -> None:
        own(self, "media", "history", "meta")
        if taken := sorted(WRITTEN & set(self.meta)):
            raise RecordError(
                f"meta: expected names that no record writes itself, got {taken}; rename them, or, where they are "
                "meant, give them to the query's own fields or read the row as Candidates or RankedQuery"
            )
        if not text.check_text(self.id, "id").strip():
            raise RecordError("id: expected a name, got an empty text")
        if not text.check_text(self.prompt, "prompt").strip():
            raise RecordError("prompt: expected a question, got an empty text")
        for name in ("system", "reference_answer", "source", "group"):
            text.check_text(getattr(self, name), name)
        for turn in self.history:
            one_of(turn.role, ("user", "assistant"), "history.role")
            text.check_text(turn.text, "history.text")
        if self.category is not None:
            one_of(self.category, get_args(Category), "category")
        if self.split is not None:
            one_of(self.split, get_args(Split), "split")
        for medium in self.media:
            if medium.offset > len(self.prompt):
                raise RecordError(
                    f"media: {medium.path!r} stands at character {medium.offset} of a prompt of "
                    f"{len(self.prompt)} characters"
                )

    def to_json(self) -> dict[str, Any]:
        """The query as one flat JSON object, defaults left out."""
        row: dict[str, Any] = {"id": self.id, "prompt": self.prompt}
        row["media"] = [medium.to_json() for medium in self.media]
        for name in ("category", "system", "reference_answer", "source", "group", "split"):
            if getattr(self, name):
                row[name] = getattr(self, name)
        if self.history:
            row["history"] = [{"role": turn.role, "text": turn.text} for turn in self.history]
        return dict(self.meta) | row

    @classmethod
    def from_json(cls, row: object) -> Query:
        """The query of `to_json`; unknown fields are kept in `meta`."""
        with Fields(row, "query") as fields:
            return cls.take(fields)

    @classmethod
    def take(cls, fields: Fields) -> Query:
        """Take a query's fields out of a larger record's."""
        return cls(
            id=fields.text("id"),
            prompt=fields.text("prompt"),
            media=tuple(Media.from_json(medium) for medium in fields.items("media")),
            category=fields.optional("category"),
            system=fields.text("system", ""),
            history=tuple(Turn.from_json(turn) for turn in fields.items("history")),
            reference_answer=fields.text("reference_answer", ""),
            source=fields.text("source", ""),
            group=fields.text("group", ""),
            split=fields.optional("split"),
            meta=fields.rest(),
        )
