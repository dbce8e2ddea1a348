"""The operations of a step against those that torch counts, but for attention, where it counts what is masked, too."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmrlhf.batches import Continuation, pack
from mmrlhf.modules import lastlayer
from mmrlhf.modules.backbone import backbone_of
from mmrlhf.modules.flops import Cost
from mmrlhf.modules.loading import Freeze, Lora, adapted, frozen
from mmrlhf.modules.scorer import ResponseScorer

from .test_memory import body

LENGTHS = (200, (40, 50, 60, 70))


def rows():
    """One query of text alone."""
    prefix, segments = LENGTHS
    words = torch.Generator().manual_seed(0)
    ids = [torch.randint(10, 400, (length,), generator=words) for length in (prefix, *segments)]
    none = torch.empty(0, dtype=torch.long)
    return pack(ids[:1], [[Continuation(none, each) for each in ids[1:]]], {}, pad=0)


def counted(backbone, step="shared_prefix"):
    with FlopCounterMode(display=False) as counter:
        ResponseScorer(backbone.train(), step)(rows()).sums.sum().backward()
    return of_matrices(counter)


def of_matrices(counter):
    return sum(flops for name, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))


def expected(backbone, step="shared_prefix", again=False):
    cost = Cost(backbone)
    cost.per_look = 0.0
    return cost.step([LENGTHS], sum(LENGTHS[1]), 0, step == "shared_prefix", again)


@pytest.mark.parametrize("step", ["shared_prefix", "separate"])
def test_forward_and_backward_are_what_torch_counts(step, monkeypatch):
    monkeypatch.setattr(lastlayer, "PARTS", ())  # the estimate lets the last layer compute all tokens
    backbone = backbone_of(body()[0])
    # A row per response is padded to the longest, which is no work that anybody needs.
    padding = 1 if step == "shared_prefix" else 4 * 270 / (4 * 200 + 220)
    assert expected(backbone, step) * padding == pytest.approx(counted(backbone, step), rel=0.01)


def test_a_last_layer_that_leaves_out_what_nobody_reads_makes_the_estimate_a_little_high():
    backbone = backbone_of(body()[0])
    assert 1.0 < expected(backbone) / counted(backbone) < 1 + 1 / 6


def test_what_is_computed_again_is_counted_again_and_so_is_the_last_product_which_torch_leaves_out(monkeypatch):
    monkeypatch.setattr(lastlayer, "PARTS", ())
    model = body()[0]
    layers = model.model.language_model.layers
    model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    left_out = 2 * 420 * sum(layer.mlp.down_proj.weight.numel() for layer in layers)
    assert expected(backbone_of(model), again=True) - left_out == pytest.approx(counted(backbone_of(model)), rel=0.01)


def test_weights_that_do_not_learn_have_no_gradient_to_compute(monkeypatch):
    monkeypatch.setattr(lastlayer, "PARTS", ())
    backbone = adapted(backbone_of(body()[0]), Lora(rank=4))
    # The head does not learn either, and the estimate lets it.
    of_head = sum(LENGTHS[1]) * 2 * backbone.head.weight.numel()
    assert expected(backbone) - of_head == pytest.approx(counted(backbone), rel=0.03)


@pytest.mark.parametrize("trained", [False, True])
def test_a_tower_costs_what_torch_counts(trained):
    backbone = frozen(backbone_of(body()[0]), Freeze(vision=not trained))
    cost, pixels = Cost(backbone), torch.rand(3, 3, 28, 28)
    with FlopCounterMode(display=False) as counter:
        out = backbone.tower(pixels).last_hidden_state.sum()
        if trained:
            out.backward()
    patches = 3 * 16
    found = cost.step([], 0, patches * cost.pixels_per_patch, shared=True, again=False)
    found -= 2 * patches * 32 * 3 * 49 * trained  # nobody asks for a gradient of pixels
    assert found == pytest.approx(of_matrices(counter), rel=0.05)
