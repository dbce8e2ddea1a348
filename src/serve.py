"""The verb `serve`: a policy answers chats, and a reward model scores responses, for tools that do not import us.

A door: the wing `serving` speaks the protocol, models reach it as plain functions.
"""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import torch

from .batches import PackedRows
from .checkpoints import processor_of, require_safetensors
from .encoding import Message
from .fields import at_least
from .modules.answering import Answerer, Choosing, Talks, placed
from .modules.loading import Number
from .modules.opinions import scorable
from .modules.packed import lengths
from .modules.rewardmodel import ENTRY, Load, RewardModel, Scored, judging_of
from .modules.speaking import Saying
from .queries import Query
from .serving import listening
from .serving.app import Defaults, Server
from .serving.asked import Choosing as Asked
from .serving.desk import Limits
from .serving.guard import is_loopback
from .serving.refusals import RefusedError
from .serving.scores import Scorer, Wanted
from .serving.worker import Read, Speaker
from .strictjson import loads

log = logging.getLogger(__name__)
T = TypeVar("T")
_CRITIQUE = 512
"""Tokens of a critique where a request says nothing, as `mmrlhf score` has it."""


def serve(
    policy: str | None = None,
    reward: str | None = None,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
    temperature: float = 1.0,
    frames: int = 8,
    max_new_tokens: int = 4096,
    context: int | None = None,
    at_once: int = 8,
    waiting: int = 128,
    max_seconds: float = 600.0,
    max_body: int = 67108864,
    max_pictures: int = 64,
    max_pixels: int = 100000000,
    dtype: Number = "float32",
    device: str = "auto",
) -> None:
    """Serve a policy as an OpenAI-compatible endpoint, a reward model under /score, or both.

    Chats are answered together: one that comes joins the others at their next token. SIGINT or SIGTERM ends it within
    seconds, in which running answers may end. Beyond one machine let vLLM serve the same folder.

    Args:
        policy: A checkpoint that answers chats: folder, or name on the hub.
        reward: A reward model that scores responses: folder, or name on the hub.
        name: Under which the policy is asked; default: as it is given.
        host: Where to listen. Another than this machine alone takes a key.
        port: Where to listen.
        key: The name of the environment variable that holds the key, never a key; default: whoever reaches it may ask.
        temperature: Of requests that name none; 0 takes the likeliest words, and 1 is what the protocol says.
        frames: Of a film that comes as a file.
        max_new_tokens: At most so many tokens in an answer, and as many where a request names no number.
        context: At most so many tokens of a conversation with its answer; default: as many as the checkpoint knows.
        at_once: At most so many requests are answered together.
        waiting: At most so many more wait; others are sent away with 429.
        max_seconds: After so many seconds a request is given up.
        max_body: At most so many bytes in a request.
        max_pictures: At most so many pictures in a conversation, frames of films among them.
        max_pixels: At most so many pixels in all pictures of a conversation together.
        dtype: The type of the weights. In bfloat16 rounding may make an answer another among other requests.
        device: auto, cpu, cuda or cuda:N.
    """
    at_least(1, frames=frames, max_new_tokens=max_new_tokens, context=context, at_once=at_once, max_seconds=max_seconds)
    at_least(1, max_body=max_body, max_pictures=max_pictures, max_pixels=max_pixels)
    at_least(0, waiting=waiting, temperature=temperature)
    secret = _secret(key, host)
    names = _checked(policy, reward, name, context)
    place = placed(device)
    limits = Limits(at_once, waiting, max_seconds, max_body, max_pictures, max_pixels, max_new_tokens)
    with closing(listening.listen(host, port)) as taken:
        speaker = _speaker(Answerer(policy, dtype, device), names[0], context) if policy else None
        scorer = _scorer(_Bounded.of(reward, dtype, place, context), reward) if reward else None
        server = Server(speaker, scorer, limits, Defaults(temperature, frames), host, secret)
        server.start()
        address = f"http://{f'[{host}]' if ':' in host else host}:{taken.getsockname()[1]}"
        log.info("serves %s at %s; try:  %s", " and ".join(server.names), address, _trial(address, server, key))
        try:
            listening.loop_of(server.app, lambda: server.leave(listening.GRACE)).run(sockets=[taken])
        finally:
            server.stop(listening.GRACE)


def _secret(key: str | None, host: str) -> str | None:
    """The key that clients must have, if they must have one."""
    if key is None:
        if not is_loopback(host):
            raise ValueError(
                f"host: expected 127.0.0.1, or a key beside {host}, where others reach it; put one into an environment "
                "variable, and give the name of that as --key"
            )
        return None
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
        raise ValueError(
            "key: expected the name of an environment variable, got something else, which is not shown because it may "
            "be a key; put the key into a variable, and give its name"
        )
    found = os.environ.get(key, "").strip()
    if not re.fullmatch(r"[!-~]{8,}", found):
        raise ValueError(
            f"key: expected 8 plain letters or more in the environment variable {key}, got others or none; set it"
        )
    return found


