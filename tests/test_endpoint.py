"""A server is asked as its protocol says, whatever it does; and nobody but it ever sees the key."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import itertools
import json
import logging
import ssl
import threading
import time
import traceback

import httpx2
import numpy as np
import pytest
from PIL import Image

from mmrlhf.chats import as_chat
from mmrlhf.encoding import Message
from mmrlhf.endpoint import Endpoint, Reply, _Bounded, _first
from mmrlhf.strictjson import JsonError

from .chatserver import Served, completion, said

CERTIFICATES = ssl.create_default_context()
CANARY = "sk-canary-4f9d1c7b"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    """Whatever the machine has."""
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_BASE_URL", "OPENAI_CUSTOM_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    # Servers here speak plain http; to read all certificates for each client takes longer than the rest.
    monkeypatch.setattr("httpx2._transports.default.create_ssl_context", lambda *_, **__: CERTIFICATES)


@pytest.fixture
def quick(monkeypatch):
    """Attempts follow each other without the client's waits."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)


def asking(*texts):
    return [(f"n{place}", [Message("user", (text,))]) for place, text in enumerate(texts)]


def scripted(*answers):
    """Answers in this order, and the last one for ever."""
    turns = itertools.chain(answers, itertools.repeat(answers[-1]))
    return lambda body: next(turns)


def one(served, **options):
    """The only reply to one question."""
    (reply,) = Endpoint(served.url, "m", **options).ask(asking("Well?"))
    return reply


# What is asked ------------------------------------------------------------------------------------------------


def test_a_question_is_a_chat_completion_with_the_model_the_temperature_and_the_most_tokens():
    with Served(scripted("Yes.")) as served:
        talk = [Message("system", ("Be brief.",)), Message("user", ("Well?",))]
        found = list(Endpoint(served.url, "judge").ask([("a", talk)], 33))
    assert found == [Reply("a", "Yes.", 11, 7, "stop")]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Well?"}]
    assert served.asked == [{"model": "judge", "messages": messages, "max_tokens": 33, "temperature": 0.0}]
    assert served.paths == ["/v1/chat/completions"]


def test_newer_models_are_asked_in_their_words():
    with Served(scripted("Yes.")) as served:
        one(served, temperature=None, limit="max_completion_tokens")
    assert served.asked[0].keys() == {"model", "messages", "max_completion_tokens"}


def picture(seed, size=(20, 12)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


def opened(url, form):
    head, _, data = url.partition(",")
    assert head == f"data:image/{form};base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_pictures_stand_between_the_texts_and_lose_nothing():
    talk = [Message("user", ("Here:", picture(1), "and", picture(2)))]
    (message,) = as_chat(talk)
    assert [part["type"] for part in message["content"]] == ["text", "image_url", "text", "image_url"]
    for seed, part in ((1, message["content"][1]), (2, message["content"][3])):
        assert np.array_equal(opened(part["image_url"]["url"], "png"), picture(seed))


def test_texts_that_stand_together_become_one():
    talk = [Message("system", ("a ", "b")), Message("user", (picture(1), "c", "", " d", picture(2), "e"))]
    system, user = as_chat(talk)
    assert system["content"] == "a b"
    assert [part.get("text") for part in user["content"]] == [None, "c d", None, "e"]


def test_a_film_is_its_frames_in_order_as_pictures_or_as_a_film():
    frames = [picture(seed) for seed in range(3)]
    (as_pictures,), (as_film,) = (as_chat([Message("user", (frames, "So?"))], films) for films in ("pictures", "film"))
    shown = [opened(part["image_url"]["url"], "png") for part in as_pictures["content"][:-1]]
    assert all(np.array_equal(one, other) for one, other in zip(shown, frames, strict=True))
    film, text = as_film["content"]
    head, *data = film["video_url"]["url"].split(",")
    assert (head, text) == ("data:video/jpeg;base64", {"type": "text", "text": "So?"})
    for frame, coded in zip(frames, data, strict=True):
        decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(coded)))).astype(int)
        assert np.abs(decoded - np.asarray(frame)).mean() < 8


