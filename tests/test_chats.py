"""A conversation in the words of the protocol is the one that was put into them; and what is none is refused."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import av
import numpy as np
import pytest

from mmrlhf import chats
from mmrlhf.chats import Room, as_chat, as_messages
from mmrlhf.encoding import Message
from mmrlhf.fields import RecordError
from mmrlhf.videos import Film

from .datamodules.made import opened, picture


def room(pictures=4, pixels=100_000, frames=3):
    return Room(pictures, pixels, frames)


def shown(message):
    """Texts, and pictures as their numbers."""
    return [part if isinstance(part, str) else np.asarray(part).tolist() for part in message.parts]


def address(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def asking(url, kind="image_url"):
    return [{"role": "user", "content": [{"type": kind, kind: {"url": url}}]}]


def test_what_is_written_is_read_again():
    talk = [
        Message("system", ("Be brief.",)),
        Message("user", (opened(picture(1)), "and", opened(picture(2, (30, 20))), "?")),
        Message("assistant", ("No.",)),
        Message("user", ("Why?",)),
    ]
    found = as_messages(as_chat(talk), room())
    assert [(message.role, shown(message)) for message in found] == [(each.role, shown(each)) for each in talk]


def test_a_film_in_frames_is_taken_as_it_is():
    frames = [opened(picture(seed)) for seed in range(4)]
    ((film, text),) = [
        message.parts for message in as_messages(as_chat([Message("user", (frames, "So?"))], "film"), room())
    ]
    assert text == "So?"
    assert len(film) == 4
    apart = [
        np.abs(np.asarray(one).astype(int) - np.asarray(other)).mean() for one, other in zip(film, frames, strict=True)
    ]
    assert max(apart) < 8


def test_of_a_film_that_is_a_file_some_frames_are_taken():
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        track = container.add_stream("h264", 5)
        track.width, track.height = 32, 16
        for level in range(0, 250, 25):
            picture = np.full((16, 32, 3), level, np.uint8)
            container.mux(track.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(track.encode())
    ((film,),) = [
        message.parts for message in as_messages(asking(address(out.getvalue(), "video/mp4"), "video_url"), room())
    ]
    assert [round(np.asarray(frame).mean(), -1) for frame in film] == pytest.approx([0, 100, 220], abs=20)


def test_what_clients_send_back_of_an_answer_is_taken():
    row = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "annotations": []}
    assert as_messages([row], room()) == [Message("assistant", ("a",))]
    assert as_messages([{"role": "developer", "content": "a"}], room()) == [Message("system", ("a",))]


def bomb():
    """A PNG of 81 million pixels in few bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 9_000, 9_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.org/a.png", "url: expected data:image/...;base64,... with the image in it, got 'https:"),
        ("file:///etc/passwd", "nothing is fetched from addresses or read from paths: send the bytes"),
        ("/etc/passwd", "nothing is fetched from addresses"),
        ("data:text/html;base64,AAAA", "expected data:image/"),
        ("data:image/png,AAAA", "expected data:image/"),
        ("data:image/png;base64,AA!AA", "expected base64 behind 'data:image/png;base64'"),
        ("data:image/png;base64,AAA", "expected base64"),
        ("data:image/png;base64,\u00e9", "expected base64"),
        (address(b"no picture at all"), "expected a JPEG, PNG, WebP, GIF, BMP or TIFF"),
        (address(picture(1)[:-20]), "expected a whole picture"),
        (address(bomb()), "expected at most 100,000 pixels, got 9000 x 9000"),
        (address(picture(1, (4, 4))), "expected sides of 8 pixels or more"),
        (address(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "expected a JPEG"),
    ],
)
def test_pictures_that_cannot_be_shown_are_refused_with_their_place(url, message):
    with pytest.raises(RecordError) as raised:
        as_messages([{"role": "user", "content": "a"}, *asking(url)], room())
    assert str(raised.value).startswith("messages[1]: content[0]: image_url: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "input_audio"}], "content[0]: type: expected one of 'text', 'image_url', 'video_url'"),
        ([{"type": "text"}], "text: expected a value, the field is missing"),
        ([{"type": "text", "text": "a", "image_url": {}}], "unknown fields ['image_url']"),
        ([{"type": "image_url", "image_url": "data:"}], "image_url: expected a JSON object, got 'data:'"),
        ([{"type": "image_url", "image_url": {"url": "data:", "detail": "huge"}}], "detail: expected one of"),
        ([], "content: expected a text or a list of parts, got []"),
        (7, "content: expected a text or a list of parts, got 7"),
        ("half \ud83d", "expected text without lone surrogates"),
    ],
)
def test_contents_that_are_none_are_refused(content, message):
    with pytest.raises(RecordError) as raised:
        as_messages([{"role": "user", "content": content}], room())
    assert message in str(raised.value)


def test_only_the_user_shows_media():
    row = asking(address(picture(1)))[0] | {"role": "assistant"}
    with pytest.raises(RecordError, match="type: expected text from the assistant, got 'image_url'"):
        as_messages([row], room())


def test_pictures_and_their_pixels_are_counted_over_the_whole_conversation():
    two = asking(address(picture(1))) + asking(address(picture(2)))
    assert len(as_messages(two, room(pictures=2, pixels=4800))) == 2
    with pytest.raises(RecordError, match=r"messages\[1\].*expected at most 1 pictures in a conversation, got more"):
        as_messages(two, room(pictures=1))
    with pytest.raises(RecordError, match=r"messages\[1\].*expected at most 2,399 pixels, got 60 x 40"):
        as_messages(two, room(pixels=4799))
    film = as_chat([Message("user", ([opened(picture(seed)) for seed in range(3)],))], "film")
    with pytest.raises(RecordError, match="expected at most 2 pictures"):
        as_messages(film, room(pictures=2))
    with pytest.raises(RecordError, match="expected at most 2,399 pixels"):
        as_messages(film, room(pixels=7199))


@pytest.mark.parametrize(
    "chat",
    [
        [{"role": "user", "content": ""}] * 11,
        [{"role": "user", "content": [{"type": "text", "text": ""}] * 10}],
        [{"role": "user", "content": [7] * 9}] * 2,
    ],
)
def test_turns_and_parts_are_counted_before_any_is_read(chat):
    with pytest.raises(RecordError, match=r"^messages: expected at most 10 turns and parts of them, got (11|20)"):
        as_messages(chat, Room(4, 100_000, 3, pieces=10))
    fits = [{"role": "user", "content": [{"type": "text", "text": ""}] * 9}]
    assert len(as_messages(fits, Room(4, 100_000, 3, pieces=10))[0].parts) == 9
    with pytest.raises(RecordError, match="expected at most 2,000 turns"):
        as_messages(chat[:1] * 2001, room())


def test_films_of_a_conversation_share_the_time_in_which_they_are_decoded(monkeypatch):
    clock, left = [0.0], []

    def sample(data, frames, *, max_pixels, max_seconds_of_decoding):
        left.append(max_seconds_of_decoding)
        clock[0] += 20
        return Film([opened(picture(1))], (), ())

    monkeypatch.setattr(chats, "sample", sample)
    monkeypatch.setattr(chats.time, "monotonic", lambda: clock[0])
    as_messages(asking(address(b"film", "video/mp4"), "video_url") * 3, Room(9, 10**6, 1))
    assert left == [30, 10, 0]
