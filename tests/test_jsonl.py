"""Rows are read strictly, files are written whole, and a journal keeps what it acknowledged through kills."""

from __future__ import annotations

import functools
import json
import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrlhf import jsonl
from mmrlhf.jsonl import Journal, JsonError, dumps, loads, read, write
from mmrlhf.ledger import Ledger
from mmrlhf.text import check_text

BOM = b"\xef\xbb\xbf"
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=4)
FAULTS = {
    "latin-1": (b'{"a": "caf\xe9"}', "not_utf8", "got 0xe9 at byte 10 (invalid continuation byte)"),
    "cut inside a character": (b'"\xf0\x9f', "not_utf8", "at byte 1"),
    "overlong": (b'"\xc0\xaf"', "not_utf8", "got 0xc0 at byte 1"),
    "surrogate in bytes": (b'"\xed\xa0\x80"', "not_utf8", "got 0xed at byte 1"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not_utf8", "got 0xff at byte 0"),
    "surrogate in a str": ('"\ud800"', "not_utf8", "got 0xed at byte 1"),
    "NaN": (b'{"a": NaN}', "not_finite", "got NaN; write null"),
    "infinite": (b"[Infinity]", "not_finite", "got Infinity"),
    "negative infinite": (b"-Infinity", "not_finite", "got -Infinity"),
    "overflow": (b"[1e999]", "not_finite", "got 1e999"),
    "negative overflow": (b'{"a": {"b": -1e999}}', "not_finite", "got -1e999"),
    "overflow by digits": (b"1" * 400 + b".0", "not_finite", "got 11111111111111111111;"),
    "name twice": (b'{"a": 1, "b": 2, "a": 1}', "duplicate_key", "got 'a' twice or more; keep one"),
    "name twice within": (b'[{"a": {"b": 1, "b": 2}}]', "duplicate_key", "got 'b' twice"),
    "name twice, once escaped": (b'{"a": 1, "\\u0061": 2}', "duplicate_key", "got 'a' twice"),
    "long number": (b"9" * 5000, "too_many_digits", "at most 4,300 digits in a number"),
    "deep list": (b"[" * 100_000 + b"]" * 100_000, "too_deep", "levels of brackets"),
    "deep object": (b'{"a":' * 100_000, "too_deep", "levels of brackets"),
    "cut": (b'{"id": "a", "tex', "not_json", "Unterminated string starting at (character 12 of 16)"),
    "empty": (b"", "not_json", "Expecting value (character 0 of 0)"),
    "two values": (b"{} {}", "not_json", "Extra data (character 3 of 5)"),
    "Python": (b"{'a': None}", "not_json", "double quotes"),
    "comma": (b"[1, 2,]", "not_json", "character"),
    "raw form feed": (b'"a\x0cb"', "not_json", "Invalid control character"),
    "NUL": (b"\0" * 20, "not_json", "Expecting value"),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


def run_python(code, *arguments):
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


# One value --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_value_is_refused_with_its_reason_and_place(fault):
    line, reason, words = FAULTS[fault]
    with pytest.raises(JsonError) as caught:
        loads(line)
    assert caught.value.reason == reason
    assert words in str(caught.value)
    assert str(caught.value).startswith("expected ")


@given(VALUES, st.booleans(), st.booleans())
def test_a_sound_value_is_read_as_the_json_module_reads_it(value, escaped, as_text):
    line = json.dumps(value, ensure_ascii=escaped)
    found = loads(line if as_text else line.encode())
    assert json.dumps(found) == json.dumps(json.loads(line))


@st.composite
def damaged(draw):
    """A sound line with some bytes cut out and others put in."""
    line = dumps(draw(OBJECTS)).encode()
    start = draw(st.integers(0, len(line)))
    return line[:start] + draw(st.binary(max_size=4)) + line[draw(st.integers(start, len(line))) :]


@given(damaged() | st.binary())
def test_no_bytes_raise_anything_but_a_json_error(line):
    try:
        value = loads(line)
    except JsonError:
        return
    assert json.dumps(value) == json.dumps(json.loads(line))


def test_a_byte_order_mark_is_no_part_of_a_value():
    assert loads(BOM + b'{"a": 1}') == loads("\ufeff" + '{"a": 1}') == {"a": 1}


def test_an_escaped_lone_surrogate_comes_in_to_be_mended():
    assert loads(b'"\\ud800"') == "\ud800"
    assert loads(b'"\\ud83d\\ude00"') == "\U0001f600"


@pytest.mark.parametrize("line", ['"caf\u00e9"', '"caf\u00e9"'.encode()])
def test_the_limit_counts_bytes_and_allows_the_last_one(line):
    assert loads(line, max_bytes=7) == "caf\u00e9"
    with pytest.raises(JsonError, match="at most 6 bytes") as caught:
        loads(line, max_bytes=6)
    assert caught.value.reason == "too_large"


def test_what_is_too_large_is_refused_before_it_is_parsed():
    with pytest.raises(JsonError) as caught:
        loads(b"\xff" * 101, max_bytes=100)
    assert caught.value.reason == "too_large"


def test_an_error_comes_home_from_a_worker_process():
    with pytest.raises(JsonError) as caught:
        loads(b"[NaN]")
    home = pickle.loads(pickle.dumps(caught.value))
    assert (type(home), str(home), home.reason) == (JsonError, str(caught.value), "not_finite")


@given(VALUES)
def test_what_is_written_is_one_line_that_reads_back_equal(value):
    line = dumps(value)
    assert "\n" not in line
    assert loads(line.encode()) == value
    assert line == json.dumps(value, ensure_ascii=False)


def test_names_keep_their_order_unless_they_are_to_be_sorted():
    row = {"id": "q1", "a": {"z": 1, "b": [1.5, None]}}
    assert dumps(row) == '{"id": "q1", "a": {"z": 1, "b": [1.5, null]}}'
    assert dumps(row, sort_keys=True) == '{"a": {"b": [1.5, null], "z": 1}, "id": "q1"}'


def itself():
    row: dict[str, object] = {}
    row["me"] = row
    return row


UNWRITABLE = {
    "NaN": ({"a": float("nan")}, "not_json", "Out of range float"),
    "infinite": ([float("-inf")], "not_json", "finite numbers"),
    "set": ({"a": {1, 2}}, "not_json", "Object of type set"),
    "bytes": (b"bytes", "not_json", "Object of type bytes"),
    "circle": (itself(), "not_json", "Circular reference"),
    "long number": ([10**5000], "not_json", "4300 digits"),
    "number as name": ({"a": [{1: "b"}]}, "not_json", "expected texts as names in an object, got 1;"),
    "None as name": ({None: 1}, "not_json", "expected texts as names in an object, got None;"),
    "bool as name": (({True: 1},), "not_json", "expected texts as names in an object, got True;"),
    "surrogate": ({"a": "ok \udc00"}, "lone_surrogate", 'got the lone surrogate U+DC00 after \'{"a": "ok \''),
    "surrogate in name": ({"\ud800": 1}, "lone_surrogate", "`text.mend` replaces it"),
    "deep": (functools.reduce(lambda inner, _: [inner], range(100_000), 0), "too_deep", "levels of brackets"),
}


@pytest.mark.parametrize("fault", UNWRITABLE)
def test_what_would_not_read_back_is_not_written(fault):
    value, reason, words = UNWRITABLE[fault]
    with pytest.raises(JsonError) as caught:
        dumps(value)
    assert caught.value.reason == reason
    assert words in str(caught.value)


# Reading ----------------------------------------------------------------------------------------------------


@given(st.lists(OBJECTS, max_size=5))
def test_rows_that_are_written_are_the_rows_that_are_read(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    assert write(path, rows) == len(rows)
    assert list(read(path)) == rows
    assert path.read_bytes() == b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def test_no_character_within_a_text_ends_a_line(path):
    breaks = "".join(map(chr, range(1, 0x3000)))
    path.write_bytes("\n".join(json.dumps({"n": n, "text": breaks}, ensure_ascii=False) for n in (1, 2)).encode())
    assert [row["text"] for row in read(path)] == [breaks, breaks]


@pytest.mark.parametrize(
    "data",
    [
        b"1\n2\n",
        b"1\n2",
        b"1\r\n2\r\n",
        b"1\r\n2\r",
        BOM + b"1\n2\n",
        b"1\n" + BOM + b"2\n",
        b"\n \n1\n\t\r\n\r\n2\n\n",
        BOM + b"\n1\n2\n" + BOM,
    ],
)
def test_newlines_marks_and_blank_lines_of_every_editor_are_understood(path, data):
    ledger = Ledger("read")
    path.write_bytes(data)
    assert list(read(path)) == list(read(path, ledger=ledger)) == [1, 2]
    ledger.check()
    assert (ledger.taken, ledger.given, ledger.skipped) == (2, 2, {})


def test_marks_that_were_taken_off_a_row_are_counted(path):
    path.write_bytes(BOM + b"1\n2\n" + BOM + b"3\n" + BOM + b"\n" + BOM + b"{")
    ledger = Ledger("read")
    assert list(read(path, ledger=ledger)) == [1, 2, 3]
    assert (ledger.repaired, ledger.skipped) == ({"bom": 2}, {"not_json": 1})


def test_an_empty_file_has_no_rows(path):
    path.write_bytes(b"")
    assert list(read(path)) == []


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"empty"}))
def test_a_fault_stops_with_path_and_line_or_is_skipped_and_counted(path, fault):
    line, reason, words = FAULTS[fault]
    line = line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
    line = line.replace(b"\n", b" ")
    path.write_bytes(b'{"n": 1}\n\n' + line + b'\n{"n": 2}\n')
    rows = read(path)
    assert next(rows) == {"n": 1}
    with pytest.raises(ValueError, match="expected") as caught:
        next(rows)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert words in str(caught.value)

    ledger = Ledger("read")
    assert list(read(path, ledger=ledger)) == [{"n": 1}, {"n": 2}]
    ledger.check()
    assert (ledger.taken, ledger.skipped, ledger.first) == (3, {reason: 1}, {reason: [f"{path}:3"]})