def _checked(policy: str | None, reward: str | None, name: str | None, context: int | None) -> list[str]:
    """The names under which both are asked; what cannot be served is refused, before weights are read."""
    if policy is None and reward is None:
        raise ValueError("policy: expected a checkpoint here or as reward, got neither; give --policy FOLDER")
    if policy is not None:
        folder = _sound(policy, context)
        if ENTRY in loads((folder / "config.json").read_bytes()):
            raise ValueError(
                f"policy: expected a model that answers, got the reward model {policy}; give it as --reward"
            )
    if reward is not None:
        judging_of(_sound(reward, context))
    names = [name or policy or "", reward or ""]
    if names[0] == names[1]:
        raise ValueError(f"name: expected another than the reward model's, got {names[0]!r}; give another --name")
    return names


def _sound(given: str, context: int | None) -> Path:
    """The folder of a checkpoint that can be loaded."""
    from transformers import AutoConfig

    folder, _ = scorable(given, "auto")
    require_safetensors(folder)
    processor_of(folder)
    known = _known(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    if context is not None and context > known:
        raise ValueError(f"context: expected at most {known:,}, which {given} knows, got {context:,}")
    return folder


def _known(config: Any) -> int:  # noqa: ANN401 - transformers is untyped
    """The most tokens that a checkpoint knows how to read."""
    return int(config.get_text_config().max_position_embeddings)


def _speaker(answerer: Answerer, name: str, context: int | None) -> Speaker:
    """A policy as plain functions."""
    talks, known = Talks(answerer), context or _known(answerer.reader.backbone.config)
    # A tokenizer is not made for two threads, and one reads while the other speaks.
    reading = copy.copy(answerer)
    reading.processor = copy.deepcopy(answerer.processor)
    longest = max(map(len, reading.processor.tokenizer.get_vocab()))

    def read(messages: Sequence[Message]) -> Read:
        letters = sum(len(part) for message in messages for part in message.parts if isinstance(part, str))
        if letters > known * longest:  # so no text keeps the one thread that reads for long
            raise _too_long(known, letters // longest)
        prompt = reading.read(messages)
        return Read(prompt, prompt.tokens)

    def begin(joining: Mapping[int, tuple[Any, Asked]]) -> Sequence[tuple[int, int, bool]]:
        wanted = {
            key: (prompt, Choosing(choosing.temperature, choosing.top_p, choosing.seed or 0))
            for key, (prompt, choosing) in joining.items()
        }
        return _within_memory(lambda: talks.begin(wanted))

    def step(leaving: Collection[int]) -> Sequence[tuple[int, int, bool]]:
        return _within_memory(lambda: talks.step(leaving))

    return Speaker(name, known, read, begin, step, answerer.text)


def _scorer(model: RewardModel, name: str) -> Scorer:
    """A reward model as a plain function."""

    def score(wanted: Wanted) -> Sequence[Scored]:
        saying = Saying(wanted.most or _CRITIQUE) if wanted.critique == "generated" else None
        told: dict[str, Any] = {"critique": wanted.critique, "critiques": wanted.critiques, "media": wanted.load}
        return _within_memory(lambda: model.score(wanted.query, wanted.responses, saying=saying, **told))

    return Scorer(name, model.judging.frames, score)


class _Bounded(RewardModel):
    """One that refuses what is longer than it knows."""

    known = 0

    @classmethod
    def of(cls, folder: str, dtype: Number, device: torch.device, context: int | None) -> _Bounded:
        """Load it."""
        found = cls.from_pretrained(folder, dtype=dtype, device=device)
        assert isinstance(found, _Bounded)
        found.known = context or _known(found.reader.backbone.config)
        return found

    def rows(
        self, query: Query, responses: Sequence[str], critiques: Sequence[str] = (), media: Path | Load | None = None
    ) -> PackedRows:
        """The row of `RewardModel`."""
        found = super().rows(query, responses, critiques, media)
        ((prefix, segments),) = lengths(found)
        if (longest := prefix + max(segments)) > self.known:
            raise _too_long(self.known, longest)
        return found


def _too_long(known: int, tokens: int) -> RefusedError:
    message = f"messages: expected at most {known:,} tokens, got {tokens:,} or more; shorten them, or show less"
    return RefusedError(message, code="context_length_exceeded", param="messages")


def _within_memory(function: Callable[[], T]) -> T:
    try:
        return function()
    except torch.OutOfMemoryError as error:
        raise MemoryError("of the device") from error


def _trial(address: str, server: Server, key: str | None) -> str:
    """A command that asks the server something."""
    head = f' -H "Authorization: Bearer ${key}"' if key else ""
    talk = '"messages": [{"role": "user", "content": "What is red?"}]'
    path, body = "/score", f'{talk}, "responses": ["Blood.", "Grass."]'
    if server.speaker:
        path, body = "/v1/chat/completions", f'"model": "{server.speaker.name}", {talk}'
    return f"curl {address}{path} -H 'Content-Type: application/json'{head} -d '{{{body}}}'"
