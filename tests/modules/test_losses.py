"""The losses are those of the papers, and of TRL, whose own code is run beside them."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrlhf.modules.losses import (
    IPO,
    Hinge,
    Offset,
    PairLogps,
    PreferenceLoss,
    Robust,
    Sigmoid,
    hinge_loss,
    ipo_loss,
    log_offset,
    log_ratio,
    offset_loss,
    response_nll,
    robust_loss,
    sigmoid_loss,
    take,
)
from mmrlhf.options import read_options

gaps = st.floats(-500, 500)
betas = st.floats(0.01, 2)
shares = st.floats(0, 0.49)
LOSSES = [Sigmoid(), Sigmoid(0.2), Robust(0.2), Hinge(), IPO(), Offset(), Offset(0.5, 1.0)]
Z = [-30.0, -3.0, -0.5, 0.4, 1.8, 7.0]  # none at the kink of the hinge, which for a beta of 0.5 is 2
MARGIN = [-2.0, 0.0, 0.5, 1.0, 3.0, 40.0]


def f64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def softplus(x):
    """-log s(-x) in numpy."""
    return np.logaddexp(0, x)


def test_every_loss_is_tested():
    assert {type(loss) for loss in LOSSES} == set(PreferenceLoss.__subclasses__())


# --- closed forms ---


@given(gaps, betas)
def test_dpo_is_the_log_odds_of_the_wrong_choice(z, beta):
    expected = softplus(-beta * z)
    assert sigmoid_loss(f64(z), f64(beta)).item() == pytest.approx(expected, rel=1e-12)
    assert Sigmoid()(f64(z), f64(beta), f64(0)).item() == pytest.approx(expected, rel=1e-12)


@given(gaps, betas, shares)
def test_smoothed_dpo_is_the_cross_entropy_with_a_share_of_flipped_labels(z, beta, share):
    right, wrong = softplus(-beta * z), softplus(beta * z)
    expected = (1 - share) * right + share * wrong
    assert Sigmoid(share)(f64(z), f64(beta), f64(0)).item() == pytest.approx(expected, rel=1e-12)
    flipped = sigmoid_loss(f64(-z), f64(beta), 1 - share).item()
    assert flipped == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.4])
def test_smoothed_dpo_is_least_where_the_policy_is_as_sure_as_the_labels(share):
    beta = f64(0.1)
    best = f64(np.log((1 - share) / share) / 0.1).requires_grad_()
    sigmoid_loss(best, beta, share).sum().backward()
    assert best.grad.item() == pytest.approx(0, abs=1e-15)


@given(gaps, betas, shares)
def test_robust_dpo_of_flipped_labels_is_on_average_dpo_of_right_ones(z, beta, share):
    as_labelled, flipped = (Robust(share)(f64(sign * z), f64(beta), f64(0)).item() for sign in (1, -1))
    average = (1 - share) * as_labelled + share * flipped
    assert average == pytest.approx(softplus(-beta * z), rel=1e-9, abs=1e-9)


def test_robust_dpo_without_flipped_labels_is_dpo_to_the_bit():
    z, beta = torch.randn(50), torch.rand(50)
    assert torch.equal(robust_loss(z, beta, 0.0), sigmoid_loss(z, beta))


@given(gaps, betas)
def test_the_hinge_is_what_is_missing_to_one(z, beta):
    assert Hinge()(f64(z), f64(beta), f64(0)).item() == pytest.approx(max(0.0, 1 - beta * z), abs=1e-12)


@given(gaps, betas)
def test_ipo_is_the_squared_distance_to_half_the_inverse_of_beta(z, beta):
    expected = ((2 * beta * z - 1) / (2 * beta)) ** 2
    assert IPO()(f64(z), f64(beta), f64(0)).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(st.floats(-50, 50), betas, st.floats(0.01, 100), st.floats(0, 3))
def test_the_offset_multiplies_the_odds_against_the_chosen_response(z, beta, margin, alpha):
    """-log s(beta z - alpha log margin) is the log of 1 + margin^alpha / e^(beta z)."""
    expected = np.log1p(margin**alpha * np.exp(-beta * z))
    assert Offset(alpha)(f64(z), f64(beta), f64(margin)).item() == pytest.approx(expected, rel=1e-9)


def test_an_offset_of_alpha_0_or_a_margin_of_1_is_dpo_to_the_bit():
    z, beta, margin = torch.randn(50), torch.rand(50), torch.randn(50) * 9
    assert torch.equal(Offset(0.0)(z, beta, margin), Sigmoid()(z, beta, margin))
    assert torch.equal(Offset()(z, beta, torch.ones(50)), Sigmoid()(z, beta, margin))


@given(st.floats(0.001, 10), st.floats(-1e30, 1e30))
def test_a_margin_below_the_least_counts_as_the_least(least, margin):
    z, beta = f64(1.0), f64(0.1)
    offset = Offset(2.0, least)
    assert torch.equal(offset(z, beta, f64(min(margin, least))), offset(z, beta, f64(least)))


@given(st.lists(st.floats(-100, 100), min_size=2), st.floats(0.1, 3))
def test_the_offset_never_falls_as_the_margin_grows(margin, alpha):
    offsets = log_offset(f64(*sorted(margin)), alpha, least=0.01)
    assert offsets.diff().ge(0).all()


def test_with_least_1_no_pair_asks_for_less_than_dpo():
    z, margin = torch.randn(200), torch.randn(200) * 5
    beta = torch.full((200,), 0.1)
    assert Offset(1.0, 1.0)(z, beta, margin).ge(Sigmoid()(z, beta, margin)).all()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("z", [-1e6, 1e6])
def test_losses_and_gradients_of_extreme_pairs_are_numbers(loss, z):
    gap = torch.tensor([z], requires_grad=True)
    value = loss(gap, torch.tensor([0.1]), torch.tensor([-1e30 if z < 0 else 1e30]))
    value.sum().backward()
    assert value.isfinite().all()
    assert gap.grad.isfinite().all()


# --- gradients ---


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_the_gradient_is_that_of_finite_differences(loss):
    z = f64(*Z).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, torch.full_like(x, 0.5), f64(*MARGIN)), (z,))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_no_gradient_reaches_beta_or_the_margin(loss):
    z, beta, margin = (f64(*numbers).requires_grad_() for numbers in (Z, [0.5] * len(Z), MARGIN))
    loss(z, beta, margin).sum().backward()
    assert z.grad.abs().sum() > 0
    assert beta.grad is None
    assert margin.grad is None


def test_no_gradient_reaches_the_offset():
    z, offset = f64(1.0).requires_grad_(), f64(0.5).requires_grad_()
    offset_loss(z, f64(0.1), offset).sum().backward()
    assert offset.grad is None


def test_a_pair_that_is_certain_and_wrong_pulls_with_beta_and_one_that_is_right_not_at_all():
    z = f64(-1e4, 1e4).requires_grad_()
    sigmoid_loss(z, f64(0.3, 0.3)).sum().backward()
    assert z.grad.tolist() == [pytest.approx(-0.3), pytest.approx(0)]


# --- TRL ---


def trl_loss(name, policy, reference, mask, beta, smoothing):
    """What TRL's own trainer computes of one pair, from log-probabilities of tokens as a model would give them."""
    trl = pytest.importorskip("trl", reason="compares with TRL's DPOTrainer")

    def as_it_is(values):
        return values

    nothing = torch.zeros_like(policy)
    outputs = SimpleNamespace(log_probs=policy, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=policy.device, gather=as_it_is, gather_for_metrics=as_it_is),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[name],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = reference.sum(1).chunk(2)
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)


