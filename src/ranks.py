"""How ranks divide the work of a training, and which divisions cannot work at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Ways = Literal["one", "ddp", "sharded"]
Gpu = Literal["A100-80", "H100", "H200"]
"""Those of which memory and speed are known on paper."""


@dataclass(frozen=True)
class Layout:
    """How ranks divide the work.

    Args:
        ranks: Processes in all, each with a device.
        way: One process; a copy of everything per rank; or a part of everything per rank.
        replicas: Groups of ranks each of which holds everything together.
        mixed: Whether it is computed in bfloat16.
        offload: Whether weights and optimiser states lie in the memory of the host.
    """

    ranks: int = 1
    way: Ways = "one"
    replicas: int = 1
    mixed: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.ranks % self.replicas:
            raise ValueError(
                f"strategy.replicas: expected a divisor of {self.ranks} ranks, got {self.replicas}; take the number of "
                "nodes, or 1"
            )

    @property
    def shards(self) -> int:
        """Among how many ranks weights are divided."""
        return self.ranks // self.replicas if self.way == "sharded" else 1


def micro_batches(global_batch: int, micro_batch: int, ranks: int) -> int:
    """How many micro-batches each rank computes per optimizer step."""
    at_once = micro_batch * ranks
    if global_batch % at_once:
        raise ValueError(
            f"data.global_batch: expected a multiple of micro_batch x ranks = {micro_batch} x {ranks}, got "
            f"{global_batch}; choose one, such as {max(1, round(global_batch / at_once)) * at_once}"
        )
    return global_batch // at_once
