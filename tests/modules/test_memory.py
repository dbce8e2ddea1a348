"""What a training needs, against what torch keeps of a decoder, and against arithmetic by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers as hf

from mmrlhf.modules.attention import shared_prefixes
from mmrlhf.modules.backbone import backbone_of
from mmrlhf.modules.loading import Freeze, frozen
from mmrlhf.modules.memory import Batches, Estimate, estimate
from mmrlhf.modules.packed import _read
from mmrlhf.ranks import Layout

from .families import BUILD

BATCHES = Batches(tokens=1000, global_batch=16, micro_batch=1, steps=10, mean_tokens=700.0)
TEXT = {"hidden_size": 128, "intermediate_size": 680, "num_hidden_layers": 6, "num_attention_heads": 8}


def body(layers=6, **text):
    """A backbone with more layers than the others of the tests, of which a decoder alone is big."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**vision, image_size=28, patch_size=7, vision_use_head=False),
        text_config=hf.Qwen2Config(**TEXT | {"num_key_value_heads": 2, "vocab_size": 500} | text),
        image_grid_pinpoints=[[28, 28]],
        tie_word_embeddings=False,
    )
    return frozen(backbone_of(hf.LlavaOnevisionForConditionalGeneration(config)), Freeze()).model, config


def kept(model, lengths, mixed):
    """Bytes that torch keeps of a forward of the decoder for the backward pass, but for weights."""
    backbone = backbone_of(model.train())
    layout = shared_prefixes([lengths], torch.device("cpu"))
    prefix, segments = lengths
    places = torch.cat([torch.arange(prefix), *(torch.arange(prefix, prefix + length) for length in segments)])[None]
    embeds = torch.randn(1, places.shape[1], model.config.get_text_config().hidden_size, requires_grad=True)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    shapes = {weight.shape for weight in model.parameters() if weight.ndim >= 2}
    shapes |= {shape[::-1] for shape in shapes}
    seen, alive = {}, []

    def pack(values):
        if values.untyped_storage().data_ptr() not in weights and values.shape not in shapes:
            seen[values.untyped_storage().data_ptr()] = values.untyped_storage().nbytes()
            alive.append(values)  # or its place would be given to another
        return values

    watched = torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values)
    with watched, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        _read(backbone, embeds, places, layout)
    return sum(seen.values())


@pytest.mark.parametrize("lengths", [(300, (60, 60, 60, 60)), (40, (100, 120, 140))])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_decoder_keeps_what_is_estimated(lengths, mixed):
    model, _ = body()
    tokens = lengths[0] + sum(lengths[1])
    batches = dataclasses.replace(BATCHES, tokens=tokens)
    found = estimate(backbone_of(model), Layout(mixed=mixed), batches).activations
    assert found == pytest.approx(kept(model, lengths, mixed), rel=0.15)


def test_a_decoder_that_computes_again_keeps_the_inputs_of_its_layers():
    model, _ = body()
    batches = dataclasses.replace(BATCHES, tokens=540)
    more, less = (
        estimate(backbone_of(model), Layout(), dataclasses.replace(batches, again=again)) for again in (False, True)
    )
    model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    of_inputs = kept(model, (300, (60, 60, 60, 60)), mixed=False)
    behind = 2 * 540 * 128 * 4  # what the norm behind the last layer keeps
    assert less.activations == pytest.approx(of_inputs - behind, rel=0.15)
    assert less.activations < more.activations / 10
    working = 5 * 540 * 4 * 680
    assert less.beginning == pytest.approx(4 * 500 * 128 + more.activations / 6 + working)
    assert more.beginning == 4 * 500 * 128 + working > 4 * 500 * 128 + more.logits


def test_weights_gradients_and_states_are_counted():
    model, _ = body()
    backbone = backbone_of(model)
    every = sum(weight.numel() for weight in model.parameters())
    learned = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert learned < every
    alone = estimate(backbone, Layout(), BATCHES)
    assert (alone.parameters, alone.trained) == (every, learned)
    assert (alone.weights, alone.gradients, alone.optimiser) == (4 * every, 4 * learned, 8 * learned)
    shards = estimate(backbone, Layout(8, "sharded", replicas=2), BATCHES)
    assert (shards.weights, shards.gradients, shards.optimiser) == (every, learned, 2 * learned)
    copies = estimate(backbone, Layout(8, "ddp"), BATCHES)
    assert copies.weights == alone.weights
    assert alone.logits == 512 * 500 * 4
    mixed = estimate(backbone, Layout(mixed=True), BATCHES)
    assert mixed.logits == 512 * 500 * (2 + 4) + 2 * 500 * 128  # and the head in bfloat16
    few = estimate(backbone, Layout(mixed=True), dataclasses.replace(BATCHES, tokens=100))
    assert few.beginning == 4 * 500 * 128 + max(100 * 500 * (6 + 4) + 2 * 500 * 128, 5 * 100 * 2 * 680)


