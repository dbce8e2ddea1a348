"""What is chosen, by what was declared before; the test split is opened once, and the record says when and for whom.

The metric of `verbs.py` is x + 0.01 * seed on val and its negative on test: who looked there would choose otherwise.
"""

import json

import pytest
from scipy import stats as independent

from mmrlhf.experiments import selection
from mmrlhf.experiments.cells import Account
from mmrlhf.experiments.promotion import Candidate, best, candidates, compared, rank_correlations

from .standing import Home


@pytest.fixture
def home(tmp_path, monkeypatch):
    home = Home(tmp_path, monkeypatch)
    home.options |= {"axes": {"x": [0, 1, 2], "k": [1]}, "void": {"k": {"x": 0}}, "test_split": "test"}
    return home


def opened_for(home):
    return [line.removeprefix("test ") for line in home.said("test ")]


def account(cell, seed, value, status="done"):
    metrics = None if value is None else {"m": value}
    return Account(f"{cell}-seed{seed}", cell, {}, seed, "cell", 1.0, status, metrics=metrics, error=None)


def test_the_test_split_is_opened_once_for_the_selected_cell_and_the_baselines_and_the_record_says_so(home):
    home.sweep(seeds=2)
    assert sorted(opened_for(home)) == [f"{cell}-seed{seed}-test" for cell in ("x0", "x2-k1") for seed in (0, 1)]
    first = next(place for place, line in enumerate(home.said()) if line.startswith("test"))
    assert all(line.startswith("test") for line in home.said()[first:])
    account = home.account("x2-k1-seed1-test")
    assert (account.role, account.cell, account.metrics["world/true"]) == ("test", "x2-k1", -2.01)
    home.sweep(seeds=2)
    assert len(opened_for(home)) == 4
    # The record says what was selected, from what, by what, and when.
    record = home.read("selection.json")
    assert record["selected"] == "x2-k1"
    assert record["baselines"] == ["x0"]
    assert (record["metric"], record["greatest"], record["split"]) == ("world/true", True, "val")
    assert (record["test_split"], record["test_opened_before"], record["excluded"]) == ("test", False, {})
    assert record["candidates"][1] == {"cell": "x1-k1", "mean": pytest.approx(1.005), "seeds": {"0": 1.0, "1": 1.01}}
    assert record["opened"].startswith("20")


def test_the_least_is_best_where_that_was_declared(home):
    home.sweep(greatest=False, baselines=[{"x": 1}])
    assert home.read("selection.json")["selected"] == "x0"
    assert sorted(opened_for(home)) == ["x0-seed0-test", "x1-k1-seed0-test"]


def test_a_sweep_that_grows_after_the_opening_says_so_and_leaves_the_first_record(home):
    home.sweep()
    first = (home.out / "selection.json").read_bytes()
    home.sweep(axes={"x": [0, 1, 2, 3], "k": [1]})
    assert (home.out / "selection.json").read_bytes() == first
    second = home.read("selection-2.json")
    assert (second["selected"], second["test_opened_before"]) == ("x3-k1", True)
    assert opened_for(home) == ["x0-seed0-test", "x2-k1-seed0-test", "x3-k1-seed0-test"]
    assert [path.name for path in selection.records(home.out)] == ["selection.json", "selection-2.json"]
    home.sweep(axes={"x": [0, 1, 2, 3], "k": [1]})
    assert len(selection.records(home.out)) == 2


def test_the_same_cells_in_another_order_are_the_same_selection(home):
    home.sweep(baselines=[{"x": 1}, {"x": 2}])
    home.sweep(baselines=[{"x": 1}, {"x": 2}], axes={"x": [2, 1, 0], "k": [1]})
    assert [path.name for path in selection.records(home.out)] == ["selection.json"]


def test_who_asks_for_fewer_cells_later_does_not_choose_among_fewer(home):
    home.sweep()
    home.sweep(axes={"x": [0, 1], "k": [1]})
    assert [path.name for path in selection.records(home.out)] == ["selection.json"]
    assert home.read("selection.json")["selected"] == "x2-k1"


def test_a_selection_that_was_killed_before_its_tests_goes_on_with_them(home):
    home.sweep()
    for path in home.out.glob("cells/*-test/cell.json"):
        path.unlink()
    first = (home.out / "selection.json").read_bytes()
    home.sweep()
    assert (home.out / "selection.json").read_bytes() == first
    assert opened_for(home) == ["x0-seed0-test", "x2-k1-seed0-test"] * 2


