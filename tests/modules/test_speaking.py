"""Critiques written together are those that each model writes alone, and their rewards those of reading them again."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import pytest
import torch
import transformers as hf

from mmrlhf.batches import Continuation
from mmrlhf.datamodules.rows import Critiques
from mmrlhf.modules import remembering, speaking
from mmrlhf.modules.backbone import backbone_of
from mmrlhf.modules.families import family_of
from mmrlhf.modules.reward import RewardReader
from mmrlhf.modules.rewardmodel import RewardModel
from mmrlhf.modules.speaking import Saying, Spoken, UnwantedError, agreed, spoken

from .queries import FRAMES
from .test_reward import TEMPLATE, judged_rows, judged_samples, laid_out, lively_head
from .test_rewardmodel import JUDGING, NAMED, QUERY, SAID
from .test_scorer import (
    KINDS,
    SHARING,
    fresh,
    llava,
    made,
    one_thread,  # noqa: F401 - of this file too
)

MOST = 14
SAYING = Saying(MOST)
DRAWN = Saying(MOST, temperature=1.5, samples=2, seed=3)


def talkative(family):
    """A copy of the family's checkpoint that says different things, and often that it has ended."""
    model = fresh(family).eval()
    width, words = model.get_output_embeddings().weight.shape[::-1]
    head = torch.nn.Linear(width, words, bias=False)
    with torch.no_grad():
        head.weight.normal_(std=width**-0.5, generator=torch.Generator().manual_seed(4))
        head.weight[made(family)[1].tokenizer.eos_token_id] *= 3
        head.weight[media(model)] *= 4  # and what nobody may say
    model.lm_head = head  # a tied one says its last token again and again
    return model


def media(model):
    """The tokens that stand for media."""
    return [getattr(model.config, medium.token) for medium in family_of(model.config).media]


@functools.cache
def judge(family, step="auto"):
    return RewardReader(backbone_of(talkative(family)), lively_head(), step).eval()


@functools.cache
def asked(family):
    """Queries with all kinds of media, and responses of very different lengths to each, as token rows."""
    encode = Critiques(made(family)[1], FRAMES, TEMPLATE, "none")
    return [encode(case) for case in judged_samples(KINDS[family])]


def said_of(family, rows, saying=SAYING, step="auto"):
    return spoken(judge(family, step), made(family)[1].tokenizer, laid_out(family, rows), saying)


@functools.cache
def together(family, saying=SAYING):
    """The critiques of all responses to all queries in one batch."""
    return said_of(family, asked(family), saying)


@functools.cache
def generated_alone(family):
    """What the family's own `generate` says of each response alone, with the end of the turn where it says so."""
    model, found = talkative(family), []
    for row in asked(family):
        for given, _ in row.continuations:
            ids = torch.cat([row.prefix, given])[None]
            told = {name: pad(value, len(given))[None] for name, value in row.per_token.items()}
            options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": MOST, "do_sample": False}
            options |= {"suppress_tokens": media(model)}
            found.append(model.generate(input_ids=ids, **options, **told, **row.features)[0, ids.shape[1] :].tolist())
    return found


def pad(value, length):
    return torch.cat([value, torch.zeros(length, dtype=value.dtype)])


def close(one, other):
    """The same words, and the same rewards but for rounding."""
    assert [[each.tokens.tolist() for each in said] for said in one] == [
        [each.tokens.tolist() for each in said] for said in other
    ]
    torch.testing.assert_close(numbers(one), numbers(other), rtol=0, atol=1e-4)


def numbers(found):
    """Rewards and scores, (critiques, 1 + dimensions)."""
    return torch.tensor([[each.reward, *each.dimensions] for said in found for each in said])


def forced(family, found, after=""):
    """The numbers of a reader that is given critiques by their tokens, with the end of the turn, (critiques, ...)."""
    tokenizer = made(family)[1].tokenizer
    end = torch.tensor([tokenizer.eos_token_id, *tokenizer(after, add_special_tokens=False)["input_ids"]])
    critiques, rows = iter(found), []
    for row in asked(family):
        told = [
            Continuation(given, torch.cat([each.tokens, end]))
            for given, _ in row.continuations
            for each in next(critiques)
        ]
        rows.append(row._replace(continuations=tuple(told), places=tuple(range(len(told)))))
    with torch.no_grad():
        judged = judge(family)(laid_out(family, rows))
    return torch.cat([judged.rewards[:, None], judged.dimensions], 1)


