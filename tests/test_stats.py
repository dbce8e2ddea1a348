"""The statistics agree with scipy, with tables worked by hand, with enumeration and with simulation."""

import doctest
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from mmrlhf import stats

NAN = float("nan")
# The example of Krippendorff's "Computing Krippendorff's Alpha-Reliability": 4 observers, 12 units.
TEXTBOOK = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)
numbers = st.integers(-1000, 1000).map(lambda tenths: tenths / 10)
rates = st.floats(0, 1)


def items(least=2, most=30):
    """Draw items: a value for `a`, a value for `b` and the number of the cluster."""
    return st.lists(st.tuples(numbers, numbers, st.integers(0, 5)), min_size=least, max_size=most)


def queries_and_pairs(rng, effect_of_query=0.3):
    """Draw 170 pairs on 50 queries; the effect of the query is this share of the variance."""
    queries = np.append(np.arange(50), rng.integers(50, size=120))
    shared, own = rng.normal(size=50)[queries], rng.normal(size=170)
    return queries, np.sqrt(effect_of_query) * shared + np.sqrt(1 - effect_of_query) * own


def outcomes(only_a, only_b, both=3, neither=2):
    """Return paired booleans with these counts."""
    cells = [(True, False)] * only_a + [(False, True)] * only_b + [(True, True)] * both
    return np.array(cells + [(False, False)] * neither).T


def test_examples_in_the_documentation_hold():
    result = doctest.testmod(stats)
    assert result.attempted > 0
    assert result.failed == 0


# --- bootstrap ---


def test_bootstrap_of_single_items_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(1).exponential(size=60)
    ours = stats.bootstrap_mean(values, level=0.9)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean(), rel=1e-12)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert ours.level == 0.9


def test_bootstrap_of_clusters_is_scipys_bootstrap_of_their_sums_and_sizes():
    queries, values = queries_and_pairs(np.random.default_rng(3))
    values[queries < 10] += 2
    queries[queries < 10] //= 5  # large clusters far from the others: a mean of means would be another number
    queries = np.unique(queries, return_inverse=True)[1]
    sums = np.array([values[queries == query].sum() for query in range(42)])
    sizes = np.array([(queries == query).sum() for query in range(42)])
    theirs = scipy_stats.bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    ours = stats.bootstrap_mean(values, queries)
    assert ours.value == pytest.approx(values.mean(), rel=1e-12)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_nominal_95_percent_holds_for_clusters_and_fails_for_items_taken_as_independent():
    repetitions, clustered, independent = 1500, 0, 0
    for seed in range(repetitions):
        queries, values = queries_and_pairs(np.random.default_rng(seed))
        known = stats.bootstrap_mean(values, queries, resamples=600, seed=seed)
        ignored = stats.bootstrap_mean(values, resamples=600, seed=seed)
        clustered += known.low <= 0 <= known.high
        independent += ignored.low <= 0 <= ignored.high
    assert 0.92 <= clustered / repetitions <= 0.97
    assert independent / repetitions < 0.91


def test_bootstrap_difference_resamples_the_same_clusters_for_both():
    rng = np.random.default_rng(5)
    queries, hardness = queries_and_pairs(rng)
    a, b = hardness + 0.3 + 0.1 * rng.normal(size=170), hardness + 0.1 * rng.normal(size=170)
    difference = stats.bootstrap_difference(a, b, queries, level=0.8)
    assert difference.value == pytest.approx(a.mean() - b.mean(), rel=1e-9)
    assert difference == stats.bootstrap_mean(a - b, queries, level=0.8)
    alone = stats.bootstrap_mean(a, queries, level=0.8)
    assert difference.high - difference.low < (alone.high - alone.low) / 3


