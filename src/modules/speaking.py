"""Critiques that a reward model writes, and its rewards, from one pass.

Packed rows are read once, and what every layer remembers of them is kept. Then they grow: at each step every response
gets one more token, which sees the prefix, its response and its own critique. The token that ends a critique is read
like any other, and its state is what the head judges: nothing is ever read twice.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..batches import IGNORED, PREFIX, moved
from ..encoding import encode_text
from .packed import lengths
from .remembering import memories

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from ..batches import PackedRows
    from .backbone import Backbone
    from .remembering import Alone, Together
    from .reward import RewardReader


@dataclass(frozen=True)
class Saying:
    """How critiques are chosen.

    Args:
        max_new_tokens: After so many a critique is cut.
        temperature: 0 takes the likeliest token; above it tokens are drawn.
        samples: How many critiques of each response are drawn.
        seed: Of what is drawn. A critique depends on it, its response and its number, and not on the batch.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected 1 or more, got {self.max_new_tokens}; 512 is usual")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}; 0 takes the likeliest token")
        if self.samples < 1:
            raise ValueError(f"samples: expected 1 or more, got {self.samples}")
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"samples: expected 1 at a temperature of 0, where all are the same, got {self.samples}; raise the "
                "temperature"
            )


class UnwantedError(Exception):
    """Nobody waits for what was being said."""


class Spoken(NamedTuple):
    """One critique, and what the model says at its end."""

    tokens: Tensor  # (tokens,): without the end of the turn
    text: str
    reward: float
    dimensions: tuple[float, ...]
    """Where 1 to 5 of the annotators is -1 to 1."""
    cut: bool
    """Whether it had to end before it said so itself."""
    generated: int
    """How many tokens were chosen, the end of the turn among them."""


def spoken(
    reader: RewardReader,
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    rows: PackedRows,
    saying: Saying,
    after: str = "",
    wanted: Callable[[], bool] = lambda: True,
) -> list[tuple[Spoken, ...]]:
    """The critiques that each response of packed rows is given, in the order of the responses.

    The rows hold nothing that is supervised: each segment ends where a critique begins. The head judges behind
    `after`, which follows the end of each critique. `wanted` is asked before every token: with no, all ends in an
    `UnwantedError`.
    """
    if (rows.labels != IGNORED).any():
        raise ValueError("rows: expected responses and no critiques, got some; make the rows without them")
    if reader.training:
        raise ValueError("reader: expected one that is not in training, which may remember nothing; call eval() first")
    with torch.inference_mode():
        luck = _luck(rows, saying)
        rows, luck = moved((rows, luck), reader.head.out.weight.device)
        stops = stops_of(reader.backbone, tokenizer.eos_token_id, luck.device)
        tail = torch.cat([stops[:1], encode_text(tokenizer, after).to(stops)]) if after else stops[:1]
        kept = memories(reader, rows, saying.samples)
        talks = [_talk(reader, memory, luck[voices], saying, (stops, tail), wanted) for voices, memory in kept]
        tokens, sizes, scores = (torch.cat(each).cpu() for each in zip(*talks, strict=True))
    found = []
    for said, size, (reward, *others) in zip(tokens, sizes.tolist(), scores.tolist(), strict=True):
        kept, cut = said[:size].clone(), size == saying.max_new_tokens
        text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found.append(Spoken(kept, text, reward, tuple(others), cut, size + (not cut)))
    return [tuple(found[at : at + saying.samples]) for at in range(0, len(found), saying.samples)]


def agreed(samples: Sequence[Spoken]) -> Spoken:
    """Of several critiques of a response the one whose reward is nearest to their mean, with the means of all."""
    reward = fmean(each.reward for each in samples)
    dimensions = tuple(map(fmean, zip(*(each.dimensions for each in samples), strict=True)))
    return min(samples, key=lambda each: abs(each.reward - reward))._replace(reward=reward, dimensions=dimensions)


