"""One beta per pair: how dear it is for the policy to leave the reference, by what is known of the pair.

The mathematics is in the functions; the classes below keep what a config sets, and say what they need to know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Evidence(NamedTuple):
    """What is known of the pairs of a batch."""

    margin: Tensor  # (pairs,): by how much the chosen response is the better one; not a number where unknown
    gap: Tensor  # (pairs,): z, how much further the policy prefers it than the reference does, without gradient
    chance: Tensor  # (pairs,): in [0, 1), drawn once for every pair and never again
    usual_gap: Tensor  # (): the running mean of beta0 * gap over earlier batches; not a number before the first
    known: Tensor  # (n,): the margins of all training pairs, sorted; empty where unknown


def reward_gain(margin: Tensor, k: float) -> Tensor:
    """How sure a margin makes: 1 - exp(-k margin) (Zhang et al. 2025, MM-RLHF, section 4.2), and 0 below 0.

    >>> reward_gain(torch.tensor([-1e30, 0.0, 1.0, 1e30]), k=0.5)
    tensor([0.0000, 0.0000, 0.3935, 1.0000])
    """
    # The margin is cut, not the gain: exp of a very negative one would overflow.
    return -torch.expm1(-k * margin.clamp(min=0))


def dynamic_beta(beta0: float, w: float, gain: Tensor) -> Tensor:
    """beta0 (1 + w gain): from beta0 to (1 + w) beta0 for a gain from 0 to 1 (MM-RLHF, section 4.2).

    >>> dynamic_beta(0.1, 0.5, torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.1000, 0.1250, 0.1500])
    """
    # The bounds are promised, and rounding would cross them.
    return (beta0 * (1 + w * gain)).clamp(beta0, beta0 * (1 + w))


def quantile_at(known: Tensor, chance: Tensor) -> Tensor:
    """Of sorted numbers, those that stand at these shares of the way: for uniform chances, a draw of one of them.

    >>> quantile_at(torch.tensor([3.0, 5.0, 9.0]), torch.tensor([0.0, 0.5, 0.999]))
    tensor([3., 5., 9.])
    """
    return known[(chance.double() * len(known)).long()]  # rounded in float32 it could be the next one


def batch_beta(gaps: Tensor, usual: Tensor, beta0: float, w: float, floor: float) -> Tensor:
    """beta0 (1 + w (mean gap - usual gap)), one number for a batch, at least floor * beta0 (Wu et al. 2024).

    `gaps` are the implicit rewards beta0 * z of the batch. Without a usual gap there is nothing to compare with: beta0.

    >>> batch_beta(torch.tensor([1.0, 3.0]), torch.tensor(1.0), beta0=0.1, w=0.5, floor=0.01)
    tensor(0.1500)
    """
    beyond = torch.where(usual.isnan(), 0.0, gaps.mean() - usual)
    return (beta0 * (1 + w * beyond)).clamp(min=floor * beta0)


def updated_gap(usual: Tensor, gaps: Tensor, momentum: float) -> Tensor:
    """The running mean after a batch: momentum * usual + (1 - momentum) * mean, and the first batch's own mean.

    `gaps` are the implicit rewards beta0 * z of the whole batch, of all ranks; one without pairs changes nothing.

    >>> first = updated_gap(torch.tensor(torch.nan), torch.tensor([1.0, 3.0]), momentum=0.9)
    >>> first, updated_gap(first, torch.tensor([12.0]), momentum=0.9)
    (tensor(2.), tensor(3.))
    """
    if not len(gaps):
        return usual
    mean = gaps.detach().mean()
    return torch.where(usual.isnan(), mean, momentum * usual + (1 - momentum) * mean)


@dataclass(frozen=True)
class PairBeta(ABC):
    """A rule for beta, chosen by name in a config; its fields are what can be set."""

    needs_margin: ClassVar[bool] = False
    """Whether every pair must have a margin."""
    needs_known: ClassVar[bool] = False
    """Whether the margins of all training pairs must be known."""
    beta0: float = 0.1

    def __post_init__(self) -> None:
        _require(0 < self.beta0 < inf, "beta0", "a number above 0", self.beta0, 0.1)

    def __call__(self, seen: Evidence) -> Tensor:
        """Return one beta per pair, (pairs,), without gradient."""
        if self.needs_margin and (missing := int(seen.margin.isnan().sum())):
            raise ValueError(
                f"margin: expected a number for every pair, got none for {missing} of {len(seen.margin)} "
                f"(missing score); run `mmrlhf score` on the same shards, or choose another beta than "
                f"{type(self).__name__}"
            )
        if self.needs_known and (not len(seen.known) or bool(seen.known[-1].isnan())):
            raise ValueError(
                f"{type(self).__name__}: expected the margins of all training pairs, got "
                f"{'some that are no number' if len(seen.known) else 'none'}; run `mmrlhf score` on the same shards"
            )
        return self.of(seen).detach()

    @property
    @abstractmethod
    def cap(self) -> float:
        """The largest beta that this rule can give; infinite where there is none."""

    @abstractmethod
    def of(self, seen: Evidence) -> Tensor:
        """Return one beta per pair, (pairs,), from evidence that holds what is needed."""


@dataclass(frozen=True)
class FixedBeta(PairBeta):
    """The same beta for every pair: plain DPO."""

    @property
    def cap(self) -> float:
        """The largest beta that this rule can give."""
        return self.beta0

    def of(self, seen: Evidence) -> Tensor:
        """Return beta0 for every pair."""
        return torch.full_like(seen.gap, self.beta0)


@dataclass(frozen=True)
class GainBeta(PairBeta):
    """beta0 (1 + w gain), where a subclass says what gains."""

    w: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.w < inf, "w", "a number of 0 or more", self.w, 0.5)

    @property
    def cap(self) -> float:
        """The largest beta that this rule can give."""
        return self.beta0 * (1 + self.w)

    def of(self, seen: Evidence) -> Tensor:
        """Return a beta between beta0 and (1 + w) beta0 for every pair."""
        return dynamic_beta(self.beta0, self.w, self.gain(seen))

    @abstractmethod
    def gain(self, seen: Evidence) -> Tensor:
        """Return a number from 0 to 1 for every pair, (pairs,)."""


@dataclass(frozen=True)
class RewardMarginBeta(GainBeta):
    """Dynamic reward scaling (MM-RLHF, section 4.2): the larger the margin, the larger beta.

    A pair with a margin below 0, where the reward model disagrees with people, has beta0.

    >>> none = torch.zeros(3)
    >>> RewardMarginBeta(w=0.5, k=1.0)(Evidence(torch.tensor([-3.0, 0.0, 1e9]), none, none, none[0], none[:0]))
    tensor([0.1000, 0.1000, 0.1500])
    """

    needs_margin: ClassVar[bool] = True
    k: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 < self.k < inf, "k", "a number above 0", self.k, 0.5)

    def gain(self, seen: Evidence) -> Tensor:
        """Return the gain of each pair's margin."""
        return reward_gain(seen.margin, self.k)


