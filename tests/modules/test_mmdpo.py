"""A step of MM-DPO has the gradient of the paper's loss over all pairs, each response run alone."""

import copy
import logging
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from mmrlhf.datamodules.rows import Answers
from mmrlhf.modules import betas, losses
from mmrlhf.modules.loading import BackboneConfig, Lora
from mmrlhf.modules.mmdpo import MMDPOModule, Plan
from mmrlhf.modules.optimiser import Optimiser, share_of_peak

from .families import built, saved
from .queries import FRAMES, batch, samples

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to .self.log:UserWarning")
NAME = "llava_onevision"
MEAN_PAIRS = 3.7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / NAME
    saved(NAME, folder)
    return folder


def made(folder, **options):
    """A module with its weights, as a training has it."""
    module = MMDPOModule(BackboneConfig(str(folder)), **options)
    module.configure_model()
    module.expect(Plan(10, MEAN_PAIRS, (0.1, 0.4, 2.0)))
    return module.train()


def scored(kinds=("text", "image", "images", "film"), seed=0):
    """A batch whose responses have rewards and log-probs of a reference, drawn by chance."""
    found = batch(built(NAME)[1], samples(kinds))
    drawn = torch.Generator().manual_seed(seed)
    rewards = torch.randn(len(found.rewards), generator=drawn)
    reference = -60 + 4 * torch.randn(len(found.rewards), generator=drawn)
    annotated = torch.randint(1, 6, (len(found.rewards),), generator=drawn).float()
    return found._replace(rewards=rewards, reference_logps=reference, annotated=annotated)


def alone(model, kinds=("text", "image", "images", "film")):
    """Sum and number of log-probs of every response in a forward of its own, of the family's own model."""
    processor, sums, tokens = built(NAME)[1], [], []
    for case in samples(kinds):
        row = Answers(processor, FRAMES)(case)
        for told in row.continuations:
            ids = torch.cat([row.prefix, told.supervised])[None]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **row.features).logits
            logps = logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            sums.append(logps[-len(told.supervised) :].sum())
            tokens.append(len(told.supervised))
    return torch.stack(sums), torch.tensor(tokens)


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def apart(one, other):
    """How far two gradients are apart, over the length of the second."""
    assert one.keys() >= other.keys()
    difference = sum(((one[name] - other.get(name, torch.zeros(()))) ** 2).sum() for name in one)
    return float((difference / sum((value**2).sum() for value in other.values())).sqrt())


@pytest.mark.parametrize("weighting", ["pair", "query"])
@pytest.mark.parametrize("step", ["shared_prefix", "separate"])
def test_a_step_has_the_gradient_of_the_papers_loss_over_all_pairs(folder, step, weighting):
    module, given = made(folder, step=step, weighting=weighting, sft_weight=0.25), scored()
    found = module.training_step(given, 0)["loss"]
    found.backward()
    model = copy.deepcopy(module.scorer.backbone.model)
    model.model.language_model.set_attn_implementation("sdpa")
    model.zero_grad()
    sums, tokens = alone(model)
    queries = torch.arange(len(given.ids)).repeat_interleave(given.responses).tolist()
    terms = []
    for winner, loser in given.pairs.tolist():
        delta = float(given.rewards[winner] - given.rewards[loser])
        beta = 0.1 * (1 + 0.5 * min(1.0, max(0.0, 1 - math.exp(-0.5 * delta))))
        z = (sums[winner] - given.reference_logps[winner]) - (sums[loser] - given.reference_logps[loser])
        terms.append((queries[winner], -logsigmoid(beta * z) - 0.25 * sums[winner] / tokens[winner]))
    if weighting == "pair":
        expected = sum(term for _, term in terms) / (len(given.ids) * MEAN_PAIRS)
    else:
        per_query = [[term for query, term in terms if query == one] for one in sorted({query for query, _ in terms})]
        expected = sum(sum(those) / len(those) for those in per_query) / len(given.ids)
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    trained, wanted = gradients(module.scorer.backbone.model), gradients(model)
    assert apart(trained, wanted) < 1e-4


def test_pairs_weigh_the_same_however_queries_fall_into_micro_batches(folder):
    module = made(folder)
    whole = scored()
    module.training_step(whole, 0)["loss"].backward()
    together = {name: value.clone() for name, value in gradients(module).items()}
    module.zero_grad()
    processor, at = built(NAME)[1], 0
    cases = samples()
    for case in cases:
        one = batch(processor, [case])
        stop = at + len(one.rewards)
        one = one._replace(rewards=whole.rewards[at:stop], reference_logps=whole.reference_logps[at:stop])
        (module.training_step(one, 0)["loss"] / len(cases)).backward()
        at = stop
    assert apart(gradients(module), together) < 1e-5


