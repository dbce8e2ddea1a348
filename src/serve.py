"""The verb `serve`: a policy answers chats, and a reward model scores responses, for tools that do not import us.

A door: the wing `serving` speaks the protocol, models reach it as plain functions.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from socket import socket
from typing import Any, NamedTuple, TypeVar

import torch

from .batches import PackedRows
from .checkpoints import processor_of, require_safetensors
from .encoding import Message, encode_text
from .fields import at_least
from .modules.answering import Answerer, Choosing, Talks, placed
from .modules.loading import Number
from .modules.opinions import scorable
from .modules.packed import lengths
from .modules.rewardmodel import ENTRY, RewardModel, Scored, judging_of
from .modules.speaking import Saying, UnwantedError
from .serving import listening
from .serving.app import Defaults, Server
from .serving.asked import Choosing as Asked
from .serving.desk import Limits
from .serving.guard import secret_of
from .serving.refusals import RefusedError
from .serving.scores import Scorer, Wanted
from .serving.worker import Read, Speaker, ending
from .strictjson import loads

log = logging.getLogger(__name__)
T = TypeVar("T")
_CRITIQUE = 512
"""Tokens of a critique where a request says nothing, as `mmrlhf score` has it."""
_SPARE = 128
"""Connections beside those that are answered or wait: of who is told that there is no place, or says nothing."""
_BRANCHES = 8
"""So many times the text of a longest conversation may stand in all responses to score together."""


def serve(
    policy: str | None = None,
    reward: str | None = None,
    name: str | None = None,
    reward_name: str | None = None,
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
        name: Under which the policy is asked; default: the last part of its folder, without `model`, or as on the hub.
        reward_name: Under which the reward model is asked; default: likewise.
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
        max_body: At most so many bytes in a request, and four times as many in all that wait.
        max_pictures: At most so many pictures in a conversation, frames of films among them.
        max_pixels: At most so many pixels in all pictures of a conversation together.
        dtype: The type of the weights. In bfloat16 rounding may make an answer another among other requests.
        device: auto, cpu, cuda or cuda:N.
    """
    at_least(1, frames=frames, max_new_tokens=max_new_tokens, context=context, at_once=at_once, max_seconds=max_seconds)
    at_least(1, max_body=max_body, max_pictures=max_pictures, max_pixels=max_pixels)
    at_least(0, waiting=waiting, temperature=temperature)
    secret = secret_of(key, host)
    names = _checked(policy, reward, (name, reward_name), context)
    place = placed(device)
    limits = Limits(
        at_once, waiting, max_seconds, body=max_body, pictures=max_pictures, pixels=max_pixels, tokens=max_new_tokens
    )
    with closing(listening.listen(host, port)) as taken:
        speaker = _speaker(Answerer(policy, dtype, device), names[0], context) if policy else None
        judge = RewardModel.from_pretrained(reward, dtype=dtype, device=place) if reward else None
        scorer = _scorer(judge, names[1], context) if judge else None
        _run(Server(speaker, scorer, limits, Defaults(temperature, frames), host, secret), taken, host, key)


def _run(server: Server, taken: socket, host: str, key: str | None) -> None:
    """Answer until a signal comes."""
    server.start()
    address = f"http://{f'[{host}]' if ':' in host else host}:{taken.getsockname()[1]}"
    log.info("serves %s at %s; try:  %s", " and ".join(server.names), address, _trial(address, server, key))
    most = server.limits.at_once + server.limits.waiting + _SPARE
    try:
        listening.loop_of(server.app, lambda: server.leave(listening.GRACE), most).run(sockets=[taken])
    finally:
        server.stop(listening.GRACE)


def _checked(
    policy: str | None, reward: str | None, names: tuple[str | None, str | None], context: int | None
) -> list[str]:
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
    found = [name or _name(given or "") for name, given in zip(names, (policy, reward), strict=True)]
    if found[0] == found[1]:
        raise ValueError(f"name: expected another than the reward model's, got {found[0]!r}; give another --name")
    return found


