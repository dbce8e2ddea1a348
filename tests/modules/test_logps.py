"""Log-probs of tokens are those of the whole softmax, and the logits of a whole row never exist."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmrlhf.modules.logps import summed, token_logps
from mmrlhf.modules.scorer import ResponseScorer

from .families import WIDTH
from .test_scorer import WAYS, fresh, laid_out, one_thread, ours, queries, scored, ways  # noqa: F401

CHUNK = 7


def drawn(tokens, dtype=torch.float64, width=5, words=11):
    """States, a head and targets."""
    chance = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, width, generator=chance, dtype=dtype).requires_grad_()
    head = torch.nn.Linear(width, words, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(words, width, generator=chance, dtype=dtype))
    return states, head, torch.randint(words, (tokens,), generator=chance)


@pytest.mark.parametrize("chunk", [1, 3, 6, 7, 100])
def test_log_probs_and_gradients_are_those_of_the_softmax(chunk):
    states, head, targets = drawn(7)
    found = token_logps(states, head, targets, chunk)
    expected = head(states).softmax(-1)[torch.arange(7), targets].log()
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    sides = [torch.autograd.grad((each * weights).sum(), (states, head.weight)) for each in (found, expected)]
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chunk", [2, 7])
def test_softmax_runs_in_single_precision_where_the_model_has_less(chunk):
    states, head, targets = drawn(7, torch.bfloat16)
    found = token_logps(states, head, targets, chunk)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, head(states).float().log_softmax(-1)[torch.arange(7), targets])
    assert token_logps(*drawn(7), chunk).dtype == torch.float64


def test_logits_of_any_size_have_log_probs():
    states = torch.eye(3) * 3e4
    head = torch.nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3))
    assert token_logps(states, head, torch.tensor([0, 1, 0]), 2).tolist() == [0, 0, -3e4]


def test_without_gradients_nothing_is_kept():
    states, head, targets = drawn(7)
    expected = token_logps(states, head, targets, 7)
    with torch.no_grad():
        assert torch.equal(token_logps(states, head, targets, 2), expected)
    assert not token_logps(states.detach(), head.requires_grad_(False), targets, 2).requires_grad


def kept_for_backward(scored):
    """The shapes of what is kept for the backward pass; what is computed again is not."""
    shapes = []

    def note(tensor):
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scored()
    return shapes


def test_logits_of_several_chunks_are_not_kept_for_the_backward_pass():
    states, head, targets = drawn(7)
    assert (3, 11) not in kept_for_backward(lambda: token_logps(states, head, targets, 3))
    assert (7, 11) in kept_for_backward(lambda: token_logps(states, head, targets, 7))


def test_some_rows_at_once_keep_no_attention_of_all():
    backbone, rows = ours("llava"), laid_out("llava", queries("llava"))
    kept = {
        number: sum(
            shape.numel()
            for shape in kept_for_backward(partial(ResponseScorer(backbone, "separate", rows_at_once=number), rows))
        )
        for number in (None, 3)
    }
    assert kept[3] < kept[None] / 2


def test_a_response_without_tokens_has_a_sum_of_zero():
    said = summed(torch.tensor([-1.0, -2.0, -4.0, -8.0]), torch.tensor([3, 0, 3, 3]), 5)
    assert said.sums.tolist() == [-2.0, 0.0, 0.0, -13.0, 0.0]
    assert said.tokens.tolist() == [1, 0, 0, 3, 0]


# Memory ------------------------------------------------------------------------------------------------------


class Logits(TorchDispatchMode):
    """Notes of every tensor as wide as the vocabulary how many rows it has; the head's own weight is none."""

    def __init__(self, words):
        super().__init__()
        self.words, self.rows = words, {0}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if (
                isinstance(each, torch.Tensor)
                and each.shape[-1:] == (self.words,)
                and each.shape != (WIDTH, self.words)
            ):
                self.rows.add(each.numel() // self.words)
        return out


@pytest.mark.parametrize("family", ["llava_onevision", "gemma3"])
def test_the_logits_of_a_row_never_exist(family):
    backbone, rows = ours(family), laid_out(family, queries(family))
    words = len(backbone.head.weight)
    for way in ways(family, ("separate", "some", "auto")):
        with Logits(words) as made:
            got = scored(backbone, rows, **WAYS[way] | {"chunk": CHUNK})
        assert sum(got.tokens) > 20 * CHUNK
        assert max(made.rows) == CHUNK


def test_the_watch_on_logits_sees_those_of_an_ordinary_forward():
    ids = torch.zeros(1, 29, dtype=torch.long)
    model = fresh("llava_onevision")
    with Logits(len(model.lm_head.weight)) as made:
        model(input_ids=ids)
    assert max(made.rows) == 29
