"""Weights, gradients and optimiser states sharded over ranks: torch's FSDP2 under Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from ..ranks import Layout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@runtime_checkable
class Shardable(Protocol):
    """A module that shards itself while it loads its weights."""

    shard: Any
    """What it shards its parts with: a callable of a part, and of whether that computes in full precision."""


class Sharded(ModelParallelStrategy):
    """Every rank keeps a part of each weight, of its gradient and of its optimiser state.

    A layer's weights are gathered for its forward and its backward pass alone. With `bf16-mixed` they travel, and are
    multiplied, in bfloat16; they are kept, and their gradients summed over ranks, in float32.

    Args:
        replicas: Shard within so many groups of ranks, each of which holds everything, and sum gradients between them
            (HSDP): with a group per node, weights never travel between nodes.
        cpu_offload: Keep weights, gradients and optimiser states in the memory of the host: slow, for the last resort.
        whole_checkpoint: Write a single file that the first rank gathers, in place of a folder of all ranks' parts.
        minutes: After so long without an answer a rank gives up.
    """

    def __init__(
        self, replicas: int = 1, cpu_offload: bool = False, whole_checkpoint: bool = False, minutes: float = 30.0
    ) -> None:
        if replicas < 1 or minutes <= 0:
            raise ValueError(f"strategy: expected replicas of 1 or more and minutes above 0, got {replicas}, {minutes}")
        super().__init__(
            save_distributed_checkpoint=not whole_checkpoint,
            process_group_backend="cpu:gloo,cuda:nccl" if cpu_offload and torch.cuda.is_available() else None,
            timeout=timedelta(minutes=minutes),
        )
        self.replicas, self.cpu_offload = replicas, cpu_offload

    def setup_environment(self) -> None:
        """Arrange the ranks, and tell the module how it is sharded."""
        ranks = self.num_nodes * self.num_processes
        Layout(ranks, "sharded", self.replicas)  # refuses replicas that do not divide them
        # Lightning's names for the two sides of its mesh; nothing else is made of them.
        self._data_parallel_size, self._tensor_parallel_size = self.replicas, ranks // self.replicas
        super().setup_environment()
        module = self.lightning_module
        if not isinstance(module, Shardable):
            raise ValueError(f"strategy: expected a module that can be sharded, got {type(module).__name__}; say ddp")  # noqa: TRY004 - the user chose both
        shardable: Any = module  # Lightning's own type has no other attributes
        shardable.shard = partial(self._shard, self._mesh, self._precision)

    @property
    def _mesh(self) -> DeviceMesh:
        """Replicas by shards, or shards alone."""
        return self.device_mesh if self.replicas > 1 else self.device_mesh["tensor_parallel"]

    @property
    def _precision(self) -> MixedPrecisionPolicy:
        """Inputs are left as they are: autocast sees to them, as it does without sharding."""
        if self.precision_plugin.precision == "bf16-mixed":
            return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        return MixedPrecisionPolicy(cast_forward_inputs=False)

    def _shard(
        self, mesh: DeviceMesh, precision: MixedPrecisionPolicy, module: torch.nn.Module, fine: bool = False
    ) -> None:
        if fine:
            precision = MixedPrecisionPolicy(cast_forward_inputs=False)
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision}
        if self.cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
        fully_shard(module, **options)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """While micro-batches of a step are summed up, groups keep their sums to themselves, until the last one."""
        assert self.model is not None
        parts = [part for part in self.model.modules() if isinstance(part, FSDPModule)] if self.replicas > 1 else []
        for part in parts:
            part.set_requires_all_reduce(False, recurse=False)
        try:
            yield
        finally:
            for part in parts:
                part.set_requires_all_reduce(True, recurse=False)

    def model_to_device(self) -> None:
        """All to its device, but for weights that live in the memory of the host."""
        assert self.model is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        for part in self.model.modules():
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, buffer.to(self.root_device))
