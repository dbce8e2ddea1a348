"""Losses of preference pairs: how far the policy is from preferring the chosen response as it should.

Each is a function of z, by how many nats the policy prefers the chosen response more than the reference does, and of
one beta per pair; none passes a gradient to beta. The classes below only keep what a config sets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PairLogps(NamedTuple):
    """Log-probabilities of the two responses of every pair, each (pairs,)."""

    chosen: Tensor
    rejected: Tensor


def take(logps: Tensor, pairs: Tensor) -> PairLogps:
    """Of a number per response, those of the two responses of every pair; a row of `pairs` names the chosen first.

    >>> take(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([[2, 0], [1, 0]]))
    PairLogps(chosen=tensor([-3., -2.]), rejected=tensor([-1., -1.]))
    """
    chosen, rejected = pairs.unbind(1)
    return PairLogps(logps[chosen], logps[rejected])


def log_ratio(policy: PairLogps, reference: PairLogps) -> Tensor:
    """z: how much further the policy prefers the chosen response than the reference does, in nats (pairs,).

    >>> one, two = PairLogps(torch.tensor([-1.0]), torch.tensor([-4.0])), PairLogps(torch.zeros(1), torch.ones(1))
    >>> log_ratio(one, two)
    tensor([4.])
    """
    return (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)


def sigmoid_loss(z: Tensor, beta: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -(1 - e) log s(beta z) - e log s(-beta z), where s is the logistic function and e the label smoothing.

    Without smoothing it is eq. 7 of Rafailov et al. 2023; with it, conservative DPO (Mitchell 2023, eq. 3), for labels
    of which a share e is wrong.

    >>> sigmoid_loss(torch.zeros(2), torch.tensor([0.1, 0.2])), sigmoid_loss(torch.tensor([10.0]), torch.ones(1), 0.25)
    (tensor([0.6931, 0.6931]), tensor([2.5000]))
    """
    logits = beta.detach() * z
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def robust_loss(z: Tensor, beta: Tensor, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024): (-(1 - e) log s(beta z) + e log s(-beta z)) / (1 - 2e).

    Its mean over labels of which a share e is wrong is the mean of `sigmoid_loss` over the right ones; it may be
    negative.

    >>> robust_loss(torch.tensor([0.0, 40.0]), torch.ones(2), 0.25)
    tensor([  0.6931, -20.0000])
    """
    logits = beta.detach() * z
    right, wrong = -logsigmoid(logits), -logsigmoid(-logits)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def hinge_loss(z: Tensor, beta: Tensor) -> Tensor:
    """max(0, 1 - beta z), as in SLiC (Zhao et al. 2023) and RSO (Liu et al. 2023): what is far enough is left alone.

    >>> hinge_loss(torch.tensor([-1.0, 0.0, 3.0]), torch.full((3,), 0.5))
    tensor([1.5000, 1.0000, 0.0000])
    """
    return torch.relu(1 - beta.detach() * z)


def ipo_loss(z: Tensor, beta: Tensor) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17): (z - 1 / (2 beta))^2, with z of log-probabilities per token.

    >>> ipo_loss(torch.tensor([0.0, 5.0, 6.0]), torch.full((3,), 0.1))
    tensor([25.,  0.,  1.])
    """
    return (z - 1 / (2 * beta.detach())).square()


def offset_loss(z: Tensor, beta: Tensor, offset: Tensor) -> Tensor:
    """DPO with an offset (ODPO, Amini et al. 2024): -log s(beta z - offset); no gradient flows through the offset.

    >>> offset_loss(torch.tensor([10.0, 0.0]), torch.full((2,), 0.1), torch.tensor([1.0, 20.0]))
    tensor([ 0.6931, 20.0000])
    """
    return -logsigmoid(beta.detach() * z - offset.detach())


def log_offset(margin: Tensor, alpha: float, least: float) -> Tensor:
    """Alpha log(margin), where a margin below `least` counts as `least`: the offset of ODPO.

    >>> log_offset(torch.tensor([-5.0, 0.0, 1.0, torch.e]), alpha=2.0, least=1.0)
    tensor([0., 0., 0., 2.])
    """
    return alpha * margin.clamp(min=least).log()


