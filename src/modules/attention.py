"""Attention over shared prefixes, under transformers' attention interface.

A packed batch is one row without padding: of each query a prefix and its segments, one query behind the other. The
layout travels as a keyword argument from the decoder's forward to this function, so it is there again when a
checkpointed layer is computed a second time in the backward pass.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

NAME = "shared_prefix"
"""Of the attention implementation, as transformers registers it."""
Kernel = Literal["auto", "together", "apart", "dense", "flex"]
"""How the segments of a query look back: `together` in one call with a mask, `apart` in a call each, which pays when
they are long; `auto` chooses between these by the lengths. `dense` is one call for everything, with the whole mask;
`flex` is torch's FlexAttention, compiled, which has a backward pass on GPUs alone."""


class Block(NamedTuple):
    """One query in the row."""

    start: int
    prefix: int
    segments: tuple[int, ...]
    """The lengths of its continuations."""
    mask: Tensor | None
    """(segment tokens, tokens): what the segments see together; None where each is computed apart."""

    @property
    def stop(self) -> int:
        """The column behind its last."""
        return self.start + self.prefix + sum(self.segments)


class SharedPrefixes(NamedTuple):
    """The layout of a packed batch."""

    blocks: tuple[Block, ...]
    everything: Tensor | None
    """(1, 1, tokens, tokens): the whole mask, for the kernel that takes it."""
    sparse: BlockMask | None = None
    """The same for FlexAttention."""
    needed: Tensor | None = None
    """The columns whose states are read, in order, where that is known: of a prefix, none but the last."""
    last: bool = False
    """Whether this is the last layer, after which nobody looks back at a prefix."""


def shared_prefixes(
    lengths: Sequence[tuple[int, tuple[int, ...]]], device: torch.device, kernel: Kernel = "auto"
) -> SharedPrefixes:
    """The layout of queries of these lengths, (prefix, segments), laid end to end."""
    blocks, start = [], 0
    for prefix, segments in lengths:
        together = kernel == "together" or (kernel == "auto" and 2 * sum(segments) <= prefix)
        mask = _seen(prefix, segments, device)[prefix:] if together else None
        blocks.append(Block(start, prefix, segments, mask))
        start = blocks[-1].stop
    if kernel == "flex":
        return SharedPrefixes(tuple(blocks), None, _sparse(lengths, device))
    if kernel != "dense":
        return SharedPrefixes(tuple(blocks), None)
    whole = torch.zeros(start, start, dtype=torch.bool, device=device)
    for block in blocks:
        own = slice(block.start, block.stop)
        whole[own, own] = _seen(block.prefix, block.segments, device)
    return SharedPrefixes(tuple(blocks), whole[None, None])


def _seen(prefix: int, segments: Sequence[int], device: torch.device) -> Tensor:
    """(tokens, tokens): which tokens of a query each token sees.

    >>> _seen(1, (1, 2), torch.device("cpu")).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    """
    tokens = prefix + sum(segments)
    seen = torch.zeros(tokens, tokens, dtype=torch.bool, device=device)
    seen[:, :prefix] = True
    for length, stop in zip(segments, accumulate(segments), strict=True):
        at = slice(prefix + stop - length, prefix + stop)
        seen[at, at] = True
    return seen.tril()


def _sparse(lengths: Sequence[tuple[int, tuple[int, ...]]], device: torch.device) -> BlockMask:
    """The mask of FlexAttention over all queries."""
    sizes = [size for prefix, segments in lengths for size in (prefix, *segments)]
    owners = [number for number, (_, segments) in enumerate(lengths) for _ in range(1 + len(segments))]
    places = [place for _, segments in lengths for place in range(1 + len(segments))]
    repeats = torch.tensor(sizes, device=device)
    query, segment = (torch.tensor(each, device=device).repeat_interleave(repeats) for each in (owners, places))

    def sees(_batch: Tensor, _head: Tensor, looking: Tensor, seen: Tensor) -> Tensor:
        near = (segment[seen] == 0) | (segment[seen] == segment[looking])
        return (looking >= seen) & (query[looking] == query[seen]) & near

    total = sum(sizes)
    return create_block_mask(sees, None, None, total, total, device=device)


@cache
def _flex(compiled: bool) -> Any:  # noqa: ANN401 - torch has no type for it
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    shared_prefix: SharedPrefixes | None = None,
    **others: Any,  # noqa: ANN401 - transformers passes on whatever a model is given
) -> tuple[Tensor, None]:
    """Attention of one layer: of a packed batch with its layout, of any other as transformers computes it."""
    if shared_prefix is None:
        found = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return found[0], None
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout}
    if shared_prefix.sparse is not None:
        if dropout:
            raise ValueError("kernel: flex has no dropout of attention; choose another kernel, or a dropout of 0")
        attention = _flex(query.is_cuda)
        out = attention(query, key, value, block_mask=shared_prefix.sparse, scale=scaling, enable_gqa=True)
    elif shared_prefix.everything is not None:
        out = _masked(query, key, value, shared_prefix.everything, options)
    else:
        last = shared_prefix.last
        parts = [part for block in shared_prefix.blocks for part in _block(block, query, key, value, last, options)]
        out = torch.cat(parts, dim=2)
    return out.transpose(1, 2).contiguous(), None


def _block(
    block: Block, query: Tensor, key: Tensor, value: Tensor, last: bool, options: dict[str, Any]
) -> list[Tensor]:
    """The outputs of one query: of its prefix, then of its segments."""
    query, key, value = (each[:, :, block.start : block.stop] for each in (query, key, value))
    prefix = block.prefix
    shared = key.shape[1] != query.shape[1]
    asking, keys, values = (each[:, :, :prefix] for each in (query, key, value))
    if last and prefix:  # its last token sees all of it; nobody reads what the others see
        end = scaled_dot_product_attention(asking[:, :, -1:], keys, values, enable_gqa=shared, **options)
        out = [torch.zeros_like(asking[:, :, 1:]), end]
    else:
        out = [scaled_dot_product_attention(asking, keys, values, is_causal=True, enable_gqa=shared, **options)]
    if block.mask is not None:
        return [*out, _masked(query[:, :, prefix:], key, value, block.mask, options)]
    start = prefix
    for length in block.segments:
        own = slice(start, start + length)
        keys, values = (torch.cat([each[:, :, :prefix], each[:, :, own]], dim=2) for each in (key, value))
        seen = torch.ones(length, prefix + length, dtype=torch.bool, device=key.device).tril(prefix)
        out.append(_masked(query[:, :, own], keys, values, seen, options))
        start += length
    return out


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # the fused kernels take grouped heads only without a mask
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


AttentionInterface.register(NAME, attend)
# Without a mask function of the same name, ordinary padded rows would get no mask at all.
AttentionMaskInterface.register(NAME, sdpa_mask)
