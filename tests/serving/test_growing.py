"""What is told of a text while it grows is its beginning, in whole characters, and together it is the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from mmrlhf.serving.growing import Growing, Piece

LETTERS = st.text("ab\u00e9\u4f60\U0001f680 ", max_size=150)
STOPS = st.lists(st.text("ab\u00e9 ", min_size=1, max_size=4), max_size=4)


def text(ids):
    return bytes(ids).decode("utf-8", "replace")


def grown(data, stops=(), most=10_000, stream=True):
    """The pieces of a text that comes byte by byte, until it ends."""
    growing, pieces = Growing(text, most, stops, stream), []
    for byte in [*data, None]:
        pieces.append(growing.add(byte or 0, byte is None))
        if pieces[-1].finish:
            return pieces
    raise AssertionError("it did not end")


@given(LETTERS, STOPS, st.integers(1, 200))
def test_pieces_together_are_the_text_up_to_the_first_stop_or_the_most_tokens(whole, stops, most):
    data = whole.encode()[:most]
    # A stop is seen when its last byte is there, which may be before an earlier one is whole.
    ends = [end for end in range(1, len(data) + 1) if any(stop in text(data[:end]) for stop in stops)]
    seen = text(data[: ends[0]]) if ends else text(data)
    cuts = [seen.find(stop) for stop in stops if stop in seen]
    expected = seen[: min(cuts)] if cuts else seen
    for stream in (True, False):
        pieces = grown(whole.encode(), stops, most, stream)
        assert "".join(piece.text for piece in pieces) == expected
        assert pieces[-1].finish == ("stop" if cuts or len(whole.encode()) < most else "length")
        assert all(piece.finish is None for piece in pieces[:-1])


@given(LETTERS)
def test_no_piece_before_the_last_breaks_a_character(whole):
    assert all("\ufffd" not in piece.text for piece in grown(whole.encode())[:-1])


def test_what_may_become_a_stop_is_held_back_and_told_when_it_does_not():
    pieces = grown(b"xEND EN", ["END!"])
    assert [piece.text for piece in pieces] == ["x", "", "", "", "END ", "", "", "EN"]


def test_tokens_are_counted_with_the_end_and_the_cut_without():
    assert grown(b"abc")[-1] == Piece("", 4, "stop")
    assert grown(b"abc", most=3)[-1] == Piece("c", 3, "length")
    assert grown(b"abc", most=4)[-1].finish == "stop"


def test_where_nobody_listens_nothing_is_looked_at_before_the_end():
    calls = []
    growing = Growing(lambda ids: calls.append(len(ids)) or text(ids), 100)
    for byte in b"hello":
        assert growing.add(byte, over=False).text == ""
    assert growing.add(0, over=True).text == "hello"
    assert calls == [5]


def test_long_answers_are_not_looked_at_from_the_beginning_at_every_token():
    looked = []
    growing = Growing(lambda ids: looked.append(len(ids)) or text(ids), 10_000, stream=True)
    said = ("\U0001f680 rocket " * 200).encode()
    told = "".join(growing.add(byte, over=False).text for byte in said)
    assert told.encode() == said
    assert max(looked) <= 64


@pytest.mark.parametrize("split", [1, 31, 32, 33, 63])
def test_characters_across_what_is_settled_stay_whole(split):
    said = "a" * split + "\U0001f680\u4f60" * 40
    assert "".join(piece.text for piece in grown(said.encode())) == said


FALLBACK = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])


def fallen(ids):
    """Text of a tokenizer that decodes runs of bytes, which are all broken where one character in them is."""
    return FALLBACK.decode([chr(-number) if number < 0 else f"<0x{number:02X}>" for number in ids])


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_stream_takes_nothing_back_where_bytes_are_decoded_in_runs(cut):
    said = [*(-ord(letter) for letter in "ok "), *("\U00013000\u4f60" * 8).encode(), -ord("!")]
    growing = Growing(fallen, cut, stream=True)
    pieces = [growing.add(token, over=False).text for token in said[:cut]]
    told, whole = "".join(pieces), fallen(said)
    assert whole.startswith(told.rstrip("\ufffd"))
    assert all("\ufffd" not in piece for piece in pieces[:-1])
    assert "\ufffd" not in told or told.rstrip("\ufffd") == "ok ", "garbage stands behind whole characters"


def test_long_runs_of_bytes_are_whole_in_the_end():
    said = [-ord("a"), *("\u4f60" * 50).encode(), *[-ord("b")] * 70]
    growing = Growing(fallen, 10_000, stream=True)
    told = "".join(growing.add(token, over=False).text for token in said)
    assert told == "a" + "\u4f60" * 50 + "b" * 70
