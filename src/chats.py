"""Conversations in the form in which servers of models take them: texts, and media inside addresses."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from .images import encode

if TYPE_CHECKING:
    from .encoding import Message, Part

Films = Literal["pictures", "film"]
"""A film as several pictures, or as a film: the form of vLLM, which takes its frames as they are."""
_LARGE = 4 * 2**20


def as_chat(messages: Sequence[Message], films: Films = "pictures") -> list[dict[str, Any]]:
    """The conversation as plain JSON; a message of one text is that text, which every server understands.

    Texts that stand together become one: templates of chats may break the line between two.
    """
    found = []
    for message in messages:
        content: Any = []
        for shown in chain.from_iterable(_shown(part, films) for part in message.parts):
            if content and shown["type"] == content[-1]["type"] == "text":
                content[-1]["text"] += shown["text"]
            else:
                content.append(shown)
        if len(content) == 1 and content[0]["type"] == "text":
            content = content[0]["text"]
        found.append({"role": message.role, "content": content})
    return found


def _shown(part: Part, films: Films) -> Iterator[dict[str, Any]]:
    if isinstance(part, str):
        yield {"type": "text", "text": part}
    elif isinstance(part, Image.Image):
        yield {"type": "image_url", "image_url": {"url": _picture(part)}}
    elif films == "pictures":
        for frame in part:
            yield from _shown(frame, films)
    else:
        frames = ",".join(_base64(encode(frame, "jpg")) for frame in part)
        yield {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}}


def _picture(picture: Image.Image) -> str:
    """As PNG, which loses nothing; a photograph that is large as such, as JPEG."""
    png = encode(picture, "png")
    if len(png) <= _LARGE:
        return f"data:image/png;base64,{_base64(png)}"
    return f"data:image/jpeg;base64,{_base64(encode(picture, 'jpg'))}"


def _base64(data: bytes) -> str:
    return b64encode(data).decode()
