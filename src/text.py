"""What counts as a text, how a broken one is mended, and the two forms in which texts are compared.

A text holds whatever people and models write (emoji, right-to-left marks, control characters, any normal
form) and is kept as it came. Two things are no text, because they would fail far from where they came in: a
NUL, and a lone surrogate, which is half of a UTF-16 pair and cannot be written as UTF-8.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class TextError(ValueError):
    """Something that is no text, with a code for the reason: `not_text`, `nul` or `lone_surrogate`."""

    def __init__(self, message: str, reason: str = "not_text") -> None:
        super().__init__(message)
        self.reason = reason


class Mended(NamedTuple):
    """A text that passes `check_text`, and the kinds of repair it took: `nul`, `bom`, `lone_surrogate`."""

    text: str
    fixes: tuple[str, ...]


def check_text(text: object, what: str) -> str:
    r"""Return `text` if it is one; the error calls it by the name `what`.

    >>> check_text("a\0b", "prompt")
    Traceback (most recent call last):
    mmrlhf.text.TextError: prompt: expected text without NUL, got one at character 1; `text.mend` removes it
    """
    if not isinstance(text, str):
        raise TextError(f"{what}: expected text, got {type(text).__name__} {text!r:.60}; write it as a string")
    if not (found := _NO_TEXT.search(text)):
        return text
    at = f"at character {found.start()}"
    if found[0] == "\0":
        raise TextError(f"{what}: expected text without NUL, got one {at}; `text.mend` removes it", "nul")
    raise TextError(
        f"{what}: expected text without lone surrogates, got U+{ord(found[0]):04X} {at}; "
        "`text.mend` replaces it with U+FFFD",
        "lone_surrogate",
    )


def mend(text: str) -> Mended:
    r"""Remove NULs and byte order marks in front, put U+FFFD for lone surrogates, and keep all else.

    >>> mend("\ufefftwo\0 words")
    Mended(text='two words', fixes=('nul', 'bom'))
    """
    bare = text.replace("\0", "")  # first, because a mark behind a NUL stands in front once the NUL is gone
    unmarked = bare.lstrip("\ufeff")
    whole = _SURROGATE.sub("\ufffd", unmarked)
    fixes = {"nul": bare != text, "bom": unmarked != bare, "lone_surrogate": whole != unmarked}
    return Mended(whole, tuple(kind for kind, applied in fixes.items() if applied))


def key(text: str) -> str:
    r"""Return the form in which texts are compared and hashed: NFC, newlines as \n, stripped.

    >>> key("  Cafe\u0301\r\nnoir\n") == "Caf\u00e9\nnoir"
    True
    """
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).strip()


def same(a: str, b: str) -> bool:
    """Tell whether two texts differ in nothing but normal form, kind of newline and outer space."""
    return key(a) == key(b)


def words(text: str) -> list[str]:
    """Return the words in one case and compatibility form, without punctuation, for overlap and truth checks.

    Letters, digits and their marks make words; a script that sets no spaces gives whole runs.

    >>> words("Don't use the \uff21\uff22\uff23 \u2014 STRASSE, stra\u00dfe!")
    ['don', 't', 'use', 'the', 'abc', 'strasse', 'strasse']
    """
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_SEPARATED)
    return unicodedata.normalize("NFKC", folded).split()  # again: folding takes some letters apart


class _Separated(dict[int, str]):
    """What each character becomes when words are split; filled as characters turn up."""

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))
        # Format characters (soft hyphen, joiners, direction marks) are invisible: they do not end a word.
        self[code] = "" if category == "Cf" else chr(code) if category[0] in "LMN" else " "
        return self[code]


_SEPARATED = _Separated()
