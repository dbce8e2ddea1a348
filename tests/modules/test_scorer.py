"""Log-probs of responses and all gradients, by every way, are those of the family's own forward of each alone."""

from __future__ import annotations

import copy
import functools
import logging
from typing import NamedTuple

import pytest
import torch
import transformers as hf

from mmrlhf.batches import Continuation
from mmrlhf.datamodules.collate import packed
from mmrlhf.datamodules.rows import Answers
from mmrlhf.modules.backbone import backbone_of
from mmrlhf.modules.loading import Freeze, frozen
from mmrlhf.modules.packed import lengths, unpacked
from mmrlhf.modules.scorer import ResponseScorer, told

from ..datamodules.made import sample
from ..threads import one_thread  # noqa: F401 - of itself, for the whole module
from .families import PATCH, SIDE, SQUARE, SUPPORTS, VISION, built, lively, template, text_config, tokenizer
from .queries import FRAMES, LONG, batch, samples

log = logging.getLogger(__name__)

KINDS = SUPPORTS | {"llava": ("text", "image", "images")}
"""Every family of the table, and what its prompts may hold."""
SHARING = [family for family in KINDS if family != "gemma3"]
WAYS = {
    "separate": {"step": "separate"},
    "some": {"step": "separate", "rows_at_once": 3, "chunk": 7},
    "auto": {"step": "shared_prefix"},
    "together": {"step": "shared_prefix", "kernel": "together", "chunk": 5},
    "apart": {"step": "shared_prefix", "kernel": "apart"},
    "dense": {"step": "shared_prefix", "kernel": "dense"},
}
BOTH = ("separate", "auto")
IN_DOUBLE = ("llava_onevision", "qwen2_5_vl", "gemma3")
TALKATIVE = [("It", "no", "", "a cat", "up and down"), (f"{LONG} {LONG}", "I")]


def llava(text=hf.LlamaConfig, **options):
    """The first of its line, whose decoder may be any text model; here because its encoding is that of the others."""
    words = tokenizer({"image_token": "<image>"})
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, projection_dim=32),
        text_config=text(**text_config(words), **options),
        image_token_index=words.image_token_id,
        tie_word_embeddings=False,
    )
    processor = hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n"),
    )
    return lively(hf.LlavaForConditionalGeneration, config, 9), processor


@functools.cache
def made(family):
    """Model and processor, which no test may change."""
    return llava() if family == "llava" else built(family)


def fresh(family):
    """A copy of the family's checkpoint, as transformers computes it."""
    return copy.deepcopy(made(family)[0])


def ours(family, dtype=torch.float32, freeze=None):
    """A copy of the family's checkpoint as a backbone in training."""
    model = fresh(family).to(dtype)
    return frozen(backbone_of(model), freeze or Freeze(vision=False)).train()


def queries(family, kinds=None):
    """Rows of every kind, prefixes and responses of very different length among them."""
    long, short = TALKATIVE
    cases = samples(kinds or KINDS[family])
    cases += [sample("long", prompt=f"{LONG} " * 5, texts=long), sample("short", prompt="?", texts=short)]
    return [Answers(made(family)[1], FRAMES)(case) for case in cases]


def laid_out(family, rows):
    """The rows as a batch of one packed row each."""
    return packed(rows, made(family)[1].tokenizer.pad_token_id)


def ways(family, some=tuple(WAYS)):
    """Those of some ways that are open to a family."""
    return [way for way in some if family in SHARING or WAYS[way]["step"] == "separate"]


class Found(NamedTuple):
    """The sums of all responses, and the gradient of some function of all of them."""

    sums: torch.Tensor
    tokens: list[int]
    gradients: dict[str, torch.Tensor | None]


def weighed(sums):
    """A scalar that no two responses enter alike."""
    weights = torch.randn(len(sums), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (sums.double() * weights).sum()


def found(model, sums, tokens):
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    gradients = torch.autograd.grad(weighed(sums), list(trained.values()), allow_unused=True)
    return Found(sums.detach(), list(tokens), dict(zip(trained, gradients, strict=True)))


def alone(model, rows):
    """Each response by the family's own forward: the prefix and itself in a row of their own, all logits."""
    sums, tokens = [], []
    for row in rows:
        features = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in row.features.items()}
        for given, supervised in row.continuations:
            said = torch.cat([given, supervised])
            ids = torch.cat([row.prefix, said])[None]
            types = {k: torch.cat([v, torch.zeros(len(said), dtype=v.dtype)])[None] for k, v in row.per_token.items()}
            mask = torch.ones_like(ids)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **features, **types).logits[0]
            logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            predicting = slice(len(ids[0]) - len(supervised) - 1, -1)
            sums.append(logps[predicting].gather(-1, supervised[:, None]).sum())
            tokens.append(len(supervised))
    return found(model, torch.stack(sums), tokens)


def scored(backbone, rows, **way):
    """The same by a scorer."""
    said = ResponseScorer(backbone, **way).train(backbone.training)(rows)
    return found(backbone.model, said.sums, said.tokens.tolist())


