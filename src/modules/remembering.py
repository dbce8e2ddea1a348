"""What a reward model remembers of packed rows while critiques grow behind them.

Either all critiques of the rows at once, each row growing by a token per critique, or one critique by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from ..batches import PADDING, PREFIX
from .attention import shared_prefixes
from .packed import lengths, unpacked
from .reward import ends

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ..batches import PackedRows
    from .attention import SharedPrefixes
    from .backbone import Backbone
    from .packed import PackedReader


def memories(reader: PackedReader, rows: PackedRows, samples: int) -> Iterator[tuple[slice, Together | Alone]]:
    """Memories of all critiques in their order: one of all together, or one of each."""
    backbone = reader.backbone
    embeds, positions = backbone.embed(rows), backbone.positions(rows)
    if reader.step == "shared_prefix":
        yield slice(None), Together(reader, rows, embeds, positions, samples)
        return
    types = rows.per_token.get(backbone.family.token_types)
    for response, (row, columns, inside) in enumerate(zip(*unpacked(rows), strict=True)):
        at = columns[inside]
        kinds = None if types is None else types[row, at][None]
        for voice in range(response * samples, (response + 1) * samples):
            yield slice(voice, voice + 1), Alone(backbone, embeds[row, at][None], positions[..., row, at], kinds)


class Together:
    """All critiques of packed rows: each row grows by a token per critique."""

    def __init__(self, reader: PackedReader, rows: PackedRows, embeds: Tensor, positions: Tensor, samples: int) -> None:
        self.backbone, self.kernel, self.samples = reader.backbone, reader.kernel, samples
        self.rows, self.embeds, self.positions = rows, embeds, positions
        self.cache, self.labels, last = DynamicCache(), rows.segment_ids, ends(rows)
        self.row, segments = last.rows.repeat_interleave(samples), rows.segment_ids.amax(1)
        self.given = (last.owners - (segments.cumsum(0) - segments)[last.rows] + 1).repeat_interleave(samples)
        # Critiques go on in numbers where the segments of the longest row end.
        self.voice = torch.arange(len(self.row), device=self.row.device) + rows.segment_ids.max() + 1
        seen = (self.labels[self.row] == PREFIX) | (self.labels[self.row] == self.given[:, None])
        self.next = torch.where(seen, positions[..., self.row, :], -1).amax(-1) + 1  # (critiques,) or (3, critiques)
        self._arrange()

    def begin(self) -> Tensor:
        """All rows end to end, as they are read in training."""
        rows, real, last = self.rows, self.rows.segment_ids != PADDING, ends(self.rows)
        counts = real.sum(1)
        needed, at = torch.unique((counts.cumsum(0) - counts)[last.rows] + last.columns, return_inverse=True)
        layout = shared_prefixes(lengths(rows), real.device, self.kernel)._replace(needed=needed)
        told = self.embeds[real][None], self.positions[..., real][..., None, :], real.new_ones(1, 1, 1, 1)
        states = _states(self.backbone, *told, self.cache, shared_prefix=layout)
        layers: Any = self.cache.layers
        for layer in layers:
            layer.keys, layer.values = _apart(layer.keys, real), _apart(layer.values, real)
        states = states[0][at if states.shape[1] == len(needed) else needed[at]]
        return states.repeat_interleave(self.samples, 0)

    def read(self, tokens: Tensor) -> Tensor:
        """One more column for each critique of a row, and one more row of the mask."""
        at = self.row, self.slot
        embeds = self.backbone.whole.get_input_embeddings()(tokens.new_zeros(self.own.shape).index_put(at, tokens))
        positions = self.next.new_zeros(*self.next.shape[:-1], *self.own.shape)
        positions[..., self.row, self.slot] = self.next
        self.labels = torch.cat([self.labels, self.own], 1)
        key = self.labels[:, None]
        mask = (key == PREFIX) | (key == self.behind[..., None]) | (key == self.own[..., None])
        self.next = self.next + 1
        # As numbers to add, once for all layers: each would make them of truth values by itself.
        return _states(self.backbone, embeds, positions, mask[:, None].to(embeds.dtype).log(), self.cache)[at]

    def keep(self, still: Tensor) -> None:
        """Critiques that have ended get no more columns, and rows without others are forgotten."""
        self.given, self.voice, self.next = self.given[still], self.voice[still], self.next[..., still]
        rows, self.row = torch.unique(self.row[still], return_inverse=True)
        if len(rows) < len(self.labels):
            self.labels = self.labels[rows]
            self.cache.batch_select_indices(rows)
        self._arrange()

    def join(self, other: Together) -> None:
        """Take another memory's rows in, which go on from where they are; columns that nobody reads are forgotten."""
        both = (self, other)
        for memory in both:
            _forget(memory)
        width = max(memory.labels.shape[1] for memory in both)
        gaps = [width - memory.labels.shape[1] for memory in both]
        self.row = torch.cat([self.row, other.row + len(self.labels)])
        self.labels = torch.cat([pad(m.labels, (0, gap), value=PADDING) for m, gap in zip(both, gaps, strict=True)])
        self.given, self.voice = (torch.cat([getattr(m, name) for m in both]) for name in ("given", "voice"))
        self.next = torch.cat([memory.next for memory in both], -1)
        for layers in zip(*(memory.cache.layers for memory in both), strict=True):
            for name in ("keys", "values"):
                kept = [pad(getattr(of, name), (0, 0, 0, gap)) for of, gap in zip(layers, gaps, strict=True)]
                setattr(layers[0], name, torch.cat(kept))
        self._arrange()

    def _arrange(self) -> None:
        """Which column of a step is whose; a row with fewer critiques than another has padding."""
        counts = torch.bincount(self.row, minlength=len(self.labels))
        self.slot = torch.arange(len(self.row), device=self.row.device) - (counts.cumsum(0) - counts)[self.row]
        empty = self.voice.new_full((len(counts), int(counts.max())), PADDING)
        self.own, self.behind = (empty.index_put((self.row, self.slot), each) for each in (self.voice, self.given))


