"""A model on this machine answers conversations, many at a time, a token of each at every step.

Prompts are read and remembered as the reward model reads what it criticises, so an answer does not depend on what
else is answered with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence

from ..batches import Continuation, moved, pack
from ..checkpoints import processor_of, resolved
from ..encoding import encode_prompt
from ..text import mend
from .loading import Number, load_backbone
from .packed import PackedReader
from .remembering import Together, memories
from .speaking import media_of, stops_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ..batches import PackedRows
    from ..encoding import Message
    from .remembering import Alone


class Answer(NamedTuple):
    """What a model says to one conversation."""

    text: str
    tokens: int
    """How many were chosen, the end of the turn among them."""
    cut: bool
    """Whether it had to end before it said so itself."""
    asked: int
    """Tokens of the conversation, those of its media among them."""


class Choosing(NamedTuple):
    """How the tokens of an answer are chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token; above it tokens are drawn."""
    top_p: float = 1.0
    """Tokens are drawn among the likeliest, as many as have this share together."""
    seed: int = 0
    """Of the luck with which tokens are drawn: with the same a conversation gets the same answer, whoever is answered
    beside it."""


class Prompt(NamedTuple):
    """A conversation up to where the model begins to speak, as a row of its own."""

    row: PackedRows
    tokens: int


class Chosen(NamedTuple):
    """The next token of an answer."""

    key: int
    token: int
    over: bool
    """Whether it ends the answer, of which it is no part then."""


class Answerer:
    """A checkpoint of a known family, with its processor, that answers.

    Args:
        name_or_path: A folder, or the name of a repository on the hub.
        dtype: The type of the weights. In bfloat16 rounding may make an answer another in another batch.
        device: auto, cpu, cuda or cuda:N.
        at_once: At most so many conversations are answered together.
    """

    def __init__(
        self, name_or_path: str | Path, dtype: Number = "float32", device: str = "auto", at_once: int = 8
    ) -> None:
        if at_once < 1:
            raise ValueError(f"at_once: expected 1 or more, got {at_once}")
        place, folder = placed(device), resolved(name_or_path)
        self.processor = processor_of(folder)
        reader = PackedReader(load_backbone(str(folder), dtype=dtype))
        self.reader: Any = reader.eval().requires_grad_(False).to(place)
        self.device, self.at_once = place, at_once

    def answers(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int = 512) -> list[Answer]:
        """The answer to each conversation in the likeliest words, in their order."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected 1 or more, got {max_new_tokens}; 512 is usual")
        found = []
        for first in range(0, len(conversations), self.at_once):
            found += self._together(conversations[first : first + self.at_once], max_new_tokens)
        return found

    def _together(self, conversations: Sequence[Sequence[Message]], most: int) -> list[Answer]:
        prompts = [self.read(messages) for messages in conversations]
        said: list[list[int]] = [[] for _ in prompts]
        try:
            talks = Talks(self)
            found = talks.begin({key: (prompt, Choosing()) for key, prompt in enumerate(prompts)})
            while found:
                for key, token, over in found:
                    said[key] += [] if over else [token]
                found = talks.step({key for key, ids in enumerate(said) if len(ids) == most})
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"at_once: no memory for answers to {len(prompts)} conversations of "
                f"{sum(prompt.tokens for prompt in prompts):,} tokens together; give fewer, or fewer frames of films"
            ) from error
        cuts = [len(ids) == most for ids in said]
        told = zip(prompts, said, cuts, strict=True)
        return [Answer(self.text(ids), len(ids) + (not cut), cut, prompt.tokens) for prompt, ids, cut in told]

    def read(self, messages: Sequence[Message]) -> Prompt:
        """A conversation as the model reads it: the last token of its row is the one to go on from."""
        try:
            prompt = encode_prompt(self.processor, messages)
        except TemplateError as error:
            raise ValueError(
                f"messages: expected turns that the chat template takes, got others ({error}); let user and assistant "
                "alternate"
            ) from error
        ids, told = prompt.input_ids, {name: value[:-1] for name, value in prompt.per_token.items()}
        row = pack([ids[:-1]], [[Continuation(ids[-1:], ids[:0])]], prompt.features, 0, [told])
        return Prompt(row, len(ids))

    def text(self, ids: Sequence[int]) -> str:
        """What tokens say, without special ones and what is no text."""
        decode = self.processor.tokenizer.decode
        return mend(decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)).text


@dataclass
class _Voice:
    """An answer that grows."""

    key: int
    choosing: Choosing
    token: int = -1
    over: bool = False
    chance: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.chance.manual_seed(self.choosing.seed)

    def luck(self) -> float:
        """A number from 0 to 1 for the next token."""
        return float(torch.rand((), generator=self.chance, dtype=torch.float64))


@dataclass
class _Group:
    """Answers that grow in one memory."""

    memory: Together | Alone
    voices: list[_Voice]


