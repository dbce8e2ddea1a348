"""What is logged of betas equals what numpy says of all pairs at once, however they came."""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import MLFlowLogger
from matplotlib.image import imread

from mmrlhf.callbacks.beta_monitor import BetaMonitor, Tally

from .test_compute import BETA0, K, Kept, Toy, W, fit, report_of

pytestmark = pytest.mark.filterwarnings("ignore")


def joined(reports):
    """All pairs of some reports as float64 arrays, by their names."""
    names = [name for name in reports[0]._fields if isinstance(getattr(reports[0], name), torch.Tensor)]
    found = {name: np.concatenate([getattr(report, name).double().numpy() for report in reports]) for name in names}
    return found | {"categories": np.array([name for report in reports for name in report.categories])}


def expected(reports):
    """Every metric of some reports with margins and bounded betas, straight from its definition."""
    of = joined(reports)
    delta, beta, z = of["margin"], of["beta"], of["gap"]
    # Not from beta: the definition.
    gain = np.where(delta > 0, 1 - np.exp(-K * np.maximum(delta, 0)), 0)
    found = {
        "pairs": len(delta),
        "delta/mean": delta.mean(),
        "delta/std": delta.std(),
        "delta/median": np.median(delta),
        "delta/negative_share": (delta < 0).mean(),
        "g/mean": gain.mean(),
        "g/std": gain.std(),
        "beta/mean": beta.mean(),
        "beta/std": beta.std(),
        "beta/min": beta.min(),
        "beta/max": beta.max(),
        "beta/share_at_cap": (gain >= 0.99).mean(),
        "beta/share_at_beta0": (delta <= 0).mean(),
        "loss": of["loss"].mean(),
        "rewards/accuracies": (z > 0).mean(),
        "rewards/ties": (z == 0).mean(),
        "rewards/margins_std": (beta * z).std(),
        "logps/chosen": of["chosen_logps"].mean(),
        "logps/rejected": of["rejected_logps"].mean(),
    }
    chosen, rejected = of["chosen_logps"] - of["reference_chosen"], of["rejected_logps"] - of["reference_rejected"]
    for name, weight in (("rewards", beta), ("rewards_beta0", BETA0)):
        found |= {
            f"{name}/chosen": (weight * chosen).mean(),
            f"{name}/rejected": (weight * rejected).mean(),
            f"{name}/margins": (weight * (chosen - rejected)).mean(),
        }
    groups = {f"rank_gap_{gap}": of["rank_gap"] == gap for gap in (1, 2)}
    groups |= {name: of["categories"] == name for name in ("VQA", "Safety")}
    for name, chosen_pairs in groups.items():
        found[f"pairs/{name}"] = chosen_pairs.sum()
        found[f"delta/mean/{name}"] = delta[chosen_pairs].mean()
        found[f"beta/mean/{name}"] = beta[chosen_pairs].mean()
        found[f"rewards/margins/{name}"] = (beta * z)[chosen_pairs].mean()
        found[f"rewards/accuracies/{name}"] = (z > 0)[chosen_pairs].mean()
    return found


def metrics_of(*reports):
    tally = Tally()
    tally.add(list(reports))
    return {name.removeprefix("x/"): value for name, value in tally.metrics("x").items()}


def pairs(n, **fields):
    """A report in which nothing is told but what is given."""
    zero = torch.zeros(n)
    known = dict.fromkeys(report_of(0)._fields, zero)
    known |= {"beta": zero + BETA0, "rank_gap": torch.ones(n, dtype=torch.int64), "categories": ("",) * n}
    known |= {"beta0": BETA0, "cap": BETA0 * (1 + W)}
    return type(report_of(0))(**known | fields)


# Numbers ----------------------------------------------------------------------------------------------------


def test_every_metric_is_what_numpy_says_of_all_pairs_at_once():
    reports = [report_of(number, pairs=7) for number in range(40)]
    found, wanted = metrics_of(*reports), expected(reports)
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6), "the median is rounded"
    wanted.pop("delta/median")
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("parts", [1, 2, 5, 40])
def test_merged_tallies_tell_the_same_as_one(parts):
    reports = [report_of(number) for number in range(40)]
    whole, merged = Tally(), Tally()
    whole.add(reports)
    for part in range(parts):
        one = Tally()
        one.add(reports[part::parts])
        merged.merge(one)
        merged.merge(Tally())  # a rank without a pair
    assert merged.metrics("x") == pytest.approx(whole.metrics("x"), rel=1e-12)
    assert (merged.cells, merged.bounds) == (whole.cells, whole.bounds)


def test_deviations_of_large_numbers_that_lie_close_are_not_lost():
    tally = Tally()
    for start in (0.0, 4.0):
        one = Tally()
        one.add([pairs(2, margin=1e6 + torch.tensor([start, start + 1]))])
        tally.merge(one)
    assert tally.metrics("x")["x/delta/std"] == pytest.approx(np.std([0, 1, 4, 5]), rel=1e-12)


def test_a_tie_is_not_accurate():
    found = metrics_of(pairs(4, gap=torch.tensor([0.0, 0.0, 1e-6, -1.0])))
    assert (found["rewards/accuracies"], found["rewards/ties"]) == (0.25, 0.5)


def test_shares_at_the_bounds_are_those_of_clamped_and_of_saturated_pairs():
    beta = torch.tensor([0.1, 0.1001, 0.1494, 0.1496, 0.15])
    found = metrics_of(pairs(5, beta=beta))
    assert (found["beta/share_at_beta0"], found["beta/share_at_cap"]) == (0.2, 0.4)