@given(items(), st.randoms())
@settings(deadline=None)
def test_order_of_items_and_names_of_clusters_change_nothing(rows, random):
    rows = [(a, b, cluster) for a, b, cluster in [*rows, (1.0, 2.0, 6), (2.0, 4.0, 7)]]
    shuffled = random.sample(rows, len(rows))
    names = random.sample("abcdefgh", 8)
    a, b, clusters = zip(*rows, strict=True)
    a_too, b_too, clusters_too = zip(*shuffled, strict=True)
    renamed = [names[cluster] for cluster in clusters_too]
    one = stats.bootstrap_mean(a, clusters, resamples=20)
    assert one == stats.bootstrap_mean(a_too, renamed, resamples=20)
    one = stats.bootstrap_difference(a, b, clusters, resamples=20)
    assert one == stats.bootstrap_difference(a_too, b_too, renamed, resamples=20)
    assert stats.bootstrap_mean(a, resamples=20) == stats.bootstrap_mean(a_too, resamples=20)
    for draws in (20, 10_000):
        p = stats.paired_permutation(a, b, clusters, resamples=draws)
        assert p == stats.paired_permutation(a_too, b_too, renamed, resamples=draws)


@given(items(), st.floats(0.1, 10), st.floats(-10, 10))
@settings(deadline=None)
def test_bootstrap_follows_a_change_of_unit(rows, scale, shift):
    values, _, clusters = zip(*[*rows, (1.0, 0.0, 6), (2.0, 0.0, 7)], strict=True)
    before = stats.bootstrap_mean(values, clusters, resamples=20)
    after = stats.bootstrap_mean(scale * np.array(values) + shift, clusters, resamples=20)
    expected = scale * np.array(before[:3]) + shift
    assert after[:3] == pytest.approx(expected, abs=1e-9)


def test_seed_decides_the_draws():
    values = np.random.default_rng(6).normal(size=30)
    assert stats.bootstrap_mean(values, resamples=50) == stats.bootstrap_mean(values, resamples=50, seed=0)
    assert stats.bootstrap_mean(values, resamples=50) != stats.bootstrap_mean(values, resamples=50, seed=1)
    p_values = {stats.paired_permutation(values, -values - 0.5, resamples=99, seed=seed) for seed in range(9)}
    assert len(p_values) > 1


def test_a_hundred_thousand_clusters_fit_in_memory():
    values = np.random.default_rng(7).normal(size=100_000)
    names = [f"query {number}" for number in range(100_000)]
    tracemalloc.start()
    try:
        stats.bootstrap_mean(values, names, resamples=200)
        stats.paired_permutation(values, values[::-1], names, resamples=200)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6


def test_draws_made_in_pieces_are_the_draws_made_at_once(monkeypatch):
    values, other = np.random.default_rng(8).normal(size=(2, 40))
    at_once = (
        stats.bootstrap_mean(values, resamples=101),
        stats.paired_permutation(values, other, resamples=101),
    )
    monkeypatch.setattr(stats, "_CELLS", 90)
    in_pieces = (
        stats.bootstrap_mean(values, resamples=101),
        stats.paired_permutation(values, other, resamples=101),
    )
    assert in_pieces == at_once


# --- Wilson ---


@given(st.integers(1, 500), st.data(), st.floats(0.5, 0.999))
@settings(deadline=None)
def test_wilson_is_scipys(n, data, level):
    successes = data.draw(st.integers(0, n))
    theirs = scipy_stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert stats.wilson(successes, n, level) == pytest.approx((successes / n, theirs.low, theirs.high, level))


def test_wilson_ends_exactly_at_zero_and_one():
    for n in range(1, 60):
        assert stats.wilson(0, n).low == 0
        assert stats.wilson(n, n).high == 1


# --- permutation ---


def by_enumeration(a, b, clusters):
    """Return the exact p value of flipping clusters, in whole numbers."""
    totals = [sum(x - y for x, y, c in zip(a, b, clusters, strict=True) if c == name) for name in set(clusters)]
    signs = list(itertools.product((-1, 1), repeat=len(totals)))
    reached = [abs(sum(s * t for s, t in zip(row, totals, strict=True))) >= abs(sum(totals)) for row in signs]
    return sum(reached) / len(signs)


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9), st.integers(0, 6)), min_size=1, max_size=25))
@settings(deadline=None)
def test_permutation_of_few_clusters_is_enumeration(rows):
    a, b, clusters = zip(*rows, strict=True)
    exact = by_enumeration(a, b, clusters)
    assert stats.paired_permutation(a, b, clusters) == exact
    # Tenths do not add up exactly, and outcomes as extreme as the observed one must still count.
    tenths = stats.paired_permutation(np.array(a) / 10, np.array(b) / 10, clusters)
    assert tenths == exact