def test_a_last_line_that_was_cut_is_a_fault_of_the_file(path):
    path.write_bytes(b'{"n": 1}\n{"n": 2')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: expected one JSON value"):
        list(read(path))


def test_faults_sprayed_over_a_file_cost_the_faulty_rows_and_no_others(path):
    rng = random.Random(5)
    planted, sound, lines = Counter(), [], []
    faults = [fault for name, fault in FAULTS.items() if name not in {"empty", "UTF-16", "surrogate in a str"}]
    for n in range(600):
        if rng.random() < 0.2:
            line, reason, _ = rng.choice(faults)
            planted[reason] += 1
        else:
            sound.append({"n": n})
            line = json.dumps(sound[-1]).encode()
        lines += [line, *[b""] * rng.randint(0, 1)]
    path.write_bytes(b"\n".join(lines))
    ledger = Ledger("read")
    assert list(read(path, ledger=ledger)) == sound
    ledger.check()
    assert ledger.skipped == dict(planted)
    assert len(planted) == 6


def test_parse_builds_the_rows_and_may_refuse_them(path):
    def halved(number):
        if number % 2:
            raise ValueError(f"expected an even number, got {number}")
        return number // 2

    path.write_bytes(b"2\n3\n4\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: expected an even number, got 3"):
        list(read(path, halved))
    ledger = Ledger("read")
    assert list(read(path, halved, ledger=ledger)) == [1, 2]
    assert ledger.skipped == {"invalid_record": 1}