@dataclass(frozen=True)
class ConstantBeta(GainBeta):
    """Control: every pair gains all, so that a larger beta is told from one that follows the margin."""

    def gain(self, seen: Evidence) -> Tensor:
        """Return 1 for every pair."""
        return torch.ones_like(seen.gap)


@dataclass(frozen=True)
class ShuffledMarginBeta(GainBeta):
    """Control: every pair has the margin of a random pair, the same at every pass.

    The betas are distributed as those of `RewardMarginBeta`, and have nothing to do with their pairs.
    """

    needs_known: ClassVar[bool] = True
    k: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 < self.k < inf, "k", "a number above 0", self.k, 0.5)

    def gain(self, seen: Evidence) -> Tensor:
        """Return the gain of another pair's margin."""
        return reward_gain(quantile_at(seen.known, seen.chance), self.k)


@dataclass(frozen=True)
class RandomMarginBeta(GainBeta):
    """Control: every pair gains a random share, the same at every pass."""

    def gain(self, seen: Evidence) -> Tensor:
        """Return each pair's chance."""
        return seen.chance


@dataclass(frozen=True)
class ImplicitBeta(PairBeta):
    """beta-DPO (Wu et al. 2024): one beta for a batch, larger where the policy tells its pairs apart more than usual.

    The gap is the paper's beta0 * z; the authors' code leaves beta0 out. Their filter of outliers is not applied. A
    batch of fewer than `least_pairs`, and the first, have beta0. beta is at least `floor` of beta0, which for 0.1 is
    the 0.001 of the authors' code.
    """

    w: float = 0.5
    """The paper's alpha."""
    momentum: float = 0.9
    least_pairs: int = 2
    floor: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.w < inf, "w", "a number of 0 or more", self.w, 0.5)
        _require(0 <= self.momentum < 1, "momentum", "0 or more and below 1", self.momentum, 0.9)
        _require(self.least_pairs >= 1, "least_pairs", "1 or more", self.least_pairs, 2)
        _require(0 < self.floor <= 1, "floor", "a share above 0 and up to 1", self.floor, 0.01)

    @property
    def cap(self) -> float:
        """The largest beta that this rule can give: there is none."""
        return inf

    def of(self, seen: Evidence) -> Tensor:
        """Return the batch's beta for every pair."""
        if len(seen.gap) < self.least_pairs:
            return torch.full_like(seen.gap, self.beta0)
        gaps = self.beta0 * seen.gap
        return batch_beta(gaps, seen.usual_gap, self.beta0, self.w, self.floor).expand_as(gaps)


def _require(right: bool, name: str, expected: str, got: float, usual: float) -> None:
    if not right:
        raise ValueError(f"{name}: expected {expected}, got {got}; {usual} is usual")
