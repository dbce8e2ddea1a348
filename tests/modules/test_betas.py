"""Every beta is what its paper says, inside the bounds that are promised, and moved by nothing else."""

from dataclasses import replace
from fractions import Fraction
from math import exp, inf, nan

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from mmrlhf.modules.betas import (
    ConstantBeta,
    Evidence,
    FixedBeta,
    GainBeta,
    ImplicitBeta,
    PairBeta,
    RandomMarginBeta,
    RewardMarginBeta,
    ShuffledMarginBeta,
    dynamic_beta,
    quantile_at,
    reward_gain,
    updated_gap,
)
from mmrlhf.modules.losses import Sigmoid
from mmrlhf.options import read_options

RULES = [
    FixedBeta(),
    RewardMarginBeta(),
    ConstantBeta(),
    ShuffledMarginBeta(),
    RandomMarginBeta(),
    ImplicitBeta(),
]
SCALED = [RewardMarginBeta, ConstantBeta, ShuffledMarginBeta, RandomMarginBeta]

margins = st.floats(-(2.0**126), 2.0**126, width=32)
usual_margins = st.floats(-20, 20, width=32)
beta0s = st.floats(1e-3, 10)
ws = st.floats(0, 50)
ks = st.floats(1e-3, 1e3)
ALMOST_A_25TH = float(np.float32(0.04))
"""Below 1 / 25, but a float32 product with 25 is rounded to 1."""


def lists_of(numbers):
    return st.lists(numbers, min_size=1, max_size=20)


def seen(margin=None, gap=None, chance=None, usual=nan, known=()):
    """Evidence of as many pairs as the longest list tells of."""
    size = max(len(numbers) for numbers in (margin or (), gap or (), chance or ()))
    zeros = [0.0] * size
    return Evidence(
        margin=torch.tensor(margin or zeros),
        gap=torch.tensor(gap or zeros),
        chance=torch.tensor(chance or zeros),
        usual_gap=torch.tensor(usual),
        known=torch.tensor(sorted(known)),
    )


def anything(size=40, seed=0):
    """Evidence in which all is known and nothing is small."""
    rng = np.random.default_rng(seed)
    known = rng.normal(2, 4, 300)
    draws = rng.normal(2, 4, size), rng.normal(0, 30, size), rng.random(size)
    return seen(*(numbers.tolist() for numbers in draws), usual=-1.0, known=known.tolist())


def test_every_rule_is_tested():
    concrete = set(PairBeta.__subclasses__()) - {GainBeta} | set(GainBeta.__subclasses__())
    assert {type(rule) for rule in RULES} == concrete


# --- the reward margin ---


@given(usual_margins, st.floats(0.01, 3), beta0s, ws)
def test_beta_grows_with_the_margin_as_the_paper_has_it(margin, k, beta0, w):
    gain = min(max(1 - exp(-k * margin), 0), 1)
    found = RewardMarginBeta(beta0, w, k)(seen(margin=[margin]))
    assert found.item() == pytest.approx(beta0 * (1 + w * gain), rel=1e-6)


@given(lists_of(margins), beta0s, ws, ks)
def test_beta_stays_between_beta0_and_its_cap(margin, beta0, w, k):
    rule = RewardMarginBeta(beta0, w, k)
    found = rule(seen(margin=[*margin, inf, -inf]))
    low, high = torch.tensor([beta0, rule.cap])
    assert found.isfinite().all()
    assert found.ge(low).all()
    assert found.le(high).all()


@given(lists_of(margins), beta0s, ws, ks)
def test_beta_never_falls_as_the_margin_grows(margin, beta0, w, k):
    found = RewardMarginBeta(beta0, w, k)(seen(margin=sorted(margin)))
    assert found.diff().ge(0).all()


