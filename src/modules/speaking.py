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
from lightning.fabric.utilities import move_data_to_device
from transformers import DynamicCache

from ..batches import IGNORED, PADDING, PREFIX
from .attention import shared_prefixes
from .packed import lengths, unpacked
from .reward import ends

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from ..batches import PackedRows
    from .attention import SharedPrefixes
    from .backbone import Backbone
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


def spoken(reader: RewardReader, tokenizer: Any, rows: PackedRows, saying: Saying) -> list[tuple[Spoken, ...]]:  # noqa: ANN401 - transformers is untyped
    """The critiques that each response of packed rows is given, in the order of the responses.

    The rows hold nothing that is supervised: each segment ends where a critique begins.
    """
    if (rows.labels != IGNORED).any():
        raise ValueError("rows: expected responses and no critiques, got some; make the rows without them")
    if reader.training:
        raise ValueError("reader: expected one that is not in training, which may remember nothing; call eval() first")
    with torch.inference_mode():
        luck = _luck(rows, saying)
        rows, luck = move_data_to_device((rows, luck), reader.head.out.weight.device)
        stops = _stops(reader.backbone, tokenizer.eos_token_id, luck.device)
        memories = _memories(reader, rows, saying.samples)
        talks = [_talk(reader, memory, luck[voices], saying, stops) for voices, memory in memories]
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


def _stops(backbone: Backbone, end: int, device: torch.device) -> Tensor:
    """The end of the turn, first, and whatever else the checkpoint takes for an end."""
    others = backbone.whole.generation_config.eos_token_id
    more = [] if others is None else [others] if isinstance(others, int) else list(others)
    return torch.tensor([end, *more], device=device)


def _media(backbone: Backbone, device: torch.device) -> Tensor:
    """Tokens that stand for media: no critique can show any, and none with such a token could be read again."""
    numbers = [getattr(backbone.config, medium.token) for medium in backbone.family.media]
    known = [number for number in numbers if number < len(backbone.head.weight)]
    return torch.tensor(known, dtype=torch.long, device=device)


# Choosing ----------------------------------------------------------------------------------------------------


