"""What a checkpoint is known by in fingerprints: one digest of its model, one of its processor."""

from __future__ import annotations

import re
from pathlib import Path

from .fingerprint import of_file, of_value

_CONFIG = "config.json"
_OF_PROCESSOR = re.compile(
    r"(tokenizer|added_tokens|special_tokens|vocab|merges|chat_template|(\w+_)?(pre)?processor|(\w+_)?processing)"
    r"[\w.-]*\.(json|jinja|txt)|.+\.(model|tiktoken|jinja)"
)
"""Names of files that processors are made of; a checkpoint may lie among others, of a training or of an examination."""


def model_digest(folder: Path) -> str:
    """What stands for the model of a checkpoint: its weights and its architecture."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / _CONFIG).is_file():
        raise ValueError(f"{folder}: expected {_CONFIG} and weights (*.safetensors), found none; check the path")
    return of_value({path.name: of_file(path) for path in [*weights, folder / _CONFIG]})


def processor_digest(folder: Path) -> str:
    """What stands for the processor of a checkpoint: its tokenizer, its templates, how it treats media."""
    # Of what lies deeper only templates: a training leaves checkpoints in folders.
    files = [path for path in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")] if path.is_file()]
    told = [path for path in files if _OF_PROCESSOR.fullmatch(path.name)]
    return of_value({path.relative_to(folder).as_posix(): of_file(path) for path in told})
