"""Rows that wait in a file until somebody takes them: nothing is lost to a kill, and writing never waits."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .jsonl import JsonError, dumps, loads

_log = logging.getLogger(__name__)
Row = Mapping[str, Any]


class Spool:
    """A JSON-lines file that many may append to, while one at a time sends on what is in it.

    How far it was sent stands in a second file beside it. A kill in between sends rows twice, and loses none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sent = path.with_suffix(".sent")

    def append(self, row: Row) -> None:
        """Write one row; once this returns, killing the process cannot take it back."""
        with self._locked() as descriptor:
            size = os.fstat(descriptor).st_size
            torn = size and os.pread(descriptor, 1, size - 1) != b"\n"  # a kill left half a row in front of this one
            line = b"\n" * bool(torn) + dumps(dict(row)).encode() + b"\n"
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, "only a part of a row could be written; free space", str(self.path))

    def waiting(self) -> int:
        """How many bytes nobody has taken yet."""
        there = self.path.stat().st_size if self.path.exists() else 0
        return there - self._taken(there)

    def drain(self, send: Callable[[Sequence[Row]], None], at_once: int = 500) -> None:
        """Send all rows in their order; what `send` raises leaves those rows, and all behind them, for the next time.

        Waits while another process or thread drains.
        """
        if not self.waiting():
            return
        descriptor = os.open(self._sent, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            while not self._cut(descriptor):
                rows, end = self._next(at_once)
                if rows:
                    send(rows)
                self._note(descriptor, end)
        finally:
            os.close(descriptor)

    def _next(self, at_once: int) -> tuple[list[Row], int]:
        """Some rows from where the last drain ended, and where they end."""
        rows: list[Row] = []
        with self._locked() as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
            at = self._taken(os.fstat(descriptor).st_size)
            file.seek(at)
            for line in file:
                at += len(line)
                if line.strip():
                    try:
                        rows.append(loads(line))
                    except JsonError:  # appending mends only what comes behind it
                        _log.warning("%s: left out a row that a kill had cut off", self.path)
                if len(rows) == at_once:
                    break
        return rows, at

    def _cut(self, descriptor: int) -> bool:
        """Empty the file if all was sent; under the lock, so that no row comes in between."""
        with self._locked() as spool:
            size = os.fstat(spool).st_size
            if self._taken(size) < size:
                return False
            self._note(descriptor, 0)  # first: a kill between the two sends rows again, and loses none
            os.ftruncate(spool, 0)
            return True

    def _taken(self, size: int) -> int:
        """How many bytes were sent."""
        told = self._sent.read_text("ascii").strip() if self._sent.exists() else ""
        at = int(told) if told.isdigit() else 0
        return at if at <= size else 0

    def _note(self, descriptor: int, at: int) -> None:
        os.pwrite(descriptor, f"{at:<20}\n".encode(), 0)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)  # and with it the lock
