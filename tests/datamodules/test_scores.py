"""Scores reach the responses that they are about, or nobody."""

import json
import logging
import math

import pytest

from mmrlhf.datamodules.scores import Scores, fingerprints, reference_of, require_made_from
from mmrlhf.fingerprint import Fingerprint, of_text

from .made import ranked, scores_file


def score(name, place, text, **values):
    return {"id": name, "response": place, "digest": of_text(text), **values}


def of(path, query, *needs):
    return Scores([path], needs).of(query)


def test_values_come_in_the_order_of_the_responses_however_the_file_is_sorted(tmp_path):
    rows = [score("q", 1, "no", reward=-1), score("r", 0, "yes", reward=7), score("q", 0, "yes", reward=2.5)]
    found = of(scores_file(tmp_path / "s.jsonl", rows), ranked("q"), "reward")
    assert [item.reward for item in found] == [2.5, -1.0]
    assert all(math.isnan(item.reference_logp) for item in found)


def test_a_reward_row_and_a_reference_row_about_one_response_add_up(tmp_path):
    texts = ("yes", "no")
    rewards = [score("q", place, text, reward=place) for place, text in enumerate(texts)]
    logps = [score("q", place, text, reference_logp=-3.25 - place) for place, text in enumerate(texts)]
    for rows in (rewards + logps, logps + rewards):
        found = of(scores_file(tmp_path / "s.jsonl", rows), ranked("q"), "reward", "reference_logp")
        assert [(item.reward, item.reference_logp) for item in found] == [(0, -3.25), (1, -4.25)]


@pytest.mark.parametrize("digits", [16, 64])
def test_short_and_long_digests_stand_for_the_same_text(tmp_path, digits):
    rows = [score("q", place, text, reward=place) for place, text in enumerate(("yes", "no"))]
    rows += [row | {"digest": row["digest"][:digits]} for row in rows]
    assert [item.reward for item in of(scores_file(tmp_path / "s.jsonl", rows), ranked("q"), "reward")] == [0, 1]


def test_a_shorter_digest_stands_for_nothing(tmp_path):
    rows = [score("q", 0, "yes", reward=1) | {"digest": of_text("yes")[:15]}, score("q", 1, "no", reward=1)]
    with pytest.raises(ValueError, match="response 0 of query 'q' is about another text"):
        of(scores_file(tmp_path / "s.jsonl", rows), ranked("q"))


def test_text_that_differs_in_nothing_that_counts_is_the_same_text(tmp_path):
    rows = [score("q", 0, " yes\r\n", reward=1), score("q", 1, "no", reward=0)]
    assert of(scores_file(tmp_path / "s.jsonl", rows), ranked("q"), "reward") is not None


@pytest.mark.parametrize("texts", [("no", "yes"), ("yes", "nope")])
def test_a_score_of_another_text_is_refused(tmp_path, texts):
    rows = [score("q", place, text, reward=1) for place, text in enumerate(texts)]
    path = scores_file(tmp_path / "s.jsonl", rows)
    with pytest.raises(ValueError, match=r"s.jsonl: the score of response \d of query 'q' is about another text; run"):
        of(path, ranked("q"))


@pytest.mark.parametrize(
    ("needs", "there"),
    [
        (("reward",), True),
        (("reference_logp",), False),
        (("reward", "reference_logp"), False),
        ((), True),
    ],
)
def test_what_is_needed_must_be_there_for_every_response(tmp_path, needs, there):
    rows = [score("q", 0, "yes", reward=1, reference_logp=-1), score("q", 1, "no", reward=0)]
    path = scores_file(tmp_path / "s.jsonl", rows)
    assert (of(path, ranked("q"), *needs) is not None) == there
    assert (of(path, ranked("r"), *needs) is not None) == (needs == ())


def test_what_is_not_needed_may_be_missing_and_is_no_number(tmp_path):
    path = scores_file(tmp_path / "s.jsonl", [score("q", 1, "no", reward=4)])
    first, second = of(path, ranked("q"))
    assert math.isnan(first.reward)
    assert second.reward == 4


