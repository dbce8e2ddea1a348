"""A spool gives every row in its order, through failures, kills and several writers."""

import multiprocessing
import os
import threading

import pytest

from mmrlhf.spool import Spool


def taken(spool, **options):
    """All that waits."""
    rows = []
    spool.drain(rows.extend, **options)
    return rows


def test_rows_come_once_and_in_their_order(tmp_path):
    spool = Spool(tmp_path / "a.spool")
    assert spool.waiting() == 0
    for number in range(7):
        spool.append({"n": number})
    sizes = []
    spool.drain(lambda rows: sizes.append(len(rows)), at_once=3)
    assert sizes == [3, 3, 1]
    assert taken(spool) == []
    spool.append({"n": 7})
    assert taken(Spool(spool.path)) == [{"n": 7}]
    assert spool.path.stat().st_size == 0


def test_what_could_not_be_sent_comes_again_and_what_was_sent_does_not(tmp_path):
    spool, sent = Spool(tmp_path / "a.spool"), []
    for number in range(6):
        spool.append({"n": number})

    def fails(rows):
        if rows[0]["n"] == 4:
            raise OSError("planted")
        sent.extend(row["n"] for row in rows)

    with pytest.raises(OSError, match="planted"):
        spool.drain(fails, at_once=2)
    spool.append({"n": 6})
    assert spool.waiting() == sum(len(f'{{"n": {number}}}\n') for number in (4, 5, 6))
    Spool(spool.path).drain(lambda rows: sent.extend(row["n"] for row in rows))
    assert sent == list(range(7))
    assert spool.waiting() == 0


def test_a_row_that_a_kill_cut_off_takes_no_other_with_it(tmp_path, caplog):
    spool = Spool(tmp_path / "a.spool")
    spool.append({"n": 0})
    with spool.path.open("ab") as file:
        file.write(b'{"n": 1')
    spool.append({"n": 2})
    assert taken(spool) == [{"n": 0}, {"n": 2}]
    assert "left out a row" in caplog.text


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_kill_while_the_file_is_emptied_loses_no_later_row(tmp_path, monkeypatch, calls):
    spool, done = Spool(tmp_path / "a.spool"), []
    for number in range(3):
        spool.append({"n": number})

    def dying(plain):
        def call(*given):
            plain(*given)
            done.append(plain)
            if len(done) == calls:
                raise KeyboardInterrupt

        return call

    with monkeypatch.context() as planted:
        for name in ("ftruncate", "pwrite"):
            planted.setattr(os, name, dying(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            taken(spool)
    for number in range(3, 9):
        spool.append({"n": number})
    assert [row["n"] for row in taken(spool)][-6:] == list(range(3, 9))


def test_a_row_that_comes_while_the_file_is_emptied_is_kept(tmp_path, monkeypatch):
    spool, plain, writers = Spool(tmp_path / "a.spool"), os.ftruncate, []

    def slowly(*given):
        writers.append(threading.Thread(target=spool.append, args=({"n": 1},)))
        writers[-1].start()
        writers[-1].join(0.2)
        plain(*given)

    spool.append({"n": 0})
    with monkeypatch.context() as planted:
        planted.setattr(os, "ftruncate", slowly)
        assert taken(spool) == [{"n": 0}]
    writers[0].join()
    assert taken(spool) == [{"n": 1}]


def test_who_drains_second_waits_for_the_first_and_sends_nothing_again(tmp_path):
    spool, found, inside = Spool(tmp_path / "a.spool"), [], threading.Event()
    spool.append({"n": 0})
    second = threading.Thread(target=lambda: Spool(spool.path).drain(found.extend))

    def send(rows):
        if not inside.is_set():
            inside.set()
            second.start()
            second.join(0.2)
        found.extend(rows)

    spool.drain(send)
    second.join()
    assert found == [{"n": 0}]


def append_many(path, writer):
    """In a process of its own."""
    for number in range(200):
        Spool(path).append({"writer": writer, "n": number})


def test_four_writers_and_two_readers_at_once_lose_and_repeat_nothing(tmp_path):
    path, found = tmp_path / "a.spool", []
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=append_many, args=(path, writer)) for writer in range(4)]
    for writer in writers:
        writer.start()
    ended = threading.Event()

    def read():
        while not ended.is_set():
            Spool(path).drain(found.extend, at_once=7)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for writer in writers:
        writer.join()
    ended.set()
    for reader in readers:
        reader.join()
    Spool(path).drain(found.extend)
    for writer in range(4):
        assert [row["n"] for row in found if row["writer"] == writer] == list(range(200))
