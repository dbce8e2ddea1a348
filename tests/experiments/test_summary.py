"""Means, intervals and verdicts of a grid are those that other programs compute, and the planted truth is found."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from mmrlhf.experiments.summary import baseline_of, cell_table, detectable, items_frame
from mmrlhf.stats import detectable_difference

from .swept import BASELINE, BETTER, FAILED, METRIC, SEEDS, K, W, outcomes_of, sweep, used_of

RUNS = sweep()
USED = used_of(RUNS)
ITEMS = items_frame(USED, outcomes_of(RUNS), METRIC)


def table(used=USED, items=ITEMS, baseline=BASELINE, **options):
    return cell_table(used, items, METRIC, axes=[W, K], baseline=baseline, **{"resamples": 400} | options)


TABLE = table(resamples=4000).set_index("cell")


def cluster_means(cell: str):
    """By hand: the mean over seeds of every item, and of these the mean over the two items of a question."""
    rows = [pd.DataFrame(run.rows) for run in RUNS if run.cell == cell]
    every = pd.concat(rows).groupby("cluster")["correct"].mean()
    return every.to_numpy(dtype=float)


def test_the_planted_cell_and_no_other_is_told_from_the_baseline():
    verdicts = TABLE["verdict"].to_dict()
    assert verdicts.pop(BASELINE) == "baseline"
    assert verdicts.pop(BETTER) == "above"
    assert set(verdicts.values()) == {"same"}
    assert FAILED not in verdicts
    assert len(verdicts) == 14


def test_means_and_spreads_are_those_of_the_seeds():
    for cell, row in TABLE.iterrows():
        values = [run.metrics[METRIC] for run in RUNS if run.cell == cell]
        assert row["mean"] == pytest.approx(np.mean(values))
        assert row["sd"] == pytest.approx(scipy_stats.tstd(values))
        assert row["seeds"] == len(SEEDS)
        assert row["ledger/flops"] == 3.1e12


@pytest.mark.parametrize("cell", [BASELINE, BETTER, "w1-k0.25"])
def test_intervals_are_those_of_a_bootstrap_over_questions(cell):
    data = (cluster_means(cell),)
    known = scipy_stats.bootstrap(data, np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    assert TABLE.loc[cell, "low"] == pytest.approx(known.low, abs=0.008)
    assert TABLE.loc[cell, "high"] == pytest.approx(known.high, abs=0.008)


@pytest.mark.parametrize("cell", [BETTER, "w1-k0.25", "w0.25-k1", "w0.75-k1"])
def test_tests_are_those_of_flipped_questions(cell):
    apart = cluster_means(cell) - cluster_means(BASELINE)
    known = scipy_stats.permutation_test(
        (apart,), np.mean, permutation_type="samples", n_resamples=4000, rng=1, vectorized=False
    ).pvalue
    assert TABLE.loc[cell, "p"] == pytest.approx(known, abs=0.03)
    assert TABLE.loc[cell, "difference"] == pytest.approx(apart.mean())
    data = (apart,)
    span = scipy_stats.bootstrap(data, np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    assert TABLE.loc[cell, "difference_low"] == pytest.approx(span.low, abs=0.005)
    assert TABLE.loc[cell, "difference_high"] == pytest.approx(span.high, abs=0.005)


def test_p_values_are_corrected_over_all_cells_that_were_compared():
    tested = TABLE.dropna(subset=["p"]).sort_values("p", kind="stable")
    assert len(tested) == 15
    running, by_hand = 0.0, []
    for place, p in enumerate(tested["p"]):
        running = max(running, min(1.0, p * (15 - place)))
        by_hand.append(running)
    assert tested["p_holm"].tolist() == pytest.approx(by_hand)


def test_items_of_one_question_are_not_counted_as_two():
    alone = {name: rows.assign(cluster=rows["item"]) for name, rows in outcomes_of(RUNS).items()}
    naive = table(items=items_frame(USED, alone, METRIC)).set_index("cell")
    assert (TABLE["high"] - TABLE["low"] > 1.15 * (naive["high"] - naive["low"])).all()


def test_without_an_effect_few_sweeps_show_one():
    shown = 0
    draw = np.random.default_rng(3)
    for _ in range(20):
        runs = sweep(items=60, ws=(0.5, 1.0), ks=(0.5, 1.0), seeds=(0,), gains={}, failed=None)
        for run in runs:
            flips = draw.random(60) < 0.15
            rows = [row | {"correct": row["correct"] ^ bool(flip)} for row, flip in zip(run.rows, flips, strict=True)]
            run.rows, run.metrics[METRIC] = rows, float(np.mean([row["correct"] for row in rows]))
        used = used_of(runs)
        found = table(used, items_frame(used, outcomes_of(runs), METRIC), resamples=400)
        shown += bool(found["verdict"].isin(["above", "below"]).any())
    assert shown <= 4  # of 20 at 5 %: more than 4 in one of 400


def test_a_cell_below_the_baseline_is_said_to_be_below():
    runs = sweep(ws=(0.5,), ks=(1.0,), gains={BETTER: -0.15}, failed=None)
    used = used_of(runs)
    found = table(used, items_frame(used, outcomes_of(runs), METRIC)).set_index("cell")
    assert found.loc[BETTER, "verdict"] == "below"
    assert found.loc[BETTER, "seeds_better"] == 0
    fewer = table(used, items_frame(used, outcomes_of(runs), METRIC), greatest=False).set_index("cell")
    assert fewer.loc[BETTER, "verdict"] == "below"
    assert fewer.loc[BETTER, "seeds_better"] == 3


def test_seeds_are_compared_with_the_same_seed_of_the_baseline():
    used = USED[~((USED["cell"] == BETTER) & (USED["seed"] == 1))]
    row = table(used).set_index("cell").loc[BETTER]
    assert (row["seeds"], row["seeds_paired"], row["seeds_better"]) == (2, 2, 2)
    values = {(run.cell, run.seed): run.metrics.get(METRIC) for run in RUNS}
    better = sum(values["w1-k1", seed] > values[BASELINE, seed] for seed in SEEDS)
    assert TABLE.loc["w1-k1", "seeds_better"] == better


def test_one_seed_has_no_spread():
    used = USED[USED["seed"] == 0]
    assert table(used)["sd"].isna().all()
    assert (table(used)["seeds"] == 1).all()


def test_cells_stand_in_the_order_of_their_axes_whatever_the_order_of_runs():
    found = table(USED.iloc[::-1])
    assert found["cell"].tolist() == TABLE.index.tolist()
    assert found["cell"].tolist()[:3] == [BASELINE, "w0.25-k0.25", "w0.25-k0.5"]
    pd.testing.assert_series_equal(found.set_index("cell")["p"], table().set_index("cell")["p"])


def test_a_metric_that_is_not_the_share_of_right_items_has_no_interval():
    other = USED.assign(**{METRIC: USED[METRIC] + 1e-3})
    assert items_frame(other, outcomes_of(RUNS), METRIC) is None
    some = outcomes_of(RUNS)
    some.pop(f"{BETTER}-seed0")
    assert items_frame(USED, some, METRIC) is None
    found = table(items=None)
    assert found[["low", "high", "p", "p_holm", "difference"]].isna().all(axis=None)
    assert set(found["verdict"]) == {"baseline", ""}
    assert found.set_index("cell")["seeds_better"][BETTER] == 3


def test_runs_on_other_items_are_refused():
    other = outcomes_of(RUNS)
    name = f"{BETTER}-seed2"
    other[name] = other[name].assign(item=other[name]["item"] + "x")
    with pytest.raises(ValueError, match=rf"got others in {name} than in w0-seed0"):
        items_frame(USED, other, METRIC)


def test_one_question_tells_nothing_of_others_and_all_right_is_no_proof():
    one = {name: rows.assign(cluster="q") for name, rows in outcomes_of(RUNS).items()}
    row = table(items=items_frame(USED, one, METRIC)).set_index("cell").loc[BETTER]
    assert (row["low"], row["high"], row["difference_low"], row["difference_high"]) == (0, 1, -1, 1)
    sure = {name: rows.assign(correct=1.0) for name, rows in outcomes_of(RUNS).items()}
    used = USED.assign(**{METRIC: 1.0})
    row = table(used, items_frame(used, sure, METRIC)).set_index("cell").loc[BETTER]
    known = scipy_stats.binomtest(120, 120).proportion_ci(method="wilson")
    assert (row["low"], row["high"]) == pytest.approx((known.low, known.high))


def test_the_baseline_is_the_one_that_is_named_or_the_only_one():
    assert baseline_of(USED) == BASELINE
    assert baseline_of(USED, BETTER) == BETTER
    assert baseline_of(USED[USED["cell"] != BASELINE]) is None
    with pytest.raises(ValueError, match="expected a finished cell, got 'w1-k2'"):
        baseline_of(USED, FAILED)
    two = USED.assign(role=np.where(USED["cell"] == BETTER, "baseline", USED["role"]))
    with pytest.raises(ValueError, match=r"expected one, got w0, w0.5-k1; name one of them with --baseline"):
        baseline_of(two)
    assert set(table(baseline=None)["verdict"]) == {""}


def test_so_few_draws_that_nothing_could_be_told_apart_are_refused():
    with pytest.raises(ValueError, match=r"expected 299 or more for 15 tests at 0.05, got 298"):
        table(resamples=298)
    assert table(resamples=299).set_index("cell").loc[BETTER, "verdict"] == "above"


def test_the_detectable_difference_is_that_of_items_and_of_questions_before_and_after_holm():
    found = detectable(ITEMS, 0.55, 15)
    assert found["items"] == detectable_difference(240, p=0.55)
    assert found["clusters"] == detectable_difference(120, p=0.55)
    assert found["items_holm"] == detectable_difference(240, p=0.55, alpha=0.05 / 15)
    assert found["clusters_holm"] == detectable_difference(120, p=0.55, alpha=0.05 / 15)
    assert detectable(ITEMS.iloc[:4], 0.9, 15)["items"] is None
    assert detectable(None, 0.5, 1) == detectable(ITEMS, 1.0, 1) == {}
