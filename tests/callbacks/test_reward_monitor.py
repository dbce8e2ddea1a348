"""What is logged of a reward model equals what numpy says of all its pairs at once, however they came."""

from __future__ import annotations

import json
import multiprocessing
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from matplotlib.image import imread

from mmrlhf.callbacks.figures import Ranked, draw_rewards
from mmrlhf.callbacks.reward_monitor import RewardMonitor, RewardTally
from mmrlhf.reports import RewardReport, RewardTerms

from ..datamodules.ranks import run_ranks
from .test_compute import Kept, Toy, fit, work_of

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ("VQA", "Safety")
KINDS = ("critique", "ranking", "tie", "centre", "dimension")


def told(number, queries=3):
    """Hand-made queries of four responses, of which some rewards are equal; all follows from a number."""
    draw = np.random.default_rng(number)
    rewards = torch.tensor(draw.integers(-4, 5, (queries, 4)) / 2).float()
    places = [(0, 1), (0, 3), (2, 3)]
    chosen = torch.cat([rewards[query, [one for one, _ in places]] for query in range(queries)] or [torch.zeros(0)])
    other = torch.cat([rewards[query, [two for _, two in places]] for query in range(queries)] or [torch.zeros(0)])
    sizes = (2 * queries, 3 * queries, queries, 3 * queries, number % 3 if queries else 0)
    return RewardReport(
        margin=chosen - other,
        correct=chosen > other,
        chosen=chosen,
        rejected=other,
        rank_gap=torch.tensor([1, 2, 1] * queries, dtype=torch.long),
        categories=tuple(name for query in range(queries) for name in [NAMES[(number + query) % 2]] * 3),
        ids=tuple(f"{number}-{query}" for query in range(queries) for _ in places),
        terms=RewardTerms(*(torch.tensor(draw.exponential(1.0, size)).float() for size in sizes)),
        tie_distance=(rewards[:, 1] - rewards[:, 2]).abs(),
        rewards=rewards.flatten(),
        critique_tokens=torch.tensor(draw.integers(1, 30, 2 * queries)),
    )


def joined(reports, name):
    return np.concatenate([getattr(report, name).double().numpy() for report in reports])


def expected(reports):
    """Every metric, straight from its definition."""
    margin, gap = joined(reports, "margin"), joined(reports, "rank_gap")
    category = np.array([name for report in reports for name in report.categories])
    ids = np.array([name for report in reports for name in report.ids])
    terms = {
        kind: np.concatenate([getattr(report.terms, kind).double().numpy() for report in reports]) for kind in KINDS
    }
    tokens = joined(reports, "critique_tokens")
    nll = (terms["critique"] * tokens).sum() / tokens.sum()
    rewards = joined(reports, "rewards")
    found = {
        "pairs": len(margin),
        "queries": len(set(ids)),
        "ties": len(joined(reports, "tie_distance")),
        "critiques": len(tokens),
        "accuracy": (margin > 0).mean(),
        "equal": (margin == 0).mean(),
        "accuracy_plus": np.mean([(margin[ids == name] > 0).all() for name in set(ids)]),
        "margin/mean": margin.mean(),
        "margin/std": margin.std(),
        "tie_distance": joined(reports, "tie_distance").mean(),
        "reward/mean": rewards.mean(),
        "reward/std": rewards.std(),
        "reward/chosen": joined(reports, "chosen").mean(),
        "reward/rejected": joined(reports, "rejected").mean(),
        "critique/nll": nll,
        "critique/perplexity": np.exp(nll),
    } | {f"loss/{kind}": terms[kind].mean() for kind in KINDS if len(terms[kind])}
    groups = {f"rank_gap_{each}": gap == each for each in (1, 2)} | {name: category == name for name in NAMES}
    for name, own in groups.items():
        found[f"pairs/{name}"] = own.sum()
        found[f"accuracy/{name}"] = (margin[own] > 0).mean()
        found[f"margin/mean/{name}"] = margin[own].mean()
    return found