def test_without_w_it_is_plain_dpo_to_the_bit(folder):
    given = scored()
    plain = made(folder, beta=betas.FixedBeta(0.1)).training_step(given, 0)["loss"]
    zero = made(folder, beta=betas.RewardMarginBeta(0.1, w=0.0)).training_step(given, 0)["loss"]
    assert torch.equal(plain, zero)
    assert not torch.equal(plain, made(folder, beta=betas.RewardMarginBeta(0.1, w=0.5)).training_step(given, 0)["loss"])


@pytest.mark.parametrize("loss", [losses.Sigmoid(0.1), losses.Robust(), losses.Hinge(), losses.IPO(), losses.Offset()])
def test_the_module_trains_with_any_loss(folder, loss):
    module, given = made(folder, loss=loss, sft_weight=0.0), scored(("text", "image"))
    out = module.training_step(given, 0)
    out["loss"].backward()
    assert all(weight.grad.isfinite().all() for weight in module.parameters() if weight.requires_grad)
    report = out["pairs"]
    z = report.chosen_logps - report.reference_chosen - (report.rejected_logps - report.reference_rejected)
    torch.testing.assert_close(report.gap, z)
    if isinstance(loss, losses.IPO):  # which compares log-probs per token
        _, tokens = alone(module.scorer.backbone.model, ("text", "image"))
        n, m = tokens[given.pairs[:, 0]], tokens[given.pairs[:, 1]]
        better, worse = report.chosen_logps - report.reference_chosen, report.rejected_logps - report.reference_rejected
        z = better / n - worse / m
    torch.testing.assert_close(report.loss, loss(z, report.beta, report.margin))


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (betas.ConstantBeta(0.1, w=0.5), 0.15),
        (betas.ImplicitBeta(0.1), 0.1),
        (betas.ShuffledMarginBeta(0.1, w=0.5, k=0.5), None),
        (betas.RandomMarginBeta(0.1, w=0.5), None),
    ],
)
def test_the_module_trains_with_any_beta(folder, beta, expected):
    module = made(folder, beta=beta)
    module._remember = lambda report: None  # there is no trainer to ask for other ranks
    found = module.training_step(scored(), 0)["pairs"].beta
    if expected:
        torch.testing.assert_close(found, torch.full_like(found, expected))
    else:
        assert 0.1 <= found.min() < found.max() <= 0.15


@pytest.mark.parametrize("source", ["reward", "rank", "annotated", "implicit"])
def test_margins_come_from_where_the_config_says(folder, source):
    given = scored()
    report = made(folder, margin=source).training_step(given, 0)["pairs"]
    winners, losers = given.pairs.unbind(1)
    expected = {
        "reward": given.rewards[winners] - given.rewards[losers],
        "rank": report.rank_gap.float(),
        "annotated": given.annotated[winners] - given.annotated[losers],
        "implicit": 0.1 * report.gap,
    }[source]
    torch.testing.assert_close(report.margin, expected)


@pytest.mark.parametrize(
    ("source", "beta", "expected"),
    [
        ("reward", betas.RewardMarginBeta(), ("reference_logp", "reward")),
        ("annotated", betas.ShuffledMarginBeta(), ("reference_logp", "annotated")),
        ("rank", betas.RewardMarginBeta(), ("reference_logp",)),
        ("reward", betas.FixedBeta(), ("reference_logp",)),
    ],
)
def test_it_says_what_responses_need(folder, source, beta, expected):
    assert MMDPOModule(BackboneConfig(str(folder)), beta=beta, margin=source).needs == expected


def test_a_missing_score_is_an_error_and_no_margin(folder):
    given = scored()
    with pytest.raises(ValueError, match="margin by reward: expected a number for every pair"):
        made(folder).training_step(given._replace(rewards=torch.full_like(given.rewards, torch.nan)), 0)


def test_a_row_that_fills_up_an_evaluation_batch_counts_for_nothing(folder):
    module = made(folder).eval()
    given = scored(("text",))
    with torch.no_grad():
        full = module.validation_step(given, 0)
    keep = given.pairs[:, 0] < given.responses[0]
    masked = given._replace(pairs=given.pairs[keep], ids=(given.ids[0], ""))
    with torch.no_grad():
        part = module.validation_step(masked, 0)
    assert part["work"].queries == 1
    torch.testing.assert_close(part["pairs"].loss, full["pairs"].loss[keep])
    nothing = given._replace(pairs=given.pairs[:0], ids=("", ""))
    with torch.no_grad():
        assert float(module.validation_step(nothing, 0)["loss"]) == 0.0


