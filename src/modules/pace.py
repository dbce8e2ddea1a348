"""How long a step will take on given machines, from shapes alone: a model on paper, of which no GPU has yet told.

Arithmetic takes its operations over an assumed part of the peak. Collectives take their bytes over an assumed part of
the links: whoever of a ring's links is slowest decides, and every hop adds a delay. What is shorter, of arithmetic and
collectives, hides behind the other but for an assumed part. Left out: the optimiser's step, the start of kernels,
waiting for the slowest rank, validations and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..ranks import micro_batches
from .flops import Cost

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.nn import Parameter

    from ..ranks import Layout
    from .backbone import Backbone
    from .flops import Lengths
    from .memory import Batches, Estimate


@dataclass(frozen=True)
class Machine:
    """A node of GPUs, by what its maker promises.

    Args:
        name: Of the GPU.
        peak_flops: Dense bfloat16, per second and GPU.
        memory: Bytes that torch sees of a GPU's.
        inside_bandwidth: Bytes per second that a GPU sends to others of its node, and as many receives.
        between_bandwidth: The same to other nodes: its share of the node's network.
        gpus_per_node: GPUs of a node.
    """

    name: str
    peak_flops: float
    memory: int
    inside_bandwidth: float
    between_bandwidth: float
    gpus_per_node: int = 8


A100_80 = Machine("A100-80", 312e12, 79 * 2**30, 300e9, 25e9)
H100 = Machine("H100", 989e12, 79 * 2**30, 450e9, 50e9)
H200 = Machine("H200", 989e12, 139 * 2**30, 450e9, 50e9)
MACHINES = {machine.name: machine for machine in (A100_80, H100, H200)}
"""NVLink of the third and fourth generation, and a network card of 200 or 400 Gbit/s per GPU."""


@dataclass(frozen=True)
class Assumed:
    """What is assumed, since it was not measured.

    Args:
        utilisation: Of the peak, that arithmetic reaches.
        links: Of the links' rate, that collectives reach.
        hidden: Of the shorter of arithmetic and collectives, that the longer one hides.
        hop_inside: Seconds from one GPU to the next of its node.
        hop_between: Seconds from a node to the next.
    """

    utilisation: float = 0.4
    links: float = 0.7
    hidden: float = 0.8
    hop_inside: float = 2e-6
    hop_between: float = 1e-5


class Query(NamedTuple):
    """A ranked query like all others."""

    lengths: Lengths
    supervised: int
    """Tokens whose log-probs are computed."""
    patches: int
    """Of its pictures."""


@dataclass(frozen=True)
class Pace:
    """Seconds of an optimizer step on each GPU, by what they go into."""

    decoder: float
    tower: float
    logits: float
    gathering: float
    """Whole weights, brought together from shards."""
    scattering: float
    """Gradients, summed into shards."""
    copying: float
    """Gradients, summed between copies of everything."""
    global_batch: int
    flops: float
    """Of all GPUs, with what is computed again."""
    hidden: float

    @property
    def arithmetic(self) -> float:
        """Seconds of it."""
        return self.decoder + self.tower + self.logits

    @property
    def network(self) -> float:
        """Seconds of collectives, were there nothing else."""
        return self.gathering + self.scattering + self.copying

    @property
    def seconds(self) -> float:
        """Of a step."""
        shorter, longer = sorted((self.arithmetic, self.network))
        return longer + (1 - self.hidden) * shorter

    @property
    def queries_per_second(self) -> float:
        """Of all GPUs together."""
        return self.global_batch / self.seconds

    @property
    def bound(self) -> str:
        """The largest part of the longer side."""
        sides = (("decoder", "tower", "logits"), ("gathering", "scattering", "copying"))
        longer = sides[self.network > self.arithmetic]
        return max(longer, key=lambda name: float(getattr(self, name)))

    def utilisation(self, machine: Machine, ranks: int) -> float:
        """The part of all GPUs' peak that is reached: what MFU would be, were activations computed once."""
        return self.flops / (self.seconds * ranks * machine.peak_flops)


