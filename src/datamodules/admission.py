"""Which samples are trained on, decided once, before any weight is loaded, and kept beside the shards.

Every sample is read, checked, encoded and joined with its scores; what cannot be used is left out with a reason.
So the number of samples is known, an epoch has no surprise, and no batch ever shrinks: whatever fails later is an
error. What is kept is small and read by position, so that memory does not grow with the data.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import struct
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .. import jsonl
from ..fields import reason_of
from ..fingerprint import ID_DIGITS, of_file, of_value
from ..ledger import Ledger
from ..progress import track
from ..records import DIMENSIONS
from ..settings import write_json
from .reader import Sample, Shards
from .rows import Row
from .scores import NOTHING, Scored, Scores, require_scores
from .terms import EveryQuery, Terms

log = logging.getLogger(__name__)
_ROW = struct.Struct("<IIQI")
_ROW_TYPE = np.dtype([("sample", "<u4"), ("tokens", "<u4"), ("first", "<u8"), ("responses", "<u4")])
_VALUES = struct.Struct("<dd")
_BATCH = 16
_PAIRS, _TIES, _SUPERVISED = "pairs", "ties", "supervised"
_RECORD, REJECTS = "plan.json", "rejects.jsonl"
_FORMAT = 3
"""Of the files of an admission: what was written in another is made again."""
assert _ROW.size == _ROW_TYPE.itemsize


class Admitted(NamedTuple):
    """One sample that is trained on."""

    sample: int
    tokens: int
    scores: tuple[tuple[float, float], ...]
    """Reward and reference log-prob of each response that the row holds."""


class _Judged(NamedTuple):
    """What admission found of one sample."""

    sample: int
    id: str
    tokens: int
    asks: Counter[str]
    """How much of each kind it asks of a model: see `_asked`."""
    scores: list[tuple[float, float]]
    mended: dict[str, int]
    dropped: list[int]
    """The places of the responses that are left out for their length."""
    reason: str
    message: str


class Admission:
    """The samples of a split that are trained on, by number, read from the disk one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        record = jsonl.loads((folder / _RECORD).read_bytes())
        self.n: int = record["samples"]
        self.digest: str = record["digest"]
        """What stands for the samples that are used, their rows and their scores."""
        means: dict[str, float] = record["means"]
        """Of what a query asks of a model."""
        self.mean_pairs, self.mean_ties = means[_PAIRS], means[_TIES]
        self.mean_supervised = means[_SUPERVISED]
        """Of responses of which something is learned: all answers, and those that have a critique."""
        self.mean_scores = {name: means[name] for name in DIMENSIONS}
        """Of annotated scores by dimension."""
        self.ledger = Ledger.from_dict(record["ledger"])
        """Of the queries."""
        self.said = Ledger.from_dict(record["said"])
        """Of the responses of the queries that are used."""
        self._files: list[int] = []
        sizes = {"rows": self.n * _ROW.size, "scores": record["responses"] * _VALUES.size}
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            raise ValueError(f"{folder}: expected files of {sizes} bytes, got others; remove it and start again")

    def __getitem__(self, number: int) -> Admitted:
        if not 0 <= number < self.n:
            raise IndexError(f"{self.folder}: expected a number from 0 to {self.n - 1}, got {number}")
        if not self._files:
            self._files = [os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC) for name in ("rows", "scores")]
        rows, scores = self._files
        sample, tokens, first, responses = _ROW.unpack(os.pread(rows, _ROW.size, number * _ROW.size))
        data = os.pread(scores, responses * _VALUES.size, first * _VALUES.size)
        return Admitted(sample, tokens, tuple(_VALUES.iter_unpack(data)))

    def costs(self, numbers: Any) -> Any:  # noqa: ANN401 - arrays
        """The lengths of these samples in tokens."""
        return np.memmap(self.folder / "rows", _ROW_TYPE, mode="r")["tokens"][numbers]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": []}

    def __del__(self) -> None:
        for file in getattr(self, "_files", []):
            os.close(file)


def admit(
    shards: Shards,
    encode: Callable[[Sample], Row],
    terms: Terms | EveryQuery,
    made_with: Mapping[str, Any],
    *,
    scores: Scores | None,
    cache: Path,
    workers: int,
    max_skipped: float,
    chosen: Sequence[int] | None = None,
) -> Admission:
    """Decide what is trained on, or find what was decided before with the same data, encoding, terms and scores.

    Where some samples are `chosen`, the others are held out: they are counted, and not judged.
    """
    identity = {"format": _FORMAT, "data": shards.digest, "terms": dataclasses.asdict(terms)} | dict(made_with)
    identity |= {} if chosen is None else {"chosen": of_value(list(chosen))}
    samples = range(len(shards)) if chosen is None else chosen
    folder = cache / f"{shards.split}-{of_value(identity)[:ID_DIGITS]}"
    if not (folder / _RECORD).exists():
        if scores is not None:
            require_scores(shards, scores, encode, samples)
        _write(folder, identity, _judged(_Judging(shards, encode, terms, scores, samples), workers))
    found = Admission(folder)
    try:
        for ledger in (found.ledger, found.said):
            log.info("%s", ledger)
            # One of a small split is more than its part, and yet only one.
            ledger.check(max(max_skipped, 1 / max(ledger.taken, 1)) if max_skipped else 0.0)
    except ValueError as error:
        named = f"{folder / REJECTS} names each; after a repair remove {folder}, so that it is decided anew"
        raise ValueError(f"{error}; {named}") from error
    if not found.n:
        raise ValueError(f"{shards.folder}: none of {len(samples):,} {shards.split} queries can be used; see {folder}")
    if held := len(shards) - len(samples):
        found.ledger.merge(Ledger(found.ledger.stage, taken=held, skipped={"held_out": held}))
        log.info("with what is held out, %s", found.ledger)
    return found


