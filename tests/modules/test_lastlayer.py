"""The last layer leaves out what nobody reads, and what is read is the same to the gradient."""

from __future__ import annotations

import copy

import pytest
import torch

from mmrlhf.modules import lastlayer
from mmrlhf.modules.backbone import backbone_of
from mmrlhf.modules.scorer import ResponseScorer

from .test_scorer import distance, fresh, laid_out, one_thread, queries, scored  # noqa: F401

SHORTENED = ("llava_onevision", "llava_next", "qwen2_vl", "qwen2_5_vl", "internvl", "idefics3", "smolvlm")


def tokens_of_networks(backbone, rows):
    """How many tokens each layer's network computes, from the first layer to the last."""
    seen = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _, given, out: seen.append(given[0].shape[1]))
        for layer in backbone.decoder.layers
    ]
    ResponseScorer(backbone, "shared_prefix")(rows)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", SHORTENED)
def test_only_states_that_are_read_go_through_the_last_network(family):
    rows = laid_out(family, queries(family))
    *others, last = tokens_of_networks(backbone_of(fresh(family)), rows)
    assert set(others) == {int((rows.segment_ids >= 0).sum())}
    told = rows.labels >= 0
    where = told.nonzero()[:, 0]
    assert last == len(set(zip(where.tolist(), rows.previous[told].tolist(), strict=True)))
    assert last < others[0] / 2


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])
def test_sums_and_gradients_are_those_of_the_whole_layer(family, monkeypatch):
    rows = laid_out(family, queries(family))
    short = scored(backbone_of(fresh(family)), rows, step="shared_prefix")
    monkeypatch.setattr(lastlayer, "PARTS", ())
    whole = backbone_of(fresh(family))
    *others, last = tokens_of_networks(whole, rows)
    assert last == others[0]
    assert distance(short, scored(whole, rows, step="shared_prefix")) < 1e-6


def test_a_copy_has_a_last_layer_of_its_own():
    one = backbone_of(fresh("llava_onevision"))
    other = copy.deepcopy(one)
    rows = laid_out("llava_onevision", queries("llava_onevision"))
    with torch.no_grad():
        before = ResponseScorer(one)(rows).sums
        for weight in other.decoder.layers[-1].parameters():
            weight.zero_()
        assert torch.equal(ResponseScorer(one)(rows).sums, before)
        assert not torch.allclose(ResponseScorer(other)(rows).sums, before)