@pytest.mark.parametrize(
    ("parse", "reason"),
    [
        (lambda text: check_text(text, "prompt"), "lone_surrogate"),
        (lambda text: text.encode(), "invalid_record"),
        (int, "invalid_record"),
    ],
)
def test_a_refusal_is_counted_under_its_own_code_if_it_has_one(path, parse, reason):
    path.write_bytes(b'"\\ud800"\n')
    ledger = Ledger("read")
    assert list(read(path, parse, ledger=ledger)) == []
    assert ledger.skipped == {reason: 1}


def test_a_bug_in_parse_is_not_taken_for_a_faulty_row(path):
    path.write_bytes(b"{}\n")
    with pytest.raises(AttributeError):
        list(read(path, lambda row: row.prompt, ledger=Ledger("read")))


def test_a_reader_that_stops_early_has_accounted_for_what_it_got(path):
    path.write_bytes(b"1\n2\n")
    ledger = Ledger("read")
    assert next(read(path, ledger=ledger)) == 1
    ledger.check()


# Keys -------------------------------------------------------------------------------------------------------


def by_id(row):
    return row["id"]


def test_a_row_that_comes_again_is_dropped_and_counted(path):
    path.write_bytes(b'{"id": "a", "n": [1, 2]}\n{"id": "b"}\n {"n":[1,2],  "id":"\\u0061"}\n')
    ledger = Ledger("read")
    assert list(read(path, key=by_id, ledger=ledger)) == [{"id": "a", "n": [1, 2]}, {"id": "b"}]
    ledger.check()
    assert ledger.first == {"duplicate": [f"{path}:3"]}
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: expected each key once, got 'a' as in line 1"):
        list(read(path, key=by_id))


