"""A model behind an address that speaks the protocol of chat completions: a vendor's, or one's own vLLM.

What a server answers comes from outside: its size is limited, it is read strictly, and a key that it repeats is
struck out. The key itself is read from the environment when it is sent, and is in no file, message or log.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import httpx2
import openai

from .chats import Films, as_chat
from .fields import Fields, RecordError, at_least
from .strictjson import MAX_BYTES, JsonError, loads
from .text import mend

if TYPE_CHECKING:
    from .encoding import Message

CUT, FILTERED, REFUSED = "length", "content_filter", "refusal"
"""How an answer ends that is none: after the most tokens, kept back by the server, declined by the model."""
_FILTERS = {"content_filter", "content_policy_violation"}
_SHOWN, _SHORTEST = 300, 8
"""Letters of an error that are shown; and of a key that is struck out: shorter ones stand in harmless words."""
_CURES = {
    400: "ask something that it takes: fewer frames or a longer context for what is too long; endpoint.limit, "
    "endpoint.temperature and endpoint.films for options that it does not know",
    404: "give the model by the name under which it is served, and an address that ends before /chat/completions",
    429: "lower endpoint.at_once or raise endpoint.retries, and run again",
    500: "look into its log, and run again",
}


class Reply(NamedTuple):
    """What a model answered to one conversation."""

    name: str
    text: str
    asked: int
    """Tokens of the conversation; 0 where nobody told."""
    said: int
    """Tokens of the answer."""
    finish: str
    """`stop` where the model ended by itself."""


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served, and how it is asked.

    Args:
        url: Its address, up to what stands before /chat/completions: http://127.0.0.1:8000/v1.
        model: Its name there.
        key: The name of the environment variable that holds the key, never a key; where it is not set none is sent.
        at_once: At most so many conversations wait for an answer.
        timeout: After so many seconds without an answer a conversation is sent again.
        retries: How often it is sent again: for a limit of rates, a fault of the server, a lost connection.
        temperature: 0 asks for the likeliest words; null says nothing, for models that take no number.
        limit: What the most tokens are called; some models know but the newer name, max_completion_tokens.
        films: Whether a film is sent as pictures, or as a film, which vLLM takes as its frames.
    """

    url: str
    model: str
    key: str | None = "OPENAI_API_KEY"
    at_once: int = 8
    timeout: float = 600.0
    retries: int = 5
    temperature: float | None = 0.0
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    films: Films = "pictures"

    def check(self) -> None:
        """Refuse what cannot work, or would give the key away, before anything is asked."""
        # Not when it is made: the parser of the command line would repeat a key that stands where its name belongs.
        _check_url(self.url)
        if not self.model.strip():
            raise ValueError("endpoint.model: expected the name under which the model is served, got none")
        if self.key is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key):
            raise ValueError(
                "endpoint.key: expected the name of an environment variable, got something else, which is not shown "
                "because it may be a key; put the key into a variable, and give its name"
            )
        at_least(1, **{"endpoint.at_once": self.at_once, "endpoint.timeout": self.timeout})
        at_least(0, **{"endpoint.retries": self.retries, "endpoint.temperature": self.temperature})
        self._secret()

    def parts(self) -> dict[str, str]:
        """What the answers depend on, as the parts of a fingerprint; no key is among them."""
        told = {"url": self.url, "model": self.model, "temperature": str(self.temperature), "films": self.films}
        return {f"endpoint.{name}": value for name, value in told.items()}

    def ask(
        self, conversations: Iterable[tuple[str, Sequence[Message]]], max_new_tokens: int = 512
    ) -> Generator[Reply, None, None]:
        """Ask, and tell each answer under the name of its conversation as soon as it is there, in any order.

        Conversations are taken one by one, so that no more of them are in memory than wait for an answer. Whoever may
        stop before the end closes it (`contextlib.closing`), and with it the connections.
        """
        self.check()
        with asyncio.Runner() as runner:
            client, waiting = self._client(), set[asyncio.Task[Reply]]()
            try:
                for name, messages in conversations:
                    question = self._answer(client, name, as_chat(messages, self.films), max_new_tokens)
                    waiting.add(runner.get_loop().create_task(question))
                    while len(waiting) >= self.at_once:
                        waiting, replies = _first(runner, waiting)
                        yield from replies
                while waiting:
                    waiting, replies = _first(runner, waiting)
                    yield from replies
            finally:
                runner.run(_end(client, waiting))

    def _secret(self) -> str:
        """The key; empty where there is none."""
        found = os.environ.get(self.key, "").strip() if self.key else ""
        if not re.fullmatch(r"[!-~]*", found):
            raise ValueError(f"endpoint.key: expected a key of plain letters in {self.key}, got others; set it again")
        if found and urlsplit(self.url).scheme == "http" and not _is_loopback(self.url):
            raise ValueError(
                f"endpoint.url: expected https, or this machine, for the key in {self.key}, got {self.url}, where "
                "anybody on the way reads it; give an address with https, or --endpoint.key null if it takes none"
            )
        return found

    def _client(self) -> openai.AsyncOpenAI:
        secret = self._secret()
        # A proxy of the environment would get the requests, and the key, that are for this machine alone.
        transport = openai.DefaultAsyncHttpxClient(
            follow_redirects=False, trust_env=not _is_loopback(self.url), event_hooks={"response": [_bounded]}
        )
        client = openai.AsyncOpenAI(
            api_key=secret or "none",
            base_url=self.url,
            timeout=self.timeout,
            max_retries=self.retries,
            default_headers={"Accept-Encoding": "identity"},
            http_client=transport,
        )
        # Of another account of the same person, and taken from the environment without having been asked for.
        client.organization = client.project = client.admin_api_key = None
        return client

    async def _answer(self, client: openai.AsyncOpenAI, name: str, messages: list[Any], most: int) -> Reply:
        options: dict[str, Any] = {self.limit: most}
        options |= {} if self.temperature is None else {"temperature": self.temperature}
        options |= {} if self._secret() else {"extra_headers": {"Authorization": openai.omit}}
        try:
            found = await client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, **options
            )
            return _read(name, found.content, self._secret())
        except openai.APIError as error:
            if getattr(error, "status_code", 0) == 400 and error.code in _FILTERS:
                return Reply(name, "", 0, 0, FILTERED)
            raise self._failure(name, error) from None  # its text, which a traceback shows, may repeat the key
        except (JsonError, RecordError) as error:
            raise ValueError(
                f"{self.url}: expected a chat completion as answer to {name}, got something else "
                f"({_clean(str(error), self._secret())}); give the address of such a server, up to what stands before "
                "/chat/completions"
            ) from None

    def _failure(self, name: str, error: openai.APIError) -> ValueError:
        """What went wrong for good, and what to do."""
        if isinstance(error, openai.APITimeoutError):
            return ValueError(
                f"{self.url}: expected an answer to {name} within {self.timeout:g} s, got none in {self.retries + 1} "
                "attempts; raise endpoint.timeout, or lower endpoint.at_once, and run again"
            )
        if not isinstance(error, openai.APIStatusError):
            cause = type(error.__cause__ or error).__name__
            return ValueError(
                f"{self.url}: expected a server there, lost or found none ({cause}) in {self.retries + 1} attempts; "
                "start it or check the address, and run again"
            )
        status = error.status_code
        if status in (401, 403):
            state = f"that in {self.key} was refused" if self._secret() else f"{self.key or 'endpoint.key'} names none"
            return ValueError(
                f"{self.url}: expected a key that it takes, {state} (HTTP {status}); put it into that variable"
            )
        if 300 <= status < 400:
            return ValueError(f"{self.url}: expected an answer, got sent elsewhere (HTTP {status}); give that address")
        cure = _CURES.get(status, _CURES[500] if status >= 500 else _CURES[400])
        text = " ".join(_clean(str(error), self._secret()).split())[:_SHOWN]
        return ValueError(f"{self.url}: expected an answer to {name}, got HTTP {status} ({text}); {cure}")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half a bracket
        sound = False
    if not sound:
        raise ValueError("endpoint.url: expected an address like http://127.0.0.1:8000/v1, got another; check it")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "endpoint.url: expected an address alone, got one with a name, a password or a query in it, which is not "
            "shown; a key belongs into the environment, see endpoint.key"
        )


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _first(
    runner: asyncio.Runner, waiting: set[asyncio.Task[Reply]]
) -> tuple[set[asyncio.Task[Reply]], Iterator[Reply]]:
    """Wait for one answer or more; who still waits, and the answers, before a failure is raised."""
    done, left = runner.run(asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED))
    failed = [task for task in done if task.exception() is not None]
    return left, (task.result() for task in [*(done - set(failed)), *failed])


