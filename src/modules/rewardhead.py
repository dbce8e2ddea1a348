"""Body and head of a reward model, as they lie in one folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoints import require_safetensors
from .loading import Number, load_backbone
from .reward import RewardHead

if TYPE_CHECKING:
    from torch import Tensor

    from .backbone import Backbone

NAME = "reward_head"
"""Under which the head's tensors lie among the body's."""


def head_of(folder: Path, dtype: torch.dtype) -> RewardHead:
    """The head in the safetensors of a folder."""
    from safetensors import safe_open

    require_safetensors(folder)
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys() if name.startswith(f"{NAME}.")}  # noqa: SIM118
    named = {name.removeprefix(f"{NAME}."): tensor for name, tensor in found.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    width, outputs = shapes.get("dense.bias", (0,))[0], shapes.get("out.bias", (0,))[0]
    wanted = {"dense.weight": (width, width), "dense.bias": (width,), "out.weight": (outputs, width)}
    if not width or not outputs or shapes != wanted | {"out.bias": (outputs,)}:
        raise ValueError(
            f"{folder}: expected a reward head ({NAME}.dense and {NAME}.out, weight and bias) in its safetensors, got "
            f"{shapes or 'none'}; without its own head a reward model gives numbers by chance: save it again"
        )
    if not all(tensor.isfinite().all() for tensor in named.values()):
        raise ValueError(f"{folder}: expected a reward head of finite numbers, got others; train it again")
    head = RewardHead(width, outputs - 1, dtype)
    head.load_state_dict(named)
    return head


def body_of(folder: Path, dtype: Number) -> Backbone:
    """The body in a folder; transformers does not warn of the head beside it."""
    with _expected(folder):
        return load_backbone(str(folder), dtype=dtype)


@contextmanager
def _expected(folder: Path) -> Iterator[None]:
    """The head's tensors, and no others, are none that transformers is surprised at."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, PreTrainedModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), PreTrainedModel)
    before = kind._keys_to_ignore_on_load_unexpected  # noqa: SLF001
    kind._keys_to_ignore_on_load_unexpected = [*(before or ()), rf"^{NAME}\."]  # noqa: SLF001
    try:
        yield
    finally:
        kind._keys_to_ignore_on_load_unexpected = before  # noqa: SLF001
