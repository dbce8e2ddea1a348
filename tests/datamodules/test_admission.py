"""What is trained on is decided once, in the open, and nothing half-decided is ever taken for it."""

import dataclasses
import errno
import logging
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from mmrlhf import jsonl
from mmrlhf.batches import Continuation
from mmrlhf.datamodules.admission import admit
from mmrlhf.datamodules.reader import Shards
from mmrlhf.datamodules.rows import DropQueryError, Row
from mmrlhf.datamodules.scores import Scores
from mmrlhf.datamodules.terms import EveryQuery, Terms
from mmrlhf.fingerprint import of_text

from ..killing import FORKED, kill
from .made import packed_set, ranked, scores_file

TERMS = Terms(max_tokens=30, too_long="drop_responses", pairs="all", ties_suffice=False)
PROMPT = "Ten chars!"
QUERIES = [
    ranked("two", ("yes", "no"), prompt=PROMPT),
    ranked("long one", ("a" * 21, "bb", "ccc"), prompt=PROMPT),
    ranked("at the limit", ("d" * 20, "e"), prompt=PROMPT),
    ranked("ties", ("f", "g"), ranks=(1, 1), prompt=PROMPT),
    ranked("same", ("h", "h"), prompt=PROMPT),
    ranked("too long", ("i" * 21, "j", "k" * 30), prompt=PROMPT),
    ranked("three", ("l", "mm", "nnn"), ranks=(1, 2, 2), prompt=PROMPT),
    ranked("middle", ("o", "p" * 25, "q", "r"), ranks=(3, 2, 1, 1), prompt=PROMPT),
]
USED = {
    # sample: (tokens, places of its responses, pairs, ties), by hand
    "two": (15, (0, 1), 1, 0),
    "long one": (15, (1, 2), 1, 0),
    "at the limit": (31, (0, 1), 1, 0),
    "three": (16, (0, 1, 2), 2, 1),
    "middle": (13, (0, 2, 3), 2, 1),
}


class Characters:
    """A token for every character; counts what it encodes, and does something first."""

    def __init__(self, then=lambda name: None):
        self.calls = 0
        self.then = then

    def __call__(self, sample):
        """Encode."""
        self.calls += 1
        query, responses = sample.ranked.query, sample.ranked.responses
        self.then(query.id)
        told = tuple(Continuation(torch.empty(0).long(), torch.arange(len(one.text))) for one in responses)
        return Row(sample.ranked, tuple(range(len(responses))), torch.arange(len(query.prompt)), told, {}, {})


@pytest.fixture(scope="module")
def made_set(tmp_path_factory):
    return packed_set(tmp_path_factory.mktemp("set"), QUERIES)


@pytest.fixture
def folder(made_set, tmp_path):
    return shutil.copytree(made_set, tmp_path / "shards")


def decided(folder, encode=None, terms=TERMS, made_with=None, **options):
    settings = {"scores": None, "cache": Path(folder) / "admitted", "workers": 0, "max_skipped": 1.0} | options
    return admit(Shards(folder, "train"), encode or Characters(), terms, made_with or {}, **settings)


def named(folder, admission):
    """What was admitted, by the name of the query."""
    shards = Shards(folder, "train")
    rows = [admission[number] for number in range(admission.n)]
    return {shards[row.sample].ranked.query.id: row for row in rows}


def flip(folder, name):
    """Damage the sample of a query; return what mends it again."""
    shards = Shards(folder, "train")
    index = next(at for at in range(len(shards)) if shards[at].ranked.query.id == name)
    path = folder / "train-00000.tar"
    data = path.read_bytes()
    place = data.index(f'"id":"{name}"'.encode()) if f'"id":"{name}"'.encode() in data else data.index(name.encode())
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    return index, lambda: path.write_bytes(data)


# What is decided --------------------------------------------------------------------------------------------