def _read(name: str, body: bytes, secret: str) -> Reply:
    """The answer in a chat completion; what is none is refused."""
    fields = Fields(loads(body), "chat completion")
    choices = fields.items("choices")
    if not choices:
        raise RecordError("choices: expected an answer, got none")
    choice = Fields(choices[0], "choice")
    message = Fields(choice.optional("message"), "message")
    refusal = message.optional("refusal")
    text = refusal or message.optional("content") or ""
    if not isinstance(text, str):
        raise RecordError(f"content: expected a text, got {type(text).__name__}")
    usage = Fields(fields.optional("usage") or {}, "usage")
    asked, said = (usage.integer(tokens, 0) for tokens in ("prompt_tokens", "completion_tokens"))
    return Reply(name, _clean(text, secret), asked, said, REFUSED if refusal else choice.text("finish_reason"))


def _clean(text: str, secret: str) -> str:
    """A text of a server without our key, and without what is no text."""
    return mend(text.replace(secret, "***") if len(secret) >= _SHORTEST else text).text


async def _end(client: openai.AsyncOpenAI, waiting: set[asyncio.Task[Reply]]) -> None:
    """Give up whatever still waits, and then the connections."""
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await client.close()


async def _bounded(response: httpx2.Response) -> None:
    """Let no more of an answer in than a sound one has."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise JsonError("it is compressed, which nobody asked for", "too_large")
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _Bounded(response.stream)


class _Bounded(httpx2.AsyncByteStream):
    """The bytes of an answer, as long as there are not too many."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > MAX_BYTES:
                raise JsonError(f"expected at most {MAX_BYTES:,} bytes, got more", "too_large")
            yield chunk

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()