def test_a_picture_that_would_be_large_goes_as_jpeg(monkeypatch):
    monkeypatch.setattr("mmrlhf.chats._LARGE", 300)
    (message,) = as_chat([Message("user", (picture(1), picture(2, (8, 8))))])
    large, small = (part["image_url"]["url"] for part in message["content"])
    assert opened(large, "jpeg").size == (20, 12)
    assert np.array_equal(opened(small, "png"), picture(2, (8, 8)))


# Many at once -------------------------------------------------------------------------------------------------


def test_as_many_wait_as_are_allowed_and_every_answer_comes_under_its_own_name():
    def answer(body):
        return (0.05 if said(body) in {"0", "4"} else 0.01, said(body) * 3)

    with Served(answer) as served:
        endpoint = Endpoint(served.url, "m", at_once=3)
        taken, found, ahead = [], {}, []
        texts = [str(number) for number in range(11)]
        for reply in endpoint.ask(taken.append(each) or each for each in asking(*texts)):
            found[reply.name] = reply.text
            ahead.append(len(taken) - len(found))
    assert found == {f"n{number}": str(number) * 3 for number in range(11)}
    assert served.most_together == 3
    assert max(ahead) <= 3, "no conversation is held before it is asked"
    assert list(found) != sorted(found, key=lambda name: int(name[1:])), "the control: some overtake others"


def test_whoever_stops_listening_is_not_kept_waiting(caplog):
    done = threading.Event()

    def answer(body):
        if said(body) == "slow":
            done.wait(20)
        return "x"

    with Served(answer) as served:
        began = time.monotonic()
        answers = Endpoint(served.url, "m").ask(asking("slow", "a", "b"))
        next(answers)
        answers.close()
        assert time.monotonic() - began < 5
        done.set()
    gc.collect()
    assert [record for record in caplog.records if record.name == "asyncio"] == []


# What goes wrong and passes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"error": {"message": "slow down"}}, {"Retry-After": "0.01"}),
        (500, {"error": {"message": "oops"}}, {}),
        (503, b"<html>", {"Content-Type": "text/html"}),
        Served.DROP,
    ],
)
def test_a_passing_trouble_is_waited_out(trouble, quick):
    with Served(scripted(trouble, trouble, "Yes.")) as served:
        assert one(served, retries=2).text == "Yes."
    assert len(served.asked) == 3


def test_a_slow_answer_is_asked_for_again_and_then_given_up(quick):
    with Served(scripted((1.5, "late"), "Yes.")) as served:
        assert one(served, retries=1, timeout=1.0).text == "Yes."
    with (
        Served(scripted((1.5, "late"))) as served,
        pytest.raises(ValueError, match=r"answer to n0 within 1 s, got none in 1"),
    ):
        one(served, retries=0, timeout=1.0)


# What goes wrong and stays ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "attempts", "told"),
    [
        ((429, {"error": {"message": "slow down"}}, {}), 3, "HTTP 429 .*slow down.*; lower endpoint.at_once"),
        ((500, {"error": {"message": "oops"}}, {}), 3, "answer to n0, got HTTP 500 .*oops.*; look into its log"),
        (Served.DROP, 3, "expected a server there, lost or found none .* in 3 attempts; start it"),
        ((404, {"error": {"message": "no model m"}}, {}), 1, "HTTP 404 .*no model m.*; give the model by the name"),
        (
            (400, {"error": {"message": "too long"}}, {}),
            1,
            "answer to n0, got HTTP 400 .*too long.*; ask .* fewer frames",
        ),
        ((413, b"large", {}), 1, "answer to n0, got HTTP 413 .*; ask something that it takes"),
        ((401, {"error": {"message": "who?"}}, {}), 1, r"OPENAI_API_KEY names none \(HTTP 401\); put it into"),
        ((307, b"", {"Location": "http://127.0.0.1:9/v1"}), 1, r"got sent elsewhere \(HTTP 307\); give that address"),
        (
            {"error": {"message": "full"}},
            1,
            "expected a chat completion as answer to n0, got .*choices.*; give the add",
        ),
        (b"<html>", 1, "expected a chat completion as answer to n0, got something else .*one JSON value"),
        ({"choices": []}, 1, "choices: expected an answer, got none"),
        (completion(["a"]), 1, "content: expected a text, got list"),
        (completion("a", finish=None), 1, "finish_reason: expected a text"),
        ((200, b" " * (16 * 2**20 + 1), {}), 1, "expected at most 16,777,216 bytes, got more"),
        ((200, b"x", {"Content-Encoding": "gzip"}), 1, "compressed, which nobody asked for"),
    ],
)
def test_a_lasting_trouble_is_one_line_with_its_cure(trouble, attempts, told, quick):
    with Served(scripted(trouble)) as served, pytest.raises(ValueError, match=told) as caught:
        one(served, retries=2)
    assert len(served.asked) == attempts
    assert str(caught.value).startswith(served.url)
    assert "\n" not in str(caught.value)