class Talks:
    """Answers that grow together, by a token at each step; conversations join and leave between steps.

    Args:
        answerer: Whose answers.
    """

    def __init__(self, answerer: Answerer) -> None:
        self.reader, self.device = answerer.reader, answerer.device
        self._stops = stops_of(self.reader.backbone, answerer.processor.tokenizer.eos_token_id, self.device)
        self._media = media_of(self.reader.backbone, self.device)
        self._groups: list[_Group] = []

    def begin(self, joining: Mapping[int, tuple[Prompt, Choosing]]) -> list[Chosen]:
        """Read conversations, each under a key of its own, and tell the first token of each; none joins if one fails.

        Where the layers can share, all are read at once.
        """
        voices = [_Voice(key, choosing) for key, (_, choosing) in joining.items()]
        with torch.inference_mode():
            kept = list(self._memories([prompt.row for prompt, _ in joining.values()]))
            alone = len(kept) == len(voices)
            shares = [[voice] for voice in voices] if alone else [voices]
            groups = [_Group(memory, some) for memory, some in zip(kept, shares, strict=True)]
            found = [one for group in groups for one in self._choose(group, group.memory.begin())]
        self._groups += groups
        return found

    def step(self, leaving: Collection[int] = ()) -> list[Chosen]:
        """Tell the next token of every answer that is not over; those with the keys that are leaving end before it."""
        found = []
        with torch.inference_mode():
            for group in self._groups:
                self._leave(group, leaving)
            self._groups = [group for group in self._groups if group.voices]
            self._join()
            for group in self._groups:
                tokens = torch.tensor([voice.token for voice in group.voices], device=self.device)
                found += self._choose(group, group.memory.read(tokens))
        return found

    def _leave(self, group: _Group, leaving: Collection[int]) -> None:
        still = [not voice.over and voice.key not in leaving for voice in group.voices]
        group.voices = [voice for voice, stays in zip(group.voices, still, strict=True) if stays]
        if group.voices and not all(still):
            group.memory.keep(torch.tensor(still, device=self.device))

    def _join(self) -> None:
        """Make one group of those whose memories can be joined."""
        shared = [group for group in self._groups if isinstance(group.memory, Together)]
        for group in shared[1:]:
            shared[0].memory.join(group.memory)  # type: ignore[union-attr, arg-type]
            shared[0].voices += group.voices
            self._groups.remove(group)

    def _choose(self, group: _Group, states: Tensor) -> list[Chosen]:
        logits = self.reader.backbone.head(states).index_fill(1, self._media, -torch.inf)
        luck = [voice.luck() if voice.choosing.temperature else 0.0 for voice in group.voices]
        tokens = picked(logits, [voice.choosing for voice in group.voices], luck)
        over = torch.isin(tokens, self._stops)
        for voice, token, ended in zip(group.voices, tokens.tolist(), over.tolist(), strict=True):
            voice.token, voice.over = token, ended
        return [Chosen(voice.key, voice.token, voice.over) for voice in group.voices]

    def _memories(self, rows: Sequence[PackedRows]) -> Iterator[Together | Alone]:
        """One memory of all rows, or one of each where the layers cannot share; media are encoded row by row."""
        prompts = [row.input_ids[0] for row in rows]
        rows = moved(rows, self.device)
        if self.reader.step == "separate":
            for row in rows:
                yield from (memory for _, memory in memories(self.reader, row, 1))
            return
        joined = pack([ids[:-1] for ids in prompts], [[Continuation(ids[-1:], ids[:0])] for ids in prompts], {}, 0)
        embeds = [self.reader.backbone.embed(row)[0] for row in rows]
        places = [self.reader.backbone.positions(row)[..., 0, :].movedim(-1, 0) for row in rows]
        positions = pad_sequence(places, batch_first=True)  # (rows, tokens) or (rows, tokens, 3)
        positions = positions.movedim(-1, 0) if positions.ndim == 3 else positions
        joined = moved(joined, self.device)
        yield Together(self.reader, joined, pad_sequence(embeds, batch_first=True), positions, 1)


def picked(logits: Tensor, choosing: Sequence[Choosing], luck: Sequence[float]) -> Tensor:
    """A token for each row of logits: the likeliest, or the one on which luck from 0 to 1 falls."""
    likeliest = logits.argmax(-1)
    drawn = [place for place, one in enumerate(choosing) if one.temperature]
    if not drawn:
        return likeliest
    told = [(max(choosing[place].temperature, 1e-6), choosing[place].top_p, luck[place]) for place in drawn]
    at = torch.tensor(drawn, device=logits.device)
    heat, share, fall = torch.tensor(told, dtype=torch.float64, device=logits.device).T[..., None]
    shares, order = (logits[at].double() / heat).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = shares.cumsum(-1) - shares
    shares = shares.masked_fill((before >= share) & (before > 0), 0)  # the likeliest stays, whatever its share
    ends = shares.cumsum(-1)
    place = torch.searchsorted(ends, fall * ends[:, -1:], right=True).clamp(max=(shares > 0).sum(-1, keepdim=True) - 1)
    return likeliest.index_put((at,), order.gather(-1, place)[:, 0])


def placed(device: str) -> torch.device:
    """The device of this name, if it is here; `auto` is a GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=device).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {device!r} ({reason})") from error
