"""The verb `data make-rewardbench`: some queries of each category become a benchmark, and stay out of training."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .. import jsonl
from ..excluded import Exclusions, Mark
from ..fingerprint import of_file, of_value
from ..ledger import Ledger
from ..media import digest
from ..queries import Category, Query, Split
from ..records import RankedQuery
from ..settings import alone, claim
from .rewardbench import CATEGORIES, BenchError, category_of

log = logging.getLogger(__name__)
MARKER, ITEMS, EXCLUDED = "rewardbench.json", "mm_reward_bench.jsonl", "excluded.jsonl"


def make_rewardbench(
    ranked: Path,
    out: Path,
    per_category: int = 10,
    seed: int = 0,
    media: Path | None = None,
    split: Split | None = None,
) -> None:
    """Draw a benchmark in the layout of MM-RLHF-RewardBench from ranked queries, and mark them for exclusion.

    The draw depends on the ids of the queries and the seed alone, not on the order of the file. No two queries share
    a picture, a film or a group. Every pair that a ranking makes is a row. Queries without a pair or a
    category, or with earlier turns, are left out and counted.

    Args:
        ranked: Ranked queries, one JSON object a line.
        out: Folder for mm_reward_bench.jsonl and excluded.jsonl; created when missing.
        per_category: How many queries are drawn from each category.
        seed: Of the draw.
        media: Folder of the media; with it, equal pictures under other names are known and excluded too.
        split: Draw only queries of this split; default: of any.
    """
    if per_category < 1:
        raise ValueError(f"per_category: expected 1 or more, got {per_category}")
    settings = {"ranked": of_file(ranked), "per_category": per_category, "seed": seed, "split": split}
    settings["media"] = media is not None
    ledger = Ledger("queries")
    fit = _fit(ranked, split, ledger)
    log.info("%s", ledger)
    drawn = draw(fit, per_category, seed, media)
    if not drawn:
        raise ValueError(f"{ranked}: expected queries that a benchmark can be made of, got none ({ledger})")
    for name in CATEGORIES:
        if (found := sum(one.category == name for one in drawn)) < per_category:
            log.warning("%s: %d queries were asked for, there are only %d", name, per_category, found)
    with alone(out):
        claim(out, MARKER, settings, "a benchmark")
        number = jsonl.write(out / ITEMS, (row for one in drawn for row in rows_of(one.record, one.category)))
        names = ({"id": one.record.query.id, "category": one.category} for one in drawn)
        jsonl.write(out / EXCLUDED, (name | one.mark.to_json() for name, one in zip(names, drawn, strict=True)))
    log.info("%s: %d pairs of %d queries", out / ITEMS, number, len(drawn))


class Drawn(NamedTuple):
    """A query of the benchmark."""

    category: Category
    record: RankedQuery
    mark: Mark


def _fit(ranked: Path, split: Split | None, ledger: Ledger) -> dict[Category, list[RankedQuery]]:
    """The queries that can be drawn, by category."""
    found: dict[Category, list[RankedQuery]] = {name: [] for name in CATEGORIES}
    for record in jsonl.read(ranked, RankedQuery.from_json, key=lambda row: row.query.id):
        ledger.took()
        try:
            found[_fitting(record, split)].append(record)
        except BenchError as error:
            ledger.skip(error.reason, record.query.id)
        else:
            ledger.gave()
    ledger.check()
    return found


def _fitting(record: RankedQuery, split: Split | None) -> Category:
    query = record.query
    if split is not None and query.split != split:
        raise BenchError(f"split: expected {split}, got {query.split}", "other_split")
    if query.system or query.history:
        raise BenchError("expected a prompt alone, got earlier turns, which the layout has no place for", "has_history")
    if not record.pairs():
        raise BenchError("expected two answers that can be compared, got none", "no_pairs")
    return category_of([medium.path for medium in query.media], query.category)


def draw(
    fit: Mapping[Category, Sequence[RankedQuery]], number: int, seed: int, media: Path | None = None
) -> list[Drawn]:
    """The first queries of each category in an order that hashes make, no two of which share a medium or a group."""
    drawn: list[Drawn] = []
    for category, records in fit.items():
        wanted = len(drawn) + number
        for record in sorted(records, key=lambda one: of_value([seed, one.query.id])):
            if len(drawn) == wanted:
                break
            mark = Mark.of(record.query, None if media is None else partial(digest, media))
            if not Exclusions([one.mark for one in drawn]).reason(mark):
                drawn.append(Drawn(category, record, mark))
    return drawn


def rows_of(record: RankedQuery, category: Category) -> list[dict[str, Any]]:
    """The pairs of a query as rows of the benchmark; `category` is added where the first folder does not tell it."""
    query = record.query
    row = {"id": query.id} | _media(query) | {"prompt": query.prompt}
    if not query.media or query.media[0].path.split("/")[0] != category:
        row["category"] = category
    rows = []
    for pair in record.pairs():
        better, worse = record.responses[pair.winner], record.responses[pair.loser]
        said = {"chosen": better.text, "rejected": worse.text}
        rows.append(row | said | {"chosen_reason": better.reason, "rejected_reason": worse.reason})
    return rows


def _media(query: Query) -> dict[str, Any]:
    """A path where there is one medium of a kind, a list where there are more; a film may be a folder of frames."""
    found: dict[str, Any] = {}
    for medium in query.media:
        found.setdefault(medium.kind, []).append(medium.path)
    return {kind: paths[0] if len(paths) == 1 else paths for kind, paths in found.items()}
