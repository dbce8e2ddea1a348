"""Queries on their way to a model that scores every response: read in batches, written down in their order."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from .. import jsonl
from ..batches import PackedRows, moved
from ..fingerprint import Fingerprint, of_text
from ..ledger import Ledger
from ..parallel import follow_parent
from ..progress import bar
from ..records import ResponseScore
from .admission import REJECTS, admit
from .collate import packed
from .crossfit import SEEN, Told
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

log = logging.getLogger(__name__)
_WORDS: dict[Scale, str] = {"reference_logp": "log-probs", "reward": "rewards"}
Hears = Callable[["RankedQuery", Mapping[str, Any]], None]
"""What is given every query with what was told of it."""


class Said(Protocol):
    """What a model says of the responses of a batch, in their order."""

    @property
    def values(self) -> torch.Tensor:
        """A number for each."""

    @property
    def written(self) -> Sequence[tuple[str, int, int]]:
        """A critique of each, its tokens and how often it was cut; nothing where it wrote none."""


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


def planned(
    sets: Sequence[ScoredRows],
    most: int,
    separate: bool,
    written: int = 0,
    asked: Sequence[Sequence[int]] | None = None,
) -> list[Batch]:
    """All queries in batches of similar length and at most so many tokens, or of one query; the longest come first.

    A lack of memory then shows at once. Where responses are computed `separate`, their prompt is counted with each.
    What will be `written` about a response is counted as the most that it can be. Of each set, there may be numbers of
    the queries that are `asked` about; the others are left out.
    """
    found = []
    for rows, numbers in zip(sets, [range(len(rows)) for rows in sets] if asked is None else asked, strict=True):
        sizes = []
        for number in numbers:
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
        found += [Batch(rows, tuple(batch), tokens)] if batch else []
    return sorted(found, key=lambda each: -each.tokens / len(each.numbers))


def unfinished(batches: Sequence[Batch], done: Container[str]) -> list[Batch]:
    """The batches in which a query is not done; a batch stays whole, so that its numbers stay the same."""
    return [batch for batch in batches if any(name not in done for name in batch.names)]


def loaded(batches: LaidOut, workers: int) -> Iterator[PackedRows]:
    """The batches in their order; reading begins now, before a fork could meet this model's weights and threads."""
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


def compute(
    batches: Sequence[Batch],
    read: Iterator[PackedRows],
    journal: jsonl.Journal,
    column: Scale,
    device: torch.device,
    said: Callable[[PackedRows], Said],
    check: Callable[[Batch, PackedRows], None],
) -> None:
    """Write what a model says of all batches into the journal, query by query; the first batch is for `check`, too."""
    began, tokens = time.monotonic(), sum(batch.tokens for batch in batches)
    with bar() as progress, torch.inference_mode():
        task = progress.add_task("scoring tokens", total=tokens)
        for number, (batch, laid_out) in enumerate(zip(batches, read, strict=True)):
            with in_memory(batch):
                rows = moved(laid_out, device)
                if number == 0:
                    check(batch, rows)
                told = by_query(batch, said(rows), column)
            for row in told:
                if row["query"] not in journal.done:
                    journal.append(row)
            progress.advance(task, batch.tokens)
    log.info("scored %s tokens in %.1f s", f"{tokens:,}", time.monotonic() - began)


def by_query(batch: Batch, said: Said, column: Scale) -> list[dict[str, Any]]:
    """What a model says of each query's responses, as rows of a journal."""
    values = said.values.tolist()
    assert len(values) == sum(batch.responses), (len(values), batch.responses)
    every, written, found = iter(values), iter(said.written), []
    for name, number in zip(batch.names, batch.responses, strict=True):
        told = list(islice(every, number))
        if not all(map(math.isfinite, told)):
            raise ValueError(f"query {name}: expected finite {_WORDS[column]}, got {told}; check the weights, or dtype")
        texts, tokens, cut = zip(*islice(written, number), strict=True) if said.written else ((), (), ())
        critiques = {"critiques": list(texts), "written": sum(tokens), "cut": sum(cut)} if texts else {}
        found.append({"query": name, column: told} | critiques)
    return found


def is_there(out: Path, work: Path, made_from: Fingerprint) -> bool:
    """Whether the file is finished; one that was made from something else, or by somebody else, is kept."""
    if not out.exists():
        return False
    cure = "give another --out, or remove it"
    made_from.require(Fingerprint.read(out, cure), str(out), cure)
    log.info("%s: the scores are there already", out)
    if work.exists():  # a kill came between the last two things that are done
        shutil.rmtree(work)
    return True


def finish(out: Path, made_from: Fingerprint, sets: Sequence[ScoredRows], told: Told, heard: Hears) -> None:
    """Balance the account and write the file; last, for only then is it whole."""
    lost, ledger = left_out(sets), Ledger("score")
    if lost:
        jsonl.write(out.with_name(f"{out.name}.rejects.jsonl"), lost)
    made_from.write(out)  # scores without a fingerprint would be taken for those of another tool
    written = jsonl.write(out, scored(sets, told, ledger, heard))
    tokens = sum(row.get("written", 0) for row in told.values())
    log.info("%s; %s: %s responses, %s tokens of critiques", ledger, out, f"{written:,}", f"{tokens:,}")


def scored(sets: Sequence[ScoredRows], told: Told, ledger: Ledger, heard: Hears) -> Iterator[ResponseScore]:
    """What was told of each query by name, as scores in the order of the samples; ledger and `heard` get all of it."""
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
            heard(ranked, row)
            yield from _scores(ranked, row)
            ledger.gave()
    ledger.check()


def _scores(ranked: RankedQuery, told: Mapping[str, Any]) -> Iterator[ResponseScore]:
    nothing = [None] * len(ranked.responses)
    columns = [told.get(name, nothing) for name in ("reward", "reference_logp", "critiques", SEEN)]
    for place, (response, *known) in enumerate(zip(ranked.responses, *columns, strict=True)):
        reward, logp, critique, seen = known
        digest = of_text(response.text)
        yield ResponseScore(ranked.query.id, place, digest, reward, logp, critique or "", seen)


def _without_critique(rows: ScoredRows, ranked: RankedQuery) -> int:
    """How many responses nobody criticised, where critiques are given; they are scored without one."""
    if not isinstance(rows.encode, Critiques) or not rows.encode.judges:
        return 0
    return sum(not critique for critique in rows.encode.critiques(ranked))


def left_out(sets: Sequence[ScoredRows]) -> list[dict[str, Any]]:
    """The queries that could not be read, each with its split, its place and its reason."""
    return [{"split": rows.shards.split} | row for rows in sets for row in jsonl.read(rows.admission.folder / REJECTS)]
