"""Rewards join a ranked query by id, place and text; what does not is counted, and too much of it is refused."""

import pytest

from mmrlhf.evaluation.joining import judged_queries, read_opinions
from mmrlhf.fingerprint import of_text
from mmrlhf.ledger import Ledger

from .made import ranked_query, scores_of, written

QUERIES = [ranked_query("a", [1, 2, 3]), ranked_query("b", [2, 1])]
REWARDS = [[3.0, 2.0, 1.0], [0.5, -0.5]]


@pytest.fixture
def joined(tmp_path):
    def run(rows, records=QUERIES, split=None, max_skipped=1.0):
        ranked, scores = written(tmp_path / "ranked.jsonl", records), written(tmp_path / "scores.jsonl", rows)
        found, accounts = judged_queries(ranked, scores, split, max_skipped)
        assert all(one.taken == one.given + sum(one.skipped.values()) for one in accounts)
        return {one.ranked.query.id: one for one in found}, {one.stage: one.skipped for one in accounts}

    return run


def test_rewards_join_their_responses_whatever_the_order_of_the_rows(joined):
    rows = scores_of(QUERIES, REWARDS, critique=[["x", "y", "z"], ["v", "w"]])
    found, skipped = joined(rows[::-1])
    assert {name: list(one.rewards) for name, one in found.items()} == {"a": REWARDS[0], "b": REWARDS[1]}
    assert found["a"].critiques == ("x", "y", "z")
    assert skipped == {"ranked": {}, "scores": {}, "queries": {}}


@pytest.mark.parametrize(
    ("change", "rows", "queries"),
    [
        ({"digest": of_text("something else")}, "other_text", "score_missing"),
        ({"response": 1}, "other_text", "score_missing"),
        ({"response": 9}, "other_text", "score_missing"),
        ({"response": -1, "digest": of_text("a xx")}, "other_text", "score_missing"),
        ({"id": "c"}, "foreign_id", "score_missing"),
        ({"digest": "ab"}, "short_digest", "score_missing"),
        ({"reward": None}, None, "unreadable_reward"),
        ({"reward": "high"}, None, "unreadable_reward"),
        ({"reward_seen": "high"}, "unreadable_reward", "score_missing"),
    ],
)
def test_a_score_of_something_else_joins_nothing_and_leaves_its_query_out(joined, change, rows, queries):
    good = scores_of(QUERIES, REWARDS)
    found, skipped = joined([good[0] | change, *good[1:]])
    assert list(found) == ["b"]
    assert skipped["scores"] == ({rows: 1} if rows else {})
    assert skipped["queries"] == {queries: 1}


def test_a_query_without_any_score_is_counted_and_too_many_are_refused(joined):
    rows = scores_of(QUERIES[:1], REWARDS)
    found, skipped = joined(rows, max_skipped=0.5)
    assert (list(found), skipped["queries"]) == (["a"], {"no_scores": 1})
    with pytest.raises(ValueError, match=r"queries: expected at most 40\.00% skipped, got 50\.00%.*no_scores 1"):
        joined(rows, max_skipped=0.4)


def test_a_row_without_a_reward_is_no_opinion(joined):
    rows = scores_of(QUERIES, REWARDS)
    del rows[0]["reward"]
    assert joined(rows)[1] == {"ranked": {}, "scores": {"no_reward": 1}, "queries": {"score_missing": 1}}


def test_queries_of_other_splits_are_not_asked_for_and_do_not_count_as_missing(joined):
    records = [ranked_query("a", [1, 2], split="test"), ranked_query("b", [1, 2], split="train")]
    rows = scores_of(records, [[1.0, 0.0]] * 2)
    for given in (rows, rows[:2]):
        found, skipped = joined(given, records, split="test", max_skipped=0.0)
        assert (list(found), skipped["ranked"]) == (["a"], {"other_split": 1})
    assert joined(rows, records, split="test")[1]["scores"] == {"other_split": 2}
    with pytest.raises(ValueError, match="ranked queries of the split val, got none"):
        joined(rows, records, split="val")


def test_two_rewards_of_one_response_are_an_error_unless_they_are_one_but_for_rounding(joined):
    rows = scores_of(QUERIES, REWARDS, reward_seen=[[1.0, 1.0, 1.0], [1.0, 1.0]])
    assert joined([*rows, rows[0] | {"reward": 3.00001}])[0] == joined(rows)[0]
    for change in ({"reward": 3.1}, {"reward_seen": 1.1}, {"reward_seen": None}):
        with pytest.raises(ValueError, match=r"scores\.jsonl:6: id 'a': expected one reward of response 0"):
            joined([*rows, rows[0] | change])


def test_rewards_by_models_that_saw_the_query_count_where_every_response_has_one(joined):
    found, _ = joined(scores_of(QUERIES, REWARDS, reward_seen=[[4.0, 3.0, 1.0], [None, 0.0]]))
    assert (found["a"].seen, found["b"].seen) == ((4.0, 3.0, 1.0), ())


def test_a_file_that_joins_nothing_or_is_not_there_is_refused(joined, tmp_path):
    with pytest.raises(ValueError, match=r"got none that joins \(scores: 2 in = 0 out \+ 2 skipped \(foreign_id 2\)"):
        joined(scores_of([ranked_query("z", [1, 2])], REWARDS))
    with pytest.raises(ValueError, match=r"found none at .*gone\.jsonl"):
        read_opinions(tmp_path / "gone.jsonl", QUERIES, Ledger("scores"))


def test_a_query_that_stands_twice_is_an_error(joined):
    with pytest.raises(ValueError, match="expected each key once"):
        joined(scores_of(QUERIES, REWARDS), [*QUERIES, QUERIES[0]])
