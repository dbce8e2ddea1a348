"""A step of the reward model has the gradient of the design's loss, each response and critique run alone."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from mmrlhf.callbacks.gradients import GradientCheck
from mmrlhf.datamodules.collate import ScoredRow, collate
from mmrlhf.modules import packed
from mmrlhf.modules.critic import CritiqueRewardModule, RewardPlan, as_scorer, over_data
from mmrlhf.modules.loading import BackboneConfig, Lora
from mmrlhf.modules.optimiser import Optimiser
from mmrlhf.modules.rewardlosses import RewardWeights, reward_loss
from mmrlhf.modules.selfcheck import agreement
from mmrlhf.records import DIMENSIONS
from mmrlhf.reports import RewardTerms

from .families import built, saved
from .test_reward import (
    FRAMES,
    TEMPLATE,
    Critiques,
    judged_batch,
    judged_samples,
    one_thread,  # noqa: F401 - of this file too
    said_alone,
)

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to .self.log:UserWarning")
NAME = "llava_onevision"
KINDS = ("text", "image", "film")
PLAN = RewardPlan(10, mean_pairs=3.7, mean_ties=0.6, mean_critiques=1.9, mean_scores=2.3)
WEIGHTS = RewardWeights(critique=0.7, rewards=0.5, tie=3.0, centre=0.2, dimensions=0.3)
LEARNED = ("ethics", "helpfulness")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(NAME, tmp_path_factory.mktemp("judge") / NAME)


def made(folder, plan=PLAN, head_scale=4.0, backbone=None, **options):
    """A module with its weights, as a training has it."""
    module = CritiqueRewardModule(BackboneConfig(str(folder), **backbone or {}), **options)
    module.configure_model()
    module.expect(plan)
    with torch.no_grad():
        module.reader.head.out.weight.mul_(head_scale)
    return module.train()


def batch(kinds=KINDS, cases=None, seed=0):
    """A batch in which some responses have critiques, some are ties, and some are scored by people."""
    found = judged_batch(NAME, cases or judged_samples(kinds))
    drawn = torch.randint(1, 6, (len(found.ranks), 3), generator=torch.Generator().manual_seed(seed)).float()
    return found._replace(scores=drawn.masked_fill(drawn == 2, math.nan))


def gradients(module):
    return {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}


def apart(one, other):
    """How far two gradients are apart, over the length of the second."""
    assert one.keys() == other.keys()
    difference = sum(((one[name] - other[name]) ** 2).sum() for name in one)
    return float((difference / sum((value**2).sum() for value in other.values())).sqrt())


def designed(module, given, kinds=KINDS):
    """The loss of design section 4, term by term, from each response in a forward of its own."""
    model, head = copy.deepcopy(module.reader.backbone.model), copy.deepcopy(module.reader.head)
    model.model.language_model.set_attn_implementation("sdpa")
    model.zero_grad()
    head.zero_grad()
    encode = Critiques(built(NAME)[1], FRAMES, TEMPLATE, "critique")
    numbers, tokens = said_alone(model, head, [encode(case) for case in judged_samples(kinds)])
    rewards, scores, sums = numbers[:, 0], numbers[:, 1:-1], numbers[:, -1]
    queries = len(given.ids)
    total = 0.0
    for winner, loser in given.pairs.tolist():
        ranking = torch.log1p(torch.exp(rewards[loser] - rewards[winner]))
        total += (0.5 * ranking + 0.2 * (rewards[winner] + rewards[loser]) ** 2) / (queries * PLAN.mean_pairs)
    for one, other in given.ties.tolist():
        total += 0.5 * 3.0 * (rewards[one] - rewards[other]) ** 2 / (queries * PLAN.mean_ties)
    for each, count in enumerate(tokens):
        if count:
            total += -0.7 * sums[each] / count / (queries * PLAN.mean_critiques)
        for place, name in enumerate(module.dimensions):
            people = float(given.scores[each, DIMENSIONS.index(name)])
            if not math.isnan(people):
                total += 0.3 * (scores[each, place] - (people - 3) / 2) ** 2 / (queries * PLAN.mean_scores)
    total.backward()
    named = [("reader.backbone.model." + name, weight) for name, weight in model.named_parameters()]
    named += [("reader.head." + name, weight) for name, weight in head.named_parameters()]
    return total.detach(), {name: weight.grad for name, weight in named if weight.grad is not None}


@pytest.mark.parametrize("dimensions", [(), LEARNED])
@pytest.mark.parametrize("step", ["shared_prefix", "separate"])
def test_a_step_has_the_gradient_of_the_designs_loss(folder, step, dimensions):
    module, given = made(folder, step=step, dimensions=dimensions, weights=WEIGHTS), batch()
    assert len(given.ties)
    loss = module.training_step(given, 0)["loss"]
    loss.backward()
    expected, wanted = designed(module, given)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    got = gradients(module)
    assert all(value.any() == 0 for name, value in got.items() if name not in wanted)
    assert apart({name: got[name] for name in wanted}, wanted) < 1e-4


def test_everything_weighs_the_same_however_queries_fall_into_micro_batches(folder):
    module = made(folder, weights=WEIGHTS, dimensions=LEARNED)
    whole = batch()
    module.training_step(whole, 0)["loss"].backward()
    together = gradients(module)
    module.zero_grad()
    cases, at = judged_samples(KINDS), 0
    for case in cases:
        one = batch(cases=[case])
        stop = at + len(one.ranks)
        one = one._replace(scores=whole.scores[at:stop])
        (module.training_step(one, 0)["loss"] / len(cases)).backward()
        at = stop
    assert apart(gradients(module), together) < 1e-5


def without(given, *names):
    """The batch with nothing of these kinds in it."""
    left = {name: getattr(given, name)[:0] for name in names if name != "critiques"}
    if "critiques" in names:
        left["rows"] = given.rows._replace(labels=torch.full_like(given.rows.labels, -100))
    return given._replace(**left)


@pytest.mark.parametrize(
    ("missing", "empty"),
    [
        (("pairs",), ("ranking", "centre")),
        (("ties",), ("tie",)),
        (("critiques",), ("critique",)),
        (("pairs", "ties", "critiques"), ("ranking", "centre", "tie", "critique")),
    ],
)
def test_a_batch_may_lack_pairs_ties_or_critiques(folder, missing, empty):
    module, given = made(folder), batch()
    full = module.training_step(given, 0)["report"].terms
    out = module.training_step(without(given, *missing), 0)
    out["loss"].backward()
    for name, losses, before in zip(RewardTerms._fields, out["report"].terms, full, strict=True):
        if name in empty:
            assert not len(losses)
        else:
            torch.testing.assert_close(losses, before)
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained)
    assert (out["loss"] == 0) == (len(missing) == 3)


def test_a_response_that_loses_its_critique_changes_nothing_of_the_others_loss(folder):
    cases = judged_samples(("image",))
    whole = made(folder).training_step(batch(cases=cases), 0)["report"].terms.critique
    first, *others = cases[0].ranked.responses
    mute = dataclasses.replace(cases[0].ranked, responses=(dataclasses.replace(first, critique=""), *others))
    part = made(folder).training_step(batch(cases=[cases[0]._replace(ranked=mute), *cases[1:]]), 0)
    assert len(part["report"].terms.critique) == len(whole) - 1
    torch.testing.assert_close(part["report"].terms.critique, whole[1:], rtol=1e-5, atol=1e-5)


def test_the_report_tells_of_every_pair_and_tie(folder):
    module, given = made(folder), batch()
    report = module.training_step(given, 0)["report"]
    with torch.no_grad():
        judged = module.reader(given.rows)
    winners, losers = given.pairs.unbind(1)
    torch.testing.assert_close(report.margin, judged.rewards[winners] - judged.rewards[losers])
    torch.testing.assert_close((report.chosen, report.rejected), (judged.rewards[winners], judged.rewards[losers]))
    assert report.correct.tolist() == [margin > 0 for margin in report.margin.tolist()]
    assert set(report.correct.tolist()) == {True, False}
    assert report.rank_gap.tolist() == [int(given.ranks[b] - given.ranks[a]) for a, b in given.pairs.tolist()]
    assert (report.rank_gap > 0).all()
    one, other = given.ties.unbind(1)
    torch.testing.assert_close(report.tie_distance, (judged.rewards[one] - judged.rewards[other]).abs())
    assert (report.tie_distance > 0).any()
    assert (report.tie_distance >= 0).all()
    owner = [name for name, count in zip(given.ids, given.responses.tolist(), strict=True) for _ in range(count)]
    assert report.ids == tuple(owner[winner] for winner in winners.tolist())
    kinds = given._replace(categories=tuple(f"of {name}" for name in given.ids))
    assert module.training_step(kinds, 0)["report"].categories == tuple(f"of {name}" for name in report.ids)
    assert not any(each.requires_grad for each in (report.margin, report.tie_distance, *report.terms))


def test_equal_rewards_are_not_correct(folder):
    module = made(folder, head_scale=0.0)
    report = module.training_step(batch(), 0)["report"]
    assert not report.margin.any()
    assert not report.correct.any()


def test_a_row_that_fills_up_an_evaluation_batch_counts_for_nothing(folder):
    module, cases = made(folder).eval(), judged_samples(("image",))
    encode = Critiques(built(NAME)[1], FRAMES, TEMPLATE, "critique")

    def validated(counted):
        rows = [
            ScoredRow(row, *[torch.full((len(row.places),), torch.nan)] * 2, each)
            for row, each in zip(map(encode, cases), counted, strict=True)
        ]
        given = collate(rows, padding=built(NAME)[1].tokenizer.pad_token_id, layout="packed", pairs="all")
        with torch.no_grad():
            return module.validation_step(given, 0)

    filled = validated([True, False])
    with torch.no_grad():
        alone = module.validation_step(batch(cases=cases[:1]), 0)
    torch.testing.assert_close(filled["loss"], alone["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(filled["report"].margin, alone["report"].margin, rtol=1e-4, atol=1e-5)
    assert set(filled["report"].ids) == {cases[0].ranked.query.id}
    assert filled["work"].queries == 1
    nothing = validated([False, False])
    assert nothing["loss"] == 0
    assert nothing["report"].ids == ()


def test_the_loss_of_a_validation_is_that_of_the_means_in_its_batch(folder):
    module, given = made(folder, weights=WEIGHTS).eval(), batch()
    with torch.no_grad():
        out = module.validation_step(given, 0)
    terms = out["report"].terms
    critique, ranking, tie, centre = (losses.mean() for losses in terms[:4])
    torch.testing.assert_close(out["loss"], 0.7 * critique + 0.5 * (ranking + 3.0 * tie) + 0.2 * centre)


# The self-check ----------------------------------------------------------------------------------------------


def _blind(layouts):
    """Attention whose segments see each other."""

    def wrong(lengths, device, kernel="auto"):
        return layouts([(prefix, (sum(segments),)) for prefix, segments in lengths], device, "together")

    return wrong


@pytest.mark.parametrize("missing", [(), ("critiques",)])
def test_a_backbone_that_looks_across_a_packed_row_is_found_before_the_first_step(folder, monkeypatch, caplog, missing):
    monkeypatch.setattr(packed, "shared_prefixes", _blind(packed.shared_prefixes))
    given = without(batch(), *missing)
    with pytest.raises(ValueError, match="this checkpoint looks across a packed row; say separate"):
        made(folder, step="shared_prefix", head_scale=1.0).training_step(given, 0)
    left_to_us = made(folder, step="auto", head_scale=1.0)
    with caplog.at_level(logging.WARNING):
        found = left_to_us.training_step(given, 0)["loss"]
    assert "going on with separate rows" in caplog.text
    assert torch.equal(found, made(folder, step="separate", head_scale=1.0).training_step(given, 0)["loss"])


def test_the_self_check_sees_scores_and_large_rewards_and_passes_where_all_is_well(folder):
    module, given = made(folder, dimensions=LEARNED), batch()
    reader, by = module.reader, module.reader.by
    assert agreement(as_scorer(reader), given.rows).holds

    def off(wrong):
        def read(step, rows):
            said = by(step, rows)
            return wrong(said) if step == "separate" else said

        reader.by = read
        return agreement(as_scorer(reader), given.rows)

    assert not off(lambda said: said._replace(rewards=said.rewards + 0.01)).holds
    assert not off(lambda said: said._replace(dimensions=said.dimensions - 0.01)).holds
    with pytest.raises(ValueError, match="expected finite log-probs"):
        off(lambda said: said._replace(rewards=torch.full_like(said.rewards, torch.nan)))
    assert not off(lambda said: said._replace(rewards=said.rewards * 2)).holds
    assert off(lambda said: said._replace(rewards=said.rewards + 1e-5)).holds


def test_beside_adapters_on_bfloat16_the_head_is_float32_and_the_self_check_passes(folder):
    module = made(folder, backbone={"dtype": "bfloat16", "lora": Lora(rank=2, alpha=4)})
    module.reader.backbone.tower.eval()
    assert {weight.dtype for weight in module.parameters()} == {torch.bfloat16, torch.float32}
    assert {weight.dtype for weight in module.reader.head.parameters()} == {torch.float32}
    loss = module.training_step(batch(), 0)["loss"]
    assert loss.dtype == torch.float32
    loss.backward()
    assert module._checked
    assert module.reader.step == "shared_prefix"
    assert module.reader.training
    assert not module.reader.backbone.tower.training
    assert all(weight.grad.any() for weight in module.reader.head.parameters())


def test_weights_that_round_their_steps_away_are_not_trained(folder):
    with pytest.raises(ValueError, match="dtype: expected float32 for weights that are trained"):
        made(folder, backbone={"dtype": "bfloat16"})


def test_under_autocast_a_step_is_near_that_in_float32(folder):
    given = batch()
    fine = made(folder).training_step(given, 0)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = made(folder, step="shared_prefix").training_step(given, 0)
    assert coarse["loss"].dtype == torch.float32
    assert coarse["loss"] != fine["loss"]
    torch.testing.assert_close(coarse["loss"], fine["loss"], rtol=0.05, atol=0.05)


# Training ----------------------------------------------------------------------------------------------------


def test_the_head_is_trained_whole_beside_adapters_and_begins_by_its_seed(folder):
    module = made(folder, backbone={"lora": Lora(rank=2, alpha=4)}, dimensions=LEARNED)
    module.training_step(batch(), 0)["loss"].backward()
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {
        f"reader.head.{layer}.{part}" for layer in ("dense", "out") for part in ("weight", "bias")
    }
    assert any("lora_" in name for name in trained)
    assert all(weight.grad is not None for weight in module.parameters() if weight.requires_grad)
    assert module.reader.head.out.weight.shape == (3, module.reader.head.width)
    heads = [made(folder, head_seed=seed).reader.head.dense.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_training_by_lightning_learns_to_rank_and_to_speak(folder):
    plain, held = batch(("text", "image")), []
    queries = len(plain.ids)
    plan = RewardPlan(25, len(plain.pairs) / queries, len(plain.ties) / queries, 6 / queries)

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            held.append(outputs["report"])

    module = CritiqueRewardModule(BackboneConfig(str(folder)), optimiser=Optimiser(2e-3))
    module.expect(plan)
    trainer = lightning.Trainer(
        max_steps=25,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[GradientCheck(), Watch()],
    )
    trainer.fit(module, DataLoader([plain] * 25, batch_size=None), DataLoader([plain], batch_size=None))
    first, last = held[0], held[-1]
    assert first.correct.float().mean() < 0.9
    assert last.correct.all()
    assert last.margin.mean() > first.margin.mean() + 1
    assert last.terms.critique.mean() < 0.7 * first.terms.critique.mean()
    assert module.validated_at == 25
    assert [bool(weights) for weights in module.parts().values()] == [False, True, True]
    rates = module.configure_optimizers()["optimizer"].param_groups
    assert sum(len(group["params"]) for group in rates) == sum(weight.requires_grad for weight in module.parameters())


def test_the_optimiser_is_that_of_the_paper():
    module = CritiqueRewardModule(BackboneConfig("nowhere"))
    assert (module.optimiser.learning_rate, module.optimiser.warmup, module.optimiser.weight_decay) == (1e-6, 0.1, 0.0)
    assert dataclasses.astuple(module.weights) == (1.0, 1.0, 1.0, 0.01, 1.0)
    assert module.needs == ()


def test_work_counts_tokens_without_padding(folder):
    given = batch()
    rows = [Critiques(built(NAME)[1], FRAMES, TEMPLATE, "critique")(case) for case in judged_samples(KINDS)]
    shared = made(folder, step="shared_prefix").training_step(given, 0)["work"]
    separate = made(folder, step="separate").training_step(given, 0)["work"]
    own = sum(len(row.prefix) + len(told.given) + len(told.supervised) for row in rows for told in row.continuations)
    assert (shared.tokens, shared.unique_tokens) == (sum(row.tokens for row in rows),) * 2
    assert (separate.tokens, separate.unique_tokens) == (own, shared.tokens)
    assert (shared.queries, shared.pairs) == (len(given.ids), len(given.pairs))
    assert separate.flops > 1.5 * shared.flops


# What is refused ---------------------------------------------------------------------------------------------


def test_what_the_plan_says_is_not_there_must_not_come():
    terms = RewardTerms(*(torch.ones(2) for _ in range(5)))
    with pytest.raises(ValueError, match=r"plan: expected mean_ties above 0, got 0.0 and 2 in a batch"):
        over_data(terms, RewardPlan(1, 2.0, mean_critiques=1.0, mean_scores=1.0), 1)
    none = terms._replace(tie=torch.ones(0))
    means = over_data(none, RewardPlan(1, 2.0, mean_critiques=4.0, mean_scores=1.0), 2)
    assert [float(each) for each in means] == [0.25, 0.5, 0.0, 0.5, 1.0]


def test_a_training_that_was_not_planned_is_refused(folder):
    module = CritiqueRewardModule(BackboneConfig(str(folder)))
    with pytest.raises(ValueError, match="configure_model"):
        module.training_step(batch(("text",)), 0)
    with pytest.raises(ValueError, match="expected `expect"):
        module.configure_optimizers()


@pytest.mark.parametrize("dimensions", [("truth",), ("ethics", "ethics")])
def test_dimensions_that_nobody_annotates_are_refused(dimensions):
    with pytest.raises(ValueError, match="dimensions: expected some of helpfulness, faithfulness, ethics, each once"):
        CritiqueRewardModule(BackboneConfig("nowhere"), dimensions=dimensions)


def test_dimensions_that_nobody_scored_add_nothing_to_the_loss(folder):
    given = batch(("text",))
    given = given._replace(scores=torch.full_like(given.scores, math.nan))
    module = made(folder, dimensions=LEARNED)
    known, unknown = (module.training_step(each, 0) for each in (batch(("text",)), given))
    assert len(known["report"].terms.dimension) > len(unknown["report"].terms.dimension) == 0
    means = over_data(RewardTerms(*unknown["report"].terms), PLAN, len(given.ids))
    torch.testing.assert_close(unknown["loss"], reward_loss(means, RewardWeights()))


def test_a_report_tells_of_all_responses_but_those_that_only_fill_up(folder):
    given = batch()
    report = made(folder).validation_step(given, 0)["report"]
    assert len(report.rewards) == len(given.ranks)
    assert torch.equal(report.chosen, report.rewards[given.pairs[:, 0]])
    supervised = [len(told.supervised) for case in judged_samples(KINDS) for told in encoded(case).continuations]
    assert report.critique_tokens.tolist() == [count for count in supervised if count]
    counts = given.responses.tolist()
    filled = given._replace(ids=(*given.ids[:-1], ""))
    assert torch.equal(made(folder).validation_step(filled, 0)["report"].rewards, report.rewards[: -counts[-1]])


def encoded(case):
    """A sample as a row."""
    return Critiques(built(NAME)[1], FRAMES, TEMPLATE, "critique")(case)
