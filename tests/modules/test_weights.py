"""A checkpoint that is built empty and filled part by part is, to the bit, the one that transformers loads."""

from __future__ import annotations

import gc
import json
import re
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter

from mmrlhf.modules import weights
from mmrlhf.modules.backbone import backbone_of
from mmrlhf.modules.loading import BackboneConfig, Lora, load_backbone
from mmrlhf.modules.weights import Weights, empty_model

from .families import BUILD, TIED, built, saved

NAME = "llava_onevision"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return lambda family: root / family if (root / family).exists() else saved(family, root / family)


def tensors(model):
    """All parameters, those that are tied by each of their names, and all buffers."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def same(one, other):
    assert one.keys() == other.keys()
    pairs = [(one[name], other[name]) for name in one]
    return all(
        left.dtype == right.dtype and left.requires_grad == right.requires_grad and torch.equal(left, right)
        for left, right in pairs
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", BUILD)
def test_what_is_filled_is_what_transformers_loads(folders, family, dtype):
    model = empty_model(folders(family), dtype, "sdpa", trust_remote_code=False)
    assert all(weight.is_meta for weight in model.parameters())
    files = Weights(model, folders(family))
    body = backbone_of(model)
    for layer in body.layers(body.decoder):
        files.fill(layer)
    assert {weight.is_meta for layer in body.layers(body.decoder) for weight in layer.parameters()} == {False}
    assert body.head.weight.is_meta  # nothing is read before it is asked for
    files.fill(body)
    plain = AutoModelForImageTextToText.from_pretrained(folders(family), dtype=dtype, attn_implementation="sdpa")
    assert same(tensors(model), tensors(plain))
    assert (body.head.weight is body.whole.get_input_embeddings().weight) == (family in TIED)
    assert {model.config.get_text_config()._attn_implementation} == {"shared_prefix"}


@pytest.mark.parametrize("family", BUILD)
def test_layers_are_all_that_the_config_tells_and_the_read_ones_have_gradients(family):
    body = backbone_of(built(family)[0])
    vision = body.config.vision_config
    assert len(body.layers(body.decoder)) == body.config.get_text_config().num_hidden_layers
    depth = getattr(vision, "num_hidden_layers", None) or vision.depth
    assert len(body.layers(body.tower)) == depth
    assert len(body.read_layers) == (depth - 1 if family == "llava_next" else depth)


def new_names(folder, target):
    """The checkpoint under the names that the model's own parts have, in two files; saved, it has those of the hub."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    renamed = {}
    for name, values in load_file(folder / "model.safetensors").items():
        inside = "model." + re.sub(r"^language_model\.model\.", "language_model.", name)
        renamed[inside.replace("model.language_model.lm_head", "lm_head")] = values
    assert "model.language_model.layers.0.mlp.up_proj.weight" in renamed
    half = sorted(renamed)[: len(renamed) // 2]
    parts = [{name: renamed[name] for name in half}, {name: renamed[name] for name in renamed if name not in half}]
    (target / "model.safetensors").unlink()
    places = {}
    for number, part in enumerate(parts, 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(part, target / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return target


def test_other_names_in_several_files_are_understood(folders, tmp_path):
    folder = new_names(folders(NAME), tmp_path / "new")
    body, files = BackboneConfig(str(folder)).empty()
    files.fill(body)
    plain = load_backbone(str(folder))
    assert all(torch.equal(values, tensors(built(NAME)[0])[name]) for name, values in tensors(plain.model).items())
    assert same(tensors(body.model), tensors(plain.model))


def changed(folder, target, change):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    known = load_file(target / "model.safetensors")
    change(known)
    save_file(known, target / "model.safetensors", {"format": "pt"})
    return BackboneConfig(str(target))


def test_a_weight_that_is_missing_is_named_before_any_is_read(folders, tmp_path):
    config = changed(folders(NAME), tmp_path / "less", lambda known: known.pop("language_model.lm_head.weight"))
    with pytest.raises(ValueError, match=r"1 are missing, such as lm_head\.weight"):
        config.empty()


def test_a_weight_of_another_shape_is_refused(folders, tmp_path):
    def cut(known):
        known["language_model.lm_head.weight"] = known["language_model.lm_head.weight"][:-1].contiguous()

    body, files = changed(folders(NAME), tmp_path / "cut", cut).empty()
    with pytest.raises(ValueError, match="of different checkpoints"):
        files.fill(body)


def test_weights_that_are_made_of_others_are_refused(folders, monkeypatch):
    rule = WeightConverter("q_proj", "fused", operations=[Concatenate(dim=0)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [rule])
    with pytest.raises(ValueError, match="save the checkpoint once"):
        BackboneConfig(str(folders(NAME))).empty()


def test_adapters_start_alike_whether_their_weights_are_there_yet(folders):
    lora = Lora(rank=3, seed=5)
    config = BackboneConfig(str(folders(NAME)), lora=lora)
    torch.manual_seed(0)
    one = config.load()
    torch.manual_seed(1)
    other, files = config.empty()
    adapters = {name for name, weight in other.named_parameters() if weight.requires_grad}
    assert {name for name, weight in other.named_parameters() if not weight.is_meta} == adapters
    files.fill(other)
    assert same(tensors(one.model), tensors(other.model))


def test_adapters_start_as_peft_lets_them(folders):
    first, second = (
        dict(load_backbone(str(folders(NAME)), lora=lora).named_parameters())
        for lora in (Lora(rank=8, seed=0), Lora(rank=8, seed=1))
    )
    into = [name for name in first if "lora_A" in name]
    assert all(not first[name].any() for name in first if "lora_B" in name)
    for name in into:  # uniform within one over the root of its inputs
        bound = first[name].shape[1] ** -0.5
        assert 0.8 * bound < first[name].abs().max() <= bound
        assert abs(float(first[name].detach().std()) / (bound / 3**0.5) - 1) < 0.15
        assert not torch.equal(first[name], second[name])
    assert len({round(float(first[name].detach().sum()), 6) for name in into}) == len(into)


def test_adapters_with_activations_computed_again_leave_the_tower_alone(folders):
    body = load_backbone(str(folders(NAME)), lora=Lora(rank=2), activation_checkpointing=True)
    embeds = body.whole.get_input_embeddings()(torch.tensor([[5, 6]]))
    assert not embeds.requires_grad


def test_what_is_sharded_does_not_stay_whole(folders):
    body, files = BackboneConfig(str(folders(NAME))).empty()
    layer = body.layers(body.decoder)[0]
    files.fill(layer)
    whole = weakref.ref(layer.mlp.up_proj.weight)
    layer.mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(1))
    gc.collect()
    assert whole() is None


def test_files_are_opened_once(folders, monkeypatch):
    opened = []
    real = weights.safe_open
    monkeypatch.setattr(weights, "safe_open", lambda *args, **told: opened.append(args) or real(*args, **told))
    body, files = BackboneConfig(str(folders(NAME))).empty()
    files.fill(body)
    assert len(opened) == 2  # once for the names
