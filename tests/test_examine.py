"""A policy's answers to the world's questions are judged as the world's own files say they are."""

import json
import os

import pytest
import torch

from mmrlhf import cli, examine, jsonl
from mmrlhf.encoding import messages_of
from mmrlhf.media import load
from mmrlhf.modules.answering import Answer
from mmrlhf.queries import Query
from mmrlhf.records import RankedQuery
from mmrlhf.stats import bootstrap_mean
from mmrlhf.world.policy import build_model, build_processor, frames_of, load_policy, respond


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "w"
    assert cli.main(["world", "--out", str(out), "--queries", "160", "--no-policy", "--processes", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def policy(world, tmp_path_factory):
    """A policy that has learned nothing, and so says anything."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("policy")
    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer", local_files_only=True)
    build_model(tokenizer).save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


class Parrot:
    """Says what a model of the world once said to the same question."""

    def __init__(self, world, place):
        said = jsonl.read(world / "ranked.jsonl", RankedQuery.from_json)
        self.known = {ranked.query.id: ranked.responses[place].text for ranked in said}
        self.asked = []

    def answers(self, conversations, most):
        """The same to the same question."""
        assert most == 96
        self.asked += [len(conversations)]
        return [Answer(self.known[identity], 3, False, 9) for identity in conversations]


@pytest.fixture
def parrot(world, monkeypatch):
    speaking = Parrot(world, 1)
    monkeypatch.setattr(examine, "Answerer", lambda *_: speaking)
    monkeypatch.setattr(examine, "messages_of", lambda query, _: query.id)
    return speaking


@pytest.mark.parametrize("split", ["val", "test", "train"])
def test_answers_of_the_worlds_own_models_are_as_true_as_its_truth_says(parrot, world, policy, tmp_path, split):
    examine.evaluate_world(str(policy), world, tmp_path / "e", split, resamples=50)
    known = [row for row in rows(world / "truth.jsonl") if row["split"] == split]
    right = [row["responses"][1]["right"] for row in known]
    told = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert told["world"]["true"] == pytest.approx(sum(right) / len(right))
    hallucinated = [row["responses"][1]["hallucinated"] for row in known]
    assert told["world"]["hallucinated"] == pytest.approx(sum(hallucinated) / len(known))
    outcomes = {row["item"]: row for row in rows(tmp_path / "e" / "outcomes" / "world.jsonl")}
    assert {row["id"]: row["responses"][1]["right"] for row in known} == {
        name: row["correct"] for name, row in outcomes.items()
    }
    assert 0 < sum(right) < len(right), "answers that are all alike test little"


def test_refusals_are_told_apart_by_whether_one_was_due(parrot, world, policy, tmp_path):
    parrot.known = dict.fromkeys(parrot.known, "I'm sorry, but I can't help with that.")
    examine.evaluate_world(str(policy), world, tmp_path / "e", "train", resamples=50)
    told = json.loads((tmp_path / "e" / "metrics.json").read_text())["world"]
    assert (told["refused_harmless"], told["refused_forbidden"]) == (1.0, 1.0)
    facts = [row["fact"] for row in rows(world / "truth.jsonl") if row["split"] == "train"]
    assert told["true"] == pytest.approx(sum(fact.get("refuse", False) for fact in facts) / len(facts))


def test_questions_about_one_scene_are_one_cluster(parrot, world, policy, tmp_path):
    examine.evaluate_world(str(policy), world, tmp_path / "e", "train", resamples=50)
    queries = [one.query for one in jsonl.read(world / "ranked.jsonl", RankedQuery.from_json)]
    groups = {query.id: query.group for query in queries}
    outcomes = rows(tmp_path / "e" / "outcomes" / "world.jsonl")
    assert {row["cluster"] for row in outcomes} == {groups[row["item"]] for row in outcomes}
    assert len({row["cluster"] for row in outcomes}) < len(outcomes)


def test_intervals_are_over_scenes_and_never_without_width(parrot, world, policy, tmp_path):
    examine.evaluate_world(str(policy), world, tmp_path / "e", "train", resamples=500)
    told = json.loads((tmp_path / "e" / "intervals.json").read_text())["true"]
    queries = [one.query for one in jsonl.read(world / "ranked.jsonl", RankedQuery.from_json)]
    groups = {query.id: query.group for query in queries}
    right = {row["id"]: row["responses"][1]["right"] for row in rows(world / "truth.jsonl") if row["split"] == "train"}
    order = [query.id for query in queries if query.id in right]
    drawn = {"level": 0.95, "resamples": 500, "seed": 0}
    expected = bootstrap_mean([float(right[name]) for name in order], [groups[name] for name in order], **drawn)
    alone = bootstrap_mean([float(right[name]) for name in order], order, **drawn)
    assert (told["low"], told["high"]) == pytest.approx((expected.low, expected.high))
    assert (alone.low, alone.high) != pytest.approx((expected.low, expected.high))
    parrot.known = dict.fromkeys(parrot.known, "I'm sorry, but I can't help with that.")
    examine.evaluate_world(str(policy), world, tmp_path / "none", "test", resamples=50)
    wrong = json.loads((tmp_path / "none" / "intervals.json").read_text())["true/short"]
    assert wrong["value"] == wrong["low"] == 0 < wrong["high"]


def test_a_killed_evaluation_goes_on_and_a_finished_one_asks_nobody(parrot, world, policy, tmp_path):
    answers, calls = parrot.answers, []

    def dies(conversations, most):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answers(conversations, most)

    parrot.answers = dies
    with pytest.raises(KeyboardInterrupt):
        examine.evaluate_world(str(policy), world, tmp_path / "e", "train", batch=5, resamples=50)
    parrot.answers = answers
    before = sum(parrot.asked)
    assert before == 10
    examine.evaluate_world(str(policy), world, tmp_path / "e", "train", batch=5, resamples=50)
    total = len(rows(tmp_path / "e" / "outcomes" / "world.jsonl"))
    assert sum(parrot.asked) == total
    written = (tmp_path / "e" / "metrics.json").stat().st_mtime_ns
    examine.evaluate_world(str(policy), world, tmp_path / "e", "train", batch=7, resamples=50)
    assert sum(parrot.asked) == total
    assert (tmp_path / "e" / "metrics.json").stat().st_mtime_ns == written


def test_another_policy_or_split_does_not_go_on_in_the_same_folder(parrot, world, policy, tmp_path):
    examine.evaluate_world(str(policy), world, tmp_path / "e", "test", resamples=50)
    with pytest.raises(ValueError, match="holds an evaluation with split 'test' instead of 'val'"):
        examine.evaluate_world(str(policy), world, tmp_path / "e", "val", resamples=50)


def test_a_folder_that_is_no_world_is_refused_before_a_model_is_loaded(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(examine, "Answerer", None)
    (tmp_path / "ranked.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected val questions in its ranked\.jsonl, got none"):
        examine.evaluate_world(str(policy), tmp_path, tmp_path / "e")


def test_a_real_policy_says_the_same_as_when_it_is_asked_alone(world, policy, tmp_path):
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    examine.evaluate_world(str(policy), world, tmp_path / "e", "test", max_new_tokens=6, batch=7, resamples=50)
    model, processor = load_policy(policy)
    said = {row["id"]: row["answer"] for row in rows(tmp_path / "e" / "answers.jsonl")}
    queries: list[Query] = [one.query for one in jsonl.read(world / "ranked.jsonl", RankedQuery.from_json)]
    asked = [query for query in queries if query.split == "test"][:8]
    for query in asked:
        talk = messages_of(query, lambda medium: load(world / "media", medium, frames_of(processor)))
        assert said[query.id] == respond(model, processor, talk, 6)
