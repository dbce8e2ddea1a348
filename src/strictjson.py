"""One JSON value, strictly: what parsers let pass, guess at or crash on is refused with a reason code."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_BYTES = 16 * 2**20
"""The longest value that is read or written; a row with all its responses takes kilobytes."""


class JsonError(ValueError):
    """Something that is not strict JSON, or a row that does not belong, with a code for the reason."""

    def __init__(self, message: str, reason: str = "not_json") -> None:
        super().__init__(message)
        self.reason = reason


def loads(line: bytes | str, *, max_bytes: int = MAX_BYTES) -> Any:  # noqa: ANN401 - any JSON value
    r"""Parse one JSON value in UTF-8, with or without a byte order mark.

    The reason code of an error is `too_large`, `not_utf8`, `not_json`, `not_finite`, `duplicate_key`,
    `too_deep` or `too_many_digits`. Escaped lone surrogates come in: `text.mend` replaces them.

    >>> loads('{"id": "a", "id": "b"}')
    Traceback (most recent call last):
    mmrlhf.strictjson.JsonError: expected each name once in an object, got 'id' twice or more; keep one
    """
    data = line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
    if len(data) > max_bytes:
        raise JsonError(f"expected at most {max_bytes:,} bytes, got more; split it or raise max_bytes", "too_large")
    try:
        return _STRICT.decode(data.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        found = f"0x{data[error.start]:02x} at byte {error.start} ({error.reason})"
        raise JsonError(f"expected UTF-8, got {found}; save it as UTF-8", "not_utf8") from error
    except json.JSONDecodeError as error:
        found = f"{error.msg} (character {error.pos} of {len(error.doc):,})"
        raise JsonError(f"expected one JSON value, got: {found}; write one whole value per line") from error
    except RecursionError as error:
        raise _too_deep() from error
    except JsonError:
        raise
    except ValueError as error:  # all that is left: Python converts no whole number beyond this limit
        most = sys.get_int_max_str_digits()
        message = f"expected at most {most:,} digits in a number, got more; write it as a text"
        raise JsonError(message, "too_many_digits") from error


def dumps(value: object, *, sort_keys: bool = False) -> str:
    r"""Write a value as one line that `loads` gives back equal, except that tuples come back as lists.

    >>> dumps({"prompt": "two\nlines", "ranks": [1, 2]})
    '{"prompt": "two\\nlines", "ranks": [1, 2]}'
    """
    try:
        line = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys)
        line.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(line[error.start]):04X} after {line[: error.start][-40:]!r}"
        message = f"expected text, got the lone surrogate {found}; `text.mend` replaces it"
        raise JsonError(message, "lone_surrogate") from error
    except RecursionError as error:
        raise _too_deep() from error
    except (TypeError, ValueError) as error:
        message = f"expected plain values, got: {error}; pass dicts, lists, texts, finite numbers, booleans or None"
        raise JsonError(message) from error
    # json writes the names 1 and "1" alike, so another object would be read back.
    if odd := [name for name in _names(value) if not isinstance(name, str)]:
        raise JsonError(f"expected texts as names in an object, got {odd[0]!r}; write it as a text")
    return line


def _names(value: object) -> Iterator[object]:
    """Yield the names of all objects in a value, at any depth."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise JsonError(
            f"expected each name once in an object, got {twice!r:.60} twice or more; keep one",
            "duplicate_key",
        )
    return found


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise JsonError(f"expected finite numbers, got {digits[:20]}; write null where there is none", "not_finite")
    return number


def _too_deep() -> JsonError:
    return JsonError("expected few levels of brackets, got more than Python can follow; flatten it", "too_deep")


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