# The same as one at a time -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_every_critique_is_the_one_that_generate_writes_alone(family):
    end = made(family)[1].tokenizer.eos_token_id
    whole = [[*said.tokens.tolist(), *([] if said.cut else [end])] for (said,) in together(family)]
    assert whole == generated_alone(family)
    assert [said.generated for (said,) in together(family)] == list(map(len, whole))
    lengths = {len(said) for said in whole}
    assert len(lengths) > 2, "critiques of one length do not test how rows end"
    assert len(set(map(tuple, whole))) > 5, "critiques that are all the same test little"


@pytest.mark.parametrize("family", KINDS)
def test_rewards_are_those_of_reading_the_critiques_again(family):
    found = together(family)
    expected = forced(family, found)
    torch.testing.assert_close(numbers(found), expected, rtol=0, atol=1e-4)
    assert expected.std(0).min() > 0.05, "rewards that are all the same test little"


@pytest.mark.parametrize("after", ["\n", " the end of all"])
@pytest.mark.parametrize("step", ["auto", "separate"])
def test_rewards_may_be_read_behind_what_follows_a_critique(after, step):
    family = "llava_onevision"
    rows, tokenizer = laid_out(family, asked(family)), made(family)[1].tokenizer
    found = spoken(judge(family, step), tokenizer, rows, SAYING, after)
    said = [[each.tokens.tolist() for each in several] for several in found]
    assert said == [[each.tokens.tolist() for each in several] for several in together(family)]
    assert [each.cut for (each,) in found] == [each.cut for (each,) in together(family)]
    assert [each.generated for (each,) in found] == [each.generated for (each,) in together(family)]
    torch.testing.assert_close(numbers(found), forced(family, found, after), rtol=0, atol=1e-4)
    assert (numbers(found) - numbers(together(family))).abs().max() > 1e-2, "an end that changes nothing tests nothing"


@pytest.mark.parametrize("family", SHARING)
def test_rows_of_their_own_say_the_same(family):
    close(said_of(family, asked(family), step="separate"), together(family))


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "gemma3"])
def test_nothing_depends_on_what_else_is_in_the_batch(family):
    alone = [said for row in asked(family) for said in said_of(family, [row])]
    close(alone, together(family))
    backwards = [said_of(family, [row, *asked(family)[:2]])[: len(row.places)] for row in asked(family)[::-1]]
    close([said for several in backwards[::-1] for said in several], together(family))


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl"])
def test_nothing_depends_on_how_many_responses_are_judged_or_in_which_order(family):
    found = iter(together(family))
    for row in asked(family):
        expected = [next(found) for _ in row.continuations]
        turned = row._replace(continuations=row.continuations[::-1])
        close(said_of(family, [turned])[::-1], expected)
        one = [row._replace(continuations=(told,), places=(0,)) for told in row.continuations]
        close(said_of(family, one), expected)


def test_a_query_without_media_needs_no_others_and_a_batch_of_one_has_no_padding():
    row = next(row for row in asked("qwen2_vl") if not row.features)
    assert (laid_out("qwen2_vl", [row]).segment_ids >= 0).all()
    assert len(said_of("qwen2_vl", [row])) == len(row.places)


# One pass ----------------------------------------------------------------------------------------------------


def test_every_token_is_read_once_and_critiques_that_have_ended_are_not_read_on(monkeypatch):
    reads, family = [], "llava_onevision"
    real = remembering._states
    monkeypatch.setattr(
        remembering, "_states", lambda *given, **told: reads.append(given[1].shape[:2]) or real(*given, **told)
    )
    row = asked(family)[2]
    found = [said for (said,) in said_of(family, [row])]
    begun, *steps = reads
    assert begun == (1, len(row.prefix) + sum(len(told.given) for told in row.continuations))
    # Behind what is said stands an end for each, whether it was said or put there.
    assert sum(rows * tokens for rows, tokens in steps) == sum(len(said.tokens) + 1 for said in found)
    assert len(steps) == max(len(said.tokens) for said in found) + 1
    assert [tokens for _, tokens in steps] == sorted((tokens for _, tokens in steps), reverse=True)
    assert steps[-1][1] < len(found)