def _name(given: str) -> str:
    """What a checkpoint is called by default: clients are not told where it lies."""
    folder = Path(given).absolute()
    if not given or not folder.is_dir():
        return given
    return folder.parent.name if folder.name == "model" else folder.name


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
    longest = _longest(reading.processor)

    def read(messages: Sequence[Message]) -> Read:
        letters = sum(len(part) for message in messages for part in message.parts if isinstance(part, str))
        _require_letters(letters, known, longest)
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


class _Ready(NamedTuple):
    """What is to be scored, as tokens."""

    rows: PackedRows
    critiques: Sequence[str]
    saying: Saying | None
    """How critiques are generated, where they are."""


def _scorer(model: RewardModel, name: str, context: int | None) -> Scorer:
    """A reward model as plain functions."""
    known = context or _known(model.reader.backbone.config)
    reading = copy.copy(model)
    reading.processor = copy.deepcopy(model.processor)
    longest = _longest(reading.processor)
    end = 1 + len(encode_text(reading.processor.tokenizer, model.judging.after_critique))  # of a critique

    def read(wanted: Wanted) -> _Ready:
        query, critiques = wanted.query, wanted.critiques or [""] * len(wanted.responses)
        asked = sum(map(len, (query.system, query.prompt, *(turn.text for turn in query.history))))
        said = [len(each) + len(critique) for each, critique in zip(wanted.responses, critiques, strict=True)]
        _require_letters(max(asked + max(said), sum(said) // _BRANCHES), known, longest)
        rows = reading.rows(query, wanted.responses, wanted.critiques, wanted.load)
        ((prefix, segments),) = lengths(rows)
        used = prefix + max(segments)
        generated = wanted.critique == "generated"
        most = wanted.most or max(1, min(_CRITIQUE, known - used - end))
        if (needed := used + (most + end) * generated) > known:
            raise _too_long(known, needed)
        return _Ready(rows, critiques, Saying(most) if generated else None)

    def score(ready: _Ready, waits: Callable[[], bool]) -> Sequence[Scored]:
        try:
            if ready.saying:
                return _within_memory(partial(model.said, ready.rows, ready.saying, waits))
            return _within_memory(partial(model.weighed, ready.rows, ready.critiques))
        except UnwantedError as error:  # which nobody hears, unless it is the server that goes
            raise ending() from error

    return Scorer(name, model.judging.frames, read, score)


def _longest(processor: Any) -> int:  # noqa: ANN401 - transformers is untyped
    """The most letters that a token may stand for."""
    return max(map(len, processor.tokenizer.get_vocab()))


def _require_letters(letters: int, known: int, longest: int) -> None:
    """Refuse what is too long whatever its tokens are, so that no text keeps the one thread that reads for long."""
    if letters > known * longest:
        raise _too_long(known, letters // longest)


def _too_long(known: int, tokens: int) -> RefusedError:
    message = f"messages: expected at most {known:,} tokens, got {tokens:,} or more; shorten them, or show less"
    return RefusedError(message, code="context_length_exceeded", param="messages")


def _within_memory(function: Callable[[], T]) -> T:
    try:
        return function()
    except torch.OutOfMemoryError as error:
        raise MemoryError("of the device") from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):  # which has no error of its own
            raise MemoryError("of the machine") from error
        raise


def _trial(address: str, server: Server, key: str | None) -> str:
    """A command that asks the server something."""
    head = f' -H "Authorization: Bearer ${key}"' if key else ""
    talk = '"messages": [{"role": "user", "content": "What is red?"}]'
    path, body = "/score", f'{talk}, "responses": ["Blood.", "Grass."]'
    if server.speaker:
        path, body = "/v1/chat/completions", f'"model": "{server.speaker.name}", {talk}'
    return f"curl {address}{path} -H 'Content-Type: application/json'{head} -d '{{{body}}}'"