def test_permutation_of_single_items_is_scipys():
    a, b = np.random.default_rng(9).normal(size=(2, 12))
    a += 0.6
    theirs = scipy_stats.permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis=axis), permutation_type="samples", vectorized=True
    )
    assert 0.001 < theirs.pvalue < 0.999
    assert stats.paired_permutation(a, b) == pytest.approx(theirs.pvalue, rel=1e-12)


def test_permutation_is_exact_up_to_the_number_of_resamples_and_drawn_beyond():
    a, b = np.random.default_rng(10).normal(size=(2, 10))
    a += 0.5
    exact = stats.paired_permutation(a, b, resamples=1024)
    assert exact == stats.paired_permutation(a, b, resamples=1024, seed=1)
    drawn = stats.paired_permutation(a, b, resamples=1023)
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=0.06)


def test_drawn_p_value_counts_the_observed_pattern():
    assert stats.paired_permutation(np.ones(100), np.zeros(100), resamples=99) == 1 / 100
    assert stats.paired_permutation(np.ones(100), np.ones(100), resamples=99) == 1


@given(items(1), st.sampled_from([10, 10_000]))
@settings(deadline=None)
def test_permutation_does_not_mind_which_system_comes_first(rows, draws):
    a, b, clusters = zip(*rows, strict=True)
    p = stats.paired_permutation(a, b, clusters, resamples=draws)
    assert p == stats.paired_permutation(b, a, clusters, resamples=draws)
    assert 0 < p <= 1


def test_permutation_rejects_five_percent_of_true_hypotheses_only_where_clusters_are_kept():
    repetitions, clustered, independent = 1500, 0, 0
    for seed in range(repetitions):
        queries, differences = queries_and_pairs(np.random.default_rng(seed))
        clustered += stats.paired_permutation(differences, np.zeros(170), queries, resamples=300) <= 0.05
        independent += stats.paired_permutation(differences, np.zeros(170), resamples=300) <= 0.05
    assert 0.03 <= clustered / repetitions <= 0.07
    assert independent / repetitions > 0.09


# --- McNemar and Holm ---


@given(st.integers(0, 60), st.integers(0, 60))
@settings(deadline=None)
def test_mcnemar_is_the_binomial_test_of_the_discordant_items(only_a, only_b):
    p = scipy_stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1
    result = stats.mcnemar(*outcomes(only_a, only_b))
    assert result[:2] == (only_a, only_b)
    assert result.p == pytest.approx(p, rel=1e-9)
    assert result.p <= 1


def test_mcnemar_stays_accurate_for_many_items():
    p = scipy_stats.binomtest(49_500, 100_000).pvalue
    assert stats.mcnemar(*outcomes(49_500, 50_500)).p == pytest.approx(p, rel=1e-7)


def test_holm_agrees_with_a_table_worked_by_hand():
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04, which may not fall below the 0.06 before it.
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(rates, min_size=1, max_size=20), st.floats(0.001, 0.999))
@settings(deadline=None)
def test_holm_rejects_what_stepping_down_rejects(p_values, alpha):
    adjusted = stats.holm(p_values)
    order, rejected = np.argsort(p_values, kind="stable"), np.zeros(len(p_values), dtype=bool)
    for rank, position in enumerate(order):
        if p_values[position] * (len(p_values) - rank) > alpha:
            break
        rejected[position] = True
    assert ((adjusted <= alpha) == rejected).all()
    assert (adjusted >= p_values).all()
    assert (adjusted <= 1).all()
    assert (np.diff(adjusted[order]) >= 0).all()


@given(st.lists(rates, min_size=1, max_size=20), st.randoms())
@settings(deadline=None)
def test_holm_answers_in_the_order_of_the_input(p_values, random):
    order = random.sample(range(len(p_values)), len(p_values))
    assert stats.holm(np.array(p_values)[order]).tolist() == stats.holm(p_values)[order].tolist()


# --- power ---


