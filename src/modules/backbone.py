"""The backbone factory: any checkpoint of a known family, as both Lightning modules use it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..checkpoints import require_pinned, require_safetensors, resolved
from . import attention
from .families import Family, Medium, Part, family_of
from .features import use

if TYPE_CHECKING:
    from torch import Tensor

    from ..batches import PackedRows

log = logging.getLogger(__name__)
Number = Literal["float32", "bfloat16"]
_GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
"""What three-dimensional positions follow from, besides the types of tokens."""
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
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    layers: str = _LINEAR


class Backbone(torch.nn.Module):
    """A checkpoint of a known family: its parts by role, and the way from rows to what its decoder reads."""

    def __init__(self, model: Any, family: Family) -> None:  # noqa: ANN401 - transformers is untyped
        super().__init__()
        self.model, self.family = model, family
        self.decoder.set_attn_implementation(attention.NAME)

    @property
    def whole(self) -> Any:  # noqa: ANN401
        """The transformers model with its head, adapters in place."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def decoder(self) -> Any:  # noqa: ANN401
        """The language model without its head."""
        return getattr(self.whole.model, self.family.decoder)

    @property
    def tower(self) -> Any:  # noqa: ANN401
        """The vision tower."""
        return getattr(self.whole.model, self.family.vision)

    @property
    def head(self) -> Any:  # noqa: ANN401
        """From states to logits."""
        return self.whole.get_output_embeddings()

    @property
    def config(self) -> Any:  # noqa: ANN401
        """The checkpoint's own."""
        return self.whole.config

    def part(self, part: Part) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The parameters of a part, with their names in the model."""
        return ((name, weight) for name, weight in self.model.named_parameters() if self.family.part_of(name) == part)

    def reference(self) -> AbstractContextManager[Any]:
        """Within it the model is the one before training: adapters are off. Only a model with adapters has one."""
        if hasattr(self.model, "disable_adapter"):
            without: AbstractContextManager[Any] = self.model.disable_adapter()
            return without
        if any(weight.requires_grad for weight in self.parameters()):
            raise ValueError(
                "backbone: expected adapters to switch off, got a model that is trained as a whole; its reference is "
                "the checkpoint it began with (`mmrlhf score --reference`)"
            )
        return nullcontext()

    def embed(self, rows: PackedRows) -> Tensor:
        """What the decoder reads, (rows, tokens, width): media are encoded once and put in their places."""
        # Of a medium the token may lie outside of the embeddings; it is replaced anyhow.
        places = [rows.input_ids == getattr(self.config, medium.token) for medium in self.family.media]
        ids = rows.input_ids.masked_fill(torch.stack(places).any(0), 0)
        embeds = self.whole.get_input_embeddings()(ids)
        for medium, place in zip(self.family.media, places, strict=True):
            if medium.pixels in rows.features:
                embeds = _put(embeds, place, self.encoded(medium, rows.features), medium)
            elif place.any():
                raise ValueError(f"batch: expected {medium.pixels} for {int(place.sum())} tokens of media, got none")
        touched: Tensor = embeds + self._touch() if self.training and torch.is_grad_enabled() else embeds
        return touched

    def encoded(self, medium: Medium, features: Mapping[str, Tensor]) -> Tensor:
        """The projected features of all media of a kind, (tokens, width)."""
        told = {name: features[name] for name in medium.arguments if name in features}
        pixels = features[medium.pixels].to(self.whole.dtype)
        found = getattr(self.whole.model, medium.method)(pixels, **told, return_dict=True).pooler_output
        joined = torch.cat(list(found)) if isinstance(found, (list, tuple)) else found
        return joined.flatten(0, -2)

    def _touch(self) -> Any:  # noqa: ANN401 - a scalar, or 0
        """Nothing, with a gradient of zero to what a batch without media does not reach.

        Every rank then has a gradient for the same parameters, whatever is in its batch.
        """
        sides = [weight for part in ("vision", "projector") for _, weight in self.part(part) if weight.requires_grad]
        return sum((weight.flatten()[:1].sum() * 0 for weight in sides), start=0.0)

    def positions(self, rows: PackedRows) -> Tensor:
        """Where each token stands, (rows, tokens) or (3, rows, tokens): segments go on where their prefix ends."""
        if self.family.positions == "running":
            return rows.position_ids
        prefix = rows.segment_ids == 0
        grids = {name: rows.features[name] for name in _GRIDS if name in rows.features}
        types = self._types(rows)
        found = self.whole.model.get_rope_index(rows.input_ids, types, attention_mask=prefix.long(), **grids)[0]
        after = torch.where(prefix, found, -1).amax((0, 2)) + 1  # (rows,)
        behind = rows.position_ids - prefix.sum(1, keepdim=True) + after[:, None]
        return torch.where(prefix, found, behind)

    def masks(self, embeds: Tensor, mask: Tensor, positions: Tensor, types: Tensor | None) -> Any:  # noqa: ANN401
        """What the decoder takes as attention mask of ordinary rows, whose real tokens `mask` tells."""
        if self.family.masks is None:
            return mask
        if types is None:
            raise ValueError(f"batch: expected {self.family.token_types} for every token, got none; see `encoding`")
        return self.family.masks(self.config.get_text_config(), embeds, mask, positions, types)

    def _types(self, rows: PackedRows) -> Tensor:
        name = self.family.token_types
        if name not in rows.per_token:
            raise ValueError(f"batch: expected {name} for every token, got {sorted(rows.per_token)}; see `encoding`")
        return rows.per_token[name]


def _put(embeds: Tensor, place: Tensor, features: Tensor, medium: Medium) -> Tensor:
    """The embeddings with features in these places."""
    if int(place.sum()) != len(features):
        raise ValueError(
            f"{medium.pixels}: expected features for {int(place.sum())} tokens of media, got {len(features)}; the "
            "processor and the model are of different checkpoints, or a prefix was cut"
        )
    return embeds.masked_scatter(place[..., None], features.to(embeds.dtype))


def backbone_of(model: Any) -> Backbone:  # noqa: ANN401
    """A transformers model that is built already, as a backbone."""
    return Backbone(model, family_of(model.config))


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
    from transformers import AutoConfig, AutoModelForImageTextToText

    require_pinned(name_or_path, trust_remote_code, revision)
    folder = resolved(name_or_path, revision, code=trust_remote_code)
    trusted: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    family_of(AutoConfig.from_pretrained(folder, **trusted))  # refuse an unknown family before weights are read
    require_safetensors(folder)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=vision_attention, use_safetensors=True, **trusted
    )
    backbone = backbone_of(model)
    if activation_checkpointing:
        _checkpoint_activations(backbone.decoder)
    ready = adapted(backbone, lora) if lora else frozen(backbone, freeze or Freeze())
    _for_training(ready)
    return ready if features is None else use(ready, Path(features))


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
    return Backbone(get_peft_model(backbone.model, settings), backbone.family)


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


def _for_training(backbone: Backbone) -> None:
    """Dropout as the checkpoint says, but none in a tower that does not learn."""
    backbone.train()
    if not any(weight.requires_grad for _, weight in backbone.part("vision")):
        backbone.tower.eval()


def _checkpoint_activations(decoder: Any) -> None:  # noqa: ANN401
    # The name changed in transformers 5.23, and the old one warns.
    enable = getattr(decoder, "activation_checkpointing_enable", decoder.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