@given(lists_of(margins), beta0s, ks)
def test_w_0_is_dpo_to_the_bit(margin, beta0, k):
    evidence = seen(margin=margin, gap=[float(number) for number in range(len(margin))])
    scaled, fixed = RewardMarginBeta(beta0, 0.0, k)(evidence), FixedBeta(beta0)(evidence)
    assert torch.equal(scaled, fixed)
    assert torch.equal(fixed, torch.full((len(margin),), beta0))
    losses = [Sigmoid()(evidence.gap, beta, evidence.margin) for beta in (scaled, fixed)]
    assert torch.equal(*losses)


@given(lists_of(usual_margins.filter(lambda margin: abs(margin) > 1e-6)), beta0s, ws)
def test_as_k_grows_a_pair_gains_all_or_nothing(margin, beta0, w):
    evidence = seen(margin=margin)
    found = RewardMarginBeta(beta0, w, k=1e30)(evidence)
    expected = torch.where(evidence.margin > 0, ConstantBeta(beta0, w)(evidence), FixedBeta(beta0)(evidence))
    assert torch.equal(found, expected)


@given(lists_of(usual_margins), ks)
def test_as_w_grows_beta_becomes_proportional_to_the_gain(margin, k):
    evidence = seen(margin=margin)
    found = RewardMarginBeta(0.1, 1e12, k)(evidence) / (0.1 * 1e12)
    assert torch.allclose(found, reward_gain(evidence.margin, k), rtol=1e-5, atol=1e-11)


def test_a_small_margin_gains_in_proportion_to_k():
    gain = reward_gain(torch.tensor([1e-6, 2e-6]), k=0.5)
    assert gain.tolist() == pytest.approx([5e-7, 1e-6], rel=1e-5)


@given(lists_of(st.floats(-(2.0**126), 0, width=32)), beta0s, ws, ks)
def test_where_the_reward_model_disagrees_beta_is_beta0(margin, beta0, w, k):
    evidence = seen(margin=margin)
    assert torch.equal(RewardMarginBeta(beta0, w, k)(evidence), FixedBeta(beta0)(evidence))


@given(usual_margins, st.floats(0.1, 10), st.floats(0.1, 3))
def test_only_the_product_of_k_and_the_margin_counts(margin, factor, k):
    one = reward_gain(torch.tensor([margin], dtype=torch.float64), k * factor)
    other = reward_gain(torch.tensor([margin * factor], dtype=torch.float64), k)
    assert torch.allclose(one, other, rtol=1e-9)


def test_a_missing_score_is_an_error_and_not_a_beta():
    message = r"margin: expected a number for every pair, got none for 2 of 3 \(missing score\); run `mmrlhf score`"
    with pytest.raises(ValueError, match=message):
        RewardMarginBeta()(seen(margin=[nan, 1.0, nan]))


@pytest.mark.parametrize("rule", [rule for rule in RULES if not rule.needs_margin], ids=repr)
def test_a_rule_that_needs_no_margin_is_blind_to_it(rule):
    evidence = anything()
    blind = evidence._replace(margin=torch.full_like(evidence.margin, nan))
    assert torch.equal(rule(blind), rule(evidence))


def test_only_the_reward_margin_needs_one_and_only_the_shuffled_one_all_of_them():
    assert {type(rule) for rule in RULES if rule.needs_margin} == {RewardMarginBeta}
    assert {type(rule) for rule in RULES if rule.needs_known} == {ShuffledMarginBeta}


# --- controls ---


@given(lists_of(margins), beta0s, ws)
def test_the_constant_control_is_the_beta_of_an_infinite_margin(margin, beta0, w):
    rule = ConstantBeta(beta0, w)
    most = RewardMarginBeta(beta0, w)(seen(margin=[inf] * len(margin)))
    assert torch.equal(rule(seen(margin=margin)), most)
    assert most[0].item() == pytest.approx(beta0 * (1 + w), rel=1e-6)


