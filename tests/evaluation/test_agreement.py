"""What rewards have in common with people's rankings, against tables made by hand and other implementations."""

import math

import numpy as np
import pytest
from scipy.stats import kendalltau

from mmrlhf.evaluation.agreement import (
    agreement,
    calibration_error,
    folds_of,
    grades_of,
    lengths_of,
    pairs_of,
    prefers_longer,
    tau_of,
    taus_of,
)
from mmrlhf.evaluation.joining import Judged
from mmrlhf.evaluation.making import rows_of
from mmrlhf.evaluation.reporting import gaps_grid, measures_grid
from mmrlhf.evaluation.rewardbench import Comparison, RewardBench, Rewards
from mmrlhf.records import RankedQuery, Response

from .made import ranked_query

DRAWING = {"level": 0.95, "resamples": 300, "seed": 0}


def judged(name, ranks, rewards, seen=(), **more):
    return Judged(ranked_query(name, ranks, **more), tuple(rewards), tuple(seen))


SET = [
    judged("a", [1, 2, 3], [3.0, 1.0, 2.0], [4.0, 3.0, 2.0], category="mcq"),
    judged("b", [2, 1], [0.5, -0.5], [0.0, 0.0], category="long"),
    judged("c", [1, 1, 2], [1.0, 0.0, 0.0], category="long"),
]


def test_pairs_have_the_margins_gaps_and_lengths_of_their_responses():
    pairs = pairs_of(SET)
    assert pairs.names == ("a:0>1", "a:0>2", "a:1>2", "b:1>0", "c:0>2", "c:1>2")
    assert pairs.deltas.tolist() == [2.0, 1.0, -1.0, -1.0, 1.0, 0.0]
    assert pairs.seen[:4].tolist() == [1.0, 2.0, 1.0, 0.0]
    assert np.isnan(pairs.seen[4:]).all()
    assert pairs.gaps.tolist() == [1, 2, 1, 1, 1, 1]
    assert pairs.longer.tolist() == [-1, -2, -1, 1, -2, -1]


def test_equal_rewards_are_a_tie_and_wrong():
    grades = {grade.item: grade for grade in grades_of(pairs_of(SET))}
    assert [item for item, grade in grades.items() if grade.correct] == ["a:0>1", "a:0>2", "c:0>2"]
    assert [item for item, grade in grades.items() if grade.status == "tied"] == ["c:1>2"]
    assert grades["a:0>2"].detail == {"delta": 1.0, "rank_gap": 2, "longer": -2}


def test_a_ranking_without_any_pair_is_refused():
    with pytest.raises(ValueError, match="two responses of different rank in some query, got none"):
        pairs_of([judged("t", [1, 1], [1.0, 2.0])])


