"""Which queries are shown side by side: by a rule that is stated on the page, so that nobody picks them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from .. import images, media
from ..fingerprint import of_value
from ..queries import Query
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
    one, query = chosen.judged, chosen.judged.ranked.query
    critiques = one.critiques or ("",) * len(one.rewards)
    columns = zip(one.ranked.responses, one.ranked.ranks, one.rewards, critiques, strict=True)
    return Example(
        query.id,
        query.prompt,
        [
            Side(response.text, rank, reward, critique, response.critique or response.reason)
            for response, rank, reward, critique in columns
        ],
        [medium.path for medium in query.media],
        query.category or "",
        f"{chosen.why} (worst pair: {chosen.margin:+.3f})",
        [] if root is None else thumbnails(root, query),
    )


def thumbnails(root: Path, query: Query) -> list[bytes]:
    """Small JPEGs of a query's pictures, and of some frames of its films."""
    found: list[Image.Image] = []
    for medium in query.media:
        loaded = media.load(root, medium, _FRAMES)
        found += loaded if isinstance(loaded, list) else [loaded]
    return [images.encode(image.resize(images.bounded_size(image.size, _SIDE)), "jpg") for image in found]