@given(lists_of(usual_margins), st.randoms())
def test_shuffled_betas_are_those_of_the_margins_in_another_order(known, random):
    """With chances that part [0, 1) evenly every known margin is drawn once."""
    chance = [(place + 0.5) / len(known) for place in range(len(known))]
    random.shuffle(chance)
    shuffled = ShuffledMarginBeta(0.1, 0.5, 0.7)(seen(chance=chance, known=known))
    own = RewardMarginBeta(0.1, 0.5, 0.7)(seen(margin=known))
    assert torch.equal(shuffled.sort().values, own.sort().values)


def test_shuffled_betas_are_distributed_as_their_own_and_do_not_go_with_the_margin():
    rng = np.random.default_rng(0)
    known, chance = rng.normal(2, 2, 4000), rng.random(4000)
    evidence = seen(margin=known.tolist(), chance=chance.tolist(), known=known.tolist())
    shuffled, own = ShuffledMarginBeta()(evidence), RewardMarginBeta()(evidence)
    assert scipy_stats.ks_2samp(shuffled, own).pvalue > 0.01
    assert abs(scipy_stats.spearmanr(shuffled, known).statistic) < 0.05
    assert scipy_stats.spearmanr(own, known).statistic > 0.95


@given(lists_of(usual_margins), st.floats(0, 1, exclude_max=True, width=32))
@example([float(place) for place in range(25)], ALMOST_A_25TH)
@example([5.0], 1 - 2**-24)
@example([float(place) for place in range(1000)], 1 - 2**-24)
def test_a_chance_draws_the_margin_at_its_share_of_the_way(known, chance):
    known = sorted(known)
    place = int(Fraction(chance) * len(known))
    assert quantile_at(torch.tensor(known), torch.tensor([chance])).item() == known[place]


@pytest.mark.parametrize(("known", "told"), [([], "got none;"), ([1.0, nan], "got some that are no number;")])
def test_shuffling_without_all_margins_is_refused(known, told):
    evidence = seen(chance=[0.5])._replace(known=torch.tensor(known))
    with pytest.raises(ValueError, match=f"ShuffledMarginBeta: expected the margins of all training pairs, {told}"):
        ShuffledMarginBeta()(evidence)


@given(lists_of(st.floats(0, 1, exclude_max=True, width=32)), beta0s, ws)
def test_random_betas_are_spread_evenly(chance, beta0, w):
    found = RandomMarginBeta(beta0, w)(seen(chance=chance))
    assert np.allclose(found, beta0 * (1 + w * np.array(chance)), rtol=1e-6)


@pytest.mark.parametrize("rule", SCALED)
def test_every_control_is_dpo_to_the_bit_without_w(rule):
    assert torch.equal(rule(w=0.0)(anything()), FixedBeta()(anything()))


# --- beta-DPO ---


def test_the_implicit_beta_is_that_of_a_loop_over_batches():
    """In Python numbers: EMA of the mean of beta0 * gap, and beta from what a batch has beyond it."""
    rng = np.random.default_rng(0)
    rule = ImplicitBeta(beta0=0.1, w=0.6, momentum=0.8)
    usual, expected_usual = torch.tensor(nan), None
    for _ in range(20):
        gaps = rng.normal(3, 8, rng.integers(2, 9)).tolist()
        mean = sum(0.1 * gap for gap in gaps) / len(gaps)
        beta = 0.1 if expected_usual is None else max(0.1 * (1 + 0.6 * (mean - expected_usual)), 0.001)
        found = rule(seen(gap=gaps)._replace(usual_gap=usual))
        assert found.tolist() == pytest.approx([beta] * len(gaps), rel=1e-5)

        expected_usual = mean if expected_usual is None else 0.8 * expected_usual + 0.2 * mean
        usual = updated_gap(usual, rule.beta0 * torch.tensor(gaps), rule.momentum)
        assert usual.item() == pytest.approx(expected_usual, rel=1e-5)


@given(lists_of(st.floats(-1e6, 1e6, width=32)))
def test_the_first_batch_has_beta0(gaps):
    assert torch.equal(ImplicitBeta()(seen(gap=gaps)), FixedBeta()(seen(gap=gaps)))