def test_a_query_whose_critiques_have_all_ended_is_forgotten(monkeypatch):
    reads, family = [], "llava_onevision"
    real = remembering._states
    monkeypatch.setattr(
        remembering, "_states", lambda *given, **told: reads.append(given[1].shape[0]) or real(*given, **told)
    )
    said_of(family, asked(family))
    assert reads[1] == len(asked(family))
    assert reads[-1] < reads[1]
    assert reads[1:] == sorted(reads[1:], reverse=True)


def test_pictures_are_encoded_once_by_either_way(monkeypatch):
    for step in ("shared_prefix", "separate"):
        reader, calls = judge("llava_onevision", step), []
        watch = reader.backbone.tower.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        said_of("llava_onevision", [row for row in asked("llava_onevision") if row.features][:1], step=step)
        watch.remove()
        assert len(calls) == 1


# Ends --------------------------------------------------------------------------------------------------------


def test_a_critique_that_is_cut_is_the_beginning_of_the_whole_one_and_told_as_cut():
    family = "smolvlm"
    short = said_of(family, asked(family), Saying(3))
    for (cut,), (whole,) in zip(short, together(family), strict=True):
        assert cut.tokens.tolist() == whole.tokens.tolist()[:3]
        assert cut.cut == (len(whole.tokens) >= 3)
        assert cut.generated == min(3, whole.generated)
    torch.testing.assert_close(numbers(short), forced(family, short), rtol=0, atol=1e-4)
    assert {said.cut for (said,) in short} == {True, False}


def test_another_end_of_the_checkpoint_ends_a_critique_and_the_end_of_the_turn_is_read_in_its_place():
    family = "llava_onevision"
    before = together(family)
    stop = next(said.tokens[2].item() for (said,) in before if len(said.tokens) > 3)
    model = talkative(family)
    end = made(family)[1].tokenizer.eos_token_id
    model.generation_config.eos_token_id = [end, stop]
    reader = RewardReader(backbone_of(model), lively_head()).eval()
    found = spoken(reader, made(family)[1].tokenizer, laid_out(family, asked(family)), SAYING)
    for (said,), (whole,) in zip(found, before, strict=True):
        words = whole.tokens.tolist()
        assert said.tokens.tolist() == (words[: words.index(stop)] if stop in words else words)
        assert not (said.cut and stop in words)
    torch.testing.assert_close(numbers(found), forced(family, found), rtol=0, atol=1e-4)


def test_the_text_is_that_of_the_tokens_without_special_ones():
    tokenizer = made("internvl")[1].tokenizer
    special = set(tokenizer.all_special_ids)
    for (said,) in together("internvl"):
        plain = [token for token in said.tokens.tolist() if token not in special]
        assert said.text == tokenizer.decode(plain, clean_up_tokenization_spaces=False)
        assert tokenizer.eos_token_id not in said.tokens


# Drawing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_drawn_critiques_differ_and_their_rewards_are_those_of_reading_them_again(family):
    found = together(family, DRAWN)
    assert {len(several) for several in found} == {2}
    assert sum(one.tokens.tolist() != two.tokens.tolist() for one, two in found) > len(found) / 2
    torch.testing.assert_close(numbers(found), forced(family, found), rtol=0, atol=1e-4)


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_batch():
    family = "qwen2_vl"
    alone = [said for row in asked(family) for said in said_of(family, [row], DRAWN)]
    close(alone, together(family, DRAWN))
    close(said_of(family, asked(family), DRAWN, step="separate"), together(family, DRAWN))
    one = said_of(family, asked(family), dataclasses.replace(DRAWN, samples=1))
    close(one, [several[:1] for several in together(family, DRAWN)])
    other = said_of(family, asked(family), dataclasses.replace(DRAWN, seed=4))
    assert [said.tokens.tolist() for said, _ in other] != [said.tokens.tolist() for said, _ in alone]


def test_next_to_a_temperature_of_0_the_likeliest_token_is_drawn():
    close(said_of("llava", asked("llava"), Saying(MOST, temperature=1e-6)), together("llava"))


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits, drawn = torch.tensor([1.0, -math.inf, 0.0, 2.0]), 20_000
    luck = torch.rand(drawn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = speaking._chosen(logits.expand(drawn, -1), 2.0, luck).bincount(minlength=4) / drawn
    weights = [math.exp(0.5), 0, 1, math.exp(1)]
    assert found.tolist() == pytest.approx([weight / sum(weights) for weight in weights], abs=0.015)
    edges = torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64)
    assert speaking._chosen(torch.tensor([-math.inf, 0.0, -math.inf]).expand(2, -1), 1.0, edges).tolist() == [1, 1]


