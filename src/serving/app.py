"""The application: its addresses, and how each request becomes an answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..chats import Room
from .asked import Talk, opened, talk_of
from .bodies import Body
from .desk import Desk, Limits, unless_gone
from .growing import Growing, Piece
from .guard import Guard, refused
from .refusals import RefusedError, refusal_of
from .scores import Scorer, wanted_of
from .told import Telling, event, models, scored
from .worker import Read, Speaker, Worker

Answering = Callable[[Body, Send, asyncio.Timeout], Coroutine[Any, Any, Response | None]]
"""Answers a body in time: with a response, or by itself."""
_SENT_AWAY, _PATIENCE = 429, 5


@dataclass(frozen=True)
class Defaults:
    """What holds where a request says nothing.

    Args:
        temperature: At which answers are chosen.
        frames: Of a film.
    """

    temperature: float = 1.0
    frames: int = 8


class Server:
    """Everything that serves.

    Args:
        speaker: A policy, for chats.
        scorer: A reward model, for scores.
        limits: What requests may ask for.
        defaults: What holds where they say nothing.
        host: Where it listens.
        key: What clients must have.
    """

    def __init__(
        self,
        speaker: Speaker | None,
        scorer: Scorer | None,
        limits: Limits,
        defaults: Defaults | None = None,
        host: str = "127.0.0.1",
        key: str | None = None,
    ) -> None:
        self.speaker, self.scorer, self.limits, self.defaults = speaker, scorer, limits, defaults or Defaults()
        self.worker = Worker(speaker)
        self.desk = Desk(self.worker, limits)
        self._since = int(time.time())
        routes = [Route("/health", self._health), Route("/v1/models", self._models)]
        routes += [Route("/v1/models/{name:path}", self._model)]
        if speaker:
            routes += [Route("/v1/chat/completions", _Post(self.desk, self._chat), methods=["POST"])]
        if scorer:
            scores = _Post(self.desk, self._score)
            routes += [Route(path, scores, methods=["POST"]) for path in ("/score", "/v1/score")]
        handlers: Any = {HTTPException: _no_such, ValueError: _refused, TimeoutError: _too_late, Exception: _failed}
        self.app: ASGIApp = Guard(Starlette(routes=routes, exception_handlers=handlers), host, key)

    @property
    def names(self) -> list[str]:
        """The models, by the names under which they are asked."""
        return [model.name for model in (self.speaker, self.scorer) if model]

    async def _health(self, _: Request) -> Response:
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "ending"}, 200 if alive else 503)

    async def _models(self, _: Request) -> Response:
        return JSONResponse(models(self.names, self._since))

    async def _model(self, request: Request) -> Response:
        self._require(request.path_params["name"], self.names)
        return JSONResponse(models([request.path_params["name"]], self._since)["data"][0])

    def start(self) -> None:
        """Begin to answer."""
        self.worker.start()

    def leave(self, seconds: float) -> None:
        """Answer nobody any more but those who have their turn, and them no longer than this."""
        self.desk.close()
        asyncio.get_running_loop().call_later(seconds, self.worker.stop, 0)

    def stop(self, seconds: float) -> None:
        """End, and wait for it no longer than this."""
        self.desk.stop()
        self.worker.stop(seconds)

    def _require(self, name: object, known: list[str]) -> None:
        if name not in known:
            message = f"model: expected one of {', '.join(map(repr, known))}, got {name!r:.200}"
            raise RefusedError(message, 404, "model_not_found", "model")

    async def _score(self, body: Body, _: Send, __: asyncio.Timeout) -> Response:
        assert self.scorer is not None
        scorer, rows = self.scorer, await self.desk.read(lambda: self._wanted(body.data))
        body.drop()
        return JSONResponse(scored(scorer.name, await self.desk.call(lambda waits: scorer.score(rows, waits))))

    def _wanted(self, data: bytes) -> Any:  # noqa: ANN401 - the scorer's
        """What is to be scored, as the model reads it."""
        assert self.scorer is not None
        body = opened(data)
        self._require(body.get("model", self.scorer.name), [self.scorer.name])
        wanted = wanted_of(body, self._room(self.scorer.frames), self.limits.responses)
        _require_tokens(wanted.most, self.limits.tokens)
        return self.scorer.read(wanted)

    def _room(self, frames: int) -> Room:
        return Room(self.limits.pictures, self.limits.pixels, frames)

    async def _chat(self, body: Body, send: Send, clock: asyncio.Timeout) -> Response | None:
        assert self.speaker is not None
        talk, read = await self.desk.read(lambda: self._read(body.data))
        body.drop()
        growing = Growing(self.speaker.text, self._most(talk, read), talk.stops, talk.stream)
        seed = secrets.randbits(63) if talk.choosing.seed is None else talk.choosing.seed
        telling = Telling(self.speaker.name, read.tokens, talk.usage)
        async with aclosing(self.desk.pieces(read.prompt, talk.choosing._replace(seed=seed), growing)) as pieces:
            first = await anext(pieces)
            if talk.stream:
                until = clock.when()
                clock.reschedule(None)  # from here on the stream itself tells that it was too late
                await _stream(send, telling, first, pieces, until)
                return None
            said = [first, *[piece async for piece in pieces]]
        return JSONResponse(telling.whole("".join(piece.text for piece in said), said[-1]))

    def _read(self, data: bytes) -> tuple[Talk, Read]:
        """What is asked, as the model reads it."""
        assert self.speaker is not None
        body = opened(data)
        self._require(body.get("model"), [self.speaker.name])
        talk = talk_of(body, self._room(self.defaults.frames), self.defaults.temperature)
        _require_tokens(talk.most, self.limits.tokens)
        return talk, self.speaker.read(talk.messages)

    def _most(self, talk: Talk, read: Read) -> int:
        """How many tokens the answer may have."""
        assert self.speaker is not None
        left = self.speaker.context - read.tokens
        if left < (talk.most or 1):
            raise RefusedError(
                f"messages: expected at most {self.speaker.context:,} tokens with the answer, got {read.tokens:,} and "
                f"{talk.most or 1:,} for the answer; shorten the conversation, show less, or lower max_tokens",
                code="context_length_exceeded",
                param="messages",
            )
        return talk.most or min(left, self.limits.tokens)


class _Post:
    """An address at which something is asked.

    Args:
        desk: Who gives places and turns.
        answer: What answers.
    """

    def __init__(self, desk: Desk, answer: Answering) -> None:
        self._desk, self._answer = desk, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, desk = Request(scope, receive), self._desk
        chunks = request.stream()
        with suppress(ClientDisconnect), desk.bodies.body() as body:
            async with asyncio.timeout(desk.limits.seconds) as clock:
                try:
                    desk.require_place()
                    await desk.bodies.fill(body, request, chunks)
                except RefusedError as refusal:
                    if refusal.status == _SENT_AWAY:
                        body.drop()
                        await desk.bodies.pass_over(chunks)
                    raise
                with desk.place():  # not before: whoever writes slowly would keep it from others
                    response = await unless_gone(receive, self._turn(body, send, clock))
            if response is not None:
                await response(scope, receive, send)

    async def _turn(self, body: Body, send: Send, clock: asyncio.Timeout) -> Response | None:
        async with self._desk.turn():
            return await self._answer(body, send, clock)


async def _stream(
    send: Send, telling: Telling, first: Piece, pieces: AsyncIterator[Piece], until: float | None
) -> None:
    """Send an answer as it grows; what goes wrong now is told in it."""
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    try:
        async with asyncio.timeout_at(until):
            await _part(send, telling.begun() + telling.grown(first))
            async for piece in pieces:
                await _part(send, telling.grown(piece))
        last = b""
    except (RefusedError, TimeoutError) as error:
        last = event((error if isinstance(error, RefusedError) else _late()).body)
    with suppress(TimeoutError):  # a client that reads nothing is not waited for
        async with asyncio.timeout(_PATIENCE):
            await send({"type": "http.response.body", "body": last})


async def _part(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


def _require_tokens(most: int | None, limit: int) -> None:
    if most is not None and most > limit:
        raise RefusedError(f"max_tokens: expected at most {limit:,}, got {most:,}", param="max_tokens")


async def _refused(_: Request, error: Exception) -> Response:
    return refused(refusal_of(error))


async def _failed(_: Request, error: Exception) -> Response:
    return refused(refusal_of(error))


async def _too_late(_: Request, __: Exception) -> Response:
    return refused(_late())


def _late() -> RefusedError:
    return RefusedError("expected an answer in the time allowed, got none; ask for less", 503, "timeout")


async def _no_such(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = (
        f"{request.method} {request.url.path}: expected an address of this server; see /v1/models for what there is"
    )
    return refused(RefusedError(message, error.status_code, "not_found"))
