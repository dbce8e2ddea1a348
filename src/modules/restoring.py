"""The weights of a checkpoint, in one file or in the parts of many ranks, given to a module by a single process."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from .towers import raw_bytes

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHTS, _BESIDE = "state_dict", "meta.pt"
"""Where Lightning puts the weights of a module, and in a folder of parts the file with what is no tensor."""
Kind = tuple[torch.Size, torch.dtype]


def restore(module: torch.nn.Module, state: Path) -> dict[str, Any]:
    """Give a module, which has the weights that the training began with, those of a checkpoint.

    Weights are copied one after another; the optimiser's state is not read. What the training left alone must be in
    both the same.

    Returns:
        What else is in the checkpoint: its step, and what callbacks keep.
    """
    own, before = module.state_dict(), _digest_of_frozen(module)
    told = _from_parts(own, state) if state.is_dir() else _from_file(own, state)
    if _digest_of_frozen(module) != before:
        raise ValueError(
            f"{state}: expected, where nothing was trained, the weights of the checkpoint that the training began "
            "with, got others; give that one with --base"
        )
    return told


def _from_file(own: Mapping[str, Tensor], state: Path) -> dict[str, Any]:
    # Mapped: of the file, which holds the optimiser's state too, only what is copied comes into memory.
    told: dict[str, Any] = torch.load(state, map_location="cpu", weights_only=True, mmap=True)
    found: dict[str, Tensor] = told.pop(_WEIGHTS)
    _require_same(own, {name: (values.shape, values.dtype) for name, values in found.items()}, state)
    for name, values in found.items():
        own[name].copy_(values)
    told.pop("optimizer_states", None)
    return told


def _from_parts(own: Mapping[str, Tensor], state: Path) -> dict[str, Any]:
    reader, before = FileSystemReader(state), f"{_WEIGHTS}."
    try:
        entries = reader.read_metadata().state_dict_metadata
        parts = {name: each for name, each in entries.items() if isinstance(each, TensorStorageMetadata)}
        kinds = {name: (each.size, each.properties.dtype) for name, each in parts.items()}
        found = {name.removeprefix(before): kind for name, kind in kinds.items() if name.startswith(before)}
        _require_same(own, found, state)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant to be
            load({_WEIGHTS: dict(own)}, storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # no Exception, and what it tells is many lines
        cause, _ = error.failures[min(error.failures)]
        raise OSError(f"{state}: could not be read ({cause})") from error
    told: dict[str, Any] = torch.load(state / _BESIDE, map_location="cpu", weights_only=True)
    return told


def _require_same(own: Mapping[str, Tensor], found: Mapping[str, Kind], state: Path) -> None:
    """Refuse weights of another model before any of them is read."""
    wanted = {name: (values.shape, values.dtype) for name, values in own.items()}
    other = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if other:
        came, due = _told(found.get(other[0])), _told(wanted.get(other[0]))
        raise ValueError(
            f"{state}: expected the weights of the run's model, got {len(other)} others, such as {other[0]} ({came} "
            f"instead of {due}); give with --base the checkpoint that the training began with"
        )


def _told(kind: Kind | None) -> str:
    return "none" if kind is None else f"{tuple(kind[0])} of {str(kind[1]).removeprefix('torch.')}"


def _digest_of_frozen(module: torch.nn.Module) -> str:
    """What stands for the weights that are not trained."""
    digest = hashlib.sha256()
    for weight in module.parameters():
        if not weight.requires_grad:
            digest.update(raw_bytes(weight))
    return digest.hexdigest()
