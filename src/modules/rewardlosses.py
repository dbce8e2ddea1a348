"""Losses of a reward model that writes a critique and then gives a score.

Each is a function of tensors that gives one number per pair, tie, critique or annotated score, so that whoever sums
them decides what weighs the same. The total is of their means:

    critique + rewards * (ranking + tie * ties) + centre * centring + dimensions * dimensions
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from math import inf

from torch import Tensor
from torch.nn.functional import logsigmoid

from ..reports import RewardTerms
from .losses import take

_MIDDLE, _HALF = 3.0, 2.0  # of a scale from 1 to 5, which becomes -1 to 1


@dataclass(frozen=True)
class RewardWeights:
    """How much each term counts.

    Args:
        critique: Of the critiques' negative log-likelihood.
        rewards: Of ranking and ties together; "float rewards" in the authors' code.
        tie: Of ties beside the ranking, within `rewards`.
        centre: Of what keeps the rewards of a pair around 0, where the ranking leaves them free.
        dimensions: Of the scores per dimension, where there are such.
    """

    critique: float = 1.0
    rewards: float = 1.0
    tie: float = 1.0
    centre: float = 0.01
    dimensions: float = 1.0

    def __post_init__(self) -> None:
        if not all(0 <= weight < inf for weight in astuple(self)):
            raise ValueError(f"weights: expected numbers of 0 or more, got {self}")


def ranking_loss(rewards: Tensor, pairs: Tensor) -> Tensor:
    """Bradley and Terry: -log s(r_w - r_l) of every pair, (pairs,); a row of `pairs` names the winner first.

    >>> import torch
    >>> ranking_loss(torch.tensor([0.0, 0.0, 20.0]), torch.tensor([[0, 1], [2, 0], [1, 2]]))
    tensor([6.9315e-01, 2.0612e-09, 2.0000e+01])
    """
    winner, loser = take(rewards, pairs)
    return -logsigmoid(winner - loser)


def tie_loss(rewards: Tensor, ties: Tensor) -> Tensor:
    """(r_a - r_b)^2 of every two responses that people found equally good, (ties,).

    >>> import torch
    >>> tie_loss(torch.tensor([1.0, 3.0]), torch.tensor([[0, 1], [1, 0]]))
    tensor([4., 4.])
    """
    one, other = take(rewards, ties)
    return (one - other).square()


def centre_loss(rewards: Tensor, pairs: Tensor) -> Tensor:
    """(r_w + r_l)^2 of every pair, (pairs,).

    >>> import torch
    >>> centre_loss(torch.tensor([1.0, 3.0, -1.0]), torch.tensor([[0, 1], [0, 2]]))
    tensor([16.,  0.])
    """
    winner, loser = take(rewards, pairs)
    return (winner + loser).square()


def critique_nll(sums: Tensor, tokens: Tensor) -> Tensor:
    """The mean over its tokens of -log p of every critique, (critiques,); a response without one is left out.

    >>> import torch
    >>> critique_nll(torch.tensor([-6.0, 0.0, -8.0]), torch.tensor([3, 0, 2]))
    tensor([2., 4.])
    """
    said = tokens > 0
    return -sums[said] / tokens[said]


def dimension_loss(scores: Tensor, annotated: Tensor) -> Tensor:
    """The squared error of every annotated score, (annotated,), on a scale on which 1 to 5 is -1 to 1.

    Squares, because people scored responses one by one and not against each other; the score then has their scale.

    Args:
        scores: By the model, (responses, dimensions).
        annotated: By people, 1 to 5, (responses, dimensions); not a number where they did not score.

    >>> import torch
    >>> dimension_loss(torch.tensor([[1.0, 0.5], [0.0, 0.0]]), torch.tensor([[5.0, 1.0], [torch.nan, 3.0]]))
    tensor([0.0000, 2.2500, 0.0000])
    """
    known = ~annotated.isnan()
    return (scores[known] - (annotated[known] - _MIDDLE) / _HALF).square()


def as_annotated(scores: Tensor) -> Tensor:
    """Scores per dimension on the annotators' scale, where the model may go beyond 1 and 5.

    >>> import torch
    >>> as_annotated(torch.tensor([-1.0, 0.0, 1.5]))
    tensor([1., 3., 6.])
    """
    return _MIDDLE + _HALF * scores


def reward_loss(means: RewardTerms, weights: RewardWeights) -> Tensor:
    """The whole loss from the mean of each term; the centre is not scaled by `rewards`.

    >>> import torch
    >>> terms = RewardTerms(*torch.tensor([1.0, 10.0, 100.0, 1000.0, 1e4]))
    >>> reward_loss(terms, RewardWeights(critique=2.0, rewards=0.1, tie=3.0, centre=0.01, dimensions=0.0))
    tensor(43.)
    """
    rewards = means.ranking + weights.tie * means.tie
    found: Tensor = (
        weights.critique * means.critique
        + weights.rewards * rewards
        + weights.centre * means.centre
        + weights.dimensions * means.dimension
    )
    return found
