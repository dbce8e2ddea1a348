"""No run of a sweep is lost: it stands in the grid, or it is listed with the reason why not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mmrlhf.experiments.choosing import choose, two_axes

from .swept import METRIC, K, W, sweep, used_of

RUNS = sweep(ws=(0.5, 1.0), ks=(1.0, 2.0), seeds=(0, 1), items=20, failed=None)


def frame(*more, **changes) -> pd.DataFrame:
    """The runs, and some more that differ from the last one."""
    found = used_of(RUNS)
    last = found.iloc[[-1]]
    extra = [last.assign(run=f"x{place}", name=f"x{place}", **each) for place, each in enumerate(more)]
    found = pd.concat([found, *extra], ignore_index=True).assign(**changes)
    found.attrs["axes"] = (W, K)
    return found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"status": "failed"}, "failed"),
        ({"status": "running"}, "unfinished"),
        ({"status": "running", "role": None}, "unfinished"),
        ({"status": "done", "role": None}, "unfinished"),
        ({"status": "not in MLflow"}, "not_in_mlflow"),
        ({"role": "promoted"}, "promoted"),
        ({"role": "test"}, "test"),
        ({"role": "test", "status": "not in MLflow"}, "test"),
        ({"role": "promoted", "status": "failed"}, "failed"),
        ({METRIC: np.nan}, "no_metric"),
    ],
)
def test_a_run_that_cannot_stand_in_the_grid_is_listed_with_its_reason(change, reason):
    found = choose(frame(change), METRIC, errors={"x0": "its last words"})
    assert found.excluded[["name", "reason", "error"]].values.tolist() == [["x0", reason, "its last words"]]
    assert len(found.used) == len(RUNS)
    assert found.ledger.as_dict() | {"first": 0} == {
        "stage": "runs",
        "in": len(RUNS) + 1,
        "out": len(RUNS),
        "skipped": {reason: 1},
        "first": 0,
        "fixed": {},
    }


def test_of_two_runs_of_one_cell_and_seed_the_newer_one_counts():
    again = frame({"started": 5}, {"started": 9}, {"started": 1})
    again["name"] = again["name"].replace({"x1": "x0", "x2": "x0"})
    found = choose(again, METRIC)
    assert found.used.loc[found.used["name"] == "x0", "run"].tolist() == ["x1"]
    assert sorted(found.excluded["run"]) == ["x0", "x2"]
    assert set(found.excluded["reason"]) == {"superseded"}


def test_a_failed_attempt_before_a_finished_one_is_history():
    again = frame({"status": "failed", "started": 9}, {"started": 1})
    again["name"] = again["name"].replace({"x1": "x0"})
    found = choose(again, METRIC)
    assert found.excluded[["run", "reason"]].values.tolist() == [["x0", "superseded"]]


def test_where_an_axis_is_fixed_the_baseline_stays_for_it_has_no_value():
    found = choose(frame(), METRIC, fix={K: 1.0})
    assert set(found.used["cell"]) == {"w0", "w0.5-k1", "w1-k1"}
    assert found.ledger.skipped == {"not_fixed": 4}
    assert two_axes(found.used, [W, K]) == (None, W)


def test_what_is_unknown_is_refused_with_the_nearest_name():
    with pytest.raises(
        ValueError, match=r"metric: expected one that the runs have, got 'world/tru'; did you mean 'world/true'."
    ):
        choose(frame(), "world/tru")
    with pytest.raises(ValueError, match=r"fix: unknown axis 'model.beta.q'; did you mean 'model.beta.w'."):
        choose(frame(), METRIC, fix={"model.beta.q": 1})
    with pytest.raises(ValueError, match=r"10 skipped .failed 10.: expected at least one finished run with world/true"):
        choose(frame(status="failed"), METRIC)


def test_the_picture_has_the_two_axes_that_vary_in_the_order_of_the_sweep():
    assert two_axes(frame(), [W, K]) == (W, K)
    assert two_axes(frame(), [K, W]) == (K, W)
    assert two_axes(frame().query("cell == 'w0.5-k1'"), [W, K]) == (None, None)


def test_more_than_two_axes_are_refused_and_the_message_says_which_to_fix():
    many = frame()
    many["data.pairs"] = ["all", "adjacent"] * (len(many) // 2)
    with pytest.raises(ValueError, match=r"got 3; fix the others .*: data.pairs \(adjacent, all\)"):
        two_axes(many, [W, K, "data.pairs"])
    assert two_axes(many.query("`data.pairs` == 'all'"), [W, K, "data.pairs"]) == (W, K)
    parts = frame(fraction=[0.2, 1.0] * (len(many) // 2))
    with pytest.raises(ValueError, match=r"fraction \(0.2, 1.0\)"):
        two_axes(parts, [W, K])
