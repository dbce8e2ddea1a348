r"""JSON lines: what is read is checked, a file is written whole or not at all, and a journal survives kills.

Lines end at the byte `\n` and nowhere else, so a U+2028 or U+0085 inside a text does not break a row in two.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, overload

from .fields import reason_of
from .ledger import Ledger
from .strictjson import MAX_BYTES, JsonError, dumps, loads

__all__ = ["MAX_BYTES", "Journal", "JsonError", "Jsonable", "dumps", "loads", "read", "replacing", "write"]

T = TypeVar("T")
_DISCARD = 2**16  # bytes held at once while the rest of a line that is too long is passed over
_log = logging.getLogger(__name__)


class Jsonable(Protocol):
    """Whatever can say what it is as a JSON object."""

    def to_json(self) -> Mapping[str, Any]:
        """Return an object of plain values."""


@overload
def read(
    path: Path | str,
    parse: None = None,
    *,
    ledger: Ledger | None = None,
    key: Callable[[Any], str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Any]: ...


@overload
def read(
    path: Path | str,
    parse: Callable[[Any], T],
    *,
    ledger: Ledger | None = None,
    key: Callable[[T], str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Iterator[T]: ...


def read(
    path: Path | str,
    parse: Callable[[Any], Any] | None = None,
    *,
    ledger: Ledger | None = None,
    key: Callable[[Any], str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Any]:
    """Yield the rows of a file, one line in memory at a time, each through `parse`, which may refuse it.

    The first fault raises a `ValueError` that begins with `path:line:`. With a `ledger`, faulty rows are
    counted there and skipped instead, and so are rows that repeat an earlier one under the same `key`. Two
    different rows under one key are an error in any case. Blank lines are no rows.
    """
    with Path(path).open("rb") as file:
        yield from _rows(path, _lines(file, max_bytes), parse, ledger, key, max_bytes)


def write(path: Path | str, rows: Iterable[Mapping[str, Any] | Jsonable]) -> int:
    """Write a whole file in one step and return its number of rows; if `rows` fails, all stays as it was."""
    number = 0
    with replacing(path) as file:
        for number, row in enumerate(rows, 1):
            try:
                file.write(_line(row) + b"\n")
            except JsonError as error:
                raise JsonError(f"{path}: row {number}: {error}", error.reason) from error
    return number


@contextmanager
def replacing(path: Path | str) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of `path` when the block ends, and is gone when the block fails."""
    path = Path(path)
    draft = path.with_name(f"{path.name}.tmp")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def replace(path: Path | str, content: bytes) -> None:
    """Write a whole file of any kind in one step, in the place of what is there."""
    with replacing(path) as file:
        file.write(content)


