"""Rewards are joined by the texts that they are about, or not at all."""

import pytest

from mmrlhf.evaluation.rewardbench import RewardBench, Rewards
from mmrlhf.evaluation.rewards import read_rewards, same_reward
from mmrlhf.fingerprint import of_text
from mmrlhf.ledger import Ledger

from .made import bench_row, rewarded, scored, written

ROWS = [bench_row("a", "mcq/a.png"), bench_row("b", "mcq/b.png")]


@pytest.fixture
def join(tmp_path):
    items = RewardBench().items(written(tmp_path / "items.jsonl", ROWS))

    def read(rows):
        ledger = Ledger("rewards")
        found = read_rewards(written(tmp_path / "rewards.jsonl", rows), items, ledger)
        ledger.check()
        return {item.id: found[item.key] for item in items if item.key in found}, ledger.skipped

    return read


def test_a_reward_of_another_text_joins_nothing(join):
    rows = scored(rewarded(ROWS, [True, True]))
    rows[0]["digest"] = of_text("something else")
    found, skipped = join(rows)
    assert (list(found), skipped) == (["b"], {"other_text": 1})


def test_the_same_text_under_another_question_joins_nothing(join):
    rows = scored(rewarded(ROWS, [True, True]))
    found, skipped = join([*rows[2:], *(row | {"id": "c"} for row in rows[:2])])
    assert (list(found), skipped) == (["b"], {"foreign_id": 2})


def test_a_row_with_the_two_answers_swapped_joins_nothing(join):
    one, two = rewarded(ROWS, [True, True])
    found, skipped = join([one, two | {"chosen": two["rejected"], "rejected": two["chosen"]}])
    assert (list(found), skipped) == (["a"], {"other_text": 1})


def test_places_in_the_query_and_the_order_of_rows_do_not_matter(join):
    rows = scored(rewarded(ROWS, [True, False]))
    expected, _ = join(rows)
    turned, _ = join([row | {"response": 1 - row["response"]} for row in reversed(rows)])
    assert turned == expected


def test_short_digests_and_rows_of_no_layout_are_counted(join):
    rows = scored(rewarded(ROWS, [True, True]))
    odd = [rows[0] | {"digest": "ab"}, {"id": "a", "reward": 1.0}, {"id": "a", "digest": of_text("x")}, {"id": None}]
    found, skipped = join([*rows, *odd])
    assert sorted(found) == ["a", "b"]
    assert skipped == {"short_digest": 1, "unknown_layout": 1, "no_reward": 1, "no_id": 1}


@pytest.mark.parametrize("odd", [None, "0.3", True, [1], 10**400])
def test_a_reward_that_is_no_number_could_not_be_read(join, odd):
    one, two = rewarded(ROWS, [True, True])
    found, _ = join([one | {"rewards": [odd, 0.5]}, two])
    assert found["a"] == Rewards(None, 0.5)
    found, _ = join([row | ({"reward": odd} if number == 0 else {}) for number, row in enumerate(scored([one, two]))])
    assert found["a"].chosen is None


@pytest.mark.parametrize("odd", [None, [0.5], [0.5, 0.6, 0.7], "high"])
def test_rewards_that_are_not_two_could_not_be_read(join, odd):
    one, two = rewarded(ROWS, [True, True])
    found, _ = join([one | {"rewards": odd}, two])
    assert found["a"] == Rewards(None, None)


def test_one_response_without_a_score_leaves_its_pair_missing(join):
    found, _ = join(scored(rewarded(ROWS, [True, True]))[1:])
    assert list(found) == ["b"]


def test_scores_of_a_question_that_an_importer_split_join_by_its_bare_id(join):
    rows = scored(rewarded(ROWS, [True, False]))
    found, _ = join([row | {"id": f"{row['id']}~1"} for row in rows])
    assert found == join(rows)[0]


def test_rewards_that_contradict_each_other_are_an_error_in_any_layout(join):
    pairs = rewarded(ROWS, [True, True])
    single = scored(pairs)
    with pytest.raises(ValueError, match=r"rewards\.jsonl:5: id 'a': expected one reward for one text"):
        join([*single, single[0] | {"reward": 7.0}])
    with pytest.raises(ValueError, match="expected as many rewards for a pair as it has rows"):
        join([*pairs, pairs[0] | {"rewards": [7.0, 1.0]}])
    split = [row | {"id": "a~1"} for row in single[:2]] + [row | {"id": "a~2"} for row in single[:2]]
    split[3]["reward"] = 9.0
    with pytest.raises(ValueError, match="rankings of this question to agree"):
        join(split)


def test_equal_rows_of_a_run_that_was_resumed_are_one(join):
    pairs = rewarded(ROWS, [True, False])
    assert join(pairs * 2)[0] == join(pairs)[0]
    assert join(scored(pairs) * 2)[0] == join(pairs)[0]


def test_a_file_that_joins_nothing_or_mixes_layouts_is_refused(join):
    pairs = rewarded(ROWS, [True, True])
    with pytest.raises(ValueError, match=r"got none that joins \(rewards: 1 in = 0 out \+ 1 skipped"):
        join([pairs[0] | {"id": "z"}])
    with pytest.raises(ValueError, match="rows of one layout"):
        join([pairs[0], *scored(pairs)[2:]])


def test_texts_are_compared_as_importers_mend_them(join):
    one, two = rewarded(ROWS, [True, True])
    found, _ = join([one | {"chosen": f"\ufeff{one['chosen']}\r\n"}, two])
    assert sorted(found) == ["a", "b"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(0.25, 0.25 + 1e-6, True), (800.0, 800.01, True), (0.25, 0.26, False), (None, None, True), (None, 0.0, False)],
)
def test_rounding_between_equal_texts_is_no_contradiction(one, other, same):
    assert same_reward(one, other) == same_reward(other, one) == same
