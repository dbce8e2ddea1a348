"""Queries on their way to a model that scores every response: read in batches, written down in their order."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from .. import jsonl
from ..batches import PackedRows
from ..fingerprint import of_text
from ..ledger import Ledger
from ..parallel import follow_parent
from ..records import ResponseScore
from .admission import REJECTS, admit
from .collate import packed
from .indexing import ranked_of
from .manifest import Manifest
from .module import ScoredRows
from .reader import Shards
from .rows import Critiques
from .shards import REQUIRED
from .terms import EveryQuery

if TYPE_CHECKING:
    from ..queries import Split
    from ..records import RankedQuery
    from .reading import Reading
    from .scores import Scale


class Batch(NamedTuple):
    """Queries that are computed at once."""

    rows: ScoredRows
    numbers: tuple[int, ...]
    """Among the readable queries of their split."""
    tokens: int

    @property
    def names(self) -> list[str]:
        """What each query is called in a journal: its split and its place there."""
        split = self.rows.shards.split
        return [f"{split}/{self.rows.admission[number].sample}" for number in self.numbers]

    @property
    def responses(self) -> list[int]:
        """How many responses each query has."""
        return [len(self.rows.admission[number].scores) for number in self.numbers]


def chosen(folder: Path, splits: Sequence[Split] | None) -> list[Shards]:
    """The sets of these splits, or of all that there are."""
    known = Manifest.read(folder).samples
    if splits is not None and not splits:
        raise ValueError(f"splits: expected one or more of {', '.join(known)}, got none")
    return [Shards(folder, split) for split in (known if splits is None else dict.fromkeys(splits))]


def readable(shards: Shards, reading: Reading, cache: Path | None, workers: int, max_skipped: float) -> ScoredRows:
    """Every query of a split that can be read and encoded; the others are left out with a reason."""
    terms, encode = EveryQuery(), reading.encoder()
    cache = shards.folder / "admitted" if cache is None else cache
    made_with = reading.digests()
    admission = admit(
        shards, encode, terms, made_with, scores=None, cache=cache, workers=workers, max_skipped=max_skipped
    )
    return ScoredRows(shards, admission, encode, terms)


def planned(sets: Sequence[ScoredRows], most: int, separate: bool, written: int = 0) -> list[Batch]:
    """All queries in batches of similar length and at most so many tokens, or of one query; the longest come first.

    A lack of memory then shows at once. Where responses are computed `separate`, their prompt is counted with each.
    What will be `written` about a response is counted as the most that it can be.
    """
    found = []
    for rows in sets:
        sizes = []
        for number in range(len(rows)):
            admitted = rows.admission[number]
            responses = len(admitted.scores)
            sizes.append((admitted.tokens * (responses if separate else 1) + written * responses, number))
        batch: list[int] = []
        tokens = 0
        for size, number in sorted(sizes, key=lambda each: (-each[0], each[1])):
            if batch and tokens + size > most:
                found.append(Batch(rows, tuple(batch), tokens))
                batch, tokens = [], 0
            batch.append(number)
            tokens += size
        found.append(Batch(rows, tuple(batch), tokens))
    return sorted(found, key=lambda each: -each.tokens / len(each.numbers))


def unfinished(batches: Sequence[Batch], done: Container[str]) -> list[Batch]:
    """The batches in which a query is not done; a batch stays whole, so that its numbers stay the same."""
    return [batch for batch in batches if any(name not in done for name in batch.names)]


def loaded(batches: LaidOut, workers: int) -> Iterator[PackedRows]:
    """The batches in their order; reading begins now, before there are weights and threads that a fork would meet."""
    # Without `follow_parent` the workers would outlive a kill for seconds, and hold on to the locks of this process.
    return iter(DataLoader(batches, batch_size=None, num_workers=workers, worker_init_fn=_follow))


def _follow(_worker: int) -> None:
    follow_parent()


class LaidOut(Dataset[PackedRows]):
    """Batches by number, as a model takes them: one packed row per query."""

    def __init__(self, batches: Sequence[Batch], padding: int) -> None:
        self.batches, self.padding = batches, padding

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> PackedRows:
        batch = self.batches[number]
        return packed([item.row for item in batch.rows.__getitems__(list(batch.numbers))], self.padding)


@contextmanager
def in_memory(batch: Batch) -> Iterator[None]:
    """Name the batch for which there is no memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"batch_tokens: no memory for a batch of {len(batch.numbers)} queries with {batch.tokens:,} tokens; run "
            "again with fewer, or with fewer --frames for a single query"
        ) from error


def otherwise(batch: Batch, padding: int) -> tuple[list[PackedRows], PackedRows]:
    """The responses of a batch one at a time, and all of them in the opposite order."""
    rows = [item.row for item in batch.rows.__getitems__(list(batch.numbers))]
    alone = [packed([row._replace(continuations=(told,))], padding) for row in rows for told in row.continuations]
    return alone, packed([row._replace(continuations=row.continuations[::-1]) for row in reversed(rows)], padding)


def scored(
    sets: Sequence[ScoredRows], told: Mapping[str, Mapping[str, Any]], column: Scale, ledger: Ledger
) -> Iterator[ResponseScore]:
    """What was told of each query by name, as scores in the order of the samples; the ledger is told of all."""
    for rows in sets:
        ledger.took(len(rows.shards))
        for reason, number in rows.admission.ledger.skipped.items():
            for _ in range(number):
                ledger.skip(reason)
        for sample in (rows.admission[number].sample for number in range(len(rows))):
            ranked = ranked_of(jsonl.loads(rows.shards.parts(sample)[REQUIRED]))
            if without := _without_critique(rows, ranked):
                ledger.fixed("no_critique", without)
            row = told[f"{rows.shards.split}/{sample}"]
            if row.get("cut"):
                ledger.fixed("critique_cut", row["cut"])
            yield from _scores(ranked, row, column)
            ledger.gave()
    ledger.check()


def _scores(ranked: RankedQuery, told: Mapping[str, Any], column: Scale) -> Iterator[ResponseScore]:
    critiques = told.get("critiques") or [""] * len(ranked.responses)
    for place, (response, value, critique) in enumerate(zip(ranked.responses, told[column], critiques, strict=True)):
        known = {"reward": None, "reference_logp": None} | {column: value}
        digest = of_text(response.text)
        yield ResponseScore(ranked.query.id, place, digest, known["reward"], known["reference_logp"], critique)


def _without_critique(rows: ScoredRows, ranked: RankedQuery) -> int:
    """How many responses nobody criticised, where critiques are given; they are scored without one."""
    source = rows.encode.source if isinstance(rows.encode, Critiques) else "none"
    if source == "none":
        return 0
    names = source.split("_or_")
    return sum(not any(getattr(response, name) for name in names) for response in ranked.responses)


def left_out(sets: Sequence[ScoredRows]) -> list[dict[str, Any]]:
    """The queries that could not be read, each with its split, its place and its reason."""
    return [{"split": rows.shards.split} | row for rows in sets for row in jsonl.read(rows.admission.folder / REJECTS)]
