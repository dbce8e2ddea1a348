"""What a training will need and take, from shapes and some of its batches, for GPUs that need not be here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .flops import Cost, pixels_of, supervised_of, tokens_of
from .memory import Batches, Estimate, estimate, size
from .pace import MACHINES, Query, pace
from .packed import lengths
from .sharded import require_together

if TYPE_CHECKING:
    from ..batches import PackedQueries
    from ..ranks import Gpu, Layout
    from .loading import BackboneConfig
    from .packed import PackedReader

_SOME = 32
"""Queries that are looked at for what a mean one costs."""


class Shaped(Protocol):
    """A module whose shapes are known without its weights."""

    config: BackboneConfig

    def empty(self) -> PackedReader:
        """It without weights."""


class Steps(NamedTuple):
    """How often a training steps, and with how much."""

    global_batch: int
    micro_batch: int
    steps: int


class Forecast(NamedTuple):
    """What a training will need of each device, and what it computes."""

    found: Estimate
    flops: float
    """Of an optimizer step, by all devices."""
    seconds: float | None
    """Of an optimizer step, where that is known."""

    def rows(self) -> Iterator[tuple[str, str]]:
        """What there is to tell, with its name."""
        yield from self.found.rows()
        yield "operations per step", f"{self.flops:.2e}"
        if self.found.layout.way == "sharded":
            yield "host of rank 0, at the end", size(self.found.weights * self.found.layout.shards)
        if self.seconds is not None:
            whole = self.seconds * self.found.batches.steps / 60
            told = f"{whole:.1f} minutes" if whole < 120 else f"{whole / 60:.1f} hours"
            yield "seconds per step", f"{self.seconds:.3g} on paper, if nothing waits; {told} in all"


def forecast(
    module: Shaped,
    layout: Layout,
    steps: Steps,
    tokens: Any,  # noqa: ANN401 - an array
    batch: Callable[[Iterable[int]], PackedQueries],
    gpu: Gpu | None,
) -> Forecast:
    """Look at the longest queries and at some others, of which `batch` makes batches; no weight is read.

    `tokens` has those of every query, with what responses share counted once.
    """
    reader = module.empty()
    if layout.way == "sharded":
        require_together(reader)
    shared, cost, again = reader.step == "shared_prefix", Cost(reader.backbone), module.config.activation_checkpointing
    some = [batch([number]) for number in range(0, len(tokens), -(-len(tokens) // _SOME))]
    work = [cost.work(each, shared, again) for each in some]
    longer = sum(each.tokens for each in work) / sum(each.unique_tokens for each in work)
    longest = batch(tokens.argsort()[-steps.micro_batch :].tolist())
    batches = Batches(
        tokens=_held(reader, longest, shared),
        global_batch=steps.global_batch,
        micro_batch=steps.micro_batch,
        steps=steps.steps,
        mean_tokens=float(tokens.mean()) * longer,
        patches=_patches(longest, cost),
        chunk=reader.chunk,
        again=again,
    )
    flops = sum(each.flops for each in work) / len(work) * steps.global_batch
    seconds = None
    if gpu is not None and shared and not layout.offload:
        queries = (_query(each, cost) for each in some)
        seconds = fmean(pace(reader.backbone, layout, batches, query, MACHINES[gpu]).seconds for query in queries)
    return Forecast(estimate(reader.backbone, layout, batches), flops, seconds)


def _query(batch: PackedQueries, cost: Cost) -> Query:
    return Query(lengths(batch.rows)[0], supervised_of(batch), _patches(batch, cost))


def _patches(batch: PackedQueries, cost: Cost) -> int:
    if not cost.per_patch:  # the tower is not computed, its pictures are only names
        return 0
    return int(pixels_of(batch) // cost.pixels_per_patch)


def _held(reader: PackedReader, batch: PackedQueries, shared: bool) -> int:
    """Tokens that go through the decoder at once."""
    sizes = lengths(batch.rows)
    everything = sum(tokens_of(each, shared) for each in sizes)
    if shared or reader.rows_at_once is None:
        return everything
    longest = max(prefix + max(segments) for prefix, segments in sizes)
    return min(everything, reader.rows_at_once * longest)
