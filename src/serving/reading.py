"""The one thread that reads what is asked, apart from the loop: tokenizers and processors are not made for several."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any


class Reader:
    """The thread and what waits for it; an end of the process does not wait for either."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="reading", daemon=True).start()

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Let a function run after those that came before it, unless whoever asked is gone by then."""
        future: Future[Any] = Future()
        self._calls.put((future, function))
        return future

    def stop(self) -> None:
        """End after what was asked for."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            answer(*call)
            del call  # it holds a body


def answer(future: Future[Any], function: Callable[[], Any]) -> None:
    """Run a function that is still waited for, and tell what it gives or raises."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
        future.set_exception(error)
