"""Processes of this machine that do not outlive who started them; cells as such processes, a few at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from .cells import LOG
from .running import FOLLOW

_POLL, _GRACE = 0.05, 10.0
_GPUS = "CUDA_VISIBLE_DEVICES"


def run_local(folders: Sequence[Path], parallel: int) -> Iterator[Path]:
    """Run the cells of these folders, so many at once, and yield each when its process has ended.

    If the generator is closed before, by an interrupt or an error, what still runs is ended.
    """
    waiting, running = deque(folders), dict[int, tuple[Path, subprocess.Popen[bytes]]]()
    try:
        while waiting or running:
            for slot in set(range(parallel)) - set(running):
                if waiting:
                    folder = waiting.popleft()
                    words = [f"{__package__}.running", str(folder), FOLLOW]
                    with (folder / LOG).open("ab") as file:
                        running[slot] = folder, started(words, file, env=environment(slot, parallel, os.environ))
            time.sleep(_POLL)
            for slot, (folder, process) in list(running.items()):
                if has_ended(process):
                    _kill(process, signal.SIGKILL)  # what it may have left behind in its group
                    process.wait()
                    del running[slot]
                    yield folder
    finally:
        end_all([process for _, process in running.values()])


def environment(slot: int, parallel: int, known: Mapping[str, str]) -> dict[str, str]:
    """What a cell finds around it: its share of the cores and, where some are named, of the GPUs.

    >>> environment(1, 2, {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    {'OMP_NUM_THREADS': '3', 'CUDA_VISIBLE_DEVICES': '1,3'}
    """
    cores = len(os.sched_getaffinity(0))
    told = {"OMP_NUM_THREADS": str(max(1, cores // parallel))} | dict(known)
    gpus = [gpu for gpu in known.get(_GPUS, "").split(",") if gpu]
    if len(gpus) >= parallel:
        told[_GPUS] = ",".join(gpus[slot::parallel])
    return told


def started(
    words: Sequence[str], said: IO[bytes], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """A module of ours in a process group of its own; a pipe, which closes however this process ends, ties it to it.

    It calls `running.follow`; `said` gets what it says.
    """
    return subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-m", *words],
        stdin=subprocess.PIPE,
        stdout=said,
        stderr=said,
        env=env,
        cwd=cwd,
        start_new_session=True,
    )


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended; it is not waited for yet, so that its number stays its own."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill(process: subprocess.Popen[bytes], sent: signal.Signals) -> None:
    try:
        os.killpg(process.pid, sent)
    except ProcessLookupError:
        return


def end_all(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt all, give them time to leave in order, then end them, and what they left behind in their groups."""
    for process in processes:
        _kill(process, signal.SIGINT)
    until = time.monotonic() + _GRACE
    while time.monotonic() < until and not all(map(has_ended, processes)):
        time.sleep(_POLL)
    for process in processes:
        _kill(process, signal.SIGKILL)
        process.wait()