def test_answers_that_came_with_a_failure_are_told_before_it():
    async def answer(number):
        if number % 2:
            raise ValueError(f"no {number}")
        return number

    with asyncio.Runner() as runner:
        tasks = {runner.get_loop().create_task(answer(number)) for number in range(6)}
        runner.run(asyncio.wait(tasks))
        left, replies = _first(runner, tasks)
        assert left == set()
        assert {next(replies) for _ in range(3)} == {0, 2, 4}
        with pytest.raises(ValueError, match=r"no [135]"):
            next(replies)


def test_of_an_answer_without_end_no_more_is_read_than_is_allowed():
    class Endless(httpx2.AsyncByteStream):
        chunks = 0

        async def __aiter__(self):
            while self.chunks < 40:
                self.chunks += 1
                yield bytes(2**20)

    async def read(stream):
        return [len(chunk) async for chunk in _Bounded(stream)]

    endless = Endless()
    with pytest.raises(JsonError, match="expected at most 16,777,216 bytes, got more"):
        asyncio.run(read(endless))
    assert endless.chunks == 17


def test_nobody_there(quick):
    with Served(scripted("x")) as served:
        url = served.url
    with pytest.raises(ValueError, match="expected a server there, lost or found none"):
        list(Endpoint(url, "m", retries=0).ask(asking("a")))


# No answer, and no trouble ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (completion("half a sen", "length"), ("half a sen", "length")),
        (completion(None, "length"), ("", "length")),
        (completion("", "content_filter"), ("", "content_filter")),
        (completion(None, refusal="I will not."), ("I will not.", "refusal")),
        (completion("a\0b\udc00"), ("ab\ufffd", "stop")),
    ],
)
def test_what_is_no_answer_is_told_as_such(answer, reply):
    with Served(scripted(answer)) as served:
        found = one(served)
    assert (found.text, found.finish) == reply


def test_a_question_that_a_filter_stops_is_one_answer_and_no_failure():
    with Served(scripted((400, {"error": {"message": "policy", "code": "content_filter"}}, {}))) as served:
        assert one(served) == Reply("n0", "", 0, 0, "content_filter")


def test_a_server_that_does_not_count_tokens_is_believed():
    answer = completion("Yes.") | {"usage": None}
    with Served(scripted(answer)) as served:
        assert one(served) == Reply("n0", "Yes.", 0, 0, "stop")


# Keys ---------------------------------------------------------------------------------------------------------


def test_the_key_of_the_named_variable_is_sent_and_without_one_nothing(monkeypatch):
    monkeypatch.setenv("MINE", f" {CANARY}\n")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-other")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-other")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "admin-other")
    with Served(scripted("Yes.")) as served:
        one(served, key="MINE")
        one(served)
        one(served, key=None)
    assert [headers.get("authorization") for headers in served.headers] == [f"Bearer {CANARY}", None, None]
    assert "other" not in json.dumps(served.headers), "nothing of another account goes along"


@pytest.mark.parametrize("debug", [False, True])
def test_the_key_is_nowhere_but_in_the_request(debug, monkeypatch, caplog, quick):
    """A server that repeats the key it was sent, in every answer and error."""
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    caplog.set_level(logging.DEBUG if debug else logging.INFO)
    leaks = [
        completion(f"your key is {CANARY}"),
        completion(None, refusal=f"no, {CANARY}"),
        (400, {"error": {"message": f"bad {CANARY}", "code": CANARY}}, {}),
        (401, {"error": {"message": f"wrong key {CANARY}"}}, {}),
        (404, CANARY.encode(), {"Content-Type": "text/plain"}),
        (500, {"error": {"message": CANARY}}, {}),
        {CANARY: 1},
        f'{{"a": {CANARY}'.encode(),
    ]
    told = []
    for leak in leaks:
        with Served(scripted(leak)) as served:
            try:
                told.append(repr(one(served, retries=1)))
            except ValueError as error:
                told.append("".join(traceback.format_exception(error)))
        assert served.headers[0]["authorization"] == f"Bearer {CANARY}"
    assert len(told) == len(leaks)
    endpoint = Endpoint("http://127.0.0.1:1/v1", "m")
    told += [repr(endpoint), json.dumps(endpoint.parts()), caplog.text]
    assert [text for text in told if CANARY in text] == []