def stops_of(backbone: Backbone, end: int, device: torch.device) -> Tensor:
    """The end of the turn, first, and whatever else the checkpoint takes for an end."""
    others = backbone.whole.generation_config.eos_token_id
    more = [] if others is None else [others] if isinstance(others, int) else list(others)
    return torch.tensor([end, *more], device=device)


def media_of(backbone: Backbone, device: torch.device) -> Tensor:
    """Tokens that stand for media: no critique can show any, and none with such a token could be read again."""
    numbers = [getattr(backbone.config, medium.token) for medium in backbone.family.media]
    known = [number for number in numbers if number < len(backbone.head.weight)]
    return torch.tensor(known, dtype=torch.long, device=device)


def _luck(rows: PackedRows, saying: Saying) -> Tensor:
    """A number from 0 to 1 for each token that may be drawn, (critiques, tokens).

    It follows from the seed, what the critique is of, and which of its critiques it is.
    """
    if not saying.temperature:
        return torch.zeros(int(rows.segment_ids.amax(1).sum()), saying.max_new_tokens)
    drawn, rows = [], moved(rows, torch.device("cpu"))
    for number, (_, segments) in enumerate(lengths(rows)):
        for segment in range(1, len(segments) + 1):
            seen = (rows.segment_ids[number] == PREFIX) | (rows.segment_ids[number] == segment)
            ids = rows.input_ids[number][seen].numpy().tobytes()
            for sample in range(saying.samples):
                told = hashlib.blake2b(f"{saying.seed} {sample} ".encode() + ids, digest_size=8).digest()
                chance = torch.Generator().manual_seed(int.from_bytes(told, "big", signed=True))
                drawn.append(torch.rand(saying.max_new_tokens, generator=chance, dtype=torch.float64))
    return torch.stack(drawn)


def _chosen(logits: Tensor, temperature: float, luck: Tensor) -> Tensor:
    """A token for each row of logits: the likeliest, or the one on which luck from 0 to 1 falls."""
    if not temperature:
        return logits.argmax(-1)
    shares = (logits.double() / temperature).softmax(-1).cumsum(-1)
    found = torch.searchsorted(shares, luck[:, None] * shares[:, -1:], right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)


def _talk(
    reader: RewardReader,
    memory: Together | Alone,
    luck: Tensor,
    saying: Saying,
    ends: tuple[Tensor, Tensor],
    wanted: Callable[[], bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """What is said from here on, (critiques, most tokens); how much of it counts, (critiques,); and the scores.

    A critique that ends goes on with the tail, whatever it ended with, and is judged at the tail's last token.
    """
    stops, tail = ends
    states, most, media = memory.begin(), saying.max_new_tokens, media_of(reader.backbone, stops.device)
    live = torch.arange(len(states), device=states.device)
    said = stops.new_zeros(len(live), most + len(tail))
    sizes, read = torch.empty_like(live), torch.zeros_like(live)  # read: of the tail
    scores = torch.empty(len(live), 1 + reader.head.dimensions, dtype=torch.float64, device=states.device)
    for step in range(most + len(tail)):
        if not wanted():
            raise UnwantedError
        if step < most:
            logits = reader.backbone.head(states).index_fill(1, media, -torch.inf)
            tokens = _chosen(logits, saying.temperature, luck[live, step])
        else:
            tokens = stops[0].expand(len(live))
        begun = read[live] > 0
        ended = torch.isin(tokens, stops) & ~begun
        sizes[live[ended]] = step
        said[live, step] = torch.where(begun | ended, tail[read[live]], tokens)
        states = memory.read(said[live, step])
        read[live] += begun | ended
        if (over := read[live] == len(tail)).any():
            scores[live[over]] = reader.head(states[over]).double()
            live, states = live[~over], states[~over]
            if not len(live):
                break
            memory.keep(~over)
    return said, sizes, scores
