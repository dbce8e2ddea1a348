"""The bodies of requests: how much of them is in memory, of one and of all together, and how long they may take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from starlette.requests import Request

from .refusals import RefusedError

_PASSED_OVER = 4
"""Of a body that is too long so many times the limit is still taken in: a client that is writing hears nothing."""


class Body:
    """What a request holds, until it has been read.

    Args:
        bodies: Where it is counted.
    """

    def __init__(self, bodies: Bodies) -> None:
        self._bodies, self._data = bodies, bytearray()

    def add(self, chunk: bytes) -> None:
        """Keep more of it."""
        self._bodies.count(len(chunk))
        self._data += chunk

    @property
    def data(self) -> bytes:
        """All of it."""
        return bytes(self._data)

    def drop(self) -> None:
        """Keep it no longer."""
        self._bodies.held -= len(self._data)
        self._data = bytearray()


class Bodies:
    """Those that are in memory now.

    Args:
        most: Bytes of one.
        together: Bytes of all.
        seconds: In which one comes in.
    """

    def __init__(self, most: int, together: int, seconds: float) -> None:
        self.held, self._most, self._together, self._seconds = 0, most, together, seconds

    def count(self, size: int) -> None:
        """Take in so many bytes, or refuse to."""
        if self.held + size > self._together:
            raise RefusedError(
                f"expected at most {self._together:,} bytes in all requests that wait, got more; send fewer, or "
                "ask again in a while",
                429,
                "queue_full",
            )
        self.held += size

    @contextmanager
    def body(self) -> Iterator[Body]:
        """One that is counted until it is dropped, at the end at the latest."""
        body = Body(self)
        try:
            yield body
        finally:
            body.drop()

    async def fill(self, body: Body, request: Request, chunks: AsyncIterator[bytes]) -> None:
        """Take in the JSON that a request holds, which comes in chunks."""
        form = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if form != "application/json":  # which a page in a browser cannot send to another site unless allowed to
            raise RefusedError(f"Content-Type: expected application/json, got {form!r:.60}; say so in the header")
        size = 0
        async with self._in_time():
            async for chunk in chunks:
                size += len(chunk)
                if size > self._most:
                    await self._pass_over(chunks)
                    raise RefusedError(
                        f"expected at most {self._most:,} bytes, got more; send fewer or smaller pictures",
                        413,
                        "request_too_large",
                    )
                body.add(chunk)

    async def pass_over(self, chunks: AsyncIterator[bytes]) -> None:
        """Take in the rest of a body that is not wanted, within bounds: a client that writes hears no refusal."""
        async with self._in_time():
            await self._pass_over(chunks)

    async def _pass_over(self, chunks: AsyncIterator[bytes]) -> None:
        size = 0
        async for chunk in chunks:
            size += len(chunk)
            if size > _PASSED_OVER * self._most:
                return

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._seconds):
                yield
        except TimeoutError as error:
            message = f"expected the whole body within {self._seconds:g} seconds, got less; send smaller pictures"
            raise RefusedError(message, 408, "slow_body") from error
