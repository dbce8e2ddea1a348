"""From a sample to one row of tokens: what all responses share, and a continuation for each of them.

Nothing is cut by accident: a row is made whole, and `fitted` then leaves out or cuts what is too long, as it is
told to, or says why the query cannot be used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from .. import images
from ..batches import Continuation
from ..encoding import Part, encode_prompt, encode_response, encode_text, messages_of
from ..judging import judge_messages
from ..videos import spread

if TYPE_CHECKING:
    from torch import Tensor

    from ..prompts import Template
    from ..queries import Media
    from ..records import RankedQuery, Response
    from .reader import Sample

TooLong = Literal["drop_responses", "drop_query", "cut_responses"]
CritiqueSource = Literal["critique_or_reason", "critique", "reason", "none"]


class Row(NamedTuple):
    """One query as tokens."""

    ranked: RankedQuery
    """With the responses that the row holds, in the order of its continuations."""
    places: tuple[int, ...]
    """Where each of them stands in the query as it was annotated."""
    prefix: Tensor  # (tokens,)
    continuations: tuple[Continuation, ...]
    features: dict[str, Tensor]
    per_token: dict[str, Tensor]
    """What the family tells of the prefix's tokens besides their ids, each (tokens,)."""

    @property
    def tokens(self) -> int:
        """The length of the packed row."""
        return len(self.prefix) + sum(map(_length, self.continuations))

    @property
    def longest(self) -> int:
        """The length of the longest single sequence: the prefix and one continuation."""
        return len(self.prefix) + max(map(_length, self.continuations))


class DropQueryError(ValueError):
    """A query that cannot be trained on; `reason` is the code under which a ledger counts it."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Answers:
    """Rows in which the responses themselves are learned: for the policy."""

    processor: Any
    frames: int

    def __call__(self, sample: Sample) -> Row:
        """The prompt with its media is shared; each response is supervised, with the end of its turn."""
        query, responses = sample.ranked.query, sample.ranked.responses
        prompt = encode_prompt(self.processor, messages_of(query, loader(sample, self.frames)))
        nothing = prompt.input_ids[:0]
        told = tuple(Continuation(nothing, encode_response(self.processor, response.text)) for response in responses)
        places = tuple(range(len(responses)))
        return Row(sample.ranked, places, prompt.input_ids, told, prompt.features, prompt.per_token)


@dataclass(frozen=True)
class Critiques:
    """Rows in which responses are judged: for the reward model."""

    processor: Any
    frames: int
    template: Template
    source: CritiqueSource = "critique_or_reason"
    after: str = ""
    """What the chat template puts behind the end of a critique, where the model reads on to there."""
    written: Callable[[RankedQuery], Sequence[str]] | None = None
    """Critiques from elsewhere, one for each response, in place of those that the data hold."""

    def __call__(self, sample: Sample) -> Row:
        """Everything before the response is shared; response and request are given, the critique is supervised."""
        query, responses = sample.ranked.query, sample.ranked.responses
        messages, place = judge_messages(self.template, query, responses[0].text, loader(sample, self.frames))
        prompt = encode_prompt(self.processor, messages)
        tokenizer, start = self.processor.tokenizer, prompt.text_starts[place]
        tail = prompt.input_ids[start + len(encode_text(tokenizer, responses[0].text)) :]
        told = tuple(
            Continuation(torch.cat([encode_text(tokenizer, response.text), tail]), self._critique(critique))
            for response, critique in zip(responses, self.critiques(sample.ranked), strict=True)
        )
        per_token = {name: value[:start] for name, value in prompt.per_token.items()}
        places = tuple(range(len(responses)))
        return Row(sample.ranked, places, prompt.input_ids[:start], told, prompt.features, per_token)

    @property
    def judges(self) -> bool:
        """Whether critiques are wanted at all."""
        return self.source != "none" or self.written is not None

    def critiques(self, ranked: RankedQuery) -> Sequence[str]:
        """The critique of each response; empty where there is none."""
        return (
            [self._known(response) for response in ranked.responses] if self.written is None else self.written(ranked)
        )

    def _known(self, response: Response) -> str:
        known = {"critique": response.critique, "reason": response.reason, "none": ""}
        return response.critique or response.reason if self.source == "critique_or_reason" else known[self.source]

    def _critique(self, text: str) -> Tensor:
        """The critique as it is supervised; nothing where there is none."""
        if not text:
            return torch.empty(0, dtype=torch.long)
        said = encode_response(self.processor, text)
        return torch.cat([said, encode_text(self.processor.tokenizer, self.after)]) if self.after else said


def loader(sample: Sample, frames: int) -> Any:  # noqa: ANN401 - a function from a medium to its pictures
    """Decode a query's media; a film always has the same number of frames, so that films can share a batch."""
    stored = dict(zip(sample.ranked.query.media, sample.media, strict=True))

    def load(medium: Media) -> Part:
        data = stored[medium]
        if medium.kind == "image":
            return images.decode(data[0]).image
        return [images.decode(data[at]).image for at in spread(len(data), frames)]

    return load


def fitted(row: Row, max_tokens: int, too_long: TooLong) -> tuple[Row, Mapping[str, int]]:
    """The row without what is too long, and how many responses were left out or cut.

    A response is too long if the prefix and its continuation have more than `max_tokens` tokens. Only what is
    supervised is ever cut, and never all of it: where nothing would be left, the response is left out. The prefix,
    and with it every picture, is never cut.
    """
    room = max_tokens - len(row.prefix)
    over = [place for place, told in enumerate(row.continuations) if _length(told) > room]
    if not over:
        return row, {}
    lost = [place for place in over if too_long != "cut_responses" or len(row.continuations[place].given) >= room]
    kept = [place for place in range(len(row.places)) if place not in lost]
    if too_long == "drop_query" or len(kept) < 2:
        raise DropQueryError(
            f"query {row.ranked.query.id!r}: expected at most {max_tokens:,} tokens, got {len(row.prefix):,} before "
            f"the responses and {row.longest:,} with the longest; raise max_tokens or choose another too_long",
            "too_long",
        )
    row = _only(row, kept)
    cut = tuple(Continuation(told.given, told.supervised[: room - len(told.given)]) for told in row.continuations)
    mended = {"response_dropped": len(lost), "response_cut": len(over) - len(lost)}
    return row._replace(continuations=cut), {kind: number for kind, number in mended.items() if number}


def _only(row: Row, kept: Sequence[int]) -> Row:
    """The row with some of its responses."""
    ranked = dataclasses.replace(row.ranked, responses=tuple(row.ranked.responses[place] for place in kept))
    places = tuple(row.places[place] for place in kept)
    return row._replace(ranked=ranked, places=places, continuations=tuple(row.continuations[place] for place in kept))


def _length(told: Continuation) -> int:
    return len(told.given) + len(told.supervised)