@pytest.mark.parametrize(("cap", "at_cap"), [(BETA0, 1.0), (inf, 0.0)])
def test_without_a_range_there_is_no_gain_and_the_bounds_still_count(cap, at_cap):
    found = metrics_of(pairs(3, cap=cap))
    assert not any(name.startswith("g/") for name in found)
    assert (found["beta/share_at_beta0"], found["beta/share_at_cap"]) == (1.0, at_cap)


def test_gains_are_measured_by_the_bounds_of_their_own_step():
    one = pairs(1, beta=torch.tensor([0.125]))
    two = pairs(1, beta=torch.tensor([0.25]), beta0=0.2, cap=0.3)
    assert metrics_of(one, two)["g/mean"] == pytest.approx(0.5)


def test_pairs_without_a_margin_are_left_out_of_margins_only():
    found = metrics_of(pairs(3, margin=torch.tensor([nan, -1.0, 2.0]), gap=torch.ones(3)))
    assert (found["delta/mean"], found["delta/median"], found["delta/negative_share"]) == (0.5, 0.5, 0.5)
    assert (found["pairs"], found["rewards/accuracies"]) == (3, 1.0)
    none = metrics_of(pairs(2, margin=torch.full((2,), nan)))
    assert not any(name.startswith("delta/") for name in none)


def test_a_policy_that_diverged_shows():
    assert np.isnan(metrics_of(pairs(2, chosen_logps=torch.tensor([nan, 1.0])))["logps/chosen"])


def test_categories_become_names_that_mlflow_takes():
    found = metrics_of(pairs(3, categories=("Chart/OCR", "图表", "")))
    assert {name for name in found if name.startswith("pairs/")} == {
        "pairs/Chart_OCR",
        "pairs/图表",
        "pairs/rank_gap_1",
    }


def test_no_pair_is_no_metric():
    assert metrics_of() == metrics_of(pairs(0)) == {}


# In a training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_pair_is_in_one_interval(accumulation):
    kept = Kept()
    fit(Toy(), BetaMonitor(), kept=kept, count=10, log_every_n_steps=2, accumulate_grad_batches=accumulation)
    found = {step: metrics for step, metrics in kept.logged if "train/pairs" in metrics}
    ends = range(2 * accumulation, 11, 2 * accumulation)
    spans = {end // accumulation - 1: range(end - 2 * accumulation, end) for end in ends}
    if accumulation == 2:
        spans[4] = range(8, 10)  # what was left at the end
    assert found.keys() == spans.keys()
    for step, numbers in spans.items():
        wanted = expected([report_of(number) for number in numbers])
        assert found[step]["train/delta/mean"] == pytest.approx(wanted["delta/mean"], rel=1e-5)
        assert found[step]["train/pairs"] == 5 * len(numbers)


def test_a_validation_in_the_midst_of_an_interval_is_kept_apart_from_it():
    kept = Kept()
    trainer = fit(Toy(), BetaMonitor(), kept=kept, count=4, val=3, val_check_interval=2, num_sanity_val_steps=2)
    validated = kept.with_name("val/delta/mean")
    wanted = expected([report_of(number) for number in (500, 501, 502)])
    assert validated == dict.fromkeys((1, 3), pytest.approx(wanted["delta/mean"], rel=1e-5))
    assert kept.with_name("train/pairs") == {3: 20}
    monitored = {name.removeprefix("val/"): value.item() for name, value in trainer.callback_metrics.items()}
    wanted.pop("delta/median")
    assert {name: monitored[name] for name in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_no_logging_keeps_no_reports():
    monitor = BetaMonitor()
    fit(Toy(), monitor, log_every_n_steps=0)
    assert monitor._trained == []


def test_the_figure_goes_to_the_folder_and_to_mlflow(tmp_path):
    store = MLFlowLogger("betas", tracking_uri=f"sqlite:///{tmp_path}/m.db", artifact_location=str(tmp_path / "kept"))
    fit(Toy(), BetaMonitor(tmp_path / "figures"), kept=store, count=4, val=2)
    (written,) = (tmp_path / "figures").glob("*.png")
    (logged,) = (tmp_path / "kept").rglob("*.png")
    assert written.name == logged.name == "beta-00000004.png"
    assert logged.parent.name == "figures"
    assert imread(written)[..., :3].std() > 0.05
    history = store.experiment.get_metric_history(store.run_id, "val/beta/mean/VQA")
    assert len(history) == 1


def test_the_margins_behind_the_figure_are_kept_as_numbers(tmp_path):
    store = MLFlowLogger("betas", tracking_uri=f"sqlite:///{tmp_path}/m.db", artifact_location=str(tmp_path / "kept"))
    fit(Toy(), BetaMonitor(tmp_path / "figures"), kept=store, count=4, val=2)
    head, *rows = (tmp_path / "figures" / "margins.csv").read_text().splitlines()
    assert head == "delta,pairs"
    deltas, pairs = (np.array(column, dtype=float) for column in zip(*(row.split(",") for row in rows), strict=True))
    run = store.experiment.get_run(store.run_id).data.metrics
    assert pairs.sum() == run["val/pairs"]
    assert (deltas * pairs).sum() / pairs.sum() == pytest.approx(run["val/delta/mean"], rel=1e-3)
    assert (np.diff(deltas) > 0).all()


def test_nothing_is_drawn_where_nobody_would_see_it_or_there_is_no_pair(monkeypatch, tmp_path):
    monkeypatch.setattr("mmrlhf.callbacks.beta_monitor.draw_betas", lambda *_, **__: pytest.fail("drawn"))
    fit(Toy(), BetaMonitor(), count=2, val=1)
    fit(Toy(lambda number: report_of(number, pairs=0)), BetaMonitor(tmp_path), count=2, val=1)
