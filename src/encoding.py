"""How a query becomes tokens: chat templates, media, and user text that can never turn into structure.

The chat template and the media are tokenised by the checkpoint's own processor, with a *hole* (a special token
that the template does not use) where each user text belongs; the texts are tokenised apart, with special and other
added tokens split into plain characters, and put into the holes. So `<|im_end|>` and `<tool_call>` typed by a user
stay the characters that they are.
One function serves training and inference, so the two cannot drift apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .text import same

if TYPE_CHECKING:
    from torch import Tensor

    from .queries import Media, Query

Frames = Sequence[Image.Image]
Part = str | Image.Image | Frames
"""One piece of a message: a text, a picture, or the frames of a film."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; a part that is a sequence of pictures is a film."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Encoded:
    """A prompt as a model takes it."""

    input_ids: Tensor
    """(tokens,)"""
    features: dict[str, Tensor]
    """Pixels, grids and sizes, as the processor names them; nothing per token is in here."""
    per_token: dict[str, Tensor]
    """What some families tell of every token besides its id, (tokens,): token types, say."""
    text_starts: tuple[int, ...]
    """Where each user text begins, in tokens."""


def messages_of(query: Query, load: Callable[[Media], Part]) -> list[Message]:
    """A query as a conversation: system text, earlier turns, then the prompt with each medium at its place."""
    messages = [Message("system", (query.system,))] if query.system else []
    messages += [Message(turn.role, (turn.text,)) for turn in query.history]
    parts: list[Part] = []
    at = 0
    for medium in sorted(query.media, key=lambda medium: medium.offset):
        if medium.offset > at:
            parts.append(query.prompt[at : medium.offset])
        parts.append(load(medium))
        at = medium.offset
    return [*messages, Message("user", (*parts, query.prompt[at:]) if query.prompt[at:] else tuple(parts))]


def encode_prompt(processor: Any, messages: Sequence[Message]) -> Encoded:  # noqa: ANN401 - transformers is untyped
    """Encode a conversation up to the point where the assistant begins to speak."""
    texts, images, videos = _sorted_parts(messages)
    media = _arguments(processor, images, videos)
    rendered, hole = _with_holes(processor, messages)
    out = dict(processor(text=[rendered], return_tensors="pt", add_special_tokens=False, **media))
    ids = out.pop("input_ids")[0]
    out.pop("attention_mask", None)
    holes = (ids == hole).nonzero().flatten().tolist()
    if len(holes) != len(texts):
        raise ValueError(
            f"chat template: expected {len(texts)} user texts in it, found {len(holes)}; "
            "a template must show every text part once"
        )
    tokenizer = processor.tokenizer
    structure = structure_tokens(tokenizer)  # once, as some families add thousands
    pieces = [_encoded(tokenizer, text, structure) for text in texts]
    per_token = {name: out.pop(name)[0] for name in list(out) if _is_per_token(out[name], len(ids))}
    spliced = {
        name: _splice(value, holes, [torch.zeros(len(p), dtype=value.dtype) for p in pieces])
        for name, value in per_token.items()
    }
    features = {name: value for name, value in out.items() if isinstance(value, torch.Tensor)}
    before = accumulate((len(piece) - 1 for piece in pieces), initial=0)
    starts = tuple(hole + more for hole, more in zip(holes, before, strict=False))  # the last is of what ends there
    return Encoded(_splice(ids, holes, pieces), features, spliced, starts)


def encode_text(tokenizer: Any, text: str) -> Tensor:  # noqa: ANN401
    """The token ids of a user's text, in which no structure token can occur.

    The tokenizer splits special tokens itself. Other added tokens it makes whatever it is told, so a text with one
    is cut inside each, where it can no longer be recognised, and its pieces are encoded apart.
    """
    return _encoded(tokenizer, text, structure_tokens(tokenizer))


def _encoded(tokenizer: Any, text: str, structure: Mapping[str, int]) -> Tensor:  # noqa: ANN401
    ids = _plain_ids(tokenizer, text)
    cut = not set(ids).isdisjoint(structure.values())
    if cut:
        ids = [number for piece in _cut(text, structure) for number in _plain_ids(tokenizer, piece)]
    if found := set(ids) & set(structure.values()):
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} made the added tokens {sorted(found)} from a user's "
            "text; it must honour `add_special_tokens=False` and match added tokens as they are written"
        )
    if cut and not same(tokenizer.decode(ids, clean_up_tokenization_spaces=False), text):
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} cannot encode a text in pieces without changing it, so added "
            "tokens in a user's text cannot be broken up; it must not put a space before a text"
        )
    return torch.tensor(ids, dtype=torch.long)