@pytest.mark.parametrize("ledger", [None, Ledger("read")])
@pytest.mark.parametrize("other", [b'{"id": "a", "n": 2}', b'{"id": "a", "n": 1.0}', b'{"id": "a"}'])
def test_two_different_rows_under_one_key_are_an_error_that_names_both_lines(path, other, ledger):
    path.write_bytes(b'{"id": "a", "n": 1}\n{"id": "b"}\n' + other + b"\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: .*'a', which line 1 has with other content"):
        list(read(path, key=by_id, ledger=ledger))


def test_without_a_key_rows_may_come_again(path):
    path.write_bytes(b'{"id": "a"}\n{"id": "a"}\n')
    assert len(list(read(path))) == 2


def test_the_key_is_taken_from_the_parsed_row(path):
    path.write_bytes(b'{"id": "a"}\n{"id": "A"}\n')
    with pytest.raises(ValueError, match="which line 1 has with other content"):
        list(read(path, lambda row: row["id"].lower(), key=lambda name: name))


@pytest.mark.parametrize(("line", "words"), [(b"{}", "'id'"), (b'{"id": 7}', "got 7"), (b"[]", "got TypeError")])
def test_a_row_without_a_key_is_a_faulty_row(path, line, words):
    path.write_bytes(b'{"id": "a"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: expected a") as caught:
        list(read(path, key=by_id))
    assert words in str(caught.value)
    ledger = Ledger("read")
    assert len(list(read(path, key=by_id, ledger=ledger))) == 1
    assert ledger.skipped == {"missing_key": 1}


# Memory -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 30)), st.booleans())
def test_lines_beyond_the_limit_are_refused_and_the_next_one_is_read(tmp_path_factory, lengths, ended):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [b'"' + b"x" * (length - 2) + b'"' for length in lengths]
    path.write_bytes(b"\n".join(lines) + b"\n" * ended)
    ledger = Ledger("read")
    found = list(read(path, ledger=ledger, max_bytes=16))
    assert found == ["x" * (length - 2) for length in lengths if length <= 16]
    ledger.check()
    long = [f"{path}:{n}" for n, length in enumerate(lengths, 1) if length > 16]
    assert ledger.skipped == ({"too_large": len(long)} if long else {})
    assert ledger.first.get("too_large", []) == long[:3]


def peak_of(rows):
    tracemalloc.start()
    try:
        count = sum(1 for _ in rows)
        return count, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_line_that_is_too_long_is_never_held_whole(path):
    path.write_bytes(b"1\n[" + b"0," * 10_000_000 + b"0]\n2\n")
    count, peak = peak_of(read(path, ledger=Ledger("read"), max_bytes=1000))
    assert count == 2
    assert peak < 1_000_000


def test_a_file_is_never_held_whole_and_keys_cost_little(path):
    write(path, ({"id": f"q{n}", "text": "x" * 10_000} for n in range(2000)))
    count, peak = peak_of(read(path, key=by_id))
    assert (count, path.stat().st_size > 20_000_000) == (2000, True)
    assert peak < 2_000_000


# Writing a whole file ---------------------------------------------------------------------------------------


class Answer:
    """Something that describes itself."""

    def __init__(self, text):
        self.text = text

    def to_json(self):
        """Return the text."""
        return {"text": self.text}


def test_what_describes_itself_is_written_like_a_mapping(path):
    assert write(path, [Answer("a"), {"text": "b"}]) == 2
    assert list(read(path)) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [None, b"old\n"])