def test_of_several_critiques_the_rewards_are_averaged_and_the_nearest_is_told():
    several = [
        Spoken(torch.tensor([at]), text, reward, (reward * 2,), False, 2)
        for at, (text, reward) in enumerate([("low", 0.0), ("near", 1.25), ("high", 2.5)])
    ]
    mean = agreed(several)
    assert (mean.text, mean.reward, mean.dimensions) == ("near", 1.25, (2.5,))
    uneven = agreed([several[0], several[2], several[2]])
    assert (uneven.text, uneven.reward) == ("high", pytest.approx(5 / 3))


# What is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected 1 or more, got 0"),
        ({"temperature": -0.1}, "temperature: expected 0 or more, got -0.1"),
        ({"temperature": math.nan}, "temperature: expected 0 or more, got nan"),
        ({"samples": 0, "temperature": 1.0}, "samples: expected 1 or more, got 0"),
        ({"samples": 2}, "expected 1 at a temperature of 0, where all are the same, got 2"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Saying(**wrong)


def test_rows_with_critiques_and_readers_in_training_are_refused():
    tokenizer = made("llava")[1].tokenizer
    with pytest.raises(ValueError, match="rows: expected responses and no critiques"):
        spoken(judge("llava"), tokenizer, laid_out("llava", judged_rows("llava")), SAYING)
    reader = RewardReader(backbone_of(talkative("llava")), lively_head()).train()
    with pytest.raises(ValueError, match=r"reader: expected one that is not in training.*eval\(\)"):
        spoken(reader, tokenizer, laid_out("llava", asked("llava")), SAYING)


# Layers that cannot share a prefix ---------------------------------------------------------------------------


def test_a_decoder_with_a_window_speaks_as_its_own_generate_does():
    model, processor = llava(functools.partial(hf.MistralConfig, sliding_window=8))
    plain, row = copy.deepcopy(model), asked("llava")[0]
    reader = RewardReader(backbone_of(model), lively_head()).eval()
    assert reader.step == "separate"
    found = spoken(reader, processor.tokenizer, laid_out("llava", [row]), SAYING)
    options = {"max_new_tokens": MOST, "do_sample": False, "suppress_tokens": media(plain)}
    for (said,), (given, _) in zip(found, row.continuations, strict=True):
        ids = torch.cat([row.prefix, given])[None]
        assert ids.shape[1] > 2 * 8, "what fits into the window does not test it"
        whole = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        assert whole[0, ids.shape[1] :].tolist()[: len(said.tokens)] == said.tokens.tolist()
        assert len(said.tokens) > 2


# As a product ------------------------------------------------------------------------------------------------


def test_a_reward_model_gives_a_reward_and_the_critique_that_it_wrote():
    family = "llava"
    model = RewardModel(judge(family), made(family)[1], JUDGING)
    rows = model.rows(QUERY, SAID)
    for saying in (SAYING, DRAWN):
        found = model.score(QUERY, SAID, critique="generated", saying=saying)
        expected = spoken(model.reader, made(family)[1].tokenizer, rows, saying)
        for scored, several in zip(found, expected, strict=True):
            assert scored.reward == pytest.approx(sum(each.reward for each in several) / len(several))
            assert scored.critique in {each.text for each in several}
            raw = torch.tensor([each.dimensions for each in several]).mean(0).tolist()
            assert scored.dimensions == pytest.approx(dict(zip(NAMED, [3 + 2 * each for each in raw], strict=True)))


@pytest.mark.parametrize("family", ["llava_onevision", "llava"])
def test_what_nobody_waits_for_ends_before_its_next_token(family):
    asks = []
    reader, tokenizer, rows = judge(family), made(family)[1].tokenizer, laid_out(family, asked(family)[:1])
    with pytest.raises(UnwantedError):
        spoken(reader, tokenizer, rows, SAYING, wanted=lambda: asks.append(1) or len(asks) < 3)
    assert len(asks) == 3
    whole = spoken(reader, tokenizer, rows, SAYING, wanted=lambda: True)
    assert [each.text for (each,) in whole] == [each.text for (each,) in spoken(reader, tokenizer, rows, SAYING)]
