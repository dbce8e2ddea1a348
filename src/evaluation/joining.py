"""Rewards of single responses joined to ranked queries by id, place and text, every query accounted for."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import NamedTuple

from .. import jsonl
from ..fields import Fields
from ..fingerprint import ID_DIGITS, of_text
from ..ledger import Ledger
from ..queries import Split
from ..records import RankedQuery
from .rewardbench import BenchError, name_of
from .rewards import digest_of, number_of, reward_of, same_reward


class Opinion(NamedTuple):
    """What a file says of one response."""

    reward: float | None
    """None is an opinion that could not be read."""
    seen: float | None = None
    """The reward by a model that was trained on this query, where the other was not."""
    critique: str = ""


class Judged(NamedTuple):
    """A ranked query whose responses all have a reward."""

    ranked: RankedQuery
    rewards: tuple[float, ...]
    seen: tuple[float, ...] = ()
    """Rewards by a model that was trained on this query; empty unless every response has one."""
    critiques: tuple[str, ...] = ()
    """As the model wrote them, empty where it wrote none; one for each response, or none at all."""


def judged_queries(
    ranked: Path, scores: Path, split: Split | None, max_skipped: float
) -> tuple[list[Judged], list[Ledger]]:
    """The ranked queries of a split with their rewards, sorted by id, and the accounts of both files and the join."""
    records, elsewhere, read = _ranked(ranked, split)
    rows, joined = Ledger("scores"), Ledger("queries")
    opinions = read_opinions(scores, records, rows, elsewhere)
    found = join(records, opinions, joined)
    joined.check(max_skipped)
    return found, [read, rows, joined]


def _ranked(path: Path, split: Split | None) -> tuple[list[RankedQuery], set[str], Ledger]:
    """The queries of the split, the ids of all others, and their account."""
    ledger, records, elsewhere = Ledger("ranked"), [], set[str]()
    for record in jsonl.read(path, RankedQuery.from_json, key=lambda row: row.query.id):
        ledger.took()
        if split in (None, record.query.split):
            records.append(record)
            ledger.gave()
        else:
            elsewhere.add(record.query.id)
            ledger.skip("other_split", record.query.id)
    ledger.check()
    if not records:
        wanted = "ranked queries" if split is None else f"ranked queries of the split {split}"
        raise ValueError(f"{path}: expected {wanted}, got none ({ledger}); give another file or split")
    return sorted(records, key=lambda record: record.query.id), elsewhere, ledger


def read_opinions(
    path: Path, records: Sequence[RankedQuery], ledger: Ledger, elsewhere: Container[str] = frozenset()
) -> dict[tuple[str, int], Opinion]:
    """What a file says of the responses, by id and place; `elsewhere` has the ids that are known and not asked for.

    Rows that are malformed, or about nothing that is asked, are counted in the ledger. Two rewards of one response
    that differ are an error, for nothing says which one is meant.
    """
    if not path.is_file():
        raise ValueError(f"scores: expected a file of rewards, found none at {path}; check the path")
    known = {
        record.query.id: [of_text(response.text)[:ID_DIGITS] for response in record.responses] for record in records
    }
    found: dict[tuple[str, int], Opinion] = {}

    def take(row: object) -> None:
        fields = Fields(row, "score")
        name, place, digest = name_of(fields), fields.integer("response"), digest_of(fields)
        if name not in known:
            raise BenchError(
                f"id {name!r}: expected a query that is asked for, got another",
                "other_split" if name in elsewhere else "foreign_id",
            )
        if not 0 <= place < len(known[name]) or known[name][place] != digest:
            raise BenchError(
                f"id {name!r}: expected the text of response {place}, got another; score these", "other_text"
            )
        opinion = Opinion(reward_of(fields), _seen(fields), fields.text("critique", ""))
        _refuse_contradiction(name, place, found.setdefault((name, place), opinion), opinion)

    for _ in jsonl.read(path, take, ledger=ledger):
        pass
    ledger.check()
    if not found:
        raise ValueError(
            f"{path}: expected rewards of the {len(records):,} queries, got none that joins ({ledger}); "
            "give the file that was made from these queries, or another split"
        )
    return found


def _seen(fields: Fields) -> float | None:
    value = fields.optional("reward_seen")
    if value is not None and number_of(value) is None:
        raise BenchError(f"reward_seen: expected a finite number or null, got {value!r:.60}", "unreadable_reward")
    return number_of(value)


def _refuse_contradiction(name: str, place: int, before: Opinion, now: Opinion) -> None:
    if not (same_reward(before.reward, now.reward) and same_reward(before.seen, now.seen)):
        raise jsonl.JsonError(
            f"id {name!r}: expected one reward of response {place}, got two that differ; remove one", "conflicting_key"
        )


def join(records: Sequence[RankedQuery], opinions: dict[tuple[str, int], Opinion], ledger: Ledger) -> list[Judged]:
    """The queries all of whose responses have a reward; the others are counted with what they lack."""
    found = []
    for record in records:
        ledger.took()
        told = [opinions.get((record.query.id, place)) for place in range(len(record.responses))]
        known = [opinion for opinion in told if opinion is not None]
        rewards = [opinion.reward for opinion in known if opinion.reward is not None]
        if not known:
            ledger.skip("no_scores", record.query.id)
        elif len(known) < len(told):
            ledger.skip("score_missing", record.query.id)
        elif len(rewards) < len(known):
            ledger.skip("unreadable_reward", record.query.id)
        else:
            seen = tuple(opinion.seen for opinion in known if opinion.seen is not None)
            critiques = tuple(opinion.critique for opinion in known)
            found.append(Judged(record, tuple(rewards), seen if len(seen) == len(known) else (), critiques))
            ledger.gave()
    ledger.check()
    return found
