"""A file of verdicts holds what a judge says of a benchmark, whatever interrupts, and the benchmark reads it."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time

import pytest

from mmrlhf import cli, jsonl
from mmrlhf import judge as door
from mmrlhf.endpoint import Endpoint
from mmrlhf.evaluation.rewardbench import RewardBench
from mmrlhf.evaluation.rewards import read_rewards
from mmrlhf.fingerprint import Fingerprint, of_file
from mmrlhf.judge import judge
from mmrlhf.ledger import Ledger
from mmrlhf.modules.answering import Answerer
from mmrlhf.prompts import load_template
from mmrlhf.provenance import model_digest, processor_digest

from .chatserver import Served, said
from .datamodules.made import picture
from .evaluation.made import bench_row
from .killing import FORKED, kill
from .modules.families import saved
from .test_endpoint import (
    CANARY,
    no_key,  # noqa: F401 - of this file too
    quick,  # noqa: F401 - a fixture
)
from .threads import one_thread  # noqa: F401 - of itself, for the whole module

PAIR = re.compile(
    r"\[Response 1\]\n(.*)\n\[End of response 1\]\n\n\[Response 2\]\n(.*)\n\[End of response 2\]", re.DOTALL
)


def rows():
    """Pairs about a picture, another, and a film; one of them twice, one answer empty."""
    made = [bench_row("p", "mcq/0.png", number) for number in range(3)]
    made += [bench_row("q", "long/1.png"), bench_row("q", "long/1.png"), bench_row("f", "video/film")]
    return [*made, bench_row("e", "safety/0.png", rejected="")]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    for name in ("mcq/0.png", "safety/0.png", "long/1.png", *(f"video/film/{number}.png" for number in range(5))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(len(name)))
    return folder


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    jsonl.write(path, rows())
    return path


def fair(body):
    """A judge who knows which is good."""
    first, _ = PAIR.search(said(body)).groups()
    return f"I see.\nBetter: {1 if first.startswith('good') else 2}"


def asked_of(served):
    """The two texts of every question that was asked."""
    return sorted(PAIR.search(said(body)).groups() for body in served.asked)


def written(items, media, folder, served, **options):
    """Judge, and return the file."""
    endpoint = Endpoint(served.url, "m", at_once=3, retries=0)
    judge(items, media, folder / "verdicts.jsonl", **{"endpoint": endpoint, "frames": 3} | options)
    return folder / "verdicts.jsonl"


@pytest.fixture(scope="module")
def server():
    """One that says the same for all tests, so that their fingerprints are equal."""
    with Served(fair) as served:
        yield served


@pytest.fixture
def served(server):
    server.answer = fair
    server.asked.clear()
    return server


@pytest.fixture(scope="module")
def whole(items, media, server, tmp_path_factory):
    """The file of a run that was left alone."""
    server.answer = fair
    return written(items, media, tmp_path_factory.mktemp("whole"), server)


def grades(path, items):
    pairs = RewardBench().items(items, Ledger("items"))
    found = read_rewards(path, pairs, Ledger("scores"))
    return [RewardBench().grade(pair, found.get(pair.key)) for pair in pairs]


# What is in the file ------------------------------------------------------------------------------------------


def test_every_pair_is_asked_in_both_orders_once_with_its_media_before_the_words(items, media, served, tmp_path):
    written(items, media, tmp_path, served)
    pairs = {(row["chosen"], row["rejected"]) for row in rows()}
    assert asked_of(served) == sorted([*pairs, *(pair[::-1] for pair in pairs)])
    for body in served.asked:
        (message,) = body["messages"]
        kinds = [part["type"] for part in message["content"]]
        film = "What is in f?" in said(body)
        assert kinds == ["image_url"] * (3 if film else 1) + ["text"]


def test_a_fair_judge_is_right_about_every_pair_and_its_words_are_kept(whole, items):
    assert {(grade.status, grade.correct) for grade in grades(whole, items)} == {("judged", True)}
    found = list(jsonl.read(whole))
    assert len(found) == len(rows())
    assert all(row["said"] == ["I see.\nBetter: 1", "I see.\nBetter: 2"] for row in found)
    assert all(row["orders"] == ["chosen", "chosen"] for row in found)


def test_a_judge_of_single_answers_gives_scores(items, media, served, tmp_path):
    served.answer = lambda body: f"Score: {9 if '[Response]' + chr(10) + 'good' in said(body) else 2}"
    out = written(items, media, tmp_path, served, way="pointwise")
    assert len(served.asked) == len({(row["id"], row[side]) for row in rows() for side in ("chosen", "rejected")})
    assert {(grade.status, grade.correct) for grade in grades(out, items)} == {("judged", True)}
    assert {row["reward"] for row in jsonl.read(out)} == {2.0, 9.0}


def test_the_account_is_told_with_the_bias_of_position(items, media, served, tmp_path, caplog):
    def lazy(body):
        return (400, {"error": {"code": "content_filter"}}, {}) if "in f?" in said(body) else "Better: 1"

    served.answer = lazy
    with caplog.at_level(logging.INFO, "mmrlhf"):
        out = written(items, media, tmp_path, served)
    assert "verdicts.jsonl: 7 rows; 6 inconsistent, 1 unparsable; 12 questions of which 2 filtered; " in caplog.text
    assert "the first of two was preferred 10 times of 10 (100%); 110 tokens read and 70 written" in caplog.text
    statuses = {grade.cluster: grade.status for grade in grades(out, items)}
    assert statuses == {"p": "tied", "q": "tied", "e": "tied", "f": "unparsable"}


def test_the_fingerprint_names_everything_that_the_verdicts_depend_on(whole, items, server):
    parts = Fingerprint.read(whole).parts
    assert parts.pop("media")
    assert parts == {
        "items": of_file(items),
        "template": load_template("judge_pairwise").digest,
        "way": "pairwise",
        "frames": "3",
        "max_new_tokens": "512",
        "endpoint.url": server.url,
        "endpoint.model": "m",
        "endpoint.temperature": "0.0",
        "endpoint.films": "pictures",
    }


def test_a_template_of_ones_own_is_asked(items, media, served, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("{question} A) {first} B) {second} Which?")
    served.answer = lambda body: "Better: tie"
    out = written(items, media, tmp_path, served, template=own)
    assert {grade.status for grade in grades(out, items)} == {"tied"}
    texts = [said(body) for body in served.asked]
    assert "What is in e? A) good 0 of e B)  Which?" in texts


# A model here -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved("llava_onevision", tmp_path_factory.mktemp("checkpoint"))


def test_a_checkpoint_judges_as_it_answers(items, media, checkpoint, tmp_path):
    """Its words mean nothing; they are those that it says to the same conversations, and all is accounted for."""
    outs = {}
    for at_once in (1, 5):
        outs[at_once] = tmp_path / f"{at_once}.jsonl"
        options = {"frames": 3, "max_new_tokens": 9, "at_once": at_once, "device": "cpu"}
        judge(items, media, outs[at_once], model=str(checkpoint), **options)
    assert outs[1].read_bytes() == outs[5].read_bytes()
    assert {grade.status for grade in grades(outs[1], items)} == {"unparsable"}
    parts = Fingerprint.read(outs[1]).parts
    assert (parts["model"], parts["processor"]) == (model_digest(checkpoint), processor_digest(checkpoint))
    assert parts["dtype"] == "float32"
    asked = door.questions(RewardBench().items(items), "pairwise", load_template("judge_pairwise"))
    talks = [door._conversation(media, 3, one) for one in asked]
    answers = {
        (one.item.key, one.text): answer.text
        for one, answer in zip(asked, Answerer(checkpoint, device="cpu").answers(talks, 9), strict=True)
    }
    assert {text for row in jsonl.read(outs[1]) for text in row["said"]} == set(answers.values())


def test_what_a_checkpoint_says_is_read_and_what_is_cut_is_not(items, media, checkpoint, tmp_path, monkeypatch):
    from mmrlhf.modules.answering import Answer

    def answers(self, conversations, most):
        assert len(conversations) <= 4
        texts = [parts[-1] for ((message),) in conversations for parts in [message.parts]]
        better = [1 if PAIR.search(text).group(1).startswith("good") else 2 for text in texts]
        return [Answer(f"Better: {one}", 5, "in f?" in text, 20) for one, text in zip(better, texts, strict=True)]

    monkeypatch.setattr(Answerer, "answers", answers)
    judge(items, media, tmp_path / "v.jsonl", model=str(checkpoint), frames=2, at_once=4, device="cpu")
    statuses = {grade.cluster: (grade.status, grade.correct) for grade in grades(tmp_path / "v.jsonl", items)}
    right = ("judged", True)
    assert statuses == {"p": right, "q": right, "e": right, "f": ("unparsable", False)}


# Kills --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "name", "call", "after"),
    [
        (door, "claim", 1, True),
        (jsonl.Journal, "append", 1, False),
        (jsonl.Journal, "append", 5, True),
        (Fingerprint, "write", 1, True),
        (door.jsonl, "write", 1, True),
    ],
)
def test_killed_anywhere_and_continued_the_file_has_the_same_bytes(
    target, name, call, after, whole, items, media, served, tmp_path
):
    arguments = (items, media, tmp_path, served)
    kill(lambda: written(*arguments), target, name, call, after)
    journal = tmp_path / "verdicts.jsonl.unfinished/journal.jsonl"
    kept = len(list(jsonl.read(journal))) if journal.exists() else 0
    served.asked.clear()
    out = written(*arguments)
    assert out.read_bytes() == whole.read_bytes()
    assert Fingerprint.read(out) == Fingerprint.read(whole)
    assert len(served.asked) == 12 - kept, "what is known is not asked, and not paid, again"
    assert {path.name for path in tmp_path.iterdir()} == {"verdicts.jsonl", "verdicts.jsonl.fingerprint.json"}


def test_an_interrupt_does_not_wait_for_answers(items, media, served, tmp_path):
    done = threading.Event()
    served.answer = lambda body: (done.wait(20), "late")[1]
    process = FORKED.Process(target=interrupted, args=(items, media, tmp_path, served))
    process.start()
    while not served.asked:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(8)
    assert process.exitcode == 130
    done.set()


def interrupted(*arguments):
    try:
        written(*arguments)
    except KeyboardInterrupt:
        os._exit(130)


def test_after_a_failure_of_the_server_the_rest_is_asked(whole, items, media, served, tmp_path, quick):  # noqa: F811
    turns = iter(range(100))
    served.answer = lambda body: fair(body) if next(turns) < 4 else (500, {"error": {"message": "oops"}}, {})
    with pytest.raises(ValueError, match="HTTP 500"):
        written(items, media, tmp_path, served)
    kept = len(list(jsonl.read(tmp_path / "verdicts.jsonl.unfinished/journal.jsonl")))
    assert kept == 4
    served.answer = fair
    served.asked.clear()
    assert written(items, media, tmp_path, served).read_bytes() == whole.read_bytes()
    assert len(served.asked) == 12 - kept


def test_a_full_disk_leaves_no_connection_behind(items, media, served, tmp_path, monkeypatch):
    begun = []

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Endpoint, "ask", lambda *args, ask=Endpoint.ask: begun.append(ask(*args)) or begun[0])
    monkeypatch.setattr(jsonl.Journal, "append", full)
    with pytest.raises(OSError, match="no space left"):
        written(items, media, tmp_path, served)
    assert begun[0].gi_frame is None, "it was closed, and not left to the end of the process"


def test_a_finished_file_is_left_alone_and_another_judge_is_refused(items, media, served, tmp_path):
    out = written(items, media, tmp_path, served)
    before, served.answer = out.stat(), lambda body: pytest.fail("was asked")
    written(items, media, tmp_path, served)
    assert out.stat() == before
    for options, named in (({"way": "pointwise"}, "another template"), ({"frames": 4}, "another frames")):
        with pytest.raises(ValueError, match=rf"verdicts.jsonl was made with {named}.*give another --out"):
            written(items, media, tmp_path, served, **options)
    with pytest.raises(ValueError, match=r"another endpoint\.model"):
        judge(items, media, out, endpoint=Endpoint(served.url, "other"), frames=3)


def test_an_unfinished_run_of_another_kind_is_not_continued(items, media, served, tmp_path):
    served.answer = lambda body: (400, {"error": {"message": "no"}}, {})
    with pytest.raises(ValueError, match="HTTP 400"):
        written(items, media, tmp_path, served)
    with pytest.raises(ValueError, match="holds verdicts with frames '3' instead of '2'"):
        written(items, media, tmp_path, served, frames=2)


# Refusals -----------------------------------------------------------------------------------------------------


def damaged(tmp_path, media):
    """The items with one malformed row and one whose picture is no picture."""
    path = tmp_path / "items.jsonl"
    jsonl.write(path, [*rows(), {"id": "x"}, bench_row("lost", "mcq/none.png"), bench_row("bad", "mcq/bad.png")])
    (media / "mcq/bad.png").write_bytes(b"no picture")
    return path


def test_bad_rows_and_media_are_refused_before_anything_is_asked_or_counted(
    media, served, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(door, "Answerer", lambda *_: pytest.fail("a model was loaded"))
    served.answer = lambda body: pytest.fail("was asked")
    path = damaged(tmp_path, media)
    for judges in ({}, {"model": str(tmp_path), "endpoint": None}):
        monkeypatch.setattr(door, "_judge_parts", lambda *_: {"judge": "x"})
        with pytest.raises(ValueError, match=r"items: expected at most 0.00% skipped, got .*1 of 10"):
            written(path, media, tmp_path, served, **judges)
        with pytest.raises(ValueError, match=r"media: expected at most 20.00% skipped.*2 of 9.*lost: mcq/none.png"):
            written(path, media, tmp_path, served, **judges, max_skipped=0.2)
    assert {entry.name for entry in tmp_path.iterdir()} == {"items.jsonl"}
    monkeypatch.undo()
    served.answer = fair
    with caplog.at_level(logging.INFO, "mmrlhf"):
        out = written(path, media, tmp_path, served, max_skipped=0.3)
    assert "media: 9 in = 7 out + 2 skipped (" in caplog.text
    assert "missing_media 1" in caplog.text
    assert len(list(jsonl.read(out))) == 7
    assert sum(grade.status == "missing" for grade in grades(out, path)) == 2


def test_other_media_under_the_same_names_make_another_file(items, media, served, tmp_path):
    folder = tmp_path / "media"
    for path in media.rglob("*.png"):
        (folder / path.relative_to(media)).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(media)).write_bytes(path.read_bytes())
    (folder / "mcq/bad.png").unlink(missing_ok=True)
    written(items, folder, tmp_path, served)
    (folder / "long/1.png").write_bytes(picture(77))
    with pytest.raises(ValueError, match=r"was made with another media"):
        written(items, folder, tmp_path, served)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"endpoint": None},
            "model: expected either this or endpoint, got neither; give --model FOLDER, or --endpoint",
        ),
        ({"model": "w/judge"}, "model: expected either this or endpoint, got both"),
        ({"frames": 0}, "frames: expected 1 or more, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected 1 or more, got 0"),
        ({"at_once": 0}, "at_once: expected 1 or more, got 0"),
        ({"endpoint": Endpoint("nowhere", "m")}, "endpoint.url: expected an address like"),
        ({"endpoint": None, "model": "nowhere"}, "checkpoint: expected a folder or the name of a repository"),
    ],
)
def test_options_that_cannot_work_are_refused(options, told, items, media, served, tmp_path):
    with pytest.raises(ValueError, match=told):
        written(items, media, tmp_path, served, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_template_with_other_fields_is_refused_before_anything_is_asked(items, media, served, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("{question} {answer}")
    with pytest.raises(ValueError, match="expected the fields"):
        written(items, media, tmp_path, served, template=own)
    assert served.asked == []


# The command line ---------------------------------------------------------------------------------------------


def test_the_command_line_names_the_endpoint_by_dotted_options(whole, items, media, served, tmp_path, capsys):
    out = tmp_path / "verdicts.jsonl"
    words = ["judge", "--items", items, "--media", media, "--out", out, "--frames", 3]
    words += ["--endpoint.url", served.url, "--endpoint.model", "m", "--endpoint.at_once", 2]
    assert cli.main(list(map(str, words))) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert cli.main([*map(str, words), "--way", "both"]) == 2


def test_the_key_is_in_no_file_and_on_no_stream(items, media, served, tmp_path, monkeypatch, capfd, caplog):
    """Nor when it stands where its name belongs, or when the server gives it back."""
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    out = tmp_path / "verdicts.jsonl"
    words = ["judge", "--items", items, "--media", media, "--out", out, "--endpoint.url", served.url]
    words = [*map(str, words), "--endpoint.model", "m", "--endpoint.retries", "0"]
    turns = iter(range(100))
    served.answer = lambda body: f"{CANARY}\nBetter: 1" if next(turns) < 6 else (500, CANARY.encode(), {})
    with caplog.at_level(logging.DEBUG):
        assert cli.main(words) == 2
        assert cli.main([*words, "--endpoint.key", CANARY]) == 2
        kept = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
        assert len(kept) == 2, "a marker and a journal"
        served.answer = lambda body: f"{CANARY}\nBetter: 1"
        assert cli.main(words) == 0
    kept += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    streams = capfd.readouterr()
    assert [text for text in [*kept, caplog.text, streams.out, streams.err] if CANARY in text] == []
    assert all(headers["authorization"] == f"Bearer {CANARY}" for headers in served.headers[-12:])