def cells(p_a, p_b, correlation):
    """Return the probabilities of only A, only B and neither of these, from the definition of phi."""
    both = p_a * p_b + correlation * np.sqrt(p_a * (1 - p_a) * p_b * (1 - p_b))
    return p_a - both, p_b - both, 1 - p_a - p_b + 2 * both


@pytest.mark.parametrize("alpha", [0.1, 0.125])  # 4 of 4 discordant items have a p value of exactly 0.125
@pytest.mark.parametrize(("p_a", "p_b", "correlation"), [(0.67, 0.57, 0.5), (0.2, 0.7, -0.3), (0.9, 0.5, 0.0)])
def test_power_is_the_sum_over_all_tables(p_a, p_b, correlation, alpha):
    n, power = 14, 0.0
    for only_a, only_b in itertools.product(range(n + 1), repeat=2):
        pairs = only_a + only_b
        if 0 < pairs <= n and scipy_stats.binomtest(only_a, pairs).pvalue <= alpha * (1 + 1e-12):
            table = [only_a, only_b, n - pairs]
            power += scipy_stats.multinomial.pmf(table, n, cells(p_a, p_b, correlation))
    ours = stats.mcnemar_power(p_a, p_b, n, correlation=correlation, alpha=alpha)
    assert ours == pytest.approx(power, rel=1e-9)


@pytest.mark.parametrize("correlation", [0.5, 0.324])
@pytest.mark.parametrize("n", [50, 200, 400])
def test_power_is_the_share_of_simulated_studies_that_reject(n, correlation):
    studies = np.random.default_rng(n).multinomial(n, cells(0.67, 0.57, correlation), size=20_000)
    only_a, only_b, _ = studies.T
    p_values = 2 * scipy_stats.binom.cdf(np.minimum(only_a, only_b), only_a + only_b, 0.5)
    power = stats.mcnemar_power(0.67, 0.57, n, correlation=correlation)
    assert power == pytest.approx((p_values <= 0.05).mean(), abs=0.012)


def test_power_of_thresholded_scores_needs_the_phi_of_the_outcomes():
    # Scores that correlate by 0.5 make outcomes that correlate by a third: simulated power 17, 66 and 94 %.
    below_both = scipy_stats.multivariate_normal(cov=[[1, 0.5], [0.5, 1]]).cdf(scipy_stats.norm.ppf([0.67, 0.57]))
    phi = (below_both - 0.67 * 0.57) / np.sqrt(0.67 * 0.33 * 0.57 * 0.43)
    assert phi == pytest.approx(0.324, abs=0.001)
    powers = [stats.mcnemar_power(0.67, 0.57, n, correlation=phi) for n in (50, 200, 400)]
    assert powers == pytest.approx([0.17, 0.66, 0.94], abs=0.015)


@given(rates, st.integers(1, 60), st.floats(-1, 1))
@settings(deadline=None)
def test_equal_rates_are_told_apart_no_more_often_than_alpha(p, n, correlation):
    assert stats.mcnemar_power(p, p, n, correlation=correlation) <= 0.05


@given(rates, rates, st.integers(1, 60), st.floats(-1, 1))
@settings(deadline=None)
def test_power_does_not_mind_which_system_comes_first(p_a, p_b, n, correlation):
    power = stats.mcnemar_power(p_a, p_b, n, correlation=correlation)
    assert 0 <= power <= 1
    assert power == pytest.approx(stats.mcnemar_power(p_b, p_a, n, correlation=correlation), abs=1e-9)


def test_impossible_correlation_counts_as_the_nearest_possible():
    # Rates 0.9 and 0.5: B's successes may at most all be among A's, so only A is ever alone.
    phi = (0.5 - 0.9 * 0.5) / np.sqrt(0.9 * 0.1 * 0.5 * 0.5)
    nearest = stats.mcnemar_power(0.9, 0.5, 12, correlation=phi)
    assert nearest == pytest.approx(scipy_stats.binom.sf(5, 12, 0.4), rel=1e-9)
    assert stats.mcnemar_power(0.9, 0.5, 12, correlation=0.8) == pytest.approx(nearest, rel=1e-9)
    # And at the other end: where successes may at most avoid each other, every item has at least one.
    least = (0.9 + 0.5 - 1 - 0.9 * 0.5) / np.sqrt(0.9 * 0.1 * 0.5 * 0.5)
    farthest = stats.mcnemar_power(0.9, 0.5, 12, correlation=least)
    assert stats.mcnemar_power(0.9, 0.5, 12, correlation=-0.8) == pytest.approx(farthest, rel=1e-9)