def _forget(memory: Together) -> None:
    """Drop the columns that no row reads: those of rows that have ended, behind shorter ones that go on."""
    used = (memory.labels != PADDING).any(0)
    if used.all():
        return
    memory.labels = memory.labels[:, used]
    layers: Any = memory.cache.layers
    for layer in layers:
        layer.keys, layer.values = layer.keys[:, :, used], layer.values[:, :, used]


def _apart(kept: Tensor, real: Tensor) -> Tensor:
    """What is kept of rows end to end, (1, heads, all tokens, width), as (rows, heads, tokens, width)."""
    if len(real) == 1:
        return kept
    rows = kept.new_zeros(*real.shape, kept.shape[1], kept.shape[3])
    rows[real] = kept[0].transpose(0, 1)
    return rows.transpose(1, 2)


class Alone:
    """One critique, read as the family's own model reads it; for layers that cannot share a prefix."""

    def __init__(self, backbone: Backbone, embeds: Tensor, positions: Tensor, types: Tensor | None) -> None:
        self.backbone, self.embeds, self.types = backbone, embeds, types
        self.positions, self.next = positions[..., None, :], positions.amax() + 1
        self.seen = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        self.cache = DynamicCache(config=backbone.decoder.config)

    def begin(self) -> Tensor:
        """The response behind its prefix."""
        masks = self.backbone.masks(self.embeds, self.seen, self.positions, self.types)
        return _states(self.backbone, self.embeds, self.positions, masks, self.cache)[:, -1]

    def read(self, tokens: Tensor) -> Tensor:
        """One more token."""
        self.seen = torch.cat([self.seen, self.seen[:, :1]], 1)
        embeds = self.backbone.whole.get_input_embeddings()(tokens[None])
        positions = self.next.expand(*self.positions.shape[:-1], 1)
        self.next = self.next + 1
        return _states(self.backbone, embeds, positions, self.seen, self.cache)[:, -1]

    def keep(self, still: Tensor) -> None:
        """There is only one, which goes on."""


def _states(
    backbone: Backbone, embeds: Tensor, positions: Tensor, mask: object, cache: DynamicCache, **layout: SharedPrefixes
) -> Tensor:
    """The last states, (rows, tokens, width); what the layers remember is kept in the cache."""
    told = {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": mask}
    states: Tensor = backbone.decoder(**told, past_key_values=cache, use_cache=True, **layout).last_hidden_state
    return states
