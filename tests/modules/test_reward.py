"""Rewards, critiques and all gradients, by every way, are those of the family's own forward of each alone."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from mmrlhf.batches import Continuation
from mmrlhf.datamodules.collate import ScoredRow, collate, packed
from mmrlhf.datamodules.rows import Critiques
from mmrlhf.modules import reward
from mmrlhf.modules.loading import Lora
from mmrlhf.modules.packed import Places
from mmrlhf.modules.reward import RewardHead, RewardReader, ends
from mmrlhf.prompts import Template

from .families import WIDTH
from .queries import FRAMES, samples
from .test_lora import as_transformers_computes_it, with_adapters
from .test_scorer import (
    KINDS,
    SHARING,
    WAYS,
    Found,
    equal,
    fresh,
    made,
    one_thread,  # noqa: F401 - of this file too
    ours,
    shared_backbone,
    together,
    ways,
)

TEMPLATE = Template("judge", "Judge it. Q: {question}\nA: {response}\nEvaluation:")
WORDS = ("It is right and clear.", "", "Wrong: there is no ring.")
"""Critiques, in turn; the second response of each query has none."""
DIMENSIONS = 2


def judged_samples(kinds):
    """Queries with such media, most of whose responses have a critique."""
    found = []
    for case in samples(kinds):
        responses = tuple(
            dataclasses.replace(each, critique=WORDS[place % len(WORDS)])
            for place, each in enumerate(case.ranked.responses)
        )
        found.append(case._replace(ranked=dataclasses.replace(case.ranked, responses=responses)))
    return found


def judged_rows(family, kinds=None):
    """Rows in which these queries are judged."""
    encode = Critiques(made(family)[1], FRAMES, TEMPLATE, "critique")
    return [encode(case) for case in judged_samples(kinds or KINDS[family])]


def laid_out(family, rows):
    return packed(rows, made(family)[1].tokenizer.pad_token_id)


def judged_batch(family, cases, layout="packed"):
    """The queries as the data module makes a batch of them."""
    encode = Critiques(made(family)[1], FRAMES, TEMPLATE, "critique")
    rows = [encode(case) for case in cases]
    unknown = [torch.full((len(row.places),), torch.nan) for row in rows]
    scored = [ScoredRow(row, nothing, nothing, counted=True) for row, nothing in zip(rows, unknown, strict=True)]
    return collate(scored, padding=made(family)[1].tokenizer.pad_token_id, layout=layout, pairs="all")


def lively_head(dtype=torch.float32, dimensions=DIMENSIONS, seed=1):
    """A head whose rewards differ from state to state."""
    head = RewardHead(WIDTH, dimensions, dtype, seed)
    with torch.no_grad():
        head.out.weight.mul_(4)
    return head


def everything(rewards, dimensions, sums):
    """A column per response: its reward, its scores, and the sum over its critique."""
    return torch.cat([rewards[:, None], dimensions, sums[:, None]], dim=1).double()


def found(numbers, tokens, model, head):
    """All numbers, and the gradient of a scalar that no two of them enter alike."""
    weights = torch.randn(numbers.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[:, :-1] *= 10  # rewards are of one token, sums of many
    named = [*model.named_parameters(), *((f"head.{name}", weight) for name, weight in head.named_parameters())]
    trained = {name: weight for name, weight in named if weight.requires_grad}
    gradients = torch.autograd.grad((numbers * weights).sum(), list(trained.values()), allow_unused=True)
    return Found(numbers.detach(), list(tokens), dict(zip(trained, gradients, strict=True)))


def said_alone(model, head, rows):
    """Each response and its critique by the family's own forward, and the head written out."""
    seen = []
    watch = model.get_output_embeddings().register_forward_pre_hook(lambda _, states: seen.append(states[0]))
    numbers, tokens = [], []
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
            total = logps[predicting].gather(-1, supervised[:, None]).sum()
            last = seen.pop()[0, -1]
            last = last.to(torch.promote_types(last.dtype, torch.float32))
            hidden = torch.tanh(last @ head.dense.weight.to(last).T + head.dense.bias.to(last))
            numbers.append(torch.cat([hidden @ head.out.weight.to(last).T + head.out.bias.to(last), total[None]]))
            tokens.append(len(supervised))
    watch.remove()
    return torch.stack(numbers), tokens


def alone(model, head, rows):
    """The same with gradients."""
    numbers, tokens = said_alone(model, head, rows)
    return found(numbers.double(), tokens, model, head)


