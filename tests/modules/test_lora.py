"""Adapters are trained alike on every way, are off in the reference, and are saved as peft saves them."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel

from mmrlhf.modules.backbone import backbone_of
from mmrlhf.modules.loading import Lora, adapted, load_backbone
from mmrlhf.modules.scorer import ResponseScorer

from .test_scorer import (
    KINDS,
    WAYS,
    alone,
    equal,
    expected,
    fresh,
    laid_out,
    made,
    one_thread,  # noqa: F401 - of this file too
    queries,
    scored,
    together,
    ways,
)

LORA = Lora(rank=3, alpha=6)


def stirred(backbone):
    """The backbone with adapters that do something, as after training."""
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in backbone.model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.2, generator=chance)
    return backbone


def with_adapters(family, lora=LORA):
    return stirred(adapted(backbone_of(fresh(family)), lora).train())


def as_transformers_computes_it(backbone):
    """A copy whose decoder attends as it would without us."""
    model = copy.deepcopy(backbone.model)
    getattr(model.get_base_model().model, backbone.family.decoder).set_attn_implementation("sdpa")
    return model


@pytest.mark.parametrize("family", KINDS)
def test_gradients_of_adapters_are_those_of_peft_and_the_familys_own_forward(family):
    backbone, rows = with_adapters(family), queries(family)
    truth = alone(as_transformers_computes_it(backbone), rows)
    assert all("lora_" in name for name in truth.gradients)
    for way in ways(family, ("some", "auto")):
        got = scored(backbone, laid_out(family, rows), **WAYS[way])
        assert all(gradient is not None for gradient in got.gradients.values())
        assert equal(got, truth)


@pytest.mark.parametrize("family", KINDS)
def test_every_linear_layer_of_the_decoder_and_no_other_has_an_adapter(family):
    backbone = with_adapters(family)
    layers = backbone.decoder.config.num_hidden_layers
    names = [name for name, weight in backbone.model.named_parameters() if weight.requires_grad]
    assert len(names) == 2 * 7 * layers
    assert all(f".{backbone.family.decoder}.layers." in name for name in names)
    assert backbone.whole.config.model_type == family
    assert backbone.whole is backbone.model.get_base_model()


def test_adapters_are_put_where_they_are_asked_for():
    backbone = with_adapters("llava", Lora(rank=5, alpha=5, dropout=0.1, layers="q_proj|v_proj"))
    weights = {name: weight for name, weight in backbone.model.named_parameters() if weight.requires_grad}
    assert len(weights) == 2 * 2 * 2
    assert all("q_proj" in name or "v_proj" in name for name in weights)
    assert {weight.shape[0] for name, weight in weights.items() if "lora_A" in name} == {5}
    settings = backbone.model.peft_config["default"]
    assert (settings.lora_alpha, settings.lora_dropout) == (5, 0.1)


@pytest.mark.parametrize("family", KINDS)
def test_the_reference_is_the_model_without_adapters(family):
    backbone, rows = with_adapters(family), laid_out(family, queries(family))
    scorer = ResponseScorer(backbone)
    with torch.no_grad(), backbone.reference():
        without = scorer(rows).sums
    torch.testing.assert_close(without, expected(family).sums, rtol=1e-5, atol=1e-3)
    with torch.no_grad():
        assert (scorer(rows).sums - without).abs().max() > 0.1


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_new_adapters_change_nothing(family):
    backbone = adapted(backbone_of(fresh(family)), LORA)
    sums = scored(backbone, laid_out(family, queries(family))).sums
    torch.testing.assert_close(sums, expected(family).sums, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("family", KINDS)
def test_adapters_are_saved_as_peft_reads_them(family, tmp_path):
    backbone, rows = with_adapters(family), queries(family)
    backbone.model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not any(name.startswith("model") for name in names)
    assert "shared_prefix" not in (tmp_path / "adapter_config.json").read_text()
    again = PeftModel.from_pretrained(fresh(family), tmp_path).eval()
    sums = alone(again.requires_grad_(True), rows[:2]).sums
    torch.testing.assert_close(sums, scored(backbone, laid_out(family, rows[:2])).sums, rtol=1e-5, atol=1e-3)
    assert (sums - expected(family).sums[: len(sums)]).abs().max() > 0.1


def test_adapters_come_with_a_checkpoint_that_is_loaded(tmp_path):
    made("llava")[0].save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), lora=LORA, activation_checkpointing=True).train()
    assert all("lora_" in name for name, weight in backbone.named_parameters() if weight.requires_grad)
    calls = []
    backbone.decoder.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    rows = queries("llava")
    truth = alone(as_transformers_computes_it(stirred(backbone)), rows)
    calls.clear()
    for number, way in enumerate(("auto", "dense", "separate"), start=1):
        assert equal(scored(backbone, laid_out("llava", rows), **WAYS[way]), truth)
        assert len(calls) == 2 * number


def test_adapters_on_bfloat16_weights_round_alike_on_every_way(tmp_path):
    made("llava_onevision")[0].save_pretrained(tmp_path)
    rows = laid_out("llava_onevision", queries("llava_onevision"))
    truth = scored(with_adapters("llava_onevision"), rows, step="separate")
    backbone = stirred(load_backbone(str(tmp_path), dtype="bfloat16", lora=LORA).train())
    off = {way: together(scored(backbone, rows, **WAYS[way]), truth) for way in ("separate", "auto")}
    assert 1e-3 < off["separate"] < 0.2
    assert off["auto"] < 1.5 * off["separate"]
