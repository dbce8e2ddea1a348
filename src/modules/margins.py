"""By how much the chosen response of a pair is the better one, by one of several judges; and chances for controls."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ..batches import PackedQueries

MarginSource = Literal["reward", "rank", "annotated", "implicit"]
_CURES: dict[MarginSource, str] = {
    "reward": "run `mmrlhf score` on the same shards",
    "rank": "rank every response",
    "annotated": "annotate these queries with scores, or take the margin from reward or rank",
    "implicit": "give all responses log-probs of the reference; if they have them, the policy has none: lower the rate",
}
_NAMED = 3  # queries that an error names


def margins(source: MarginSource, batch: PackedQueries, gap: Tensor, beta0: float, *, required: bool = True) -> Tensor:
    """Return the margin of every pair of the batch, (pairs,) in float32 and without gradient.

    A reward model's score, the annotators' mean score and the rank are compared between the two responses; the
    implicit margin is beta0 * gap, the policy's own. Where the margin is unknown and not `required`, it is no number.
    """
    winners, losers = batch.pairs.unbind(1)
    if source == "implicit":
        found = beta0 * gap
    elif source == "rank":
        found = batch.ranks[losers] - batch.ranks[winners]
    else:
        scores = {"reward": batch.rewards, "annotated": batch.annotated}[source]
        found = scores[winners] - scores[losers]
    found = found.detach().float()
    if required and bool((missing := found.isnan()).any()):
        raise ValueError(_unknown(source, batch, missing))
    return found


def pair_chances(batch: PackedQueries) -> Tensor:
    """Return a number in [0, 1) per pair, (pairs,): uniform over pairs, the same in every pass, process and machine.

    It follows from the query's id and from the places of both responses among those of the query.
    """
    starts = (batch.responses.cumsum(0) - batch.responses).tolist()
    queries = _queries_of_pairs(batch)
    chances = [
        chance(batch.ids[query], winner - starts[query], loser - starts[query])
        for query, (winner, loser) in zip(queries, batch.pairs.tolist(), strict=True)
    ]
    return torch.tensor(chances, dtype=torch.float32, device=batch.pairs.device)


def chance(query: str, winner: int, loser: int) -> float:
    """Return the chance of one pair: 24 bits of a hash, which a float32 holds exactly and never rounds up to 1.

    >>> 0 <= chance("train2", 0, 1) < 1, chance("train2", 0, 1) == chance("train2", 1, 0)
    (True, False)
    """
    digest = hashlib.blake2b(f"{query}\n{winner}\n{loser}".encode(), digest_size=3).digest()
    return int.from_bytes(digest, "big") / 2**24


def _queries_of_pairs(batch: PackedQueries) -> list[int]:
    """Which query of the batch each pair is of."""
    queries = torch.arange(len(batch.responses), device=batch.responses.device)
    of_responses = queries.repeat_interleave(batch.responses)
    found: list[int] = of_responses.to(batch.pairs.device)[batch.pairs[:, 0]].tolist()
    return found


def _unknown(source: MarginSource, batch: PackedQueries, missing: Tensor) -> str:
    """The error of a batch with pairs whose margin is unknown."""
    queries = [query for query, lacks in zip(_queries_of_pairs(batch), missing.tolist(), strict=True) if lacks]
    ids = list(dict.fromkeys(batch.ids[query] for query in queries))
    named = ", ".join(map(repr, ids[:_NAMED])) + ", ..." * (len(ids) > _NAMED)
    return (
        f"margin by {source}: expected a number for every pair, got none for {len(queries)} of {len(missing)} pairs "
        f"(queries {named}); {_CURES[source]}"
    )
