"""The socket and the loop of a server: taken before models are loaded, and left within seconds."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

GRACE = 10
"""Seconds in which running answers may end after the server was told to."""


def listen(host: str, port: int) -> socket.socket:
    """Take a port now: whoever comes while models are loaded waits."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, proto)
        # Otherwise the port cannot be had for a minute after a server has ended.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen()
    except OSError as error:
        raise ValueError(
            f"port: expected to listen at {host}, port {port}, which cannot be had ({error.strerror or error}); end "
            "what listens there, or give another --port or --host"
        ) from error
    return taken


def loop_of(app: ASGIApp, leaving: Callable[[], None], connections: int | None = None) -> uvicorn.Server:
    """What serves until SIGINT or SIGTERM; `leaving` is called then, before connections are closed.

    Where there are more connections than these, requests are refused with 503.
    """
    # No log of its own: it would hold whatever clients send.
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=connections,
        timeout_graceful_shutdown=GRACE + 2,
    )
    return _Server(config, leaving)


class _Server(uvicorn.Server):
    """One that returns after a signal, instead of dying of it."""

    def __init__(self, config: uvicorn.Config, leaving: Callable[[], None]) -> None:
        super().__init__(config)
        self._leaving = leaving

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close."""
        self._leaving()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals, and give them back."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