# TRL has no smoothing in "sigmoid" any more; its "aot" has it, and is the same where a batch is one pair.
@pytest.mark.parametrize(
    ("loss", "name", "smoothing"),
    [
        (Sigmoid(), "sigmoid", 0.0),
        (Sigmoid(0.2), "aot", 0.2),
        (Robust(0.2), "robust", 0.2),
        (Hinge(), "hinge", 0.0),
        (IPO(), "ipo", 0.0),
    ],
    ids=str,
)
def test_loss_and_gradient_are_those_of_trl(loss, name, smoothing):
    generator = torch.Generator().manual_seed(1)
    for beta in (0.05, 0.3):
        lengths = torch.randint(1, 9, (2,), generator=generator)
        mask = (torch.arange(12) >= 3) & (torch.arange(12) < 3 + lengths[:, None])
        told = mask[:, 1:]
        policy, reference = (-3 * torch.rand(2, 11, generator=generator).double() * told for _ in range(2))
        policy.requires_grad_()
        expected = trl_loss(name, policy, reference, mask.long(), beta, smoothing)

        weights = 1 / lengths if loss.mean_logps else torch.ones(2)
        pairs = torch.tensor([[0, 1]])
        logps = [take(values.sum(1) * weights, pairs) for values in (policy, reference)]
        found = loss(log_ratio(*logps), f64(beta), f64(0)).sum()

        assert found.item() == pytest.approx(expected.item(), rel=1e-6)  # TRL's counts of tokens are float32
        ours, theirs = (torch.autograd.grad(value, policy)[0] * told for value in (found, expected))
        assert torch.allclose(ours, theirs, rtol=1e-6)
        assert ours.abs().sum() > 0


# --- pairs ---


