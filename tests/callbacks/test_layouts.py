"""The layout that the options of a Trainer ask for, without a GPU and without a Trainer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

from mmrlhf.callbacks.layouts import layout_of, memory_of, require_device
from mmrlhf.callbacks.sharding import Sharded
from mmrlhf.ranks import Layout

STANDARD = {"accelerator": "gpu", "devices": 8, "num_nodes": 1, "strategy": "auto", "precision": "bf16-mixed"}


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ({"devices": 1}, Layout(mixed=True)),
        ({}, Layout(8, "ddp", mixed=True)),
        ({"strategy": DDPStrategy(), "precision": None, "num_nodes": 2}, Layout(16, "ddp")),
        ({"strategy": "ddp", "devices": "4"}, Layout(4, "ddp", mixed=True)),
        ({"strategy": "ddp", "devices": [0, 2]}, Layout(2, "ddp", mixed=True)),
        ({"strategy": "ddp", "devices": "0,2,5"}, Layout(3, "ddp", mixed=True)),
        ({"strategy": Sharded(replicas=4), "num_nodes": 4}, Layout(32, "sharded", 4, mixed=True)),
        ({"strategy": Sharded(cpu_offload=True)}, Layout(8, "sharded", mixed=True, offload=True)),
        ({"accelerator": "cpu", "devices": "auto"}, Layout(mixed=True)),
    ],
)
def test_options_become_a_layout(told, wanted):
    assert layout_of(STANDARD | told) == wanted


def test_replicas_that_do_not_divide_the_ranks_are_refused():
    with pytest.raises(ValueError, match="expected a divisor of 8 ranks, got 3"):
        layout_of(STANDARD | {"strategy": Sharded(replicas=3)})


def test_a_strategy_of_which_nothing_is_known_is_refused():
    with pytest.raises(ValueError, match="got FSDPStrategy; see"):
        layout_of(STANDARD | {"strategy": FSDPStrategy()})
    with pytest.raises(ValueError, match="got deepspeed; see"):
        layout_of(STANDARD | {"strategy": "deepspeed"})


@pytest.mark.parametrize("devices", ["auto", -1])
def test_gpus_are_counted_as_the_launcher_says_or_as_they_are_here(devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert layout_of(STANDARD | {"devices": devices, "strategy": "ddp"}).ranks == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert layout_of(STANDARD | {"devices": devices, "strategy": "ddp"}).ranks == 2
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"no GPU here to count, got .*--trainer\.devices 8"):
        layout_of(STANDARD | {"devices": devices})


def test_a_training_on_gpus_needs_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    require_device(STANDARD | {"accelerator": "cpu"})
    for name in ("gpu", "cuda"):
        with pytest.raises(ValueError, match=f"expected a GPU for '{name}', found none"):
            require_device(STANDARD | {"accelerator": name})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require_device(STANDARD)


def test_the_memory_of_a_device_is_what_is_told_or_found(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert memory_of(STANDARD, 1.5) == 3 * 2**29
    assert memory_of(STANDARD, None) is None
    sizes = [150_754_820_096, 1]  # of the first device, and of another one
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda at: SimpleNamespace(total_memory=sizes[at]))
    assert memory_of(STANDARD, None) == 150_754_820_096
    assert memory_of(STANDARD, 1.5) == 3 * 2**29
    assert memory_of(STANDARD | {"accelerator": "cpu"}, None) is None
