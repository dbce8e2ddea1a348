"""MM-RLHF-RewardBench (Zhang et al. 2025): which of two answers to a question about a picture or film is better?

The rule is the paper's: a pair is right if the chosen answer has strictly the larger reward. ACC counts pairs, ACC+
the ids all of whose pairs are right; both are pooled, and the mean over categories stands beside them. A pair without
rewards counts as wrong, so that no score rises by leaving out what is hard.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, get_args

from .. import jsonl, text
from ..fields import Fields, RecordError
from ..fingerprint import ID_DIGITS, of_text, of_value
from ..ledger import Ledger
from ..queries import Category, Media, MediaKind
from .face import Grade, Status
from .rates import Summary, summary_of

CATEGORIES: tuple[Category, ...] = get_args(Category)
"""In the order in which a path is searched for them."""


class BenchError(RecordError):
    """A row that the benchmark cannot use; `reason` is the code under which it is counted."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Rewards(NamedTuple):
    """What a model thinks of the two answers; None is an opinion that could not be read.

    A judge of pairs fits in too: the number of orders, of two, in which it preferred each answer, so that a verdict
    which depends on the order is a tie.
    """

    chosen: float | None
    rejected: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row of the benchmark."""

    id: str
    """Of the question; several pairs share it."""
    category: Category
    prompt: str
    media: tuple[Media, ...]
    chosen: str
    rejected: str
    chosen_reason: str = ""
    rejected_reason: str = ""
    copy: int = 0
    """Which one it is of several rows with the same two answers; the official metric counts rows."""

    @property
    def digests(self) -> tuple[str, str]:
        """What the two answers are known by, whatever model or file speaks of them."""
        return of_text(self.chosen)[:ID_DIGITS], of_text(self.rejected)[:ID_DIGITS]

    @property
    def key(self) -> str:
        """Names the pair by its content, for no number in a file is safe from another order."""
        digest = of_value([self.id, *self.digests])[:ID_DIGITS]
        return f"{digest}~{self.copy}" if self.copy else digest

    @classmethod
    def from_json(cls, row: object) -> Comparison:
        """The pair of a row in the benchmark's layout; texts are mended as an importer mends them."""
        fields = Fields(row, "pair")  # not as a context, which would make one reason of all
        media = tuple(medium for name in ("image", "images", "video", "videos") for medium in _media(fields, name))
        prompt, chosen, rejected = (text.mend(fields.text(name)).text for name in ("prompt", "chosen", "rejected"))
        if text.same(chosen, rejected):
            raise BenchError("chosen, rejected: expected two answers, got the same text twice", "same_text")
        category = category_of([medium.path for medium in media], fields.optional("category"))
        why, why_not = (_reason(fields, side) for side in ("chosen", "rejected"))
        return cls(name_of(fields), category, prompt, media, chosen, rejected, why, why_not)


def name_of(fields: Fields) -> str:
    """The id of a row as a text; whole numbers are names too."""
    value = fields.optional("id")
    if type(value) is int or (isinstance(value, str) and value.strip()):
        return text.check_text(str(value), "id")
    raise BenchError(f"id: expected a text or a whole number, got {value!r:.60}; name each row", "no_id")


def _reason(fields: Fields, side: str) -> str:
    """Empty where nobody gave one."""
    name = f"{side}_reason"
    return "" if fields.optional(name) is None else text.mend(fields.text(name)).text


def _media(fields: Fields, name: str) -> list[Media]:
    value = fields.optional(name)
    paths = value if isinstance(value, list) else [] if value in (None, "") else [value]
    kind: MediaKind = "video" if name.startswith("video") else "image"
    return [Media(kind, path) for path in paths]


def category_of(paths: Sequence[str], given: object = None) -> Category:
    """The category that a row names, or the first folder of its first medium, or else a word within that path.

    >>> category_of(["short/long_video.png"]), category_of(["data/a_video_of_mcq.png"])
    ('short', 'mcq')
    """
    told = PurePosixPath(paths[0]).parts[0] if given is None and paths else given
    if told in CATEGORIES:
        return told
    if given is None and paths:
        for category in CATEGORIES:
            if category in paths[0]:
                return category
    found = f"{given!r:.60}" if given is not None else f"{paths[0]!r:.60} as path" if paths else "no medium"
    known = ", ".join(CATEGORIES)
    raise BenchError(f"category: expected one of {known}, got {found}; give the row a `category`", "no_category")


@dataclass(frozen=True)
class RewardBench:
    """The benchmark; what it may be told is how intervals are made."""

    level: float = 0.95
    resamples: int = 10_000
    seed: int = 0
    name: str = "rewardbench"

    def items(self, path: Path, ledger: Ledger | None = None) -> list[Comparison]:
        """The pairs of a file, in an order of their own, each under a key that its content makes."""
        copies: Counter[str] = Counter()
        found, categories = [], dict[str, Category]()
        for pair in jsonl.read(path, Comparison.from_json, ledger=ledger):
            if categories.setdefault(pair.id, pair.category) != pair.category:
                both = f"{categories[pair.id]} and {pair.category}"
                raise BenchError(
                    f"{path}: expected one category for id {pair.id!r}, got {both}; rename one", "two_categories"
                )
            number = copies[pair.key]
            copies[pair.key] += 1
            if number and ledger is not None:
                ledger.fixed("repeated_pair")
            found.append(replace(pair, copy=number))
        if not found:
            raise ValueError(f"{path}: expected pairs of answers, got none that can be used; check the file")
        return sorted(found, key=lambda pair: (CATEGORIES.index(pair.category), pair.id, pair.key))

    def grade(self, item: Comparison, outcome: Rewards | None) -> Grade:
        """Right if the chosen answer has strictly the larger reward; equal rewards are wrong, and told as a tie."""
        status: Status = "missing"
        detail: dict[str, Any] = {"longer": len(item.chosen) - len(item.rejected)}
        correct = False
        if outcome is not None:
            chosen, rejected = outcome
            if chosen is None or rejected is None or not (math.isfinite(chosen) and math.isfinite(rejected)):
                status = "unparsable"
            else:
                status = "tied" if chosen == rejected else "judged"
                correct = chosen > rejected
                detail |= {"rewards": [chosen, rejected]}
        return Grade(item.key, item.id, item.category, correct, status, detail)

    def summarize(self, grades: Sequence[Grade]) -> Summary:
        """ACC and ACC+ with their intervals, pooled, by category and as the mean of the categories."""
        order: Mapping[str, int] = {category: place for place, category in enumerate(CATEGORIES)}
        return summary_of(grades, order, level=self.level, resamples=self.resamples, seed=self.seed)
