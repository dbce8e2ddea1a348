"""Log-probs of tokens are those of the whole softmax, and the logits of a whole row never exist."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmrlhf.modules import logps
from mmrlhf.modules.logps import summed, token_logps
from mmrlhf.modules.scorer import ResponseScorer

from .families import WIDTH
from .test_scorer import WAYS, fresh, laid_out, one_thread, ours, queries, scored, ways  # noqa: F401

CHUNK = 7


def drawn(tokens, dtype=torch.float64, width=5, words=11):
    """States, the weight of a head and targets."""
    chance = torch.Generator().manual_seed(0)
    states, weight = (
        torch.randn(rows, width, generator=chance, dtype=torch.float64).to(dtype).requires_grad_()
        for rows in (tokens, words)
    )
    return states, weight, torch.randint(words, (tokens,), generator=chance)


def by_softmax(states, weight, targets):
    """The same through the whole softmax."""
    logits = states @ weight.t()
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)[range(len(targets)), targets]


@pytest.mark.parametrize("chunk", [1, 3, 6, 7, 100])
def test_log_probs_and_gradients_are_those_of_the_softmax(chunk):
    states, weight, targets = drawn(7)
    found, expected = token_logps(states, weight, targets, chunk), by_softmax(states, weight, targets)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    sides = [torch.autograd.grad((each * weights).sum(), (states, weight)) for each in (found, expected)]
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(lambda *given: token_logps(*given, targets, chunk), (states, weight))


@pytest.mark.parametrize("chunk", [2, 7])
def test_softmax_runs_in_single_precision_where_the_model_has_less(chunk):
    states, weight, targets = drawn(7, torch.bfloat16)
    found, expected = token_logps(states, weight, targets, chunk), by_softmax(states, weight, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert token_logps(*drawn(7), chunk).dtype == torch.float64
    for one, other in zip(
        *(torch.autograd.grad(each.sum(), (states, weight)) for each in (found, expected)), strict=True
    ):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("chunk", [2, 7])
def test_under_autocast_logits_have_its_type_in_both_passes(chunk):
    states, weight, targets = drawn(7, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = token_logps(states, weight, targets, chunk), by_softmax(states, weight, targets)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, by_softmax(states, weight, targets))
    for one, other in zip(
        *(torch.autograd.grad(each.sum(), (states, weight)) for each in (found, expected)), strict=True
    ):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_what_is_frozen_gets_no_gradient_and_the_graph_can_be_used_twice():
    states, weight, targets = drawn(7)
    (expected,) = torch.autograd.grad(by_softmax(states, weight, targets).sum(), states)
    found = token_logps(states, weight.detach(), targets, 7)
    for _ in range(2):
        (once,) = torch.autograd.grad(found.sum(), states, retain_graph=True)
        torch.testing.assert_close(once, expected)
    (expected,) = torch.autograd.grad(by_softmax(states, weight, targets).sum(), weight)
    (found,) = torch.autograd.grad(token_logps(states.detach(), weight, targets, 2).sum(), weight)
    torch.testing.assert_close(found, expected)


def test_no_tokens_have_no_log_probs_and_a_gradient_of_zero():
    states, weight, targets = drawn(0)
    found = token_logps(states, weight, targets, 3)
    assert found.shape == (0,)
    of_states, of_weight = torch.autograd.grad(found.sum(), (states, weight))
    assert of_states.shape == (0, 5)
    assert not of_weight.any()


def test_logits_of_any_size_have_log_probs():
    states, weight = torch.eye(3) * 3e4, torch.eye(3)
    assert token_logps(states, weight, torch.tensor([0, 1, 0]), 2).tolist() == [0, 0, -3e4]


def kept_for_backward(scored):
    """The shapes of what is kept for the backward pass; what is computed again is not."""
    shapes = []

    def note(tensor):
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scored()
    return shapes


@pytest.mark.parametrize(("chunk", "kept"), [(3, 0), (7, 1)])
def test_logits_of_several_chunks_are_not_kept_for_the_backward_pass(monkeypatch, chunk, kept):
    made, softmax = [], logps._softmax

    def watched(*given):
        probs, logp = softmax(*given)
        made.append(weakref.ref(probs))
        return probs, logp

    monkeypatch.setattr(logps, "_softmax", watched)
    states, weight, targets = drawn(7)
    found = token_logps(states, weight, targets, chunk)
    assert sum(each() is not None for each in made) == kept
    with torch.no_grad():
        assert torch.equal(token_logps(states, weight, targets, chunk), found)
    assert sum(each() is not None for each in made) == kept


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
