"""Content hashes, written beside derived files: nothing is loaded that was made from something else."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .jsonl import dumps, loads, replacing
from .text import check_text, key

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ID_DIGITS = 16
"""How much of a digest makes an id: among a million texts, two share one in 1 of 37 million cases."""

_CURE = "make it again or choose another file"


def of_value(value: object) -> str:
    """Return the SHA-256 of a JSON value, in which the order of an object's names does not matter.

    >>> of_value({"w": 0.5, "k": 1}) == of_value({"k": 1, "w": 0.5}) != of_value({"k": 1, "w": 0.25})
    True
    """
    return _sha256(dumps(value, sort_keys=True))


def of_text(text: str) -> str:
    r"""Return the SHA-256 of a text in the form in which texts are compared; `[:ID_DIGITS]` of it is an id.

    >>> of_text("caf\u00e9") == of_text(" cafe\u0301\r\n")
    True
    """
    return _sha256(key(check_text(text, "a text to be hashed")))


def of_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, read piece by piece."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_tree(folder: Path | str, *, suffixes: tuple[str, ...] | None = None) -> str:
    """Return a digest of the names and contents of all files in a folder, or of those with these suffixes."""
    digests = {}
    for path in _files(Path(folder)):
        if suffixes is None or path.name.endswith(suffixes):
            digests[path.relative_to(folder).as_posix()] = of_file(path)
    if not digests:
        wanted = "a file" if suffixes is None else f"a file that ends in {' or '.join(suffixes)}"
        raise ValueError(f"{folder}: expected a folder with {wanted}, found none; check the path")
    return of_value(digests)


def _files(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder; what would be left out in silence, or never end, is an error."""
    for at, folders, names in os.walk(folder, onerror=_raise):
        linked = [name for name in folders if Path(at, name).is_symlink()]
        for path in [Path(at, name) for name in linked + names]:
            if not path.is_file():
                raise ValueError(
                    f"{path}: expected a file, got a link to a folder or to nothing, or a device; remove it"
                )
            yield path


def _raise(error: OSError) -> None:
    raise error


@dataclass(frozen=True)
class Fingerprint:
    """What a derived file was made from: a digest for each part (model, processor, template, data, ...)."""

    parts: Mapping[str, str]

    def __post_init__(self) -> None:
        texts = all(isinstance(text, str) and text for pair in self.parts.items() for text in pair)
        if not self.parts or not texts:
            raise ValueError(f"fingerprint: expected a digest for each named part, got {self.parts}; hash all parts")
        object.__setattr__(self, "parts", dict(self.parts))  # a copy: the caller's dict may change

    @property
    def digest(self) -> str:
        """One digest for all parts together."""
        return of_value(self.parts)

    def write(self, beside: Path | str) -> None:
        """Write `NAME.fingerprint.json` beside the file NAME, whole or not at all."""
        with replacing(_side(beside)) as file:
            file.write(dumps({"digest": self.digest, "parts": self.parts}).encode() + b"\n")

    @classmethod
    def read(cls, beside: Path | str, cure: str = _CURE) -> Fingerprint:
        """Return what the file was made from, as written beside it."""
        side = _side(beside)
        if not side.exists():
            raise ValueError(f"{beside}: no {side.name} beside it tells what it was made from; {cure}")
        try:
            row = loads(side.read_bytes())
            found = cls(row["parts"])
            intact = row == {"digest": found.digest, "parts": found.parts}
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{side}: expected a fingerprint, got {error!r}; {cure}") from error
        if not intact:
            raise ValueError(f"{side}: expected the digest of its parts, got another: it was changed by hand; {cure}")
        return found

    def require(self, found: Fingerprint, name: str = "the file", cure: str = _CURE) -> None:
        """Raise an error that names the parts in which `found`, the fingerprint of `name`, is another."""
        different = [
            f"another {part} ({_short(found.parts.get(part))} instead of {_short(self.parts.get(part))})"
            for part in dict.fromkeys([*self.parts, *found.parts])
            if found.parts.get(part) != self.parts.get(part)
        ]
        if different:
            raise ValueError(f"{name} was made with {' and '.join(different)}; {cure}")


def check(expected: Fingerprint, beside: Path | str, cure: str = _CURE) -> None:
    """Refuse a derived file, before it is loaded, unless it was made from what is expected."""
    expected.require(Fingerprint.read(beside, cure), Path(beside).name, cure)


def _side(beside: Path | str) -> Path:
    beside = Path(beside)
    return beside.with_name(f"{beside.name}.fingerprint.json")


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"{digest[:8]}.."


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
