"""The plan of a world: every question, its picture, its split and its answers, before anything is written.

The plan is one quick pass in one process; rendering, which is slow, then runs in any number of processes
without changing a byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..fingerprint import ID_DIGITS, of_value
from ..queries import Media, Query
from ..records import Candidates, Response
from . import questions, speech
from .facts import Fact
from .scenes import stream

if TYPE_CHECKING:
    import random

    from ..queries import Split

MIX: Mapping[str, int] = {"short": 12063, "long": 9575, "video": 4235, "mcq": 2125, "safety": 1999}
"""Queries per category of the published data set (its Table 1): the default proportions."""
SHARES: Mapping[Split, float] = {"train": 0.8, "val": 0.1, "test": 0.1}
ANSWERS: Mapping[str, int] = {"video": 3}
"""Responses per query where it is not four: three models answered the films."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One question of the world with everything that is known about it."""

    candidates: Candidates
    fact: Fact
    faults: tuple[tuple[str, ...], ...]
    number: str
    """The conversation that it belongs to; its pictures are called by it."""

    @property
    def query(self) -> Query:
        """The question as a record."""
        return self.candidates.query


def quotas(queries: int, mix: Mapping[str, int]) -> dict[str, int]:
    """Split a number of queries in the proportions of a mix, by largest remainder.

    >>> quotas(10, {"a": 2, "b": 1})
    {'a': 7, 'b': 3}
    """
    total = sum(mix.values())
    shares = {name: queries * weight / total for name, weight in mix.items()}
    counts = {name: int(share) for name, share in shares.items()}
    for name in sorted(mix, key=lambda name: (counts[name] - shares[name], name))[: queries - sum(counts.values())]:
        counts[name] += 1
    return counts


def plan(seed: int, queries: int, mix: Mapping[str, int]) -> list[Planned]:
    """Every question of the world, in the order of its files."""
    order = [category for category, count in quotas(queries, mix).items() for _ in range(count)]
    stream(seed, "order").shuffle(order)
    planned: list[Planned] = []
    number, asked = -1, list[Fact]()
    for index, category in enumerate(order):
        rng = stream(seed, "query", index)
        fact = _another(asked, category, rng) if 0 < len(asked) < 3 and rng.random() < 0.25 else None
        if fact is None:
            number, asked, fact = number + 1, [], questions.ask(category, rng)
        asked.append(fact)
        planned.append(_planned(seed, f"{number:06d}", len(asked), fact, index))
    return planned


def _another(asked: list[Fact], category: str, rng: random.Random) -> Fact | None:
    """One more question about the last picture, if it allows one of that category that was not asked yet."""
    last = asked[-1]
    if len(last.scenes) != 1 or last.category == "safety":
        return None
    fact = questions.ask_about(category, last.scenes[0], rng)
    return fact if fact is not None and all(_subject(fact) != _subject(other) for other in asked) else None


def _subject(fact: Fact) -> tuple[str, str, str]:
    return fact.kind, fact.subject, fact.other


def _planned(seed: int, number: str, turn: int, fact: Fact, index: int) -> Planned:
    rng = stream(seed, "answers", index)
    question = questions.phrase(fact, rng)
    shown = group_of(fact)
    query = Query(
        id=f"world-{number}-{turn}",
        prompt=question.prompt,
        media=media_of(fact, number),
        category=fact.category,  # type: ignore[arg-type]
        reference_answer=speech.right_answer(fact, rng),
        source="world",
        group=shown,
        split=split_of(seed, shown),
    )
    skills = list(speech.SKILLS[: ANSWERS.get(fact.category, 4)])
    rng.shuffle(skills)
    spoken = [speech.answer(fact, skill, rng) for skill in skills]
    responses = tuple(Response(said.text, model=skill.model) for said, skill in zip(spoken, skills, strict=True))
    return Planned(Candidates(query, responses), fact, tuple(said.faults for said in spoken), number)


def group_of(fact: Fact) -> str:
    """A name made of what is shown (or, where nothing is, of what is requested): one picture, one group."""
    row = fact.to_json()
    return f"world-{of_value(row.get('clip') or row.get('scenes') or fact.subject)[:ID_DIGITS]}"


def split_of(seed: int, group: str) -> Split:
    """The split of what is shown; it depends on nothing else, so a scene has one split in every world of a seed."""
    point = stream(seed, "split", group).random()
    for split, share in SHARES.items():
        point -= share
        if point < 0:
            return split
    return "train"


def media_of(fact: Fact, number: str) -> tuple[Media, ...]:
    """Where the fact's pictures lie: films by turns as a file and as a folder of frames."""
    if fact.clip is not None:
        return (Media("video", f"videos/{number}.mp4" if int(number) % 2 else f"videos/{number}"),)
    suffix = "png" if int(number) % 8 == 0 else "jpg"
    if len(fact.scenes) == 1:
        return (Media("image", f"images/{number}.{suffix}"),)
    return tuple(Media("image", f"images/{number}-{place}.{suffix}") for place, _ in enumerate(fact.scenes, start=1))


def conversations(planned: Sequence[Planned]) -> Iterator[dict[str, Any]]:
    """The raw rows as collected: LLaVA conversations, several turns where questions share a picture."""
    talks: dict[str, list[Planned]] = {}
    for item in planned:
        talks.setdefault(item.number, []).append(item)
    for number, items in talks.items():
        media = items[0].query.media
        row: dict[str, Any] = {"id": f"world-{number}"}
        if media:
            paths = [medium.path for medium in media]
            row[media[0].kind] = paths[0] if len(paths) == 1 else paths
        turns: list[dict[str, str]] = []
        for item in items:
            markers = "" if turns else "".join(f"<{medium.kind}>\n" for medium in media)
            turns.append({"from": "human", "value": markers + item.query.prompt})
            turns.append({"from": "gpt", "value": item.query.reference_answer})
        yield row | {"conversations": turns, "source": "world"}


def paraphrased(item: Planned, rng: random.Random) -> Query:
    """The same question in other words, about the same picture."""
    return replace(item.query, prompt=questions.phrase(item.fact, rng, avoid=item.query.prompt).prompt)
