"""The one thread that owns the models: answers grow together in it, and others join and leave between two tokens.

Nothing waits for a batch to fill or to end: a conversation that comes joins those that are being answered at their
next token.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any, NamedTuple

from ..encoding import Message
from .asked import Choosing
from .growing import Growing, Piece
from .reading import answer
from .refusals import RefusedError, refusal_of

log = logging.getLogger(__name__)

Chosen = tuple[int, int, bool]
"""The key of an answer, its next token, and whether that ends it."""
Tell = Callable[[Piece | RefusedError], None]


class Read(NamedTuple):
    """A conversation as the model reads it."""

    prompt: Any
    tokens: int


class Speaker(NamedTuple):
    """A policy as plain functions."""

    name: str
    """Under which it is asked."""
    context: int
    """The most tokens of a conversation with its answer."""
    read: Callable[[Sequence[Message]], Read]
    begin: Callable[[Mapping[int, tuple[Any, Choosing]]], Sequence[Chosen]]
    """Read conversations, each under its key, and tell the first token of each; none joins if one fails."""
    step: Callable[[Collection[int]], Sequence[Chosen]]
    """Tell the next token of each that is not over; those with these keys have left."""
    text: Callable[[Sequence[int]], str]


class Job(NamedTuple):
    """An answer that is wanted, and whom to tell."""

    key: int
    prompt: Any
    choosing: Choosing
    growing: Growing
    tell: Tell


class Worker:
    """The thread and what waits for it.

    Args:
        speaker: What answers conversations; None where nothing does.
    """

    def __init__(self, speaker: Speaker | None) -> None:
        self._speaker = speaker
        self._news = threading.Condition()  # its lock may be taken twice by one thread
        self._coming: deque[Job] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._running: dict[int, Job] = {}
        self._leaving: set[int] = set()
        self._keys, self._ended = count(), False
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether there is anybody who answers."""
        return self._thread.is_alive() and not self._ended

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """End after what is being computed, but wait for it no longer than this; whoever waits is told."""
        with self._news:
            self._ended = True
            self._news.notify()
        self._thread.join(seconds)

    def talk(self, prompt: Any, choosing: Choosing, growing: Growing, tell: Tell) -> int:  # noqa: ANN401 - the speaker's
        """Let a conversation join; its key, under which it may leave."""
        with self._news:
            job = Job(next(self._keys), prompt, choosing, growing, tell)
            if self._ended:
                tell(ending())
            else:
                self._coming.append(job)
                self._news.notify()
        return job.key

    def leave(self, key: int) -> None:
        """Whoever asked is gone, or has all, and is not told any more."""
        with self._news:
            self._coming = deque(job for job in self._coming if job.key != key)
            if self._running.pop(key, None):
                self._leaving.add(key)
                self._news.notify()

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Let a function run between two tokens."""
        future: Future[Any] = Future()
        with self._news:
            if self._ended:
                future.set_exception(ending())
            else:
                self._calls.append((future, function))
                self._news.notify()
        return future

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            with self._news:
                self._ended = True
                left = [*self._running.values(), *self._coming]
                calls = list(self._calls)
            for job in left:
                job.tell(ending())
            for future, _ in calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(ending())

    def _turn(self) -> bool:
        """Whatever is to be done before the next token of all answers, and that token; whether there are more turns."""
        with self._news:
            self._news.wait_for(lambda: self._ended or any(self._waiting()))
            if self._ended:
                return False
            coming, leaving = list(self._coming), set(self._leaving)
            self._running |= {job.key: job for job in coming}
            self._coming.clear()
            self._leaving.clear()
            call = self._calls.popleft() if self._calls else None
        if call:
            answer(*call)
        if coming:
            self._begin(coming)
        if self._running or leaving:
            self._step(leaving)
        return True

    def _waiting(self) -> tuple[Collection[Any], ...]:
        return self._coming, self._calls, self._running, self._leaving

    def _begin(self, coming: Sequence[Job]) -> None:
        assert self._speaker is not None
        try:
            chosen = self._speaker.begin({job.key: (job.prompt, job.choosing) for job in coming})
        except Exception as error:
            if len(coming) > 1:  # the fault of one is not that of the others
                for job in coming:
                    self._begin([job])
                return
            log.exception("an answer failed before its first token")
            self._fail(coming[0], error)
            self._leaving.discard(coming[0].key)
        else:
            self._tell(chosen)

    def _step(self, leaving: set[int]) -> None:
        assert self._speaker is not None
        try:
            chosen = self._speaker.step(leaving)
        except Exception as error:
            log.exception("an answer failed, and those that grew with it")
            for job in list(self._running.values()):
                self._fail(job, error)
        else:
            self._tell(chosen)

    def _tell(self, chosen: Sequence[Chosen]) -> None:
        """Tell what every answer has grown by; one that has ended, or of which nobody wants more, leaves."""
        for key, token, over in chosen:
            if (job := self._running.get(key)) is None:
                self._leaving.add(key)
                continue
            try:
                piece = job.growing.add(token, over)
            except Exception as error:
                log.exception("the text of an answer failed")
                self._fail(job, error)
                continue
            if piece.finish:
                self.leave(key)
            if piece.text or piece.finish:
                job.tell(piece)

    def _fail(self, job: Job, error: Exception) -> None:
        """Tell that there is no answer; it was read without a fault, so this is none of the client's."""
        self.leave(job.key)
        job.tell(refusal_of(error if isinstance(error, MemoryError) else RuntimeError(error)))


def ending() -> RefusedError:
    """What is told to whoever asks a server that goes."""
    return RefusedError(
        "expected a server that stays, got one that is ending; ask again when it is back", 503, "ending"
    )