def _blind(layouts):
    """Attention whose segments see each other."""

    def wrong(lengths, device, kernel="auto"):
        return layouts([(prefix, (sum(segments),)) for prefix, segments in lengths], device, "together")

    return wrong


def test_a_backbone_that_looks_across_a_packed_row_is_found_before_the_first_step(folder, monkeypatch, caplog):
    from mmrlhf.modules import packed

    monkeypatch.setattr(packed, "shared_prefixes", _blind(packed.shared_prefixes))
    given = scored()
    with pytest.raises(ValueError, match="this checkpoint looks across a packed row; say separate"):
        made(folder, step="shared_prefix").training_step(given, 0)
    left_to_us = made(folder, step="auto")
    with caplog.at_level(logging.WARNING):
        found = left_to_us.training_step(given, 0)["loss"]
    assert "going on with separate rows" in caplog.text
    assert torch.equal(found, made(folder, step="separate").training_step(given, 0)["loss"])


def test_weights_whose_type_rounds_steps_away_are_not_trained(folder):
    with pytest.raises(ValueError, match=r"expected float32 for weights that are trained, got torch\.bfloat16"):
        MMDPOModule(BackboneConfig(str(folder), dtype="bfloat16")).configure_model()


def test_scores_that_were_rounded_on_the_way_are_found(folder):
    given = scored()
    with pytest.raises(AssertionError, match="bfloat16"):
        made(folder).training_step(given._replace(rewards=given.rewards.bfloat16()), 0)


def test_the_self_check_leaves_dropout_on_and_passes_in_bfloat16(folder):
    module = MMDPOModule(BackboneConfig(str(folder), dtype="bfloat16", lora=Lora(rank=2)))
    module.configure_model()
    module.expect(Plan(10, MEAN_PAIRS))
    module.training_step(scored(), 0)
    assert module._checked
    assert module.scorer.step == "shared_prefix"
    assert module.scorer.training
    assert not module.scorer.backbone.tower.training


def test_the_pull_at_the_reference_is_half_of_beta(folder):
    margin = torch.tensor([-1.0, 0.0, 1.0, 50.0])
    pull = MMDPOModule(BackboneConfig(str(folder))).pull(margin)
    torch.testing.assert_close(pull, torch.tensor([0.05, 0.05, 0.05 * (1 + 0.5 * (1 - math.exp(-0.5))), 0.075]))


def test_work_counts_tokens_without_padding(folder):
    given = scored()
    lengths = [Answers(built(NAME)[1], FRAMES)(case).tokens for case in samples()]
    alone_tokens = sum(
        len(row.prefix) + len(told.supervised)
        for row in (Answers(built(NAME)[1], FRAMES)(case) for case in samples())
        for told in row.continuations
    )
    shared = made(folder, step="shared_prefix").training_step(given, 0)["work"]
    separate = made(folder, step="separate").training_step(given, 0)["work"]
    assert (shared.tokens, shared.unique_tokens) == (sum(lengths), sum(lengths))
    assert (separate.tokens, separate.unique_tokens) == (alone_tokens, sum(lengths))
    assert (shared.queries, shared.pairs) == (len(given.ids), len(given.pairs))
    assert separate.flops > 1.5 * shared.flops


def test_the_learning_rate_warms_up_and_follows_a_cosine(folder):
    module = made(folder, optimiser=Optimiser(learning_rate=1e-3, warmup=0.2, weight_decay=0.1))
    made_of = module.configure_optimizers()
    decayed, others = made_of["optimizer"].param_groups
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert all(weight.ndim >= 2 for weight in decayed["params"])
    trained = sum(weight.requires_grad for weight in module.parameters())
    assert len(decayed["params"]) + len(others["params"]) == trained
    rates = [share_of_peak(step, 10, 2, 0.0) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[10] == pytest.approx(0.0)
    assert rates[6] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"warmup": 1.0}, "warmup from 0 to below 1"),
        ({"weight_decay": -0.1}, "weight_decay of 0 or more"),
    ],
)
def test_an_optimiser_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Optimiser(**options)


def test_a_training_that_was_not_planned_is_refused(folder):
    module = MMDPOModule(BackboneConfig(str(folder)))
    with pytest.raises(ValueError, match="configure_model"):
        module.training_step(scored(("text",)), 0)
    with pytest.raises(ValueError, match="expected `expect"):
        module.configure_optimizers()
    with pytest.raises(ValueError, match="sft_weight"):
        MMDPOModule(BackboneConfig(str(folder)), sft_weight=-1.0)
