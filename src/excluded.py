"""Queries that a benchmark was made of, known by their content, so that nothing trains on them.

A file of exclusions holds hashes and no texts, so it may lie beside training data. Ids do not count: another file may
call the same question otherwise, and another question the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import jsonl
from .fields import Fields, RecordError
from .fingerprint import of_text, of_value
from .media import digest
from .queries import Media, Query


@dataclass(frozen=True, slots=True)
class Mark:
    """What one query is known by."""

    question: str
    """Hash of the conversation, the media left out."""
    paths: tuple[str, ...] = ()
    """Hashes of the paths of its media."""
    media: tuple[str, ...] = ()
    """Hashes of the files themselves, where there was a folder to read them from."""
    group: str = ""
    """Hash of the source and its group; empty where it has none."""

    @classmethod
    def of(cls, query: Query, hashed: Callable[[Media], str] | None = None) -> Mark:
        """The mark of a query, with hashes of its media where there is a function that makes them."""
        said = [query.system, *(turn.text for turn in query.history), query.prompt]
        return cls(
            of_value([of_text(text) for text in said]),
            tuple(sorted(of_text(medium.path) for medium in query.media)),
            () if hashed is None else tuple(sorted(map(hashed, query.media))),
            of_value([query.source, query.group]) if query.group else "",
        )

    def to_json(self) -> dict[str, Any]:
        """The mark as plain values."""
        return {"question": self.question, "paths": self.paths, "media": self.media, "group": self.group}

    @classmethod
    def from_json(cls, row: object) -> Mark:
        """The mark of `to_json`; further fields are for people."""
        with Fields(row, "exclusion") as fields:
            paths, media = ([_hash(value, name) for value in fields.items(name)] for name in ("paths", "media"))
            return cls(_hash(fields.text("question"), "question"), tuple(paths), tuple(media), fields.text("group", ""))


def _hash(value: object, name: str) -> str:
    if not isinstance(value, str) or len(value) != 64:
        raise RecordError(f"{name}: expected a SHA-256 of 64 digits, got {value!r:.60}; write the file with Mark")
    return value


class Exclusions:
    """All marks of a file, to be asked about one query after the other.

    >>> kept_out = Exclusions([Mark.of(Query("bench 1", "How many ducks?"))])
    >>> kept_out.reason(Mark.of(Query("train 7", "How many ducks? ")))
    'question'
    """

    def __init__(self, marks: list[Mark]) -> None:
        self._questions = {(mark.question, places) for mark in marks for places in (mark.paths, mark.media)}
        self._media = {digest for mark in marks for digest in mark.media}
        self._paths = {path for mark in marks for path in mark.paths}
        self._groups = {mark.group for mark in marks if mark.group}
        self._whole = all(len(mark.media) == len(mark.paths) for mark in marks)

    @classmethod
    def read(cls, path: Path) -> Exclusions:
        """The marks of a file that `make_rewardbench` wrote."""
        return cls(list(jsonl.read(path, Mark.from_json)))

    def reason(self, mark: Mark) -> str:
        """Why a query must stay out, as a code: `question`, `media`, `path` or `group`; empty if it need not.

        The same picture is enough, even under another question. Its path stands in for a file only where one of the
        two sides was made without files, for a name in another folder may be another picture.
        """
        compared = self._whole and len(mark.media) == len(mark.paths)
        if (mark.question, mark.media if compared else mark.paths) in self._questions:
            return "question"
        if self._media.intersection(mark.media):
            return "media"
        if not compared and self._paths.intersection(mark.paths):
            return "path"
        return "group" if mark.group in self._groups else ""


def is_excluded(query: Query, exclusions: Exclusions, root: Path | None = None) -> bool:
    """Whether a query, its group or one of its media is part of the benchmark; `root` is the folder of the media."""
    return bool(exclusions.reason(Mark.of(query, None if root is None else partial(digest, root))))
