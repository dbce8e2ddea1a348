"""What a folder was made with: written beside it as JSON, compared before anybody goes on in it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .. import jsonl

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one object, indented for people, whole or not at all."""
    with jsonl.replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def differing(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """What was made otherwise than is asked for, in words; empty where nothing was.

    >>> differing({"seed": 0, "steps": 4}, {"seed": 0, "steps": 9})
    'steps 4 instead of 9'
    """
    other = {name: value for name, value in asked.items() if there.get(name) != value}
    return "; ".join(f"{name} {there.get(name)!r} instead of {value!r}" for name, value in other.items())