@pytest.mark.parametrize(("least", "moved"), [(2, [False, True, True]), (3, [False, False, True])])
def test_a_batch_of_too_few_pairs_has_beta0(least, moved):
    rule = ImplicitBeta(least_pairs=least)
    found = [rule(seen(gap=[50.0] * size, usual=0.0)) for size in (1, 2, 3)]
    assert [bool(beta.ne(0.1).any()) for beta in found] == moved
    assert [len(beta) for beta in found] == [1, 2, 3]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2), st.floats(-1e4, 1e4, width=32), beta0s, ws)
def test_the_implicit_beta_never_falls_below_its_floor(gaps, usual, beta0, w):
    found = ImplicitBeta(beta0, w, floor=0.1)(seen(gap=gaps, usual=usual))
    assert found.ge(torch.tensor(0.1 * beta0)).all()
    assert found.unique().numel() == 1


def test_the_floor_at_the_usual_beta0_is_that_of_the_authors():
    assert ImplicitBeta(beta0=0.1)(seen(gap=[-1e5, -1e5], usual=0.0)).tolist() == pytest.approx([1e-3] * 2)


@given(st.lists(st.floats(-100, 100, width=32), min_size=2))
def test_an_ordinary_batch_has_beta0(gaps):
    usual = float((0.1 * torch.tensor(gaps)).mean())
    assert ImplicitBeta()(seen(gap=gaps, usual=usual)).tolist() == pytest.approx([0.1] * len(gaps), rel=1e-5)


def test_a_policy_that_is_not_a_number_is_not_hidden():
    assert ImplicitBeta()(seen(gap=[nan, 1.0], usual=0.0)).isnan().all()


def test_a_batch_without_pairs_leaves_the_usual_gap():
    none = torch.empty(0)
    assert updated_gap(torch.tensor(3.0), none, 0.9).item() == 3
    assert updated_gap(torch.tensor(nan), none, 0.9).isnan()


def test_without_momentum_the_usual_gap_is_that_of_the_last_batch():
    assert updated_gap(torch.tensor(3.0), torch.tensor([5.0, 9.0]), 0.0).item() == 7


def test_no_gradient_reaches_the_usual_gap():
    gaps = torch.ones(2, requires_grad=True)
    assert not updated_gap(torch.tensor(nan), gaps, 0.9).requires_grad
    assert not updated_gap(torch.tensor(1.0), gaps, 0.9).requires_grad


# --- all rules ---


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_no_gradient_reaches_beta(rule):
    evidence = anything()
    tensors = [numbers.clone().requires_grad_() for numbers in evidence]
    found = rule(Evidence(*tensors))
    assert not found.requires_grad
    assert torch.equal(found, rule(evidence))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_there_is_one_positive_beta_per_pair_and_none_above_the_cap(rule):
    for size in (1, 7, 40):
        found = rule(anything(size))
        assert found.shape == (size,)
        assert found.dtype == torch.float32
        assert found.gt(0).all()
        assert found.le(rule.cap * (1 + 1e-6)).all()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_batch_without_pairs_has_no_betas(rule):
    empty = [numbers[:0] for numbers in anything()[:3]]
    assert rule(Evidence(*empty, *anything()[3:])).shape == (0,)


@pytest.mark.parametrize("rule", [rule for rule in RULES if type(rule) is not ImplicitBeta], ids=repr)
def test_the_beta_of_a_pair_does_not_depend_on_the_other_pairs(rule):
    evidence = anything()
    together = rule(evidence)
    for place in range(0, 40, 7):
        alone = Evidence(*(numbers[place : place + 1] for numbers in evidence[:3]), *evidence[3:])
        assert torch.equal(rule(alone), together[place : place + 1])


