"""With the tower's states read from disk, log-probs and gradients are those of the tower itself, which rests."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmrlhf.fingerprint import of_file
from mmrlhf.modules.backbone import backbone_of
from mmrlhf.modules.features import Layout, Store, use
from mmrlhf.modules.flops import Cost
from mmrlhf.modules.loading import BackboneConfig, Freeze, Lora, adapted, frozen, load_backbone
from mmrlhf.modules.scorer import ResponseScorer
from mmrlhf.modules.towers import Piece, Tower

from ..datamodules.made import picture, sample
from .queries import batch, samples
from .test_scorer import (
    KINDS,
    fresh,
    made,
    one_thread,  # noqa: F401 - of this file too
)

NUMPY = {"float32": "<f4", "bfloat16": "<i2", "float16": "<f2"}
INSIDE = ("qwen2_vl", "qwen2_5_vl")
"""Families whose projector is the last part of the tower."""


def backbone(family, freeze=Freeze()):  # noqa: B008 - frozen
    return frozen(backbone_of(fresh(family)), freeze)


def shown(family):
    return batch(made(family)[1], samples(KINDS[family])).rows


def store(folder, tower, features, dtype="float32"):
    """Features by a writer of its own, which computes every piece apart."""
    tower.learn(features)
    pieces = tower.pieces(features)
    with torch.no_grad():
        found = {piece.key: tower.states([piece])[0] for piece in pieces}
    folder.mkdir(parents=True)
    index, start = [], 0
    with (folder / "states.bin").open("wb") as file:
        for key, states in found.items():
            index.append((key, start, states.shape[1]))
            start += states.numel()
            kept = states.to(getattr(torch, dtype))
            kept = kept.view(torch.int16) if dtype == "bfloat16" else kept
            file.write(kept.numpy().astype(NUMPY[dtype]).tobytes())
    rows = np.array(sorted(index), [("key", "S16"), ("start", "<i8"), ("rows", "<i4")])
    np.save(folder / "index.npy", rows)
    width = next(iter(found.values())).shape[-1]
    layout = {"dtype": dtype, "states": tower.names, "width": width, "pieces": len(index), "numbers": start}
    told = {"layout": layout, "index": of_file(folder / "index.npy")}
    (folder / "layout.json").write_text(json.dumps(told))
    tower.fingerprint.write(folder / "states.bin")
    return folder


@pytest.fixture
def kept(tmp_path):
    """A folder of features of the ordinary queries of a family."""
    return lambda family, dtype="float32": store(
        tmp_path / "features", Tower(backbone(family)), shown(family).features, dtype
    )


def step(of, rows):
    """Log-probs, and the gradient of some function of them to everything that is trained."""
    sums = ResponseScorer(of)(rows).sums
    weights = torch.linspace(-1, 1, len(sums))
    of.zero_grad(set_to_none=True)
    (sums * weights).sum().backward()
    return sums.detach(), {name: weight.grad for name, weight in of.model.named_parameters() if weight.requires_grad}


def error(found, expected):
    """The largest relative error of log-probs, and of all gradients together."""
    (sums, grads), (sums_, grads_) = found, expected
    assert grads.keys() == grads_.keys()
    apart = sum(float((grads[name] - grads_[name]).square().sum()) for name in grads) ** 0.5
    return float((sums - sums_).abs().max() / sums_.abs().max()), apart / norm(grads_.values())


def norm(tensors):
    return sum(float(each.square().sum()) for each in tensors) ** 0.5


# The same numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_log_probs_and_gradients_are_those_of_the_tower_and_the_tower_rests(family, kept):
    live, rows = backbone(family).train(), shown(family)
    expected = step(live, rows)
    reading, called = backbone(family).train(), []
    use(reading, kept(family))
    tower = Tower(reading).module
    for name, part in tower.named_modules():
        if name and not name.startswith("merger"):
            part.register_forward_hook(lambda module, *_: called.append(module))
    found = step(reading, rows)
    assert called == []
    assert max(error(found, expected)) < 2e-6
    projector = [grad for name, grad in found[1].items() if reading.family.part_of(name) == "projector"]
    assert norm(projector) > 1e-3 * norm(found[1].values())
    assert reading.model.state_dict().keys() == live.model.state_dict().keys()


@pytest.mark.parametrize(("dtype", "least", "most"), [("float16", 1e-6, 3e-3), ("bfloat16", 1e-4, 2e-2)])
def test_a_shorter_type_costs_as_much_as_its_rounding(dtype, least, most, kept):
    expected = step(backbone("llava_onevision"), shown("llava_onevision"))
    reading = backbone("llava_onevision")
    use(reading, kept("llava_onevision", dtype))
    assert least < max(error(step(reading, shown("llava_onevision")), expected)) < most


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_a_batch_of_other_pictures_together_finds_the_same_states(family, kept):
    folder = kept(family)
    reading, live = backbone(family), backbone(family)
    use(reading, folder)
    for case in samples(KINDS[family])[::-1]:
        rows = batch(made(family)[1], [case]).rows
        assert max(error(step(reading, rows), step(live, rows))) < 2e-6


@pytest.mark.parametrize("layers", [-1, [-2, 1]])
def test_any_layers_that_a_projector_reads_are_kept(layers, tmp_path):
    def model():
        made_ = fresh("llava_onevision")
        made_.config.vision_feature_layer = layers
        if layers != -1:
            made_.model.multi_modal_projector.linear_1 = torch.nn.Linear(64, 48)
            torch.nn.init.constant_(made_.model.multi_modal_projector.linear_1.weight, 0.01)
            torch.nn.init.zeros_(made_.model.multi_modal_projector.linear_1.bias)
        return frozen(backbone_of(made_), Freeze())

    tower, reading, rows = Tower(model()), model(), shown("llava_onevision")
    use(reading, store(tmp_path / "f", tower, rows.features))
    assert len(tower.names) == (1 if layers == -1 else 2)
    assert max(error(step(reading, rows), step(model(), rows))) < 2e-6


def test_a_policy_with_adapters_reads_them_too(kept):
    folder, rows = kept("internvl"), shown("internvl")
    reading = adapted(backbone_of(fresh("internvl")), Lora(rank=2))
    use(reading, folder)
    live = backbone("internvl")
    assert torch.allclose(ResponseScorer(reading)(rows).sums, ResponseScorer(live)(rows).sums, rtol=2e-6)


def test_a_checkpoint_is_loaded_with_its_features(kept, tmp_path):
    folder, rows = kept("llava_onevision"), shown("llava_onevision")
    made("llava_onevision")[0].save_pretrained(tmp_path / "model")
    for loaded in (
        load_backbone(str(tmp_path / "model"), features=folder),
        BackboneConfig(str(tmp_path / "model"), features=folder).load(),
    ):
        tower = Tower(loaded).module
        tower.encoder.register_forward_hook(lambda *_: pytest.fail("the tower computes"))
        ResponseScorer(loaded)(rows)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])
def test_a_batch_with_kept_features_costs_what_it_costs_without_pictures(family, kept):
    live, reading = backbone(family), backbone(family)
    use(reading, kept(family))
    shown_ = batch(made(family)[1], samples(KINDS[family]))
    blind = shown_._replace(rows=shown_.rows._replace(features={}))
    for again in (False, True):
        without = Cost(live).work(blind, True, again)
        assert Cost(reading).work(shown_, True, again) == without
        assert Cost(live).work(shown_, True, again).flops > without.flops


def test_shapes_know_of_kept_features_and_do_not_read_them(tmp_path):
    made("llava_onevision")[0].save_pretrained(tmp_path / "model")
    config = BackboneConfig(str(tmp_path / "model"), features=tmp_path / "nowhere")
    assert config.shapes().tower_kept
    assert not replace(config, features=None).shapes().tower_kept
    with pytest.raises(ValueError, match=r"features: expected a frozen vision tower, got .* leave .*nowhere off"):
        replace(config, freeze=Freeze(vision=False)).shapes()


# Keys --------------------------------------------------------------------------------------------------------


def test_a_key_stands_for_all_that_a_tower_is_told_of_a_piece():
    pixels = torch.linspace(-1, 1, 96).reshape(8, 12)
    one = pixels.clone()
    one[3, 4] = one[3, 4].nextafter(torch.tensor(2.0))
    mask = torch.tensor([True, False])
    pieces = [
        Piece(pixels, None),
        Piece(one, None),
        Piece(pixels.reshape(12, 8), None),
        Piece(pixels.to(torch.float64), None),
        Piece(pixels, torch.tensor([2, 4])),
        Piece(pixels, torch.tensor([4, 2])),
        Piece(pixels, mask),
        Piece(pixels, ~mask),
    ]
    assert len({piece.key for piece in pieces}) == len(pieces)
    assert Piece(pixels.T.contiguous().T, None).key == pieces[0].key


@pytest.mark.parametrize("family", ["llava_onevision", "idefics3", "qwen2_vl"])
def test_pieces_are_counted_as_the_tower_gets_them_and_padding_is_none(family):
    of, rows, got = backbone(family), shown(family), []
    tower = Tower(of)
    tower.module.register_forward_pre_hook(lambda _, args, told: got.append((args, told)), with_kwargs=True)
    of.embed(rows)
    arrived = [args[0] if args else told["pixel_values"] for args, told in got]
    pieces = tower.pieces(rows.features)
    assert torch.equal(
        torch.cat([piece.pixels.reshape(-1) for piece in pieces]), torch.cat([a.flatten() for a in arrived])
    )
    if family not in INSIDE:
        assert len(pieces) == sum(map(len, arrived))


def test_a_picture_of_which_only_the_mask_differs_has_other_states():
    tower = Tower(backbone("idefics3"))
    pixels, mask = torch.randn(2, 3, 28, 28), torch.ones(2, 4, 4, dtype=torch.bool)
    mask[1, :, 2:] = False
    pixels[1] = pixels[0]
    pieces = tower.pieces_of((), {"pixel_values": pixels, "patch_attention_mask": mask, "return_dict": True})
    tower.names = ("last_hidden_state",)
    one, other = tower.states(pieces)
    assert pieces[0].key != pieces[1].key
    assert not torch.allclose(one, other, atol=1e-3)


# Refusals ----------------------------------------------------------------------------------------------------


def test_missing_pieces_are_an_error_that_counts_them(kept):
    reading = backbone("llava_onevision")
    use(reading, kept("llava_onevision"))
    new = sample("new", [[picture(99, (80, 30))]])
    rows = batch(made("llava_onevision")[1], [new, *samples(["image"])]).rows
    of_new, of_all = 3, 3 + 5 + 5  # an overview each, and two, four and four tiles
    with pytest.raises(ValueError, match=rf"expected all {of_all} tiles and frames of a batch, {of_new} are missing"):
        ResponseScorer(reading)(rows)


@pytest.mark.parametrize("freeze", [Freeze(vision=False), Freeze(vision=False, also=("layers.0",))])
def test_a_tower_that_is_trained_reads_nothing(freeze, kept):
    with pytest.raises(ValueError, match=r"expected a frozen vision tower, got [0-9]+ parts.*freeze.vision"):
        use(backbone("llava_onevision", freeze), kept("llava_onevision"))


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])
def test_another_tower_is_refused_and_another_projector_or_decoder_is_not(family, kept):
    folder = kept(family)
    for part in ("projector", "language", "vision"):
        other = backbone(family)
        weight = [weight for _, weight in other.part(part)][-1]
        with torch.no_grad():
            weight.flatten()[0].add_(1e-3)
        if part == "vision":
            with pytest.raises(ValueError, match="features was made with another tower"):
                use(other, folder)
        else:
            use(other, folder)


def test_another_layer_config_or_type_is_refused(kept):
    folder = kept("llava_onevision")
    for change, named in (
        (lambda model: setattr(model.config, "vision_feature_layer", -2), "another layer"),
        (lambda model: setattr(model.config.vision_config, "layer_norm_eps", 1e-3), "another tower_config"),
        (lambda model: model.to(torch.bfloat16), "another weights"),
    ):
        model = fresh("llava_onevision")
        change(model)
        with pytest.raises(ValueError, match=named):
            use(frozen(backbone_of(model), Freeze()), folder)


def test_a_tower_that_is_told_more_is_refused():
    tower = Tower(backbone("llava"))
    with pytest.raises(ValueError, match=r"CLIPVision.* is told image_sizes; leave features off"):
        tower.pieces_of((torch.zeros(1, 3, 28, 28),), {"image_sizes": torch.tensor([[28, 28]])})


def cut(folder):
    states = (folder / "states.bin").read_bytes()
    (folder / "states.bin").write_bytes(states[:-1])


def turned(folder):
    np.save(folder / "index.npy", np.load(folder / "index.npy")[::-1])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "expected index.npy and states.bin as layout.json tells"),
        (turned, "expected index.npy and states.bin as layout.json tells"),
        (lambda folder: (folder / "layout.json").unlink(), "found no layout.json"),
        (lambda folder: (folder / "layout.json").write_text("{}"), "layout.json: expected what lies in it"),
        (lambda folder: (folder / "states.bin.fingerprint.json").unlink(), "tells what it was made from"),
    ],
)
def test_a_folder_that_was_changed_is_refused(harm, message, kept):
    folder = kept("llava")
    harm(folder)
    with pytest.raises(ValueError, match=message):
        use(backbone("llava"), folder)


def test_states_that_do_not_fit_a_type_are_refused():
    states = torch.tensor([1.0, 7e4])
    for dtype in ("float32", "bfloat16"):
        assert len(Layout(dtype, ("last",), 2, 1, 2).raw(states)) == (8 if dtype == "float32" else 4)
    with pytest.raises(ValueError, match="finite states, got others as float16"):
        Layout("float16", ("last",), 2, 1, 2).raw(states)


def test_a_key_beyond_the_last_and_before_the_first_is_not_found(kept):
    folder = kept("llava")
    keys = np.load(folder / "index.npy")["key"].tolist()
    found = Store(folder).find([b"\xff" * 16, *keys, b"\0" * 16])
    assert found.tolist() == [-1, *range(len(keys)), -1]