@pytest.mark.parametrize("other", [{"reward": 2.0}, {"reward": 1, "digest": of_text("no")}])
def test_two_scores_that_differ_are_refused(tmp_path, other):
    path = scores_file(tmp_path / "s.jsonl", [score("q", 0, "yes", reward=1), score("q", 0, "yes") | other])
    with pytest.raises(ValueError, match="expected one score of response 0 of query 'q', got two that differ"):
        Scores([path], ()).of(ranked("q", ["a", "b"]))


def test_the_same_score_twice_is_one(tmp_path):
    rows = [score("q", place, text, reward=place) for place, text in enumerate(("yes", "no"))]
    assert [item.reward for item in of(scores_file(tmp_path / "s.jsonl", rows * 2), ranked("q"), "reward")] == [0, 1]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", '"1"', "true"])
def test_what_is_no_finite_number_is_refused_with_its_line(tmp_path, value):
    path = tmp_path / "s.jsonl"
    path.write_text(
        json.dumps(score("q", 0, "yes", reward=0))
        + "\n"
        + '{"id": "q", "response": 1, "digest": "x", "reward": '
        + value
        + "}\n"
    )
    with pytest.raises(ValueError, match=r"s\.jsonl:2: "):
        Scores([path], ()).of(ranked("q", ["a", "b"]))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"scores: expected a file, found none at .*none\.jsonl; run `mmrlhf score`"):
        Scores([tmp_path / "none.jsonl"], ())


# Several files, and files of other tools ----------------------------------------------------------------------


def files(tmp_path, *contents):
    return [scores_file(tmp_path / f"{number}.jsonl", rows) for number, rows in enumerate(contents)]


def test_several_files_add_up_in_any_order(tmp_path):
    rewards = [score("q", 0, "yes", reward=1), score("q", 1, "no", reward=-1)]
    logps = [score("q", 1, "no", reference_logp=-5.5), score("q", 0, "yes", reference_logp=-4.5)]
    one, other = files(tmp_path, rewards, logps)
    for paths in ([one, other], [other, one]):
        found = Scores(paths, ("reward", "reference_logp")).of(ranked("q"))
        assert [(item.reward, item.reference_logp) for item in found] == [(1, -4.5), (-1, -5.5)]
    assert Scores([one], ("reference_logp",)).of(ranked("q")) is None
    with pytest.raises(ValueError, match=r"found none at .*2\.jsonl"):
        Scores([one, tmp_path / "2.jsonl"], ())


def test_a_reward_of_another_tool_needs_no_digest_and_may_stand_among_other_columns(tmp_path):
    rows = [
        {"id": "q", "response": place, "reward": 2.5 - place, "judge": "m", "votes": [1, 2], "critique": None}
        for place in (1, 0)
    ]
    found = of(scores_file(tmp_path / "s.jsonl", rows), ranked("q"), "reward")
    assert [item.reward for item in found] == [2.5, 1.5]


@pytest.mark.parametrize("value", [-1.5, None])
def test_a_log_prob_without_a_digest_is_refused_but_not_an_empty_one(tmp_path, value):
    rows = [{"id": "q", "response": place, "reward": 1, "reference_logp": value} for place in (0, 1)]
    path = scores_file(tmp_path / "s.jsonl", rows)
    if value is None:
        assert [item.reward for item in of(path, ranked("q"), "reward")] == [1, 1]
        return
    with pytest.raises(ValueError, match=r"s\.jsonl:1: score 'q': digest: expected a value"):
        of(path, ranked("q"))