def distance(these, those):
    """The largest of the relative errors of all gradients together and of each.

    A gradient that is next to nothing is measured against a hundredth of all of them.
    """
    assert these.gradients.keys() == those.gradients.keys()
    nothing = torch.zeros((), dtype=torch.float64)
    got, true = (
        {name: nothing if weight is None else weight.double() for name, weight in each.gradients.items()}
        for each in (these, those)
    )
    off = torch.stack([(got[name] - true[name]).norm() for name in true])
    norms = torch.stack([gradient.norm() for gradient in true.values()])
    each = off / (norms + 0.01 * norms.norm())
    return max((off.norm() / norms.norm()).item(), each.max().item())


def together(these, those):
    """The relative error of all gradients as one vector."""
    known = {name: gradient.double() for name, gradient in those.gradients.items() if gradient is not None}
    off = sum((these.gradients[name].double() - gradient).square().sum() for name, gradient in known.items())
    return (off / sum(gradient.square().sum() for gradient in known.values())).sqrt().item()


@functools.cache
def expected(family, kinds=None):
    """What the family's own forward gives for the queries of these kinds."""
    return alone(fresh(family), queries(family, kinds))


@functools.cache
def shared_backbone(family):
    """One backbone for all tests that change nothing of it."""
    return ours(family)


def equal(these, those, tolerance=1e-4):
    """Whether two ways agree, gradients first."""
    error = distance(these, those)
    sums = (these.sums - those.sums).abs().max().item()
    log.info("gradients differ by %.1e, sums by %.1e", error, sums)
    return error < tolerance and sums < 20 * tolerance and these.tokens == those.tokens


# Every family, every way -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "way"), [(family, way) for family in KINDS for way in ways(family)])
def test_sums_and_gradients_are_those_of_the_familys_own_forward(family, way):
    rows = queries(family)
    assert {len(row.continuations) for row in rows} == {2, 3, 4, 5}
    assert min(len(said.supervised) for row in rows for said in row.continuations) == 1
    assert max(len(row.prefix) for row in rows) > 10 * min(len(row.prefix) for row in rows)
    got = scored(shared_backbone(family), laid_out(family, rows), **WAYS[way])
    assert all(gradient is not None for gradient in got.gradients.values())
    assert equal(got, expected(family))


@pytest.mark.parametrize("family", KINDS)
def test_a_batch_without_media_gives_the_side_of_the_pictures_a_gradient_of_zero(family):
    backbone, rows = shared_backbone(family), queries(family, ("text",))
    for way in ways(family, BOTH):
        got = scored(backbone, laid_out(family, rows), **WAYS[way])
        assert equal(got, expected(family, ("text",)))
        for part in ("vision", "projector"):
            names = [name for name, _ in backbone.part(part)]
            assert names
            assert all(got.gradients[name] is not None and not got.gradients[name].any() for name in names)


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=[] if family in IN_DOUBLE else pytest.mark.slow) for family in KINDS],
)
def test_in_double_precision_only_what_transformers_rounds_itself_is_left(family):
    rows, backbone = queries(family), ours(family, torch.float64)
    truth = alone(fresh(family).double(), rows)
    for way in ways(family, BOTH):
        got = scored(backbone, laid_out(family, rows), **WAYS[way])
        assert got.sums.dtype == torch.float64
        assert equal(got, truth, tolerance=1e-6)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])
