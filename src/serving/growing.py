"""The text of an answer as it grows: told in whole characters, and never further than where it may have to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

_BROKEN = "\ufffd"
"""What bytes become that are no whole character yet."""
_WINDOW = 64


class Piece(NamedTuple):
    """What an answer has grown by."""

    text: str
    tokens: int
    """How many have been chosen so far, the end of the turn among them."""
    finish: Literal["stop", "length"] | None
    """How the answer ended, if it did."""


class Growing:
    """An answer of which token after token becomes known.

    Args:
        text: What tokens say.
        most: After so many tokens the answer is cut.
        stops: Texts before which it ends.
        stream: Whether pieces are told before the end.
    """

    def __init__(
        self, text: Callable[[Sequence[int]], str], most: int, stops: Sequence[str] = (), stream: bool = False
    ) -> None:
        self._text, self._most, self._stops, self._stream = text, most, stops, stream
        self._ids: list[int] = []
        self._told, self._settled, self._at = "", "", 0

    def add(self, token: int, over: bool) -> Piece:
        """What the next token adds; where the answer is over, the token is no part of it."""
        self._ids += [] if over else [token]
        tokens = len(self._ids) + over
        finish: Literal["stop", "length"] | None = "stop" if over else "length" if tokens == self._most else None
        if finish is None and not self._stream and not self._stops:
            return Piece("", tokens, None)
        text = self._text(self._ids) if finish else self._so_far()
        if found := [at for stop in self._stops if (at := text.find(stop)) >= 0]:
            text, finish = text[: min(found)], "stop"
        elif finish is None:
            text = self._certain(text)
        # Some tokenizers take characters back that were whole, while bytes behind them are not.
        goes_on = (finish or self._stream) and text.startswith(self._told)
        piece = text[len(self._told) :] if goes_on else ""
        self._told += piece
        return Piece(piece, tokens, finish)

    def _so_far(self) -> str:
        """The text of all tokens, of which early ones are not looked at again and again."""
        window = self._ids[self._at :]
        text, half = self._text(window), len(window) // 2
        if len(window) < _WINDOW or (first := self._text(window[:half])).endswith(_BROKEN):
            return self._settled + text
        if first + self._text(window[half:]) == text:
            self._settled, self._at, text = self._settled + first, self._at + half, text[len(first) :]
        return self._settled + text

    def _certain(self, text: str) -> str:
        """The text without a last character that is not whole, and without what may become a stop."""
        text = text.rstrip(_BROKEN)
        longest = max(map(len, self._stops), default=1) - 1
        for held in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-held:]) for stop in self._stops):
                return text[:-held]
        return text
