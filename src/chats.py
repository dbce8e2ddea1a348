"""Conversations in the form in which servers of models take them: texts, and media inside addresses."""

from __future__ import annotations

import time
from base64 import b64decode, b64encode
from binascii import Error as Broken
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from PIL import Image

from .encoding import Frames, Message, Part
from .fields import Fields, RecordError, one_of
from .images import MAX_PIXELS, decode, encode
from .text import check_text
from .videos import sample, spread

Films = Literal["pictures", "film"]
"""A film as several pictures, or as a film: the form of vLLM, which takes its frames as they are."""
_LARGE = 4 * 2**20
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_LEFT_OUT: tuple[object, ...] = (None, [], "")
"""What clients that send an answer back write into fields that say nothing."""


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


@dataclass
class Room:
    """How much a conversation may show, and what it has shown so far.

    Args:
        pictures: At most so many, frames of films among them.
        pixels: At most so many, of all pictures together.
        frames: Of a film that comes as a file.
        pieces: At most so many turns and parts of them.
        seconds: In which all its films are decoded.
    """

    pictures: int
    pixels: int
    frames: int
    pieces: int = 2000
    seconds: float = 30
    shown: int = 0

    def take(self, number: int = 1) -> int:
        """Make room for so many pictures; how many pixels each may have."""
        self.shown += number
        if self.shown > self.pictures:
            raise RecordError(f"expected at most {self.pictures} pictures in a conversation, got more; send fewer")
        return min(MAX_PIXELS, self.pixels // number)

    def fill(self, picture: Image.Image) -> Image.Image:
        """Count a picture's pixels."""
        self.pixels -= picture.width * picture.height
        return picture

    @contextmanager
    def watch(self) -> Iterator[float]:
        """The seconds that are left to decode a film, and what it took of them."""
        begun = time.monotonic()
        yield max(self.seconds, 0)
        self.seconds -= time.monotonic() - begun


def as_messages(chat: Sequence[Any], room: Room) -> list[Message]:
    """The conversation that plain JSON holds: what `as_chat` writes, and what other clients do.

    Media stand in it as data. An address of anything else is refused: it would be opened from this machine, for
    somebody who may not.
    """
    parts = [row["content"] for row in chat if isinstance(row, Mapping) and isinstance(row.get("content"), list)]
    if (pieces := len(chat) + sum(map(len, parts))) > room.pieces:  # which cost time even where they are empty
        raise RecordError(
            f"messages: expected at most {room.pieces:,} turns and parts of them, got {pieces:,}; join texts that "
            "stand together"
        )
    return [_message(row, place, room) for place, row in enumerate(chat)]


def _message(row: object, place: int, room: Room) -> Message:
    with Fields(row, f"messages[{place}]") as fields:
        role, content = fields.text("role"), fields.optional("content")
        one_of(role, tuple(_ROLES), "role")
        if said := {name: value for name, value in fields.rest().items() if value not in _LEFT_OUT}:
            raise RecordError(f"{min(said)}: expected role and content alone, got {sorted(said)}; leave it out")
        if isinstance(content, str):
            return Message(_ROLES[role], (check_text(content, "content"),))
        if not isinstance(content, list) or not content:
            raise RecordError(f"content: expected a text or a list of parts, got {content!r:.60}")
        return Message(_ROLES[role], tuple(_part(part, at, role, room) for at, part in enumerate(content)))


def _part(row: object, place: int, role: str, room: Room) -> Part:
    with Fields(row, f"content[{place}]") as fields:
        kind = fields.text("type")
        one_of(kind, ("text", "image_url", "video_url"), "type")
        if kind == "text":
            text = check_text(fields.text("text"), "text")
            fields.refuse_rest()
            return text
        if role != "user":
            raise RecordError(f"type: expected text from the {role}, got {kind!r}; show media as the user")
        with Fields(fields.optional(kind), kind) as address:
            url = address.text("url")
            one_of(address.optional("detail") or "auto", ("auto", "low", "high"), "detail")
            address.refuse_rest()
            part = _image(url, room) if kind == "image_url" else _film(url, room)
        fields.refuse_rest()
        return part


def _image(url: str, room: Room) -> Image.Image:
    return room.fill(decode(_data(*_address(url, "image")[1:]), max_pixels=room.take()).image)


def _film(url: str, room: Room) -> Frames:
    form, head, data = _address(url, "video")
    if form == "jpeg":  # its frames, one by one
        frames = data.split(",", room.pictures)
        return [room.fill(decode(_data(head, frame), max_pixels=room.take()).image) for frame in frames]
    pixels = room.take(room.frames)
    with room.watch() as left:
        film = sample(_data(head, data), room.frames, max_pixels=pixels, max_seconds_of_decoding=left).frames
    return [room.fill(film[place]) for place in spread(len(film), room.frames)]


def _address(url: str, kind: str) -> tuple[str, str, str]:
    """The form of data, what stands before them, and themselves."""
    head, _, data = url.partition(",")
    if not head.startswith(f"data:{kind}/") or not head.endswith(";base64"):
        raise RecordError(
            f"url: expected data:{kind}/...;base64,... with the {kind} in it, got {head!r:.60}; nothing is fetched "
            "from addresses or read from paths: send the bytes"
        )
    return head.removeprefix(f"data:{kind}/").partition(";")[0], head, data


def _data(head: str, data: str) -> bytes:
    try:
        return b64decode(data, validate=True)
    except (Broken, ValueError) as error:
        raise RecordError(
            f"url: expected base64 behind {head!r:.60}, got something else ({error}); encode it"
        ) from error
