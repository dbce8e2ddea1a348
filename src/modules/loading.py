"""The backbone factory: any checkpoint of a known family, as both Lightning modules use it."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from ..checkpoints import require_pinned, require_safetensors, resolved
from .backbone import Backbone, backbone_of
from .families import Part, family_of
from .features import require_frozen, use
from .weights import Weights, empty_model

Number = Literal["float32", "bfloat16"]
_LINEAR = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


@dataclass(frozen=True)
class Freeze:
    """Which parts are not trained.

    Args:
        vision: The vision tower, frozen in the paper.
        projector: What stands between tower and decoder.
        language: The decoder with its embeddings and head.
        also: Patterns (regular expressions) of names of further parameters that are not.
    """

    vision: bool = True
    projector: bool = False
    language: bool = False
    also: tuple[str, ...] = ()

    def holds(self, part: Part, name: str) -> bool:
        """Whether a parameter of a part is frozen."""
        return getattr(self, part) or any(re.search(pattern, name) for pattern in self.also)


@dataclass(frozen=True)
class Lora:
    """Adapters on the decoder's linear layers, which alone are trained then.

    Args:
        rank: Of the adapters.
        alpha: Their scale, over the rank.
        dropout: On what goes into an adapter.
        layers: Pattern (regular expression) of the last part of the names of adapted layers.
        seed: Decides the adapters' weights before training, the same on all ranks.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    layers: str = _LINEAR
    seed: int = 0


def load_backbone(
    name_or_path: str,
    *,
    dtype: Number = "float32",
    vision_attention: str = "sdpa",
    freeze: Freeze | None = None,
    lora: Lora | None = None,
    activation_checkpointing: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    features: Path | None = None,
) -> Backbone:
    """Load a checkpoint of a known family, ready for training.

    Args:
        name_or_path: A folder, or the name of a repository on the hub.
        dtype: The type of the weights.
        vision_attention: How the vision tower attends, by transformers' name.
        freeze: Which parts are not trained; default: the vision tower.
        lora: Train adapters instead of the weights.
        activation_checkpointing: Compute the decoder's layers again in the backward pass, instead of keeping them.
        revision: Commit, tag or branch of the repository.
        trust_remote_code: Run code that comes with the checkpoint; only of a pinned commit.
        features: Folder of what the frozen vision tower makes of all pictures (`mmrlhf features`); null: compute it.
    """
    from transformers import AutoModelForImageTextToText

    folder = _checked(name_or_path, revision, trust_remote_code)
    model = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation=vision_attention,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
    )
    ready = _ready(model, freeze, lora, activation_checkpointing)
    if lora is not None and not Path(name_or_path).expanduser().is_dir():
        _name_base(ready, name_or_path, revision)
    return ready if features is None else use(ready, Path(features))


def _name_base(backbone: Backbone, name: str, revision: str | None) -> None:
    """Let adapters and their card tell the name of their base on the hub, not where this machine's cache keeps it."""
    name, _, pinned = name.partition("@")
    backbone.whole.name_or_path = backbone.config.name_or_path = name
    for adapter in backbone.model.peft_config.values():
        adapter.base_model_name_or_path, adapter.revision = name, pinned or revision


def _checked(name_or_path: str, revision: str | None, code: bool, weights: bool = True) -> Path:
    """The folder of a checkpoint of a known family that is safe to load; others are refused before weights are read."""
    from transformers import AutoConfig

    require_pinned(name_or_path, code, revision)
    folder = resolved(name_or_path, revision, code=code, weights=weights)
    family_of(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=code))
    if weights:
        require_safetensors(folder)
    return folder


def _ready(model: Any, freeze: Freeze | None, lora: Lora | None, activation_checkpointing: bool) -> Backbone:  # noqa: ANN401
    """The model as a backbone of which is trained what shall be."""
    backbone = backbone_of(model)
    if activation_checkpointing:
        _checkpoint_activations(backbone.decoder)
    if lora and freeze not in (None, Freeze()):
        raise ValueError(f"freeze: expected nothing beside lora, which freezes all but its adapters, got {freeze}")
    ready = adapted(backbone, lora) if lora else frozen(backbone, freeze or Freeze())
    _for_training(ready)
    return ready


