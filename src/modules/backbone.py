"""A checkpoint of a known family by its parts, and the way from rows to what its decoder reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from . import attention
from .families import Family, Medium, Part, family_of
from .lastlayer import shorten
from .towers import instead

if TYPE_CHECKING:
    from torch import Tensor

    from ..batches import PackedRows

_GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
"""What three-dimensional positions follow from, besides the types of tokens."""


class Backbone(torch.nn.Module):
    """The parts of a checkpoint by role, whatever its family calls them."""

    def __init__(self, model: Any, family: Family) -> None:  # noqa: ANN401 - transformers is untyped
        super().__init__()
        self.model, self.family = model, family
        self.apart: tuple[Any, ...] = ()
        """Vision layers whose weights are sharded each for itself, and gathered only when one is called."""
        self.tower_kept = False
        """Whether what the vision tower says is read from a store, so that it never computes."""
        self.decoder.set_attn_implementation(attention.NAME)
        shorten(self.decoder)

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

    def layers(self, of: Any) -> list[torch.nn.Module]:  # noqa: ANN401
        """The layers of tower or decoder, one behind the other: the list that has most of its weights."""
        lists = [part for part in of.modules() if isinstance(part, torch.nn.ModuleList)]
        return list(max(lists, key=lambda part: sum(weight.numel() for weight in part.parameters()), default=()))

    @property
    def read_layers(self) -> list[torch.nn.Module]:
        """The layers of the tower up to the last whose states are read; some families leave out the very last."""
        layers, read = self.layers(self.tower), getattr(self.config, "vision_feature_layer", -1)
        return layers[: max(number % (len(layers) + 1) for number in ([read] if isinstance(read, int) else read))]

    @property
    def config(self) -> Any:  # noqa: ANN401
        """The checkpoint's own."""
        return self.whole.config

    def part(self, part: Part) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The parameters of a part, with their names in the model."""
        return ((name, weight) for name, weight in self.model.named_parameters() if self.family.part_of(name) == part)

    def trained(self) -> dict[str, list[torch.nn.Parameter]]:
        """What is trained, by part."""
        every: tuple[Part, ...] = ("vision", "projector", "language")
        return {part: [weight for _, weight in self.part(part) if weight.requires_grad] for part in every}

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
            elif self.apart:
                embeds = embeds + self._pass_by()
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
        apart = {id(weight) for layer in self.apart for weight in layer.parameters()}
        sides = (weight for part in ("vision", "projector") for _, weight in self.part(part))
        return _nothing_of(weight for weight in sides if id(weight) not in apart)

    def _pass_by(self) -> Tensor:
        """Nothing, by way of all vision layers that are sharded, as a rank goes that has media.

        Gathering a layer's weights, and reducing its gradients, takes all ranks, in the same order.
        """
        apart = {id(weight) for layer in self.apart for weight in layer.parameters()}
        before = takewhile(lambda weight: id(weight) not in apart, self.tower.parameters())
        state: Tensor = torch.zeros((), device=self.head.weight.device) + _nothing_of(before)
        for layer in self.apart:
            with instead(layer, partial(_through, layer)):
                state = layer(state)
        return state

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


def _nothing_of(weights: Iterable[torch.nn.Parameter]) -> Any:  # noqa: ANN401 - a scalar, or 0
    """Nothing, with a gradient of zero to those of the weights that are trained."""
    return sum((weight.flatten()[:1].sum() * 0 for weight in weights if weight.requires_grad), start=0.0)


def _through(layer: torch.nn.Module, state: Tensor) -> Tensor:
    """In place of a layer's forward: what comes in, with a gradient of zero to the layer."""
    passed: Tensor = state + _nothing_of(layer.parameters())
    return passed


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
