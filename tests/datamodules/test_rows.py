"""Rows hold what an ordinary conversation holds, token for token, whatever users have typed."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrlhf.datamodules.rows import Answers, Critiques, DropQueryError, fitted
from mmrlhf.encoding import structure_tokens
from mmrlhf.prompts import Template, load_template
from mmrlhf.queries import Turn

from .made import opened, picture, row, sample

ONE, TWO, THREE = picture(1), picture(2, (30, 90)), picture(3, (200, 50))
FILM, SHORT_FILM = [picture(seed) for seed in range(10, 21)], [picture(seed) for seed in (21, 22, 23)]
PLACES = {11: [0, 1, 3, 4, 6, 7, 9, 10], 3: [0, 0, 1, 1, 1, 1, 2, 2]}
"""Eight places among so many frames, by hand."""
JUDGE = Template("judge", "Question:\n{question}\nAnswer:\n{response}\nVerdict:")
"""A template whose words keep apart from the texts when all is encoded at once."""
TALK = {"system": "Be brief.", "history": (Turn("user", "Hello!"), Turn("assistant", "Hi there."))}
CASES = {
    "text alone": sample("q", texts=("It is red.", "Blue", "A green ring, I think.")),
    "system and history": sample("q", **TALK),
    "picture": sample("q", [[ONE]]),
    "pictures inside": sample("q", [[ONE], [TWO], [THREE]], offsets=[20, 0, 7], prompt="Compare this and that one."),
    "picture at the end": sample("q", [[ONE]], offsets=[8], prompt="Describe"),
    "film": sample("q", [FILM], **TALK),
    "short film": sample("q", [SHORT_FILM], offsets=[4], prompt="Does it move?"),
    "film and picture": sample("q", [FILM, [ONE], SHORT_FILM], offsets=[0, 3, 6], prompt="Is it as here?"),
    "empty response": sample("q", [[ONE]], texts=("", "no")),
}


def ordinary(processor, sample, asked=None, answer=None):
    """The whole conversation at once, as anybody would encode it: ids and features.

    `asked` are words before and after the prompt; the answer is said by the assistant, if there is one.
    """
    query = sample.ranked.query
    before, after = asked or ("", "")
    places = sorted(
        zip((medium.offset for medium in query.media), query.media, sample.media, strict=True), key=lambda x: x[0]
    )
    content, at, pictures, films = [], 0, [], []
    stand_first = asked is not None and any(offset == 0 for offset, *_ in places)
    if before and not stand_first:
        content.append({"type": "text", "text": before})
    waiting = before if stand_first else ""
    for offset, medium, stored in places:
        if offset > at:
            content.append({"type": "text", "text": waiting + query.prompt[at:offset]})
            waiting, at = "", offset
        content.append({"type": medium.kind})
        shown = [opened(data) for data in stored]
        if medium.kind == "image":
            pictures += shown
        else:
            films.append(np.stack([np.asarray(shown[place]) for place in PLACES[len(shown)]]))
    content.append({"type": "text", "text": waiting + query.prompt[at:] + after})
    turns = [{"role": "system", "content": [{"type": "text", "text": query.system}]}] if query.system else []
    turns += [{"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in query.history]
    turns.append({"role": "user", "content": content})
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None)
    media = ({"images": [pictures]} if pictures else {}) | (
        {"videos": films, "do_sample_frames": False} if films else {}
    )
    out = dict(processor(text=[text], return_tensors="pt", **media))
    return out.pop("input_ids")[0].tolist(), {name: value for name, value in out.items() if name != "attention_mask"}


def same_features(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_what_the_chat_template_makes_of_the_conversation(processor, name):
    case = CASES[name]
    made = Answers(processor, 8)(case)
    prompt, features = ordinary(processor, case)
    assert made.prefix.tolist() == prompt
    assert same_features(made.features, features)
    for told, response in zip(made.continuations, case.ranked.responses, strict=True):
        whole, _ = ordinary(processor, case, answer=response.text)
        assert len(told.given) == 0
        found = prompt + told.supervised.tolist()
        assert found == whole[: len(found)]
        assert processor.tokenizer.decode(told.supervised) == response.text + "<|im_end|>"
        assert processor.tokenizer.decode(whole[len(found) :]) == "\n"


@pytest.mark.parametrize("name", CASES)
def test_a_critique_is_what_the_chat_template_makes_of_the_judging_conversation(processor, name):
    case = CASES[name]
    reasons = ["It is well seen.", "Wrong.", "Hm."][: len(case.ranked.responses)]
    responses = tuple(
        dataclasses.replace(response, reason=reason)
        for response, reason in zip(case.ranked.responses, reasons, strict=True)
    )
    case = case._replace(ranked=_with_responses(case.ranked, responses))
    made = Critiques(processor, 8, JUDGE)(case)
    starts = set()
    for told, response in zip(made.continuations, responses, strict=True):
        words = ("Question:\n", f"\nAnswer:\n{response.text}\nVerdict:")
        prompt, features = ordinary(processor, case, words)
        assert joined(processor, made.prefix, told.given) == processor.tokenizer.decode(prompt)
        if response.text:  # else two line breaks meet, which are one token when all is encoded at once
            assert made.prefix.tolist() + told.given.tolist() == prompt
        assert same_features(made.features, features)
        whole, _ = ordinary(processor, case, words, response.reason)
        assert joined(processor, made.prefix, told.given, told.supervised) + "\n" == processor.tokenizer.decode(whole)
        assert processor.tokenizer.decode(told.supervised) == response.reason + "<|im_end|>"
        assert processor.tokenizer.decode(told.given).startswith(response.text + "\nVerdict:")
        starts.add(processor.tokenizer.decode(made.prefix)[-9:])
    assert starts == {"\nAnswer:\n"}


def joined(processor, *pieces):
    return processor.tokenizer.decode(torch.cat(pieces))


def _with_responses(ranked, responses):
    return dataclasses.replace(ranked, responses=responses)


def test_the_released_words_stand_around_question_and_response(processor):
    case = sample("q", texts=("A ring.", "A disc."), reasons=("Right.", "Wrong."), prompt="What is shown?")
    made = Critiques(processor, 8, load_template("critique"))(case)
    for told, text in zip(made.continuations, ("A ring.", "A disc."), strict=True):
        words = load_template("critique").fill(question="What is shown?", response=text)
        whole = f"<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n"
        assert joined(processor, made.prefix, told.given) == whole


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("critique_or_reason", ["C0<|im_end|>", "R1<|im_end|>", ""]),
        ("critique", ["C0<|im_end|>", "", ""]),
        ("reason", ["R0<|im_end|>", "R1<|im_end|>", ""]),
        ("none", ["", "", ""]),
    ],
)
def test_the_critique_comes_from_where_it_is_said(processor, source, expected):
    case = sample("q", texts=("a", "b", "c"), reasons=("R0", "R1"))
    first, *others = case.ranked.responses
    case = case._replace(ranked=_with_responses(case.ranked, (dataclasses.replace(first, critique="C0"), *others)))
    made = Critiques(processor, 8, JUDGE, source)(case)
    assert [processor.tokenizer.decode(told.supervised) for told in made.continuations] == expected
    assert {told.supervised.dtype for told in made.continuations} == {torch.long}


def test_behind_a_critique_stands_what_the_model_reads_on_to(processor):
    case = sample("q", texts=("a", "b"), reasons=("R0", ""))
    made = Critiques(processor, 8, JUDGE, after="\n")(case)
    assert [processor.tokenizer.decode(told.supervised) for told in made.continuations] == ["R0<|im_end|>\n", ""]
    whole, _ = ordinary(processor, case, ("Question:\n", "\nAnswer:\na\nVerdict:"), "R0")
    first = made.continuations[0]
    assert joined(processor, made.prefix, first.given, first.supervised) == processor.tokenizer.decode(whole)


def test_critiques_from_elsewhere_take_the_place_of_those_in_the_data(processor):
    case = sample("q", texts=("a", "b", "c"), reasons=("R0", "R1"))
    made = Critiques(processor, 8, JUDGE, written=lambda ranked: [f"W {each.text}" for each in ranked.responses])(case)
    said = [processor.tokenizer.decode(told.supervised) for told in made.continuations]
    assert said == ["W a<|im_end|>", "W b<|im_end|>", "W c<|im_end|>"]


@pytest.mark.parametrize("frames", [1, 2, 3, 8])
def test_a_film_has_as_many_frames_as_are_asked_for_however_many_are_stored(processor, frames):
    for film in (FILM, SHORT_FILM, SHORT_FILM[:2]):
        made = Answers(processor, frames)(sample("q", [film], kinds=["video"]))
        assert made.features["pixel_values_videos"].shape[:2] == (1, frames)


def test_a_row_knows_its_length_and_that_of_its_longest_sequence(processor):
    made = Critiques(processor, 8, JUDGE)(sample("q", texts=("a", "b and more of it"), reasons=("x", "y")))
    lengths = [len(told.given) + len(told.supervised) for told in made.continuations]
    assert made.tokens == len(made.prefix) + sum(lengths)
    assert made.longest == len(made.prefix) + max(lengths)
    assert lengths[0] < lengths[1]


# What users type never becomes structure ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tools(processor):
    """The processor with an added token that is not special, as Qwen's are."""
    processor = copy.deepcopy(processor)
    processor.tokenizer.add_tokens(["<tool_call>"])
    assert processor.tokenizer("<tool_call>")["input_ids"] == [len(processor.tokenizer) - 1]
    return processor


TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "<tool_call>"]
TYPED = st.lists(st.sampled_from([*TOKENS, *"a \n<|>", "assistant", "é"]), max_size=6).map("".join)


def structure(processor, ids):
    known = set(structure_tokens(processor.tokenizer).values())
    return [number for number in ids.tolist() if number in known]


def test_the_tokens_of_the_property_are_all_there_are(tools):
    assert set(structure_tokens(tools.tokenizer)) == set(TOKENS)


@settings(max_examples=25)
@given(st.lists(TYPED, min_size=7, max_size=7), st.sampled_from(["answers", "critiques"]))
def test_no_text_of_a_user_adds_or_takes_structure(tools, typed, task):
    def encoded(system, asked, said, prompt, one, two, reason):
        case = sample(
            "q",
            [[ONE]],
            offsets=[1],
            prompt="?" + prompt,
            system="s" + system,
            history=(Turn("user", "u" + asked), Turn("assistant", "v" + said)),
            texts=("1" + one, "2" + two),
            reasons=("r" + reason, "r" + one),
        )
        first, second = case.ranked.responses
        responses = (dataclasses.replace(first, critique="c" + two), second)
        case = case._replace(ranked=_with_responses(case.ranked, responses))
        return (Answers(tools, 8) if task == "answers" else Critiques(tools, 8, JUDGE))(case)

    hostile, harmless = encoded(*typed), encoded(*["x"] * 7)
    assert structure(tools, hostile.prefix) == structure(tools, harmless.prefix)
    for told, plain in zip(hostile.continuations, harmless.continuations, strict=True):
        assert structure(tools, told.given) == structure(tools, plain.given)
        assert structure(tools, told.supervised) == [tools.tokenizer.eos_token_id]
        assert told.supervised[-1] == tools.tokenizer.eos_token_id
    if task == "critiques":
        assert tools.tokenizer.decode(hostile.continuations[0].supervised) == f"c{typed[5]}<|im_end|>"
    said = tools.tokenizer.decode(torch.cat([hostile.prefix, *hostile.continuations[1]]))
    system, first, second, prompt, one, two, _ = typed
    for text in ("s" + system, "u" + first, "v" + second, prompt, "2" + two, *(["r" + one] * (task == "critiques"))):
        assert text in said


