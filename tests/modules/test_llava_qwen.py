"""Every tensor of the authors' checkpoint has its place in ours, and nothing else gets through."""

from __future__ import annotations

import pytest
import transformers as hf

from mmrlhf.modules.llava_qwen import CHAT, renamed, require_same_arithmetic

from .families import WIDTH, built

TOWER = "model.vision_tower.vision_tower.vision_model"
KNOWN = {
    "lm_head.weight": "lm_head.weight",
    "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "model.layers.1.mlp.gate_proj.weight": "model.language_model.layers.1.mlp.gate_proj.weight",
    "model.norm.weight": "model.language_model.norm.weight",
    "model.image_newline": "model.image_newline",
    "model.mm_projector.0.weight": "model.multi_modal_projector.linear_1.weight",
    "model.mm_projector.2.bias": "model.multi_modal_projector.linear_2.bias",
    f"{TOWER}.encoder.layers.0.mlp.fc1.bias": "model.vision_tower.encoder.layers.0.mlp.fc1.bias",
    "rm_head.dense.weight": "reward_head.dense.weight",
    "rm_head.dense.bias": "reward_head.dense.bias",
    "rm_head.out_proj.weight": "reward_head.out.weight",
    "rm_head.out_proj.bias": "reward_head.out.bias",
}
"""As the weights on the hub are called, and as they must be called here."""
THEIRS = {name: (2, place + 1) for place, name in enumerate(KNOWN)}
OURS = {KNOWN[name]: shape for name, shape in THEIRS.items()}


def test_every_tensor_gets_our_name_and_is_accounted_for():
    computed = ("model.layers.0.self_attn.rotary_emb.inv_freq", f"{TOWER}.embeddings.position_ids")
    names, ledger = renamed(THEIRS | dict.fromkeys(computed, (4,)), OURS)
    assert names == KNOWN
    assert ledger.as_dict()["in"] == 14
    assert ledger.as_dict()["out"] == 12
    assert ledger.skipped == {"computed": 2}
    assert set(ledger.first["computed"]) == set(computed)


def test_a_tower_with_one_more_module_around_it_is_found_too():
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): shape for name, shape in OURS.items()}
    names, _ = renamed(THEIRS, older)
    assert set(names.values()) == set(older)


def test_every_tensor_of_the_family_has_a_name_of_theirs():
    model, _ = built("llava_onevision")
    inner = {name for name, _ in model.named_parameters()}
    assert {name.split(".")[1] for name in inner} == {name.split(".")[1] for name in KNOWN.values()} - {
        "dense",
        "out",
    }


@pytest.mark.parametrize("name", KNOWN)
def test_a_tensor_that_is_not_there_is_named(name):
    left = {other: shape for other, shape in THEIRS.items() if other != name}
    with pytest.raises(ValueError, match=rf"12 tensors .* 1 missing \({KNOWN[name]}\)"):
        renamed(left, OURS)


def test_a_checkpoint_without_a_head_is_refused():
    left = {name: shape for name, shape in THEIRS.items() if not name.startswith("rm_head")}
    with pytest.raises(ValueError, match=r"expected a reward head .*, got none among 8 tensors; this is a policy"):
        renamed(left, OURS)


@pytest.mark.parametrize(
    "name",
    [
        "rm_head.out.weight",
        "rm_head.dense2.weight",
        "score.weight",
        "model.layers.2.mlp.gate_proj.weight",
        "model.mm_projector.1.weight",
        "model.vision_resampler.weight",
        "model.language_model.norm.weight",
        "reward_head.dense.weight",
        "inv_freq.weight",
    ],
)
def test_a_tensor_that_we_have_no_place_for_is_named(name):
    with pytest.raises(ValueError, match=rf"12 tensors .* 1 unexpected \({name}\)"):
        renamed(THEIRS | {name: (2, 2)}, OURS)


def test_shapes_are_compared_and_faults_of_all_kinds_are_told_at_once():
    wrong = {"model.norm.weight": (4, 2), "rm_head.out_proj.bias": (3,)}
    with pytest.raises(
        ValueError, match=r"2 misshapen \(model.norm.weight \(4, 2\) instead of \(2, 4\), rm_head"
    ) as one:
        renamed(THEIRS | wrong, OURS)
    assert "missing" not in str(one.value)
    many = {f"extra.{number}": (1,) for number in range(9)}
    fewer = {name: shape for name, shape in (THEIRS | wrong | many).items() if name != "lm_head.weight"}
    with pytest.raises(
        ValueError, match=r"1 missing .* 9 unexpected \(extra.0, extra.1, extra.2, \.\.\.\); 2 misshapen"
    ):
        renamed(fewer, OURS)


# What shapes do not show -------------------------------------------------------------------------------------

TEXT = hf.Qwen2Config(num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, hidden_size=WIDTH)
TOLD = {
    "hidden_act": "silu",
    "num_attention_heads": 4,
    "num_hidden_layers": TEXT.num_hidden_layers,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
}


def test_a_decoder_that_computes_the_same_is_taken():
    require_same_arithmetic(TOLD | {"vocab_size": 7, "is_rm": True}, TEXT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "gelu"),
        ("num_attention_heads", 8),
        ("num_hidden_layers", 1),
        ("num_key_value_heads", 4),
        ("rms_norm_eps", 1e-5),
        ("rope_theta", 1e6),
        ("use_sliding_window", True),
        ("rope_theta", None),
    ],
)
def test_a_decoder_that_computes_otherwise_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} {value}, not "):
        require_same_arithmetic(TOLD | {name: value}, TEXT)


def test_stretched_positions_are_refused():
    stretched = hf.Qwen2Config(
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    )
    with pytest.raises(ValueError, match=r"with plain rotary positions; got .*linear"):
        require_same_arithmetic(TOLD, stretched)


# The chat template -------------------------------------------------------------------------------------------


def rendered(*messages, **options):
    _, processor = built("llava_onevision")
    return processor.apply_chat_template(list(messages), chat_template=CHAT, tokenize=False, **options)


def turn(role, *parts):
    content = [{"type": kind} if kind != "text" else {"type": kind, "text": text} for kind, text in parts]
    return {"role": role, "content": content}


def test_turns_are_laid_out_as_in_their_training():
    asked = turn("user", ("image", ""), ("text", "Judge "), ("text", "it."))
    assert rendered(asked, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nJudge it.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered(turn("system", ("text", "Be strict.")), turn("user", ("video", "")), turn("assistant")) == (
        "<|im_start|>system\nBe strict.<|im_end|>\n"
        "<|im_start|>user\n<video>\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    )