def test_rows_that_fail_leave_the_old_file_and_nothing_else(path, fault, old):
    def rows():
        yield {"n": 1}
        raise fault

    if old is not None:
        path.write_bytes(old)
    with pytest.raises(fault):
        write(path, rows())
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == ({path.name: old} if old else {})


def test_a_row_that_cannot_be_written_is_named(path):
    with pytest.raises(JsonError, match=r"rows\.jsonl: row 2: .*Object of type set") as caught:
        write(path, [{"n": 1}, {"n": {2}}])
    assert caught.value.reason == "not_json"
    assert list(path.parent.iterdir()) == []


def test_a_row_that_would_be_too_long_to_read_is_not_written(path):
    edge = jsonl.MAX_BYTES - len('{"t": ""}')
    assert write(path, [{"t": "x" * edge}]) == len(list(read(path))) == 1
    with pytest.raises(JsonError, match="row 1: expected at most 16,777,216 bytes in a row, got 16,777,217"):
        write(path, [{"t": "x" * (edge + 1)}])


def test_a_file_can_be_rewritten_from_its_own_rows(path):
    write(path, ({"n": n} for n in range(5)))
    write(path, ({"n": row["n"] * 2} for row in read(path)))
    assert [row["n"] for row in read(path)] == [0, 2, 4, 6, 8]


@pytest.fixture
def disk(monkeypatch):
    """What the disk is told, in order: a file to sync and its size, or a file to rename."""
    told = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        told.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink()), os.fstat(descriptor).st_size))
        real_sync(descriptor)

    def replace(source, target):
        told.append(("replace", str(source), str(target)))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return told


def test_the_bytes_reach_the_disk_before_the_name_does(path, disk):
    write(path, [{"n": 1}])
    assert disk[:2] == [("sync", f"{path}.tmp", 9), ("replace", f"{path}.tmp", str(path))]
    assert [step[:2] for step in disk[2:]] == [("sync", str(path.parent))]


def test_a_writer_killed_half_way_leaves_the_old_file(path):
    write(path, [{"n": 1}])
    code = """
import os, signal, sys
from mmrlhf import jsonl
def rows():
    yield from ({"text": "x" * 10_000} for _ in range(100))
    os.kill(os.getpid(), signal.SIGKILL)
jsonl.write(sys.argv[1], rows())
"""
    assert run_python(code, path).returncode == -signal.SIGKILL
    assert path.read_bytes() == b'{"n": 1}\n'
    assert write(path, [{"n": 2}]) == 1  # what the dead writer left is in nobody's way
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# The journal ------------------------------------------------------------------------------------------------


def keys_in(path):
    return [json.loads(line)["id"] for line in path.read_bytes().decode().split("\n")[:-1]]


def test_a_journal_goes_on_where_it_stopped(path):
    with Journal(path) as journal:
        assert journal.done == set()
        journal.append({"id": "a", "n": 1})
    with Journal(path) as journal:
        assert journal.done == {"a"}
        journal.append({"id": "b", "n": 2})
        assert journal.done == {"a", "b"}
    assert path.read_bytes() == b'{"id": "a", "n": 1}\n{"id": "b", "n": 2}\n'


def test_a_row_is_in_the_file_when_append_returns(path):
    with Journal(path) as journal:
        journal.append(Answer("x").to_json() | {"id": "a"})
        assert keys_in(path) == ["a"]


def test_the_key_may_be_a_function_of_the_row_as_it_is_read(path):
    def pair(row):
        return f"{row['query']}/{row['pair']}"

    for pairs in ([(1, 2), (1, 3)], [(2, 3)]):
        with Journal(path, pair) as journal:
            for numbers in pairs:
                journal.append({"query": "q1", "pair": numbers})
    with Journal(path, pair) as journal:
        assert journal.done == {"q1/[1, 2]", "q1/[1, 3]", "q1/[2, 3]"}
        with pytest.raises(ValueError, match="expected a new row"):
            journal.append({"query": "q1", "pair": (1, 2)})


