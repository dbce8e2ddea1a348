"""What the data tell the training of a reward model before it begins, and what it cannot learn from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from .rewardlosses import RewardWeights


class RewardPlan(NamedTuple):
    """What the data tell the training of a reward model before it begins; means are per training query.

    Each term of the loss is a mean over all things of its kind in the data. With `mean_ties` set to `mean_pairs`, a
    tie weighs as much as a pair instead, however few there are.
    """

    steps: int
    """Optimizer steps in all."""
    mean_pairs: float
    mean_ties: float = 0.0
    mean_critiques: float = 0.0
    """Responses with a critique that is supervised."""
    mean_scores: float = 0.0
    """Annotated scores, each dimension for itself; read only where there are such heads."""


class Means(Protocol):
    """What there is per training query, on the average."""

    @property
    def mean_pairs(self) -> float:
        """Pairs of different ranks."""

    @property
    def mean_ties(self) -> float:
        """Pairs of equal rank."""

    @property
    def mean_critiques(self) -> float:
        """Critiques that are learned."""

    @property
    def mean_scores(self) -> Mapping[str, float]:
        """Annotated scores, by dimension."""


class Learning(Protocol):
    """What a reward model shall learn."""

    weights: RewardWeights
    dimensions: tuple[str, ...]


def reward_plan(steps: int, learning: Learning, data: Means, critiques: str) -> RewardPlan:
    """The plan of a training; what is to be learned and not in the data is refused. `critiques`: where from."""
    if critiques != "none" and learning.weights.critique and not data.mean_critiques:
        raise ValueError(
            f"data.critique: expected critiques in the training data ({critiques}), got none; say none, or enhance the "
            "annotators' reasons first"
        )
    if unknown := [name for name in learning.dimensions if not data.mean_scores[name]]:
        raise ValueError(
            f"model.dimensions: expected annotated scores of {' and '.join(unknown)} in the training data, got none; "
            "leave it out"
        )
    scores = sum(data.mean_scores[name] for name in learning.dimensions)
    return RewardPlan(steps, data.mean_pairs, data.mean_ties, data.mean_critiques, scores)