def test_admitted_is_what_fits_and_can_be_compared_and_all_else_is_counted(folder):
    found = decided(folder)
    rows = named(folder, found)
    assert {name: row.tokens for name, row in rows.items()} == {name: tokens for name, (tokens, *_) in USED.items()}
    assert {name: len(row.scores) for name, row in rows.items()} == {
        name: len(kept) for name, (_, kept, *_) in USED.items()
    }
    assert all(np.isnan(row.scores).all() for row in rows.values())
    assert found.ledger.as_dict()["skipped"] == {"no_pairs": 2, "too_long": 1}
    assert found.ledger.repaired == {"response_dropped": 2}
    assert (found.ledger.taken, found.ledger.given) == (8, 5)
    assert found.mean_pairs == sum(pairs for *_, pairs, _ in USED.values()) / 5
    assert found.mean_ties == sum(ties for *_, ties in USED.values()) / 5
    assert found.mean_supervised == sum(len(kept) for _, kept, *_ in USED.values()) / 5
    assert (found.said.taken, found.said.given, found.said.skipped) == (
        found.said.given + 2,
        sum(len(kept) for _, kept, *_ in USED.values()),
        {"too_long": 2},
    )
    rejects = {row["id"]: row["reason"] for row in jsonl.read(found.folder / "rejects.jsonl")}
    queries = {"ties": "no_pairs", "same": "no_pairs", "too long": "too_long"}
    assert rejects == queries | dict.fromkeys(("long one", "middle"), "response_too_long")


def test_where_ties_suffice_a_query_without_a_pair_is_used(folder):
    found = decided(folder, terms=dataclasses.replace(TERMS, ties_suffice=True))
    assert named(folder, found).keys() == {*USED, "ties"}
    assert found.mean_pairs == 7 / 6


def test_what_is_held_out_is_not_judged_and_counted_apart(folder, caplog):
    encode = Characters()
    with caplog.at_level(logging.INFO, "mmrlhf"):
        found = decided(folder, encode, chosen=[0, 2, 3, 6], max_skipped=0.25)
    assert encode.calls == 4
    assert named(folder, found).keys() == {"two", "at the limit", "three"}
    assert found.mean_pairs == (1 + 1 + 2) / 3
    assert (found.ledger.taken, found.ledger.given, found.ledger.skipped) == (8, 3, {"no_pairs": 1, "held_out": 4})
    found.ledger.check()
    assert "with what is held out, admission: 8 in = 3 out + 5 skipped (held_out 4, no_pairs 1)" in caplog.text
    with pytest.raises(ValueError, match=r"got 50.00% \(2 of 4\): no_pairs 2"):
        decided(folder, chosen=[0, 2, 3, 4], max_skipped=0.25)
    with pytest.raises(ValueError, match="none of 2 train queries can be used"):
        decided(folder, chosen=[3, 4])


def test_another_choice_is_another_admission_and_the_same_is_found_again(folder):
    every = [decided(folder, chosen=chosen) for chosen in (None, [0, 2, 6], [0, 2, 7], [*range(8)])]
    assert len({found.digest for found in every}) == 4
    encode = Characters()
    again = decided(folder, encode, chosen=[0, 2, 6])
    assert (again.digest, encode.calls) == (every[1].digest, 0)
    assert again.ledger == every[1].ledger


def test_scores_are_asked_for_what_is_chosen_alone(folder, tmp_path):
    rows = [
        {"id": "two", "response": place, "digest": of_text(text), "reward": place}
        for place, text in enumerate(("yes", "no"))
    ]
    scores = Scores([scores_file(tmp_path / "scores.jsonl", rows)], ("reward",))
    assert named(folder, decided(folder, scores=scores, chosen=[0])).keys() == {"two"}
    with pytest.raises(ValueError, match="no reward for 1 of 2 queries"):
        decided(folder, scores=scores, chosen=[0, 1])


def test_every_query_is_used_whole_where_there_are_no_terms(folder):
    found = decided(folder, terms=EveryQuery())
    assert {name: len(row.scores) for name, row in named(folder, found).items()} == {
        row.query.id: len(row.responses) for row in QUERIES
    }
    assert (found.ledger.given, found.ledger.skipped, found.ledger.repaired) == (8, {}, {})


def test_means_are_of_the_responses_that_are_left_and_of_what_is_learned_of_them(tmp_path):
    class Silent(Characters):
        def __call__(self, sample):
            made = super().__call__(sample)
            told = tuple(
                Continuation(all_, all_[:0]) if len(all_) == 1 else (Continuation(all_[:1], all_[1:]))
                for _, all_ in made.continuations
            )
            return made._replace(continuations=told)

    scored = ({"helpfulness": 4, "ethics": 1}, {"helpfulness": 2}, {"helpfulness": None}, {"faithfulness": 5})
    rows = []
    for name, texts in (("first", ("a", "bb", "cc", "d" * 40)), ("second", ("e", "f", "gg", "hh"))):
        made = ranked(name, texts, ranks=(1, 2, 2, 2), prompt=PROMPT)
        told = zip(made.responses, scored, strict=True)
        rows.append(dataclasses.replace(made, responses=tuple(dataclasses.replace(one, scores=x) for one, x in told)))
    found = decided(packed_set(tmp_path, rows), encode=Silent())
    assert found.said.skipped == {"too_long": 1}
    assert (found.mean_pairs, found.mean_ties) == ((2 + 3) / 2, (1 + 3) / 2)
    assert found.mean_supervised == (2 + 2) / 2
    assert found.mean_scores == {"helpfulness": 2.0, "faithfulness": 0.5, "ethics": 1.0}


