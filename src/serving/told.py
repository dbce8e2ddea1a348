"""The words of the protocol in which answers, streams of them, scores and models are told."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .growing import Piece
from .scores import Score


@dataclass(frozen=True)
class Telling:
    """An answer as it is told.

    Args:
        model: The name of who answers.
        asked: Tokens of the conversation.
        usage: Whether a stream tells how many tokens there were.
    """

    model: str
    asked: int
    usage: bool = False
    name: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        """The whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last.finish}
        return self._told("chat.completion") | {"choices": [choice], "usage": self._used(last)}

    def begun(self) -> bytes:
        """The first event of a stream."""
        return self._chunk({"role": "assistant", "content": ""}, None)

    def grown(self, piece: Piece) -> bytes:
        """The events that tell what an answer has grown by, with the end if it is there."""
        told = self._chunk({"content": piece.text}, None) if piece.text else b""
        if piece.finish is None:
            return told
        told += self._chunk({}, piece.finish)
        if self.usage:
            told += event(self._told("chat.completion.chunk") | {"choices": [], "usage": self._used(piece)})
        return told + b"data: [DONE]\n\n"

    def _told(self, kind: str) -> dict[str, Any]:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: dict[str, str], finish: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        nothing = {"usage": None} if self.usage else {}
        return event(self._told("chat.completion.chunk") | {"choices": [choice]} | nothing)

    def _used(self, last: Piece) -> dict[str, int]:
        said = last.tokens
        return {"prompt_tokens": self.asked, "completion_tokens": said, "total_tokens": self.asked + said}


def event(value: dict[str, Any]) -> bytes:
    """An event of a stream; in ASCII, as some readers take rare characters for ends of lines."""
    return f"data: {json.dumps(value, allow_nan=False)}\n\n".encode()


def scored(model: str, scores: Sequence[Score]) -> dict[str, Any]:
    """Scores in the order of the responses."""
    rows = [
        {"index": place, "reward": one.reward, "critique": one.critique, "dimensions": dict(one.dimensions)}
        for place, one in enumerate(scores)
    ]
    return {"object": "scores", "model": model, "scores": rows}


def models(names: Sequence[str], since: int) -> dict[str, Any]:
    """The models that may be asked."""
    rows = [{"id": name, "object": "model", "created": since, "owned_by": "mmrlhf"} for name in names]
    return {"object": "list", "data": rows}