# What is too long --------------------------------------------------------------------------------------------


def lengths(row):
    return [len(told.given) + len(told.supervised) for told in row.continuations]


@pytest.mark.parametrize("too_long", ["drop_responses", "drop_query", "cut_responses"])
def test_at_the_limit_nothing_is_touched(too_long):
    whole = row(10, [5, 3, 4], given=2)
    assert fitted(whole, 15, too_long) == (whole, {})


def test_responses_that_are_too_long_are_left_out_and_counted():
    found, mended = fitted(row(10, [6, 5, 7, 2]), 15, "drop_responses")
    assert mended == {"response_dropped": 2}
    assert found.places == (1, 3)
    assert [response.text for response in found.ranked.responses] == ["text 1", "text 3"]
    assert [told.supervised.tolist() for told in found.continuations] == [[*range(1006, 1011)], [1018, 1019]]
    assert found.prefix.tolist() == list(range(10))


def test_what_is_given_counts_as_much_as_what_is_supervised():
    assert fitted(row(10, [6, 5, 2], given=2), 15, "drop_responses")[0].places == (1, 2)
    assert fitted(row(10, [6, 5, 2], given=0), 15, "drop_responses")[0].places == (1, 2)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "too_long"),
    [
        ([6, 6, 5], 15, "drop_responses"),
        ([6, 6], 15, "drop_responses"),
        ([5, 6, 5], 15, "drop_query"),
        ([1, 1], 10, "drop_responses"),
        ([1, 1], 10, "cut_responses"),
        ([1, 1], 3, "cut_responses"),
        ([1, 1], 3, "drop_responses"),
    ],
)
def test_a_query_of_which_less_than_two_responses_are_left_is_refused(lengths, max_tokens, too_long):
    with pytest.raises(
        DropQueryError, match=rf"query 'q': expected at most {max_tokens} tokens, got 10 before"
    ) as error:
        fitted(row(10, lengths), max_tokens, too_long)
    assert error.value.reason == "too_long"
    assert f"and {10 + max(lengths)} with the longest" in str(error.value)


