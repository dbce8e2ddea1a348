"""How ranks divide the work."""

from __future__ import annotations

from typing import get_args

import pytest

from mmrlhf.modules.pace import MACHINES
from mmrlhf.ranks import Gpu, Layout, micro_batches


def test_weights_are_divided_among_the_ranks_of_a_replica():
    assert Layout(16, "sharded", replicas=2).shards == 8
    assert Layout(16, "ddp").shards == Layout().shards == 1


def test_every_gpu_that_may_be_named_is_known():
    assert set(get_args(Gpu)) == set(MACHINES)


@pytest.mark.parametrize("replicas", [0, 3, 8])
def test_replicas_that_do_not_divide_the_ranks_are_refused(replicas):
    with pytest.raises(ValueError, match=rf"strategy.replicas: expected a divisor of 4 ranks, got {replicas}"):
        Layout(4, "sharded", replicas)


@pytest.mark.parametrize(("micro", "ranks", "wanted"), [(1, 1, 16), (2, 4, 2), (4, 4, 1)])
def test_every_rank_computes_its_part_of_a_step(micro, ranks, wanted):
    assert micro_batches(16, micro, ranks) == wanted


@pytest.mark.parametrize(("micro", "ranks", "advice"), [(1, 3, 15), (16, 2, 32), (5, 1, 15)])
def test_a_step_that_ranks_cannot_share_is_refused_with_one_that_they_can(micro, ranks, advice):
    with pytest.raises(ValueError, match=rf"= {micro} x {ranks}, got 16; choose one, such as {advice}$"):
        micro_batches(16, micro, ranks)