def random_set(queries, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for number in range(queries):
        size = int(rng.integers(2, 5))
        ranks, category = rng.integers(1, 4, size).tolist(), ["mcq", "long", "video", None][number % 4]
        # Rounded, so that some are equal.
        rewards = np.round(rng.normal(size=size) - 0.5 * np.array(ranks), 1).tolist()
        found.append(judged(f"q{number:03}", ranks, rewards, category=category))
    return found


def test_accuracies_are_those_of_the_benchmark_on_the_same_pairs():
    every = [one for one in random_set(80) if one.ranked.query.category]
    bench = RewardBench(resamples=300)
    grades = []
    for one in every:
        reward = {response.text: value for response, value in zip(one.ranked.responses, one.rewards, strict=True)}
        items = [Comparison.from_json(row) for row in rows_of(one.ranked, one.ranked.query.category)]
        grades += [bench.grade(item, Rewards(reward[item.chosen], reward[item.rejected])) for item in items]
    assert agreement(every, **DRAWING).accuracy == bench.summarize(grades)


def test_the_mean_margin_and_accuracy_of_each_rank_gap_are_those_of_its_pairs():
    found = agreement(SET, **DRAWING)
    assert list(found.gaps) == [1, 2]
    assert (found.gaps[1].delta.value, found.gaps[1].line.pairs, found.gaps[1].line.right) == (0.2, 5, 2)
    assert (found.gaps[2].delta.value, found.gaps[2].line.ids) == (1.0, 1)
    assert found.delta.value == pytest.approx(2 / 6)


def test_a_rank_gap_of_one_query_has_no_bounds():
    told = agreement(SET, **DRAWING).to_json()["rank_gaps"]["2"]
    assert told["delta"] == {"value": 1.0, "low": None, "high": None, "level": 0.95}
    assert (told["acc"]["low"], told["acc"]["high"]) == pytest.approx((1 / (1 + 1.959964**2), 1))


def test_tables_say_where_nothing_tells_the_bounds():
    assert gaps_grid(agreement(SET, **DRAWING)).rows[1] == ("2", "1", "1", "+1.000", "unknown", "1.000", "0.21-1.00")
    rows = measures_grid(agreement(SET[1:2], **DRAWING)).rows
    assert ("log loss (a coin has 0.693)", "1.313", "unknown", "1 pairs") in rows
    assert ("Kendall's tau-b, all", "-1.000", "unknown", "1 queries") in rows


def test_pairs_of_one_query_are_one_draw_of_the_bootstrap():
    """Queries with three pairs of one margin tell no more than the same queries with one."""
    rng = np.random.default_rng(1)
    margins = rng.normal(size=40)
    single = [judged(f"q{n:02}", [1, 2], [m, 0.0]) for n, m in enumerate(margins)]
    triple = [judged(f"q{n:02}", [1, 2, 2, 2], [m, 0.0, 0.0, 0.0]) for n, m in enumerate(margins)]
    one, three = (agreement(queries, **DRAWING) for queries in (single, triple))
    for few, many in ((one.delta, three.delta), (one.log_loss, three.log_loss)):
        assert many == pytest.approx(few)
    assert three.accuracy.overall.acc == one.accuracy.overall.acc


def test_the_log_loss_is_that_of_the_logistic_model():
    found = agreement(SET, **DRAWING).log_loss.value
    assert found == pytest.approx(np.mean([math.log(1 + math.exp(-d)) for d in (2, 1, -1, -1, 1, 0)]))


def test_rewards_that_are_drawn_as_they_claim_have_hardly_any_calibration_error():
    rng = np.random.default_rng(0)
    claimed = rng.normal(scale=2, size=20_000)
    deltas = np.abs(claimed) * np.where(rng.random(20_000) < 1 / (1 + np.exp(-np.abs(claimed))), 1, -1)
    assert calibration_error(deltas) < 0.01
    assert calibration_error(5 * deltas) > 0.1


def test_the_calibration_error_weighs_bins_by_their_pairs():
    low, high = math.log(0.6 / 0.4), math.log(0.9 / 0.1)
    deltas = np.array([low] * 6 + [-low] * 4 + [high] * 10)
    assert calibration_error(deltas, 2) == pytest.approx(0.5 * 0 + 0.5 * 0.1)


@pytest.mark.parametrize("seed", range(5))
def test_tau_of_a_query_is_kendalls(seed):
    rng = np.random.default_rng(seed)
    rewards, ranks = rng.normal(size=6).round(0).tolist(), rng.integers(1, 4, 6).tolist()
    assert tau_of(rewards, ranks) == pytest.approx(kendalltau(rewards, -np.array(ranks)).statistic)


def test_tau_is_the_mean_over_queries_that_people_rank_at_all():
    some = [*SET, judged("t", [1, 1], [1.0, 2.0]), judged("e", [1, 2], [1.0, 1.0], category="mcq")]
    found = taus_of(some, {"mcq": 0, "long": 1}, **DRAWING)
    expected = {"a": 1 / 3, "b": -1.0, "c": kendalltau([1, 0, 0], [2, 2, 1]).statistic, "e": 0.0}
    assert list(found) == ["mcq", "long", "all"]
    assert found["all"].queries == 4
    assert found["all"].value.value == pytest.approx(np.mean(list(expected.values())))
    assert found["mcq"].value.value == pytest.approx((expected["a"] + expected["e"]) / 2)


def with_lengths(name, lengths, rewards, ranks):
    answers = (Response(letter * n, rank=r) for letter, n, r in zip("abc", lengths, ranks, strict=False))
    return Judged(RankedQuery(ranked_query(name, [1, 2]).query, tuple(answers)), tuple(rewards))


def test_a_liking_for_length_is_told_beside_that_of_people():
    some = [
        with_lengths("a", [9, 1], [2.0, 1.0], [1, 2]),  # people and rewards prefer the longer one
        with_lengths("b", [1, 9], [1.0, 2.0], [1, 2]),  # only rewards do
        with_lengths("c", [5, 2], [1.0, 1.0], [2, 1]),  # only rewards might
        with_lengths("d", [5, 5], [1.0, 2.0], [1, 2]),  # says nothing of lengths
    ]
    found = lengths_of(pairs_of(some), **DRAWING)
    assert (found.pairs, found.people.value, found.rewards.value) == (3, pytest.approx(1 / 3), pytest.approx(5 / 6))
    assert found.difference.value == pytest.approx(0.5)
    assert lengths_of(pairs_of(some[3:]), **DRAWING) is None


def test_the_longer_one_is_preferred_on_either_side_of_the_pair():
    margins, longer = np.array([1.0, -1.0, 1.0, -1.0, 0.0]), np.array([3.0, -3.0, -3.0, 3.0, 3.0])
    assert prefers_longer(margins, longer).tolist() == [1, 1, 0, 0, 0.5]


def test_a_planted_inflation_of_seen_margins_is_found_exactly():
    some = [
        judged(f"q{n}", [1, 2], [value, 0.0], [value + 0.25, 0.0]) for n, value in enumerate((-0.5, -0.1, 0.0, 2.0))
    ]
    found = folds_of(pairs_of(some), **DRAWING)
    assert (found.pairs, found.queries) == (4, 4)
    assert found.delta_gap[:3] == pytest.approx((0.25, 0.25, 0.25))
    assert (found.delta_seen.value, found.delta_unseen.value) == pytest.approx((0.6, 0.35))
    assert (found.accuracy_seen.value, found.accuracy_unseen.value, found.accuracy_gap.value) == (0.75, 0.25, 0.5)


def test_folds_are_compared_over_the_pairs_that_both_judged():
    found = folds_of(pairs_of(SET), **DRAWING)
    assert (found.pairs, found.queries) == (4, 2)
    assert found.delta_unseen.value == pytest.approx((2 + 1 - 1 - 1) / 4)
    assert found.delta_seen.value == pytest.approx((1 + 2 + 1 + 0) / 4)
    assert folds_of(pairs_of(SET[2:]), **DRAWING) is None
    assert agreement(SET[2:], **DRAWING).to_json()["folds"] is None


def test_some_of_the_pairs_keep_all_their_columns():
    pairs = pairs_of(SET)
    some = pairs.where(pairs.deltas < 0)
    assert (some.names, some.queries, some.categories) == (["a:1>2", "b:1>0"], ["a", "b"], ["mcq", "long"])
    assert (some.gaps.tolist(), some.longer.tolist(), some.seen.tolist()) == ([1, 1], [-1, 1], [1.0, 0.0])
