"""A sweep in MLflow: a parent that knows what was declared, children that know which cell they are."""

import json

import mlflow
import pytest

from mmrlhf.experiments import running
from mmrlhf.experiments.cells import Account, Task
from mmrlhf.experiments.collect import cells_frame, parent_of

from .standing import Home

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Three cells of which one fails, a baseline, and the test split opened in spite of it."""
    with pytest.MonkeyPatch.context() as patch:
        home = Home(tmp_path_factory.mktemp("tracked"), patch)
        patch.setenv("VERBS_FAIL", "x2-")
        home.uri = f"sqlite:///{home.folder}/mlflow.db"
        home.options |= {"tracking": home.uri, "experiment": "grids", "name": "wk", "axes": {"x": [0, 1, 2]}}
        with pytest.raises(ValueError, match="1 failed"):
            home.sweep(test_split="test", baselines=[{"x": 0}], open_test="despite_failures")
        yield home


@pytest.mark.slow
def test_the_parent_knows_what_was_declared_and_what_became_of_every_cell(tracked):
    record = tracked.read("parent.json")
    parent = parent_of(record["uri"], record["run"])
    assert (parent.name, parent.metric, parent.split, parent.greatest) == ("wk", "world/true", "val", True)
    told = {cell["name"]: cell["status"] for cell in parent.cells}
    assert told == {"x0-seed0": "done", "x1-seed0": "done", "x2-seed0": "failed"} | dict.fromkeys(
        ["x0-seed0-test", "x1-seed0-test"], "done"
    )
    assert parent.selection["selected"] == "x1"
    assert mlflow.MlflowClient(tracked.uri).get_run(record["run"]).info.status == "FAILED"


@pytest.mark.slow
def test_the_runs_are_children_of_the_parent_with_metrics_outcomes_and_tags(tracked):
    client, parent = mlflow.MlflowClient(tracked.uri), tracked.read("parent.json")["run"]
    experiment = client.get_experiment_by_name("grids").experiment_id
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    children = {run.info.run_name: run for run in runs}
    assert sorted(children) == ["x0-seed0", "x1-seed0", "x2-seed0"]
    done = children["x1-seed0"]
    assert done.data.metrics == {"world/true": 1.0, "world/n": 2.0, "test/world/true": -1.0, "test/world/n": 2.0}
    tags = {
        key: value
        for key, value in done.data.tags.items()
        if key.startswith("mmrlhf.") and key[7:] not in ("key", "mark")
    }
    assert tags == {
        "mmrlhf.sweep": "wk",
        "mmrlhf.cell": "x1",
        "mmrlhf.seed": "0",
        "mmrlhf.overrides": '{"x": 1}',
        "mmrlhf.role": "cell",
        "mmrlhf.status": "done",
        "mmrlhf.fraction": "1.0",
        "mmrlhf.test": "done",
    }
    for folder in ("outcomes", "test/outcomes"):
        assert [file.path for file in client.list_artifacts(done.info.run_id, folder)] == [f"{folder}/world.jsonl"]
    assert children["x0-seed0"].data.tags["mmrlhf.role"] == "baseline"
    assert children["x2-seed0"].data.tags["mmrlhf.status"] == "failed"


@pytest.mark.slow
def test_the_cells_can_be_collected(tracked):
    record = tracked.read("parent.json")
    frame = cells_frame(record["uri"], record["run"]).set_index("name")
    assert frame.loc["x1-seed0", "world/true"] == 1.0
    assert frame.loc["x2-seed0", "status"] == "failed"


def test_a_failure_is_written_down_before_anybody_is_told(tmp_path, monkeypatch):
    home = Home(tmp_path, monkeypatch)
    monkeypatch.setenv("VERBS_FAIL", "x1-")
    with pytest.raises(ValueError, match="1 failed"):
        home.sweep(axes={"x": [1]})
    folder = home.out / "cells" / "x1-seed0"
    told = json.loads((folder / "task.json").read_text()) | {"tracked": True}
    (folder / "task.json").write_text(json.dumps(told))
    (folder / "run" / "mlflow.json").touch()
    seen = []
    monkeypatch.setattr(
        "mmrlhf.tracked.log_outcomes", lambda *words, under: seen.append((*words, Account.read(folder).status))
    )
    assert not running.run_cell(folder)
    [(run, metrics, files, tags, status)] = seen
    assert (run, metrics, files, status) == (folder / "run", {}, [], "failed")
    assert (tags["mmrlhf.status"], tags["mmrlhf.cell"], tags["mmrlhf.overrides"]) == ("failed", "x1", '{"x": 1}')


def test_a_finished_cell_tells_its_metrics_and_outcomes_and_those_of_the_test_split_by_its_name(tmp_path, monkeypatch):
    home = Home(tmp_path, monkeypatch)
    home.sweep(axes={"x": [1]}, test_split="test")
    seen = {}
    monkeypatch.setattr(
        "mmrlhf.tracked.log_outcomes", lambda run, *words, under: seen.setdefault(run, []).append((*words, under))
    )
    for name in ("x1-seed0", "x1-seed0-test"):
        folder = home.out / "cells" / name
        (folder / "cell.json").unlink()
        task = json.loads((folder / "task.json").read_text()) | {"tracked": True}
        (folder / "task.json").write_text(json.dumps(task))
        assert running.run_cell(folder)
    [(metrics, files, tags, under), (opened, opened_files, opened_tags, opened_under)] = seen[
        home.out / "cells" / "x1-seed0" / "run"
    ]
    assert (metrics, opened) == (
        {"world/true": 1.0, "world/n": 2.0},
        {"test/world/true": -1.0, "test/world/n": 2.0},
    )
    assert [[file.name for file in several] for several in (files, opened_files)] == [["world.jsonl"]] * 2
    assert (under, opened_under) == ("outcomes", "test/outcomes")
    assert all(file.exists() for file in (*files, *opened_files))
    assert (tags["mmrlhf.role"], tags["mmrlhf.status"], tags["mmrlhf.seed"]) == ("cell", "done", "0")
    assert opened_tags == {"mmrlhf.test": "done"}


def test_what_mlflow_cannot_be_told_is_a_failure_and_not_a_finished_cell(tmp_path, monkeypatch):
    """The account is written last: a cell that is done has told all."""
    home = Home(tmp_path, monkeypatch)
    home.sweep(axes={"x": [1]})
    folder = home.out / "cells" / "x1-seed0"
    (folder / "cell.json").unlink()
    told = json.loads((folder / "task.json").read_text()) | {"tracked": True}
    (folder / "task.json").write_text(json.dumps(told))
    seen = []

    def refuse(*_, **__):
        seen.append(Account.read(folder).status)
        raise ValueError("the tracker has another run")

    monkeypatch.setattr("mmrlhf.tracked.log_outcomes", refuse)
    assert not running.run_cell(folder)
    assert seen == ["running"]
    assert Account.read(folder).error == "the tracker has another run"
    assert Task.read(folder).tracked
