"""A model whose weights are sharded over ranks: built empty, filled and sharded layer by layer, and made whole again.

What is gathered for one call of a module is whole inside that call alone. So everything that reads weights happens in
the forward of the outermost module, which is a reader of packed rows; layers of decoder and tower are gathered each
for themselves. What shards is a callable of the strategy, that is told which modules are computed in full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from .backbone import Backbone
    from .loading import BackboneConfig
    from .packed import PackedReader

R = TypeVar("R", bound="PackedReader")


class Shard(Protocol):
    """Shards what a module holds, besides what is sharded in it already."""

    def __call__(self, module: torch.nn.Module, fine: bool = False) -> object:
        """In place; `fine`: its forward runs with weights as they are kept, not rounded."""


def built(config: BackboneConfig, reader: Callable[[Backbone], R], shard: Shard | None) -> R:
    """A reader over a backbone with its weights: all of them, or the part of this rank."""
    if shard is None:
        return reader(config.load())
    body, weights = config.empty()
    whole = reader(body)
    require_together(whole)
    of_tower = body.read_layers  # whoever has media then has gradients for all of them
    for layer in [*of_tower, *body.layers(body.decoder)]:
        weights.fill(layer)
        shard(layer)
    weights.fill(whole)
    for part in whole.fine():
        shard(part, fine=True)
    shard(whole)
    if config.features is None:
        body.apart = tuple(of_tower)
    return whole


def require_together(reader: PackedReader) -> None:
    """Refuse a reader whose ranks would gather weights in another order each."""
    if reader.rows_at_once is not None:
        raise ValueError(
            f"rows_at_once: expected null with sharded weights, got {reader.rows_at_once}: ranks would gather them in "
            "another order each; leave it off, or take a smaller micro_batch"
        )


def gathered(reader: R, again: Callable[[], R]) -> R | None:
    """A reader with all its weights, on the first rank; all ranks must call it, and the others have none.

    It is loaded as a single process would load it, and given what was trained, one weight after another.
    """
    if not isinstance(reader, FSDPModule):
        return reader
    reader.reshard()  # after a forward without a backward pass its weights are still as they are computed with
    whole = again() if dist.get_rank() == 0 else None
    for name, weight in reader.named_parameters():
        if weight.requires_grad:
            assert isinstance(weight, DTensor), name
            values = weight.detach().full_tensor()
            if whole is not None:
                whole.get_parameter(name).data.copy_(values)
    return whole
