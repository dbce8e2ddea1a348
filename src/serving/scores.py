"""What a client wants to have scored: a conversation as a query, and the responses to its last turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..chats import Room, as_messages
from ..encoding import Message, Part
from ..fields import Fields, RecordError, one_of
from ..queries import Media, Query, Turn
from ..text import check_text
from ..videos import spread
from .asked import messages_of, most_of

Load = Callable[[Media, int], Part]
_CRITIQUES = ("none", "generated", "given")


class Score(Protocol):
    """What is said of a response."""

    @property
    def reward(self) -> float:
        """How good it is."""

    @property
    def critique(self) -> str:
        """The words behind which the reward was read; empty where there are none."""

    @property
    def dimensions(self) -> Mapping[str, float]:
        """Scores beside the reward."""


class Wanted(NamedTuple):
    """Responses to score."""

    query: Query
    load: Load
    responses: tuple[str, ...]
    critique: str
    critiques: tuple[str, ...]
    most: int | None
    """Tokens of a critique that is generated; None: as many as is usual."""


class Scorer(NamedTuple):
    """A reward model as a plain function."""

    name: str
    """Under which it is asked."""
    frames: int
    """Of a film."""
    read: Callable[[Wanted], Any]
    """What is to be scored as the model reads it; apart from the model."""
    score: Callable[[Any, Callable[[], bool]], Sequence[Score]]
    """The scores of what was read, as long as somebody waits for them."""


def wanted_of(body: object, room: Room, most: int) -> Wanted:
    """The responses that a body wants to have scored, at most so many."""
    fields = Fields(body, "body")
    fields.optional("model")
    rows, critique = messages_of(fields), fields.text("critique", "none")
    one_of(critique, _CRITIQUES, "critique")
    responses, critiques = (_texts(fields, name) for name in ("responses", "critiques"))
    tokens = most_of(fields)
    fields.refuse_rest()
    if not 1 <= len(responses) <= most:
        raise RecordError(f"responses: expected 1 to {most}, got {len(responses)}")
    if len(critiques) != (len(responses) if critique == "given" else 0):
        wanted = f"one for each of {len(responses)} responses ('' for none)" if critique == "given" else "none"
        raise RecordError(f"critiques: expected {wanted}, with critique {critique!r}, got {len(critiques)}")
    if tokens is not None and critique != "generated":
        raise RecordError(f"max_tokens: expected none with critique {critique!r}, got {tokens}; it cuts generated ones")
    query, load = query_of(as_messages(rows, room))
    return Wanted(query, load, responses, critique, critiques, tokens)


def query_of(messages: Sequence[Message]) -> tuple[Query, Load]:
    """A conversation as a query, with what loads its media."""
    *earlier, asked = messages
    system = ""
    if earlier and earlier[0].role == "system":
        system = _words(earlier.pop(0))
    prompt, media = "", []
    shown: list[Part] = []
    for part in asked.parts:
        if isinstance(part, str):
            prompt += part
        else:
            media.append(Media("image" if not isinstance(part, Sequence) else "video", str(len(shown)), len(prompt)))
            shown.append(part)
    history = tuple(Turn(_speaker(message), _words(message)) for message in earlier)

    def load(medium: Media, frames: int) -> Part:
        part: Any = shown[int(medium.path)]
        return [part[place] for place in spread(len(part), frames)] if medium.kind == "video" else part

    try:
        return Query("messages", prompt, tuple(media), system=system, history=history), load
    except ValueError as error:
        raise RecordError(f"messages: {error}") from error


def _speaker(message: Message) -> Any:  # noqa: ANN401 - one of two words
    if message.role == "system":
        raise RecordError("messages: expected the system's words first, got them later; put them there")
    return message.role


def _words(message: Message) -> str:
    """The text of an earlier turn."""
    if not all(isinstance(part, str) for part in message.parts):
        raise RecordError("messages: expected media in the last turn alone, got some before; put them there")
    return "".join(map(str, message.parts))


def _texts(fields: Fields, name: str) -> tuple[str, ...]:
    return tuple(check_text(text, f"{name}[{place}]") for place, text in enumerate(fields.items(name)))