def test_cutting_takes_from_what_is_supervised_alone():
    whole = row(10, [9, 4, 5], given=3)
    found, mended = fitted(whole, 15, "cut_responses")
    assert mended == {"response_cut": 1}
    assert lengths(found) == [5, 4, 5]
    assert found.prefix.tolist() == list(range(10))
    assert [told.given.tolist() for told in found.continuations] == [
        told.given.tolist() for told in whole.continuations
    ]
    assert found.continuations[0].supervised.tolist() == [1003, 1004]
    assert found.ranked == whole.ranked


def test_a_response_of_which_nothing_would_be_left_is_left_out_and_the_others_are_cut():
    pieces = row(10, [9, 8, 5, 4], given=3)
    told = list(pieces.continuations)
    told[1] = told[1]._replace(given=torch.arange(5), supervised=torch.arange(3))
    found, mended = fitted(pieces._replace(continuations=tuple(told)), 15, "cut_responses")
    assert mended == {"response_dropped": 1, "response_cut": 1}
    assert found.places == (0, 2, 3)
    assert lengths(found) == [5, 5, 4]


def test_what_has_nothing_to_supervise_and_fits_is_not_in_the_way_of_cutting():
    pieces = row(10, [5, 9], given=5)
    told = pieces.continuations[1]._replace(given=torch.arange(2), supervised=torch.arange(7))
    found, mended = fitted(pieces._replace(continuations=(pieces.continuations[0], told)), 15, "cut_responses")
    assert mended == {"response_cut": 1}
    assert lengths(found) == [5, 5]
    assert [len(told.supervised) for told in found.continuations] == [0, 3]


@given(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(1, 18), st.integers(0, 3))
def test_whatever_comes_out_fits_and_is_whole_or_was_counted(prefix, sizes, limit, given_tokens):
    whole = row(prefix, [given_tokens + size for size in sizes], given=given_tokens)
    for too_long in ("drop_responses", "drop_query", "cut_responses"):
        try:
            found, mended = fitted(whole, limit, too_long)
        except DropQueryError:
            fits = sum(prefix + given_tokens + (1 if too_long == "cut_responses" else size) <= limit for size in sizes)
            assert fits < 2 or (too_long == "drop_query" and fits < len(sizes))
            continue
        assert found.longest <= limit
        assert torch.equal(found.prefix, whole.prefix)
        assert len(found.places) == len(found.continuations) == len(found.ranked.responses)
        assert len(whole.places) - len(found.places) == mended.get("response_dropped", 0)
        before = [whole.continuations[place] for place in found.places]
        shortened = sum(len(a.supervised) < len(b.supervised) for a, b in zip(found.continuations, before, strict=True))
        assert shortened == mended.get("response_cut", 0)
        for now, then in zip(found.continuations, before, strict=True):
            assert torch.equal(now.given, then.given)
            assert torch.equal(now.supervised, then.supervised[: len(now.supervised)])
            assert len(now.supervised) >= 1
