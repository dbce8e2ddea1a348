"""The verb `pack`: ranked queries and their media become verified shards, whatever interrupts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from .. import jsonl
from ..clip import DEFAULT_MODEL, ClipEncoder
from ..excluded import Exclusions, Mark
from ..fingerprint import of_file, of_value
from ..ledger import Ledger
from ..media import digest
from ..parallel import in_order, processes_of, workers
from ..progress import bar, track
from ..queries import Media, Split
from ..records import RankedQuery
from ..settings import alone, claim, differing
from .manifest import NAME, Manifest, finish
from .parts import Limits, Part, PartWriter, finished_parts, remove_records
from .payload import Features, Making, Payload, Reject, add_features, make_all
from .splits import SPLITS, Belongs, assign
from .tally import Tally

log = logging.getLogger(__name__)
MARKER = "pack.json"
CHUNK = 16
"""Queries that are made, and whose features are computed, at once; from the number 0, so that a continued run has
the same chunks, and so the same bytes."""


def pack(
    ranked: Path,
    media: Path,
    out: Path,
    num_frames: int = 10,
    max_side: int = 2304,
    queries_per_shard: int = 1000,
    megabytes_per_shard: int = 256,
    val: float = 0.02,
    test: float = 0.02,
    exclude: Path | None = None,
    clip: Path | None = None,
    clip_model: str = DEFAULT_MODEL,
    processes: int | None = None,
    max_skipped: float = 0.01,
) -> None:
    """Pack ranked queries and their media into verified WebDataset shards.

    Run again with the same settings, it continues where it was stopped; a finished set is left as it is. The same
    data and settings give the same bytes, whatever the number of processes.

    Args:
        ranked: Ranked queries, one JSON object a line.
        media: The folder in which the media of the queries lie.
        out: Folder of the shards; created when missing.
        num_frames: How many evenly spread frames are kept of a film.
        max_side: The longer side of a picture, in pixels; a larger one is scaled down.
        queries_per_shard: A shard holds at most so many queries.
        megabytes_per_shard: A shard is closed as soon as it has that size.
        val: Part of the queries without a split that is kept for validation.
        test: Part of the queries without a split that is kept for tests.
        exclude: Queries that must stay out, with all that shares a picture (`mmrlhf data make-rewardbench`).
        clip: Weights of a CLIP model; its features of each picture and each film's first frame are then kept too.
        clip_model: The architecture of these weights, as open_clip names it.
        processes: How many processes read media; default: one per core.
        max_skipped: The part of the queries that may be left out, each for a reason that is named.
    """
    limits = {"num_frames": num_frames, "max_side": max_side}
    limits |= {"queries_per_shard": queries_per_shard, "megabytes_per_shard": megabytes_per_shard}
    processes = processes_of(processes)
    _require_positive(limits)
    settings = limits | {"val": val, "test": test, "ranked": _digest_of(ranked)}
    settings |= {"exclude": None if exclude is None else of_file(exclude)}
    settings |= {"clip": None if clip is None else f"{clip_model} {of_file(clip)}"}
    if _is_there(out, settings):
        return
    encoder = None if clip is None else ClipEncoder(clip, clip_model)
    plan = _plan(ranked, media, val, test, exclude, processes)
    with alone(out):
        settings["media"] = plan.media_digest
        claim(out, MARKER, settings, "shards")
        full = Limits(queries_per_shard, megabytes_per_shard * 2**20)
        making = Making(media, num_frames, max_side)
        parts = _pack_splits(plan, ranked, out, making, full, encoder, processes)
        _finish(out, parts, settings, plan, max_skipped)
        remove_records(out)


def _require_positive(values: Mapping[str, int]) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}: expected one or more, got {value}")


def _digest_of(ranked: Path) -> str:
    if not ranked.is_file():
        raise ValueError(f"ranked: expected a file of ranked queries, got {ranked}; check the path")
    return of_file(ranked)


def _is_there(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the set is finished; one of something else is refused. Its media, which may be gone, are not read."""
    if not (out / NAME).exists():
        return False
    if other := differing(Manifest.read(out).settings, settings):
        raise ValueError(f"{out}: holds shards with {other}; give another --out, or remove it")
    log.info("%s: the shards are there already", out)
    remove_records(out)
    return True


class _Plan(NamedTuple):
    """What is known before anything is packed."""

    splits: list[Split | None]
    """Of each query, in the order of the file; None where it is excluded."""
    excluded: list[Reject]
    media_digest: str
    """Of all media: a changed picture is another data set."""