def judged(backbone, head, rows, **way):
    """The same by a reader."""
    said = RewardReader(backbone, head, **way).train(backbone.training)(rows)
    numbers = everything(said.rewards, said.dimensions, said.critiques.sums)
    return found(numbers, said.critiques.tokens.tolist(), backbone.model, head)


@functools.cache
def expected(family):
    """What the family's own forward gives."""
    return alone(fresh(family), lively_head(), judged_rows(family))


# Every family, every way -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_rewards_critiques_and_gradients_are_those_of_the_familys_own_forward(family):
    rows, truth = judged_rows(family), expected(family)
    assert 0 in truth.tokens
    assert max(truth.tokens) > 5
    assert truth.sums[:, 0].std() > 0.1
    for way in ways(family, ("some", "auto")):
        got = judged(shared_backbone(family), lively_head(), laid_out(family, rows), **WAYS[way])
        assert all(gradient is not None for gradient in got.gradients.values())
        assert equal(got, truth)


@pytest.mark.parametrize("way", ["together", "apart", "dense"])
def test_every_kernel_gives_the_same(way):
    got = judged(shared_backbone("qwen2_vl"), lively_head(), laid_out("qwen2_vl", judged_rows("qwen2_vl")), **WAYS[way])
    assert equal(got, expected("qwen2_vl"))


@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_batches_of_the_data_module_are_judged_in_the_order_of_their_responses(layout):
    batch = judged_batch("llava_onevision", judged_samples(KINDS["llava_onevision"]), layout)
    for way in ("separate", "auto"):
        got = judged(shared_backbone("llava_onevision"), lively_head(), batch.rows, **WAYS[way])
        assert equal(got, expected("llava_onevision"))
    assert len(got.tokens) == int(batch.responses.sum())


def test_in_double_precision_nothing_is_rounded_away():
    rows, head = judged_rows("llava"), lively_head().double()
    truth = alone(fresh("llava").double(), head, rows)
    for way in ("separate", "auto"):
        got = judged(ours("llava", torch.float64), head, laid_out("llava", rows), **WAYS[way])
        assert equal(got, truth, tolerance=1e-6)


def test_in_bfloat16_scores_are_float32_and_a_shared_prefix_rounds_no_more_than_separate_rows():
    family = "llava_onevision"
    rows, backbone, truth = laid_out(family, judged_rows(family)), ours(family, torch.bfloat16), expected(family)
    head, got = lively_head(torch.bfloat16), {}
    said = RewardReader(backbone, head)(rows)
    assert said.rewards.dtype == said.dimensions.dtype == said.critiques.sums.dtype == torch.float32
    for way in ("separate", "auto"):
        got[way] = judged(backbone, head, rows, **WAYS[way])
    off = {way: together(each, truth) for way, each in got.items()}
    assert 1e-3 < off["separate"] < 0.2
    assert off["auto"] < 1.5 * off["separate"]
    apart = (got["auto"].sums - got["separate"].sums)[:, 0].abs().max()
    assert apart < 0.1 * truth.sums[:, 0].std()


def test_autocast_leaves_the_head_in_float32():
    head, states = lively_head(), torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        under = head(states)
    assert torch.equal(under, head(states))


@pytest.mark.parametrize("family", ["llava_onevision", "gemma3"])
def test_the_head_is_trained_whole_beside_adapters(family):
    backbone, rows, head = with_adapters(family, Lora(rank=3, alpha=6)), judged_rows(family), lively_head()
    truth = alone(as_transformers_computes_it(backbone), head, rows)
    assert {name for name in truth.gradients if "lora_" not in name} == {
        "head.dense.weight",
        "head.dense.bias",
        "head.out.weight",
        "head.out.bias",
    }
    for way in ways(family, ("some", "auto")):
        got = judged(backbone, head, laid_out(family, rows), **WAYS[way])
        assert all(gradient is not None and gradient.any() for gradient in got.gradients.values())
        assert equal(got, truth)


def test_rewards_reach_the_body_and_the_head_where_there_is_no_critique():
    rows = [
        row._replace(continuations=tuple(Continuation(given, given[:0]) for given, _ in row.continuations))
        for row in judged_rows("llava")
    ]
    for way in ("separate", "auto"):
        got = judged(shared_backbone("llava"), lively_head(), laid_out("llava", rows), **WAYS[way])
        truth = alone(fresh("llava"), lively_head(), rows)
        assert set(got.tokens) == {0}
        assert all(gradient is not None for gradient in got.gradients.values())
        assert equal(got, truth)
        assert not got.gradients["lm_head.weight"].any()


# Where a reward is read --------------------------------------------------------------------------------------