@pytest.mark.parametrize("reopened", [False, True])
def test_a_key_that_is_there_is_not_written_again(path, reopened):
    journal = Journal(path)
    journal.append({"id": "a"})
    if reopened:
        journal.close()
        journal = Journal(path)
    with journal, pytest.raises(ValueError, match=r"rows\.jsonl: expected a new row, got 'a' again; skip"):
        journal.append({"id": "a"})
    assert keys_in(path) == ["a"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"n": 1}, "expected a key in every row, got KeyError('id')"),
        ({"id": 7}, "expected a text as key, got 7"),
        ({"id": "a", "n": {1}}, "Object of type set"),
        ({"id": "a", "t": "\ud800"}, "lone surrogate"),
    ],
)
def test_a_row_that_is_refused_leaves_no_trace(path, row, words):
    with Journal(path) as journal:
        with pytest.raises(JsonError) as caught:
            journal.append(row)
        assert str(caught.value).startswith(f"{path}: expected ")
        assert words in str(caught.value)
        journal.append({"id": "a"})
    assert path.read_bytes() == b'{"id": "a"}\n'


def test_the_longest_row_can_be_appended_and_opened_again(path):
    with Journal(path) as journal:
        journal.append({"id": "a", "t": "x" * (jsonl.MAX_BYTES - len('{"id": "a", "t": ""}'))})
        with pytest.raises(JsonError, match="expected at most 16,777,216 bytes"):
            journal.append({"id": "b", "t": "x" * (jsonl.MAX_BYTES - len('{"id": "b", "t": ""}') + 1)})
    with Journal(path) as journal:
        assert journal.done == {"a"}


def test_a_closed_journal_takes_nothing_and_may_be_closed_again(path):
    journal = Journal(path)
    journal.close()
    journal.close()
    with pytest.raises(ValueError, match=r"rows\.jsonl: expected an open journal"):
        journal.append({"id": "a"})