@given(st.integers(30, 120), st.floats(0.05, 0.6), st.floats(0.2, 0.9), st.floats(-0.2, 0.8))
@settings(deadline=None, max_examples=25)
def test_detectable_difference_is_the_least_that_reaches_the_power(n, p, power, correlation):
    gain = stats.detectable_difference(n, p=p, power=power, correlation=correlation)
    assert stats.mcnemar_power(p + gain, p, n, correlation=correlation) >= power
    for smaller in (gain - 2e-6, 0.9 * gain, 0.5 * gain):
        assert stats.mcnemar_power(p + smaller, p, n, correlation=correlation) < power


def test_detectable_difference_grows_where_errors_are_to_be_rarer():
    gain = stats.detectable_difference(100, alpha=0.01)
    assert gain > stats.detectable_difference(100)
    assert stats.mcnemar_power(0.5 + gain, 0.5, 100, alpha=0.01) == pytest.approx(0.8, abs=1e-4)


def test_detectable_difference_may_need_all_the_room_there_is():
    # Of 6 items all 6 must differ to be significant, which they do with probability gain^6.
    assert stats.detectable_difference(6, p=0, power=0.99) == pytest.approx(0.99 ** (1 / 6), abs=2e-6)


def test_detectable_difference_shrinks_with_the_root_of_the_number_of_items():
    few, many = stats.detectable_difference(250), stats.detectable_difference(1000)
    assert 1.9 < few / many < 2.3


# --- agreement ---


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=40))
@settings(deadline=None)
def test_kendall_is_scipys_with_ties(points):
    x, y = zip(*[*points, (-1, 0), (7, 8)], strict=True)
    tau = stats.kendall_tau_b(x, y)
    assert tau == pytest.approx(scipy_stats.kendalltau(x, y).statistic, abs=1e-12)
    assert stats.kendall_tau_b(y, x) == tau
    assert stats.kendall_tau_b(x, [-3 * value for value in y]) == -tau
    assert stats.kendall_tau_b(x, np.exp(y)) == tau


def test_kendall_of_a_ranking_with_itself_is_exactly_one():
    ranking = np.random.default_rng(11).normal(size=3000).round(2)
    assert stats.kendall_tau_b(ranking, ranking) == 1
    with np.errstate(all="raise"):
        assert stats.kendall_tau_b([-1.7e308, 0, 1.7e308], [1, 2, 3]) == 1


