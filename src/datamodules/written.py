"""Critiques that somebody else wrote, joined to the responses that they are about; and how they are asked for.

A file holds JSON lines with `id`, `response` (its place in the query, from 0), the `digest` of the response's text and
`critique`, which is empty where there is none. `mmrlhf critique` writes such files; further columns are not read.
"""

from __future__ import annotations

from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from .. import jsonl
from ..fields import Fields, RecordError
from ..fingerprint import ID_DIGITS, of_text
from ..judging import judge_messages
from ..text import check_text
from .rows import loader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..encoding import Message
    from ..prompts import Template
    from ..records import RankedQuery
    from .reader import Sample
    from .rows import CritiqueSource

Given = Literal["critique_or_reason", "critique", "reason"]
"""Where critiques that are given stand in the data."""
_CURE = "run `mmrlhf critique` on the same shards"


def source_of(given: bool, critique_from: Given | Path) -> tuple[CritiqueSource, Path | None]:
    """Where critiques are taken from, the data or a file; from nowhere unless they are given."""
    if not given:
        return "none", None
    if isinstance(critique_from, Path):
        return "none", WrittenCritiques(critique_from).path
    if critique_from not in get_args(Given):
        known = ", ".join(get_args(Given))
        raise ValueError(f"critique_from: expected {known}, or the path of a file, got {critique_from!r}")
    return critique_from, None


class WrittenCritiques:
    """The critiques of a file by query and place; it is read when one is first asked for."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"critiques: expected a file, found none at {path}; {_CURE}")
        self.path = path

    def of(self, ranked: RankedQuery) -> list[str]:
        """The critiques of a query's responses, in their order; one that is missing or of another text is an error."""
        found = []
        for place, response in enumerate(ranked.responses):
            digest, critique = self._known.get((ranked.query.id, place), ("", ""))
            if digest != of_text(response.text)[:ID_DIGITS]:
                got = "one of another text" if digest else "none"
                raise ValueError(
                    f"{self.path}: expected a critique of response {place} of query {ranked.query.id!r}, got {got}; "
                    f"{_CURE}"
                )
            found.append(critique)
        return found

    @cached_property
    def _known(self) -> dict[tuple[str, int], tuple[str, str]]:
        known: dict[tuple[str, int], tuple[str, str]] = {}
        for place, told in jsonl.read(self.path, _read):
            if known.setdefault(place, told) != told:
                raise ValueError(
                    f"{self.path}: expected one critique of response {place[1]} of query {place[0]!r}, got two that "
                    "differ; remove one"
                )
        return known


def _read(row: object) -> tuple[tuple[str, int], tuple[str, str]]:
    with Fields(row, "critique") as fields:
        place = fields.text("id"), fields.integer("response")
        digest = fields.text("digest")[:ID_DIGITS]
        if len(digest) < ID_DIGITS:
            raise RecordError(f"digest: expected {ID_DIGITS} digits or more, got {digest!r}")
        return place, (digest, check_text(fields.text("critique"), "critique"))


def asked(sample: Sample, template: Template, frames: int) -> Iterator[list[Message]]:
    """The conversation in which each response of a sample is judged; its media are decoded once, before the first."""
    load = cache(loader(sample, frames))
    for medium in sample.ranked.query.media:
        load(medium)
    for response in sample.ranked.responses:
        yield judge_messages(template, sample.ranked.query, response.text, load)[0]
