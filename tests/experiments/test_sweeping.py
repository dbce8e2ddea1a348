"""`mmrlhf sweep`: every cell once, in a process of its own; failures stay where they are, and growth redoes nothing."""

import json
import os
import re

import pytest

from mmrlhf.experiments import fleet, launching, publishing, sweeping
from mmrlhf.experiments.design import Training
from mmrlhf.experiments.launching import environment
from mmrlhf.tracked import Tracked

from .standing import Home


@pytest.fixture
def home(tmp_path, monkeypatch):
    return Home(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two combinations with two seeds; tests only add to it, or look."""
    with pytest.MonkeyPatch.context() as patch:
        home = Home(tmp_path_factory.mktemp("finished"), patch)
        home.sweep(seeds=2, max_parallel=2)
        yield home


def test_every_cell_is_trained_and_then_evaluated_on_the_declared_split(finished):
    for name in ("x1-seed0", "x2-seed0", "x1-seed1", "x2-seed1"):
        own = [line for line in finished.said() if line.split()[1] == name]
        assert own[:3] == [f"begin {name}", f"end {name}", f"val {name}"]


def test_an_account_tells_the_cell_and_its_metrics(finished):
    account = finished.account("x2-seed1")
    assert (account.cell, account.overrides, account.seed, account.role) == ("x2", {"x": 2}, 1, "cell")
    assert (account.status, account.fraction, account.error) == ("done", 1.0, None)
    assert account.metrics == {"world/true": 2.01, "world/n": 2.0}
    assert account.seconds > 0
    assert account.started > 1.7e9


def test_the_log_of_a_cell_has_the_words_of_its_commands(finished):
    log = (finished.out / "cells" / "x1-seed0" / "log.txt").read_text()
    assert re.search(r"-m verbs train --config \S+config.yaml --x=1 --run.seed=0 --run.out=\S+x1-seed0/run", log)
    assert "learning rate xxx" in log


def test_an_evaluation_may_take_two_commands_of_which_the_second_reads_what_the_first_wrote(home):
    first = ["copy", "--model", "{model}", "--out", "{out}"]
    home.sweep(evaluate=[first, ["evaluate", "--model", "{before}", "--split", "{split}", "--out", "{out}"]])
    assert home.account("x2-seed0").metrics == {"world/true": 2.0, "world/n": 2.0}
    assert (home.out / "cells" / "x2-seed0" / "evaluation" / "1" / "outcomes" / "world.jsonl").exists()


def test_an_evaluation_without_metrics_is_a_failure(home):
    copy = ["copy", "--model", "{model}", "--out", "{out}"]
    measure = ["evaluate", "--model", "{model}", "--split", "{split}", "--out", "{out}"]
    with pytest.raises(ValueError, match=r"1 failed .*metrics\.json from command 0, found none; it must write to"):
        home.sweep(axes={"x": [1]}, evaluate=[copy, measure])
    assert home.account("x1-seed0").status == "failed"


def test_run_again_nothing_is_made_again(finished):
    before = finished.said()
    accounts = [path.stat().st_mtime_ns for path in sorted(finished.out.glob("cells/*/cell.json"))]
    finished.sweep(seeds=2)
    assert finished.said() == before
    assert [path.stat().st_mtime_ns for path in sorted(finished.out.glob("cells/*/cell.json"))] == accounts


def test_more_values_and_seeds_add_cells_and_redo_none(home):
    home.sweep()
    kept = {name: (home.out / "cells" / name / "cell.json").read_bytes() for name in ("x1-seed0", "x2-seed0")}
    before = home.said()
    home.sweep(axes={"x": [0.5, 1, 2]}, seeds=[1, 0], max_parallel=2)
    assert home.said()[: len(before)] == before
    assert home.trained() == ["x0.5-seed0", "x0.5-seed1", "x1-seed0", "x1-seed1", "x2-seed0", "x2-seed1"]
    assert all((home.out / "cells" / name / "cell.json").read_bytes() == data for name, data in kept.items())


def test_a_value_of_another_type_that_is_the_same_training_is_the_same_cell(home):
    home.sweep(axes={"x": [1]})
    home.sweep(axes={"x": [1.0]})
    assert home.trained() == ["x1-seed0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "world/n"}, "metric 'world/true' instead of 'world/n'"),
        ({"greatest": False}, "greatest True instead of False"),
        ({"split": "train"}, "split 'val' instead of 'train'"),
        ({"test_split": "test"}, "test_split None instead of 'test'"),
        ({"evaluate": [["evaluate", "--split", "{split}", "--model", "{model}", "--out", "{out}"]]}, "evaluate"),
        ({"axes": {"x": [1, 2], "k": [1]}}, re.escape("axes ['x'] instead of ['x', 'k']")),
        ({"fraction": 0.5}, "fraction 1.0 instead of 0.5"),
        ({"baselines": [{"x": 1}]}, "baselines None instead of"),
    ],
)
def test_a_sweep_that_has_begun_stays_what_it_was_declared(finished, changes, message):
    before = finished.said()
    with pytest.raises(ValueError, match=rf"holds a sweep with .*{message}"):
        finished.sweep(**{"seeds": 3} | changes)
    assert finished.said() == before


def test_another_config_of_the_training_is_refused(home):
    home.sweep(axes={"x": [1]})
    (home.folder / "config.yaml").write_text("k: 2.0\n")
    with pytest.raises(ValueError, match=r"holds a sweep with train"):
        home.sweep(axes={"x": [1]}, seeds=2)


def test_a_program_that_reads_the_same_options_otherwise_is_refused(home):
    home.sweep(axes={"x": [1]})
    path = home.out / "cells" / "x1-seed0" / "task.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"digest": "0" * 64}))
    with pytest.raises(ValueError, match=r"x1: expected the settings with which it was begun, got others"):
        home.sweep(axes={"x": [1]}, seeds=2)
    assert home.trained() == ["x1-seed0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {"x": [1, 2], "xx": [1]}}, r"verbs train: unknown option 'xx' \(in the command: train --config"),
        ({"axes": {"x": [1, "two"]}}, "verbs train: x: expected a number, got 'two'"),
        ({"evaluate": [["evaluate", "--model", "{model}", "--out", "{out}"]]}, "required: --split"),
        ({"axes": {"x": [2, "2."]}}, "expected different trainings, got x2 and x2., whose settings are the same"),
        ({"axes": {"x": [1], "run.seed": [0]}}, "axes: run.seed is said by the sweep itself"),
        ({"evaluate": [["evaluate", "{modle}", "{out}", "{run}"]]}, "evaluate.0: expected .* got {modle}"),
        ({"evaluate": [["evaluate", "{model}"]]}, "evaluate.0: expected {out}"),
        ({"evaluate": [["evaluate", "{before}", "{model}", "{out}"]]}, "evaluate.0: expected .*, got {before}"),
        ({"evaluate": [["evaluate", "{model}", "{out}"]], "test_split": "test"}, "{split} where there is a"),
        (
            {"evaluate": [["a", "{model}", "{split}", "{out}"], ["b", "{model}", "{out}"]], "test_split": "test"},
            "evaluate.1: expected {out}, and {model} or {run}, with {split}",
        ),
        ({"evaluate": [["a", "{model}", "{out}"], ["b", "{out}"]]}, "evaluate.1: expected .* or {before} behind"),
        ({"evaluate": []}, "evaluate: expected one command or more"),
        ({"baselines": [{"x": 7}]}, "baselines: expected overrides of a cell, got {'x': 7}"),
        ({"fraction": 0}, "fraction: expected more than 0"),
        ({"promote": 2}, "promote: expected cells on a fraction of the data"),
        ({"max_parallel": 0}, "max_parallel: expected one or more"),
    ],
)
def test_what_is_wrong_fails_before_the_first_training_and_leaves_no_cell(home, changes, message):
    with pytest.raises(ValueError, match=message):
        home.sweep(**changes)
    assert home.said() == []
    assert not (home.out / "cells").exists()


def test_a_sweep_that_was_refused_may_be_corrected_in_the_same_folder(home):
    with pytest.raises(ValueError, match="unknown option 'xx'"):
        home.sweep(axes={"xx": [1]})
    home.sweep(axes={"x": [1]})
    assert home.trained() == ["x1-seed0"]


def test_a_metric_that_mlflow_does_not_take_is_refused_with_one_that_it_takes(home):
    with pytest.raises(ValueError, match=r"got 'world/true \(all\)'; let the evaluation call it 'world/true all'"):
        home.sweep(metric="world/true (all)")
    assert not home.out.exists()


def test_a_training_that_saved_and_left_when_it_was_told_to_has_not_failed_and_goes_on(home, monkeypatch):
    monkeypatch.setenv("VERBS_LEAVE", "x1-")
    with pytest.raises(ValueError, match="x1-seed0: expected to be done, but it was stopped"):
        home.sweep()
    assert (home.account("x1-seed0").status, home.account("x1-seed0").error) == ("stopped", None)
    monkeypatch.delenv("VERBS_LEAVE")
    home.sweep()
    assert home.trained() == ["x1-seed0", "x2-seed0"]


def test_the_account_of_a_cell_that_runs_elsewhere_is_left_as_it_is(home, monkeypatch):
    home.sweep(axes={"x": [1]})
    path = home.out / "cells" / "x1-seed0" / "cell.json"
    told = json.loads(path.read_text())
    for status, left in (("running", True), ("failed", False), ("stopped", False)):
        path.write_text(json.dumps(told | {"status": status}))
        before, seen = path.read_bytes(), []
        monkeypatch.setattr(fleet, "run_local", lambda *_, seen=seen: seen.append(path.read_bytes()) or iter(()))
        with pytest.raises(ValueError, match="expected to be done"):
            home.sweep(axes={"x": [1]}, retry_failed=True)
        assert (seen[0] == before) == left, status
        assert json.loads(seen[0])["status"] == "running"


def test_a_password_of_the_tracker_is_written_nowhere_and_the_cells_know_it(home, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # and put back after the test
    monkeypatch.setattr(sweeping, "parent_run", lambda folder, uri, *_: uri)
    monkeypatch.setattr(publishing, "end_run", lambda *_: None)
    address = "http://ann:walrus-canary@127.0.0.1:9/x?token=walrus-canary"
    home.sweep(axes={"x": [1]}, tracking=address)
    assert home.trained() == ["x1-seed0"]
    files = [path for path in home.out.rglob("*") if path.is_file()]
    assert {"sweep.json", "task.json", "log.txt", "mlflow.json"} <= {path.name for path in files}
    assert not [path for path in files if b"walrus-canary" in path.read_bytes()]
    assert home.read("sweep.json")["settings"]["tracking"] == "http://127.0.0.1:9/x"
    assert Tracked.of(home.out / "cells" / "x1-seed0" / "run").uri == address
    home.sweep(axes={"x": [1]}, tracking=address)


def test_options_of_all_cells_are_given_and_may_be_no_axis(home):
    with pytest.raises(ValueError, match=r"train.overrides: x is an axis"):
        home.sweep(train=Training("train", home.folder / "config.yaml", {"x": 3}))
    home.sweep(axes={"k": [4]}, train=Training("train", home.folder / "config.yaml", {"x": 3.5}))
    assert home.account("k4-seed0").metrics["world/true"] == 3.5


def test_a_cell_that_fails_keeps_its_log_and_does_not_stop_the_others(home, monkeypatch):
    monkeypatch.setenv("VERBS_FAIL", "x1-")
    with pytest.raises(ValueError, match=r"1 failed \(x1-seed0: .*the loss is not a number.*--retry-failed"):
        home.sweep()
    assert home.trained() == ["x2-seed0"]
    failed = home.account("x1-seed0")
    assert failed.status == "failed"
    assert "the loss is not a number" in failed.error
    assert failed.metrics is None
    assert "the loss is not a number" in (home.out / "cells" / "x1-seed0" / "log.txt").read_text()
    accounts = {told["name"]: told["status"] for told in home.read("cells.json")}
    assert accounts == {"x1-seed0": "failed", "x2-seed0": "done"}


def test_a_failed_cell_is_run_again_only_if_that_is_asked_for(home, monkeypatch):
    monkeypatch.setenv("VERBS_FAIL", "x1-")
    with pytest.raises(ValueError, match=r"1 failed"):
        home.sweep()
    monkeypatch.delenv("VERBS_FAIL")
    with pytest.raises(ValueError, match=r"1 failed"):
        home.sweep()
    assert home.said("begin x1-seed0") == ["begin x1-seed0"]
    home.sweep(retry_failed=True)
    assert home.said("begin x1-seed0") == ["begin x1-seed0"] * 2
    assert home.account("x1-seed0").status == "done"
    assert home.trained() == ["x1-seed0", "x2-seed0"]


def test_a_training_that_the_system_kills_has_failed(home, monkeypatch):
    monkeypatch.setenv("VERBS_KILL", "x1-")
    with pytest.raises(ValueError, match=r"1 failed"):
        home.sweep()
    assert "verbs train ended with status -9" in home.account("x1-seed0").error
    assert home.trained() == ["x2-seed0"]


def test_a_metric_that_no_evaluation_gives_is_a_failure_that_names_those_there_are(home):
    with pytest.raises(ValueError, match=r"metric: expected one of world/n, world/true, got 'world/ture'"):
        home.sweep(metric="world/ture", axes={"x": [1]})
    assert home.said("val") == ["val x1-seed0"]


def test_two_evaluations_of_one_metric_are_refused(home):
    [words] = home.options["evaluate"]
    with pytest.raises(ValueError, match=r"expected each metric once, got 'world/n' from two commands"):
        home.sweep(evaluate=[words, words], axes={"x": [1]})
    assert (home.out / "cells" / "x1-seed0" / "evaluation" / "1" / "metrics.json").exists()


def test_an_evaluation_that_failed_is_made_again_without_training_again(home):
    home.sweep(axes={"x": [1]})
    account = home.account("x1-seed0")
    folder = home.out / "cells" / "x1-seed0"
    (folder / "cell.json").write_text(
        json.dumps(
            json.loads((folder / "cell.json").read_text()) | {"status": "failed", "finished": 1, "metrics": None}
        )
    )
    home.sweep(axes={"x": [1]}, retry_failed=True)
    assert home.said() == ["begin x1-seed0", "end x1-seed0", "val x1-seed0", "val x1-seed0"]
    assert (folder / "log.txt").read_text().count("-m verbs train") == 1
    assert home.account("x1-seed0").metrics == account.metrics


def test_a_dry_run_tells_the_plan_and_starts_and_leaves_nothing(home, capsys):
    home.sweep(dry_run=True, seeds=3)
    printed = capsys.readouterr().out
    assert "6 cells" in printed
    assert "to do: 6 cells, time: unknown" in printed
    assert home.said() == []
    assert not home.out.exists()


def test_the_estimate_is_the_mean_of_the_finished_cells_shared_by_those_that_run_at_once(home, capsys):
    home.sweep()
    for name, seconds in (("x1-seed0", 100.0), ("x2-seed0", 500.0)):
        path = home.out / "cells" / name / "cell.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": seconds}))
    capsys.readouterr()
    home.sweep(dry_run=True, seeds=4, max_parallel=2)
    assert "to do: 6 cells, time: 15 min" in capsys.readouterr().out  # 6 * 300 s / 2
    home.sweep(dry_run=True, seeds=4, max_parallel=50)
    assert "to do: 6 cells, time: 5 min" in capsys.readouterr().out
    assert home.trained() == ["x1-seed0", "x2-seed0"]


def test_no_more_cells_run_at_once_than_are_allowed_and_each_has_its_share_of_the_cores(home, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    home.sweep(axes={"x": [1, 2, 3, 4]}, max_parallel=2)
    running, most = 0, 0
    for line in home.said():
        running += line.startswith("begin") - line.startswith("end")
        most = max(most, running)
    assert most <= 2
    assert {line.rsplit(" ", 1)[1] for line in home.log.read_text().splitlines()} == {"4"}


def test_what_is_set_already_is_left_and_gpus_are_shared_out():
    assert environment(0, 2, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
    given = {"CUDA_VISIBLE_DEVICES": "4,5,6"}
    assert [environment(slot, 3, given)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "5", "6"]
    assert environment(1, 2, {"CUDA_VISIBLE_DEVICES": "4"})["CUDA_VISIBLE_DEVICES"] == "4"
    assert "CUDA_VISIBLE_DEVICES" not in environment(1, 2, {})
    assert launching.environment(0, 10**6, {})["OMP_NUM_THREADS"] == "1"


def test_a_folder_that_holds_something_else_is_refused(home):
    home.out.mkdir()
    (home.out / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"expected an empty folder or a sweep"):
        home.sweep()
