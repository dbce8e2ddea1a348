"""The states that a decoder gives to packed rows: each query in one row, or each response in a row of its own.

Both ways take the same packed rows and give the same numbers and gradients. `shared_prefix` computes every token
once. `separate` serves backbones whose layers cannot share a prefix; media are encoded once in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from ..batches import PADDING, PackedRows
from .attention import Kernel, SharedPrefixes, shared_prefixes
from .families import why_not_shared

if TYPE_CHECKING:
    from torch import Tensor

    from .backbone import Backbone

Step = Literal["auto", "shared_prefix", "separate"]
Way = Literal["shared_prefix", "separate"]


class Places(NamedTuple):
    """Tokens of packed rows whose states are read; each tensor is (places,)."""

    rows: Tensor
    columns: Tensor
    owners: Tensor
    """The response, by its number in the batch, for which it is read: a prefix's last token is read for each."""


def lengths(rows: PackedRows) -> list[tuple[int, tuple[int, ...]]]:
    """Of each row, the length of its prefix and of its segments."""
    most = int(rows.segment_ids.max()) + 1
    numbers = torch.arange(most, device=rows.segment_ids.device)
    counted = (rows.segment_ids[:, :, None] == numbers).sum(1).tolist()  # one transfer for the whole batch
    last = rows.segment_ids.amax(1).tolist()
    return [(count[0], tuple(count[1 : end + 1])) for count, end in zip(counted, last, strict=True)]


class PackedReader(torch.nn.Module):
    """Reads states of packed rows inside one forward, where sharded weights are whole.

    Args:
        backbone: Whose states.
        step: `shared_prefix`, `separate`, or `auto`: the former where it is exact.
        chunk: At most so many rows of logits exist at once, where logits are made of states.
        kernel: How segments look back at a shared prefix.
        rows_at_once: Of separate rows, computed again in the backward pass where there are more; None: all.
    """

    def __init__(
        self,
        backbone: Backbone,
        step: Step = "auto",
        chunk: int = 512,
        kernel: Kernel = "auto",
        rows_at_once: int | None = None,
    ) -> None:
        super().__init__()
        reason = why_not_shared(backbone.config)
        if step == "shared_prefix" and reason:
            raise ValueError(f"step: {backbone.family.name} cannot share a prefix: {reason}; say separate, or auto")
        _require_known(step=(step, Step), kernel=(kernel, Kernel))
        if rows_at_once is not None and rows_at_once < 1:
            raise ValueError(f"rows_at_once: expected 1 or more, got {rows_at_once}; null is all")
        if chunk < 1:
            raise ValueError(f"chunk: expected 1 or more, got {chunk}; 512 is usual")
        self.backbone, self.chunk, self.kernel, self.rows_at_once = backbone, chunk, kernel, rows_at_once
        self.step: Way = "separate" if reason or step == "separate" else "shared_prefix"

    def fine(self) -> tuple[torch.nn.Module, ...]:
        """Its own parts that compute in full precision."""
        return ()

    def states(self, step: Way, rows: PackedRows, places: Places) -> Tensor:
        """The last states of these tokens, (places, width)."""
        embeds, positions = self.backbone.embed(rows), self.backbone.positions(rows)
        way = self._shared if step == "shared_prefix" else self._separate
        return way(rows, places, embeds, positions)

    def _shared(self, rows: PackedRows, places: Places, embeds: Tensor, positions: Tensor) -> Tensor:
        """All queries end to end in one row without padding."""
        real = rows.segment_ids != PADDING
        counts = real.sum(1)
        starts = counts.cumsum(0) - counts
        needed, at = torch.unique(starts[places.rows] + places.columns, return_inverse=True)
        layout = shared_prefixes(lengths(rows), embeds.device, self.kernel)._replace(needed=needed)
        hidden = _read(self.backbone, embeds[real][None], positions[..., real][..., None, :], layout)[0]
        return hidden[at if len(hidden) == len(needed) else needed[at]]

    def _separate(self, rows: PackedRows, places: Places, embeds: Tensor, positions: Tensor) -> Tensor:
        """A row per response: its prefix and itself, padded on the right."""
        owner, columns, inside = unpacked(rows)
        types = rows.per_token.get(self.backbone.family.token_types)
        at_once = self.rows_at_once or len(owner)
        hidden = []
        for first in range(0, len(owner), at_once):
            some, cols, real = (each[first : first + at_once] for each in (owner, columns, inside))
            picked = embeds[some[:, None], cols], real, positions[..., some[:, None], cols]
            kinds = None if types is None else types[some[:, None], cols] * real
            if len(owner) > at_once and torch.is_grad_enabled():
                hidden.append(checkpoint(_ordinary, self.backbone, *picked, kinds, use_reentrant=False))
            else:
                hidden.append(_ordinary(self.backbone, *picked, kinds))
        # Positions restart behind the prefix, so they are the columns that tokens have in a row of their own.
        return torch.cat(hidden)[places.owners, rows.position_ids[places.rows, places.columns]]


def _require_known(**words: tuple[str, Any]) -> None:
    for name, (word, known) in words.items():
        if word not in get_args(known):
            raise ValueError(f"{name}: expected one of {', '.join(get_args(known))}, got {word!r}")


def unpacked(rows: PackedRows) -> tuple[Tensor, Tensor, Tensor]:
    """Where the tokens of a row per response stand in packed rows.

    Returns:
        The packed row of each response, (responses,); the columns there of its tokens, (responses, tokens); and
        which of these are no padding, (responses, tokens).
    """
    owner, columns = [], []
    for number, (prefix, segments) in enumerate(lengths(rows)):
        start = prefix
        for length in segments:
            owner.append(number)
            columns.append(torch.cat([torch.arange(prefix), torch.arange(start, start + length)]))
            start += length
    device = rows.input_ids.device
    padded = pad_sequence(columns, batch_first=True, padding_value=-1).to(device)
    return torch.tensor(owner, device=device), padded.clamp(min=0), padded >= 0


def _read(backbone: Backbone, embeds: Tensor, positions: Tensor, layout: SharedPrefixes) -> Tensor:
    """The decoder over one packed row."""
    # A mask of four dimensions is handed on as it is: no model then makes one of its own, or guesses from the
    # positions that these are unrelated texts.
    untouched = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
    found = backbone.decoder(
        inputs_embeds=embeds, position_ids=positions, attention_mask=untouched, use_cache=False, shared_prefix=layout
    )
    states: Tensor = found.last_hidden_state
    return states


def _ordinary(backbone: Backbone, embeds: Tensor, real: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    """The decoder over ordinary rows."""
    masks = backbone.masks(embeds, real.long(), positions, types)
    found = backbone.decoder(inputs_embeds=embeds, position_ids=positions, attention_mask=masks, use_cache=False)
    states: Tensor = found.last_hidden_state
    return states
