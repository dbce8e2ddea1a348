"""Log-probs of given tokens from hidden states, in chunks: the logits of a whole row never exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class ResponseLogps(NamedTuple):
    """What a model says of every response of a batch."""

    sums: Tensor  # (responses,): float32, over the supervised tokens
    tokens: Tensor  # (responses,): how many these are


def token_logps(states: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, chunk: int) -> Tensor:
    """The log-prob of each target, (tokens,), from the state that predicts it, (tokens, width).

    At most `chunk` rows of logits are alive: where there are more targets, each chunk is computed again in the
    backward pass. Softmax runs in float32, or in the states' type where that is finer.
    """
    if len(targets) <= chunk:
        return _of_chunk(states, head, targets)
    starts = range(0, len(targets), chunk)
    pieces = [(states[start : start + chunk], head, targets[start : start + chunk]) for start in starts]
    if not torch.is_grad_enabled():
        return torch.cat([_of_chunk(*piece) for piece in pieces])
    return torch.cat([checkpoint(_of_chunk, *piece, use_reentrant=False) for piece in pieces])


def _of_chunk(states: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    logits = head(states)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def summed(logps: Tensor, owners: Tensor, responses: int) -> ResponseLogps:
    """The sums per response of log-probs that belong to the responses `owners`.

    >>> summed(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 0, 2]), 3).sums.tolist()
    [-3.0, 0.0, -4.0]
    """
    sums = torch.zeros(responses, dtype=logps.dtype, device=logps.device).index_add(0, owners, logps)
    return ResponseLogps(sums, torch.bincount(owners, minlength=responses))
