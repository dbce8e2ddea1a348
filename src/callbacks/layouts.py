"""Which layout of ranks the options of a Trainer ask for, before there is a Trainer, and on any machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from ..ranks import Layout, Ways
from .sharding import Sharded


def layout_of(options: Mapping[str, Any]) -> Layout:
    """The layout that these keyword arguments of a Trainer ask for; the GPUs of another machine need not be here."""
    strategy, ranks = options["strategy"], _nodes(options) * _devices(options)
    if isinstance(strategy, Sharded):
        replicas, offload = strategy.replicas, strategy.cpu_offload
        return Layout(ranks, "sharded", replicas, _mixed(options), offload)
    if strategy != "auto" and not isinstance(strategy, DDPStrategy) and not str(strategy).startswith("ddp"):
        raise ValueError(
            "trainer.strategy: expected auto, ddp or mmrlhf.callbacks.sharding.Sharded, of which is known what they "
            f"need, got {strategy if isinstance(strategy, str) else type(strategy).__name__}; see configs/trainer"
        )
    way: Ways = "one" if ranks == 1 else "ddp"
    return Layout(ranks, way, mixed=_mixed(options))


def require_device(options: Mapping[str, Any]) -> None:
    """Refuse a training on GPUs where torch finds none."""
    if _on_gpu(options) and not torch.cuda.is_available():
        raise ValueError(
            f"trainer.accelerator: expected a GPU for {options['accelerator']!r}, found none that torch can use; take "
            "configs/trainer/cpu.yaml, or see what `mmrlhf env` tells; `--dry-run` tells what the training would need"
        )


def memory_of(options: Mapping[str, Any], gib: float | None) -> int | None:
    """Bytes of each device: those that are told, or of the first GPU here; None where nobody knows."""
    if gib is not None and gib <= 0:
        raise ValueError(f"run.device_memory: expected more than 0 GiB, got {gib:g}")
    if gib is not None:
        return int(gib * 2**30)
    if _on_gpu(options) and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return None


def _on_gpu(options: Mapping[str, Any]) -> bool:
    return options["accelerator"] in {"gpu", "cuda"}


def _mixed(options: Mapping[str, Any]) -> bool:
    return str(options["precision"]).startswith(("bf16", "16"))


def _nodes(options: Mapping[str, Any]) -> int:
    return int(options["num_nodes"])


def _devices(options: Mapping[str, Any]) -> int:
    """Of each node, as Lightning counts them."""
    told = options["devices"]
    if isinstance(told, (list, tuple)):
        return len(told)
    if str(told) not in {"auto", "-1"}:
        return len(told.split(",")) if isinstance(told, str) and "," in told else int(told)
    started = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE")
    found = int(started) if started else torch.cuda.device_count() if _on_gpu(options) else 1
    if not found:
        raise ValueError(
            f"trainer.devices: expected a number, as there is no GPU here to count, got {told!r}; say for how many "
            "GPUs of a machine with --trainer.devices 8"
        )
    return found