@given(st.data())
def test_the_log_ratio_is_read_off_pair_by_pair(data):
    size = data.draw(st.integers(2, 6))
    policy, reference = (data.draw(st.lists(st.integers(-99, 0), min_size=size, max_size=size)) for _ in range(2))
    places = st.integers(0, size - 1)
    pairs = data.draw(st.lists(st.tuples(places, places), min_size=1))
    at = torch.tensor(pairs)
    found = log_ratio(take(f64(*policy), at), take(f64(*reference), at))
    assert found.tolist() == [policy[a] - policy[b] - (reference[a] - reference[b]) for a, b in pairs]


def test_what_both_responses_share_cancels_and_swapping_them_negates():
    policy, reference = PairLogps(f64(-5), f64(-9)), PairLogps(f64(-6), f64(-6))
    z = log_ratio(policy, reference)
    assert torch.equal(log_ratio(PairLogps(f64(-8), f64(-12)), reference), z)
    assert torch.equal(log_ratio(PairLogps(*policy[::-1]), PairLogps(*reference[::-1])), -z)


def test_a_batch_without_pairs_has_no_losses():
    pairs = torch.empty(0, 2, dtype=torch.long)
    logps = take(torch.zeros(3), pairs)
    z = log_ratio(logps, logps)
    for loss in LOSSES:
        assert loss(z, torch.zeros(0), torch.zeros(0)).shape == (0,)
    assert response_nll(torch.zeros(3), torch.ones(3), pairs).shape == (0,)


def test_the_supervised_term_is_torchs_cross_entropy_of_the_chosen_response():
    generator = torch.Generator().manual_seed(0)
    logits, told = torch.randn(9, 5, generator=generator).double(), torch.randint(5, (9,), generator=generator)
    cross_entropy = torch.nn.functional.cross_entropy
    bounds = [(0, 4), (4, 5), (5, 9)]
    sums = -torch.stack([cross_entropy(logits[a:b], told[a:b], reduction="sum") for a, b in bounds])
    found = response_nll(sums, torch.tensor([b - a for a, b in bounds]), torch.tensor([[2, 0], [1, 2]]))
    expected = [cross_entropy(logits[a:b], told[a:b]) for a, b in (bounds[2], bounds[1])]
    assert torch.allclose(found, torch.stack(expected), rtol=1e-12)


def test_the_supervised_term_pulls_at_chosen_responses_alone():
    logps = f64(-4, -6, -8).requires_grad_()
    response_nll(logps, torch.tensor([2, 3, 4]), torch.tensor([[2, 0], [2, 1]])).sum().backward()
    assert logps.grad.tolist() == [0, 0, -0.5]


# --- settings ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sigmoid(0.5), "label_smoothing: expected 0 or more and below 0.5, got 0.5;"),
        (lambda: Sigmoid(-0.1), "label_smoothing: expected 0 or more and below 0.5, got -0.1;"),
        (lambda: Robust(0.5), "label_smoothing: expected 0 or more and below 0.5, got 0.5;"),
        (lambda: Robust(float("nan")), "label_smoothing: expected 0 or more and below 0.5, got nan;"),
        (lambda: Offset(-1.0), "alpha: expected a number of 0 or more, got -1.0;"),
        (lambda: Offset(float("inf")), "alpha: expected a number of 0 or more, got inf;"),
        (lambda: Offset(1.0, 0.0), "least: expected a margin above 0, got 0.0;"),
        (lambda: Offset(1.0, float("nan")), "least: expected a margin above 0, got nan;"),
    ],
)
def test_a_setting_out_of_its_domain_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def verb(loss: PreferenceLoss = Sigmoid()) -> None:  # noqa: B008
    """Take a loss, as a verb would."""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], Sigmoid()),
        (["--loss", "Hinge"], Hinge()),
        (["--loss", "Robust", "--loss.label_smoothing", "0.2"], Robust(0.2)),
        (["--loss", "mmrlhf.modules.losses.Offset", "--loss.alpha=2", "--loss.least=1"], Offset(2.0, 1.0)),
        (['--loss={"class_path": "IPO"}'], IPO()),
    ],
)
def test_a_config_names_a_loss_by_its_class(words, expected):
    assert read_options(verb, "mmrlhf verb", words)["loss"] == expected


def test_a_config_with_a_setting_out_of_its_domain_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"label_smoothing: expected 0 or more and below 0\.5, got 0\.7"):
        read_options(verb, "mmrlhf verb", ["--loss", "Sigmoid", "--loss.label_smoothing", "0.7"])


def test_only_ipo_takes_means_and_only_the_offset_needs_a_margin():
    assert {type(loss) for loss in LOSSES if loss.mean_logps} == {IPO}
    assert {type(loss) for loss in LOSSES if loss.needs_margin} == {Offset}
    assert ipo_loss(f64(5.0), f64(0.1)).item() == pytest.approx(0)
    assert hinge_loss(f64(10.0), f64(0.1)).item() == pytest.approx(0)
