"""Which split a query belongs to: whatever shares a picture, a film or a group stays on one side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, get_args

from ..fingerprint import of_text
from ..queries import Split

SPLITS: tuple[Split, ...] = get_args(Split)


class Belongs(NamedTuple):
    """What ties a query to others: texts that another query of its group has, too."""

    id: str
    ties: tuple[str, ...]
    split: Split | None
    """Where it was put before; None leaves it to its group."""


def assign(queries: Sequence[Belongs], val: float, test: float) -> list[Split]:
    """The split of every query, the same for all that are tied to each other, even through a third.

    A group goes where its members were put before; one that was put nowhere is placed by a hash, so that another
    order of the file changes nothing, and a new query moves no old group that it is not tied to.
    """
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
        raise ValueError(f"val, test: expected parts of 0 or more that leave room for train, got {val} and {test}")
    groups = connected([query.ties for query in queries])
    placed: dict[int, Split] = {}
    for number, members in groups.items():
        given = {queries[member].split: queries[member].id for member in members if queries[member].split}
        if len(given) > 1:
            found = " and ".join(f"{identity!r} in {split}" for split, identity in sorted(given.items(), key=str))
            raise ValueError(
                f"split: expected queries that share a picture, a film or a group in one split, got {found}; "
                "move one of them, or leave the field `split` out and let `mmrlhf pack` choose"
            )
        before = next((queries[member].split for member in members if queries[member].split), None)
        placed[number] = before or _by_hash([queries[member] for member in members], val, test)
    where = {member: number for number, members in groups.items() for member in members}
    return [placed[where[place]] for place in range(len(queries))]


def _by_hash(members: Iterable[Belongs], val: float, test: float) -> Split:
    name = min(tie for member in members for tie in (member.ties or (member.id,)))
    part = int(of_text(name)[:13], 16) / 16**13
    return "test" if part < test else "val" if part < test + val else "train"


def connected(ties: Sequence[Sequence[str]]) -> dict[int, list[int]]:
    """Groups of queries that are tied directly or through others, each by its first member.

    >>> connected([["a"], ["b"], ["a", "c"], ["c"]])
    {0: [0, 2, 3], 1: [1]}
    """
    above = list(range(len(ties)))

    def top(place: int) -> int:
        while above[place] != place:
            above[place] = above[above[place]]
            place = above[place]
        return place

    first: dict[str, int] = {}
    for place, of_query in enumerate(ties):
        for tie in of_query:
            one, two = sorted((top(place), top(first.setdefault(tie, place))))
            above[two] = one
    groups = defaultdict(list)
    for place in range(len(ties)):
        groups[top(place)].append(place)
    return dict(groups)
