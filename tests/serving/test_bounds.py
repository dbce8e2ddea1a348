"""No request takes more of a server than it is given: pictures, bytes, time, places; and harnesses keep within."""

from __future__ import annotations

import base64
import http.client
import io
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import av
import httpx2
import numpy as np
import openai
import pytest

from mmrlhf.serving.reading import Reader

from ..datamodules.made import picture
from .made import LIMITS, Bytes, ask, client, running, scorer, shown, until

SEEN = []


def with_limits(**options):
    return type(LIMITS)(**vars(LIMITS) | options)


def by_number(wanted):
    """A score for each response; what was shown is noted."""
    SEEN.append(wanted)
    return []


@pytest.fixture(scope="module")
def model():
    return Bytes()


@pytest.fixture(scope="module")
def address(model):
    with running(model.speaker(), scorer(by_number), defaults={"frames": 3}) as address:
        yield address


def posted(address, path, messages, **options):
    told = {"messages": messages} | ({"responses": ["a"]} if path == "/score" else {"model": "bytes"})
    return httpx2.post(f"{address}{path}", json=told | options, timeout=30)


PATHS = pytest.mark.parametrize("path", ["/v1/chat/completions", "/score"])


def film(frames):
    """A film of 32 x 16 pixels as a file."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        track = container.add_stream("h264", 5)
        track.width, track.height = 32, 16
        for level in range(frames):
            container.mux(track.encode(av.VideoFrame.from_ndarray(np.full((16, 32, 3), 20 * level, np.uint8))))
        container.mux(track.encode())
    url = f"data:video/mp4;base64,{base64.b64encode(out.getvalue()).decode()}"
    return [
        {"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "?"}]}
    ]


# Pictures -----------------------------------------------------------------------------------------------------


@PATHS
def test_pictures_are_counted(address, path):
    assert posted(address, path, shown([picture(1)] * 3)).status_code == 200
    found = posted(address, path, shown([picture(1)] * 4))
    assert (found.status_code, "expected at most 3 pictures" in found.text) == (400, True)


@PATHS
def test_pixels_are_counted(address, path):
    assert posted(address, path, shown([picture(1, (100, 50)), picture(2, (100, 50))])).status_code == 200
    found = posted(address, path, shown([picture(1, (100, 51)), picture(2, (100, 50))]))
    assert (found.status_code, "expected at most 4,900 pixels" in found.text) == (400, True)


def test_of_a_film_in_a_chat_the_server_says_how_many_frames(address, model):
    assert posted(address, "/v1/chat/completions", film(9)).status_code == 200
    assert len(model.read[-1][0].parts[0]) == 3


def test_of_a_film_to_score_the_reward_model_says_how_many_frames(address):
    """Two: beside them there is room for one picture, and none for two."""
    for beside, status in ((1, 200), (2, 400)):
        talk = film(9)
        talk[0]["content"] += shown([picture(1)] * beside)[0]["content"]
        assert posted(address, "/score", talk).status_code == status


@PATHS
def test_turns_and_parts_are_counted(address, path):
    found = posted(address, path, [{"role": "user", "content": [{"type": "text", "text": ""}] * 2000}])
    assert (found.status_code, "expected at most 2,000 turns and parts" in found.text) == (400, True)


@pytest.mark.parametrize("stop", ["x" * 257, ["a", "x" * 257]])
def test_stops_are_short(address, stop):
    talk = [{"role": "user", "content": "a"}]
    found = posted(address, "/v1/chat/completions", talk, stop=stop)
    assert (found.status_code, "stop: expected at most 256 letters in each, got 257" in found.text) == (400, True)
    assert posted(address, "/v1/chat/completions", talk, stop="x" * 256).status_code == 200


# Bodies -------------------------------------------------------------------------------------------------------


class Slow:
    """A request whose body does not come."""

    def __init__(self, address, begun=b"{", length=500_000):
        self.connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
        self.connection.putrequest("POST", "/v1/chat/completions")
        self.connection.putheader("Content-Type", "application/json")
        self.connection.putheader("Content-Length", str(length))
        self.connection.endheaders()
        self.connection.send(begun)

    def answer(self):
        """What is said of it."""
        found = self.connection.getresponse()
        return found.status, json.loads(found.read())["error"]["code"], found.headers

    def close(self):
        """Go away."""
        self.connection.close()


def test_who_does_not_send_a_body_has_no_place_and_is_sent_away_in_time():
    limits = with_limits(at_once=1, waiting=0, body_seconds=0.5)
    with running(Bytes().speaker(), limits=limits) as address, client(address) as asked:
        bodies = running.last[0].desk.bodies
        slow = [Slow(address) for _ in range(5)]
        until(lambda: bodies.held == 5)
        assert ask(asked).choices[0].message.content == "<hello>"
        for each in slow:
            status, code, headers = each.answer()
            assert (status, code, headers["connection"]) == (408, "slow_body", "close")
            each.close()
        assert bodies.held == 0


def test_bodies_that_wait_have_a_bound_together():
    limits = with_limits(body=1000, body_seconds=5)
    with running(Bytes().speaker(), limits=limits) as address, client(address) as asked:
        bodies = running.last[0].desk.bodies
        slow = [Slow(address, b"x" * 900, 950) for _ in range(4)]
        until(lambda: bodies.held == 3600)
        with pytest.raises(openai.RateLimitError, match="expected at most 4,000 bytes in all requests that wait"):
            ask(asked, "x" * 500)
        for each in slow:
            each.close()
        until(lambda: bodies.held == 0)
        assert ask(asked, "x" * 300).choices[0].message.content == f"<{'x' * 300}>"


def test_a_body_that_is_too_large_in_its_last_chunk_is_refused():
    headers = {"Content-Type": "application/json"}
    with running(Bytes().speaker(), limits=with_limits(body=1000)) as address:
        found = httpx2.post(f"{address}/v1/chat/completions", content=b"x" * 1001, headers=headers)
    assert (found.status_code, found.json()["error"]["code"]) == (413, "request_too_large")


def test_a_body_is_kept_no_longer_than_until_it_is_read():
    model = Bytes()
    with running(model.speaker()) as address, ThreadPoolExecutor(1) as pool, client(address) as asked:
        bodies = running.last[0].desk.bodies
        model.free.clear()
        answer = pool.submit(ask, asked)
        until(lambda: model.left)
        assert bodies.held == 0
        model.free.set()
        assert answer.result().choices[0].message.content == "<hello>"


def test_who_comes_in_with_a_body_when_all_places_are_taken_is_sent_away():
    model = Bytes()
    limits = with_limits(at_once=1, waiting=0)
    with running(model.speaker(), limits=limits) as address, ThreadPoolExecutor(1) as pool, client(address) as asked:
        late = Slow(address, b"{", 2)
        until(lambda: running.last[0].desk.bodies.held == 1)
        model.free.clear()
        first = pool.submit(ask, asked)
        until(lambda: model.left)
        late.connection.send(b"}")
        assert late.answer()[:2] == (429, "queue_full")
        model.free.set()
        assert first.result().choices[0].message.content == "<hello>"


# Time ---------------------------------------------------------------------------------------------------------


def test_an_answer_that_took_too_long_is_not_asked_for_again():
    model = Bytes()
    with running(model.speaker(), limits=with_limits(seconds=0.3)) as address:
        with client(address, max_retries=2) as asked:
            model.free.clear()
            with pytest.raises(openai.InternalServerError, match="in the time allowed") as raised:
                ask(asked)
        assert len(model.read) == 1
        assert "retry-after" not in raised.value.response.headers
        model.free.set()


def test_a_score_is_told_when_nobody_waits_for_it_any_more():
    told, free = [], threading.Event()

    def score(_, waits):
        told.append(waits())
        free.wait(10)
        told.append(waits())
        return []

    slow = scorer(None)._replace(score=score)
    with running(scorer=slow, limits=with_limits(seconds=0.3)) as address:
        assert posted(address, "/score", [{"role": "user", "content": "a"}]).status_code == 503
        free.set()
        until(lambda: len(told) == 2)
    assert told == [True, False]


def test_what_is_being_read_does_not_keep_the_server():
    free, begun = threading.Event(), threading.Event()
    model = Bytes()

    def reading(messages):
        begun.set()
        free.wait(30)

    with running(model.speaker()._replace(read=reading), grace=0.2, limits=with_limits(seconds=1)) as address:
        with ThreadPoolExecutor(1) as pool, client(address) as asked:
            waits = pool.submit(ask, asked)
            begun.wait(5)
            begins = time.monotonic()
            with pytest.raises(openai.InternalServerError):
                waits.result()
        server, loop, thread = running.last
        loop.should_exit = True
        thread.join(5)
        server.stop(1)
        assert time.monotonic() - begins < 5
    free.set()


def test_what_is_being_read_does_not_keep_the_process():
    code = "import time; from mmrlhf.serving.reading import Reader; r = Reader(); f = r.call(lambda: time.sleep(60));"
    code += "time.sleep(0.2); assert f.running(); r.stop()"
    begun = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0
    assert time.monotonic() - begun < 25


def test_what_nobody_waits_for_is_not_read():
    reader, free, read = Reader(), threading.Event(), []
    first, second, third = reader.call(free.wait), reader.call(lambda: read.append(2)), reader.call(lambda: 1 / 0)
    second.cancel()
    free.set()
    assert first.result(5)
    assert isinstance(third.exception(5), ZeroDivisionError)
    assert read == []
    reader.stop()


# Harnesses ----------------------------------------------------------------------------------------------------


def test_the_body_of_lmms_eval_is_answered(asked, model):
    """As its `openai_compatible` asks: text before pictures, in PNG."""
    url = f"data:image/png;base64,{base64.b64encode(picture(1)).decode()}"
    parts = [{"type": "text", "text": "Is it red?"}, {"type": "image_url", "image_url": {"url": url}}]
    found = asked.chat.completions.create(
        messages=[{"role": "user", "content": parts}], model="bytes", max_completion_tokens=16, temperature=0
    )
    assert found.choices[0].message.content == "<Is it red? 60x4"
    assert model.luck["Is it red? 60x40"].temperature == 0


@pytest.mark.parametrize("detail", ["low", "high"])
def test_the_body_of_vlmevalkit_is_answered(address, model, detail):
    """As its `OpenAIWrapper` asks: a detail of pictures, which changes nothing here, n, and a key."""
    url = f"data:image/jpeg;base64,{base64.b64encode(picture(1)).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": detail}}, {"type": "text", "text": "Is it red?"}]
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    body = {"model": "bytes", "messages": talk, "n": 1, "temperature": 0, "max_tokens": 200}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-any"}
    found = httpx2.post(f"{address}/v1/chat/completions", content=json.dumps(body), headers=headers, timeout=66)
    assert found.json()["choices"][0]["message"]["content"] == "<Be brief. 60x40 Is it red?>"
    assert model.luck["Be brief. 60x40 Is it red?"].temperature == 0


@pytest.fixture(scope="module")
def asked(address):
    with client(address) as asked:
        yield asked
