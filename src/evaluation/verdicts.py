"""A model that speaks as judge of the benchmark: what it is asked, what its words mean, and what follows from them.

Of a pair it is asked twice, in both orders, and only a verdict that stands in both counts. Words are read strictly:
what does not end as it was told to is no opinion, and an opinion that is missing is never a tie.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..endpoint import CUT, FILTERED, REFUSED, Reply
from ..fingerprint import ID_DIGITS, of_text, of_value

if TYPE_CHECKING:
    from ..prompts import Template
    from .rewardbench import Comparison

Way = Literal["pairwise", "pointwise"]
FIELDS: Mapping[Way, tuple[str, ...]] = {
    "pairwise": ("question", "first", "second"),
    "pointwise": ("question", "response"),
}
"""What a template of each way has in braces."""
LEAST, MOST = 1.0, 10.0
_EMPHASIS = re.compile(r"[*_`]")
_BETTER = re.compile(r"better: *(1|2|tie)\.?", re.IGNORECASE)
_SCORE = re.compile(r"score: *([0-9]{1,2}(?:\.[0-9]{1,9})?)(?: */ *10)?\.?", re.IGNORECASE)
_NO_ANSWER = {CUT: "cut", FILTERED: "filtered", REFUSED: "refused"}
_SIDES = ("chosen", "rejected")


class Question(NamedTuple):
    """One thing that a judge is asked."""

    name: str
    """Follows from what is asked, so that the same is not asked twice."""
    item: Comparison
    text: str


def questions(items: Iterable[Comparison], way: Way, template: Template) -> list[Question]:
    """All that is to be asked, each once, in the order of the items."""
    found: dict[str, Question] = {}
    for item in items:
        for texts in _texts(item, way):
            name = _name(item, texts)
            if name not in found:
                filled = dict(zip(FIELDS[way], (item.prompt, *texts), strict=True))
                found[name] = Question(name, item, template.fill(**filled))
    return list(found.values())


def preference(text: str) -> Literal["first", "second", "tie"] | None:
    r"""Which response is better, by the last line; None where it does not say.

    >>> preference("The first is right.\n**Better: 1**"), preference("Better: 1 or 2")
    ('first', None)
    """
    found = _BETTER.fullmatch(_last_line(text))
    known: dict[str, Literal["first", "second", "tie"]] = {"1": "first", "2": "second", "tie": "tie"}
    return known[found[1].lower()] if found else None


def rating(text: str) -> float | None:
    r"""The number from 1 to 10 on the last line; None where there is none.

    >>> rating("Mostly right.\nScore: 7.5"), rating("Score: 11")
    (7.5, None)
    """
    found = _SCORE.fullmatch(_last_line(text))
    value = float(found[1]) if found else None
    return value if value is not None and LEAST <= value <= MOST else None


def _last_line(text: str) -> str:
    lines = _EMPHASIS.sub("", text).strip().splitlines()
    return lines[-1].strip() if lines else ""


def _texts(item: Comparison, way: Way) -> list[tuple[str, ...]]:
    """The responses of each question about an item."""
    both = (item.chosen, item.rejected)
    return list(permutations(both)) if way == "pairwise" else [(text,) for text in both]


def _name(item: Comparison, texts: Sequence[str]) -> str:
    shown = [[medium.kind, medium.path] for medium in item.media]
    return of_value([item.id, item.prompt, shown, *texts])[:ID_DIGITS]


@dataclass
class Verdicts:
    """What a judge's replies say about the items, and the account of it.

    Args:
        way: How it was asked.
        replies: By the names of the questions.
    """

    way: Way
    replies: Mapping[str, Reply]
    outcomes: Counter[str] = field(default_factory=Counter)
    """Pairs: judged, inconsistent, tied or unparsable. Responses: judged or unparsable."""
    preferred: Counter[str] = field(default_factory=Counter)
    """In how many replies the first, the second or neither response was better."""

    def rows(self, items: Iterable[Comparison]) -> Iterator[dict[str, Any]]:
        """The rows of a file that `evaluate rewardbench` reads: a row per pair, or one per response."""
        if self.way == "pairwise":
            self.preferred.update(str(preference(reply.text)) for reply in self.replies.values() if _is_whole(reply))
            yield from map(self._pair, items)
            return
        seen: set[tuple[str, str]] = set()
        for item in items:
            for text in (item.chosen, item.rejected):
                if (place := (item.id, of_text(text))) not in seen:
                    seen.add(place)
                    yield self._response(item, text)

    def told(self) -> str:
        """The account in words."""
        lost = Counter(_NO_ANSWER[reply.finish] for reply in self.replies.values() if not _is_whole(reply))
        asked, said = (sum(getattr(reply, side) for reply in self.replies.values()) for side in ("asked", "said"))
        words = [_counted(self.outcomes), f"{len(self.replies):,} questions{' of which ' * bool(lost)}{_counted(lost)}"]
        if voted := self.preferred["first"] + self.preferred["second"]:
            first = self.preferred["first"]
            words.append(f"the first of two was preferred {first:,} times of {voted:,} ({first / voted:.0%})")
        return "; ".join([*words, f"{asked:,} tokens read and {said:,} written"])

    def _pair(self, item: Comparison) -> dict[str, Any]:
        replies = [self.replies[_name(item, texts)] for texts in _texts(item, "pairwise")]
        better = [_side(reply, order) for reply, order in zip(replies, permutations(_SIDES), strict=True)]
        outcome, rewards = _agreed(better)
        self.outcomes[outcome] += 1
        return {
            "id": item.id,
            "chosen": item.chosen,
            "rejected": item.rejected,
            "rewards": rewards,
            "orders": better,
            "said": [reply.text for reply in replies],
        }

    def _response(self, item: Comparison, text: str) -> dict[str, Any]:
        reply = self.replies[_name(item, (text,))]
        reward = rating(reply.text) if _is_whole(reply) else None
        self.outcomes["unparsable" if reward is None else "judged"] += 1
        return {"id": item.id, "digest": of_text(text), "reward": reward, "said": reply.text}


def _counted(numbers: Counter[str]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in numbers.most_common())


def _is_whole(reply: Reply) -> bool:
    """Whether the judge came to its end: of a score that is cut, 10 reads as 1."""
    return reply.finish not in _NO_ANSWER


def _side(reply: Reply, order: Sequence[str]) -> str | None:
    """Which answer is better, given the order in which they stood: chosen, rejected, tie, or None."""
    said = preference(reply.text) if _is_whole(reply) else None
    return {"first": order[0], "second": order[1], "tie": "tie", None: None}[said]


def _agreed(better: Sequence[str | None]) -> tuple[str, list[float | None]]:
    """What two verdicts in both orders come to, and the rewards of the chosen and the rejected answer."""
    one, other = better
    if one is None or other is None:
        return "unparsable", [None, None]
    if one != other:
        return "inconsistent", [0.5, 0.5]
    if one == "tie":
        return "tied", [0.5, 0.5]
    return "judged", [float(one == side) for side in _SIDES]