@pytest.mark.parametrize("kinds", [("image",), ("images",), ("film",), ("image", "images")])
def test_batches_of_one_kind_are_right_too(family, kinds):
    rows = [Answers(made(family)[1], FRAMES)(case) for case in samples(kinds)]
    truth = alone(fresh(family), rows)
    for way in BOTH:
        assert equal(scored(shared_backbone(family), laid_out(family, rows), **WAYS[way]), truth)


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_what_a_processor_says_of_the_edges_of_pictures_is_heard(family):
    row = queries(family, ("image",))[0]
    mask = row.features["pixel_attention_mask"].clone()
    mask[..., SIDE // 2 :, :] = 0
    rows = [row._replace(features=row.features | {"pixel_attention_mask": mask})]
    truth = alone(fresh(family), rows)
    assert (truth.sums - expected(family, ("image",)).sums[: len(truth.sums)]).abs().min() > 1e-2
    for way in BOTH:
        assert equal(scored(shared_backbone(family), laid_out(family, rows), **WAYS[way]), truth)


def test_in_bfloat16_a_shared_prefix_rounds_no_more_than_separate_rows():
    for family in ("llava_onevision", "qwen2_5_vl"):
        rows, backbone = laid_out(family, queries(family)), ours(family, torch.bfloat16)
        off = {}
        for way in ("separate", "auto", "apart"):
            got = scored(backbone, rows, **WAYS[way])
            assert got.sums.dtype == torch.float32
            off[way] = together(got, expected(family))
        log.info("%s in bfloat16: %s", family, {way: f"{error:.1e}" for way, error in off.items()})
        assert 1e-3 < off["separate"] < 0.2
        assert max(off.values()) < 1.5 * off["separate"]


def test_under_autocast_a_shared_prefix_rounds_no_more_than_separate_rows():
    rows, off = laid_out("qwen2_vl", queries("qwen2_vl")), {}
    for way in WAYS:
        with torch.autocast("cpu", torch.bfloat16):
            got = scored(shared_backbone("qwen2_vl"), rows, **WAYS[way])
        assert got.sums.dtype == torch.float32
        off[way] = together(got, expected("qwen2_vl"))
    log.info("under autocast: %s", {way: f"{error:.1e}" for way, error in off.items()})
    assert 1e-3 < off["separate"] < 0.2
    assert max(off.values()) < 1.5 * off["separate"]


def test_the_kernels_that_auto_chooses_are_both_in_these_batches():
    found = [2 * sum(segments) <= prefix for prefix, segments in lengths(laid_out("llava", queries("llava")))]
    assert set(found) == {True, False}


# Layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_what_is_given_before_the_supervised_tokens_is_context_only(family):
    rows = queries(family)
    rows = [
        row._replace(
            continuations=tuple(
                Continuation(said.supervised[: at + 1], said.supervised[at + 1 :])
                for at, said in enumerate(row.continuations)
            )
        )
        for row in rows
    ]
    truth = alone(fresh(family), rows)
    assert 0 in truth.tokens
    for way in WAYS:
        assert equal(scored(shared_backbone(family), laid_out(family, rows), **WAYS[way]), truth)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_rows_of_one_response_each_give_the_same_as_rows_of_a_query(family):
    answers = batch(made(family)[1], samples(KINDS[family]))
    rows = batch(made(family)[1], samples(KINDS[family]), layout="rows").rows
    assert len(rows.input_ids) == int(answers.responses.sum())
    backbone = shared_backbone(family)
    truth = scored(backbone, answers.rows, step="separate")
    for way in BOTH:
        assert equal(scored(backbone, rows, **WAYS[way]), truth)


def test_a_batch_in_which_nothing_is_supervised_scores_zero_and_still_gives_every_gradient():
    rows = queries("llava")
    nothing = [row._replace(continuations=tuple(Continuation(b, b[:0]) for _, b in row.continuations)) for row in rows]
    for way in WAYS.values():
        got = scored(shared_backbone("llava"), laid_out("llava", nothing), **way)
        assert not got.sums.any()
        assert set(got.tokens) == {0}
        assert len(got.sums) == sum(len(row.continuations) for row in rows)
        assert all(gradient is not None and not gradient.any() for gradient in got.gradients.values())


def test_what_is_supervised_is_told_in_the_order_of_the_responses():
    rows = queries("llava")
    said = told(laid_out("llava", rows))
    continuations = [supervised for row in rows for _, supervised in row.continuations]
    assert said.responses == len(continuations)
    assert said.targets.equal(torch.cat(continuations))
    owners = [number for number, tokens in enumerate(continuations) for _ in tokens]
    assert said.predicted_by.owners.tolist() == owners


def test_unpacked_rows_hold_the_prefix_and_one_response():
    rows = queries("llava")
    batch = laid_out("llava", rows)
    owner, columns, inside = unpacked(batch)
    whole = [torch.cat([row.prefix, *told]) for row in rows for told in row.continuations]
    assert owner.tolist() == [number for number, row in enumerate(rows) for _ in row.continuations]
    assert inside.sum(1).tolist() == [len(tokens) for tokens in whole]
    for number, tokens in enumerate(whole):
        assert batch.input_ids[owner[number], columns[number]][inside[number]].equal(tokens)


def test_lengths_are_those_of_prefix_and_responses():
    rows = queries("llava")
    wanted = [(len(row.prefix), tuple(len(said.supervised) for said in row.continuations)) for row in rows]
    assert lengths(laid_out("llava", rows)) == wanted


# The scorer's own rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_auto_shares_a_prefix_wherever_that_is_exact(family):
    step = ResponseScorer(shared_backbone(family)).step
    assert step == ("shared_prefix" if family in SHARING else "separate")


def test_a_shared_prefix_is_refused_where_it_would_be_wrong():
    with pytest.raises(ValueError, match=r"gemma3 cannot share a prefix: .*see later ones; say separate, or auto"):
        ResponseScorer(shared_backbone("gemma3"), "shared_prefix")


@pytest.mark.parametrize("wrong", [{"chunk": 0}, {"rows_at_once": 0}])
def test_numbers_below_one_are_refused(wrong):
    with pytest.raises(ValueError, match="expected 1 or more, got 0"):
        ResponseScorer(shared_backbone("llava"), **wrong)


@pytest.mark.parametrize("wrong", [{"step": "packed"}, {"kernel": "flash"}])
def test_an_unknown_word_is_refused(wrong):
    with pytest.raises(ValueError, match="expected one of auto, "):
        ResponseScorer(shared_backbone("llava"), **wrong)


@pytest.mark.parametrize("way", BOTH)
def test_without_gradients_the_numbers_are_the_same(way):
    rows = laid_out("llava", queries("llava"))
    scorer = ResponseScorer(shared_backbone("llava"), chunk=7, **WAYS[way])
    with torch.no_grad():
        said = scorer(rows)
    assert not said.sums.requires_grad
    torch.testing.assert_close(said.sums, scorer(rows).sums.detach())
