"""Where requests come in: some are answered, some wait, and the rest is sent away at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from .asked import Choosing
from .bodies import Bodies
from .growing import Growing, Piece
from .reading import Reader
from .refusals import RefusedError
from .worker import Worker, ending

T = TypeVar("T")
_TOGETHER = 4
"""So many bodies of the largest size may be in memory."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Args:
        at_once: At most so many requests are answered together.
        waiting: At most so many more wait.
        seconds: Until its end, from its beginning.
        body: Bytes of a request.
        pictures: Of a conversation, frames of films among them.
        pixels: Of all pictures of a conversation together.
        tokens: Of an answer.
        responses: To be scored in a request.
        body_seconds: In which a body comes in.
    """

    at_once: int
    waiting: int
    seconds: float
    body: int
    pictures: int
    pixels: int
    tokens: int
    responses: int = 64
    body_seconds: float = 30


class Desk:
    """Gives every request a place, and its turn in the order in which they came.

    Args:
        worker: Who answers.
        limits: How many there may be.
    """

    def __init__(self, worker: Worker, limits: Limits) -> None:
        self.worker, self.limits = worker, limits
        self._turns = asyncio.Semaphore(limits.at_once)
        self._here, self._closed = 0, False
        self._reader = Reader()
        self.bodies = Bodies(limits.body, _TOGETHER * limits.body, limits.body_seconds)

    def close(self) -> None:
        """Let nobody in any more; who has a turn keeps it."""
        self._closed = True

    def stop(self) -> None:
        """End what still goes on."""
        self._reader.stop()

    def require_place(self) -> None:
        """Refuse whoever would get none."""
        if self._closed:
            raise ending()
        if self._here >= self.limits.at_once + self.limits.waiting:
            raise RefusedError(
                f"expected at most {self._here} requests at once, got more; send fewer, or ask again in a while",
                429,
                "queue_full",
            )

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for one request, or a refusal."""
        self.require_place()
        self._here += 1
        try:
            yield
        finally:
            self._here -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until few enough others are answered."""
        async with self._turns:
            if self._closed:
                raise ending()
            yield

    async def read(self, function: Callable[[], T]) -> T:
        """Run what takes a while and no model, apart from the loop."""
        found: T = await asyncio.wrap_future(self._reader.call(function))
        return found

    async def call(self, function: Callable[[Callable[[], bool]], T]) -> T:
        """Run what needs a model, and is given a question: whether anybody still waits for it.

        What it was called with was read without a fault, so no failure is the client's.
        """
        gone = threading.Event()
        try:
            found: T = await asyncio.wrap_future(
                self.worker.call(lambda: function(lambda: self.worker.alive and not gone.is_set()))
            )
        except ValueError as error:
            if isinstance(error, RefusedError):
                raise
            raise RuntimeError("the model failed") from error
        finally:
            gone.set()
        return found

    async def pieces(self, prompt: Any, choosing: Choosing, growing: Growing) -> AsyncGenerator[Piece, None]:  # noqa: ANN401
        """What an answer grows by, until its end; whoever stops before that closes it."""
        told: asyncio.Queue[Piece | RefusedError] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(what: Piece | RefusedError) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(told.put_nowait, what)

        key = self.worker.talk(prompt, choosing, growing, tell)
        try:
            while True:
                what = await told.get()
                if isinstance(what, RefusedError):
                    raise what
                yield what
                if what.finish:
                    return
        finally:
            self.worker.leave(key)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work as long as there is a client who waits for it."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