def _luck(rows: PackedRows, saying: Saying) -> Tensor:
    """A number from 0 to 1 for each token that may be drawn, (critiques, tokens).

    It follows from the seed, what the critique is of, and which of its critiques it is.
    """
    if not saying.temperature:
        return torch.zeros(int(rows.segment_ids.amax(1).sum()), saying.max_new_tokens)
    drawn, rows = [], move_data_to_device(rows, torch.device("cpu"))
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
    reader: RewardReader, memory: _Together | _Alone, luck: Tensor, saying: Saying, stops: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What is said from here on, (critiques, most tokens); how much of it counts, (critiques,); and the scores."""
    states, most, media = memory.begin(), saying.max_new_tokens, _media(reader.backbone, stops.device)
    live = torch.arange(len(states), device=states.device)
    said = stops.new_zeros(len(live), most + 1)
    sizes = torch.empty_like(live)
    scores = torch.empty(len(live), 1 + reader.head.dimensions, dtype=torch.float64, device=states.device)
    for step in range(most + 1):
        if step < most:
            logits = reader.backbone.head(states).index_fill(1, media, -torch.inf)
            tokens = _chosen(logits, saying.temperature, luck[live, step])
        else:
            tokens = stops[0].expand(len(live))
        said[live, step], over = tokens, torch.isin(tokens, stops)
        states = memory.read(torch.where(over, stops[0], tokens))
        if over.any():
            scores[live[over]], sizes[live[over]] = reader.head(states[over]).double(), step
            live, states = live[~over], states[~over]
            if not len(live):
                break
            memory.keep(~over)
    return said, sizes, scores


# Remembering -------------------------------------------------------------------------------------------------


def _memories(reader: RewardReader, rows: PackedRows, samples: int) -> Iterator[tuple[slice, _Together | _Alone]]:
    """Memories of all critiques in their order: one of all together, or one of each."""
    backbone = reader.backbone
    embeds, positions = backbone.embed(rows), backbone.positions(rows)
    if reader.step == "shared_prefix":
        yield slice(None), _Together(reader, rows, embeds, positions, samples)
        return
    types = rows.per_token.get(backbone.family.token_types)
    for response, (row, columns, inside) in enumerate(zip(*unpacked(rows), strict=True)):
        at = columns[inside]
        kinds = None if types is None else types[row, at][None]
        for voice in range(response * samples, (response + 1) * samples):
            yield slice(voice, voice + 1), _Alone(backbone, embeds[row, at][None], positions[..., row, at], kinds)


class _Together:
    """All critiques of packed rows: each row grows by a token per critique."""

    def __init__(self, reader: RewardReader, rows: PackedRows, embeds: Tensor, positions: Tensor, samples: int) -> None:
        self.backbone, self.kernel, self.samples = reader.backbone, reader.kernel, samples
        self.rows, self.embeds, self.positions = rows, embeds, positions
        self.cache, self.labels, last = DynamicCache(), rows.segment_ids, ends(rows)
        self.row, segments = last.rows.repeat_interleave(samples), rows.segment_ids.amax(1)
        self.given = (last.owners - (segments.cumsum(0) - segments)[last.rows] + 1).repeat_interleave(samples)
        # Critiques go on in numbers where the segments of the longest row end.
        self.voice = torch.arange(len(self.row), device=self.row.device) + rows.segment_ids.max() + 1
        seen = (self.labels[self.row] == PREFIX) | (self.labels[self.row] == self.given[:, None])
        self.next = torch.where(seen, positions[..., self.row, :], -1).amax(-1) + 1  # (critiques,) or (3, critiques)
        self._arrange()

    def begin(self) -> Tensor:
        """All rows end to end, as they are read in training."""
        rows, real, last = self.rows, self.rows.segment_ids != PADDING, ends(self.rows)
        counts = real.sum(1)
        needed, at = torch.unique((counts.cumsum(0) - counts)[last.rows] + last.columns, return_inverse=True)
        layout = shared_prefixes(lengths(rows), real.device, self.kernel)._replace(needed=needed)
        told = self.embeds[real][None], self.positions[..., real][..., None, :], real.new_ones(1, 1, 1, 1)
        states = _states(self.backbone, *told, self.cache, shared_prefix=layout)
        layers: Any = self.cache.layers
        for layer in layers:
            layer.keys, layer.values = _apart(layer.keys, real), _apart(layer.values, real)
        states = states[0][at if states.shape[1] == len(needed) else needed[at]]
        return states.repeat_interleave(self.samples, 0)

    def read(self, tokens: Tensor) -> Tensor:
        """One more column for each critique of a row, and one more row of the mask."""
        at = self.row, self.slot
        embeds = self.backbone.whole.get_input_embeddings()(tokens.new_zeros(self.own.shape).index_put(at, tokens))
        positions = self.next.new_zeros(*self.next.shape[:-1], *self.own.shape)
        positions[..., self.row, self.slot] = self.next
        self.labels = torch.cat([self.labels, self.own], 1)
        key = self.labels[:, None]
        mask = (key == PREFIX) | (key == self.behind[..., None]) | (key == self.own[..., None])
        self.next = self.next + 1
        # As numbers to add, once for all layers: each would make them of truth values by itself.
        return _states(self.backbone, embeds, positions, mask[:, None].to(embeds.dtype).log(), self.cache)[at]

    def keep(self, still: Tensor) -> None:
        """Critiques that have ended get no more columns, and rows without others are forgotten."""
        self.given, self.voice, self.next = self.given[still], self.voice[still], self.next[..., still]
        rows, self.row = torch.unique(self.row[still], return_inverse=True)
        if len(rows) < len(self.labels):
            self.labels = self.labels[rows]
            self.cache.batch_select_indices(rows)
        self._arrange()

    def _arrange(self) -> None:
        """Which column of a step is whose; a row with fewer critiques than another has padding."""
        counts = torch.bincount(self.row, minlength=len(self.labels))
        self.slot = torch.arange(len(self.row), device=self.row.device) - (counts.cumsum(0) - counts)[self.row]
        empty = self.voice.new_full((len(counts), int(counts.max())), PADDING)
        self.own, self.behind = (empty.index_put((self.row, self.slot), each) for each in (self.voice, self.given))


def _apart(kept: Tensor, real: Tensor) -> Tensor:
    """What is kept of rows end to end, (1, heads, all tokens, width), as (rows, heads, tokens, width)."""
    if len(real) == 1:
        return kept
    rows = kept.new_zeros(*real.shape, kept.shape[1], kept.shape[3])
    rows[real] = kept[0].transpose(0, 1)
    return rows.transpose(1, 2)


class _Alone:
    """One critique, read as the family's own model reads it; for layers that cannot share a prefix."""

    def __init__(self, backbone: Backbone, embeds: Tensor, positions: Tensor, types: Tensor | None) -> None:
        self.backbone, self.embeds, self.types = backbone, embeds, types
        self.positions, self.next = positions[..., None, :], positions.amax() + 1
        self.seen = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        self.cache = DynamicCache(config=backbone.decoder.config)

    def begin(self) -> Tensor:
        """The response behind its prefix."""
        masks = self.backbone.masks(self.embeds, self.seen, self.positions, self.types)
        return _states(self.backbone, self.embeds, self.positions, masks, self.cache)[:, -1]

    def read(self, tokens: Tensor) -> Tensor:
        """One more token."""
        self.seen = torch.cat([self.seen, self.seen[:, :1]], 1)
        embeds = self.backbone.whole.get_input_embeddings()(tokens[None])
        positions = self.next.expand(*self.positions.shape[:-1], 1)
        self.next = self.next + 1
        return _states(self.backbone, embeds, positions, self.seen, self.cache)[:, -1]

    def keep(self, still: Tensor) -> None:
        """There is only one, which goes on."""


def _states(
    backbone: Backbone, embeds: Tensor, positions: Tensor, mask: object, cache: DynamicCache, **layout: SharedPrefixes
) -> Tensor:
    """The last states, (rows, tokens, width); what the layers remember is kept in the cache."""
    told = {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": mask}
    states: Tensor = backbone.decoder(**told, past_key_values=cache, use_cache=True, **layout).last_hidden_state
    return states