def test_a_row_cut_at_any_byte_is_dropped_and_written_again(path, caplog):
    rows = [{"id": f"caf\u00e9 {n}", "t": "x" * n} for n in range(3)]
    write(path, rows)
    whole = path.read_bytes()
    ends = [0] + [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        caplog.clear()
        kept = max(end for end in ends if end <= cut)
        with Journal(path) as journal:
            assert journal.dropped_bytes == cut - kept
            assert path.read_bytes() == whole[:kept]
            assert journal.done == {row["id"] for row in rows[: ends.index(kept)]}
            for row in rows:
                if row["id"] not in journal.done:
                    journal.append(row)
        assert path.read_bytes() == whole
        assert [str(cut - kept) in message for message in caplog.messages] == [True] * (cut > kept)
        assert all(str(path) in message and level >= logging.WARNING for _, level, message in caplog.record_tuples)


@pytest.mark.parametrize(
    "damage",
    [
        b'{"id": "b',
        b"\0" * 9,
        b'{"id": "b"} {"id": "c"}',
        b"[1]",
        b'{"n": 1}',
        b'{"id": "a"}',
        b'{"id": "a", "n": 2}',
    ],
)
@pytest.mark.parametrize("tail", [b"", b'{"id": "z'])
def test_a_journal_damaged_in_the_middle_is_refused_and_not_touched(path, damage, tail):
    path.write_bytes(b'{"id": "a"}\n' + damage + b'\n{"id": "y"}\n' + tail)
    before = path.read_bytes()
    for _ in range(2):  # the refusal must not keep the lock
        with pytest.raises(ValueError, match=r"rows\.jsonl:2: expected "):
            Journal(path)
    assert path.read_bytes() == before


def test_a_line_too_long_to_be_ours_is_refused_and_not_cut_off(path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_BYTES", 50)
    path.write_bytes(b"x" * 60)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: "):
        Journal(path)
    assert path.stat().st_size == 60


def test_a_second_writer_is_refused_until_the_first_has_closed(path):
    with Journal(path) as journal:
        with pytest.raises(ValueError, match=r"rows\.jsonl: another process writes to it"):
            Journal(path)
        other = run_python("import sys; from mmrlhf.jsonl import Journal; Journal(sys.argv[1])", path)
        assert "rows.jsonl: another process writes to it" in other.stderr
        journal.append({"id": "a"})
    with Journal(path) as journal:
        assert journal.done == {"a"}


def test_a_forked_child_does_not_keep_a_closed_journal_locked(path):
    journal = Journal(path)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)  # until the parent lets go
        os._exit(0)
    try:
        journal.close()
        Journal(path).close()
    finally:
        os.close(writing)
        os.waitpid(child, 0)
        os.close(reading)


def test_an_interrupt_right_after_the_write_does_not_lead_to_a_second_copy(path, monkeypatch):
    real = os.write

    def interrupted(descriptor, data):
        real(descriptor, data)
        raise KeyboardInterrupt

    with Journal(path) as journal:
        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            journal.append({"id": "a"})
        monkeypatch.undo()
        with pytest.raises(ValueError, match="expected a new row"):
            journal.append({"id": "a"})
    assert keys_in(path) == ["a"]


def test_a_full_disk_leaves_no_half_row_and_the_row_can_be_appended_later(path):
    code = """
import os, resource, sys
from mmrlhf.jsonl import Journal
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
with Journal(sys.argv[1]) as journal:
    journal.append({"id": "a", "t": "x" * 100})
    for room in (os.path.getsize(sys.argv[1]), 150, 200):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            journal.append({"id": "b", "t": "x" * 100})
        except OSError as error:
            print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    journal.append({"id": "b", "t": "x" * 100})
"""
    done = run_python(code, path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("bytes of a row could be written; free space") == 2
    assert str(path) in done.stdout
    assert keys_in(path) == ["a", "b"]


def test_rows_are_synced_every_so_often_and_at_the_end(path, disk):
    with Journal(path, sync_every=3) as journal:
        disk.clear()
        for n in range(7):
            journal.append({"id": f"q{n}"})
        size = path.stat().st_size // 7
        assert disk == [("sync", str(path), 3 * size), ("sync", str(path), 6 * size)]
    assert disk[2:] == [("sync", str(path), 7 * size)]


def test_a_new_journal_is_entered_in_its_folder_and_a_cut_is_synced(path, disk):
    Journal(path).close()
    assert ("sync", str(path.parent)) in [step[:2] for step in disk]
    path.write_bytes(b'{"id": "a"}\n{"id"')
    disk.clear()
    with Journal(path):
        assert ("sync", str(path), 12) in disk


@pytest.mark.parametrize("every", [0, -1])
def test_a_journal_that_would_never_sync_is_refused(path, every):
    with pytest.raises(ValueError, match=f"sync_every: expected 1 row or more, got {every}"):
        Journal(path, sync_every=every)


WRITER = """
import random, sys
from mmrlhf.jsonl import Journal
with Journal(sys.argv[1]) as journal:
    for n in range(100_000):
        if f"q{n}" not in journal.done:
            journal.append({"id": f"q{n}", "t": "x" * random.Random(n).choice([0, 5_000, 500_000])})
            print(f"q{n}", flush=True)
"""


def test_no_acknowledged_row_is_lost_or_doubled_by_random_kills(path):
    rng, acknowledged, kills = random.Random(7), [], 6
    for _ in range(kills):
        told = path.with_name("told")
        with told.open("wb") as out:
            writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=out)
            while not told.stat().st_size and writer.poll() is None:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.1))
            writer.send_signal(signal.SIGKILL)
            assert writer.wait() == -signal.SIGKILL
        acknowledged += told.read_text().split("\n")[:-1]
        with Journal(path) as journal:
            assert set(acknowledged) <= journal.done
    rows = [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]
    assert [row["id"] for row in rows] == [f"q{n}" for n in range(len(rows))]
    assert [len(row["t"]) for row in rows] == [random.Random(n).choice([0, 5_000, 500_000]) for n in range(len(rows))]
    assert len(acknowledged) == len(set(acknowledged)) >= kills
    assert len(rows) - len(acknowledged) <= kills  # written, but killed before it could say so
