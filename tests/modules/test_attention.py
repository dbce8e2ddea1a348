"""Attention over shared prefixes is attention with the whole mask, and ordinary batches are computed as ever."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface

from mmrlhf.batches import Continuation, pack, visible
from mmrlhf.modules import attention
from mmrlhf.modules.attention import NAME, attend, shared_prefixes

from .test_scorer import KINDS, WAYS, distance, fresh, laid_out, one_thread, ours, queries, scored  # noqa: F401

KERNELS = ("auto", "together", "apart", "dense")
CPU = torch.device("cpu")
QUERIES = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 6), min_size=1, max_size=5).map(tuple)),
    min_size=1,
    max_size=3,
)


def seen(lengths):
    """(tokens, tokens): what each token of queries laid end to end sees, from the packed rows themselves."""
    ids = [torch.zeros(number, dtype=torch.long) for number in range(10)]
    rows = [
        pack([ids[prefix]], [[Continuation(ids[length], ids[0]) for length in segments]], {}, 0)
        for prefix, segments in lengths
    ]
    return torch.block_diag(*(visible(row.segment_ids)[0, 0].int() for row in rows)).bool()


def drawn(tokens, heads=4, groups=2, width=6, seed=0):
    """Query, key and value of a layer with grouped heads, in double precision."""
    chance = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, tokens, width)] + 2 * [(1, heads // groups, tokens, width)]
    return [torch.randn(shape, generator=chance, dtype=torch.float64).requires_grad_() for shape in shapes]


def by_hand(query, key, value, mask, scaling):
    """Softmax over what is seen, (1, tokens, heads, width)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (torch.cat([each[:, head // groups :][:, :1] for head in range(4)], 1) for each in (key, value))
    weights = (query @ key.transpose(-1, -2) * scaling).masked_fill(~mask, -math.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


@settings(max_examples=8)
@given(lengths=QUERIES)
def test_flex_attention_sees_the_same(lengths):
    mask, scaling = seen(lengths), 0.4
    layer = [each.detach().float() for each in drawn(len(mask))]
    layout = shared_prefixes(lengths, CPU, "flex")
    found, _ = attend(SimpleNamespace(), *layer, None, scaling=scaling, shared_prefix=layout)
    torch.testing.assert_close(found, by_hand(*layer, mask, scaling), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="flex has no dropout"):
        attend(SimpleNamespace(), *layer, None, scaling=scaling, dropout=0.1, shared_prefix=layout)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_last_layer_computes_the_end_of_a_prefix_and_all_segments(kernel):
    lengths, scaling = [(4, (2, 3)), (1, (5,)), (6, (1, 1, 1))], 0.4
    layer = drawn(24)
    layout = shared_prefixes(lengths, CPU, kernel)
    whole, _ = attend(SimpleNamespace(), *layer, None, scaling=scaling, shared_prefix=layout)
    last, _ = attend(SimpleNamespace(), *layer, None, scaling=scaling, shared_prefix=layout._replace(last=True))
    unread = [0, 1, 2, *range(15, 20)]
    read = [column for column in range(24) if column not in unread]
    torch.testing.assert_close(last[:, read], whole[:, read])
    if kernel != "dense":
        assert not last[:, unread].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@settings(max_examples=25)
@given(lengths=QUERIES)
def test_every_kernel_is_attention_with_the_whole_mask(kernel, groups, lengths):
    mask = seen(lengths)
    layer = drawn(len(mask), groups=groups)
    layout = shared_prefixes(lengths, CPU, kernel)
    out, _ = attend(SimpleNamespace(), *layer, None, scaling=0.3, shared_prefix=layout)
    truth = by_hand(*layer, mask, 0.3)
    torch.testing.assert_close(out, truth)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = [torch.autograd.grad((each * weights).sum(), layer) for each in (out, truth)]
    for found, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("lengths", [[(0, (3, 2))], [(4, (0, 2, 0))], [(3, ())], [(2, (1,)), (0, (2,)), (1, (1, 1))]])
def test_prefixes_and_segments_may_be_empty(kernel, lengths):
    mask = seen(lengths)
    layer = drawn(len(mask))
    out, _ = attend(SimpleNamespace(), *layer, None, scaling=0.5, shared_prefix=shared_prefixes(lengths, CPU, kernel))
    torch.testing.assert_close(out, by_hand(*layer, mask, 0.5))


def test_auto_computes_segments_together_while_they_are_half_of_the_prefix():
    blocks = shared_prefixes([(8, (2, 2)), (8, (2, 3)), (8, (4,))], CPU).blocks
    assert [block.mask is None for block in blocks] == [False, True, False]
    assert [(block.start, block.stop) for block in blocks] == [(0, 12), (12, 25), (25, 37)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_mask_is_as_large_as_the_row_unless_it_is_asked_for(kernel):
    layout = shared_prefixes([(40, (9, 9)), (4, (9, 9))], CPU, kernel)
    tokens = layout.blocks[-1].stop
    held = [block.mask.numel() for block in layout.blocks if block.mask is not None]
    assert (layout.everything is not None) == (kernel == "dense")
    assert sum(held) < tokens**2 / 3


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_falls_on_every_part_of_a_row(kernel):
    lengths = [(40, (30, 30)), (150, (30, 30))]
    layer = [torch.ones_like(each) for each in drawn(310)]
    layout = shared_prefixes(lengths, CPU, kernel)
    torch.manual_seed(0)
    out, _ = attend(SimpleNamespace(), *layer, None, dropout=0.5, shared_prefix=layout)
    assert out.mean() == pytest.approx(1, abs=0.05)
    for part in out[0, :, 0, 0].split([40, 30, 30, 150, 30, 30]):
        assert part.std() > 0.03


# As transformers uses it -------------------------------------------------------------------------------------


def test_the_implementation_is_registered_with_its_masks():
    assert AttentionInterface()[NAME] is attend
    assert AttentionMaskInterface()[NAME] is AttentionMaskInterface()["sdpa"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", KINDS)
def test_padded_batches_are_computed_as_with_sdpa(family, side):
    plain, other = fresh(family), ours(family).model.eval()
    rows = queries(family, ("text",))
    fill = plain.config.get_text_config().pad_token_id
    ids = torch.nn.utils.rnn.pad_sequence([row.prefix for row in rows], True, fill, padding_side=side)
    real = [torch.ones(len(row.prefix), dtype=torch.long) for row in rows]
    mask = torch.nn.utils.rnn.pad_sequence(real, True, 0, padding_side=side)
    batch = {"input_ids": ids, "attention_mask": mask}
    batch |= {name: torch.zeros_like(ids) for name in rows[0].per_token}
    with torch.no_grad():
        found, expected = (model(**batch).logits[mask.bool()] for model in (other, plain))
        whole = plain(**{name: value[-1:][:, mask[-1].bool()] for name, value in batch.items()}).logits[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[-len(whole) :], whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", KINDS)
def test_generation_goes_on_as_with_sdpa(family):
    plain, other = fresh(family), ours(family).model.eval()
    row = queries(family, ("image",))[0]
    batch = {"input_ids": row.prefix[None], "attention_mask": torch.ones_like(row.prefix)[None]}
    batch |= row.features | {name: value[None] for name, value in row.per_token.items()}
    said = [
        model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
        for model in (plain, other)
    ]
    assert said[0].shape[1] == len(row.prefix) + 8
    assert said[0].tolist() == said[1].tolist()


@pytest.mark.parametrize("family", KINDS)
def test_its_name_is_not_written_into_a_saved_config(family, tmp_path):
    backbone = ours(family)
    assert backbone.decoder.config._attn_implementation == NAME
    backbone.model.save_pretrained(tmp_path)
    written = [path.read_text() for path in tmp_path.glob("*.json")]
    assert written
    assert not any(NAME in text for text in written)


def test_attention_dropout_works_in_training_and_is_off_in_evaluation():
    family = "qwen2_vl"
    backbone = ours(family)
    rows = laid_out(family, queries(family, ("image",)))
    some = ("some", "auto", "apart")
    sure = {way: scored(backbone, rows, **WAYS[way]) for way in some}
    for layer in backbone.decoder.layers:
        layer.self_attn.attention_dropout = 0.3
    for way in some:
        torch.manual_seed(0)
        first, second = (scored(backbone, rows, **WAYS[way]) for _ in range(2))
        assert all(gradient.isfinite().all() for gradient in first.gradients.values())
        assert (first.sums - second.sums).abs().min() > 1e-3
        torch.manual_seed(0)
        assert distance(scored(backbone, rows, **WAYS[way]), first) == 0
        assert distance(scored(backbone.eval(), rows, **WAYS[way]), sure[way]) < 1e-6
        backbone.train()


def test_the_layout_reaches_every_layer_of_the_decoder_and_none_of_the_tower(monkeypatch):
    layouts = []
    block = attention._block
    monkeypatch.setattr(attention, "_block", lambda *told: layouts.append(told[0]) or block(*told))
    backbone, rows = ours("llava_next"), queries("llava_next", ("image",))
    scored(backbone, laid_out("llava_next", rows), step="shared_prefix")
    assert len(layouts) == len(rows) * len(backbone.decoder.layers)
