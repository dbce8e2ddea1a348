"""A critique that somebody wrote reaches the response that it is about, or nobody."""

from __future__ import annotations

import pytest

from mmrlhf import jsonl
from mmrlhf.datamodules.written import WrittenCritiques, asked
from mmrlhf.fingerprint import of_text
from mmrlhf.judging import judge_messages
from mmrlhf.prompts import Template

from .made import opened, picture, ranked, sample

TEMPLATE = Template("judge", "Q: {question} A: {response} Well?")


def row(name, place, text, critique, **more):
    return {"id": name, "response": place, "digest": of_text(text), "critique": critique} | more


def of(tmp_path, rows, query):
    jsonl.write(tmp_path / "c.jsonl", rows)
    return WrittenCritiques(tmp_path / "c.jsonl").of(query)


ROWS = [row("q", 1, "no", "wrong"), row("p", 0, "yes", "other"), row("q", 0, "yes", "right", cut=False, more=1)]


def test_critiques_come_in_the_order_of_the_responses_however_the_file_is_sorted(tmp_path):
    assert of(tmp_path, ROWS, ranked("q")) == ["right", "wrong"]
    assert of(tmp_path, ROWS[::-1], ranked("q", texts=(" yes\r\n", "no"))) == ["right", "wrong"]


def test_short_digests_and_rows_that_are_repeated_are_known(tmp_path):
    rows = [*ROWS, *(one | {"digest": one["digest"][:16]} for one in ROWS)]
    assert of(tmp_path, rows, ranked("q")) == ["right", "wrong"]


def test_an_empty_critique_is_none_and_no_error(tmp_path):
    rows = [row("q", 0, "yes", ""), row("q", 1, "no", "x")]
    assert of(tmp_path, rows, ranked("q")) == ["", "x"]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (ROWS[:2], "expected a critique of response 0 of query 'q', got none; run `mmrlhf critique`"),
        ([*ROWS[:2], row("q", 0, "yes!", "x")], "response 0 of query 'q', got one of another text; run"),
        ([*ROWS, row("q", 0, "yes", "left")], "expected one critique of response 0 of query 'q', got two that differ"),
        ([{"id": "q", "response": 0, "digest": of_text("yes")}], "c.jsonl:1: .*critique: expected a value"),
        ([row("q", 0, "yes", "x") | {"digest": of_text("yes")[:15]}], "c.jsonl:1: .*expected 16 digits or more"),
        ([row("q", 0, "yes", None)], "c.jsonl:1: .*critique: expected a text, got None"),
        ([row("q", "0", "yes", "x")], "c.jsonl:1: .*response: expected a whole number"),
    ],
)
def test_what_is_missing_foreign_or_contradictory_is_an_error_with_its_cure(rows, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        of(tmp_path, rows, ranked("q"))


def test_a_file_that_is_not_there_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"critiques: expected a file, found none at .*none.jsonl; run `mmrlhf crit"):
        WrittenCritiques(tmp_path / "none.jsonl")


def test_a_response_is_asked_about_as_the_reward_model_reads_it_with_each_medium_decoded_once(monkeypatch):
    case = sample("q", [[picture(1)], [picture(2), picture(3)]], kinds=["image", "video"], texts=("yes", "no", "so"))
    decoded = []
    decode = __import__("mmrlhf.images", fromlist=["decode"]).decode
    monkeypatch.setattr("mmrlhf.images.decode", lambda data: decoded.append(data) or decode(data))
    talks = list(asked(case, TEMPLATE, 4))
    assert len(decoded) == 1 + 4
    still, film = opened(picture(1)), [opened(picture(seed)) for seed in (2, 2, 3, 3)]
    shown = {"q-0": still, "q-1": film}
    for talk, response in zip(talks, case.ranked.responses, strict=True):
        expected, _ = judge_messages(TEMPLATE, case.ranked.query, response.text, lambda medium: shown[medium.path])
        assert [message.role for message in talk] == [message.role for message in expected]
        assert as_plain(talk) == as_plain(expected)


def as_plain(messages):
    """Texts, and the bytes of what is shown."""
    found = []
    for part in (part for message in messages for part in message.parts):
        pictures = part if isinstance(part, list) else [part]
        found.append(part if isinstance(part, str) else [one.tobytes() for one in pictures])
    return found
