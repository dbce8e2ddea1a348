"""What a training will need is what its longest queries need, and what it takes follows from all of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from mmrlhf.batches import Continuation, PackedQueries, pack
from mmrlhf.modules.backbone import backbone_of
from mmrlhf.modules.forecast import Steps, forecast
from mmrlhf.modules.scorer import ResponseScorer
from mmrlhf.ranks import Layout

from .families import BUILD

STEPS = Steps(global_batch=8, micro_batch=1, steps=10)


class Config(NamedTuple):
    """As much of a config as is read."""

    activation_checkpointing: bool = False


class Module:
    """A module of the smallest backbone."""

    config = Config()

    def __init__(self, **way):
        self.way = way

    def empty(self):
        """It with weights, which nobody looks at."""
        return ResponseScorer(backbone_of(BUILD["llava_onevision"]()[0]), **self.way)


def batches_of(sizes):
    """A batch of one query of each of these sizes: a prefix of so many tokens, and two responses of ten."""

    def batch(numbers):
        rows = [sizes[number] for number in numbers]
        said = [Continuation(torch.empty(0, dtype=torch.long), torch.ones(10, dtype=torch.long))] * 2
        packed = pack([torch.ones(size, dtype=torch.long) for size in rows], [said] * len(rows), {}, 0)
        nothing = torch.zeros(2 * len(rows))
        return PackedQueries(
            rows=packed,
            pairs=torch.tensor([[0, 1]]),
            ties=torch.zeros(0, 2, dtype=torch.long),
            responses=torch.tensor([2] * len(rows)),
            rewards=nothing,
            reference_logps=nothing,
            ranks=nothing,
            annotated=nothing,
            scores=nothing,
            categories=("",) * len(rows),
            ids=tuple(map(str, numbers)),
        )

    return batch


def told(sizes, layout=None, steps=STEPS, gpu="H100", **way):
    tokens = np.array(sizes) + 20
    return forecast(Module(**way), layout or Layout(), steps, tokens, batches_of(sizes), gpu)


def test_the_longest_micro_batch_decides_on_memory():
    found = told([30, 100, 50, 90], steps=STEPS._replace(micro_batch=2)).found.batches
    assert found.tokens == 100 + 20 + 90 + 20
    assert found.mean_tokens == pytest.approx(67.5 + 20)


def test_separate_rows_hold_the_prefix_with_every_response():
    assert told([100], step="separate").found.batches.tokens == 2 * 110
    assert told([100], step="separate", rows_at_once=1).found.batches.tokens == 110


def test_seconds_follow_all_queries_and_not_the_usual_one():
    plain, skewed = told([100] * 8), told([100] * 7 + [900])
    assert skewed.seconds / plain.seconds == pytest.approx(skewed.flops / plain.flops, rel=0.02)
    assert skewed.seconds > 1.5 * plain.seconds


def test_where_speed_is_not_known_no_seconds_are_told():
    assert told([100], gpu=None).seconds is None
    assert told([100], step="separate").seconds is None
    assert told([100], layout=Layout(2, "sharded", offload=True)).seconds is None
    assert not any(name == "seconds per step" for name, _ in told([100], gpu=None).rows())


def test_what_shards_cannot_do_is_refused():
    with pytest.raises(ValueError, match="rows_at_once: expected null with sharded weights, got 1"):
        told([100], layout=Layout(2, "sharded"), rows_at_once=1)


def test_the_first_rank_needs_room_for_everything_at_the_end():
    rows = dict(told([100], layout=Layout(2, "sharded")).rows())
    body = backbone_of(BUILD["llava_onevision"]()[0])
    whole = sum(weight.numel() * 4 for weight in body.parameters())
    assert rows["host of rank 0, at the end"] == f"{whole / 2**20:.1f} MiB"
