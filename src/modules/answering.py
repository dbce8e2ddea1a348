"""A model on this machine answers conversations: the likeliest words, many answers at a time.

Prompts are read and remembered as the reward model reads what it criticises, so an answer does not depend on what
else is answered with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
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
    from collections.abc import Iterator, Sequence
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
        """The answer to each conversation, in their order."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected 1 or more, got {max_new_tokens}; 512 is usual")
        found = []
        for first in range(0, len(conversations), self.at_once):
            found += self._together(conversations[first : first + self.at_once], max_new_tokens)
        return found

    def _together(self, conversations: Sequence[Sequence[Message]], most: int) -> list[Answer]:
        rows = [self._row(messages) for messages in conversations]
        asked = [row.input_ids.shape[1] for row in rows]
        try:
            with torch.inference_mode():
                stops = stops_of(self.reader.backbone, self.processor.tokenizer.eos_token_id, self.device)
                told = [_said(self.reader.backbone, memory, stops, most) for memory in self._memories(rows)]
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"at_once: no memory for answers to {len(rows)} conversations of {sum(asked):,} tokens together; give "
                "fewer, or fewer frames of films"
            ) from error
        ids, sizes = (torch.cat(each).tolist() for each in zip(*told, strict=True))
        decode = self.processor.tokenizer.decode
        found = []
        for said, size, length in zip(ids, sizes, asked, strict=True):
            text = decode(said[:size], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            cut = size == most
            found.append(Answer(mend(text).text, size + (not cut), cut, length))
        return found

    def _row(self, messages: Sequence[Message]) -> PackedRows:
        """A conversation, up to where the model begins to speak, as a row: its last token is the one to go on from."""
        prompt = encode_prompt(self.processor, messages)
        ids, told = prompt.input_ids, {name: value[:-1] for name, value in prompt.per_token.items()}
        return pack([ids[:-1]], [[Continuation(ids[-1:], ids[:0])]], prompt.features, 0, [told])

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


def placed(device: str) -> torch.device:
    """The device of this name, if it is here; `auto` is a GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=device).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {device!r} ({reason})") from error


def _said(backbone: Any, memory: Together | Alone, stops: Tensor, most: int) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """What is said from here on, (answers, most tokens), and how much of it comes before the end, (answers,)."""
    states, media = memory.begin(), media_of(backbone, stops.device)
    live = torch.arange(len(states), device=states.device)
    said, sizes = stops.new_zeros(len(live), most), torch.full_like(live, most)
    for step in range(most):
        tokens = backbone.head(states).index_fill(1, media, -torch.inf).argmax(-1)
        over = torch.isin(tokens, stops)
        said[live, step], sizes[live[over]] = tokens, step
        live, tokens = live[~over], tokens[~over]
        if not len(live) or step == most - 1:
            break
        if over.any():
            memory.keep(~over)
        states = memory.read(tokens)
    return said, sizes