def test_while_something_has_failed_the_test_split_stays_closed_unless_that_was_allowed(home, monkeypatch):
    monkeypatch.setenv("VERBS_FAIL", "x2-k1-seed1")
    with pytest.raises(ValueError, match="1 failed"):
        home.sweep(seeds=2)
    assert opened_for(home) == []
    assert not (home.out / "selection.json").exists()
    with pytest.raises(ValueError, match="1 failed"):
        home.sweep(seeds=2, open_test="despite_failures")
    record = home.read("selection.json")
    assert record["selected"] == "x1-k1"  # one seed of x2 is not its mean
    assert list(record["excluded"]) == ["x2-k1"]
    assert "the loss is not a number" in record["excluded"]["x2-k1"]


def test_the_test_split_can_be_left_closed(home):
    home.sweep(open_test="never")
    assert opened_for(home) == []
    assert not (home.out / "selection.json").exists()


def test_a_combination_counts_with_all_its_seeds_or_not_at_all():
    told = [account("a", 1, 3.0), account("a", 0, 1.0), account("b", 0, 9.0), account("b", 1, None, "failed")]
    found, excluded = candidates(told, "m")
    assert found == [Candidate("a", {0: 1.0, 1: 3.0})]
    assert found[0].mean == 2.0
    assert list(excluded) == ["b"]


def test_the_mean_over_seeds_decides_and_of_equals_the_first():
    found = [Candidate("a", {0: 9.0, 1: 0.0}), Candidate("b", {0: 5.0, 1: 5.0}), Candidate("c", {0: 5.0, 1: 5.0})]
    assert [each.cell for each in best(found, 2, True)] == ["b", "c"]
    assert [each.cell for each in best(found, 2, False)] == ["a", "b"]


@pytest.mark.parametrize(
    ("small", "whole"),
    [([1, 2, 3, 4], [2, 1, 4, 3]), ([1.0, 1.0, 2.0, 5.0, 4.0], [0.1, 0.3, 0.3, 0.2, 0.9]), ([3, 2], [1, 2])],
)
def test_rank_correlations_are_those_of_scipy(small, whole):
    found = rank_correlations(small, whole)
    assert found["kendall"] == pytest.approx(independent.kendalltau(small, whole).statistic)
    assert found["spearman"] == pytest.approx(independent.spearmanr(small, whole).statistic)


def test_without_two_different_values_there_is_no_correlation():
    for small, whole in (([], []), ([1], [2]), ([1, 1], [1, 2]), ([1, 2], [3, 3])):
        assert rank_correlations(small, whole) == {"kendall": None, "spearman": None}


def test_a_comparison_takes_what_is_done_on_both():
    small = {cell: Candidate(cell, {0: value}) for cell, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    whole = {cell: Candidate(cell, {0: value}) for cell, value in (("c", 7.0), ("a", 9.0))}
    told = compared(small, whole)
    assert told["cells"] == [{"cell": "c", "fraction": 3.0, "whole": 7.0}, {"cell": "a", "fraction": 1.0, "whole": 9.0}]
    assert (told["kendall"], told["spearman"]) == (-1.0, -1.0)


def test_the_best_on_a_fraction_and_the_baselines_are_trained_on_all_data_and_chosen_from_there(home):
    # On a fraction x = 2 gets 3.5 and stands before 3, on all data 2.
    home.sweep(axes={"x": [0, 1, 2, 3], "k": [1]}, fraction=0.2, promote=2)
    assert home.account("x2-k1-seed0").metrics["world/true"] == 3.5
    full = [name for name in home.trained() if name.endswith("-full")]
    assert full == ["x0-seed0-full", "x2-k1-seed0-full", "x3-k1-seed0-full"]
    promoted = home.account("x3-k1-seed0-full")
    assert (promoted.role, promoted.fraction, promoted.metrics["world/true"]) == ("promoted", 1.0, 3.0)
    commands = {path.parent.name: json.loads(path.read_text())["train"] for path in home.out.glob("cells/*/task.json")}
    assert "--trainer.limit_train_batches=0.2" in commands["x3-k1-seed0"]
    assert not any("limit_train_batches" in word for word in commands["x3-k1-seed0-full"])
    told = home.read("promotion.json")
    assert {row["cell"]: (row["fraction"], row["whole"]) for row in told["cells"]} == {
        "x0": (0.0, 0.0),
        "x2-k1": (3.5, 2.0),
        "x3-k1": (3.0, 3.0),
    }
    assert told["kendall"] == pytest.approx(independent.kendalltau([0, 3.5, 3], [0, 2, 3]).statistic)
    record = home.read("selection.json")
    assert (record["selected"], record["fraction"]) == ("x3-k1", 1.0)
    assert opened_for(home) == ["x0-seed0-full-test", "x3-k1-seed0-full-test"]
    before = home.said()
    home.sweep(axes={"x": [0, 1, 2, 3], "k": [1]}, fraction=0.2, promote=2)
    assert home.said() == before
