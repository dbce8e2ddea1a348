"""`mmrlhf runs` lists what MLflow has, compares it, and sends what waited."""

import json
import re

import pytest
from mlflow import MlflowClient
from rich.console import Console

from mmrlhf import cli
from mmrlhf.experiments import runs as verb
from mmrlhf.experiments.runs import differing, in_order, kept_runs, listing, named, short, side_by_side, usual
from mmrlhf.tracked import Tracked, end_run, log_outcomes, parent_run

from ..tracking import empty_database

CELLS = {"w0": ("0.0", 0.5, 7.0), "w1": ("0.5", 0.75, 8.0), "w2": ("1.0", float("nan"), 9.0)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A sweep of three cells and a run of its own, in two experiments of one database."""
    home = tmp_path_factory.mktemp("runs")
    uri = empty_database(home)
    parent = parent_run(home / "sweep", uri, "grid", "wk", {"metric": "world/true", "split": "val"})
    for name, (w, true, seconds) in CELLS.items():
        out = home / "sweep" / name
        out.mkdir()
        run = Tracked.begin(out, uri, "grid", name, {"mlflow.parentRunId": parent})
        run.put({"params": {"model.beta.init_args.w": w, "model.loss.class_path": "a.b.Sigmoid", "run.seed": 0}})
        log_outcomes(out, {"val/world/true": true, "ledger/device_seconds": seconds, "same": 1.0}, [], {})
        end_run(out, "FAILED" if name == "w2" else "FINISHED")
    (home / "own").mkdir()
    run = Tracked.begin(home / "own", uri, "other", "own [x]", {})
    run.put({"params": {"model.beta.init_args.w": "0.25", "run.seed": 0}})
    run.flush()
    return home


@pytest.fixture
def uri(home):
    return f"sqlite:///{home}/mlflow.db"


def text_of(table):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def lines_of(table):
    """The words of every line of a table's body."""
    return [re.split(r"  +", line.strip()) for line in text_of(table).split("─\n")[1].splitlines()]


def test_children_stand_below_their_parent_and_have_its_metric_and_what_they_differ_in(uri):
    found = kept_runs(uri)
    assert [(depth, run.name) for depth, run in in_order(found, None, False)] == [
        (0, "wk"),
        (1, "w0"),
        (1, "w1"),
        (1, "w2"),
        (0, "own [x]"),
    ]
    assert usual(found) == ["val/world/true", "ledger/device_seconds"]
    text = text_of(listing(in_order([run for run in found if run.name != "own [x]"], None, False), usual(found)))
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    heads = r"^ *run +id +status +started +seconds +w +val/world/true +ledger/device_seconds *$"
    assert re.search(heads, text, re.MULTILINE)
    assert rows["w1"][2] == "FINISHED"
    assert rows["w1"][-3:] == ["0.5", "0.75", "8"]
    assert rows["w2"][2] == "FAILED"
    assert rows["w2"][-3:] == ["1.0", "nan", "9"]
    assert rows["wk"][2] == "RUNNING"
    assert len(rows["wk"]) == 5
    indent = {line.split()[0]: len(line) - len(line.lstrip()) for line in text.splitlines() if line.split()}
    assert indent["w1"] == indent["wk"] + 2


def test_what_is_listed_is_what_mlflow_has(uri, home):
    found = {run.name: run for run in kept_runs(uri)}
    for name in CELLS:
        there = MlflowClient(uri).get_run(json.loads((home / "sweep" / name / "mlflow.json").read_text())["run"])
        run = found[name]
        assert (run.id, run.status, run.parent) == (there.info.run_id, there.info.status, found["wk"].id)
        assert run.params == there.data.params
        assert run.seconds == (there.info.end_time - there.info.start_time) / 1000
        assert str(run.metrics) == str(there.data.metrics)
    assert found["wk"].seconds is None


def test_runs_are_sorted_by_a_metric_or_a_parameter_and_those_without_come_last(uri):
    found = kept_runs(uri)

    def order(*given):
        return [run.name for _, run in in_order(found, *given)]

    assert order("val/world/true", True) == ["wk", "w1", "w0", "w2", "own [x]"]
    assert order("val/world/true", False) == ["wk", "w0", "w1", "w2", "own [x]"]
    assert order("model.beta.init_args.w", True) == ["own [x]", "wk", "w2", "w1", "w0"]
    assert order("metric", False)[0] == "wk"
    with pytest.raises(ValueError, match="expected a metric or parameter of these runs, got 'wrong'"):
        order("wrong", False)


def test_numbers_are_not_sorted_as_words(uri):
    three = zip(kept_runs(uri)[1:4], ("10", "9", "1e1.5"), strict=True)
    found = [run._replace(params={"n": n}, parent=None) for run, n in three]
    assert [run.params["n"] for _, run in in_order(found[:2], "n", False)] == ["9", "10"]
    assert [run.params["n"] for _, run in in_order(found, "n", False)] == ["10", "1e1.5", "9"]


def test_two_runs_side_by_side_show_what_differs_and_count_what_does_not(uri):
    found = {run.name: run for run in kept_runs(uri)}
    text = text_of(side_by_side([found["w0"], found["w1"]]))
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    assert rows["model.beta.init_args.w"] == ["0.0", "0.5"]
    assert rows["val/world/true"] == ["0.5", "0.75"]
    assert "run.seed" not in rows
    assert "same" not in rows
    assert "2 parameters and 1 metrics are equal" in text
    lone = text_of(side_by_side([found["w0"], found["own [x]"]]))
    assert re.search(r"val/world/true +0.5 +-", lone)
    assert "own [x]" in lone
    with pytest.raises(ValueError, match="expected two runs or more, got 1"):
        side_by_side([found["w0"]])


def test_a_run_is_found_by_the_beginning_of_its_id_or_by_its_name_and_only_if_it_is_one(uri):
    found = kept_runs(uri)
    assert named(found, found[2].id[:12]) == found[2]
    assert named(found, "w1").name == "w1"
    for name in ("", "nobody"):
        with pytest.raises(ValueError, match=f"run '{name}': expected one whose id begins so"):
            named(found, name)


def test_short_names_are_still_told_apart():
    assert short(["a.b.c", "x.b.c", "seed"]) == {"a.b.c": "a.b.c", "x.b.c": "x.b.c", "seed": "seed"}
    assert differing([]) == []


def test_on_the_command_line(uri, home, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def said(*words):
        code = cli.main(["runs", "--tracking", uri, *words])
        told = capsys.readouterr()
        return code, told.out + told.err

    code, text = said("--parent", "wk", "--metric", "same,val/world/true", "--sort", "same")
    assert code == 0
    assert "4 runs" in text
    assert "own" not in text
    assert re.search(r"same +val/world/true", text)
    assert "5 runs" in said("--metric", "[same]")[1]
    assert "1 runs" in said("--experiment", "other")[1]
    assert "different" in said("--compare", "w0,w1")[1]
    assert "different" in said("--compare", "[w0, w1]")[1]
    assert said("--experiment", "none")[1].endswith("expected one of Default, grid, other, got 'none'\n")
    before = sorted(home.iterdir())
    code = cli.main(["runs", "--tracking", f"sqlite:///{home}/absent.db"])
    assert (code, sorted(home.iterdir())) == (2, before)
    assert "absent.db: no such database" in capsys.readouterr().err
    assert cli.main(["runs", "--tracking", "http://ann:walrus@127.0.0.1:1"]) == 2
    told = capsys.readouterr().err
    assert "the tracker does not answer" in told
    assert "walrus" not in told


def test_flush_sends_what_waits_in_all_runs_of_a_folder(tmp_path, capsys, home, uri):
    database, away = home / "mlflow.db", home / "away.db"
    database.rename(away)
    for name in ("w0", "w1"):
        Tracked.of(home / "sweep" / name).put({"metrics": {"late": 1.0}, "step": 0})
    assert cli.main(["runs", "--flush", str(home / "sweep")]) == 2
    assert "the tracker does not answer" in capsys.readouterr().err
    away.rename(database)
    assert cli.main(["runs", "--flush", str(home / "sweep")]) == 0
    assert {run.name for run in kept_runs(uri) if "late" in run.metrics} == {"w0", "w1"}
    assert cli.main(["runs", "--flush", str(tmp_path)]) == 2
    assert "expected the folder of a run or a sweep with tracking.spool" in capsys.readouterr().err


def test_more_runs_than_a_page_holds_are_all_listed(uri, monkeypatch):
    expected = [run.id for run in kept_runs(uri)]
    monkeypatch.setattr(verb, "_PAGE", 2)
    assert sorted(run.id for run in kept_runs(uri)) == sorted(expected)
    assert len(expected) == 5
