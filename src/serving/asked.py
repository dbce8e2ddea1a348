"""What a client asks, read strictly: an option that changes nothing is taken, one that would be ignored is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..chats import Room, as_messages
from ..encoding import Message
from ..fields import Fields, RecordError
from ..strictjson import loads
from ..text import check_text

_HARMLESS = frozenset(
    ["metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"]
)
"""What changes no answer, whatever it says."""
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}
"""The values of other options with which they change nothing."""
_MOST_STOPS, _LONGEST_STOP = 4, 256
_BRACKETS, _COMMAS = 50_000, 500_000
"""In a body, those in texts among them: while a body is parsed, nothing else runs."""


class Choosing(NamedTuple):
    """How the tokens of an answer are chosen."""

    temperature: float
    top_p: float
    seed: int | None


class Talk(NamedTuple):
    """A chat that is asked for."""

    messages: list[Message]
    choosing: Choosing
    most: int | None
    """Tokens of the answer; None: as many as there may be."""
    stops: tuple[str, ...]
    stream: bool
    usage: bool
    """Whether the end of a stream tells how many tokens there were."""


def opened(data: bytes) -> dict[str, Any]:
    """The options in a body; null is as good as nothing."""
    for sign, found, most in (
        ("[ and {", data.count(b"[") + data.count(b"{"), _BRACKETS),
        (",", data.count(b","), _COMMAS),
    ):
        if found > most:
            raise RecordError(f"body: expected at most {most:,} times {sign}, got {found:,}; send less at once")
    body = loads(data, max_bytes=len(data))
    if not isinstance(body, dict):
        raise RecordError(f"body: expected a JSON object, got {body!r:.60}")
    return {name: value for name, value in body.items() if value is not None}


def talk_of(body: Mapping[str, Any], room: Room, temperature: float) -> Talk:
    """The chat that a body asks for; `temperature` is that of requests which name none."""
    fields = Fields(body, "body")
    fields.optional("model")
    stream = _flag(fields, "stream")
    choosing = Choosing(
        _number(fields, "temperature", 0, 2, temperature), _number(fields, "top_p", 0, 1, 1), _seed(fields)
    )
    most, stops, usage = most_of(fields), _stops(fields), _usage(fields, stream)
    rows = messages_of(fields)
    _refuse_others(fields)
    return Talk(as_messages(rows, room), choosing, most, stops, stream, usage)


def messages_of(fields: Fields) -> list[Any]:
    """The conversation as it came; it ends with the turn that is answered."""
    rows = list(fields.items("messages"))
    if not rows:
        raise RecordError("messages: expected one or more, got none; put the question into one of the user")
    last = rows[-1].get("role") if isinstance(rows[-1], Mapping) else None
    if last in ("assistant", "system", "developer"):
        raise RecordError(f"messages: expected the user's turn last, got one of the {last}; end with a question")
    return rows


def most_of(fields: Fields) -> int | None:
    """The most tokens of an answer, by either of its names."""
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in fields]
    found = {fields.integer(name) for name in names}
    if len(found) > 1:
        raise RecordError(f"max_tokens: expected the same as max_completion_tokens, got {sorted(found)}; give one")
    if not found:
        return None
    (most,) = found
    if most < 1:
        raise RecordError(f"{names[0]}: expected 1 or more, got {most}")
    return most


def _number(fields: Fields, name: str, least: float, most: float, default: float) -> float:
    value = fields.optional(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise RecordError(f"{name}: expected a number from {least} to {most}, got {value!r:.60}")
    return float(value)


def _seed(fields: Fields) -> int | None:
    seed = fields.integer("seed") if "seed" in fields else None
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise RecordError(
            f"seed: expected a whole number of 64 bits, got one of {math.ceil(seed.bit_length() / 8)} bytes"
        )
    return seed


def _flag(fields: Fields, name: str) -> bool:
    value = fields.optional(name)
    if value is not None and not isinstance(value, bool):
        raise RecordError(f"{name}: expected true or false, got {value!r:.60}")
    return bool(value)


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.optional("stop")
    found = [value] if isinstance(value, str) else value or []
    if not isinstance(found, list) or len(found) > _MOST_STOPS or not all(found):
        raise RecordError(
            f"stop: expected a text, or a list of at most {_MOST_STOPS} that are not empty, got {value!r:.60}"
        )
    stops = tuple(check_text(text, "stop") for text in found)
    if (longest := max(map(len, stops), default=0)) > _LONGEST_STOP:  # each is looked for at every token
        raise RecordError(f"stop: expected at most {_LONGEST_STOP} letters in each, got {longest:,}; shorten it")
    return stops


def _usage(fields: Fields, stream: bool) -> bool:
    options = fields.optional("stream_options")
    if options is None:
        return False
    if not stream:
        raise RecordError("stream_options: expected stream to be true beside it, got no stream; leave it out")
    with Fields(options, "stream_options") as inner:
        found = _flag(inner, "include_usage")
        if _flag(inner, "include_obfuscation"):
            raise RecordError("include_obfuscation: expected false, got true, which is not done here; leave it out")
        inner.refuse_rest()
    return found


def _refuse_others(fields: Fields) -> None:
    """Refuse what would change the answer and is not done here."""
    for name, value in sorted(fields.rest().items()):
        if name in _HARMLESS:
            continue
        if name not in _NEUTRAL:
            raise RecordError(f"{name}: expected no such option, got {value!r:.60}; it is not done here: leave it out")
        allowed = _NEUTRAL[name]
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed):
            raise RecordError(f"{name}: expected {allowed[0]!r} or nothing, got {value!r:.60}; more is not done here")
