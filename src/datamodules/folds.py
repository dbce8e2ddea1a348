"""Which fold a training query is in: whatever shares a picture, a film, a group or its words is in one.

A fold follows from a hash, so that another order of the files changes nothing. Only records and indices are read;
the bytes of media are known by their length and their CRC.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np

from .. import jsonl
from ..excluded import Mark
from ..fingerprint import of_file, of_text, of_value
from ..folds import Fold
from . import extended
from .indexing import ranked_of
from .reader import PICTURES, Shards
from .shards import REQUIRED
from .splits import connected
from .tars import BLOCK, ShardError, padding, split_name

_UNREADABLE = (ValueError, KeyError, TypeError, tarfile.TarError)
"""What a damaged sample, or one that is no ranked query, can raise."""


def assigned(ties: Sequence[Sequence[str]], of: int) -> list[int]:
    """The fold of each query, by what ties it to others; one that is tied to none has a name of its own.

    >>> folds = assigned([["a"], ["b"], ["a", "c"], ["c"]], of=5)
    >>> folds[0] == folds[2] == folds[3]
    True
    """
    folds = [0] * len(ties)
    for members in connected(ties).values():
        name = min(tie for member in members for tie in ties[member])
        # With the word before it, for the hash of a tie alone decided the split.
        fold = int(of_text(f"fold {name}")[:13], 16) * of // 16**13
        for member in members:
            folds[member] = fold
    return folds


def folds_of(shards: Shards, of: int) -> list[int]:
    """The fold of every sample."""
    return assigned(list(_ties(shards)), of)


def digest_of(folds: Sequence[int]) -> str:
    """What stands for which sample is in which fold."""
    return of_value(list(folds))


def kept(shards: Shards, fold: Fold) -> list[int]:
    """The samples that are left where a fold is held out; folds of which one is empty are refused."""
    ties = list(_ties(shards))
    folds = assigned(ties, fold.of)
    if empty := sorted({*range(fold.of)} - {*folds}):
        raise ValueError(
            f"fold.of: expected queries in each of {fold.of} folds of {shards.folder}, got none in {empty}: there are "
            f"{len(connected(ties)):,} groups of queries that share nothing; choose fewer folds"
        )
    return [sample for sample, number in enumerate(folds) if number != fold.out]


def _ties(shards: Shards) -> Iterator[tuple[str, ...]]:
    """What ties every sample to others."""
    at = 0
    for name in shards.names:
        rows = _index(shards, name)
        with (shards.folder / f"{name}.tar").open("rb") as file:
            for members in np.split(rows, np.flatnonzero(np.diff(rows["sample"])) + 1):
                try:
                    yield _ties_of(file, members)
                except _UNREADABLE:
                    yield (f"sample {at}",)  # nobody can train on it, and when it is judged it has its reason
                at += 1
    assert at == len(shards), (at, len(shards))


def _index(shards: Shards, name: str) -> np.ndarray[Any, Any]:
    """The rows of a shard's members, as they were when the manifest was written."""
    path = shards.folder / f"{name}.idx.npy"
    if not path.is_file() or of_file(path) != shards.manifest.entry(name).index_sha256:
        found = "another" if path.is_file() else "no file"
        message = f"{path}: expected the index of the manifest, got {found}; copy it again"
        raise ShardError(message, "index_changed")
    rows: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
    return rows


def _ties_of(file: IO[bytes], members: np.ndarray[Any, Any]) -> tuple[str, ...]:
    """Texts that another query has, too, if it shares a medium, the group or, where there are no media, the words."""
    found = {_suffix(_read(file, row["offset"] - row["header"], row["header"])): row for row in members}
    record = found[REQUIRED]
    data = _read(file, record["offset"], record["length"])
    if zlib.crc32(data) != record["crc32"]:
        raise ValueError("a damaged record")
    row = jsonl.loads(data)
    query = ranked_of(row).query
    mark = Mark.of(query)
    media = [f"medium {known}" for known in _media(row, found)] if query.media else [f"question {mark.question}"]
    return (f"id {query.id}", *media, *([f"group {mark.group}"] if mark.group else []))


def _media(row: Mapping[str, Any], found: Mapping[str, np.ndarray[Any, Any]]) -> list[str]:
    """What each medium is known by; in a shard made elsewhere nobody tells which pictures are one film."""
    pictures = [[name] for name in found if name.rpartition(".")[2] in PICTURES]
    groups = [entry["names"] for entry in row["members"]] if "members" in row else pictures
    return [" ".join(f"{found[name]['length']}-{found[name]['crc32']}" for name in group) for group in groups]


def _suffix(headers: bytes) -> str:
    """What a member is of its sample, by the headers before its bytes."""
    named, at = "", 0
    while True:
        info = tarfile.TarInfo.frombuf(headers[at : at + BLOCK], "utf-8", "surrogateescape")
        at += BLOCK
        if info.type not in extended.TYPES:
            return split_name(named or info.name)[1]
        named = extended.long_name(info.type, headers[at : at + info.size]) or named
        at += info.size + padding(info.size)


def _read(file: IO[bytes], offset: int, length: int) -> bytes:
    return os.pread(file.fileno(), int(length), int(offset))
