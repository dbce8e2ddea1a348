"""A checkpoint built without weights, and its weights read from their files when they are asked for, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter


def empty_model(folder: Path, dtype: torch.dtype, vision_attention: str, trust_remote_code: bool) -> Any:  # noqa: ANN401
    """The transformers model of a checkpoint: parameters without memory, buffers as they always are."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    trusted: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **trusted)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation=vision_attention, **trusted
        )
    for part in model.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.zeros_like(buffer, device="cpu"))
    model.initialize_weights()  # of parameters that have no memory, nothing; buffers follow from the config
    model.tie_weights()
    return model


class Weights:
    """Where the weights of a model that was built empty lie, in a folder of safetensors.

    Args:
        model: The transformers model, as `empty_model` builds it.
        folder: Its checkpoint.
    """

    def __init__(self, model: Any, folder: Path) -> None:  # noqa: ANN401
        self._files: dict[str, Any] = {}
        named = dict(model.named_parameters(remove_duplicate=False))
        places = {name: (file, key) for name, file, key in _places(model, folder)}
        self._places = {named[name]: place for name, place in places.items() if name in named}
        # Weak: what is sharded at once must not stay whole here.
        self._filled: WeakValueDictionary[Parameter, Parameter] = WeakValueDictionary()
        if missing := sorted(name for name, weight in named.items() if weight not in self._places):
            raise ValueError(
                f"{folder}: expected all weights of a {type(model).__name__}, {len(missing)} are missing, such as "
                f"{missing[0]}; the checkpoint is incomplete, or of another model"
            )
        for name, buffer in model.named_buffers():
            if name in places:
                buffer.copy_(self._read(*places[name]))

    def fill(self, module: Module) -> None:
        """Read the weights of a part of the model that have no memory yet; those that are tied stay one."""
        for part in module.modules():
            for name, weight in part.named_parameters(recurse=False):
                if weight.is_meta:
                    values = self._filled.get(weight)
                    self._filled[weight] = values = self._new(weight) if values is None else values
                    setattr(part, name, values)

    def _new(self, weight: Parameter) -> Parameter:
        values = self._read(*self._places[weight])
        if values.shape != weight.shape:
            raise ValueError(
                f"{self._places[weight][1]}: expected a weight of {tuple(weight.shape)}, got one of "
                f"{tuple(values.shape)}; config and weights are of different checkpoints"
            )
        return torch.nn.Parameter(values.to(weight.dtype, copy=True), requires_grad=weight.requires_grad)

    def _read(self, file: Path, key: str) -> Tensor:
        found: Tensor = self._open(file).get_tensor(key)
        return found

    def _open(self, file: Path) -> Any:  # noqa: ANN401
        if str(file) not in self._files:
            self._files[str(file)] = safe_open(file, framework="pt")
        return self._files[str(file)]


def _places(model: Any, folder: Path) -> Iterator[tuple[str, Path, str]]:  # noqa: ANN401
    """Of every weight in the files its name in the model, the file, and its name there."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamed = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    made = [rule for rule in rules if isinstance(rule, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - no dictionary
                name, converted = rename_source_key(key, renamed, made, prefix, known)
                if converted is not None:
                    raise ValueError(
                        f"{file}: expected weights as the model holds them, got {key}, which is made from others; save "
                        "the checkpoint once with transformers' save_pretrained, or train without sharding"
                    )
                yield name, file, key