def response_nll(logps: Tensor, tokens: Tensor, pairs: Tensor) -> Tensor:
    """The supervised term: the mean over its tokens of -log p of every pair's chosen response (pairs,).

    `logps` are sums over the supervised tokens of each response, of which there are `tokens`.

    >>> response_nll(torch.tensor([-6.0, -8.0]), torch.tensor([3, 2]), torch.tensor([[0, 1], [1, 0]]))
    tensor([2., 4.])
    """
    chosen = pairs[:, 0]
    return -logps[chosen] / tokens[chosen]


class PreferenceLoss(ABC):
    """A loss of pairs, chosen by name in a config; its fields are what can be set."""

    mean_logps: ClassVar[bool] = False
    """Whether z is of log-probabilities divided by the number of tokens, not of sums."""
    needs_margin: ClassVar[bool] = False
    """Whether every pair must have a margin."""

    @abstractmethod
    def __call__(self, z: Tensor, beta: Tensor, margin: Tensor) -> Tensor:
        """Return the loss of every pair, (pairs,)."""


@dataclass(frozen=True)
class Sigmoid(PreferenceLoss):
    """DPO; with label smoothing, conservative DPO.

    >>> Sigmoid()(torch.zeros(1), torch.ones(1), torch.zeros(1))
    tensor([0.6931])
    """

    label_smoothing: float = 0.0
    """The share of labels that are believed to be wrong."""

    def __post_init__(self) -> None:
        _require_smoothing(self.label_smoothing)

    def __call__(self, z: Tensor, beta: Tensor, margin: Tensor) -> Tensor:
        """Return the loss of every pair, (pairs,)."""
        return sigmoid_loss(z, beta, self.label_smoothing)


@dataclass(frozen=True)
class Robust(PreferenceLoss):
    """Robust DPO."""

    label_smoothing: float = 0.1
    """The share of labels that are believed to be wrong."""

    def __post_init__(self) -> None:
        _require_smoothing(self.label_smoothing)

    def __call__(self, z: Tensor, beta: Tensor, margin: Tensor) -> Tensor:
        """Return the loss of every pair, (pairs,)."""
        return robust_loss(z, beta, self.label_smoothing)


@dataclass(frozen=True)
class Hinge(PreferenceLoss):
    """The hinge loss."""

    def __call__(self, z: Tensor, beta: Tensor, margin: Tensor) -> Tensor:
        """Return the loss of every pair, (pairs,)."""
        return hinge_loss(z, beta)


@dataclass(frozen=True)
class IPO(PreferenceLoss):
    """IPO per token, as its authors ran it and TRL computes it: with sums its target would depend on the length."""

    mean_logps: ClassVar[bool] = True

    def __call__(self, z: Tensor, beta: Tensor, margin: Tensor) -> Tensor:
        """Return the loss of every pair, (pairs,)."""
        return ipo_loss(z, beta)


@dataclass(frozen=True)
class Offset(PreferenceLoss):
    """DPO with the offset alpha log(margin): the better the chosen response, the further it must be preferred.

    The paper takes its pairs from scores, so its margins are positive; here people made the pairs, and a reward model
    may disagree. The logarithm falls without bound towards a margin of 0, where nothing is asked of a pair any more.
    `least` ends that: what is below, a negative margin too, counts as `least`. With 0.01 such a pair has a loss of 0.01
    at z = 0, where DPO has 0.69: it hardly counts. With 1 no pair asks for less than DPO does. alpha = 0 is DPO.
    """

    needs_margin: ClassVar[bool] = True
    alpha: float = 1.0
    least: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < inf:
            raise ValueError(f"alpha: expected a number of 0 or more, got {self.alpha}; 1 is usual")
        if not 0 < self.least < inf:
            raise ValueError(f"least: expected a margin above 0, got {self.least}; 0.01 is usual")

    def __call__(self, z: Tensor, beta: Tensor, margin: Tensor) -> Tensor:
        """Return the loss of every pair, (pairs,)."""
        return offset_loss(z, beta, log_offset(margin, self.alpha, self.least))


def _require_smoothing(share: float) -> None:
    if not 0 <= share < 0.5:
        raise ValueError(
            f"label_smoothing: expected 0 or more and below 0.5, got {share}; from a half on, labels say nothing"
        )
