"""Intervals and tests against scipy and against all resamples written out."""

from itertools import product

import numpy as np
import pytest
import scipy.stats

from mmrlhf.evaluation.comparing import contrasts
from mmrlhf.evaluation.face import Grade
from mmrlhf.evaluation.rates import clustered_rate, macro_rate, summary_of
from mmrlhf.stats import mcnemar_power

DRAWING = {"level": 0.9, "resamples": 20_000, "seed": 3}


def grades(values, clusters, categories=None):
    categories = categories or ["mcq"] * len(values)
    rows = zip(values, clusters, categories, strict=True)
    return [
        Grade(f"item {n}", cluster, category, bool(value), "judged")
        for n, (value, cluster, category) in enumerate(rows)
    ]


def assert_are_quantiles(found, every):
    """The ends of a 90 % interval, as nearly as 20,000 draws tell them."""
    for end, share in ((found.low, 0.05), (found.high, 0.95)):
        low, high = np.quantile(every, [share - 0.01, share + 0.01])
        assert low - 1e-9 <= end <= high + 1e-9


def test_the_pooled_interval_is_that_of_all_resamples_of_whole_ids():
    of = {"a": [1, 1, 0], "b": [1], "c": [0, 0], "d": [1, 0]}
    values = [bool(value) for members in of.values() for value in members]
    clusters = [name for name, members in of.items() for _ in members]
    every = [np.mean([value for name in drawn for value in of[name]]) for drawn in product(of, repeat=4)]
    found = clustered_rate(values, clusters, **DRAWING)
    assert found.value == 0.5
    assert_are_quantiles(found, every)


def test_the_interval_of_macro_is_that_of_all_resamples_within_each_category():
    of = {"x": {"a": [1, 1, 0], "b": [0]}, "y": {"c": [1], "d": [0, 0, 1], "e": [1, 0]}}
    rows = [(v, i, c) for c, ids in of.items() for i, members in ids.items() for v in members]
    means = {
        category: [np.mean([v for i in drawn for v in ids[i]]) for drawn in product(ids, repeat=len(ids))]
        for category, ids in of.items()
    }
    every = [(x + y) / 2 for x, y in product(*means.values())]
    found = macro_rate([bool(v) for v, *_ in rows], [i for _, i, _ in rows], [c for *_, c in rows], **DRAWING)
    assert found.value == pytest.approx((0.5 + 0.5) / 2)
    assert_are_quantiles(found, every)


def test_ten_right_ids_of_ten_are_no_proof():
    found = clustered_rate([True] * 30, [f"id {n % 10}" for n in range(30)], **DRAWING)
    expected = scipy.stats.binomtest(10, 10).proportion_ci(0.9, method="wilson")
    assert (found.value, found.low, found.high) == pytest.approx((1, expected.low, expected.high))
    none = clustered_rate([False] * 30, [f"id {n % 10}" for n in range(30)], **DRAWING)
    assert (none.low, none.high) == pytest.approx((1 - expected.high, 1 - expected.low))


def test_one_id_tells_nothing_of_others():
    assert clustered_rate([True, False], ["a", "a"], **DRAWING)[:3] == (0.5, 0, 1)


def test_acc_plus_has_wilsons_interval_over_ids():
    values = [1, 1, 1, 0, 1, 1, 1]
    line = summary_of(grades(values, "aabbcde"), {}, **DRAWING).overall
    expected = scipy.stats.binomtest(4, 5).proportion_ci(0.9, method="wilson")
    assert (line.right_ids, line.ids) == (4, 5)
    assert line.acc_plus[1:3] == pytest.approx((expected.low, expected.high))


def test_the_detectable_gain_is_found_four_times_in_five():
    values, clusters = [n % 3 > 0 for n in range(90)], [f"id {n // 3}" for n in range(90)]
    found = summary_of(grades(values, clusters), {}, **DRAWING).detectable
    assert found["acc_plus"] is not None
    assert mcnemar_power(found["acc_plus"], 0.0, 30) == pytest.approx(0.8, abs=0.01)
    assert mcnemar_power(60 / 90 + found["acc_low"], 60 / 90, 90) == pytest.approx(0.8, abs=0.01)
    assert found["acc_low"] < found["acc_high"]
    assert summary_of(grades([1, 1], "ab"), {}, **DRAWING).detectable["acc_plus"] is None


ONE = [1, 1, 1, 1, 0, 1, 1, 1, 0]
TWO = [0, 1, 0, 1, 1, 0, 0, 1, 0]
IDS = "aabbbccde"


def test_a_comparison_of_pairs_is_that_of_all_flips_of_whole_ids():
    acc, acc_plus = contrasts({"one": grades(ONE, IDS), "two": grades(TWO, IDS)}, resamples=1000)
    sums = {name: sum(a - b for a, b, of in zip(ONE, TWO, IDS, strict=True) if of == name) for name in set(IDS)}
    flips = [sum(s * v for s, v in zip(signs, sums.values(), strict=True)) for signs in product((1, -1), repeat=5)]
    assert acc.p == np.mean([abs(flip) >= abs(sum(sums.values())) for flip in flips])
    assert (acc.only_one, acc.only_two) == (4, 1)
    assert acc.difference.value == pytest.approx(3 / 9)
    # Right ids: a, c, d of the one, d alone of the other.
    assert (acc_plus.only_one, acc_plus.only_two) == (2, 0)
    assert acc_plus.p == pytest.approx(scipy.stats.binomtest(2, 2).pvalue)
    assert acc_plus.difference.value == pytest.approx(3 / 5 - 1 / 5)


def test_holm_covers_every_test_of_the_declared_family():
    systems = {"one": grades(ONE, IDS), "two": grades(TWO, IDS), "three": grades([0] * 9, IDS)}
    every = contrasts(systems, "all", resamples=1000)
    with_first = contrasts(systems, "first", resamples=1000)
    assert [(test.one, test.two) for test in every[::2]] == [("one", "two"), ("one", "three"), ("two", "three")]
    assert [(test.one, test.two) for test in with_first[::2]] == [("one", "two"), ("one", "three")]
    for family in (every, with_first):
        ordered = sorted(family, key=lambda test: test.p)
        by_hand = np.maximum.accumulate([min(1, (len(family) - n) * test.p) for n, test in enumerate(ordered)])
        assert [test.p_holm for test in ordered] == pytest.approx(by_hand.tolist())


def test_swapping_two_systems_changes_signs_and_no_p_value():
    forth = contrasts({"one": grades(ONE, IDS), "two": grades(TWO, IDS)}, resamples=20)
    back = contrasts({"two": grades(TWO, IDS), "one": grades(ONE, IDS)}, resamples=20)
    assert [test.p for test in forth] == [test.p for test in back]
    assert [test.difference.value for test in forth] == [-test.difference.value for test in back]


def test_a_system_is_no_better_than_itself():
    for test in contrasts({"one": grades(ONE, IDS), "again": grades(ONE, IDS)}, resamples=100):
        assert (test.p, test.p_holm, test.difference[:3]) == (1, 1, (0, 0, 0))


def test_grades_of_other_items_are_not_compared():
    with pytest.raises(ValueError, match="one and two: expected grades of the same items"):
        contrasts({"one": grades(ONE, IDS), "two": grades(TWO[:-1], IDS[:-1])})
