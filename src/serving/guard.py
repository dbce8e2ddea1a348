"""Who may speak to a server: only by its own name, and only with the key, where it has one."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .refusals import RefusedError

_OPEN = "/health"
"""Tells nothing but that there is a server."""


class Guard:
    """Stands before an application.

    A page in a browser may make its own name mean this machine, and then ask in that name: on loopback others than the
    names of this machine are refused. Where there is a key no page knows it.

    Args:
        app: What is guarded.
        host: Where it listens.
        key: What a client must have; None: nothing.
    """

    def __init__(self, app: ASGIApp, host: str, key: str | None) -> None:
        self._app, self._key = app, None if key is None else f"Bearer {key}".encode()
        self._names = {"localhost", "127.0.0.1", "::1", host.lower()} if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            await refused(refusal)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> RefusedError | None:
        headers = Headers(scope=scope)
        if self._names is not None and _name(headers.get("host", "")) not in self._names:
            return RefusedError(
                f"Host: expected {' or '.join(sorted(self._names))}, got another name", 400, "wrong_host"
            )
        if self._key is None or scope["path"] == _OPEN:
            return None
        given = headers.get("authorization", "").encode("latin-1")
        if hmac.compare_digest(given, self._key):
            return None
        return RefusedError("Authorization: expected Bearer and the key, got none or another", 401, "invalid_api_key")


def refused(refusal: RefusedError) -> JSONResponse:
    """A refusal as it is sent."""
    headers: Mapping[str, str] = refusal.headers
    return JSONResponse(refusal.body, refusal.status, headers=headers)


def secret_of(key: str | None, host: str) -> str | None:
    """The key that clients must have, if they must have one: `key` is the variable that holds it."""
    if key is None:
        if not is_loopback(host):
            raise ValueError(
                f"host: expected 127.0.0.1, or a key beside {host}, where others reach it; put one into an environment "
                "variable, and give the name of that as --key"
            )
        return None
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
        raise ValueError(
            "key: expected the name of an environment variable, got something else, which is not shown because it may "
            "be a key; put the key into a variable, and give its name"
        )
    found = os.environ.get(key, "").strip()
    if not re.fullmatch(r"[!-~]{8,}", found):
        raise ValueError(
            f"key: expected 8 plain letters or more in the environment variable {key}, got others or none; set it"
        )
    return found


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches an address.

    >>> is_loopback("localhost"), is_loopback("127.0.0.2"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _name(host: str) -> str:
    """A Host header without its port; empty for what is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
