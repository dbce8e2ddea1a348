"""What many conversations are answered together, each is answered alone by the family's own `generate`."""

from __future__ import annotations

import functools

import pytest
import torch

from mmrlhf.encoding import Message, encode_prompt
from mmrlhf.modules import answering
from mmrlhf.modules.answering import Answer, Answerer, placed
from mmrlhf.text import mend

from ..datamodules.made import opened, picture
from .queries import FILM, LONG
from .test_scorer import (
    KINDS,
    made,
    one_thread,  # noqa: F401 - of this file too
)
from .test_speaking import media, talkative

MOST = 14
WORDS = ("Hi!", LONG, "Is it red?", f"{LONG} {LONG}", "What <|im_end|> is this?", "no", "Count to ten, please.")


def conversations(kinds):
    """Some of every kind that a family takes, of very different lengths."""
    shown = {
        "text": [(word,) for word in WORDS],
        "image": [(opened(picture(1)), "What is it?"), (opened(picture(2, (40, 40))), LONG)],
        "images": [(opened(picture(3, (80, 30))), "and", opened(picture(4, (30, 70))), "?")],
        "film": [([opened(frame) for frame in FILM], "Does it move?")],
    }
    found = [[Message("user", parts)] for kind in kinds for parts in shown[kind]]
    earlier = [Message("system", ("Be brief.",)), Message("user", ("Hello!",)), Message("assistant", ("Hi.",))]
    return [*found, [*earlier, Message("user", ("And now?",))]]


@functools.cache
def asked(family):
    return conversations(KINDS[family])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Folders of the families' checkpoints, made when first asked for."""

    @functools.cache
    def saved(family):
        folder = tmp_path_factory.mktemp(family)
        talkative(family).save_pretrained(folder)
        made(family)[1].save_pretrained(folder)
        return folder

    return saved


def generated(family, messages):
    """The tokens that `generate` chooses for one conversation alone."""
    model, processor = talkative(family), made(family)[1]
    prompt = encode_prompt(processor, messages)
    ids = prompt.input_ids[None]
    told = {name: value[None] for name, value in prompt.per_token.items()} | prompt.features
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": MOST, "do_sample": False}
    with torch.no_grad():
        out = model.generate(input_ids=ids, **options, suppress_tokens=media(model), **told)
    return out[0, ids.shape[1] :].tolist(), ids.shape[1]


@pytest.mark.parametrize("family", KINDS)
def test_every_answer_is_the_one_that_generate_gives_alone_in_batches_of_any_size(family, folder_of):
    tokenizer = made(family)[1].tokenizer
    alone = [generated(family, messages) for messages in asked(family)]
    texts = [mend(tokenizer.decode(ids, skip_special_tokens=True)).text for ids, _ in alone]
    expected = [
        Answer(text, len(ids), ids[-1] != tokenizer.eos_token_id, length)
        for text, (ids, length) in zip(texts, alone, strict=True)
    ]
    answerer = Answerer(folder_of(family), device="cpu")
    for answerer.at_once in (1, 4, 100):
        assert answerer.answers(asked(family), MOST) == expected
    assert len({answer.tokens for answer in expected}) > 2, "the control: some end earlier than others"
    assert not all(answer.cut for answer in expected)


def test_an_answer_that_ends_with_its_last_token_is_cut_only_before_that(folder_of):
    answerer = Answerer(folder_of("llava"), device="cpu")
    whole = next(answer for answer in answerer.answers(asked("llava"), MOST) if not answer.cut and answer.tokens > 2)
    messages = asked("llava")[answerer.answers(asked("llava"), MOST).index(whole)]
    assert answerer.answers([messages], whole.tokens) == [whole]
    (cut,) = answerer.answers([messages], whole.tokens - 1)
    assert (cut.cut, cut.tokens, cut.text) == (True, whole.tokens - 1, whole.text)
    (shorter,) = answerer.answers([messages], 1)
    assert (shorter.cut, shorter.tokens) == (True, 1)


def test_another_end_that_the_checkpoint_names_ends_an_answer_too(folder_of):
    answerer = Answerer(folder_of("llava"), device="cpu")
    first = {generated("llava", messages)[0][0] for messages in asked("llava")}
    answerer.reader.backbone.whole.generation_config.eos_token_id = list(first)
    assert [answer.tokens for answer in answerer.answers(asked("llava"), MOST)] == [1] * len(asked("llava"))


def test_nothing_asked_is_nothing_answered(folder_of):
    assert Answerer(folder_of("llava"), device="cpu").answers([]) == []


def test_no_memory_names_the_option(folder_of, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    answerer = Answerer(folder_of("llava"), device="cpu")
    monkeypatch.setattr(answering, "Together", full)
    with pytest.raises(ValueError, match=r"at_once: no memory for answers to 2 conversations of \d+ tokens together"):
        answerer.answers(asked("llava")[:2], MOST)


def test_what_cannot_work_is_refused_before_weights_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(answering, "load_backbone", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="at_once: expected 1 or more, got 0"):
        Answerer(tmp_path, at_once=0)
    with pytest.raises(ValueError, match="device: expected auto, cpu, cuda or cuda:N, got 'gpu'"):
        Answerer(tmp_path, device="gpu")
    with pytest.raises(ValueError, match="expected a checkpoint, found no config"):
        Answerer(tmp_path, device="cpu")


def test_the_most_tokens_are_one_or_more(folder_of):
    with pytest.raises(ValueError, match="max_new_tokens: expected 1 or more, got 0"):
        Answerer(folder_of("llava"), device="cpu").answers(asked("llava"), 0)


def test_auto_is_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert placed("auto") == torch.device("cpu") == placed("cpu")
