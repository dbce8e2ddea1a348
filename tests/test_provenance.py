"""A checkpoint is known by what it computes with, and not by what lies beside that."""

import pytest

from mmrlhf.provenance import processor_digest

PARTS = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "qwen.tiktoken"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json"),
    *("image_processor_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"),
]
OTHERS = [
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "README.md"),
    *("training.json", "accuracy.json", "trainer_state.json", "all_results.json", "adapter_config.json", "fold.json"),
    *("requirements.txt", "checkpoints/tokenizer.json"),
]


@pytest.fixture
def folder(tmp_path):
    for name in PARTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    return tmp_path


@pytest.mark.parametrize("name", PARTS)
def test_every_file_that_a_processor_is_made_of_counts(folder, name):
    before = processor_digest(folder)
    (folder / name).write_text("other")
    assert processor_digest(folder) != before


@pytest.mark.parametrize("name", OTHERS)
def test_what_lies_beside_it_does_not(folder, name):
    before = processor_digest(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("other")
    assert processor_digest(folder) == before
