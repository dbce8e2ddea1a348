"""One step on a device: shared prefixes against separate rows, and every kernel against the whole mask."""

from __future__ import annotations

import contextlib
from typing import get_args

import gpu_training as training
import pytest
import torch

from mmrlhf.batches import moved
from mmrlhf.modules.attention import Kernel
from mmrlhf.modules.scorer import ResponseScorer

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
    ],
)
DEVICES = ["cpu", GPU]


def shape_on(device):
    return training.MIDDLE if device == "cuda" else training.TINY


def scored(folder, device, mixed=False, **options):
    """Log-probs, and the gradient of everything that is trained as one row of numbers."""
    case = training.Case(shape_on(device), folder, device)
    backbone = case.backbone.load()
    rows = moved(case.batch().rows, device)
    with torch.autocast(device, torch.bfloat16) if mixed else contextlib.nullcontext():
        sums = ResponseScorer(backbone, **options)(rows).sums
    weight = torch.linspace(-1, 1, len(sums), device=device)
    (sums * weight).sum().backward()
    gradients = [each.grad.flatten().float() for each in backbone.parameters() if each.grad is not None]
    return sums.detach(), torch.cat(gradients)


def apart(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("mixed", "allowed"), [(False, 1e-4), (True, 5e-2)])
def test_shared_prefixes_are_separate_rows(device, mixed, allowed, tmp_path):
    shared, separate = (scored(tmp_path, device, mixed, step=step) for step in ("shared_prefix", "separate"))
    assert apart(shared[0], separate[0]) < allowed / 10
    assert 0 < apart(shared[1], separate[1]) < allowed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", [each for each in get_args(Kernel) if each != "dense"])
def test_kernels_agree_with_the_whole_mask(device, kernel, tmp_path):
    if device == "cpu" and kernel == "flex":
        pytest.skip("FlexAttention has no backward pass on a CPU")
    found, dense = (scored(tmp_path, device, step="shared_prefix", kernel=each) for each in (kernel, "dense"))
    assert apart(found[0], dense[0]) < 1e-5
    assert apart(found[1], dense[1]) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_near_float32(device, tmp_path):
    fine, coarse = (scored(tmp_path, device, mixed) for mixed in (False, True))
    assert 0 < apart(coarse[0], fine[0]) < 1e-2
    assert 0 < apart(coarse[1], fine[1]) < 0.1
