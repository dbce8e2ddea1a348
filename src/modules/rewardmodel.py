"""A trained reward model: one folder of body and head, and the scores of responses by it.

The head's tensors lie in the body's safetensors, under `reward_head.`; how the model is asked lies in its config,
under `reward_model`. Plain transformers loads the body from there and leaves both alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from ..batches import Continuation, PackedRows, moved, pack
from ..checkpoints import processor_of, resolved
from ..encoding import Part, encode_prompt, encode_response, encode_text
from ..fields import Fields
from ..jsonl import loads
from ..judging import judge_messages, pieces
from ..media import load as load_media
from ..prompts import Template
from ..queries import Media, Query
from .loading import Number
from .packed import Step
from .reward import Judged, RewardReader, require_dimensions
from .rewardhead import NAME, body_of, head_of
from .rewardlosses import as_annotated
from .saving import Form, save_folder
from .speaking import Saying, agreed, spoken

if TYPE_CHECKING:
    from torch import Tensor

    from .attention import Kernel

HEAD, ENTRY = NAME, "reward_model"
"""Where the head is in the safetensors, and what it is asked in the config."""
ASKED = "judging.json"
"""The file of a training that tells what its reward model is asked."""
Load = Callable[[Media, int], Part]
"""From a medium to its picture, or to so many frames."""
Speak = Callable[[PackedRows], Sequence[str]]
"""Writes a critique of each response of a row in which it is asked for."""


@dataclass(frozen=True)
class Judging:
    """How a reward model is asked, the same in training and ever after.

    Args:
        template: The request to judge.
        frames: Of a film.
        dimensions: What its scores beside the reward are of.
        after_critique: What the chat template puts behind the end of a critique, if the reward is read there.
    """

    template: Template
    frames: int
    dimensions: tuple[str, ...] = ()
    after_critique: str = ""

    def __post_init__(self) -> None:
        pieces(self.template)
        if type(self.frames) is not int or self.frames < 1:
            raise ValueError(f"frames: expected a whole number of 1 or more, got {self.frames!r}")
        require_dimensions(self.dimensions)

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        asked = {"name": self.template.name, "text": self.template.text, "digest": self.template.digest}
        told = {"template": asked, "frames": self.frames, "dimensions": list(self.dimensions)}
        return told | {"after_critique": self.after_critique}

    @classmethod
    def of(cls, row: object) -> Judging:
        """What `as_dict` told; a template that was changed since is refused."""
        with Fields(row, ENTRY) as fields:
            with Fields(fields.optional("template"), "template") as asked:
                template = Template(asked.text("name"), asked.text("text"))
                digest = asked.text("digest")
                asked.refuse_rest()
            after = fields.text("after_critique", "")
            found = cls(template, fields.integer("frames"), tuple(fields.items("dimensions")), after)
            fields.refuse_rest()
        if template.digest != digest:
            raise ValueError(f"template: expected the words of the training, digest {digest}, got {template.digest}")
        return found


class Scored(NamedTuple):
    """What a reward model says of one response."""

    reward: float
    critique: str
    """Empty where it scored without one."""
    dimensions: Mapping[str, float]
    """On the annotators' scale from 1 to 5."""


def save_reward_model(
    reader: RewardReader,
    processor: Any,  # noqa: ANN401
    judging: Judging,
    folder: Path,
    card: str,
    form: Form = Form(),  # noqa: B008 - frozen
) -> None:
    """Write body, head, processor and card, whole or not at all; adapters are merged into the body.

    The backbone has no adapters afterwards. The head keeps the type of its weights.
    """
    _require_same(reader.head.dimensions, judging)
    whole = reader.backbone.whole
    whole.add_module(HEAD, reader.head)
    setattr(whole.config, ENTRY, judging.as_dict())
    try:
        save_folder(reader.backbone, processor, folder, card, form, reader.fine())
    finally:
        delattr(whole, HEAD)
        delattr(whole.config, ENTRY)