def test_a_key_that_is_no_secret_is_not_struck_out_of_harmless_words(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with Served(scripted("There is none.")) as served:
        assert one(served).text == "There is none."


def test_a_key_that_is_refused_is_named_by_its_variable(monkeypatch):
    refused = (403, {"error": {"message": "no"}}, {})
    with Served(scripted(refused)) as served:
        for key, told in (("MINE", "that in MINE was refused"), (None, "endpoint.key names none")):
            monkeypatch.setenv("MINE", CANARY)
            with pytest.raises(ValueError, match=rf"expected a key that it takes, {told} \(HTTP 403\)"):
                one(served, key=key)


def test_a_key_is_sent_over_https_or_to_this_machine_alone(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    for url in ("http://gpu-7.cluster:8000/v1", "http://10.0.0.7/v1", "http://127.0.0.1.evil.net/v1"):
        with pytest.raises(
            ValueError, match=r"expected https, or this machine, for the key in OPENAI_API_KEY"
        ) as caught:
            Endpoint(url, "m").check()
        assert CANARY not in str(caught.value)
        Endpoint(url, "m", key=None).check()
        Endpoint(url, "m", key="NOT_SET").check()
    for url in ("https://api.example.com/v1", "http://localhost:8000/v1", "http://127.0.0.9/v1", "http://[::1]:80/v1"):
        Endpoint(url, "m").check()


def test_a_redirect_is_not_followed_so_the_key_goes_nowhere_else(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    with Served(scripted("Yes.")) as other:
        elsewhere = (307, b"", {"Location": f"{other.url}/chat/completions"})
        with Served(scripted(elsewhere)) as served, pytest.raises(ValueError, match="got sent elsewhere"):
            one(served)
    assert other.asked == []


def test_a_proxy_of_the_environment_does_not_get_what_is_for_this_machine(monkeypatch):
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with Served(scripted("proxied")) as proxy, Served(scripted("Yes.")) as served:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        assert one(served).text == "Yes."
    assert proxy.asked == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"url": "127.0.0.1:8000/v1"}, "endpoint.url: expected an address like http"),
        ({"url": "ftp://127.0.0.1/v1"}, "endpoint.url: expected an address like http"),
        ({"url": "http://[::1/v1"}, "endpoint.url: expected an address like http"),
        ({"url": f"https://me:{CANARY}@h/v1"}, "endpoint.url: expected an address alone"),
        ({"url": f"https://h/v1?key={CANARY}"}, "endpoint.url: expected an address alone"),
        ({"model": " "}, "endpoint.model: expected the name"),
        ({"key": CANARY}, "endpoint.key: expected the name of an environment variable, got something else"),
        ({"at_once": 0}, "endpoint.at_once: expected 1 or more, got 0"),
        ({"timeout": 0.0}, "endpoint.timeout: expected 1 or more, got 0.0"),
        ({"timeout": float("nan")}, "endpoint.timeout: expected 1 or more, got nan"),
        ({"retries": -1}, "endpoint.retries: expected 0 or more, got -1"),
        ({"temperature": -0.5}, "endpoint.temperature: expected 0 or more, got -0.5"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_asked(options, told):
    with pytest.raises(ValueError, match=told) as caught:
        Endpoint(**{"url": "http://127.0.0.1/v1", "model": "m"} | options).check()
    assert CANARY not in str(caught.value)


def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{CANARY}\u2026x")
    with pytest.raises(ValueError, match="expected a key of plain letters in OPENAI_API_KEY") as caught:
        Endpoint("http://127.0.0.1/v1", "m").check()
    assert CANARY not in str(caught.value)
