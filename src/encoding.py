"""How a query becomes tokens: chat templates, media, and user text that can never turn into structure.

The chat template and the media are tokenised by the checkpoint's own processor, with a *hole* (a special token
that the template does not use) where each user text belongs; the texts are tokenised apart, with special tokens
split into plain characters, and put into the holes. So `<|im_end|>` typed by a user stays eight characters.
One function serves training and inference, so the two cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

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
    rendered, hole = _with_holes(processor, messages)
    media: dict[str, Any] = {}
    if images:
        media["images"] = images
    if videos:
        media |= {"videos": videos, "do_sample_frames": False}
    out = dict(processor(text=[rendered], return_tensors="pt", add_special_tokens=False, **media))
    ids = out.pop("input_ids")[0]
    out.pop("attention_mask", None)
    holes = (ids == hole).nonzero().flatten().tolist()
    if len(holes) != len(texts):
        raise ValueError(
            f"chat template: expected {len(texts)} user texts in it, found {len(holes)}; "
            "a template must show every text part once"
        )
    pieces = [encode_text(processor.tokenizer, text) for text in texts]
    per_token = {name: out.pop(name)[0] for name in list(out) if _is_per_token(out[name], len(ids))}
    spliced = {
        name: _splice(value, holes, [torch.zeros(len(p), dtype=value.dtype) for p in pieces])
        for name, value in per_token.items()
    }
    features = {name: value for name, value in out.items() if isinstance(value, torch.Tensor)}
    lengths = [len(piece) - 1 for piece in pieces]
    starts = tuple(hole + sum(lengths[:place]) for place, hole in enumerate(holes))
    return Encoded(_splice(ids, holes, pieces), features, spliced, starts)


def encode_text(tokenizer: Any, text: str) -> Tensor:  # noqa: ANN401
    """The token ids of a user's text, in which no special token can occur."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    found = set(ids) & set(special_tokens(tokenizer).values())
    if found:
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} made the special tokens {sorted(found)} from a user's "
            "text; it must honour `split_special_tokens` (fast tokenizers do)"
        )
    return torch.tensor(ids, dtype=torch.long)


def special_tokens(tokenizer: Any) -> dict[str, int]:  # noqa: ANN401
    """Every token that is structure; `all_special_tokens` lists the named ones only."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


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


def _with_holes(processor: Any, messages: Sequence[Message]) -> tuple[str, int]:  # noqa: ANN401
    """The rendered template with a hole for every text, and the id of the hole."""
    tokenizer = processor.tokenizer
    asked = sum(isinstance(part, str) for message in messages for part in message.parts)
    for hole in _candidates(processor):
        rendered, bare = (_render(processor, messages, text) for text in (hole, ""))
        if rendered.count(hole) == asked and hole not in bare:
            return rendered, tokenizer.convert_tokens_to_ids(hole)
    raise ValueError(
        f"chat template of {type(processor).__name__}: expected every user text in it once, and a special token that "
        f"it does not use itself, to mark where text goes; special tokens: {sorted(special_tokens(tokenizer))}"
    )


def _render(processor: Any, messages: Sequence[Message], text: str) -> str:  # noqa: ANN401
    """The template with the same text in every place where a user's belongs."""
    turns = [{"role": m.role, "content": [_content(part, text) for part in m.parts]} for m in messages]
    rendered: str = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return rendered


def _candidates(processor: Any) -> list[str]:  # noqa: ANN401
    """Special tokens that may serve as holes: none that the processor expands, padding first."""
    taken = {value for name, value in vars(processor).items() if name.endswith("_token")}
    free = sorted(set(special_tokens(processor.tokenizer)) - taken)
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