def structure_tokens(tokenizer: Any) -> dict[str, int]:  # noqa: ANN401
    """Every token, by its content, that may be structure: the special ones and all other added ones.

    Not those that are no more than plain text: some tokenizers add single characters and runs of white space.
    """
    special = _special_tokens(tokenizer)
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    return {text: number for text, number in added.items() if len(text.strip(" \t\r\n\u2581")) > 1} | special


def _special_tokens(tokenizer: Any) -> dict[str, int]:  # noqa: ANN401
    """The special tokens; `all_special_tokens` lists the named ones only."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def _plain_ids(tokenizer: Any, text: str) -> list[int]:  # noqa: ANN401
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def _cut(text: str, tokens: Iterable[str]) -> list[str]:
    """The text in pieces, cut behind the first character of every token in it, overlapping ones too.

    >>> _cut("a<b>c", ["<b>"])
    ['a<', 'b>c']
    """
    found = re.finditer(f"(?={'|'.join(map(re.escape, tokens))})", text)
    ends = [0, *(match.start() + 1 for match in found), len(text)]
    return [text[start:end] for start, end in pairwise(ends) if start < end]


def encode_response(processor: Any, text: str) -> Tensor:  # noqa: ANN401
    """A response as it is supervised: its text, then the end of the turn."""
    end = torch.tensor([processor.tokenizer.eos_token_id], dtype=torch.long)
    return torch.cat([encode_text(processor.tokenizer, text), end])


def _sorted_parts(messages: Sequence[Message]) -> tuple[list[str], list[Image.Image], list[np.ndarray]]:
    texts: list[str] = []
    images: list[Image.Image] = []
    videos: list[np.ndarray] = []
    for message in messages:
        for part in message.parts:
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part, Image.Image):
                images.append(part)
            else:
                videos.append(np.stack([np.asarray(frame.convert("RGB")) for frame in part]))
    return texts, images, videos


def _arguments(processor: Any, images: list[Image.Image], videos: list[np.ndarray]) -> dict[str, Any]:  # noqa: ANN401
    """The media as the processor takes them; what it does not take it would leave out without a word."""
    named = type(processor).__name__
    films: Any = getattr(processor, "video_processor", None)
    if videos and films is None:
        raise ValueError(
            f"{named}: expected text and images, got {len(videos)} film{'s' * (len(videos) > 1)}; "
            "give the frames as images or choose a model that takes films"
        )
    if images and videos and "pixel_values" in films.model_input_names:
        raise ValueError(
            f"{named}: expected images or films in one prompt, got both, and it has one place for either; "
            "give the frames of the films as images"
        )
    media: dict[str, Any] = {}
    if images:
        media["images"] = [images]  # of one text: families tile several pictures of a prompt differently from one
    if videos:
        media |= {"videos": videos, "do_sample_frames": False}
    return media


def _with_holes(processor: Any, messages: Sequence[Message]) -> tuple[str, int]:  # noqa: ANN401
    """The rendered template with a hole for every text, and the id of the hole."""
    tokenizer = processor.tokenizer
    asked = sum(isinstance(part, str) for message in messages for part in message.parts)
    for hole in _free_tokens(processor):
        rendered, bare = (_render(processor, messages, text) for text in (hole, ""))
        if rendered.count(hole) == asked and hole not in bare:
            return rendered, tokenizer.convert_tokens_to_ids(hole)
    raise ValueError(
        f"chat template of {type(processor).__name__}: expected every user text in it once, and a special token that "
        f"it does not use itself, to mark where text goes; special tokens: {sorted(_special_tokens(tokenizer))}"
    )


def _render(processor: Any, messages: Sequence[Message], text: str) -> str:  # noqa: ANN401
    """The template with the same text in every place where a user's belongs."""
    turns = [{"role": m.role, "content": [_content(part, text) for part in m.parts]} for m in messages]
    rendered: str = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return rendered


def _free_tokens(processor: Any) -> list[str]:  # noqa: ANN401
    """Special tokens that may serve as holes: none that the processor expands, padding first."""
    taken = {value for name, value in vars(processor).items() if name.endswith("_token")}
    free = sorted(set(_special_tokens(processor.tokenizer)) - taken)
    return sorted(free, key=lambda token: token != processor.tokenizer.pad_token)


def _content(part: Part, hole: str) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": hole}
    return {"type": "image" if isinstance(part, Image.Image) else "video"}


def _is_per_token(value: object, tokens: int) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == (1, tokens)


def _splice(row: Tensor, holes: Sequence[int], pieces: Sequence[Tensor]) -> Tensor:
    """The row with the element at each hole replaced by a piece.

    >>> _splice(torch.tensor([7, 0, 8]), [1], [torch.tensor([1, 2])])
    tensor([7, 1, 2, 8])
    """
    parts, start = [], 0
    for hole, piece in zip(holes, pieces, strict=True):
        parts += [row[start:hole], piece]
        start = hole + 1
    return torch.cat([*parts, row[start:]])
