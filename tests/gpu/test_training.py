"""Trainings on a device: what they hold in memory, with shards and compiled, saved and resumed."""

from __future__ import annotations

import dataclasses

import gpu_training as training
import pytest
import torch

from .test_step import DEVICES, shape_on

SMALL = dataclasses.replace(
    training.MIDDLE, width=256, layers=6, inner=1376, heads=8, vocabulary=8_000, tower_width=64, tower_inner=128,
    tower_heads=4, tower_layers=2, side=126,
)  # fmt: skip
"""For a CPU: large enough that weights and activations are most of what is held."""


WAYS = [
    {"mixed": True, "accumulated": 2},
    {"mixed": True, "lora": True},
    {"mixed": True, "sharded": True},
    {"mixed": True, "sharded": True, "again": True},
]
MORE = [{}, {"mixed": True}, {"mixed": True, "again": True}, {"sharded": True}, {"mixed": True, "step": "separate"}]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [*WAYS, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE)],
    ids=lambda options: " ".join(options) or "float32",
)
def test_memory_is_what_was_estimated(device, options, tmp_path):
    case = training.Case(training.MIDDLE if device == "cuda" else SMALL, tmp_path, device, **options)
    found = training.train(case, 2)
    assert case.estimate(case.batch()).device == pytest.approx(found.peak, rel=0.15)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("mixed", "allowed"), [(False, 1e-5), (True, 5e-3)])
def test_shards_on_one_device_train_as_no_shards_do(device, mixed, allowed, tmp_path):
    plain = training.Case(shape_on(device), tmp_path, device, mixed=mixed)
    one, shards = (
        training.train(dataclasses.replace(plain, sharded=sharded), 4, watch=False) for sharded in (False, True)
    )
    assert shards.losses == pytest.approx(one.losses, rel=allowed)
    assert one.losses[-1] < 0.99 * one.losses[0]


@pytest.mark.parametrize("device", DEVICES)
def test_shards_that_are_saved_and_resumed_end_bitwise_the_same(device, tmp_path):
    case = training.Case(shape_on(device), tmp_path, device, mixed=True, sharded=True)
    torch.use_deterministic_algorithms(mode=True)
    try:
        whole = training.train(case, 4, watch=False)
        training.train(case, 2, keep=tmp_path / "kept", watch=False)
        on = training.train(case, 4, keep=tmp_path / "kept", resumed=True, watch=False)
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert len(whole.losses) == 4
    assert on.losses == whole.losses[2:]
    expected, found = training.weights(whole.module), training.weights(on.module)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), *DEVICES[1:]])
def test_compiled_layers_train_as_others_do(device, tmp_path):
    plain = training.Case(shape_on(device), tmp_path, device, mixed=True)
    compiled = dataclasses.replace(plain, compiled="inductor" if device == "cuda" else "aot_eager")
    one, other = (training.train(case, 3, watch=False) for case in (plain, compiled))
    assert other.losses == pytest.approx(one.losses, rel=5e-3)
    layers = other.module.scorer.backbone.decoder.layers
    assert all(layer._compiled_call_impl is not None for layer in layers)
