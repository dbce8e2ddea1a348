"""What a checkpoint is known by in fingerprints: one digest of its model, one of its processor."""

from __future__ import annotations

from pathlib import Path

from .fingerprint import of_file, of_value

_CONFIG = "config.json"
_SETTINGS = (".json", ".jinja", ".txt", ".model")
_OF_MODEL = (_CONFIG, "generation_config.json")
"""What no processor is made of; transformers writes its own version into it, so every copy is another."""


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
    told = [path for path in files if path.name.endswith(_SETTINGS) and not _is_of_model(path.name)]
    return of_value({path.relative_to(folder).as_posix(): of_file(path) for path in told})


def _is_of_model(name: str) -> bool:
    return name in _OF_MODEL or name.endswith(".safetensors.index.json")