def _plan(ranked: Path, root: Path, val: float, test: float, exclude: Path | None, processes: int) -> _Plan:
    """Read all queries and hash all media once, to know who is tied to whom."""
    if not root.is_dir():
        raise ValueError(f"media: expected a folder, got {root}")
    found = [(row.query.id, row.query.group, row.query.media, row.query.split) for row in _rows(ranked)]
    if not found:
        raise ValueError(f"{ranked}: expected ranked queries, found none; check the file")
    media = list({medium.path: medium for _, _, of_query, _ in found for medium in of_query}.values())
    with ThreadPoolExecutor(processes) as pool:
        hashes = pool.map(lambda medium: _digest(root, medium), media)
        digests = {
            medium.path: digest
            for medium, digest in track(zip(media, hashes, strict=True), "hashing media", total=len(media))
        }
    excluded = {} if exclude is None else _excluded(ranked, Exclusions.read(exclude), digests)
    belongs = [
        Belongs(name, (*([f"group {group}"] if group else []), *(digests[medium.path] for medium in of_query)), split)
        for name, group, of_query, split in found
        if name not in excluded
    ]
    if not belongs:
        raise ValueError(f"{ranked}: expected queries that are not excluded, got {len(excluded)} that all are")
    assigned = iter(assign(belongs, val, test))
    splits = [None if name in excluded else next(assigned) for name, *_ in found]
    return _Plan(splits, list(excluded.values()), of_value(digests))


def _excluded(ranked: Path, kept_out: Exclusions, digests: Mapping[str, str]) -> dict[str, Reject]:
    """The queries that must stay out, by their ids."""
    found = {}
    for row in _rows(ranked):
        reason = kept_out.reason(Mark.of(row.query, lambda medium: digests[medium.path].removeprefix("media ")))
        if reason:
            told = f"query {row.query.id!r}: its {reason} is in the file of exclusions"
            found[row.query.id] = Reject(row.query.id, "excluded", told)
    return found


def _rows(ranked: Path) -> Iterator[RankedQuery]:
    return jsonl.read(ranked, RankedQuery.from_json, key=lambda row: row.query.id)


def _digest(root: Path, medium: Media) -> str:
    """What a medium is known by; one that cannot be read is known by its name, and left out with a reason later."""
    try:
        return f"media {digest(root, medium)}"
    except (ValueError, OSError):
        return f"path {medium.path}"


def _pack_splits(
    plan: _Plan, ranked: Path, out: Path, making: Making, full: Limits, features: Features | None, processes: int
) -> dict[Split, list[Part]]:
    """Pack one split after the other, each from where an earlier run got to."""
    parts = {split: finished_parts(out, split) for split in SPLITS}
    with bar() as progress, workers(processes) as pool:
        task = progress.add_task("packing", total=len(plan.splits))
        for split in SPLITS:
            writer = PartWriter(out, split, parts[split], full)
            progress.advance(task, writer.through)
            if writer.through == plan.splits.count(split):
                continue
            try:
                # Whole chunks, from the start of the one at hand: its features come out as they would have.
                at = first = writer.through - writer.through % CHUNK
                chunks = ((chunk, making) for chunk in _chunks(ranked, plan.splits, split, first))
                for made in in_order(pool, make_all, chunks, ahead=2 * processes):
                    if features is not None:
                        add_features([item for item in made if isinstance(item, Payload)], features)
                    for item in made:
                        if at >= writer.through:
                            writer.put(item)
                            progress.advance(task)
                        at += 1
                writer.close_part()
            finally:
                writer.abandon()
    return parts


def _chunks(
    ranked: Path, splits: Sequence[Split | None], split: Split, first: int
) -> Iterator[list[tuple[RankedQuery, Split]]]:
    """The queries of one split from a number on, in the order of the file, some at a time."""
    of_split = ((row, split) for row, where in zip(_rows(ranked), splits, strict=True) if where == split)
    rows = islice(of_split, first, None)
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def _finish(
    out: Path, parts: Mapping[Split, Sequence[Part]], settings: Mapping[str, Any], plan: _Plan, max_skipped: float
) -> None:
    """Balance the account, write what was left out, and then the manifest."""
    every = [part for of_split in parts.values() for part in of_split]
    ledger = Ledger("pack")
    for part in every:
        ledger.merge(part.ledger)
    rejects = [*(reject for part in every for reject in part.rejects), *plan.excluded]
    jsonl.write(out / "rejects.jsonl", (reject._asdict() for reject in rejects))
    ledger.check(max_skipped)  # without what was asked to stay out
    ledger.took(len(plan.excluded))
    for reject in plan.excluded:
        ledger.skip(reject.reason, reject.id)
    log.info("%s", ledger)
    ledger.check()
    assert ledger.taken == len(plan.splits), (ledger.taken, len(plan.splits))
    counts: dict[str, dict[str, Any]] = {}
    for split, of_split in parts.items():
        tally = Tally()
        for part in of_split:
            tally.merge(part.tally)
        counts[split] = tally.as_dict()
    shards = [part.shard for part in every if part.shard is not None]
    if not shards:
        raise ValueError(f"{out}: every query was left out; see {out / 'rejects.jsonl'}")
    finish(out, shards, counts, settings, ledger.as_dict())
