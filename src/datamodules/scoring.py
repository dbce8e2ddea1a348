"""Queries on their way to a model that scores every response: read in batches, written down in their order."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import Dataset

from .. import jsonl
from ..batches import PackedRows
from ..fingerprint import of_text
from ..ledger import Ledger
from ..records import ResponseScore
from .admission import REJECTS, admit
from .collate import packed
from .indexing import ranked_of
from .manifest import Manifest
from .module import ScoredRows
from .reader import Shards
from .shards import REQUIRED
from .terms import EveryQuery

if TYPE_CHECKING:
    from ..queries import Split
    from .reading import Reading


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


def planned(sets: Sequence[ScoredRows], most: int, separate: bool) -> list[Batch]:
    """All queries in batches of similar length and at most so many tokens, or of one query; the longest come first.

    A lack of memory then shows at once. Where responses are computed `separate`, their prompt is counted with each.
    """
    found = []
    for rows in sets:
        sizes = []
        for number in range(len(rows)):
            admitted = rows.admission[number]
            sizes.append((admitted.tokens * (len(admitted.scores) if separate else 1), number))
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


class LaidOut(Dataset[PackedRows]):
    """Batches by number, as a model takes them: one packed row per query."""

    def __init__(self, batches: Sequence[Batch], padding: int) -> None:
        self.batches, self.padding = batches, padding

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> PackedRows:
        batch = self.batches[number]
        return packed([item.row for item in batch.rows.__getitems__(list(batch.numbers))], self.padding)


def scored(sets: Sequence[ScoredRows], logps: Mapping[str, Sequence[float]], ledger: Ledger) -> Iterator[ResponseScore]:
    """The log-probs by name as scores, in the order of the samples; the ledger is told of every query."""
    for rows in sets:
        ledger.took(len(rows.shards))
        for reason, number in rows.admission.ledger.skipped.items():
            for _ in range(number):
                ledger.skip(reason)
        for sample in (rows.admission[number].sample for number in range(len(rows))):
            ranked = ranked_of(jsonl.loads(rows.shards.parts(sample)[REQUIRED]))
            found = logps[f"{rows.shards.split}/{sample}"]
            for place, (response, logp) in enumerate(zip(ranked.responses, found, strict=True)):
                yield ResponseScore(ranked.query.id, place, of_text(response.text), reference_logp=logp)
            ledger.gave()
    ledger.check()


def left_out(sets: Sequence[ScoredRows]) -> list[dict[str, Any]]:
    """The queries that could not be read, each with its split, its place and its reason."""
    return [{"split": rows.shards.split} | row for rows in sets for row in jsonl.read(rows.admission.folder / REJECTS)]