def tally_of(*reports):
    tally = RewardTally()
    tally.add(list(reports))
    return tally


def metrics_of(*reports):
    return {name.removeprefix("x/"): value for name, value in tally_of(*reports).metrics("x").items()}


# Numbers ----------------------------------------------------------------------------------------------------


def test_every_metric_is_what_numpy_says_of_all_at_once():
    reports = [told(number) for number in range(40)]
    wanted = expected(reports)
    assert 0 < wanted["accuracy_plus"] < wanted["accuracy"] < 1
    assert wanted["equal"] > 0
    found = metrics_of(*reports)
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("parts", [1, 2, 5, 40])
def test_merged_tallies_tell_the_same_as_one(parts):
    reports = [told(number) for number in range(40)]
    merged, whole = RewardTally(), tally_of(*reports)
    for part in range(parts):
        merged.merge(tally_of(*reports[part::parts]))
        merged.merge(RewardTally())  # a rank without a pair
    assert merged.metrics("x") == pytest.approx(whole.metrics("x"), rel=1e-12)
    assert merged.cells == whole.cells


def test_equal_rewards_are_wrong_and_counted():
    report = told(0)._replace(margin=torch.zeros(9), correct=torch.zeros(9, dtype=torch.bool))
    found = metrics_of(report)
    assert (found["accuracy"], found["accuracy_plus"], found["equal"]) == (0, 0, 1)


def test_what_there_was_nothing_of_is_left_out():
    assert metrics_of() == metrics_of(told(0, queries=0)) == {}
    silent = told(3)._replace(critique_tokens=torch.zeros(0, dtype=torch.long))
    silent = silent._replace(terms=silent.terms._replace(critique=torch.zeros(0)))
    found = metrics_of(silent)
    assert not any("critique" in name or "dimension" in name for name in found)
    assert found["accuracy"] == metrics_of(told(3))["accuracy"]


def test_a_model_that_diverged_shows():
    rewards = told(0).rewards.clone()
    rewards[0] = torch.nan
    assert np.isnan(metrics_of(told(0)._replace(rewards=rewards))["reward/mean"])
    lost = torch.full((9,), torch.nan)
    tally = tally_of(told(0)._replace(margin=lost, correct=lost > 0))
    assert tally.metrics("x")["x/accuracy"] == 0
    RewardMonitor().draw(tally, "Step 3").canvas.draw()


def test_categories_become_names_that_mlflow_takes_and_none_is_no_group():
    found = metrics_of(told(0)._replace(categories=("Chart/OCR", *[""] * 8)))
    assert {name for name in found if name.startswith("pairs/")} == {
        "pairs/Chart_OCR",
        "pairs/rank_gap_1",
        "pairs/rank_gap_2",
    }


# In a training ----------------------------------------------------------------------------------------------


class Judge(Toy):
    """Tells of hand-made rewards."""

    def training_step(self, batch, batch_idx):
        """Tell."""
        number = batch + 1000 * self.global_rank
        return {"loss": self.net(torch.ones(1)).sum(), "report": told(number), "work": work_of(number)}

    def validation_step(self, batch, batch_idx):
        """Tell of other pairs; the second rank has none."""
        return {"report": told(batch + 500, queries=0 if self.global_rank else 3), "work": work_of(batch)}


