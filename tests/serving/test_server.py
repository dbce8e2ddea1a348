"""Whoever asks as OpenAI's client asks is answered as by OpenAI, whatever others ask at the same time."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from starlette.requests import Request

from mmrlhf.serving.bodies import Bodies
from mmrlhf.serving.refusals import RefusedError

from ..datamodules.made import picture
from .made import LIMITS, Bytes, ask, client, running, shown, until


@pytest.fixture(scope="module")
def model():
    return Bytes()


@pytest.fixture(scope="module")
def address(model):
    with running(model.speaker()) as address:
        yield address


@pytest.fixture(scope="module")
def asked(address):
    with client(address) as asked:
        yield asked


# Answers ------------------------------------------------------------------------------------------------------


def test_the_models_are_listed_and_found_by_name(asked):
    assert [model.id for model in asked.models.list()] == ["bytes"]
    assert asked.models.retrieve("bytes").id == "bytes"
    with pytest.raises(openai.NotFoundError):
        asked.models.retrieve("other")


def test_a_chat_is_answered_with_its_usage(asked):
    found = ask(asked, "hello")
    assert found.object == "chat.completion"
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "<hello>", "stop")
    assert found.usage.to_dict() == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13}
    assert found.model == "bytes"


def test_all_turns_and_pictures_reach_the_model_in_their_order(asked, model):
    system = {"role": "system", "content": "be brief"}
    earlier = [{"role": "user", "content": "one"}, {"role": "assistant", "content": [{"type": "text", "text": "two"}]}]
    talk = [system, *earlier, *shown([picture(1, (20, 12)), picture(2, (9, 30))], "three")]
    found = asked.chat.completions.create(model="bytes", messages=talk)
    assert found.choices[0].message.content == "<be brief one two 20x12 9x30 three>"
    assert [message.role for message in model.read[-1]] == ["system", "user", "assistant", "user"]


def test_an_answer_is_cut_after_its_most_tokens_by_either_name(asked):
    for name in ("max_tokens", "max_completion_tokens"):
        found = ask(asked, "hello", **{name: 3})
        assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("<he", "length")
        assert found.usage.completion_tokens == 3


def test_an_answer_ends_before_a_stop(asked):
    found = ask(asked, "hello", stop=["lo", "l"])
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("<he", "stop")
    assert ask(asked, "hello", stop="never").choices[0].message.content == "<hello>"


def streamed(asked, text, **options):
    chunks = list(ask(asked, text, stream=True, **options))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    return chunks


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("hello", {}),
        ("na\u00efve \U0001f680 \u4f60\u597d \u2028 \x85 end", {}),
        ("hello there", {"stop": ["the", "lo!"]}),
        ("hello", {"max_tokens": 4}),
        ("\U0001f680", {"max_tokens": 3}),
        ("hello", {"stop": "<"}),
    ],
)
def test_a_stream_tells_what_is_told_at_once_in_whole_characters(asked, text, options):
    whole = ask(asked, text, **options)
    chunks = streamed(asked, text, **options)
    pieces = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [
        whole.choices[0].finish_reason
    ]
    assert all("\ufffd" not in piece for piece in pieces[:-1])


def test_a_stream_comes_token_by_token(asked):
    assert [chunk.choices[0].delta.content for chunk in streamed(asked, "ab")] == ["", "<", "a", "b", ">", None]


def test_a_stream_ends_with_its_usage_where_that_is_asked(asked):
    *chunks, last = streamed(asked, "hello", stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.to_dict() == ask(asked, "hello").usage.to_dict()
    assert all(chunk.usage is None for chunk in chunks)
    assert all("usage" not in chunk.to_dict() for chunk in streamed(asked, "hello"))


def test_a_stream_has_the_form_of_events(address):
    body = {"model": "bytes", "messages": [{"role": "user", "content": "a\u2028\x85b"}], "stream": True}
    found = httpx2.post(f"{address}/v1/chat/completions", json=body)
    assert found.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, nothing = found.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    assert found.content.isascii(), "some readers take rare characters for ends of lines"
    assert all(json.loads(event.removeprefix("data: "))["model"] == "bytes" for event in events)


def test_how_an_answer_is_chosen_reaches_the_model(asked, model):
    ask(asked, "drawn", temperature=0.7, top_p=0.5, seed=3)
    assert model.luck["drawn"] == (0.7, 0.5, 3)
    ask(asked, "usual")
    assert model.luck["usual"][:2] == (1.0, 1.0)
    first = model.luck["usual"].seed
    ask(asked, "usual")
    assert model.luck["usual"].seed != first, "without a seed another is drawn each time"


def test_what_changes_nothing_is_taken(asked):
    found = ask(
        asked,
        "hello",
        n=1,
        user="me",
        metadata={"a": "b"},
        store=False,
        frequency_penalty=0,
        presence_penalty=0.0,
        logprobs=False,
        response_format={"type": "text"},
        logit_bias={},
        extra_body={"reasoning_effort": None, "tools": None},
    )
    assert found.choices[0].message.content == "<hello>"


# Together -----------------------------------------------------------------------------------------------------


def test_requests_that_come_together_are_answered_together_each_as_alone(asked, model):
    texts = [f"text {number} " * (number + 1) for number in range(8)]
    alone = [ask(asked, text).choices[0].message.content for text in texts]
    model.together.clear()
    model.free.clear()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(ask, asked, text) for text in texts]
        until(lambda: len(model.left) + len(running.last[0].worker._coming) == LIMITS.at_once)
        until(lambda: running.last[0].desk._here == len(texts))
        model.free.set()
        found = [each.result().choices[0].message.content for each in waiting]
    assert found == alone == [f"<{text}>" for text in texts]
    assert max(model.together) == LIMITS.at_once


def test_one_that_comes_later_joins_at_the_next_token_and_may_end_first(asked, model):
    model.free.clear()
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(ask, asked, "long " * 50)
        until(lambda: model.left)
        short = pool.submit(ask, asked, "s")
        until(lambda: len(running.last[0].worker._coming) == 1)
        model.free.set()
        assert short.result().choices[0].message.content == "<s>"
        assert long.result().choices[0].message.content == f"<{'long ' * 50}>"


def test_a_request_that_fails_takes_nobody_with_it(asked, model, caplog):
    model.free.clear()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, asked, "first")
        until(lambda: model.left)
        others = [pool.submit(ask, asked, text) for text in ("good", "broken", "fine")]
        until(lambda: len(running.last[0].worker._coming) == 3)
        model.free.set()
        assert first.result().choices[0].message.content == "<first>"
        assert others[0].result().choices[0].message.content == "<good>"
        assert others[2].result().choices[0].message.content == "<fine>"
        with pytest.raises(openai.InternalServerError, match="the model failed") as raised:
            others[1].result()
    assert raised.value.code == "model_failed"
    assert "secret words" not in str(raised.value)
    assert "secret words" in caplog.text


def test_a_failure_of_all_is_told_to_all_and_the_next_are_answered(asked, model):
    model.free.clear()
    with ThreadPoolExecutor(4) as pool:
        plain, stream = pool.submit(ask, asked, "plain"), pool.submit(streamed, asked, "stream")
        until(lambda: len(model.left) + len(running.last[0].worker._coming) == 2)
        model.breaks_at = 2
        model.free.set()
        with pytest.raises(openai.InternalServerError, match="all is full") as raised:
            plain.result()
        with pytest.raises(openai.APIError, match="all is full"):
            stream.result()
    assert (raised.value.status_code, raised.value.code) == (503, "no_memory")
    until(lambda: not model.left)
    assert ask(asked, "next").choices[0].message.content == "<next>"


def test_a_client_that_goes_away_frees_its_place(address, model):
    server = running.last[0]
    for stream in (True, False):
        model.free.clear()
        body = json.dumps({"model": "bytes", "messages": [{"role": "user", "content": "gone " * 40}], "stream": stream})
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            until(lambda: model.left)
            if stream:
                assert b"200 OK" in connection.recv(1000)
        until(lambda: server.desk._here == 0)
        model.together.clear()
        model.free.set()
        until(lambda: not model.left and not server.worker._running)
        assert len(model.together) < 20, "nobody writes on for it"
        assert server.desk._turns._value == LIMITS.at_once


def test_one_that_waits_and_goes_away_is_never_read(address, model):
    server = running.last[0]
    model.free.clear()
    with ThreadPoolExecutor(LIMITS.at_once) as pool, client(address) as asked:
        first = [pool.submit(ask, asked, f"first {number}") for number in range(LIMITS.at_once)]
        until(lambda: server.desk._turns._value == 0)
        with pytest.raises(openai.APITimeoutError), client(address, timeout=0.2) as hasty:
            ask(hasty, "hasty")
        until(lambda: server.desk._here == LIMITS.at_once)
        model.free.set()
        assert [each.result().choices[0].finish_reason for each in first] == ["stop"] * LIMITS.at_once
    assert all("hasty" not in str(messages) for messages in model.read)


def test_who_comes_when_all_places_are_taken_is_sent_away_and_told_when_to_come_again(address, model):
    server, places = running.last[0], LIMITS.at_once + LIMITS.waiting
    model.free.clear()
    with ThreadPoolExecutor(places) as pool, client(address) as asked:
        here = [pool.submit(ask, asked, f"{number}") for number in range(places)]
        until(lambda: server.desk._here == places)
        with pytest.raises(openai.RateLimitError, match="expected at most 12 requests at once") as raised:
            ask(asked, "x" * 100_000)
        model.free.set()
        assert {each.result().choices[0].message.content for each in here} == {f"<{n}>" for n in range(places)}
    assert raised.value.response.headers["retry-after"] == "1"
    assert raised.value.code == "queue_full"
    assert server.desk._here == 0


# What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        ({"n": 2}, "n: expected 1 or nothing, got 2", "n"),
        ({"n": True}, "n: expected 1 or nothing, got True", "n"),
        ({"tools": [{"type": "function"}]}, r"tools: expected \[\] or nothing", "tools"),
        ({"logprobs": True}, "logprobs: expected False or nothing, got True", "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format: expected", "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: expected 0 or nothing, got 0.5", "frequency_penalty"),
        ({"reasoning_effort": "high"}, "reasoning_effort: expected no such option", "reasoning_effort"),
        ({"repetition_penalty": 1.1}, "repetition_penalty: expected no such option", "repetition_penalty"),
        ({"temperature": 3}, "temperature: expected a number from 0 to 2, got 3", "temperature"),
        ({"temperature": "hot"}, "temperature: expected a number from 0 to 2, got 'hot'", "temperature"),
        ({"top_p": True}, "top_p: expected a number from 0 to 1, got True", "top_p"),
        ({"seed": 1.5}, "seed: expected a whole number, got 1.5", "seed"),
        ({"seed": 2**70}, "seed: expected a whole number of 64 bits", "seed"),
        ({"max_tokens": 0}, "max_tokens: expected 1 or more, got 0", "max_tokens"),
        ({"max_tokens": 401}, "max_tokens: expected at most 400, got 401", "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "expected the same as max_completion_tokens", "max_tokens"),
        ({"stop": ["a"] * 5}, "stop: expected a text, or a list of at most 4", "stop"),
        ({"stop": [""]}, "stop: expected a text", "stop"),
        ({"stop": [7]}, "stop: expected text, got int 7", "stop"),
        ({"stream": "yes"}, "stream: expected true or false, got 'yes'", "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options: expected stream to be true", "stream_options"),
        ({"messages": []}, "messages: expected one or more, got none", "messages"),
        ({"messages": "hello"}, "messages: expected a list, got 'hello'", "messages"),
        ({"messages": [7]}, r"messages\[0\]: expected a JSON object, got 7", "messages[0]"),
        ({"messages": [{"role": "tool", "content": ""}]}, "role: expected one of", "messages[0]"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: content: expected a text or a list", "messages[0]"),
        ({"messages": [{"role": "user", "content": "a\0"}]}, "content: expected text without NUL", "messages[0]"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "name: expected role and", "messages[0]"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "expected the user's turn last", "messages"),
        ({"messages": [{"role": "user", "content": "unreadable"}]}, "expected something else", "messages"),
    ],
)
def test_what_is_not_done_is_refused_by_name_and_never_ignored(asked, options, message, param):
    told = {"messages": [{"role": "user", "content": "hello"}]} | options
    with pytest.raises(openai.BadRequestError, match=message) as raised:
        asked.post("/chat/completions", body={"model": "bytes"} | told, cast_to=object)
    assert (raised.value.type, raised.value.param) == ("invalid_request_error", param)


def test_another_model_is_not_found(asked):
    with pytest.raises(openai.NotFoundError, match="model: expected one of 'bytes', got 'gpt'") as raised:
        ask(asked, model="gpt")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        asked.post("/chat/completions", body={"messages": []}, cast_to=object)


def test_what_does_not_fit_into_the_context_is_refused_as_openai_does(asked, model):
    with pytest.raises(
        openai.BadRequestError, match="expected at most 1,000 tokens with the answer, got 990"
    ) as raised:
        ask(asked, "x" * 990, max_tokens=11)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="got 1,000 and 1 for the answer"):
        ask(asked, "x" * 1000)
    found = ask(asked, "x" * 990, max_tokens=10)
    assert (found.usage.total_tokens, found.choices[0].finish_reason) == (1000, "length")
    assert ask(asked, "x" * 990).usage.total_tokens == 1000
    assert ask(asked, "x" * 500).usage.completion_tokens == LIMITS.tokens


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "expected one JSON value"),
        (b"[]", "body: expected a JSON object"),
        (b'{"model": "bytes", "model": "bytes"}', "expected each name once"),
        (b'{"temperature": NaN}', "expected finite numbers"),
        (b"\xff", "expected UTF-8"),
        (b"[" * 40_000, "few levels of brackets"),
        (b"[" * 50_001, "expected at most 50,000 times [ and {, got 50,001"),
        (b"[{" * 25_001, "expected at most 50,000 times [ and {, got 50,002"),
        (b"[" + b"1," * 500_001 + b"1]", "expected at most 500,000 times ,"),
    ],
)
def test_a_body_that_is_no_strict_json_is_refused(address, body, message):
    found = httpx2.post(f"{address}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == 400
    assert message in found.json()["error"]["message"]


def test_a_body_that_is_too_large_is_refused_however_it_comes(asked, address):
    with pytest.raises(openai.APIStatusError, match="expected at most 1,048,576 bytes, got more") as raised:
        ask(asked, "x" * 3_000_000)
    assert (raised.value.status_code, raised.value.code) == (413, "request_too_large")
    plain = http.client.HTTPConnection(address.removeprefix("http://"))  # which hears nothing until it has written all
    plain.request("POST", "/v1/chat/completions", b"x" * 4_000_000, {"Content-Type": "application/json"})
    assert plain.getresponse().status == 413
    plain.close()
    chunks = iter([b"x" * 1_000_000] * 3)
    found = httpx2.post(f"{address}/v1/chat/completions", content=chunks, headers={"Content-Type": "application/json"})
    assert found.status_code == 413


async def filled(bodies, request):
    with bodies.body() as body:
        await bodies.fill(body, request, request.stream())
        return body.data


@pytest.mark.parametrize(("chunks", "taken"), [(20, 20), (1000, 52)])
def test_the_rest_of_a_body_that_is_too_large_is_taken_in_within_bounds(chunks, taken):
    """So that a client which hears nothing until it has written all hears the refusal."""
    sent = []

    async def receive():
        sent.append(1)
        return {"type": "http.request", "body": b"x" * 100, "more_body": len(sent) < chunks}

    scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
    with pytest.raises(RefusedError, match="expected at most 1,000 bytes"):
        asyncio.run(filled(Bodies(1000, 4000, 30), Request(scope, receive)))
    assert len(sent) == taken


def test_a_page_of_another_site_can_neither_ask_nor_read(address):
    body = json.dumps({"model": "bytes", "messages": [{"role": "user", "content": "a"}]})
    simple = {"Content-Type": "text/plain", "Origin": "https://example.org"}
    found = httpx2.post(f"{address}/v1/chat/completions", content=body, headers=simple)
    assert found.status_code == 400
    assert "Content-Type: expected application/json" in found.text
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    found = [
        httpx2.options(f"{address}/v1/chat/completions", headers=asked),
        httpx2.get(f"{address}/v1/models", headers=asked),
    ]
    assert all(not name.startswith("access-control") for each in found for name in each.headers)


def test_on_this_machine_only_its_own_names_are_heard(address):
    port = address.rpartition(":")[2]
    for host, status in {
        f"127.0.0.1:{port}": 200,
        "localhost": 200,
        f"LOCALHOST:{port}": 200,
        f"[::1]:{port}": 200,
        f"evil.example:{port}": 400,
        "127.0.0.1.evil.example": 400,
        "[": 400,
        "": 400,
    }.items():
        found = httpx2.get(f"{address}/v1/models", headers={"Host": host})
        assert (host, found.status_code) == (host, status)
    assert found.json()["error"]["code"] == "wrong_host"


def test_addresses_that_are_none_and_methods_that_are_none_are_told_as_errors(address):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/score", 404),
    ):
        found = httpx2.request(method, f"{address}{path}")
        assert found.status_code == status
        assert found.json()["error"]["code"] == "not_found"


def test_health_is_told(address):
    assert httpx2.get(f"{address}/health").json() == {"status": "ok"}


# Keys, time, ends ---------------------------------------------------------------------------------------------


def test_without_the_key_nothing_but_health_is_told():
    key = "sk-canary-1234"
    with running(Bytes().speaker(), key=key) as address:
        with client(address, key) as asked:
            assert ask(asked).choices[0].message.content == "<hello>"
            assert len(list(asked.models.list())) == 1
        for wrong in ("sk-canary-12345", "sk-canary-123", "x"):
            with client(address, wrong) as asked, pytest.raises(openai.AuthenticationError) as raised:
                ask(asked)
            assert raised.value.code == "invalid_api_key"
            assert key not in raised.value.response.text
        assert httpx2.get(f"{address}/v1/models").status_code == 401
        assert httpx2.get(f"{address}/v1/models", headers={"Authorization": key}).status_code == 401
        assert httpx2.get(f"{address}/nothing").status_code == 401
        assert httpx2.get(f"{address}/health").status_code == 200


def test_an_answer_that_takes_too_long_is_given_up_and_its_place_is_free():
    model = Bytes()
    with running(model.speaker(), limits=LIMITS_SHORT) as address, client(address) as asked:
        model.free.clear()
        with pytest.raises(openai.InternalServerError, match="in the time allowed") as raised:
            ask(asked)
        assert (raised.value.status_code, raised.value.code) == (503, "timeout")
        with pytest.raises(openai.APIError, match="in the time allowed"):
            list(ask(asked, stream=True))
        model.free.set()
        until(lambda: running.last[0].desk._here == 0)
        assert ask(asked).choices[0].message.content == "<hello>"


LIMITS_SHORT = type(LIMITS)(**{**vars(LIMITS), "seconds": 0.4})


def test_at_its_end_running_answers_end_and_who_waits_is_told():
    model = Bytes()
    with running(model.speaker(), limits=type(LIMITS)(**{**vars(LIMITS), "at_once": 1})) as address:
        server, loop, thread = running.last
        with ThreadPoolExecutor(2) as pool, client(address) as asked:
            model.free.clear()
            first = pool.submit(ask, asked, "first")
            until(lambda: model.left)
            second = pool.submit(ask, asked, "second")
            until(lambda: server.desk._here == 2)
            loop.should_exit = True
            until(lambda: server.desk._closed)
            model.free.set()
            assert first.result().choices[0].message.content == "<first>"
            with pytest.raises(openai.InternalServerError, match="is ending") as raised:
                second.result()
        thread.join(5)
        assert not thread.is_alive()
    assert raised.value.status_code == 503


def test_an_answer_that_does_not_end_does_not_keep_the_server():
    model = Bytes(say=lambda text: text * 10_000, context=100_000)
    slow, model.step = model.step, None

    def step(leaving):
        threading.Event().wait(0.02)
        return slow(leaving)

    model.step = step
    with running(model.speaker(), grace=0.3) as address, client(address) as asked:
        _, loop, thread = running.last
        stream = iter(ask(asked, "for ever ", stream=True))
        next(stream)
        loop.should_exit = True
        with pytest.raises(openai.APIError, match="is ending"):
            list(stream)
        thread.join(3)
        assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_dies_is_told_to_all_and_by_health():
    model = Bytes()

    def step(leaving):
        raise SystemExit

    model.step = step
    with running(model.speaker()) as address, client(address) as asked:
        with pytest.raises(openai.InternalServerError, match="is ending"):
            ask(asked)
        with pytest.raises(openai.InternalServerError, match="is ending"):
            ask(asked)
        assert httpx2.get(f"{address}/health").status_code == 503


def test_an_error_of_the_client_is_none_of_ours():
    assert RefusedError("x").body["error"]["type"] == "invalid_request_error"
    assert RefusedError("x", 500).body["error"]["type"] == "server_error"