def test_caps_are_reached_where_there_are_any():
    assert FixedBeta(0.2).cap == 0.2
    assert [rule(0.2, 0.5).cap for rule in SCALED] == pytest.approx([0.3] * 4)
    assert ImplicitBeta().cap == inf
    most = seen(margin=[inf], chance=[1 - 2**-24], known=[inf])
    assert [rule(0.2, 0.5)(most).item() for rule in SCALED] == pytest.approx([0.3] * 4)
    assert ImplicitBeta()(seen(gap=[1e6, 1e6], usual=0.0)).gt(1000).all()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_beta0_may_be_moved_and_scales_what_does_not_depend_on_the_policy(rule):
    moved = replace(rule, beta0=0.2)
    assert type(moved) is type(rule)
    assert moved.cap == pytest.approx(2 * rule.cap)
    if type(rule) is not ImplicitBeta:
        assert torch.allclose(moved(anything()), 2 * rule(anything()))


@given(lists_of(st.floats(0, 1)), beta0s, ws)
def test_a_dynamic_beta_is_inside_its_bounds_in_float64_too(gain, beta0, w):
    found = dynamic_beta(beta0, w, torch.tensor([*gain, 0, 1], dtype=torch.float64))
    assert found.ge(beta0).all()
    assert found.le(beta0 * (1 + w)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedBeta(0.0), "beta0: expected a number above 0, got 0.0;"),
        (lambda: FixedBeta(nan), "beta0: expected a number above 0, got nan;"),
        (lambda: RewardMarginBeta(beta0=inf), "beta0: expected a number above 0, got inf;"),
        (lambda: RewardMarginBeta(w=-0.1), "w: expected a number of 0 or more, got -0.1;"),
        (lambda: RewardMarginBeta(k=0.0), "k: expected a number above 0, got 0.0;"),
        (lambda: ShuffledMarginBeta(k=-1.0), "k: expected a number above 0, got -1.0;"),
        (lambda: ShuffledMarginBeta(w=nan), "w: expected a number of 0 or more, got nan;"),
        (lambda: ConstantBeta(w=inf), "w: expected a number of 0 or more, got inf;"),
        (lambda: RandomMarginBeta(-0.1), "beta0: expected a number above 0, got -0.1;"),
        (lambda: ImplicitBeta(beta0=-1.0), "beta0: expected a number above 0, got -1.0;"),
        (lambda: ImplicitBeta(w=-1.0), "w: expected a number of 0 or more, got -1.0;"),
        (lambda: ImplicitBeta(momentum=1.0), "momentum: expected 0 or more and below 1, got 1.0;"),
        (lambda: ImplicitBeta(least_pairs=0), "least_pairs: expected 1 or more, got 0;"),
        (lambda: ImplicitBeta(floor=0.0), "floor: expected a share above 0 and up to 1, got 0.0;"),
    ],
)
def test_a_setting_out_of_its_domain_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def verb(beta: PairBeta = RewardMarginBeta()) -> None:  # noqa: B008
    """Take a beta, as a verb would."""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], RewardMarginBeta()),
        (["--beta", "FixedBeta"], FixedBeta()),
        (["--beta", "RewardMarginBeta", "--beta.w=0.1", "--beta.k=2"], RewardMarginBeta(w=0.1, k=2.0)),
        (["--beta", "mmrlhf.modules.betas.ImplicitBeta", "--beta.least_pairs=4"], ImplicitBeta(least_pairs=4)),
        (['--beta={"class_path": "ShuffledMarginBeta", "init_args": {"beta0": 0.2}}'], ShuffledMarginBeta(0.2)),
        (["--beta", "ConstantBeta"], ConstantBeta()),
        (["--beta", "RandomMarginBeta"], RandomMarginBeta()),
    ],
)
def test_a_config_names_a_beta_by_its_class(words, expected):
    assert read_options(verb, "mmrlhf verb", words)["beta"] == expected


def test_a_config_with_a_setting_out_of_its_domain_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"k: expected a number above 0, got 0\.0"):
        read_options(verb, "mmrlhf verb", ["--beta", "RewardMarginBeta", "--beta.k", "0"])