class _Judging(Dataset[_Judged]):
    """Judges samples by number, in the processes of a loader."""

    def __init__(
        self,
        shards: Shards,
        encode: Callable[[Sample], Row],
        terms: Terms | EveryQuery,
        scores: Scores | None,
        samples: Sequence[int],
    ) -> None:
        self.shards, self.encode, self.terms, self.scores, self.samples = shards, encode, terms, scores, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> _Judged:
        index = self.samples[place]
        name = f"sample {index}"
        try:
            sample = self.shards[index]
            name = sample.ranked.query.id
            row, mended = self.terms.apply(self.encode(sample))
        except ValueError as error:
            return _Judged(index, name, 0, Counter(), [], {}, [], reason_of(error), str(error))
        known = (
            self.scores.of(sample.ranked)
            if self.scores
            else [Scored("", NOTHING, NOTHING)] * len(sample.ranked.responses)
        )
        assert known is not None, name  # it was there a moment ago
        kept = [(known[place].reward, known[place].reference_logp) for place in row.places]
        dropped = sorted(set(range(len(known))) - set(row.places))
        return _Judged(index, name, row.tokens, _asked(row, self.terms), kept, dict(mended), dropped, "", "")


def _asked(row: Row, terms: Terms | EveryQuery) -> Counter[str]:
    """Count the pairs, the ties, the responses of which something is learned, and the scores by dimension."""
    asks = Counter({_PAIRS: len(row.ranked.pairs(terms.pairs)), _TIES: len(row.ranked.ties())})
    asks[_SUPERVISED] = sum(len(told.supervised) > 0 for told in row.continuations)
    given = (name for response in row.ranked.responses for name, score in response.scores.items() if score is not None)
    return asks + Counter(given)


def _judged(judging: _Judging, workers: int) -> Iterator[_Judged]:
    loader: DataLoader[Any] = DataLoader(
        judging,
        batch_size=_BATCH,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # a run that finds it decided must not draw other random numbers afterwards
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors of one sample are too small to be shared out
    try:
        batches = iter(loader)  # starts the workers, before there are threads of the display that a fork would cut
        for batch in track(batches, f"admitting {judging.shards.split}", total=len(loader)):
            yield from batch
    finally:
        torch.set_num_threads(threads)


def _write(folder: Path, identity: Mapping[str, Any], judged: Iterator[_Judged]) -> None:
    """Write an admission under a passing name; another process may be first, with the same."""
    # No process number: those of several machines may share a folder, and be equal.
    draft = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise ValueError(
            f"cache: expected a folder that can be written to, got {folder.parent} ({error.strerror}); set `cache` to "
            "another folder"
        ) from error
    try:
        record = _fill(draft, judged)
        contents = {name: of_file(draft / name) for name in ("rows", "scores")}
        digest = of_value({"identity": dict(identity)} | contents)
        write_json(draft / _RECORD, {"digest": digest, "identity": dict(identity)} | record)
        try:
            draft.replace(folder)
        except OSError as error:
            if not (folder / _RECORD).exists():
                found = "got other files; remove it and start again"
                raise ValueError(f"{folder}: expected a finished admission or nothing, {found}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fill(draft: Path, judged: Iterator[_Judged]) -> dict[str, Any]:
    """Write rows, scores and what was left out, and return the account of it."""
    ledger, said, rejects, asks = Ledger("admission"), Ledger("responses"), [], Counter[str]()
    with (draft / "rows").open("wb") as rows, (draft / "scores").open("wb") as scores:
        for item in judged:
            ledger.took()
            if item.reason:
                ledger.skip(item.reason, item.id)
                rejects.append({"sample": item.sample} | {x: getattr(item, x) for x in ("id", "reason", "message")})
                continue
            ledger.gave()
            for kind, number in item.mended.items():
                ledger.fixed(kind, number)
            rows.write(_ROW.pack(item.sample, item.tokens, said.given, len(item.scores)))
            scores.write(b"".join(_VALUES.pack(*pair) for pair in item.scores))
            said.took(len(item.scores) + len(item.dropped))
            said.gave(len(item.scores))
            for place in item.dropped:
                said.skip("too_long", f"{item.id}, response {place}")
                rejects.append({"sample": item.sample, "id": item.id, "response": place, "reason": "response_too_long"})
            asks += item.asks
        for file in (rows, scores):
            file.flush()
            os.fsync(file.fileno())
    ledger.check()
    said.check()
    jsonl.write(draft / REJECTS, rejects)
    counts = {"samples": ledger.given, "responses": said.given, _PAIRS: asks[_PAIRS], _TIES: asks[_TIES]}
    means = {kind: asks[kind] / max(ledger.given, 1) for kind in (_PAIRS, _TIES, _SUPERVISED, *DIMENSIONS)}
    return counts | {"means": means, "ledger": ledger.as_dict(), "said": said.as_dict()}