class RewardModel:
    """A reward model as it is used.

    Args:
        reader: Body and head.
        processor: The checkpoint's own.
        judging: How it is asked.
    """

    def __init__(self, reader: RewardReader, processor: Any, judging: Judging) -> None:  # noqa: ANN401
        _require_same(reader.head.dimensions, judging)
        self.reader, self.processor, self.judging = reader.eval().requires_grad_(False), processor, judging

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: Number = "float32",
        device: str | torch.device = "cpu",
        step: Step = "auto",
        chunk: int = 512,
        kernel: Kernel = "auto",
        rows_at_once: int | None = None,
        revision: str | None = None,
    ) -> RewardModel:
        """Load body and head from a folder, or from a repository of the hub; neither pickles nor code are read."""
        folder = resolved(name_or_path, revision)
        judging, head = judging_of(folder), head_of(folder, getattr(torch, dtype))
        body = body_of(folder, dtype)
        reader = RewardReader(body, head, step, chunk, kernel, rows_at_once).to(device)
        return cls(reader, processor_of(folder), judging)

    def rows(
        self, query: Query, responses: Sequence[str], critiques: Sequence[str] = (), media: Path | Load | None = None
    ) -> PackedRows:
        """One row: what is asked about the query, then each response, and its critique where there is one.

        `media` is the folder in which the query's media lie, or a function that loads them.
        """
        if not responses:
            raise ValueError(f"query {query.id!r}: expected one or more responses, got none")
        if critiques and len(critiques) != len(responses):
            raise ValueError(
                f"query {query.id!r}: expected a critique per response ('' for none), got {len(critiques)} for "
                f"{len(responses)} responses"
            )
        messages, place = judge_messages(self.judging.template, query, responses[0], self._loader(query, media))
        prompt = encode_prompt(self.processor, messages)
        tokenizer, start = self.processor.tokenizer, prompt.text_starts[place]
        tail = prompt.input_ids[start + len(encode_text(tokenizer, responses[0])) :]
        after = encode_text(tokenizer, self.judging.after_critique) if self.judging.after_critique else tail[:0]
        told = [
            Continuation(
                torch.cat([encode_text(tokenizer, response), tail]),
                torch.cat([encode_response(self.processor, critique), after]) if critique else tail[:0],
            )
            for response, critique in zip(responses, critiques or [""] * len(responses), strict=True)
        ]
        per_token = {name: value[:start] for name, value in prompt.per_token.items()}
        return pack([prompt.input_ids[:start]], [told], prompt.features, 0, [per_token])

    def _loader(self, query: Query, media: Path | Load | None) -> Callable[[Media], Part]:
        if media is None and query.media:
            raise ValueError(
                f"query {query.id!r}: expected a folder with its media, or a function that loads them, got none"
            )
        load: Any = partial(load_media, media) if isinstance(media, Path) else media
        return lambda medium: load(medium, self.judging.frames)

    def judged(self, rows: PackedRows) -> Judged:
        """What the model says of the responses of packed rows, in their order; of given critiques the log-probs."""
        with torch.inference_mode():
            found: Judged = self.reader(moved(rows, self.reader.head.out.weight.device))
        return found

    def score_given(
        self, query: Query, responses: Sequence[str], critiques: Sequence[str] = (), media: Path | Load | None = None
    ) -> Tensor:
        """The reward of each response with the critique that is given, or without one, (responses,)."""
        return self.judged(self.rows(query, responses, critiques, media)).rewards

    def score(
        self,
        query: Query,
        responses: Sequence[str],
        *,
        critique: Literal["generated", "given", "none"] = "none",
        critiques: Sequence[str] = (),
        saying: Saying | None = None,
        speak: Speak | None = None,
        media: Path | Load | None = None,
    ) -> list[Scored]:
        """Judge the responses to a query: with critiques that are generated, with those that are given, or without.

        Critiques are generated as `saying` tells and scored in the same pass, or `speak` writes them. Of several
        critiques of a response the rewards are averaged, and the critique is told whose own is nearest to that.
        """
        allowed = {
            "generated": not critiques and (saying is None or speak is None),
            "given": bool(critiques) and saying is None and speak is None,
            "none": not critiques and saying is None and speak is None,
        }
        if not allowed.get(critique):
            raise ValueError(
                "critique: expected generated, with at most one of `saying` and `speak`, given with `critiques` alone, "
                f"or none alone; got {critique!r} with {len(critiques)} critiques, {'a' if saying else 'no'} saying "
                f"and {'a' if speak else 'no'} speak"
            )
        if critique == "generated" and speak is None:
            return self.said(self.rows(query, responses, media=media), saying or Saying())
        if speak is not None:
            critiques = speak(self.rows(query, responses, media=media))
        return self.weighed(self.rows(query, responses, critiques, media), critiques or [""] * len(responses))

    def said(self, rows: PackedRows, saying: Saying, wanted: Callable[[], bool] = lambda: True) -> list[Scored]:
        """The scores of the responses of rows with critiques that are generated; `wanted` is that of `spoken`."""
        after = self.judging.after_critique
        told = spoken(self.reader, self.processor.tokenizer, rows, saying, after, wanted)
        said = [agreed(each) for each in told]
        return [self._scored(each.reward, each.text, torch.tensor(each.dimensions)) for each in said]

    def weighed(self, rows: PackedRows, critiques: Sequence[str]) -> list[Scored]:
        """The scores of the responses of rows with the critiques that the rows hold, '' for none."""
        found = self.judged(rows)
        return list(map(self._scored, found.rewards.tolist(), critiques, found.dimensions))

    def _scored(self, reward: float, critique: str, dimensions: Tensor) -> Scored:
        scores = as_annotated(dimensions).tolist()
        return Scored(reward, critique, dict(zip(self.judging.dimensions, scores, strict=True)))


def judging_of(folder: Path) -> Judging:
    """How a reward model is asked, as its config says; no weights are read."""
    config: Any = loads((folder / "config.json").read_bytes())
    if "auto_map" in config:
        raise ValueError(f"{folder}: expected classes of transformers, got code of its own (auto_map); convert it")
    if ENTRY not in config:
        raise ValueError(
            f"{folder / 'config.json'}: expected {ENTRY}, which says how a reward model is asked, found none; it is no "
            "reward model, or was saved by something else: convert it"
        )
    try:
        return Judging.of(config[ENTRY])
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def _require_same(dimensions: int, judging: Judging) -> None:
    if dimensions != len(judging.dimensions):
        raise ValueError(
            f"reward head: expected a score for each of {list(judging.dimensions)} beside the reward, got {dimensions}"
        )
