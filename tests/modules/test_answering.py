"""What many conversations are answered together, each is answered alone by the family's own `generate`."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from mmrlhf.encoding import Message, encode_prompt
from mmrlhf.modules import answering
from mmrlhf.modules.answering import Answer, Answerer, Choosing, Talks, picked, placed
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


# Step by step ------------------------------------------------------------------------------------------------


def followed(talks, said, joining, leaving=()):
    """Let some join and some leave, and note the tokens of a step; what is over is noted as None."""
    found = talks.begin(joining) if joining else []
    found = [*found, *(talks.step(leaving) if talks._groups else [])]
    for key, token, over in found:
        said.setdefault(key, []).append(None if over else token)
    return found


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "gemma3"])
def test_conversations_that_join_and_leave_at_any_step_are_answered_as_generate_answers_them_alone(family, folder_of):
    answerer = Answerer(folder_of(family), device="cpu")
    talks, said, coming = Talks(answerer), {}, dict(enumerate(asked(family)))
    leaver = next(key for key in coming if len(generated(family, coming[key])[0]) == MOST)
    step, widths = 0, []
    while coming or talks._groups:
        some = [coming.popitem() for _ in range(min(len(coming), 1 + step % 2))] if step % 3 != 1 else []
        full = {key for key, ids in said.items() if len(ids) >= MOST}
        full |= {leaver} if len(said.get(leaver, ())) >= 3 else set()
        followed(talks, said, {key: (answerer.read(messages), Choosing()) for key, messages in some}, full)
        widths += [group.memory.labels.shape[1] for group in talks._groups if hasattr(group.memory, "labels")]
        step += 1
    end = made(family)[1].tokenizer.eos_token_id
    for key, messages in enumerate(asked(family)):
        expected = [None if token == end else token for token in generated(family, messages)[0]]
        if key == leaver:
            assert said[key] == expected[: len(said[key])]
            assert len(said[key]) < MOST
        else:
            assert said[key][:MOST] == expected
    longest = max(generated(family, messages)[1] for messages in asked(family))
    assert all(width <= longest + 2 * MOST + step for width in widths)


def test_columns_that_nobody_reads_any_more_are_forgotten(folder_of):
    answerer = Answerer(folder_of("llava"), device="cpu")
    talks, (long, short) = Talks(answerer), ([Message("user", (LONG * 9,))], [Message("user", ("Hi!",))])
    talks.begin({0: (answerer.read(long), Choosing())})
    talks.begin({1: (answerer.read(short), Choosing())})
    talks.step()
    talks.step({0})
    talks.begin({2: (answerer.read(short), Choosing())})
    talks.step()
    (group,) = talks._groups
    assert group.memory.labels.shape[1] == group.memory.cache.get_seq_length() < answerer.read(long).tokens / 2


def test_one_that_cannot_begin_changes_nothing_for_the_others(folder_of, monkeypatch):
    answerer, said = Answerer(folder_of("llava"), device="cpu"), {}
    talks, messages = Talks(answerer), asked("llava")[0]
    followed(talks, said, {0: (answerer.read(messages), Choosing())})
    real = answering.Together.begin
    monkeypatch.setattr(answering.Together, "begin", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        talks.begin({1: (answerer.read(messages), Choosing())})
    monkeypatch.setattr(answering.Together, "begin", real)
    while talks._groups and len(said[0]) < MOST:
        followed(talks, said, {})
    assert [token for token in said[0] if token is not None] == [
        token for token in generated("llava", messages)[0] if token != made("llava")[1].tokenizer.eos_token_id
    ]
    assert set(said) == {0}


def drawn(answerer, conversations, choosing, others=()):
    """What is drawn for conversations, among others."""
    talks, said = Talks(answerer), {}
    told = [*zip(conversations, choosing, strict=True), *((messages, Choosing()) for messages in others)]
    followed(talks, said, {key: (answerer.read(messages), one) for key, (messages, one) in enumerate(told)})
    while talks._groups and len(said[0]) < MOST:
        followed(talks, said, {})
    return [said[key][:MOST] for key in range(len(conversations))]


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_batch(folder_of):
    answerer, talk = Answerer(folder_of("llava"), device="cpu"), asked("llava")[1]
    warm = [Choosing(1.5, 1.0, seed) for seed in range(4)]
    together = drawn(answerer, [talk] * 4, warm, asked("llava")[:3])
    alone = [drawn(answerer, [talk], [one])[0] for one in warm]
    assert together == alone
    assert len(set(map(tuple, alone))) == 4
    likeliest = drawn(answerer, [talk], [Choosing()])[0]
    assert drawn(answerer, [talk], [Choosing(1e-9, 1.0, 7)])[0] == likeliest
    assert drawn(answerer, [talk], [Choosing(1.5, 0.0, 7)])[0] == likeliest


def test_tokens_are_drawn_as_often_as_they_are_likely_among_the_likeliest():
    logits, number = torch.tensor([1.0, -math.inf, 0.0, 2.0, -3.0]), 20_000
    luck = torch.rand(number, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    for top_p in (1.0, 0.9, 0.8, 0.5):
        shares = (logits / 2).softmax(-1).double()
        order = shares.argsort(descending=True).tolist()
        kept = [token for place, token in enumerate(order) if shares[order[:place]].sum() < top_p]
        expected = torch.zeros(5, dtype=torch.float64).index_put((torch.tensor(kept),), shares[kept])
        found = picked(logits.expand(number, -1), [Choosing(2.0, top_p)] * number, luck).bincount(minlength=5) / number
        torch.testing.assert_close(found.double(), expected / expected.sum(), rtol=0, atol=0.015)
        assert not found[expected == 0].any()


def test_the_edges_of_luck_fall_on_tokens_that_can_be():
    logits = torch.tensor([-math.inf, 0.0, -math.inf]).expand(3, -1)
    assert picked(logits, [Choosing(1.0, 0.5)] * 3, [0.0, 1 - 2**-53, 1.0]).tolist() == [1, 1, 1]


def test_greedy_and_drawn_answers_stand_side_by_side():
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 5.0, 1.0]])
    assert picked(logits, [Choosing(), Choosing(5.0)], [0.0, 0.999]).tolist() == [1, 0]


def test_a_conversation_that_the_template_refuses_is_the_users_fault(folder_of):
    answerer = Answerer(folder_of("llava"), device="cpu")
    answerer.processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"expected turns that the chat template takes.*roles must alternate"):
        answerer.read(asked("llava")[0])


# What is refused ---------------------------------------------------------------------------------------------


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
