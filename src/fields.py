"""Taking typed fields out of a JSON object, so that an error names the field, what was expected and what came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from types import TracebackType
from typing import Any

_REQUIRED = object()


class RecordError(ValueError):
    """A record breaks a rule; `reason` is the code under which a ledger counts it."""

    reason = "invalid_record"


class Fields:
    """The fields of one JSON object, taken one by one; as a context it puts the record's name before an error.

    >>> Fields({"id": 7}, "query").text("id")
    Traceback (most recent call last):
        ...
    mmrlhf.fields.RecordError: id: expected a text, got 7
    """

    def __init__(self, row: object, what: str) -> None:
        if not isinstance(row, Mapping):
            raise RecordError(f"{what}: expected a JSON object, got {_shown(row)}")
        self._row = row
        self._what = what
        self._taken: set[str] = set()

    def __enter__(self) -> Fields:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, ValueError):
            name = self._row.get("id")
            raise RecordError(f"{self._what}{f' {name!r}' if isinstance(name, str) else ''}: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._row

    def _take(self, name: str, default: object = _REQUIRED) -> Any:  # noqa: ANN401 - any JSON value
        self._taken.add(name)
        if name not in self._row and default is _REQUIRED:
            raise RecordError(f"{name}: expected a value, the field is missing; there are {sorted(self._row)}")
        return self._row.get(name, default)

    def text(self, name: str, default: object = _REQUIRED) -> str:
        """A text."""
        value = self._take(name, default)
        if not isinstance(value, str):
            raise RecordError(f"{name}: expected a text, got {_shown(value)}")
        return value

    def integer(self, name: str, default: object = _REQUIRED) -> int:
        """A whole number; true and false are none."""
        value = self._take(name, default)
        if type(value) is not int:
            raise RecordError(f"{name}: expected a whole number, got {_shown(value)}")
        return value

    def optional(self, name: str) -> Any:  # noqa: ANN401
        """Any value, or None when absent or null; the record's constructor checks it."""
        return self._take(name, None)

    def items(self, name: str) -> Sequence[Any]:
        """A list, empty when absent."""
        value = self._take(name, ())
        if not isinstance(value, (list, tuple)):
            raise RecordError(f"{name}: expected a list, got {_shown(value)}")
        return value

    def rest(self) -> dict[str, Any]:
        """The fields that nobody has taken."""
        return {name: value for name, value in self._row.items() if name not in self._taken}

    def refuse_rest(self) -> None:
        """Refuse fields that nobody has taken: there is no place to keep them."""
        if rest := self.rest():
            raise RecordError(f"unknown fields {sorted(rest)}; known: {sorted(self._taken)}")


def reason_of(error: ValueError) -> str:
    """The code under which a ledger counts an error: its own `reason`, where it has one."""
    # The `reason` of a UnicodeError is a sentence and no code.
    return "invalid_record" if isinstance(error, UnicodeError) else str(getattr(error, "reason", "invalid_record"))


def own(record: object, *names: str) -> None:
    """Give a frozen record its own copies of the lists (as tuples) and mappings that it was made from."""
    for name in names:
        value = getattr(record, name)
        object.__setattr__(record, name, dict(value) if isinstance(value, Mapping) else tuple(value))


def one_of(value: object, known: tuple[str, ...], name: str) -> None:
    """Refuse a value that is not among the known ones."""
    if value not in known:
        raise RecordError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")


def at_least(least: int, **numbers: float | None) -> None:
    """Refuse numbers that are below the least that works, or without end; None passes.

    >>> at_least(1, chunk=512, frames=0)
    Traceback (most recent call last):
        ...
    ValueError: frames: expected 1 or more, got 0
    """
    for name, number in numbers.items():
        if number is not None and not least <= number < inf:
            raise ValueError(f"{name}: expected {least} or more, got {number}")


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