def pace(
    body: Backbone, layout: Layout, batches: Batches, query: Query, machine: Machine, assumed: Assumed | None = None
) -> Pace:
    """The time of an optimizer step of queries like this one, each in one packed row."""
    if layout.offload:
        raise ValueError("pace: expected weights on GPUs, got offload, whose transfers to the host are not modelled")
    assumed = assumed or Assumed()
    often = micro_batches(batches.global_batch, batches.micro_batch, layout.ranks)
    cost = Cost(body)
    whole = cost.step([query.lengths], query.supervised, query.patches * cost.pixels_per_patch, True, batches.again)
    tower = cost.per_patch * query.patches * (3 if cost.tower_trains else 1)
    logits = cost.per_logits * query.supervised * 3
    per_second = machine.peak_flops * assumed.utilisation
    mine = often * batches.micro_batch
    gathering, scattering, copying = _collectives(body, layout, _Links(machine, assumed), cost.tower_trains)
    return Pace(
        decoder=mine * (whole - tower - logits) / per_second,
        tower=mine * tower / per_second,
        logits=mine * logits / per_second,
        # FSDP2 sends gradients to their shards after every micro-batch; copies are summed after the last of a step.
        gathering=often * gathering,
        scattering=often * scattering,
        copying=copying,
        global_batch=batches.global_batch,
        flops=whole * batches.global_batch,
        hidden=assumed.hidden,
    )


class _Links(NamedTuple):
    machine: Machine
    assumed: Assumed

    def ring(self, size: float, ranks: int, apart: bool = False) -> float:
        """Seconds until every rank has seen all of so many bytes, of which it had, or keeps, its part.

        `apart`: every rank is in a node of its own; otherwise nodes are filled one behind the other.
        """
        if ranks == 1:
            return 0.0
        each = 1 if apart else self.machine.gpus_per_node
        nodes = -(-ranks // each)
        inside = 0.0 if apart else (ranks - 1) / ranks * size / self.machine.inside_bandwidth
        # A node's cards share what enters it.
        between = (nodes - 1) / nodes * size / (min(each, ranks) * self.machine.between_bandwidth)
        crossing = nodes if nodes > 1 else 0
        hops = (ranks - 1 - crossing if not apart else 0) * self.assumed.hop_inside
        return max(inside, between) / self.assumed.links + max(0.0, hops) + crossing * self.assumed.hop_between


def _collectives(body: Backbone, layout: Layout, links: _Links, tower_trains: bool) -> tuple[float, float, float]:
    """Seconds to gather weights, to scatter gradients, and to sum between copies, of one micro-batch."""
    learning = _numbers(weight for weight in body.parameters() if weight.requires_grad)
    if layout.way != "sharded":
        return 0.0, 0.0, 2 * links.ring(4.0 * learning, layout.ranks)
    number = 2 if layout.mixed else 4
    decoder, tower = body.layers(body.decoder), body.read_layers
    forward = [*decoder, *(tower if not body.tower_kept else [])]  # who does not compute is not gathered
    back = [*decoder, *(tower if tower_trains else [])]
    in_layers = {id(weight) for layer in (*decoder, *tower) for weight in layer.parameters()}
    apart = [weight for weight in body.parameters() if id(weight) not in in_layers]
    groups = [list(layer.parameters()) for layer in forward]
    gathered = [_numbers(group) for group in (*groups, apart, *(list(layer.parameters()) for layer in back))]
    sent = [_numbers(weight for weight in group if weight.requires_grad) for group in (*groups, apart)]
    copying = 2 * sum(_between(4.0 * count / layout.shards, layout, links) for count in sent if count)
    return (
        sum(links.ring(float(number * count), layout.shards) for count in gathered),
        sum(links.ring(4.0 * count, layout.shards) for count in sent if count),
        copying,
    )


def _between(size: float, layout: Layout, links: _Links) -> float:
    """Half of a sum between the replicas of a shard, which are in nodes of their own where a replica fills one."""
    return links.ring(size, layout.replicas, apart=layout.ranks > links.machine.gpus_per_node)


def _numbers(weights: Iterable[Parameter]) -> int:
    return sum(weight.numel() for weight in weights)


@dataclass(frozen=True)
class Feed:
    """What a node's processors and disks give to its GPUs.

    Args:
        cores: Processors of a node for reading and encoding.
        queries_per_core: Read, decoded and encoded per second by one of them.
        bytes_per_query: Read from disk or network.
        disk: Bytes per second that a node reads.
    """

    cores: int
    queries_per_core: float
    bytes_per_query: float
    disk: float


def strains(found: Estimate, pace: Pace, machine: Machine, feed: Feed) -> dict[str, float]:
    """How much of each limit a layout uses: what is nearest to 1, or furthest above it, breaks first."""
    layout, batches = found.layout, found.batches
    nodes = -(-layout.ranks // machine.gpus_per_node)
    per_node = pace.queries_per_second / nodes
    return {
        "memory": found.device / (0.92 * machine.memory),
        "network": pace.network / pace.arithmetic,
        "global batch": layout.ranks * batches.micro_batch / batches.global_batch,
        "processors": per_node / (feed.cores * feed.queries_per_core),
        "disk": per_node * feed.bytes_per_query / feed.disk,
    }
