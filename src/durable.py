"""A folder that is whole or not there: written beside its place, forced to the disk, sealed, and then renamed.

A writer that is killed leaves a draft, or the whole folder, and never takes away what was there before, but for one
of the same step or name. The seal tells size and digest of every file, so that a reader finds what was damaged since.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .fingerprint import of_file
from .jsonl import JsonError, loads
from .settings import write_json

SEAL = "COMPLETE.json"
"""The file that is written last."""
DRAFT, GONE = ".tmp", ".gone"
"""What the names of folders end in that are being written, and that are being removed."""

_AT_ONCE = 8  # files that are read at the same time: hashing one does not use up a disk


def draft_of(folder: Path) -> Path:
    """Where a folder is written before it is whole."""
    return folder.with_name(f"{folder.name}{DRAFT}")


def begin(folder: Path) -> Path:
    """Make an empty draft of a folder, in the place of one that somebody left unfinished."""
    draft = draft_of(folder)
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir(parents=True)
    return draft


def contents(folder: Path) -> list[str]:
    """The names of all files in a folder and below, but for the seal."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    return [name for name in (path.relative_to(folder).as_posix() for path in paths) if name != SEAL]


def settle(draft: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Force files to the disk, and return by name what the seal will say of them."""
    found = {}
    for name in names:
        _sync(draft / name)
        found[name] = {"bytes": (draft / name).stat().st_size, "sha256": of_file(draft / name)}
    return found


def publish(draft: Path, folder: Path, files: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Seal a draft whose files are settled, and put it in its place; what is there goes away."""
    for name, told in files.items():
        if not (draft / name).is_file() or (draft / name).stat().st_size != told["bytes"]:
            raise OSError(
                f"{draft / name}: expected the {told['bytes']:,} bytes that another process has written, found none or "
                "others; let all machines write to one file system"
            )
    write_json(draft / SEAL, {**about, "files": dict(files)})
    for inner in [path for path in draft.rglob("*") if path.is_dir()]:
        _sync(inner)
    _sync(draft)
    if folder.exists():
        _put_away(folder)
    draft.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(_gone(folder), ignore_errors=True)  # the next one who tidies up finds it again


def remove(folder: Path) -> None:
    """Remove a folder; killed in between, it is not taken for a whole one."""
    if not folder.name.endswith((DRAFT, GONE)):
        folder = _put_away(folder)
    shutil.rmtree(folder)


def sealed(folder: Path) -> dict[str, Any] | None:
    """What the seal of a folder says; nothing where there is none, or none that can be read."""
    try:
        told = loads((folder / SEAL).read_bytes())
    except (OSError, JsonError):
        return None
    return told if isinstance(told, dict) and isinstance(told.get("files"), dict) else None


def fault(folder: Path, thorough: bool = True) -> str | None:
    """Why a folder is not what was sealed, in words, or nothing; only if `thorough` the contents are read."""
    told = sealed(folder)
    if told is None:
        return f"incomplete: no {SEAL} that can be read"
    files: dict[str, Any] = told["files"]
    for name, expected in files.items():
        if found := _misplaced(folder / name, expected):
            return f"damaged: {name} {found}"
    if not thorough:
        return None
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        read = threads.map(_digest, [folder / name for name in files])
        for (name, expected), found in zip(files.items(), read, strict=True):
            if found != expected["sha256"]:
                return (
                    f"damaged: {name} has other contents than were written ({found:.12} for {expected['sha256']:.12})"
                )
    return None


def _misplaced(path: Path, expected: object) -> str | None:
    """What can be seen of a file without reading it."""
    if not isinstance(expected, dict) or expected.keys() != {"bytes", "sha256"}:
        return "is not described by the seal"
    try:
        told = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return "is missing, or a link"
    if not stat.S_ISREG(told.st_mode):
        return "is missing, or a link"
    size = told.st_size
    return None if size == expected["bytes"] else f"has {size:,} bytes instead of {expected['bytes']:,}"


def _digest(path: Path) -> str:
    try:
        return of_file(path)
    except OSError as error:
        return str(error)


def _gone(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{GONE}")


def _put_away(folder: Path) -> Path:
    """Give a folder a name under which nobody looks for it."""
    gone = _gone(folder)
    if gone.exists():
        shutil.rmtree(gone)
    return folder.rename(gone)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