def test_where_scores_of_people_are_needed_a_query_with_a_response_without_any_is_left_out(tmp_path):
    def scored(name, *scores):
        row = ranked(name, [f"answer {place}" for place in range(len(scores))])
        return dataclasses.replace(
            row,
            responses=tuple(
                dataclasses.replace(one, scores=said) for one, said in zip(row.responses, scores, strict=True)
            ),
        )

    rows = [
        scored("all", {"helpfulness": 3, "ethics": 1}, {"faithfulness": 5}),
        scored("some", {"helpfulness": None, "ethics": 2}, {"faithfulness": 5}),
        scored("one without", {"helpfulness": 3}, {"faithfulness": None}),
        scored("last without", {"helpfulness": 3}, {"ethics": 2}, {}),
    ]
    shards = packed_set(tmp_path, rows)
    terms = dataclasses.replace(TERMS, max_tokens=100, annotated=True)
    found = decided(shards, terms=terms)
    assert named(shards, found).keys() == {"all", "some"}
    assert found.ledger.skipped == {"no_annotation": 2}
    (first, second) = jsonl.read(found.folder / "rejects.jsonl")
    assert (
        "query 'one without': expected a score from 1 to 5 of every response, response 1 has none" in first["message"]
    )
    assert "response 2 has none" in second["message"]
    assert decided(shards, terms=dataclasses.replace(terms, annotated=False)).n == 4
    with pytest.raises(ValueError, match=r"expected at most 49.00% skipped, got 50.00% .*no_annotation 2"):
        decided(shards, terms=terms, max_skipped=0.49)


def test_lengths_are_told_for_any_samples_at_once(folder):
    found = decided(folder)
    assert found.costs(np.array([4, 0, 0])).tolist() == [found[4].tokens, found[0].tokens, found[0].tokens]


def test_samples_that_are_not_there_are_an_error(folder):
    found = decided(folder)
    for number in (-1, 5):
        with pytest.raises(IndexError, match=f"expected a number from 0 to 4, got {number}"):
            found[number]
    assert len(list(found)) == 5


def test_any_number_of_workers_decides_the_same(folder, tmp_path):
    one = decided(folder)
    other = decided(folder, workers=2, cache=tmp_path / "other")
    assert one.digest == other.digest
    for name in ("rows", "scores", "rejects.jsonl", "plan.json"):
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()


def test_deciding_neither_draws_random_numbers_nor_changes_threads(folder, tmp_path):
    torch.set_num_threads(2)
    before = torch.get_rng_state()
    decided(folder)
    decided(folder, workers=1, cache=tmp_path / "other")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


# Scores -----------------------------------------------------------------------------------------------------


def scores(tmp_path, without=(), **changes):
    """A reward for every response, its place in the whole file; log-probs are its negatives."""
    rows = [(row.query.id, place, response.text) for row in QUERIES for place, response in enumerate(row.responses)]
    lines = [
        {"id": name, "response": place, "digest": of_text(changes.get(name, text)), "reward": at, "reference_logp": -at}
        for at, (name, place, text) in enumerate(rows)
        if name not in without
    ]
    return scores_file(tmp_path / "scores.jsonl", reversed(lines))


def test_scores_are_those_of_the_responses_that_are_left(folder, tmp_path):
    found = decided(folder, scores=Scores([scores(tmp_path)], ("reward",)))
    firsts = dict(
        zip(
            (row.query.id for row in QUERIES),
            np.cumsum([0, *(len(row.responses) for row in QUERIES)]).tolist(),
            strict=False,
        )
    )
    for name, row in named(folder, found).items():
        expected = [firsts[name] + place for place in USED[name][1]]
        assert row.scores == tuple((value, -value) for value in expected)