def test_the_end_of_every_response_is_its_last_token():
    rows = judged_rows("llava")
    batch = laid_out("llava", rows)
    last = ends(batch)
    wanted = [torch.cat(told)[-1] for row in rows for told in row.continuations]
    assert batch.input_ids[last.rows, last.columns].equal(torch.stack(wanted))
    assert last.owners.tolist() == list(range(len(wanted)))
    assert last.rows.tolist() == [number for number, row in enumerate(rows) for _ in row.continuations]
    after = torch.nn.functional.pad(batch.segment_ids, (0, 1), value=-1)[last.rows, last.columns + 1]
    assert (after != batch.segment_ids[last.rows, last.columns]).all()


def test_a_response_of_no_token_ends_where_its_prefix_does():
    some, nothing = torch.tensor([7]), torch.empty(0, dtype=torch.long)
    told = (Continuation(some, some), Continuation(nothing, nothing), Continuation(some, nothing))
    row = judged_rows("llava", ("text",))[0]._replace(continuations=told)
    last = ends(laid_out("llava", [row]))
    prefix = len(row.prefix)
    assert last.columns.tolist() == [prefix + 1, prefix - 1, prefix + 2]
    got = judged(shared_backbone("llava"), lively_head(), laid_out("llava", [row]))
    assert equal(got, alone(fresh("llava"), lively_head(), [row]))


@pytest.mark.parametrize("by", [-1, "prefix", "neighbour"])
def test_a_reward_that_is_read_elsewhere_is_another(by, monkeypatch):
    def elsewhere(rows):
        last = ends(rows)
        if by == "prefix":
            return last._replace(columns=(rows.segment_ids == 0).sum(1)[last.rows] - 1)
        if by == "neighbour":
            return Places(last.rows.roll(1), last.columns.roll(1), last.owners.roll(1))
        return last._replace(columns=last.columns + by)

    monkeypatch.setattr(reward, "ends", elsewhere)
    for way in ("separate", "auto"):
        got = judged(shared_backbone("llava"), lively_head(), laid_out("llava", judged_rows("llava")), **WAYS[way])
        assert not equal(got, expected("llava"))
        assert (got.sums - expected("llava").sums)[:, :-1].abs().max() > 0.1
        torch.testing.assert_close(got.sums[:, -1], expected("llava").sums[:, -1], rtol=1e-4, atol=1e-3)


def test_a_reward_depends_on_the_critique_and_not_on_other_responses():
    row = judged_rows("llava", ("image",))[0]
    reader = RewardReader(shared_backbone("llava"), lively_head())
    with torch.no_grad():
        whole = reader(laid_out("llava", [row])).rewards
        turned = reader(laid_out("llava", [row._replace(continuations=row.continuations[::-1])])).rewards
        mute = [Continuation(given, said[:0]) for given, said in row.continuations]
        without = reader(laid_out("llava", [row._replace(continuations=tuple(mute))])).rewards
    torch.testing.assert_close(turned.flip(0), whole, rtol=1e-4, atol=1e-4)
    spoke = torch.tensor([len(said) > 0 for _, said in row.continuations])
    torch.testing.assert_close(without[~spoke], whole[~spoke], rtol=1e-4, atol=1e-4)
    assert (without - whole)[spoke].abs().min() > 1e-3


# The rules of head and reader --------------------------------------------------------------------------------


def test_a_head_begins_the_same_on_every_rank_and_leaves_chance_alone():
    before = torch.random.get_rng_state()
    one, same, other = RewardHead(8, 2, seed=3), RewardHead(8, 2, seed=3), RewardHead(8, 2, seed=4)
    assert all(a.equal(b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not one.dense.weight.equal(other.dense.weight)
    assert all(0.5 * 8**-0.5 < weight.abs().max() <= 8**-0.5 for weight in one.parameters())
    assert {weight.dtype for weight in RewardHead(8, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert (one.width, one.dimensions, RewardHead(8).dimensions) == (8, 2, 0)
    torch.random.set_rng_state(before)


def test_auto_shares_a_prefix_wherever_that_is_exact():
    for family in ("llava", "gemma3"):
        step = RewardReader(shared_backbone(family), lively_head()).step
        assert step == ("shared_prefix" if family in SHARING else "separate")


def test_a_head_of_another_width_and_a_chunk_of_nothing_are_refused():
    with pytest.raises(ValueError, match="states of width 48, got one of 32; head and body are of different"):
        RewardReader(shared_backbone("llava"), RewardHead(32))
    with pytest.raises(ValueError, match="chunk: expected 1 or more, got 0"):
        RewardReader(shared_backbone("llava"), lively_head(), chunk=0)
