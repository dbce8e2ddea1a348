"""What a cluster says before it takes the machine away: heard at any moment, obeyed where nothing is lost."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send some time before they kill; both mean: save, and go."""
REQUEUE = 75
"""The exit status of who went: sysexits.h calls it a temporary failure, of which the same command is the cure."""

_heard: list[str] = []  # a list, as signals belong to the process


class Preempted(SystemExit):
    """The process was told to go, and has saved what it did; of several ranks only the first exits with `REQUEUE`.

    Launchers take any other rank's status that is not 0 for a failure, and kill those that are still saving.
    """

    def __init__(self, first: bool) -> None:
        super().__init__(REQUEUE if first else 0)


def heard() -> str | None:
    """Which signal told this process to go, if one did."""
    return _heard[0] if _heard else None


def listen() -> None:
    """Take the signals from whoever has them."""
    if threading.current_thread() is threading.main_thread():  # no other may
        for number in SIGNALS:
            signal.signal(number, _note)


@contextmanager
def listening() -> Iterator[None]:
    """Hear the signals instead of dying of them; afterwards they mean again what they meant before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    listen()
    try:
        yield
    finally:
        _heard.clear()
        _restore(before)


@contextmanager
def passing_on(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Send the signals on to a process that does the work while this one waits."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, lambda received, _: process.send_signal(received))
    try:
        yield
    finally:
        _restore(before)


def _note(received: int, _: FrameType | None) -> None:
    _heard.append(signal.Signals(received).name)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)