@pytest.mark.parametrize(
    ("without", "changes", "message"),
    [
        (("two", "three"), {}, r"no reward for 2 of 8 queries \(first: 'two'\); run `mmrlhf score`"),
        ((), {"three": "other"}, r"the score of response 0 of query 'three' is about another text"),
    ],
)
def test_missing_and_foreign_scores_are_refused_before_more_than_one_sample_is_encoded(
    folder, tmp_path, without, changes, message
):
    encode = Characters()
    with pytest.raises(ValueError, match=message):
        decided(folder, encode, scores=Scores([scores(tmp_path, without, **changes)], ("reward",)))
    assert encode.calls <= 1
    assert not (folder / "admitted").exists()


def test_what_cannot_be_encoded_needs_no_score(folder, tmp_path):
    def encode(sample):
        if sample.ranked.query.id == "two":
            raise DropQueryError("a film where none can be", "no_films")
        return Characters()(sample)

    known = Scores([scores(tmp_path, ("two",))], ("reward", "reference_logp"))
    assert decided(folder, encode, scores=known).ledger.skipped == {"no_pairs": 2, "too_long": 1, "no_films": 1}


def test_a_damaged_sample_is_no_missing_score(folder, tmp_path):
    flip(folder, "two")
    found = decided(folder, scores=Scores([scores(tmp_path)], ("reward", "reference_logp")))
    assert found.ledger.skipped == {"no_pairs": 2, "too_long": 1, "crc_mismatch": 1}


# Found again, or decided anew -------------------------------------------------------------------------------


def test_what_was_decided_is_found_and_not_decided_again(folder):
    first, encode = decided(folder), Characters()
    again = decided(folder, encode)
    assert encode.calls == 0
    assert (again.digest, again.n, again.mean_pairs) == (first.digest, first.n, first.mean_pairs)
    assert [row[:2] for row in again] == [row[:2] for row in first]
    assert again.ledger == first.ledger


@pytest.mark.parametrize(
    "other",
    [
        {"terms": dataclasses.replace(TERMS, max_tokens=29)},
        {"terms": dataclasses.replace(TERMS, too_long="cut_responses")},
        {"terms": dataclasses.replace(TERMS, pairs="hardest")},
        {"terms": dataclasses.replace(TERMS, ties_suffice=True)},
        {"made_with": {"processor": "other"}},
    ],
)
def test_other_terms_are_decided_anew(folder, other):
    first, encode = decided(folder), Characters()
    found = decided(folder, encode, **other)
    assert encode.calls == len(QUERIES)
    assert found.digest != first.digest
    assert decided(folder).digest == first.digest, "both are kept"


def test_other_data_are_decided_anew(folder, tmp_path):
    first, encode = decided(folder), Characters()
    changed = [dataclasses.replace(QUERIES[0], ranking_reason="new"), *QUERIES[1:]]
    other = packed_set(tmp_path / "other", changed)
    found = decided(other, encode, cache=folder / "admitted")
    assert encode.calls == len(QUERIES)
    assert found.digest != first.digest


def test_data_and_settings_alone_do_not_stand_for_what_was_admitted(folder, tmp_path):
    whole = decided(folder)
    flip(folder, "two")
    assert decided(folder, cache=tmp_path / "other").digest != whole.digest


# Damage -----------------------------------------------------------------------------------------------------


def test_a_damaged_sample_is_left_out_with_its_reason_and_place(folder):
    index, _ = flip(folder, "three")
    found = decided(folder)
    assert found.ledger.skipped == {"no_pairs": 2, "too_long": 1, "crc_mismatch": 1}
    assert found.ledger.taken == found.ledger.given + 4 == 8
    assert named(folder, found).keys() == USED.keys() - {"three"}
    (reject,) = [row for row in jsonl.read(found.folder / "rejects.jsonl") if row["reason"] == "crc_mismatch"]
    assert reject["sample"] == index
    assert f"train-00000.tar: sample {index} at byte" in reject["message"]


def test_more_skipped_than_allowed_is_an_error_that_names_each_and_the_way_out(folder):
    _, mend = flip(folder, "three")
    with pytest.raises(ValueError, match=r"expected at most 49.00% skipped, got 50.00%") as first:
        decided(folder, max_skipped=0.49)
    assert decided(folder, max_skipped=0.5).n == 4
    with pytest.raises(ValueError, match=r"expected at most 49.00% skipped") as again:
        decided(folder, max_skipped=0.49)
    assert str(first.value) == str(again.value)
    (kept,) = (folder / "admitted").iterdir()
    assert f"{kept / 'rejects.jsonl'} names each; after a repair remove {kept}" in str(first.value)
    mend()
    shutil.rmtree(kept)
    assert decided(folder, max_skipped=0.49).n == 5


