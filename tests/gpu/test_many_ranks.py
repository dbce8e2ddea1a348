"""What a rank of many holds, where the others are pretended: their collectives return at once, with anything."""

from __future__ import annotations

import dataclasses
from functools import partial

import gpu_training as training
import pytest
import torch
import torch.distributed as dist
from gpu_memory import Memory
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from mmrlhf.modules.memory import estimate
from mmrlhf.modules.scorer import ResponseScorer
from mmrlhf.modules.sharded import built
from mmrlhf.ranks import Layout

from .test_training import SMALL

PRECISION = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
slow = pytest.mark.slow


def peak(case, ranks):
    """Of the second step of a training whose ranks are pretended."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh, rows, memory = init_device_mesh("cpu", (ranks,)), case.batch().rows, Memory("cpu")

    def shard(module, fine=False):
        fully_shard(module, mesh=mesh, mp_policy=PRECISION)

    with memory:
        reader = built(case.backbone, partial(ResponseScorer, step="shared_prefix"), shard)
        trained = [weight for weight in reader.parameters() if weight.requires_grad]
        adamw = torch.optim.AdamW(trained, lr=0.0, foreach=True)
        for _ in range(2):
            memory.reset()
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                loss = reader(rows).sums.sum()
            adamw.zero_grad()
            loss.backward()
            adamw.step()
    return memory.peak


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (8, {"again": True}),
        pytest.param(8, {}, marks=slow),
        pytest.param(8, {"lora": True}, marks=slow),
        pytest.param(64, {"again": True}, marks=slow),
        pytest.param(64, {}, marks=slow),
    ],
)
def test_memory_of_a_rank_of_many_is_what_was_estimated(ranks, options, tmp_path):
    case = training.Case(SMALL, tmp_path, mixed=True, sharded=True, **options)
    batches = dataclasses.replace(case.estimate(case.batch()).batches, global_batch=ranks)
    expected = estimate(case.backbone.empty()[0], Layout(ranks, "sharded", mixed=True), batches)
    assert expected.device == pytest.approx(peak(case, ranks), rel=0.15)
