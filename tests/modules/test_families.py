"""The table of families says what is where in each model, and refuses what it does not know."""

from __future__ import annotations

import pytest
import transformers as hf

from mmrlhf.modules.families import FAMILIES, family_of, why_not_shared

from .test_scorer import KINDS, SHARING, llava, made

LLAVA = {
    "vision": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.", "model.image_newline"),
    "language": ("model.language_model.", "lm_head."),
}
QWEN = {
    "vision": ("model.visual.patch_embed.", "model.visual.blocks."),
    "projector": ("model.visual.merger.",),
    "language": ("model.language_model.", "lm_head."),
}
IDEFICS = {
    "vision": ("model.vision_model.",),
    "projector": ("model.connector.",),
    "language": ("model.text_model.", "lm_head."),
}
PARTS = dict.fromkeys(KINDS, LLAVA) | dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), QWEN)
PARTS |= dict.fromkeys(("idefics3", "smolvlm"), IDEFICS)
"""How the parameters of each part begin, as the models' own listings have them."""


def test_every_row_of_the_table_is_tested():
    assert set(FAMILIES) == set(KINDS)
    assert all(row.name == name for name, row in FAMILIES.items())


@pytest.mark.parametrize("family", KINDS)
def test_every_parameter_belongs_to_the_part_that_it_is_in(family):
    row = FAMILIES[family]
    names = [name for name, _ in made(family)[0].named_parameters()]
    for part, starts in PARTS[family].items():
        found = {name for name in names if row.part_of(name) == part}
        assert found == {name for name in names if name.startswith(starts)}
        assert found


@pytest.mark.parametrize("family", KINDS)
def test_part_and_decoder_are_told_apart_under_adapters_too(family):
    row = FAMILIES[family]
    for name, _ in made(family)[0].named_parameters():
        assert row.part_of(f"base_model.model.{name}") == row.part_of(name)


@pytest.mark.parametrize("family", KINDS)
def test_every_path_of_a_row_leads_somewhere(family):
    row, (model, _) = FAMILIES[family], made(family)
    assert family_of(model.config) is row
    assert model.model.get_submodule(row.decoder).get_input_embeddings() is model.get_input_embeddings()
    assert model.model.get_submodule(row.vision)
    for medium in row.media:
        assert callable(getattr(model.model, medium.method))
        assert isinstance(getattr(model.config, medium.token), int)


@pytest.mark.parametrize(
    ("config", "named"), [(hf.Blip2Config(), "'blip-2'"), (hf.Qwen2Config(), "'qwen2'"), (object(), "None")]
)
def test_an_unknown_family_is_refused_by_name(config, named):
    with pytest.raises(ValueError, match=f"unknown backbone family {named}; known: gemma3, idefics3, "):
        family_of(config)


# Sharing a prefix --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_prefixes_are_shared_by_all_but_gemma(family):
    reason = "" if family in SHARING else f"in {family} tokens of a picture see later ones"
    assert why_not_shared(made(family)[0].config) == reason


WINDOWED = {
    "a window": (hf.MistralConfig, {"sliding_window": 16}, "its decoder sees a window of 16 tokens"),
    "layers with a window": (
        hf.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        "its decoder has layers of sliding_attention",
    ),
    "another decoder": (hf.Phi3Config, {"bos_token_id": None}, "its decoder (phi3) is not known to be plainly causal"),
}


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_decoder_that_is_not_plainly_causal_shares_none(kind):
    text, options, reason = WINDOWED[kind]
    config = hf.LlavaConfig(text_config=text(**options))
    assert why_not_shared(config) == reason


def test_a_decoder_of_chunks_shares_none():
    config = llava()[0].config
    config.text_config.attention_chunk_size = 64
    assert why_not_shared(config) == "its decoder sees chunks"


@pytest.mark.parametrize(
    "text",
    [
        hf.LlamaConfig(),
        hf.MistralConfig(sliding_window=None),
        hf.Qwen2Config(use_sliding_window=False, sliding_window=16),
        hf.Qwen3Config(),
    ],
)
def test_plainly_causal_decoders_share_prefixes(text):
    assert why_not_shared(hf.LlavaConfig(text_config=text)) == ""
