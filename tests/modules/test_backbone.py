"""Backbones come from checkpoints of known families only, train what they should, and encode media once."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from mmrlhf.modules.backbone import backbone_of
from mmrlhf.modules.loading import Freeze, frozen, load_backbone
from mmrlhf.modules.scorer import ResponseScorer

from .test_families import PARTS
from .test_scorer import (
    KINDS,
    SHARING,
    WAYS,
    Found,
    equal,
    expected,
    fresh,
    laid_out,
    made,
    one_thread,  # noqa: F401 - of this file too
    ours,
    queries,
    scored,
    ways,
    weighed,
)

LARGE = 10**6


def kept(family, folder):
    """The checkpoint as a folder, without its processor."""
    made(family)[0].save_pretrained(folder)
    return str(folder)


def trained(backbone):
    return {name for name, weight in backbone.model.named_parameters() if weight.requires_grad}


# Loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_a_checkpoint_comes_from_its_folder_as_it_was_saved(family, tmp_path):
    backbone = load_backbone(kept(family, tmp_path), freeze=Freeze(vision=False))
    assert backbone.family.name == family
    assert type(backbone.model) is type(made(family)[0])
    assert backbone.config.model_type == family
    weights = made(family)[0].state_dict()
    assert backbone.model.state_dict().keys() == weights.keys()
    assert all(weight.equal(weights[name]) for name, weight in backbone.model.state_dict().items())
    assert equal(scored(backbone.train(), laid_out(family, queries(family))), expected(family))


@pytest.mark.parametrize(("dtype", "wanted"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_have_the_type_that_is_asked_for(dtype, wanted, tmp_path):
    half = fresh("llava").to(torch.float16)
    half.save_pretrained(tmp_path)
    assert {weight.dtype for weight in load_backbone(str(tmp_path), dtype=dtype).parameters()} == {wanted}
    assert {weight.dtype for weight in load_backbone(kept("llava", tmp_path)).parameters()} == {torch.float32}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_tower_attends_as_it_is_told_and_the_decoder_over_shared_prefixes(attention, tmp_path):
    backbone = load_backbone(kept("llava_onevision", tmp_path), vision_attention=attention)
    assert backbone.whole.model.vision_tower.config._attn_implementation == attention
    assert backbone.decoder.config._attn_implementation == "shared_prefix"


@pytest.mark.parametrize(("config", "named"), [(hf.Blip2Config(), "blip-2"), (hf.Qwen2Config(), "qwen2")])
def test_an_unknown_family_is_refused_before_weights_are_looked_for(config, named, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"unknown backbone family '{named}'; known: "):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "a" * 39, "A" * 40, "a" * 41])
def test_code_of_a_checkpoint_runs_only_if_it_is_of_one_commit(revision, tmp_path):
    with pytest.raises(ValueError, match=r"trust_remote_code: expected a revision that is a commit"):
        load_backbone(kept("llava", tmp_path), revision=revision, trust_remote_code=True)


def test_code_of_a_checkpoint_does_not_run_unasked(tmp_path):
    kept("llava", tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    told = (tmp_path / "config.json").read_text()
    mapped = '{"auto_map": {"AutoConfig": "theirs.Config", "AutoModelForImageTextToText": "theirs.Model"},'
    (tmp_path / "config.json").write_text(told.replace("{", mapped, 1))
    assert load_backbone(str(tmp_path)).family.name == "llava"
    assert not ran.exists()


def test_weights_that_must_be_unpickled_are_refused(tmp_path):
    kept("llava", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(made("llava")[0].state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"expected weights as \*\.safetensors, found none"):
        load_backbone(str(tmp_path))


def test_a_name_that_is_no_folder_is_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"checkpoint 'nobody/nothing': neither a folder here nor to be had"):
        load_backbone("nobody/nothing")


# What is trained ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize(
    ("freeze", "left"),
    [
        (Freeze(), ("projector", "language")),
        (Freeze(vision=False), ("vision", "projector", "language")),
        (Freeze(language=True), ("projector",)),
        (Freeze(vision=False, projector=True, language=True), ("vision",)),
        (Freeze(projector=True), ("language",)),
    ],
)
def test_exactly_the_parts_that_are_not_frozen_are_trained(family, freeze, left):
    backbone = frozen(backbone_of(fresh(family)), freeze)
    starts = tuple(start for part in left for start in PARTS[family][part])
    names = [name for name, _ in made(family)[0].named_parameters()]
    assert trained(backbone) == {name for name in names if name.startswith(starts)}


def test_the_tower_alone_is_frozen_unless_it_is_told_otherwise(tmp_path):
    backbone = load_backbone(kept("llava", tmp_path))
    starts = (*PARTS["llava"]["projector"], *PARTS["llava"]["language"])
    assert trained(backbone) == {name for name, _ in made("llava")[0].named_parameters() if name.startswith(starts)}


def test_further_parameters_are_frozen_by_patterns_of_their_names():
    backbone = frozen(backbone_of(fresh("llava")), Freeze(also=(r"embed_tokens", r"layers\.0\.")))
    left = trained(backbone)
    assert "model.language_model.layers.1.mlp.up_proj.weight" in left
    assert not any("embed_tokens" in name or "layers.0." in name for name in left)
    again = trained(frozen(backbone, Freeze()))
    assert left < again
    assert all("embed_tokens" in name or "language_model.layers.0." in name for name in again - left)


@pytest.mark.parametrize("freeze", [Freeze(True, True, True), Freeze(also=("",))])
def test_freezing_everything_is_refused(freeze):
    with pytest.raises(ValueError, match=r"freeze: expected something left to train, got Freeze\("):
        frozen(backbone_of(fresh("llava")), freeze)


@pytest.mark.parametrize("freeze", [Freeze(), Freeze(vision=False, language=True)])
@pytest.mark.parametrize("family", KINDS)
def test_after_a_backward_every_trained_parameter_has_a_gradient_and_no_frozen_one(family, freeze):
    backbone = ours(family, freeze=freeze)
    for kinds in (None, ("text",)):
        backbone.zero_grad()
        said = ResponseScorer(backbone)(laid_out(family, queries(family, kinds)))
        weighed(said.sums).backward()
        grads = {name: weight.grad for name, weight in backbone.model.named_parameters() if weight.grad is not None}
        assert grads.keys() == trained(backbone)
        truth = expected(family, kinds)
        truth = truth._replace(gradients={name: truth.gradients[name] for name in grads})
        if any(gradient is not None and gradient.any() for gradient in truth.gradients.values()):
            assert equal(Found(said.sums.detach(), said.tokens.tolist(), grads), truth)
        else:
            assert not any(gradient.any() for gradient in grads.values())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_activations_that_are_computed_again_give_the_same_gradients(family, tmp_path):
    backbone = load_backbone(kept(family, tmp_path), freeze=Freeze(vision=False), activation_checkpointing=True).train()
    calls = []
    backbone.decoder.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    for way in ways(family):
        before = len(calls)
        assert equal(scored(backbone, laid_out(family, queries(family)), **WAYS[way]), expected(family))
        at_once = WAYS[way].get("rows_at_once")
        parts = 1 if at_once is None else -(-len(expected(family).sums) // at_once)
        assert len(calls) - before >= 2 * parts
    before = len(calls)
    scored(ours(family), laid_out(family, queries(family)))
    with torch.no_grad():
        ResponseScorer(backbone)(laid_out(family, queries(family)))
    assert len(calls) == before + 1


# Media -------------------------------------------------------------------------------------------------------


def watched(model, tower):
    """Notes how many numbers each call of the tower is given."""
    calls = []

    def note(module, args, kwargs):
        calls.append((args[0] if args else kwargs.get("pixel_values", kwargs.get("hidden_states"))).numel())

    model.model.get_submodule(tower).register_forward_pre_hook(note, with_kwargs=True)
    return calls


@pytest.mark.parametrize("way", ["some", "auto"])
@pytest.mark.parametrize("family", KINDS)
def test_media_are_encoded_once_for_all_responses(family, way):
    backbone, rows = ours(family), queries(family)
    plain = fresh(family)
    calls, each = watched(backbone.whole, backbone.family.vision), watched(plain, backbone.family.vision)
    scored(backbone, laid_out(family, rows), **WAYS[way if way in ways(family) else "separate"])
    for row in rows:
        ids = row.prefix[None]
        types = {name: value[None] for name, value in row.per_token.items()}
        with torch.no_grad():
            plain(input_ids=ids, attention_mask=torch.ones_like(ids), **row.features, **types)
    named = {medium.pixels for medium in backbone.family.media}
    assert len(calls) == len({name for row in rows for name in row.features} & named)
    assert sum(calls) == sum(each)
    assert sum(calls) > 0


@pytest.mark.parametrize("family", KINDS)
def test_features_that_do_not_fit_the_places_are_refused(family):
    backbone, rows = ours(family), laid_out(family, queries(family, ("image",)))
    place = rows.input_ids == backbone.config.image_token_id
    row, column = place.nonzero()[-1]
    fewer = rows.input_ids.clone()
    fewer[row, column] = 0
    number = int(place.sum())
    message = rf"pixel_values: expected features for {number - 1} tokens of media, got {number}; the processor and"
    with pytest.raises(ValueError, match=message):
        backbone.embed(rows._replace(input_ids=fewer))


@pytest.mark.parametrize("family", KINDS)
def test_media_without_pixels_are_refused(family):
    backbone, rows = ours(family), laid_out(family, queries(family, ("image",)))
    with pytest.raises(ValueError, match=r"batch: expected pixel_values for \d+ tokens of media, got none"):
        backbone.embed(rows._replace(features={}))


@pytest.mark.parametrize("family", ["llava_onevision", "gemma3"])
def test_the_token_of_a_medium_may_lie_outside_of_the_embeddings(family):
    backbone, rows = ours(family), laid_out(family, queries(family))
    old = backbone.config.image_token_id
    backbone.config.image_token_id = LARGE
    ids = rows.input_ids.masked_fill(rows.input_ids == old, LARGE)
    assert (ids == LARGE).any()
    types = {name: value.clone() for name, value in rows.per_token.items()}
    got = scored(backbone, rows._replace(input_ids=ids, per_token=types))
    assert equal(got, expected(family))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "gemma3"])
def test_types_of_tokens_that_are_needed_and_missing_are_named(family):
    backbone, rows = ours(family), laid_out(family, queries(family, ("image",)))
    with pytest.raises(ValueError, match=rf"batch: expected {backbone.family.token_types} for every token, got "):
        scored(backbone, rows._replace(per_token={}))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_of_three_kinds_go_on_behind_the_prefix_for_every_segment(family):
    backbone, rows = ours(family), queries(family)
    batch = laid_out(family, rows)
    found = backbone.positions(batch)
    assert found.shape == (3, *batch.input_ids.shape)
    for number, row in enumerate(rows):
        start = len(row.prefix)
        for place, (_, supervised) in enumerate(row.continuations, start=1):
            whole = torch.cat([row.prefix, supervised])[None]
            types = torch.cat([row.per_token["mm_token_type_ids"], torch.zeros(len(supervised), dtype=torch.long)])
            grids = {name: value for name, value in row.features.items() if "grid" in name}
            alone = made(family)[0].model.get_rope_index(whole, types[None], **grids)[0][:, 0]
            assert found[:, number, :start].equal(alone[:, :start])
            assert found[:, number, batch.segment_ids[number] == place].equal(alone[:, start:])
    assert (found[0] != found[2]).any()


@pytest.mark.parametrize("family", [family for family in SHARING if "qwen" not in family])
def test_other_positions_are_those_of_the_packed_rows(family):
    batch = laid_out(family, queries(family))
    assert ours(family).positions(batch) is batch.position_ids


# Roles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_the_roles_of_a_backbone_are_the_models_own_parts(family):
    backbone = ours(family)
    assert backbone.whole is backbone.model
    assert backbone.head is backbone.model.get_output_embeddings()
    assert backbone.decoder.get_input_embeddings() is backbone.model.get_input_embeddings()
    parts = [name for part in ("vision", "projector", "language") for name, _ in backbone.part(part)]
    assert sorted(parts) == sorted(name for name, _ in backbone.model.named_parameters())


def test_a_model_that_is_trained_as_a_whole_has_no_reference_and_a_frozen_one_is_its_own():
    backbone = ours("llava")
    with pytest.raises(ValueError, match=r"backbone: expected adapters to switch off"):
        backbone.reference()
    backbone.requires_grad_(False)
    with backbone.reference():
        pass


@pytest.mark.parametrize("mode", ["evaluation", "no gradients"])
def test_nothing_is_added_outside_of_training(mode):
    backbone, rows = ours("llava"), laid_out("llava", queries("llava", ("text",)))
    backbone.train(mode != "evaluation")
    with torch.set_grad_enabled(mode == "evaluation"):
        embeds = backbone.embed(rows)
    words = backbone.model.get_input_embeddings()
    assert embeds.equal(words(rows.input_ids))
    assert embeds.requires_grad == (mode == "evaluation")
    if embeds.requires_grad:
        reached = torch.autograd.grad(embeds.sum(), list(backbone.parameters()), allow_unused=True)
        assert sum(gradient is not None for gradient in reached) == 1
