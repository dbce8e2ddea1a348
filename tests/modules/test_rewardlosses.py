"""Losses of the reward model against closed forms, their symmetries, and numerical gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from mmrlhf.modules.rewardlosses import (
    RewardWeights,
    as_annotated,
    centre_loss,
    critique_nll,
    dimension_loss,
    ranking_loss,
    reward_loss,
    tie_loss,
)
from mmrlhf.reports import RewardTerms

NUMBERS = st.floats(-50, 50)
REWARDS = st.lists(NUMBERS, min_size=2, max_size=6).map(lambda those: torch.tensor(those, dtype=torch.float64))
NAN = math.nan


def every_two(rewards):
    return torch.combinations(torch.arange(len(rewards)), 2)


@given(REWARDS)
def test_losses_of_pairs_are_those_of_the_formulas(rewards):
    pairs = every_two(rewards)
    both = [(rewards[one].item(), rewards[other].item()) for one, other in pairs.tolist()]
    found = ranking_loss(rewards, pairs).tolist()
    assert found == pytest.approx([math.log1p(math.exp(loser - winner)) for winner, loser in both], rel=1e-9, abs=1e-9)
    assert tie_loss(rewards, pairs).tolist() == pytest.approx([(one - other) ** 2 for one, other in both])
    assert centre_loss(rewards, pairs).tolist() == pytest.approx([(one + other) ** 2 for one, other in both])


@given(REWARDS, NUMBERS)
def test_only_differences_of_rewards_rank_and_tie_and_only_the_centre_holds_their_level(rewards, shift):
    pairs = every_two(rewards)
    for loss in (ranking_loss, tie_loss):
        torch.testing.assert_close(loss(rewards + shift, pairs), loss(rewards, pairs), rtol=1e-6, atol=1e-9)
    winners, losers = pairs.unbind(1)
    expected = (rewards[winners] + rewards[losers] + 2 * shift) ** 2
    torch.testing.assert_close(centre_loss(rewards + shift, pairs), expected)


@given(REWARDS, st.floats(0.01, 10))
def test_ranking_falls_as_the_winner_rises_and_a_tie_has_no_direction(rewards, rise):
    pair, turned = torch.tensor([[0, 1]]), torch.tensor([[1, 0]])
    higher = rewards.clone()
    higher[0] += rise
    assert ranking_loss(higher, pair) < ranking_loss(rewards, pair)
    assert ranking_loss(higher, turned) > ranking_loss(rewards, turned)
    assert torch.equal(tie_loss(rewards, pair), tie_loss(rewards, turned))


@given(st.lists(st.tuples(st.floats(-100, 0), st.integers(1, 30)), min_size=1, max_size=5), st.data())
def test_a_response_without_a_critique_changes_nothing_of_the_critiques_loss(critiques, data):
    """The authors' code lets such rows into the mean over the batch."""
    sums = torch.tensor([each for each, _ in critiques], dtype=torch.float64)
    tokens = torch.tensor([number for _, number in critiques])
    at = data.draw(st.integers(0, len(sums)))
    foreign = data.draw(st.sampled_from([0.0, -7.0, NAN, -math.inf]))
    mixed = torch.cat([sums[:at], torch.tensor([foreign], dtype=torch.float64), sums[at:]]).requires_grad_()
    counts = torch.cat([tokens[:at], torch.tensor([0]), tokens[at:]])
    found = critique_nll(mixed, counts)
    assert found.tolist() == pytest.approx([-each / number for each, number in critiques])
    found.mean().backward()
    gradient = torch.cat([mixed.grad[:at], mixed.grad[at + 1 :]])
    assert mixed.grad[at] == 0
    torch.testing.assert_close(gradient, -1 / (tokens * len(tokens)).double())


def test_scores_are_learned_on_the_annotators_scale_and_only_where_they_gave_one():
    annotated = torch.tensor([[1.0, 5.0], [NAN, 2.0], [NAN, NAN]])
    scores = torch.tensor([[-1.0, 1.0], [9.0, -0.5], [9.0, 9.0]], requires_grad=True)
    loss = dimension_loss(scores, annotated)
    assert loss.tolist() == [0.0, 0.0, 0.0]
    assert as_annotated(scores[0]).tolist() == [1.0, 5.0]
    off = dimension_loss(scores + 0.5, annotated)
    assert off.tolist() == [0.25, 0.25, 0.25]
    off.sum().backward()
    assert scores.grad.tolist() == [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]


def test_the_total_is_that_of_the_design():
    drawn = torch.rand(5, dtype=torch.float64)
    critique, ranking, tie, centre, dimension = drawn.tolist()
    found = reward_loss(RewardTerms(*drawn), RewardWeights(0.7, 0.5, 3.0, 0.01, 0.2))
    assert found.item() == pytest.approx(0.7 * critique + 0.5 * (ranking + 3.0 * tie) + 0.01 * centre + 0.2 * dimension)
    by_default = reward_loss(RewardTerms(*drawn), RewardWeights())
    assert by_default.item() == pytest.approx(critique + ranking + tie + 0.01 * centre + dimension)


def test_gradients_are_those_of_finite_differences():
    chance = torch.Generator().manual_seed(0)
    rewards, sums = (torch.randn(5, generator=chance, dtype=torch.float64).requires_grad_() for _ in range(2))
    scores = torch.randn(5, 2, generator=chance, dtype=torch.float64).requires_grad_()
    annotated = torch.tensor([[1.0, NAN], [2.0, 3.0], [NAN, NAN], [5.0, 5.0], [4.0, 1.0]], dtype=torch.float64)
    tokens = torch.tensor([3, 0, 1, 7, 0])
    pairs, ties = torch.tensor([[0, 1], [2, 1], [4, 0]]), torch.tensor([[1, 3]])

    def total(rewards, sums, scores):
        terms = (
            critique_nll(sums, tokens),
            ranking_loss(rewards, pairs),
            tie_loss(rewards, ties),
            centre_loss(rewards, pairs),
            dimension_loss(scores, annotated),
        )
        return reward_loss(RewardTerms(*(each.mean() for each in terms)), RewardWeights(0.7, 0.5, 3.0, 0.3, 0.2))

    assert gradcheck(total, (rewards, sums, scores))


def test_nothing_to_learn_is_a_loss_of_nothing_with_a_gradient_of_zero():
    rewards, none = torch.ones(3, requires_grad=True), torch.empty(0, 2, dtype=torch.long)
    unknown = torch.full((3, 1), NAN)
    total = (
        ranking_loss(rewards, none).sum()
        + tie_loss(rewards, none).sum()
        + centre_loss(rewards, none).sum()
        + critique_nll(rewards, torch.zeros(3, dtype=torch.long)).sum()
        + dimension_loss(rewards[:, None], unknown).sum()
    )
    total.backward()
    assert total == 0
    assert rewards.grad.tolist() == [0.0, 0.0, 0.0]


def test_huge_rewards_give_finite_losses():
    rewards = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = ranking_loss(rewards, torch.tensor([[0, 1], [1, 0]]))
    loss.sum().backward()
    assert loss.tolist() == [0.0, 2e4]
    assert rewards.grad.tolist() == [1.0, -1.0]


@pytest.mark.parametrize("weights", [{"critique": -1.0}, {"centre": math.nan}, {"tie": math.inf}])
def test_weights_that_cannot_be_are_refused(weights):
    with pytest.raises(ValueError, match="weights: expected numbers of 0 or more"):
        RewardWeights(**weights)
