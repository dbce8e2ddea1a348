"""What a training step tells of itself beside its loss: callbacks read it, and need not know the model."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PairReport(NamedTuple):
    """The pairs of one micro-batch, each tensor (pairs,) and without gradient."""

    margin: Tensor
    """δ: by how much the chosen response is the better one."""
    beta: Tensor
    gap: Tensor
    """z: how much further the policy prefers the chosen response than the reference does, in nats."""
    chosen_logps: Tensor
    rejected_logps: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    loss: Tensor
    rank_gap: Tensor
    """By how many ranks the annotator put the chosen response before the rejected one."""
    categories: tuple[str, ...]
    beta0: float
    """β₀ at this step, which a schedule over steps may move."""
    cap: float
    """The largest β that a margin can give at this step; infinite where there is none."""


class RewardTerms(NamedTuple):
    """What a reward model is asked: losses of single things, each (things,), or a mean of each kind, each ()."""

    critique: Tensor
    ranking: Tensor
    tie: Tensor
    centre: Tensor
    dimension: Tensor


class RewardReport(NamedTuple):
    """What a reward model said in one micro-batch, without gradient."""

    margin: Tensor
    """By how much the winner's reward is above the loser's, (pairs,)."""
    correct: Tensor
    """Whether it is above at all, (pairs,); equal rewards are wrong."""
    chosen: Tensor
    """Rewards, (pairs,)."""
    rejected: Tensor
    rank_gap: Tensor
    """By how many ranks the annotator put the winner before the loser, (pairs,)."""
    categories: tuple[str, ...]
    """Of the query of each pair."""
    ids: tuple[str, ...]
    """Of the query of each pair."""
    terms: RewardTerms
    """The losses of all pairs, ties, critiques and annotated scores."""
    tie_distance: Tensor
    """How far the rewards of equally good responses are apart, (ties,)."""
    rewards: Tensor
    """Of all responses but those that only fill up a batch, (responses,)."""
    critique_tokens: Tensor
    """Of the critiques whose losses are in `terms`, (critiques,)."""


class Work(NamedTuple):
    """What one micro-batch cost."""

    queries: int
    pairs: int
    tokens: int
    """Put through the decoder, padding not counted."""
    unique_tokens: int
    """Those that a query has, each once: the least that can be computed."""
    flops: float
    """Of the forward and the backward pass, estimated from shapes."""
