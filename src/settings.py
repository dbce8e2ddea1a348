"""What a folder was made with: written into it as JSON, compared before anybody goes on in it."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from . import jsonl

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make the folder and keep other processes from writing into it at the same time."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, got a file; give another one")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder}: another process writes into it; let that end first, or give another folder"
            ) from error
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def claim(folder: Path, name: str, settings: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Make the folder ours for these settings, and return what its marker file `name` says.

    A folder that was made with other settings, or that holds anything else, is refused; `what` is what it should
    hold, in a word or two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if path.exists():
        marker = jsonl.loads(path.read_bytes())
        there = marker.get("settings") if isinstance(marker, dict) else None
        if not isinstance(there, dict):
            raise ValueError(f"{path}: expected the settings of {what}, found another file; give another --out")
        if other := differing(there, settings):
            raise ValueError(f"{folder}: holds {what} with {other}; give another --out, or remove it")
        return dict(marker)
    if [entry for entry in folder.iterdir() if entry.name != f"{name}.tmp"]:  # the draft of a run that was killed
        raise ValueError(f"{folder}: expected an empty folder or {what}, found other files; give another --out")
    marker = {"settings": dict(settings)}
    write_json(path, marker)
    return marker


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one object, indented for people, whole or not at all."""
    jsonl.replace(path, json.dumps(value, indent=1).encode() + b"\n")


def differing(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """What was made otherwise than is asked for, in words; empty where nothing was.

    >>> differing({"seed": 0, "steps": 4}, {"seed": 0, "steps": 9})
    'steps 4 instead of 9'
    """
    other = {name: value for name, value in asked.items() if there.get(name) != value}
    return "; ".join(f"{name} {there.get(name)!r} instead of {value!r}" for name, value in other.items())