def test_a_set_without_any_query_that_can_be_used_is_an_error(folder):
    with pytest.raises(ValueError, match="none of 8 train queries can be used; see"):
        decided(folder, terms=dataclasses.replace(TERMS, max_tokens=3))


def test_an_error_that_is_no_fault_of_a_sample_ends_it_and_leaves_nothing(folder):
    def fail(name):
        raise KeyError(name)

    with pytest.raises(KeyError):
        decided(folder, Characters(fail))
    assert list((folder / "admitted").iterdir()) == []


def test_a_fault_without_a_code_is_an_invalid_record(folder):
    def fail(name):
        if name == "two":
            b"\xff".decode()

    assert decided(folder, Characters(fail)).ledger.skipped["invalid_record"] == 1


# Kills, races, and folders that cannot be written -----------------------------------------------------------


def test_a_kill_in_the_middle_leaves_nothing_that_is_taken_for_finished(folder):
    kill(lambda: decided(folder), Characters, "__call__", 7, after=False)
    assert [path.suffix for path in (folder / "admitted").iterdir()] == [".tmp"]
    encode = Characters()
    assert decided(folder, encode).n == 5
    assert encode.calls == len(QUERIES)


def test_who_is_overtaken_while_it_decides_takes_what_the_other_has_decided(folder):
    inner = []

    def overtake(name):
        if name == "middle":
            inner.append(decided(folder))

    found = decided(folder, Characters(overtake))
    assert found.digest == inner[0].digest
    assert len(list((folder / "admitted").iterdir())) == 1


def test_processes_that_decide_at_once_agree(folder, tmp_path):
    alone = decided(folder, cache=tmp_path / "alone")
    meet = FORKED.Barrier(3, timeout=60)

    def work():
        first = []

        def wait(name):
            first.append(name)
            if len(first) == 4:
                meet.wait()

        assert decided(folder, Characters(wait)).digest == alone.digest

    processes = [FORKED.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    (kept,) = (folder / "admitted").iterdir()
    assert {path.name for path in kept.iterdir()} == {"rows", "scores", "rejects.jsonl", "plan.json"}
    assert (kept / "rows").read_bytes() == (alone.folder / "rows").read_bytes()


def test_files_that_are_no_admission_are_not_overwritten(folder):
    kept = decided(folder).folder
    (kept / "plan.json").unlink()
    with pytest.raises(ValueError, match=f"{kept.name}: expected a finished admission or nothing, got other files"):
        decided(folder)


def test_a_folder_that_cannot_be_written_to_names_the_option(folder, tmp_path, monkeypatch):
    encode, mkdir = Characters(), Path.mkdir

    def refuse(path, *args, **options):
        if folder in path.parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match=r"cache: expected a folder .*admitted \(Read-only file system\); set `cache`"):
        decided(folder, encode)
    assert encode.calls == 0
    assert decided(folder, cache=tmp_path / "elsewhere").n == 5
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cache: expected a folder that can be written to, got .*file"):
        decided(folder, cache=tmp_path / "file")


def test_what_was_decided_is_found_where_nothing_can_be_written(folder, monkeypatch):
    decided(folder)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("nothing is to be written"))
    assert decided(folder).n == 5


@pytest.mark.parametrize("name", ["rows", "scores"])
@pytest.mark.parametrize("change", [-1, 1])
def test_files_of_another_length_are_refused(folder, name, change):
    path = decided(folder).folder / name
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0")
    with pytest.raises(ValueError, match=r"expected files of .* bytes, got others; remove it and start again"):
        decided(folder)


# Memory -----------------------------------------------------------------------------------------------------


def test_an_admission_holds_nothing_per_sample(made_set, tmp_path):
    small = decided(made_set, cache=tmp_path / "small")
    many = packed_set(tmp_path / "many", [ranked(f"q{number}", prompt=PROMPT) for number in range(400)])
    large = decided(many, cache=tmp_path / "large")
    assert large.n == 400
    assert large[399].tokens == 15
    assert len(pickle.dumps(large)) <= len(pickle.dumps(small)) + 40
    assert (large.folder / "rows").stat().st_size == 400 * struct.calcsize("<IIQI")


def test_a_copy_in_another_process_reads_by_itself(folder):
    found = decided(folder)
    first = found[0].tokens
    copied = pickle.loads(pickle.dumps(found))
    del found
    assert copied[0].tokens == first