def frozen(backbone: Backbone, freeze: Freeze) -> Backbone:
    """The backbone with the parameters that are not trained marked so."""
    for name, weight in backbone.model.named_parameters():
        weight.requires_grad_(not freeze.holds(backbone.family.part_of(name), name))
    if not any(weight.requires_grad for weight in backbone.parameters()):
        raise ValueError(f"freeze: expected something left to train, got {freeze}; set a part to false")
    return backbone


def adapted(backbone: Backbone, lora: Lora) -> Backbone:
    """The backbone with adapters on its decoder, and everything else frozen."""
    from peft import LoraConfig, get_peft_model

    where = rf"(?:.*\.)?{backbone.family.decoder}\.(?:.*\.)?(?:{lora.layers})"
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=where)
    model: Any = get_peft_model(backbone.model, settings)
    # With recomputed activations peft lets all inputs have gradients, which another kind of recomputation needs: the
    # backward pass would go on through a frozen tower, on those ranks alone that have pictures.
    model.get_base_model().disable_input_require_grads()
    for path, part in model.named_modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight.requires_grad:
                setattr(part, name, _untrained(weight, f"{path}.{name}", lora.seed))
    return Backbone(model, backbone.family)


def _untrained(weight: torch.nn.Parameter, path: str, seed: int) -> torch.nn.Parameter:
    """An adapter's matrix before training, with the distribution that peft has: the first by chance, the second 0.

    Each follows from the seed and its name: ranks that hold parts of it, or one process alone, have the same.
    """
    values = torch.zeros(weight.shape, dtype=weight.dtype)
    if ".lora_A." in path:
        chance = torch.Generator().manual_seed(zlib.crc32(f"{seed} {path}".encode()))
        values.uniform_(-(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5, generator=chance)
    return torch.nn.Parameter(values.to("cpu" if weight.is_meta else weight.device))


@dataclass(frozen=True)
class BackboneConfig:
    """What `load_backbone` is called with, as a config holds it.

    Args:
        path: A folder, or the name of a repository on the hub.
        dtype: The type of the weights.
        vision_attention: How the vision tower attends, by transformers' name.
        freeze: Which parts are not trained.
        lora: Train adapters on the decoder instead of the weights.
        activation_checkpointing: Compute the decoder's layers again in the backward pass, instead of keeping them.
        revision: Commit, tag or branch of the repository.
        trust_remote_code: Run code that comes with the checkpoint; only of a pinned commit.
        features: Folder of what the frozen vision tower makes of all pictures (`mmrlhf features`); null: compute it.
    """

    path: str
    dtype: Number = "float32"
    vision_attention: str = "sdpa"
    freeze: Freeze = field(default_factory=Freeze)
    lora: Lora | None = None
    activation_checkpointing: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    features: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies; fetched from the hub, where it is not yet here."""
        return resolved(self.path, self.revision, code=self.trust_remote_code)

    def load(self) -> Backbone:
        """Load it."""
        told = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "path"}
        return load_backbone(self.path, **told)

    def empty(self) -> tuple[Backbone, Weights]:
        """The same without weights, and what they are read with."""
        folder = _checked(self.path, self.revision, self.trust_remote_code)
        model = empty_model(folder, getattr(torch, self.dtype), self.vision_attention, self.trust_remote_code)
        weights = Weights(model, folder)
        ready = _ready(model, self.freeze, self.lora, self.activation_checkpointing)
        if self.features is not None:
            weights.fill(ready.tower)  # whose fingerprint is compared
            use(ready, Path(self.features))
        return ready, weights

    def shapes(self) -> Backbone:
        """The same for which no weights need be there, and none are read."""
        folder = _checked(self.path, self.revision, self.trust_remote_code, weights=False)
        model = empty_model(folder, getattr(torch, self.dtype), self.vision_attention, self.trust_remote_code)
        ready = _ready(model, self.freeze, self.lora, self.activation_checkpointing)
        if self.features is not None:
            require_frozen(ready, Path(self.features))
            ready.tower_kept = True
        return ready


def _for_training(backbone: Backbone) -> None:
    """Dropout as the checkpoint says, but none in a tower that does not learn."""
    backbone.train()
    if not any(weight.requires_grad for _, weight in backbone.part("vision")):
        backbone.tower.eval()


def _checkpoint_activations(decoder: Any) -> None:  # noqa: ANN401
    # The name changed in transformers 5.23, and the old one warns.
    enable = getattr(decoder, "activation_checkpointing_enable", decoder.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    decoder.disable_input_require_grads()  # see `adapted`