class Journal:
    """A file that grows row by row and survives kills: open it again, skip what is `done`, and go on.

    A row is one write, so a kill leaves at worst an unfinished last line; opening cuts it off and tells its
    length in `dropped_bytes`. `key` is the name of a field, or a function of the row as it will be read.
    """

    def __init__(self, path: Path | str, key: str | Callable[[Any], str] = "id", *, sync_every: int = 64) -> None:
        if sync_every < 1:
            raise ValueError(f"sync_every: expected 1 row or more, got {sync_every}; 1 syncs every row")
        self.path = Path(path)
        self.done: set[str] = set()
        self.dropped_bytes = 0
        self._key = key
        self._sync_every = sync_every
        self._unsynced = 0
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            self._recover()
        except BaseException:
            self.close()
            raise

    def append(self, row: Mapping[str, Any] | Jsonable) -> None:
        """Write one row; once this returns, killing the process cannot take the row back."""
        if self._descriptor < 0:
            raise ValueError(f"{self.path}: expected an open journal, this one was closed; open it again")
        try:
            line = _line(row)
            name = _name(self._key, loads(line))
        except JsonError as error:
            raise JsonError(f"{self.path}: {error}", error.reason) from error
        if name in self.done:
            raise ValueError(f"{self.path}: expected a new row, got {name!r} again; skip what is in `done`")
        # Before the write: an interrupt in between costs one row made again, but never writes a row twice.
        self.done.add(name)
        try:
            self._write(line + b"\n")
        except OSError:
            self.done.discard(name)
            raise
        self._unsynced += 1
        if self._unsynced >= self._sync_every:
            os.fsync(self._descriptor)
            self._unsynced = 0

    def close(self) -> None:
        """Bring all rows to the disk and let the next writer in; closing again does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        try:
            os.fsync(descriptor)
        finally:
            # Closing alone would not unlock while a forked child still holds the descriptor.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self.path}: another process writes to it; let that end first, or write to another file"
            ) from error

    def _recover(self) -> None:
        """Collect the keys; only then, when all lines proved to be ours, cut off the unfinished one."""
        with os.fdopen(self._descriptor, "rb", closefd=False) as file:
            for row in _rows(self.path, self._finished(file), key=self._key):
                self.done.add(_name(self._key, row))
        if self.dropped_bytes:
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - self.dropped_bytes)
            _log.warning("%s: cut off an unfinished last row of %d bytes", self.path, self.dropped_bytes)
        os.fsync(self._descriptor)
        _sync_folder(self.path.parent)

    def _finished(self, file: IO[bytes]) -> Iterator[bytes]:
        for line in _lines(file, MAX_BYTES):
            if line.endswith(b"\n") or len(line) > MAX_BYTES:
                yield line
            else:
                self.dropped_bytes = len(line)

    def _write(self, line: bytes) -> None:
        written = os.write(self._descriptor, line)
        if written < len(line):  # the disk is full: half a row must not stay in front of the next one
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            found = f"only {written} of the {len(line)} bytes of a row could be written; free space, run again"
            raise OSError(errno.ENOSPC, found, str(self.path))


def _rows(
    path: Path | str,
    lines: Iterable[bytes],
    parse: Callable[[Any], Any] | None = None,
    ledger: Ledger | None = None,
    key: str | Callable[[Any], str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Any]:
    account = Ledger(str(path)) if ledger is None else ledger
    seen: dict[str, tuple[int, bytes]] = {}
    for number, raw in enumerate(lines, 1):
        line = raw.removesuffix(b"\n")
        marked = line.startswith(codecs.BOM_UTF8)
        if not line.removeprefix(codecs.BOM_UTF8).strip(b" \t\r"):
            continue
        account.took()
        try:
            value = loads(line, max_bytes=max_bytes)
            row = value if parse is None else parse(value)
            if key is not None:
                _refuse_known(seen, _name(key, row), value, number)
        except ValueError as error:
            reason = reason_of(error)
            if ledger is None or reason == "conflicting_key":
                raise JsonError(f"{path}:{number}: {error}", reason) from error
            account.skip(reason, f"{path}:{number}")
            continue
        if marked:
            account.fixed("bom")
        account.gave()
        yield row


def _lines(file: IO[bytes], max_bytes: int) -> Iterator[bytes]:
    """Yield lines with their newline; of one that is too long, yield enough to tell and skip the rest."""
    while line := file.readline(max_bytes + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(_DISCARD)


def _refuse_known(seen: dict[str, tuple[int, bytes]], name: str, value: object, number: int) -> None:
    digest = hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()
    line, known = seen.setdefault(name, (number, digest))
    if known != digest:
        found = f"got {name!r}, which line {line} has with other content; rename or remove one"
        raise JsonError(f"expected each key once, {found}", "conflicting_key")
    if line != number:
        raise JsonError(f"expected each key once, got {name!r} as in line {line}; remove one", "duplicate")


def _name(key: str | Callable[[Any], str], row: Any) -> str:  # noqa: ANN401 - whatever was parsed
    try:
        name: object = row[key] if isinstance(key, str) else key(row)
    except (LookupError, TypeError) as error:
        raise JsonError(f"expected a key in every row, got {error!r}; add the field", "missing_key") from error
    if not isinstance(name, str):
        raise JsonError(f"expected a text as key, got {name!r:.60}; write it as a text", "missing_key")
    return name


def _line(row: Mapping[str, Any] | Jsonable) -> bytes:
    line = dumps(dict(row if isinstance(row, Mapping) else row.to_json())).encode()
    if len(line) > MAX_BYTES:
        raise JsonError(f"expected at most {MAX_BYTES:,} bytes in a row, got {len(line):,}; split it", "too_large")
    return line


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
