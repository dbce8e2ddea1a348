"""A model that speaks bytes, a server that runs, and the clients that ask it."""

from __future__ import annotations

import base64
import threading
import time
from contextlib import contextmanager

import openai

from mmrlhf.serving.app import Defaults, Server
from mmrlhf.serving.desk import Limits
from mmrlhf.serving.listening import listen, loop_of
from mmrlhf.serving.scores import Scorer
from mmrlhf.serving.worker import Read, Speaker

LIMITS = Limits(at_once=4, waiting=8, seconds=20, body=2**20, pictures=3, pixels=10_000, tokens=400, responses=3)
END = -1


def told(messages):
    """A conversation as one text, a picture as its size."""
    return " ".join(
        part
        if isinstance(part, str)
        else "x".join(map(str, part.size))
        if not isinstance(part, list)
        else f"film {len(part)}"
        for message in messages
        for part in message.parts
    )


class Bytes:
    """Answers with bytes, one at each step, and notes who was answered together; may be held, and may fail."""

    def __init__(self, say=lambda text: f"<{text}>", context=1000):
        self.say, self.context = say, context
        self.free, self.steps = threading.Event(), threading.Semaphore(0)
        self.free.set()
        self.left, self.together, self.read, self.luck = {}, [], [], {}
        self.breaks_at = 0

    def speaker(self, name="bytes"):
        """It as plain functions."""
        return Speaker(
            name, self.context, self.reading, self.begin, self.step, lambda ids: bytes(ids).decode("utf-8", "replace")
        )

    def reading(self, messages):
        """A conversation, of as many tokens as bytes."""
        self.read.append(messages)
        text = told(messages)
        if "unreadable" in text:
            raise ValueError("messages: expected something else")
        return Read(text, len(text.encode()))

    def begin(self, joining):
        """The first byte of each."""
        if any("broken" in prompt for prompt, _ in joining.values()):
            raise RuntimeError("secret words of a broken model")
        for key, (prompt, choosing) in joining.items():
            self.left[key] = [*self.say(prompt).encode(), END]
            self.luck[prompt] = choosing
        return [self.next(key) for key in joining]

    def step(self, leaving):
        """The next byte of each."""
        self.left = {key: ids for key, ids in self.left.items() if key not in leaving and ids}
        if not self.left:
            return []
        self.free.wait(10)
        if len(self.left) == self.breaks_at:
            self.breaks_at = 0
            raise MemoryError("all is full")
        self.together.append(len(self.left))
        return [self.next(key) for key in self.left]

    def next(self, key):
        """The next byte of one."""
        token = self.left[key].pop(0)
        return key, token, token == END


@contextmanager
def running(speaker=None, scorer=None, limits=LIMITS, grace=2.0, **options):
    """A server on a port of its own; its address."""
    server = Server(speaker, scorer, limits, Defaults(**options.pop("defaults", {})), **options)
    taken = listen("127.0.0.1", 0)
    loop = loop_of(server.app, lambda: server.leave(grace))
    thread = threading.Thread(target=loop.run, kwargs={"sockets": [taken]})
    server.start()
    thread.start()
    running.last = server, loop, thread
    try:
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
    finally:
        loop.should_exit = True
        thread.join(grace + 5)
        server.stop(5)
        taken.close()
    assert not thread.is_alive(), "the server did not end"


def client(address, key="any", **options):
    """The official client, without second attempts."""
    options = {"max_retries": 0, "timeout": 30} | options
    transport = openai.DefaultHttpxClient(verify=False, trust_env=False)
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, http_client=transport, **options)


def ask(asked, text="hello", model="bytes", **options):
    """A chat of one question."""
    return asked.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)


def shown(data, text="What is it?", kind="image/png"):
    """A question about pictures."""
    urls = [f"data:{kind};base64,{base64.b64encode(one).decode()}" for one in data]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def until(condition, seconds=5.0):
    """Wait for what must become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.01)


def scorer(score, name="judge", frames=2, read=lambda wanted: wanted):
    """A reward model whose scores are those of a function of what is wanted."""
    return Scorer(name, frames, read, lambda wanted, waits: score(wanted))