@pytest.mark.parametrize(("metric", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorff_agrees_with_the_textbook(metric, alpha):
    assert stats.krippendorff_alpha(TEXTBOOK, metric=metric) == pytest.approx(alpha, abs=0.0005)


def test_krippendorff_is_ordinal_by_default():
    assert stats.krippendorff_alpha(TEXTBOOK) == stats.krippendorff_alpha(TEXTBOOK, metric="ordinal")


def test_krippendorff_agrees_with_a_table_worked_by_hand():
    # Units (1, 1), (2, 2) and (1, 3): six ratings, 1 three times, 2 twice, 3 once; only 1-3 and 3-1 disagree.
    # By chance 1-2 meets 3 * 2 times, 1-3 meets 3 * 1 times and 2-3 meets 2 * 1 times, each in both orders.
    # The middle ranks of 1, 2 and 3 are 1.5, 4 and 5.5.
    ratings = [[1, 2, 1], [1, 2, 3]]
    assert stats.krippendorff_alpha(ratings, metric="nominal") == pytest.approx(1 - 5 * 2 / (2 * (6 + 3 + 2)))
    assert stats.krippendorff_alpha(ratings, metric="interval") == pytest.approx(
        1 - 5 * 2 * 4 / (2 * (6 * 1 + 3 * 4 + 2 * 1))
    )
    by_chance = 2 * (6 * 2.5**2 + 3 * 4**2 + 2 * 1.5**2)
    assert stats.krippendorff_alpha(ratings, metric="ordinal") == pytest.approx(1 - 5 * 2 * 4**2 / by_chance)


ratings_tables = st.lists(st.tuples(*[st.sampled_from([1.0, 2.0, 3.0, 5.0, NAN])] * 3), min_size=1, max_size=12).map(
    lambda units: np.array([*units, (1.0, 2.0, NAN), (3.0, 3.0, 3.0)]).T
)


def by_pairs(ratings, distance):
    """Return alpha by its definition: mean distance within units over mean distance among all ratings."""
    units = [column[~np.isnan(column)] for column in ratings.T]
    units = [unit for unit in units if len(unit) > 1]
    pool = np.concatenate(units)
    within = sum(
        sum(distance(x, y, pool) for x, y in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units
    )
    among = sum(distance(x, y, pool) for x, y in itertools.permutations(pool, 2))
    return 1 - (within / len(pool)) / (among / (len(pool) * (len(pool) - 1)))


def ordinal_distance(x, y, pool):
    low, high = min(x, y), max(x, y)
    between = ((pool >= low) & (pool <= high)).sum()
    return (between - ((pool == low).sum() + (pool == high).sum()) / 2) ** 2 if low < high else 0


DISTANCES = {
    "nominal": lambda x, y, pool: x != y,
    "interval": lambda x, y, pool: (x - y) ** 2,
    "ordinal": ordinal_distance,
}


@given(ratings_tables, st.sampled_from(sorted(DISTANCES)))
@settings(deadline=None, max_examples=60)
def test_krippendorff_is_its_definition_over_pairs_of_ratings(ratings, metric):
    alpha = stats.krippendorff_alpha(ratings, metric=metric)
    assert alpha == pytest.approx(by_pairs(ratings, DISTANCES[metric]), abs=1e-9)


@given(ratings_tables, st.randoms())
@settings(deadline=None)
def test_krippendorff_keeps_to_what_each_metric_means(ratings, random):
    annotators, units = (random.sample(range(size), size) for size in ratings.shape)
    for metric in DISTANCES:
        alpha = stats.krippendorff_alpha(ratings, metric=metric)
        shuffled = ratings[annotators][:, units]
        assert stats.krippendorff_alpha(shuffled, metric=metric) == pytest.approx(alpha, abs=1e-9)
        assert stats.krippendorff_alpha(3 - 2e200 * ratings, metric=metric) == pytest.approx(alpha, abs=1e-9)
        once = np.column_stack([ratings, [5, NAN, NAN], [NAN, NAN, NAN]])
        assert stats.krippendorff_alpha(once, metric=metric) == pytest.approx(alpha, abs=1e-9)
    ordinal = stats.krippendorff_alpha(ratings, metric="ordinal")
    assert stats.krippendorff_alpha(ratings**3, metric="ordinal") == pytest.approx(ordinal, abs=1e-9)


# --- refusals ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: stats.bootstrap_mean([1.0, NAN, 2.0]),
            r"values: expected finite numbers, got nan \(1 not finite",
        ),
        (lambda: stats.bootstrap_mean([]), r"values: expected 1-D numbers, not empty, got float64 \(0,\)"),
        (lambda: stats.bootstrap_mean(["1", "2"]), "values: expected 1-D numbers"),
        (lambda: stats.bootstrap_mean([[1.0, 2.0]]), r"values: expected 1-D numbers.*\(1, 2\)"),
        (
            lambda: stats.bootstrap_mean([1, 2], ["a"]),
            "clusters: expected 2 labels, one per item, got 1; align",
        ),
        (
            lambda: stats.bootstrap_mean([1, 2], [1.0, NAN]),
            "clusters: expected strings or whole .*got 1.0; name",
        ),
        (
            lambda: stats.bootstrap_mean([1, 2], ["a", "a"]),
            "clusters: expected at least 2, got 1; .*more clusters",
        ),
        (
            lambda: stats.bootstrap_mean([1, 2], level=95),
            "level: expected 0 to 1 exclusive, got 95; pass a fraction",
        ),
        (lambda: stats.bootstrap_mean([1, 2], level=NAN), "level: .*got nan"),
        (
            lambda: stats.bootstrap_mean([1, 2], resamples=0),
            "resamples: expected a whole number of at least 1, got 0",
        ),
        (lambda: stats.bootstrap_difference([1, 2], [1]), "a and b: expected equal lengths, got 2, 1; align"),
        (lambda: stats.bootstrap_difference([1, 2], [1, NAN]), "b: expected finite numbers"),
        (
            lambda: stats.wilson(11, 10),
            "successes: expected at most n = 10, got 11; were the arguments swapped",
        ),
        (lambda: stats.wilson(-1, 10), "successes: expected a whole number of at least 0, got -1"),
        (lambda: stats.wilson(0, 0), "n: expected a whole number of at least 1, got 0"),
        (lambda: stats.wilson(0.5, 10), "successes: expected a whole number .*got 0.5; pass a count"),
        (lambda: stats.wilson(5, 10, 1), "level: expected 0 to 1 exclusive, got 1"),
        (lambda: stats.paired_permutation([NAN], [1.0]), "a: expected finite numbers"),
        (lambda: stats.paired_permutation([1], [1], resamples=0), "resamples: expected a whole number"),
        (
            lambda: stats.mcnemar([0.5, 1], [1, 1]),
            "a and b: expected booleans or 0 and 1, got 0.5; threshold",
        ),
        (lambda: stats.mcnemar([True], [True, False]), "a and b: expected equal lengths"),
        (lambda: stats.holm([0.2, 1.2]), "p_values: expected 0 to 1, got 1.2"),
        (lambda: stats.holm([-0.2, 0.2]), "p_values: expected 0 to 1, got -0.2"),
        (lambda: stats.holm([NAN]), "p_values: expected finite numbers"),
        (lambda: stats.mcnemar_power(67, 0.5, 10), "p_a: expected 0 to 1, got 67; pass a fraction"),
        (lambda: stats.mcnemar_power(0.5, -1, 10), "p_b: expected 0 to 1, got -1"),
        (lambda: stats.mcnemar_power(0.5, 0.5, 0), "n: expected a whole number"),
        (lambda: stats.mcnemar_power(0.5, 0.5, 9, correlation=NAN), "correlation: expected -1 to 1, got nan"),
        (lambda: stats.mcnemar_power(0.5, 0.5, 9, alpha=0), "alpha: expected 0 to 1 exclusive, got 0"),
        (
            lambda: stats.detectable_difference(5),
            "n: expected enough items for power 0.8 at p = 0.5, got 5; add",
        ),
        (
            lambda: stats.detectable_difference(50, p=1),
            "n: expected enough items for power 0.8 at p = 1, got 50",
        ),
        (
            lambda: stats.detectable_difference(50, power=0.05),
            "power: expected 0.05 to 1 exclusive, got 0.05",
        ),
        (
            lambda: stats.kendall_tau_b([1, 1], [1, 2]),
            "x: expected at least two different values, got a constant",
        ),
        (
            lambda: stats.kendall_tau_b([1, 2], [3, 3]),
            "y: expected at least two different values, got a constant",
        ),
        (lambda: stats.kendall_tau_b([1, NAN], [3, 3]), "x: expected finite numbers"),
        (lambda: stats.kendall_tau_b([1, 2], [1, 2, 3]), "x and y: expected equal lengths"),
        (
            lambda: stats.krippendorff_alpha([[3, 3], [3, 3]]),
            "ratings: .*got 2 such units with 1 different ratings",
        ),
        (lambda: stats.krippendorff_alpha([[3, NAN], [NAN, 2]]), "ratings: .*got 0 such units with 0"),
        (lambda: stats.krippendorff_alpha([1, 2]), "ratings: expected 2-D numbers"),
        (
            lambda: stats.krippendorff_alpha([[1, float("inf")], [1, 2]]),
            "ratings: expected finite numbers, got inf",
        ),
        (lambda: stats.krippendorff_alpha([[1, None], [1, 2]]), "ratings: expected 2-D numbers.*got object"),
        (
            lambda: stats.krippendorff_alpha(TEXTBOOK, metric="ratio"),
            "metric: expected one of ordinal, .*got 'ratio'",
        ),
    ],
)
def test_refusals_name_the_object_and_the_cure(call, message):
    with pytest.raises(ValueError, match=message):
        call()