@pytest.mark.parametrize("missing", ["id", "response", "reward"])
def test_a_row_without_what_joins_it_is_refused_with_its_line(tmp_path, missing):
    rows = [{"id": "q", "response": 0, "reward": 1}, {"id": "q", "response": 1, "reward": 1}]
    del rows[1][missing]
    with pytest.raises(ValueError, match=rf"s\.jsonl:2: score.*{missing}"):
        of(scores_file(tmp_path / "s.jsonl", rows), ranked("q"))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_digest_in_one_file_speaks_for_the_row_of_another(tmp_path, order):
    rewards = [{"id": "q", "response": place, "reward": 1} for place in (0, 1)]
    logps = [score("q", 0, "yes", reference_logp=-1), score("q", 1, "nope", reference_logp=-1)]
    paths = files(tmp_path, rewards, logps)
    with pytest.raises(ValueError, match="the score of response 1 of query 'q' is about another text"):
        Scores([paths[at] for at in order], ()).of(ranked("q"))


@pytest.mark.parametrize("other", [{"reward": 2}, {"reward": 1, "digest": of_text("no")}])
def test_files_that_differ_are_refused_with_the_name_of_the_second(tmp_path, other):
    row = {"id": "q", "response": 0}
    paths = files(tmp_path, [score("q", 0, "yes", reward=1)], [row | {"reward": 1}], [row | other])
    with pytest.raises(ValueError, match=r"2\.jsonl: expected one score of response 0 of query 'q', got two that diff"):
        Scores(paths, ()).of(ranked("q"))


# What files were made from ------------------------------------------------------------------------------------

READ = {"processor": "p", "template": "chat", "frames": "8"}
PARTS = {"values": "reference_logp", "model": "m", "dtype": "float32", "data.train": "t", "data.val": "v"} | READ


def told(tmp_path, *parts):
    """Files that were made from these parts; None: nobody tells."""
    paths = files(tmp_path, *([score("q", 0, "yes", reward=1)] for _ in parts))
    for path, of_file in zip(paths, parts, strict=True):
        if of_file is not None:
            Fingerprint(of_file).write(path)
    return fingerprints(paths)


def test_a_file_without_a_fingerprint_is_told_of_and_taken(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "mmrlhf"):
        found = told(tmp_path, None, PARTS)
    assert [path.name for path in found] == ["1.jsonl"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "0.jsonl: no fingerprint beside it" in line
    require_made_from({}, READ | {"data.train": "other"})


@pytest.mark.parametrize("part", ["processor", "template", "frames", "data.train"])
@pytest.mark.parametrize("change", [{}, None])
def test_log_probs_that_were_made_otherwise_are_refused_with_the_part_and_the_cure(tmp_path, part, change):
    parts = PARTS | {part: "otherwise"} if change is not None else {k: v for k, v in PARTS.items() if k != part}
    found = told(tmp_path, PARTS, parts)
    asked = READ | {"data.train": "t"}
    if part == "data.train" and change is None:  # of a file that has other splits alone
        require_made_from(found, asked)
        return
    with pytest.raises(ValueError, match=rf"1\.jsonl was made with another {part} \(\S+ instead of \S+\); run `mmrlhf"):
        require_made_from(found, asked)


def test_what_log_probs_do_not_depend_on_may_be_another(tmp_path):
    require_made_from(told(tmp_path, PARTS), READ | {"data.train": "t"})
    require_made_from(told(tmp_path, PARTS | {"data.test": "x", "new": "y"}), READ | {"data.val": "v"})


def test_of_rewards_only_the_data_must_be_the_same(tmp_path):
    parts = PARTS | {"values": "reward", "processor": "q", "frames": "3", "template": "critique"}
    require_made_from(told(tmp_path, parts), READ | {"data.train": "t"})
    with pytest.raises(ValueError, match=r"made with another data\.train"):
        require_made_from(told(tmp_path, parts), READ | {"data.train": "x"})


def test_the_reference_is_the_model_of_the_log_probs_and_only_one(tmp_path):
    rewards = PARTS | {"values": "reward", "model": "judge"}
    assert reference_of({}) is None
    assert reference_of(told(tmp_path, rewards, None)) is None
    assert reference_of(told(tmp_path, rewards, PARTS, PARTS | {"data.val": "w"})) == "m"
    with pytest.raises(ValueError, match="expected log-probs of one reference, got those of 2"):
        reference_of(told(tmp_path, PARTS, PARTS | {"model": "n"}))
