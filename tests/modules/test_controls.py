"""Wrong ways that look right: each moves the loss a little, and the comparison of gradients tells it."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as hf
from torch.nn.functional import logsigmoid

from mmrlhf.batches import IGNORED, PREFIX
from mmrlhf.datamodules.rows import Answers
from mmrlhf.modules import packed, scorer
from mmrlhf.modules.backbone import Backbone, backbone_of
from mmrlhf.modules.loading import Freeze, frozen
from mmrlhf.modules.packed import Places

from . import test_scorer as right
from .queries import FRAMES, samples
from .test_scorer import one_thread  # noqa: F401 - of this file too

log = logging.getLogger(__name__)
FAMILIES = ("llava_onevision", "qwen2_vl", "idefics3")


def one_query(family):
    """A picture and four responses."""
    return [Answers(right.made(family)[1], FRAMES)(case) for case in samples(["image"])[:1]]


def loss(found, reference):
    """DPO's over all pairs, as if each response were better than those behind it."""
    better, worse = torch.triu_indices(len(reference), len(reference), 1)
    ratios = found.sums - reference
    return -logsigmoid(0.1 * (ratios[better] - ratios[worse])).mean().item()


def without_mask(backbone, embeds, positions, layout):
    """Restarted positions and no mask: transformers takes the segments for unrelated texts."""
    return backbone.decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state


def mask_of_ones(backbone, embeds, positions, layout):
    """Later responses see earlier ones."""
    ones = torch.ones(embeds.shape[:2], dtype=torch.long)
    found = backbone.decoder(inputs_embeds=embeds, position_ids=positions, attention_mask=ones, use_cache=False)
    return found.last_hidden_state


def running_on(self, rows):
    """Positions that do not restart."""
    places = torch.arange(rows.input_ids.shape[1]).expand_as(rows.input_ids)
    prefix, found = rows.segment_ids == PREFIX, positions_of(self, rows)
    start = torch.where(prefix, found, -1).amax(-1, keepdim=True) + 1
    return torch.where(prefix, found, start + places - prefix.sum(1, keepdim=True))


def shifted_by_one(rows):
    """The first token of a response is predicted by the last one of the response before it."""
    said, (row, column) = told_of(rows), (rows.labels != IGNORED).nonzero(as_tuple=True)
    return said._replace(predicted_by=Places(row, column - 1, said.predicted_by.owners))


positions_of, told_of = Backbone.positions, scorer.told
WRONG = {
    "no mask": (packed, "_read", without_mask),
    "a mask of ones": (packed, "_read", mask_of_ones),
    "positions run on": (Backbone, "positions", running_on),
    "labels shifted by one": (scorer, "told", shifted_by_one),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_variant_fails_the_comparison_that_the_right_one_passes(family, wrong, monkeypatch, record_property):
    rows = one_query(family)
    batch, backbone = right.laid_out(family, rows), right.shared_backbone(family)
    truth = right.alone(right.fresh(family), rows)
    assert right.equal(right.scored(backbone, batch, step="shared_prefix"), truth)
    monkeypatch.setattr(*WRONG[wrong])
    got = right.scored(backbone, batch, step="shared_prefix")
    reference = truth.sums + torch.tensor([1.0, -2.0, 0.5, 3.0])
    error, moved = right.distance(got, truth), abs(loss(got, reference) - loss(truth, reference))
    log.info("%s, %s: gradients are wrong by %.1e, the loss by %.1e", family, wrong, error, moved)
    record_property("loss_moved", moved)
    assert error > 1e-3
    assert not right.equal(got, truth)


@pytest.mark.parametrize("kernel", ["auto", "dense"])
def test_the_refusal_of_gemma3_is_needed(kernel, monkeypatch):
    rows = right.queries("gemma3")
    batch, backbone, truth = right.laid_out("gemma3", rows), right.ours("gemma3"), right.expected("gemma3")
    assert right.equal(right.scored(backbone, batch, step="auto"), truth)
    monkeypatch.setattr(packed, "why_not_shared", lambda config: "")
    got = right.scored(backbone, batch, step="shared_prefix", kernel=kernel)
    assert right.distance(got, truth) > 1e-2
    log.info("gemma3 with a shared prefix: gradients are wrong by %.1e", right.distance(got, truth))


def test_the_refusal_of_a_window_is_needed(monkeypatch):
    model, processor = right.llava(hf.MistralConfig, sliding_window=8)
    rows = [Answers(processor, FRAMES)(case) for case in samples(["text", "image"])]
    batch = right.packed(rows, processor.tokenizer.pad_token_id)
    truth = right.alone(model, rows)
    backbone = frozen(backbone_of(model), Freeze(vision=False)).train()
    assert scorer.ResponseScorer(backbone).step == "separate"
    with pytest.raises(ValueError, match=r"llava cannot share a prefix: its decoder sees a window of 8 tokens"):
        scorer.ResponseScorer(backbone, "shared_prefix")
    assert right.equal(right.scored(backbone, batch), truth)
    monkeypatch.setattr(packed, "why_not_shared", lambda config: "")
    assert right.distance(right.scored(backbone, batch), truth) > 1e-2