def test_two_layers_and_all_that_is_in_none_are_whole_at_once():
    model, _ = body()
    layer = sum(weight.numel() for weight in model.model.language_model.layers[0].parameters())
    others = [model.lm_head, model.model.language_model.embed_tokens, model.model.language_model.norm]
    others += [model.model.multi_modal_projector]
    apart = sum(weight.numel() for part in others for weight in part.parameters()) + model.model.image_newline.numel()
    tower = [w for n, w in model.model.vision_tower.named_parameters() if ".layers." not in n]
    still = sum(weight.numel() for weight in tower)
    found = estimate(backbone_of(model), Layout(2, "sharded", mixed=True), BATCHES)
    assert found.gathered == 2 * (apart + still) + 2 * 2 * layer
    assert found.beginning == 2 * 500 * 128 + (2 + 4) * layer + 5 * 1000 * 2 * 680
    assert found.ending == 2 * (apart + still) + (2 + 4) * apart
    alone = estimate(backbone_of(model), Layout(), BATCHES)
    assert (alone.gathered, alone.ending) == (0, 4 * 500 * 128)
    assert estimate(backbone_of(model), Layout(mixed=True), BATCHES).gathered == pytest.approx(2 * 6 * layer, rel=0.01)


def test_states_between_layers_have_the_type_of_the_embeddings_as_they_are_gathered():
    alone, shards, fine = (
        estimate(backbone_of(body()[0]), layout, BATCHES).activations
        for layout in (Layout(mixed=True), Layout(2, "sharded", mixed=True), Layout(2, "sharded"))
    )
    assert alone - shards == 1000 * 6 * 2 * 2 * 128  # two sums per layer, in float32 or in bfloat16
    assert fine == estimate(backbone_of(body()[0]), Layout(), BATCHES).activations
    coarse = backbone_of(body()[0].to(torch.bfloat16))
    assert estimate(coarse, Layout(mixed=True), BATCHES).activations == shards


def test_weights_in_the_memory_of_the_host_take_no_place_on_a_gpu():
    model, _ = body()
    there, away = (
        estimate(backbone_of(model), Layout(2, "sharded", offload=offload), BATCHES) for offload in (False, True)
    )
    kept = there.weights + there.gradients + there.optimiser
    assert away.moments["forward"] == pytest.approx(there.moments["forward"] - kept)
    assert away.moments["step"] == 0
    assert ("weights (host)", f"{away.weights / 2**20:.1f} MiB") in away.rows()


def test_what_does_not_fit_is_refused_with_what_would_help():
    model, _ = body()
    found = estimate(backbone_of(model), Layout(), BATCHES)
    found.require_fits(int(found.device / 0.92) + 1)
    with pytest.raises(ValueError, match=r"needs about \d+\.\d MiB; shard over more ranks .*activation_checkpointing"):
        found.require_fits(int(found.device / 0.92) - 1)


SMALL = Estimate(
    Layout(),
    dataclasses.replace(BATCHES, global_batch=1),
    parameters=1,
    trained=1,
    weights=4.0,
    gradients=4.0,
    optimiser=8.0,
    gathered=1.0,
    activations=1.0,
    logits=1.0,
    beginning=2.0,
    ending=1.0,
    stepping=4.0,
)


@pytest.mark.parametrize(
    ("parts", "highest", "told"),
    [
        ({}, 20.0, "in the optimiser's step"),
        ({"activations": 5.0}, 23.0, "at the end of the forward pass"),
        ({"beginning": 9.0}, 23.0, "at the beginning of the backward pass"),
        ({"ending": 6.0}, 22.0, "at the end of the backward pass"),
    ],
)
def test_the_highest_moment_counts(parts, highest, told):
    found = dataclasses.replace(SMALL, **parts)
    assert found.device == highest
    assert dict(found.rows())["per device"].endswith(f", the most, {told}")


def test_gradients_that_stay_from_one_micro_batch_to_the_next_are_there_in_the_backward_pass():
    alone = SMALL.moments["backward"]
    accumulated = dataclasses.replace(SMALL, batches=dataclasses.replace(BATCHES, global_batch=2))
    assert accumulated.moments["backward"] == alone + 4
    assert dataclasses.replace(SMALL, layout=Layout(1, "ddp")).moments["backward"] == alone + 4


def test_the_rows_tell_steps_and_tokens():
    model, _ = body()
    rows = dict(estimate(backbone_of(model), Layout(4, "sharded"), BATCHES).rows())
    assert rows["steps"] == "10 of 4 micro-batches per rank"
    assert rows["tokens"] == "112,000"
    assert rows["ranks"] == "4, sharded"
    assert rows["shards"] == "4 in 1 replicas"


@pytest.mark.parametrize("family", BUILD)
def test_every_family_is_estimated(family):
    backbone = backbone_of(BUILD[family]()[0])
    found = estimate(backbone, Layout(), dataclasses.replace(BATCHES, patches=64))
    assert found.activations > estimate(backbone, Layout(), BATCHES).activations > 0
