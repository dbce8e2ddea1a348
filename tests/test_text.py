"""A text is kept as it came, mended where it is no text, and compared in forms that two spellings share."""

from __future__ import annotations

import pickle
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrlhf.text import TextError, check_text, key, mend, same, words

NASTY = [
    "\0",
    "\ufeff",
    "\ud800",
    "\udfff",
    "\r",
    "\n",
    "\r\n",
    " ",
    "\u0301",
    "\u00df",
    "\u0130",
    "\u1e9e",
    "\u212b",
]
# Every code point, surrogates too, and the troublemakers often.
ANYTHING = st.lists(st.one_of(st.sampled_from(NASTY), st.characters(exclude_categories=()))).map("".join)
WORTH_KEEPING = [
    "",
    "plain",
    "a\tb\r\nc\u2028d\u0085e\x0c\x07\x1b[31m",
    "\U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea",
    "\u202eevil\u202c \u2066isolated\u2069",
    "Cafe\u0301 and Caf\u00e9",
    "in the middle \ufeff a mark",
    "\ufffd <|im_end|> <image>",
]


@pytest.mark.parametrize("text", WORTH_KEEPING)
def test_what_people_write_is_text_and_stays_as_it_is(text):
    assert check_text(text, "prompt") == text
    assert mend(text) == (text, ())


@pytest.mark.parametrize(
    ("text", "reason", "message"),
    [
        ("ab\0c", "nul", "prompt: expected text without NUL, got one at character 2; `text.mend` removes it"),
        (
            "\U0001f600\udc00\ud800",
            "lone_surrogate",
            (
                "prompt: expected text without lone surrogates, got U+DC00 at character 1; "
                "`text.mend` replaces it with U+FFFD"
            ),
        ),
        ("\udfff", "lone_surrogate", "prompt: expected text without lone surrogates, got U+DFFF at character 0;"),
        (7, "not_text", "prompt: expected text, got int 7; write it as a string"),
        (None, "not_text", "prompt: expected text, got NoneType None; write it as a string"),
        (b"ab", "not_text", "prompt: expected text, got bytes b'ab'; write it as a string"),
    ],
)
def test_what_is_no_text_is_refused_by_name_place_and_cure(text, reason, message):
    with pytest.raises(TextError) as caught:
        check_text(text, "prompt")
    assert caught.value.reason == reason
    assert str(caught.value).startswith(message)


def test_the_first_fault_is_the_one_that_is_named():
    with pytest.raises(TextError, match="U\\+D800 at character 0"):
        check_text("\ud800\0", "prompt")


def test_a_refusal_comes_home_from_a_worker_process():
    with pytest.raises(TextError) as caught:
        check_text("\0", "prompt")
    home = pickle.loads(pickle.dumps(caught.value))
    assert (type(home), str(home), home.reason) == (TextError, str(caught.value), "nul")


@pytest.mark.parametrize(
    ("text", "mended", "fixes"),
    [
        ("a\0b\0", "ab", ("nul",)),
        ("\ufeffa", "a", ("bom",)),
        ("\0\ufeff\ufeff\0\ufeffa", "a", ("nul", "bom")),
        ("\ud83da\ude00", "\ufffda\ufffd", ("lone_surrogate",)),
        ("\ufeff\ud800\0", "\ufffd", ("nul", "bom", "lone_surrogate")),
        ("\0", "", ("nul",)),
    ],
)
def test_each_repair_is_made_and_named(text, mended, fixes):
    assert mend(text) == (mended, fixes)


@given(ANYTHING)
def test_mending_changes_the_broken_characters_and_nothing_else(text):
    kept = ["\ufffd" if unicodedata.category(c) == "Cs" else c for c in text if c != "\0"]
    while kept[:1] == ["\ufeff"]:
        del kept[0]
    assert list(mend(text).text) == kept


@given(ANYTHING)
def test_a_mended_text_is_text_in_utf8_and_needs_no_mending(text):
    mended = mend(text).text
    assert check_text(mended, "text") == mended
    assert mended.encode("utf-8").decode("utf-8") == mended
    assert mend(mended) == (mended, ())


@given(ANYTHING)
def test_the_fixes_tell_whether_anything_was_changed(text):
    mended, fixes = mend(text)
    assert bool(fixes) == (mended != text)
    assert ("nul" in fixes) == ("\0" in text)


@given(ANYTHING)
def test_the_form_for_comparing_is_its_own_form(text):
    assert key(key(text)) == key(text)


@given(ANYTHING, st.sampled_from(["\n", "\r", "\r\n"]))
def test_spelling_newlines_and_outer_space_do_not_make_another_text(text, newline):
    other = unicodedata.normalize("NFD", text.replace("\r\n", "\n").replace("\r", "\n")).replace("\n", newline)
    assert same(text, f"\t {other}{newline}")


@pytest.mark.parametrize(
    ("a", "b"),
    [("a b", "a  b"), ("a", "A"), ("a\nb", "a\n\nb"), ("fi", "\ufb01"), ("a", "a."), ("o", "\u00f6")],
)
def test_inner_space_case_and_letters_make_another_text(a, b):
    assert not same(a, b)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \u2014 ?!... ", []),
        ("The red, RED cube_1!", ["the", "red", "red", "cube", "1"]),
        ("don't / don\u2019t", ["don", "t", "don", "t"]),
        ("\uff32\uff25\uff24 \ufb01ve \u00bd", ["red", "five", "1", "2"]),
        ("Stra\u00dfe STRASSE", ["strasse", "strasse"]),
        ("co\u00adoperate \u202ere\u200dd", ["cooperate", "red"]),
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
            ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u0e44\u0e17\u0e22"],
        ),
        ("\u4e24\u4e2a\u7ea2\u8272\u3002\u4e00", ["\u4e24\u4e2a\u7ea2\u8272", "\u4e00"]),
        ("e\u0301 \u00e9", ["\u00e9", "\u00e9"]),
        ("a\u00ad\u0301 \u0390", ["\u00e1", "\u0390"]),
        ("a\nb\tc\u2028d\u00a0e", ["a", "b", "c", "d", "e"]),
        ("<|im_end|>", ["im", "end"]),
        ("3.5 \U0001f600 \u0663", ["3", "5", "\u0663"]),
    ],
)
def test_words_are_what_is_left_without_case_and_punctuation(text, expected):
    assert words(text) == expected


def test_no_character_of_unicode_makes_a_word_that_holds_something_else():
    everything = " ".join(map(chr, range(sys.maxunicode + 1)))
    kinds = {unicodedata.category(character)[0] for word in words(everything) for character in word}
    assert kinds == {"L", "M", "N"}


@given(ANYTHING)
def test_case_spelling_and_punctuation_do_not_change_the_words(text):
    assert words(unicodedata.normalize("NFD", text)) == words(text) == words(f"... {text} (!)")


@given(ANYTHING)
def test_words_are_their_own_words(text):
    assert words(" ".join(words(text))) == words(text)
