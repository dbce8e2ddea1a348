"""A reward model in the authors' layout gives the same rewards from our folder as by its own forward."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from mmrlhf.convert import convert_reward
from mmrlhf.images import decode
from mmrlhf.modules.rewardmodel import RewardModel
from mmrlhf.queries import Media, Query

from .datamodules.made import picture
from .modules.families import TEXT, WIDTH, built, saved
from .modules.test_scorer import one_thread  # noqa: F401 - of this file too

FAMILY = "llava_onevision"
REQUEST = "Say how good it is.\n\n[Question]:\n{question}\n[Answer]:\n{response}\n[Evaluation]:\n"
SHOWN = Query("q", "What is shown?", (Media("image", "a.png"),))
SAID = ("A red square.", "Nothing at all")
CRITIQUES = ("It is right.", "No, it is not.")
OPEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nSay how good it is.\n\n"
    "[Question]:\nWhat is shown?\n[Answer]:\n{response}\n[Evaluation]:<|im_end|>\n<|im_start|>assistant\n"
)
"""The same request as their code writes it: one text."""
BEHIND = "<|im_end|>\n"
"""What a critique is followed by, up to the token whose state is read."""
PADDING = 23
"""Rows of its embeddings that the body has and the checkpoint has not."""


def renamed_as_theirs(name):
    """A tensor's name in a checkpoint of LLaVA's own code, from its name in transformers."""
    name = re.sub(r"^model\.language_model\.", "model.", name)
    name = re.sub(r"^model\.vision_tower\.(vision_model\.)?", "model.vision_tower.vision_tower.vision_model.", name)
    for ours, theirs in (("linear_1", "0"), ("linear_2", "2")):
        name = name.replace(f"model.multi_modal_projector.{ours}", f"model.mm_projector.{theirs}")
    return name


def head_by_chance():
    """Four tensors of a head, as their code names them."""
    chance = torch.Generator().manual_seed(7)
    shapes = {
        "dense.weight": (WIDTH, WIDTH),
        "dense.bias": (WIDTH,),
        "out_proj.weight": (1, WIDTH),
        "out_proj.bias": (1,),
    }
    return {f"rm_head.{name}": torch.randn(shape, generator=chance) / 3 for name, shape in shapes.items()}


TOLD = {
    "model_type": "llava_qwen",
    "architectures": ["LlavaQwenForCausalLM"],
    "is_rm": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
} | {name: TEXT[name] for name in ("num_attention_heads", "num_hidden_layers", "num_key_value_heads")}


@pytest.fixture
def tensors():
    """What their checkpoint holds."""
    model, _ = built(FAMILY)
    return {renamed_as_theirs(name): weight.clone() for name, weight in model.state_dict().items()} | head_by_chance()


def keep(tensors, folder, told=TOLD, shards=2):
    """Their checkpoint as files, in so many shards."""
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)
    for number in range(shards):
        part = {name: tensors[name].contiguous() for name in names[number::shards]}
        save_file(part, folder / f"model-{number + 1:05}-of-{shards:05}.safetensors")
    (folder / "config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """The body as the hub has it: more rows of embeddings, another chat template; its weights are of no use."""
    folder = tmp_path_factory.mktemp("body")
    model, processor = built(FAMILY)
    config = hf.LlavaOnevisionConfig.from_dict(model.config.to_dict())
    config.text_config.vocab_size += PADDING
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    return folder


@pytest.fixture
def request_file(tmp_path):
    path = tmp_path / "judge.txt"
    path.write_text(REQUEST)
    return path


@pytest.fixture
def convert(tmp_path, body, request_file):
    """Convert a checkpoint that is kept first, and tell where to."""

    def run(tensors, **options):
        source = keep(tensors, tmp_path / "theirs", options.pop("told", TOLD), options.pop("shards", 2))
        given = {"body": str(body), "template": request_file, "out": tmp_path / "judge"} | options
        convert_reward(str(source), **given)
        return given["out"]

    return run


def by_their_forward(tensors, text):
    """The reward of a conversation, as one text, by the family's forward and a head written out."""
    model, processor = built(FAMILY)
    fed = processor(text=[text], images=[[decode(picture(1)).image]], return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        state = model(**fed, output_hidden_states=True).hidden_states[-1][0, -1]
    inner = torch.tanh(tensors["rm_head.dense.weight"] @ state + tensors["rm_head.dense.bias"])
    return (tensors["rm_head.out_proj.weight"] @ inner + tensors["rm_head.out_proj.bias"]).item()


def shown(medium, frames):
    return decode(picture(1)).image


# The same numbers --------------------------------------------------------------------------------------------


def test_rewards_are_those_of_their_forward(tensors, convert):
    judge = RewardModel.from_pretrained(convert(tensors))
    without = judge.score_given(SHOWN, SAID, media=shown)
    expected = [by_their_forward(tensors, OPEN.replace("{response}", said)) for said in SAID]
    assert without.tolist() == pytest.approx(expected, abs=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-2
    given = judge.score_given(SHOWN, SAID, CRITIQUES, media=shown)
    whole = [
        OPEN.replace("{response}", said) + critique + BEHIND for said, critique in zip(SAID, CRITIQUES, strict=True)
    ]
    assert given.tolist() == pytest.approx([by_their_forward(tensors, text) for text in whole], abs=1e-5)


def test_every_tensor_arrives_as_it_was_and_in_the_type_that_it_had(tensors, convert):
    halves = {
        name: weight.to(torch.float16 if name.startswith("rm_head") else torch.bfloat16)
        for name, weight in tensors.items()
    }
    folder = convert(halves)
    arrived = hf.LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert arrived.dtype == torch.bfloat16
    assert arrived.config.text_config.vocab_size == built(FAMILY)[0].config.text_config.vocab_size
    for name, weight in arrived.state_dict().items():
        assert torch.equal(weight, halves[renamed_as_theirs(name)]), name
    head = {
        name: weight for name, weight in load_file(folder / "model.safetensors").items() if name.startswith("reward")
    }
    for name, weight in head.items():
        theirs = name.replace("reward_head", "rm_head").replace(".out.", ".out_proj.")
        assert weight.dtype == torch.float16
        assert torch.equal(weight, halves[theirs])
    assert len(head) == 4


def test_the_folder_says_what_it_was_made_from_and_how_it_is_asked(tensors, convert):
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    judge = RewardModel.from_pretrained(folder := convert(tensors | computed, frames=10))
    assert (judge.judging.template.name, judge.judging.frames) == ("judge", 10)
    assert judge.judging.template.text == REQUEST.rstrip("\n")
    card = (folder / "README.md").read_text()
    assert f"{len(tensors) + 1} in = {len(tensors)} out + 1 skipped (computed 1)" in card
    assert judge.judging.template.digest in card


def test_more_rows_than_tokens_are_kept(tensors, convert):
    """As in the released one, whose vocabulary is filled up."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.ones(5, WIDTH)])
    arrived = hf.LlavaOnevisionForConditionalGeneration.from_pretrained(convert(tensors))
    assert len(arrived.lm_head.weight) == len(tensors["lm_head.weight"])


def test_a_body_with_tied_weights_needs_no_head_of_words(tensors, convert, tmp_path, body):
    config = hf.LlavaOnevisionConfig.from_pretrained(body)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    config.save_pretrained(tied := tmp_path / "tied")
    built(FAMILY)[1].save_pretrained(tied)
    with pytest.raises(ValueError, match=r"1 unexpected \(lm_head.weight\)"):
        convert(tensors, body=str(tied))
    embeddings = tensors["model.embed_tokens.weight"]
    del tensors["lm_head.weight"]
    arrived = hf.LlavaOnevisionForConditionalGeneration.from_pretrained(convert(tensors, body=str(tied)))
    assert torch.equal(arrived.lm_head.weight, embeddings)


# Refused -----------------------------------------------------------------------------------------------------


def without_head(tensors):
    for name in head_by_chance():
        del tensors[name]


def without_a_bias(tensors):
    del tensors["rm_head.out_proj.bias"]


def with_two_outputs(tensors):
    tensors["rm_head.out_proj.weight"] = torch.zeros(2, WIDTH)


def with_a_stranger(tensors):
    tensors["model.vision_resampler.proj.weight"] = torch.zeros(2)


def with_a_short_norm(tensors):
    tensors["model.norm.weight"] = torch.ones(WIDTH - 1)


def with_few_words(tensors):
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].clone()


def with_nan(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_head, r"theirs: expected a reward head .*, got none among 69 tensors; this is a policy"),
        (without_a_bias, r"73 tensors .* 1 missing \(reward_head.out.bias\)"),
        (with_two_outputs, r"1 misshapen \(rm_head.out_proj.weight \(2, 48\) instead of \(1, 48\)\)"),
        (with_a_stranger, r"1 unexpected \(model.vision_resampler.proj.weight\)"),
        (with_a_short_norm, r"1 misshapen \(model.norm.weight \(47,\) instead of \(48,\)\)"),
        (with_few_words, r"embed_tokens.weight: expected a row for each of 345 tokens of the body, got 100"),
        (with_nan, r"expected finite numbers, got others in 1 tensors \(model.language_model.layers.0.mlp.up_proj"),
    ],
)
def test_other_tensors_than_those_of_the_body_and_a_head_are_refused(tensors, convert, change, message, tmp_path):
    change(tensors)
    with pytest.raises(ValueError, match=message):
        convert(tensors)
    assert not (tmp_path / "judge").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Judge it.", r"template 'judge': expected \{question\} and then \{response\}.*got \[\]"),
        ("Q: {question} A: {answer}", r"got \['question', 'answer'\]"),
        ("A: {response} Q: {question}", r"got \['response', 'question'\]"),
    ],
)
def test_a_template_without_its_fields_is_refused(tensors, convert, request_file, text, message):
    request_file.write_text(text)
    with pytest.raises(ValueError, match=message):
        convert(tensors)


def test_a_template_of_the_package_is_not_theirs(tensors, convert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="template: expected a text file with the request to judge, got critique"):
        convert(tensors, template=Path("critique"))
    (tmp_path / "critique").write_text(REQUEST)
    judge = RewardModel.from_pretrained(convert(tensors, template=Path("critique")))
    assert judge.judging.template.text == REQUEST.rstrip("\n")


def test_pickles_are_not_read(tmp_path, body, request_file, tensors):
    source = tmp_path / "theirs"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(TOLD))
    torch.save(tensors, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"theirs: expected weights as \*.safetensors, found none; convert them"):
        convert_reward(str(source), str(body), request_file, tmp_path / "judge")


def test_a_lost_a_doubled_and_a_torn_shard_are_refused(tensors, tmp_path, body, request_file):
    folder = keep(tensors, tmp_path / "theirs", shards=3)
    last, second = (folder / f"model-0000{number}-of-00003.safetensors" for number in (3, 2))
    kept = last.read_bytes()

    def refused(message):
        with pytest.raises(ValueError, match=message):
            convert_reward(str(folder), str(body), request_file, tmp_path / "judge")

    last.unlink()
    refused(
        rf"{len(tensors)} tensors of the body .* {len(tensors) // 3} missing \(.*, \.\.\.\); fetch all of its files"
    )
    last.write_bytes(second.read_bytes())
    refused(r"00003-of-00003.safetensors: expected every tensor once, got .* in model-00002-of-00003.* \(24 in all\)")
    last.write_bytes(kept[:-100])
    refused("00003-of-00003[.]safetensors: expected safetensors, got .*; fetch the file again")


def test_a_decoder_that_computes_otherwise_is_refused(tensors, convert):
    with pytest.raises(
        ValueError, match=r"theirs: expected a configuration that computes .* rope_theta 1000000.0, not 1"
    ):
        convert(tensors, told=TOLD | {"rope_theta": 1e6})


def test_another_body_is_refused(tensors, convert, tmp_path):
    with pytest.raises(ValueError, match="body: expected a llava_onevision, got a qwen2_vl"):
        convert(tensors, body=str(saved("qwen2_vl", tmp_path / "qwen")))


def test_a_body_whose_turns_end_otherwise_is_refused(tensors, convert, body, tmp_path):
    hf.LlavaOnevisionConfig.from_pretrained(body).save_pretrained(other := tmp_path / "other")
    processor = hf.AutoProcessor.from_pretrained(body)
    processor.tokenizer.eos_token = "<|endoftext|>"
    processor.save_pretrained(other)
    with pytest.raises(ValueError, match=r"expected a body whose turns end with <\|im_end\|>, got '<\|endoftext\|>'"):
        convert(tensors, body=str(other))


def test_nothing_is_overwritten_which_is_told_before_anything_is_read(request_file, tmp_path):
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="judge: expected nothing there"):
        convert_reward(str(tmp_path / "none"), str(tmp_path / "none"), request_file, tmp_path / "judge")
    assert (tmp_path / "judge" / "mine.txt").read_text() == "mine"
