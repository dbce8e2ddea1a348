"""Supervised training of the tiny policy on noisy answers about scenes that no question of the world shows.

One row is one picture with several questions about it (the picture is encoded once, see `batches`), so that two
cores see enough answers in minutes. A step's data are a pure function of (seed, step): a killed run continues
from its last checkpoint with exactly the rows that it would have had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from ..batches import IGNORED, Continuation, PackedRows, pack, visible
from ..encoding import Message, Part, encode_prompt, encode_response, encode_text
from . import questions, speech
from .draw import film, picture
from .facts import Fact
from .films import sampled
from .optimiser import adamw
from .policy import frames_of
from .scenes import draw_scene, stream

if TYPE_CHECKING:
    import random

    from torch import Tensor

TEACHER = speech.Skill("teacher", 0.12)
"""Who is imitated: wrong often enough that alignment has something to mend."""
ROWS_PER_STEP = 16
STILL = {"plain": 84, "sign": 9, "writing": 7}
MOVING = {"film": 78, "request": 18, "compare": 4}
"""What rows are about, by weight. Two steps show still pictures, long rows with many questions; the third shows
films, short rows: so that little of a step is padding."""
REQUESTS_PER_ROW = 4


class Row(NamedTuple):
    """One picture or film (or none) and the conversations about it."""

    prefix: Tensor  # (tokens,): up to where the question begins
    talks: list[Continuation]
    features: dict[str, Tensor]


class TalkRows(Dataset[Row]):
    """An endless supply of rows; row number n is a pure function of (seed, n)."""

    def __init__(self, processor: Any, seed: int) -> None:  # noqa: ANN401 - transformers is untyped
        self.processor = processor
        self.seed = seed

    def __getitem__(self, index: int) -> Row:
        rng = stream(self.seed, "sft", index)
        facts = draw_facts(rng, MOVING if index // ROWS_PER_STEP % 3 == 2 else STILL)
        talks = [questions.phrase(fact, rng).prompt for fact in facts]
        answers = [speech.answer(fact, TEACHER, rng, without=("overlong",)).text for fact in facts]
        return encode_row(
            self.processor, shown(facts[0], frames_of(self.processor)), list(zip(talks, answers, strict=True))
        )


def draw_facts(rng: random.Random, mixture: Mapping[str, int]) -> list[Fact]:
    """What one row asks: everything that a plain picture allows, or what suits a film, a sign or a request."""
    kind = rng.choices(list(mixture), list(mixture.values()))[0]
    if kind == "request":
        return [questions.ask_kind(kind, rng) for _ in range(REQUESTS_PER_ROW)]
    if kind == "compare":
        return [questions.ask_kind(kind, rng)]
    if kind == "film":
        fact = questions.ask_kind("event", rng)
        if fact.clip is None or fact.expected != "moves":
            return [fact]
        return [fact, Fact("way", clip=fact.clip, subject=fact.subject, expected=fact.clip.detail)]
    facts = [] if kind == "plain" else [questions.ask_kind(kind, rng)]
    scene = facts[0].scenes[0] if facts else draw_scene(rng)
    about = [
        make(rng, scene) for name, make in questions.ABOUT_SCENES.items() if name != "choice" or rng.random() < 0.35
    ]
    return facts + [fact for fact in about if fact is not None]


def shown(fact: Fact, frames: int) -> list[Part]:
    """What the fact shows, as parts of a message."""
    if fact.clip is not None:
        return [sampled(film(fact.clip), frames)]
    return [picture(scene) for scene in fact.scenes]


def encode_row(processor: Any, media: Sequence[Part], talks: Sequence[tuple[str, str]]) -> Row:  # noqa: ANN401
    """Encode (question, answer) pairs about the same media; what stands before the question is shared."""
    tokenizer = processor.tokenizer
    asked = [encode_text(tokenizer, question) for question, _ in talks]
    first = encode_prompt(processor, [Message("user", (*media, talks[0][0]))])
    (start,) = first.text_starts
    tail = first.input_ids[start + len(asked[0]) :]
    continuations = [
        Continuation(torch.cat([question, tail]), encode_response(processor, answer))
        for question, (_, answer) in zip(asked, talks, strict=True)
    ]
    return Row(first.input_ids[:start], continuations, first.features)


def collate(rows: Sequence[Row], pad: int) -> PackedRows:
    """Pack rows; pictures of all rows are laid end to end, in the order of their placeholders."""
    names = {name for row in rows for name in row.features}
    features = {name: torch.cat([row.features[name] for row in rows if name in row.features]) for name in names}
    return pack([row.prefix for row in rows], [row.talks for row in rows], features, pad)


class SFTModule(lightning.LightningModule):
    """Next-token training on the supervised tokens of packed rows; frozen weights stay as they are."""

    def __init__(self, model: Any, steps: int) -> None:  # noqa: ANN401
        super().__init__()
        self.model = model
        self.steps = steps

    def training_step(self, batch: PackedRows, batch_idx: int) -> Tensor:
        """Mean negative log-likelihood of the supervised tokens; logits are made at those places only."""
        hidden = self.model.model(
            input_ids=batch.input_ids,
            attention_mask=visible(batch.segment_ids),
            position_ids=batch.position_ids,
            **batch.features,
        ).last_hidden_state
        told = batch.labels != IGNORED
        rows = told.nonzero(as_tuple=True)[0]
        loss = cross_entropy(self.model.lm_head(hidden[rows, batch.previous[told]]), batch.labels[told])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own union
        """AdamW, warmed up, then down to zero."""
        return adamw(self, self.steps)
