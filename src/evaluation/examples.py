"""Which queries are shown side by side: by a rule that is stated on the page, so that nobody picks them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from .. import images, media
from ..fingerprint import of_value
from ..queries import Query
from ..records import RankedQuery
from .agreement import NO_CATEGORY
from .joining import Judged
from .page import Example, Side
from .rewardbench import CATEGORIES

RULE = (
    "From each category in turn: the query with the worst pair (the reward is wrong by the largest margin), the query "
    "whose worst pair is best (all pairs are right, by the largest margin), and one drawn by chance; then the next of "
    "each."
)
WRONG, RIGHT, CHANCE = "wrong, by the largest margin", "right, by the largest margin", "drawn by chance"
_SIDE, _FRAMES = 240, 3


class Chosen(NamedTuple):
    """A query that is shown, and why."""

    judged: Judged
    why: str
    margin: float
    """δ of its worst pair."""


def choose(judged: Sequence[Judged], number: int, seed: int) -> list[Chosen]:
    """At most so many queries by the rule, sorted by category; the order of the queries does not matter."""
    of: dict[str, list[Chosen]] = {}
    for one in judged:
        if margins := [one.rewards[winner] - one.rewards[loser] for winner, loser in one.ranked.pairs()]:
            of.setdefault(_category(one.ranked.query), []).append(Chosen(one, "", min(margins)))
    # Which category comes first matters where the last round is not a whole one; so chance decides.
    turns = [
        ((place, kind, of_value([seed, category])), found._replace(why=why))
        for category, members in of.items()
        for kind, (why, queue) in enumerate(_queues(members, seed).items())
        for place, found in enumerate(queue)
    ]
    first: dict[str, Chosen] = {}
    for _, found in sorted(turns, key=lambda turn: turn[0]):
        first.setdefault(found.judged.ranked.query.id, found)
    order = [*CATEGORIES, NO_CATEGORY]
    return sorted(islice(first.values(), number), key=lambda found: order.index(_category(found.judged.ranked.query)))


def _queues(members: Sequence[Chosen], seed: int) -> dict[str, list[Chosen]]:
    """The queries of one category as they come, for each reason to show one."""
    by_margin = sorted(members, key=lambda found: (found.margin, found.judged.ranked.query.id))
    return {
        WRONG: [found for found in by_margin if found.margin <= 0],
        RIGHT: [found for found in reversed(by_margin) if found.margin > 0],
        CHANCE: sorted(members, key=lambda found: of_value([seed, found.judged.ranked.query.id])),
    }


def _category(query: Query) -> str:
    return query.category or NO_CATEGORY


def example_of(chosen: Chosen, root: Path | None = None) -> Example:
    """A chosen query as the page shows it, with small pictures of its media where these are given."""
    one = chosen.judged
    shown = ranked_example(one.ranked, root)
    critiques = one.critiques or ("",) * len(one.rewards)
    sides = [
        replace(side, reward=reward, critique=critique)
        for side, reward, critique in zip(shown.sides, one.rewards, critiques, strict=True)
    ]
    return replace(shown, sides=sides, why=f"{chosen.why} (worst pair: {chosen.margin:+.3f})")


def ranked_example(ranked: RankedQuery, root: Path | None = None) -> Example:
    """A query as people ranked it, before any model has judged it."""
    query = ranked.query
    return Example(
        query.id,
        query.prompt,
        [
            Side(response.text, rank, reason=response.critique or response.reason)
            for response, rank in zip(ranked.responses, ranked.ranks, strict=True)
        ],
        [medium.path for medium in query.media],
        query.category or "",
        pictures=[] if root is None else thumbnails(root, query),
    )


def by_chance(ranked: Iterable[RankedQuery], number: int, seed: int) -> list[RankedQuery]:
    """So many queries, drawn by a hash of their ids: the order of the file does not matter."""
    return heapq.nsmallest(number, ranked, key=lambda one: of_value([seed, one.query.id]))


def thumbnails(root: Path, query: Query) -> list[bytes]:
    """Small JPEGs of a query's pictures, and of some frames of its films."""
    found: list[Image.Image] = []
    for medium in query.media:
        loaded = media.load(root, medium, _FRAMES)
        found += loaded if isinstance(loaded, list) else [loaded]
    return [images.encode(image.resize(images.bounded_size(image.size, _SIDE)), "jpg") for image in found]