def test_every_pair_is_in_one_interval_and_a_validation_is_kept_apart():
    kept = Kept()
    trainer = fit(Judge(), RewardMonitor(), kept=kept, count=10, val=3, log_every_n_steps=4)
    found = {step: metrics for step, metrics in kept.logged if "train/pairs" in metrics}
    assert found.keys() == {3: 0, 7: 0, 9: 0}.keys()
    for step, numbers in ((3, range(4)), (7, range(4, 8)), (9, range(8, 10))):
        wanted = {f"train/{name}": value for name, value in expected([told(number) for number in numbers]).items()}
        assert found[step] == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    monitored = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    wanted = {f"val/{name}": value for name, value in expected([told(number) for number in (500, 501, 502)]).items()}
    assert monitored == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def train_on_ranks(folder, ranks):
    """Train, and write down what was logged."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kept, strategy = Kept(), DDPStrategy(process_group_backend="gloo")
    monitor = RewardMonitor(folder / "figures")
    trainer = fit(Judge(), monitor, kept=kept, val=2, count=4, devices=ranks, strategy=strategy)
    monitored = {name: value.item() for name, value in trainer.callback_metrics.items()}
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps({"logged": kept.logged, "monitored": monitored}))


def test_metrics_are_exact_over_ranks_of_which_one_has_nothing(tmp_path):
    fork = multiprocessing.get_context("fork")
    assert run_ranks(fork, train_on_ranks, tmp_path, 2, {"ranks": 2}, lambda: False, pause=0.1)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    (logged,) = [metrics for _, metrics in first["logged"] if "train/pairs" in metrics]
    wanted = expected([told(number) for number in (*range(4), *range(1000, 1004))])
    assert logged == pytest.approx({f"train/{name}": value for name, value in wanted.items()}, rel=1e-6, abs=1e-9)
    wanted = {f"val/{name}": value for name, value in expected([told(500), told(501)]).items()}
    for each in (first, second):
        own = {name: value for name, value in each["monitored"].items() if name.startswith("val/")}
        assert own == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    (written,) = (tmp_path / "figures").iterdir()
    assert written.name == "reward-00000004.png"


# Figures ----------------------------------------------------------------------------------------------------


def test_the_figure_shows_every_margin_beside_its_rank_gap():
    reports = [told(number) for number in range(20)]
    tally, wanted = tally_of(*reports), expected(reports)
    figure = RewardMonitor().draw(tally, "Step 3")
    figure.canvas.draw()
    assert figure.get_suptitle() == f"Step 3: 180 pairs, {wanted['accuracy']:.1%} right"
    left, middle, right = figure.axes
    assert sum(bar.get_height() for bar in left.patches) == 180
    drawn = {
        (round(float(line[:, 0].mean())), float(line[0, 1]))
        for lines in middle.collections[:1]
        for line in lines.get_segments()
    }
    right_or_wrong = {
        tuple(colour): bool(line[0, 1] > 0)
        for colour, line in zip(
            np.round(middle.collections[0].get_colors(), 3), middle.collections[0].get_segments(), strict=True
        )
    }
    assert sorted(right_or_wrong.values()) == [False, True]
    pairs = zip(joined(reports, "rank_gap"), joined(reports, "margin"), strict=True)
    assert drawn == {(int(gap), margin) for gap, margin in pairs}
    labels = [label.get_text() for label in middle.get_xticklabels()]
    assert labels[0] == f"1\n{wanted['accuracy/rank_gap_1']:.0%} of 120"
    shares = {
        label.get_text().split(" (")[0]: bar.get_width()
        for label, bar in zip(right.get_yticklabels(), right.patches, strict=True)
    }
    assert shares == pytest.approx({name: wanted[f"accuracy/{name}"] for name in NAMES})


def test_a_validation_without_a_pair_has_no_figure_and_one_without_categories_has(tmp_path):
    fit(Judge(), RewardMonitor(tmp_path), count=2, val=0)
    assert not list(tmp_path.iterdir())
    assert RewardMonitor().draw(RewardTally(), "Step 3") is None
    one = {"1": Ranked(2, 0.0, 0.0, 0.0)}
    figure = draw_rewards(np.zeros(1), np.ones(1), np.array([2]), accuracy=0, rank_gaps=one, categories={}, title="t")
    figure.savefig(tmp_path / "one.png")
    assert imread(tmp_path / "one.png")[..., :3].std() > 0.02
    assert "none is told" in [text.get_text() for text in figure.axes[2].texts]
