"""Packing: every continuation of a row is computed as if it stood alone behind the prefix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrlhf.batches import IGNORED, PADDING, PREFIX, Continuation, pack, visible

TOKENS = st.lists(st.integers(1, 50), max_size=5)
SEGMENTS = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=4)
ROWS = st.lists(st.tuples(TOKENS, SEGMENTS), min_size=1, max_size=3)


def tensor(tokens):
    return torch.tensor(tokens, dtype=torch.long)


def packed(rows):
    continuations = [[Continuation(tensor(a), tensor(b)) for a, b in segments] for _, segments in rows]
    return pack([tensor(prefix) for prefix, _ in rows], continuations, {}, pad=0)


@given(ROWS)
def test_what_a_token_sees_is_the_prefix_and_its_own_segment_so_far(rows):
    batch = packed(rows)
    may = visible(batch.segment_ids)[:, 0]
    for number, (prefix, segments) in enumerate(rows):
        at = len(prefix)
        for given_ids, told in segments:
            alone = prefix + given_ids + told
            for place in range(len(given_ids) + len(told)):
                seen = may[number, at + place].nonzero().flatten()
                assert batch.input_ids[number, seen].tolist() == alone[: len(prefix) + place + 1]
                assert batch.position_ids[number, seen].tolist() == list(range(len(prefix) + place + 1))
            at += len(given_ids) + len(told)


@given(ROWS)
def test_only_what_is_supervised_has_a_label_and_padding_sees_itself_alone(rows):
    batch = packed(rows)
    for number, (_, segments) in enumerate(rows):
        labels = batch.labels[number]
        assert labels[labels != IGNORED].tolist() == [token for _, told in segments for token in told]
        padding = batch.segment_ids[number] == PADDING
        alone = visible(batch.segment_ids)[number, 0][padding]
        assert alone.sum(1).eq(1).all()
    assert (batch.segment_ids >= PREFIX).sum() == sum(
        len(prefix) + sum(len(a) + len(b) for a, b in segments) for prefix, segments in rows
    )


def test_rows_and_continuations_must_match():
    with pytest.raises(ValueError, match="1 prefixes for 0 rows"):
        pack([tensor([1])], [], {}, pad=0)


def test_a_packed_row_has_the_hidden_states_and_the_gradient_of_separate_rows():
    """Against the same transformers model run once per (prefix, continuation)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ).double()
    prefix = tensor([5, 6, 7])
    segments = [Continuation(tensor([8, 9]), tensor([10, 11, 12])), Continuation(tensor([13]), tensor([14]))]
    batch = pack([prefix], [segments], {}, pad=0)
    together = model.model(
        input_ids=batch.input_ids, attention_mask=visible(batch.segment_ids), position_ids=batch.position_ids
    ).last_hidden_state[0]
    at = len(prefix)
    apart = []
    for segment in segments:
        ids = torch.cat([prefix, *segment])[None]
        apart.append(model.model(input_ids=ids).last_hidden_state[0, len(prefix) :])
    separate = torch.cat(apart)
    assert torch.allclose(together[at:], separate, atol=1e-6)
    weight = torch.randn_like(separate)
    names = dict(model.model.named_parameters())
    one = torch.autograd.grad((together[at:] * weight).sum(), list(names.values()), retain_graph=True)
    two = torch.autograd.grad((separate * weight).sum(), list(names.values()))
    for name, a, b in zip(names, one, two, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name
