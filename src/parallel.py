"""Work for several processes whose results come in the order of the work, with little of it in memory."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


def processes_of(asked: int | None) -> int:
    """How many processes work: one per core, or as many as are asked for."""
    if asked is not None and asked < 1:
        raise ValueError(f"processes: expected one or more, got {asked}")
    return asked or os.cpu_count() or 1


def is_rank_zero() -> bool:
    """Whether this process is the first of a training, or alone, before there is a trainer to ask."""
    known = os.environ
    if "RANK" in known:  # torchrun
        return known["RANK"] == "0"
    if "LOCAL_RANK" in known or "NODE_RANK" in known:  # Lightning's own launcher, perhaps within a job of SLURM
        return known.get("NODE_RANK", "0") == known.get("LOCAL_RANK", "0") == "0"
    return known.get("SLURM_PROCID", "0") == "0"


@contextmanager
def workers(processes: int) -> Iterator[ProcessPoolExecutor | None]:
    """So many processes besides this one; for 1 there are none, and the work is done here."""
    if processes_of(processes) == 1:
        yield None
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=follow_parent) as pool:
        yield pool


def in_order(
    pool: ProcessPoolExecutor | None, function: Callable[..., T], calls: Iterable[tuple[Any, ...]], ahead: int = 8
) -> Iterator[T]:
    """Yield what `function` returns for each tuple of arguments; no more than `ahead` calls are under way.

    >>> with workers(1) as pool:
    ...     list(in_order(pool, max, [(1, 2), (4, 3)]))
    [2, 4]
    """
    if pool is None:
        yield from (function(*call) for call in calls)
        return
    waiting: deque[Future[T]] = deque()
    try:
        for call in calls:
            waiting.append(pool.submit(function, *call))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "expected all processes to live, but one died, often because the memory was used up; run again with fewer"
        ) from error


def follow_parent() -> None:
    """End this process once the one that started it is gone: after a kill it would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who is interrupted is the parent; it ends the others
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()
