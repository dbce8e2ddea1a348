"""A reward model behind an address scores what it is shown, and says what is wrong with a request."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx2
import openai
import pytest

from mmrlhf.queries import Media, Turn

from ..datamodules.made import picture
from .made import LIMITS, Bytes, ask, client, running, scorer, shown, until

SEEN = []


def length(wanted):
    """The longer the better; some questions break it."""
    SEEN.append(wanted)
    if "wrong" in wanted.query.prompt:
        raise ValueError("secret words")
    if "broken" in wanted.query.prompt:
        raise RuntimeError("secret words")
    critiques = wanted.critiques or [f"{wanted.critique} of {text}" for text in wanted.responses]
    return [
        SimpleNamespace(reward=float(len(text)), critique=critique, dimensions={"helpfulness": 3.5})
        for text, critique in zip(wanted.responses, critiques, strict=True)
    ]


def readable(wanted):
    """What is asked for what cannot be read says so."""
    if "impossible" in wanted.query.prompt:
        raise ValueError("query 'messages': expected something possible")
    return wanted


@pytest.fixture(scope="module")
def address():
    with running(Bytes().speaker(), scorer(length, read=readable)) as address:
        yield address


def posted(address, messages=None, path="/score", **options):
    messages = messages or [{"role": "user", "content": "Which?"}]
    return httpx2.post(f"{address}{path}", json={"messages": messages} | options)


def test_every_response_has_its_score(address):
    for path in ("/score", "/v1/score"):
        found = posted(address, path=path, responses=["a", "bcd"], model="judge")
        assert found.json() == {
            "object": "scores",
            "model": "judge",
            "scores": [
                {"index": 0, "reward": 1.0, "critique": "none of a", "dimensions": {"helpfulness": 3.5}},
                {"index": 1, "reward": 3.0, "critique": "none of bcd", "dimensions": {"helpfulness": 3.5}},
            ],
        }


def test_the_conversation_is_the_query_that_a_file_would_hold(address):
    earlier = [{"role": "developer", "content": "be fair"}, {"role": "user", "content": "one"}]
    earlier += [{"role": "assistant", "content": "two"}]
    asked = shown([picture(1), picture(2, (40, 40))], "Which?")
    asked[0]["content"].insert(0, {"type": "text", "text": "See:"})
    posted(address, [*earlier, *asked], responses=["a"], critique="given", critiques=["good"])
    wanted = SEEN[-1]
    assert (wanted.query.system, wanted.query.prompt) == ("be fair", "See:Which?")
    assert wanted.query.history == (Turn("user", "one"), Turn("assistant", "two"))
    assert wanted.query.media == (Media("image", "0", 4), Media("image", "1", 4))
    assert [wanted.load(medium, 2).size for medium in wanted.query.media] == [(60, 40), (40, 40)]
    assert (wanted.critique, wanted.critiques, wanted.most) == ("given", ("good",), None)


def test_a_film_has_the_frames_that_the_model_was_trained_with(address):
    import base64

    from mmrlhf.images import encode

    from ..datamodules.made import opened

    frames = ",".join(base64.b64encode(encode(opened(picture(n)), "jpg")).decode() for n in range(3))
    part = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}}
    posted(address, [{"role": "user", "content": [part, {"type": "text", "text": "So?"}]}], responses=["a"])
    (medium,) = SEEN[-1].query.media
    assert medium.kind == "video"
    assert len(SEEN[-1].load(medium, 2)) == 2


def test_the_most_tokens_of_a_critique_reach_the_model(address):
    posted(address, responses=["a"], critique="generated", max_tokens=7)
    assert SEEN[-1].most == 7


@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        ({}, "responses: expected 1 to 3, got 0", "responses"),
        ({"responses": ["a"] * 4}, "responses: expected 1 to 3, got 4", "responses"),
        ({"responses": "a"}, "responses: expected a list, got 'a'", "responses"),
        ({"responses": [1]}, "responses[0]: expected text, got int 1", "responses[0]"),
        ({"responses": ["a"], "critique": "long"}, "critique: expected one of 'none'", "critique"),
        ({"responses": ["a"], "critique": "given"}, "critiques: expected one for each of 1 responses", "critiques"),
        (
            {"responses": ["a"], "critiques": ["b"]},
            "critiques: expected none, with critique 'none', got 1",
            "critiques",
        ),
        ({"responses": ["a"], "max_tokens": 9}, "max_tokens: expected none with critique 'none'", "max_tokens"),
        ({"responses": ["a"], "critique": "generated", "max_tokens": 999}, "expected at most 400", "max_tokens"),
        ({"responses": ["a"], "temperature": 0}, "unknown fields ['temperature']", None),
        (
            {"responses": ["a"], "messages": [{"role": "user", "content": " "}]},
            "prompt: expected a question",
            "messages",
        ),
        ({"responses": ["a"], "messages": [{"role": "user", "content": "impossible"}]}, "something possible", None),
    ],
)
def test_what_cannot_be_scored_is_refused(address, options, message, param):
    found = posted(address, **options)
    assert found.status_code == 400
    error = found.json()["error"]
    assert message in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([*shown([picture(1)]), {"role": "user", "content": "a"}], "expected media in the last turn alone"),
        ([{"role": r, "content": "a"} for r in ("user", "system", "user")], "expected the system's words first"),
    ],
)
def test_conversations_that_the_reward_model_cannot_read_are_refused(address, messages, message):
    found = posted(address, messages, responses=["a"])
    assert (found.status_code, message in found.json()["error"]["message"]) == (400, True)


def test_another_model_is_not_found_and_a_failure_of_ours_says_nothing_of_itself(address):
    assert posted(address, responses=["a"], model="bytes").status_code == 404
    for question in ("broken", "wrong"):
        found = posted(address, [{"role": "user", "content": question}], responses=["a"])
        assert (found.status_code, found.json()["error"]["code"]) == (500, "model_failed")
        assert "secret" not in found.text


def test_policy_and_reward_model_are_served_side_by_side(address):
    with client(address) as asked:
        assert [model.id for model in asked.models.list()] == ["bytes", "judge"]
        assert ask(asked).choices[0].message.content == "<hello>"
        with pytest.raises(openai.NotFoundError):
            ask(asked, model="judge")


def test_a_reward_model_alone_answers_no_chats():
    with running(scorer=scorer(length)) as address, client(address) as asked:
        assert posted(address, responses=["a"]).status_code == 200
        with pytest.raises(openai.NotFoundError):
            ask(asked, model="judge")


def test_scores_too_take_places_and_time():
    free = threading.Event()

    def slow(wanted):
        free.wait(10)
        return length(wanted)

    limits = type(LIMITS)(**{**vars(LIMITS), "at_once": 1, "waiting": 1, "seconds": 0.5})
    with running(scorer=scorer(slow), limits=limits) as address, ThreadPoolExecutor(2) as pool:
        server = running.last[0]
        found = [pool.submit(posted, address, responses=["a"]) for _ in range(2)]
        until(lambda: server.desk._here == 2)
        assert posted(address, responses=["a"]).status_code == 429
        assert {each.result().json()["error"]["code"] for each in found} == {"timeout"}
        free.set()
        until(lambda: server.desk._here == 0)
        assert posted(address, responses=["a"]).status_code == 200
