"""Log-probs of given tokens from hidden states, in chunks: the logits of a whole row never exist."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear


class ResponseLogps(NamedTuple):
    """What a model says of every response of a batch."""

    sums: Tensor  # (responses,): float32, over the supervised tokens
    tokens: Tensor  # (responses,): how many these are


def token_logps(states: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """The log-prob of each target, (tokens,), from the state that predicts it, (tokens, width).

    `weight`, (vocabulary, width), makes logits of states. At most `chunk` rows of them exist at once: where there are
    more targets, the backward pass makes each chunk again. Softmax runs in float32, or in the states' type where that
    is finer.

    >>> token_logps(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([0, 3]), chunk=8).exp()
    tensor([0.2500, 0.2500])
    """
    found: Tensor = _TokenLogps.apply(states, weight, targets, chunk)
    return found


class _TokenLogps(torch.autograd.Function):
    """Log-probs whose gradient is written over the probabilities: nothing as large exists beside them."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:  # noqa: ANN401
        """The log-probs; the probabilities are kept where one chunk is all."""
        ctx.save_for_backward(states, weight, targets)
        ctx.chunk, ctx.kept, logps = chunk, None, []
        for part in _chunks(len(targets), chunk):
            logits = linear(states[part], weight)
            ctx.number = logits.dtype  # autocast may have chosen it, and is off in the backward pass
            probs, logp = _softmax(logits, targets[part])
            logps.append(logp)
            if len(targets) <= chunk and any(ctx.needs_input_grad):
                ctx.kept = probs
        return torch.cat(logps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # noqa: ANN401
        """The gradients of states and weight, whichever are asked for."""
        states, weight, targets = ctx.saved_tensors
        of_states, of_weight = (
            torch.empty_like(each) if wanted else None
            for each, wanted in zip((states, weight), ctx.needs_input_grad[:2], strict=True)
        )
        for part in _chunks(len(targets), ctx.chunk):
            probs, ctx.kept = ctx.kept, None
            if probs is None:
                probs, _ = _softmax(linear(states[part].to(ctx.number), weight.to(ctx.number)), targets[part])
            # d logp(target) / d logits is 1 at the target, less the probabilities.
            probs.mul_(-grad[part, None])
            probs.scatter_add_(1, targets[part, None], grad[part, None].to(probs.dtype))
            of_logits = probs.to(ctx.number)
            if of_states is not None:
                of_states[part] = of_logits @ weight.to(ctx.number)
            if of_weight is not None:
                # The first chunk writes, the others add.
                torch.addmm(
                    of_weight,
                    of_logits.t().to(of_weight.dtype),
                    states[part].to(of_weight.dtype),
                    beta=1 if part.start else 0,
                    out=of_weight,
                )
        return of_states, of_weight, None, None


def _chunks(tokens: int, chunk: int) -> list[slice]:
    """Slices of at most `chunk`; one that is empty where there is nothing."""
    return [slice(start, start + chunk) for start in range(0, max(1, tokens), chunk)]


def _softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, written over the logits where these are wide enough, and the log-probs of the targets."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    most = logits.amax(-1, keepdim=True)
    of_target = logits.gather(-1, targets[:, None]) - most
    total = logits.sub_(most).exp_().sum(-1, keepdim=True)
    return logits.div_(total), (of_target - total.log()).squeeze(-1)


def summed(logps: Tensor, owners: Tensor, responses: int) -> ResponseLogps:
    """The sums per response of log-probs that belong to the responses `owners`.

    >>> summed(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 0, 2]), 3).sums.tolist()
    [-3.0, 0.0, -4.0]
    """
    sums = torch.zeros(responses, dtype=logps.dtype, device=logps.device).index_add(0, owners, logps)
    return ResponseLogps(sums, torch.bincount(owners, minlength=responses))
