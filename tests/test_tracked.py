"""The run of a folder is one run, under one parent, in one experiment; and no tracker stops or delays the work."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Param

from mmrlhf import tracked, tracker
from mmrlhf.tracked import Sender, Tracked, end_run, ending, log_outcomes, parent_run
from mmrlhf.tracker import Unreachable, absolute, metric_name

from .tracking import Hanging, Server

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A folder in which four processes at once made a database, whose making takes seconds; the other tests copy it."""
    folder = tmp_path_factory.mktemp("fresh")
    at_once(folder, f"sqlite:///{folder}/deeper/mlflow.db", "many")
    return folder


@pytest.fixture
def uri(fresh, tmp_path):
    shutil.copy(fresh / "deeper" / "mlflow.db", tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture(scope="module")
def server(fresh, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(fresh / "deeper" / "mlflow.db", folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        found = Server(patch, folder / "mlflow.db", folder / "artifacts")
        yield found
        found.stop()


def begin_all(folder, uri, experiment, number, parent):
    """In a process of its own: a sweep's parent and a child of it, at the same moment as others."""
    parent = parent or parent_run(folder / f"sweep-{number}", uri, experiment, f"sweep-{number}", {})
    (folder / str(number)).mkdir()
    run = Tracked.begin(folder / str(number), uri, experiment, f"run-{number}", {"mlflow.parentRunId": parent})
    for step in range(20):
        run.put({"metrics": {"x": step}, "step": step})
    end_run(folder / str(number), "FINISHED")


def at_once(folder, uri, experiment, parent=None):
    processes = [FORK.Process(target=begin_all, args=(folder, uri, experiment, number, parent)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4


def begun(folder, uri, name="n", **tags):
    folder.mkdir(parents=True, exist_ok=True)
    return Tracked.begin(folder, uri, "e", name, tags)


def run_of(uri, folder):
    return MlflowClient(uri).get_run(json.loads((folder / "mlflow.json").read_text())["run"])


def runs_in(uri, experiment="e"):
    client = MlflowClient(uri)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def history(uri, run, name):
    return [(each.step, each.value) for each in MlflowClient(uri).get_metric_history(run, name)]


# One run, one experiment --------------------------------------------------------------------------------------


def test_four_processes_at_once_on_a_fresh_database_make_one_experiment_with_all_their_runs(fresh):
    uri = f"sqlite:///{fresh}/deeper/mlflow.db"
    client = MlflowClient(uri)
    assert {each.name for each in client.search_experiments()} == {"Default", "many"}
    assert client.get_experiment_by_name("many").artifact_location == f"{fresh}/deeper/mlartifacts"
    runs = {run.info.run_name: run for run in runs_in(uri, "many")}
    assert set(runs) == {f"{kind}-{number}" for kind in ("sweep", "run") for number in range(4)}
    for number in range(4):
        child = runs[f"run-{number}"]
        assert child.data.tags["mlflow.parentRunId"] == runs[f"sweep-{number}"].info.run_id
        assert child.info.status == "FINISHED"
        assert history(uri, child.info.run_id, "x") == [(step, float(step)) for step in range(20)]


def test_children_from_several_processes_stand_under_one_parent_on_a_server(server, tmp_path):
    parent = parent_run(tmp_path / "sweep", server.uri, "e", "sweep", {"metric": "x"})
    at_once(tmp_path, server.uri, "e", parent)
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("e").experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert {run.info.run_name for run in found} == {f"run-{number}" for number in range(4)}
    assert client.get_run(parent).info.experiment_id == experiment


def test_another_process_that_makes_the_experiment_first_is_no_error(uri, monkeypatch):
    other = MlflowClient(uri)
    seen = other.create_experiment("e")
    client = tracker.client_of(uri)
    monkeypatch.setattr(tracker, "client_of", lambda _: client)
    found = client.get_experiment_by_name
    late = iter([None])
    monkeypatch.setattr(client, "get_experiment_by_name", lambda name: next(late, found(name)))
    assert tracker.made(uri, "e")[1] == seen


def test_a_sweep_that_is_run_again_has_the_same_parent_and_its_plain_settings(uri, tmp_path):
    settings = {"metric": "x", "greatest": True, "tracking": uri, "axes": {"w": [0, 1]}, "out": Path("a/b")}
    one = parent_run(tmp_path / "s", uri, "e", "sweep", settings)
    end_run(tmp_path / "s", "FINISHED")
    assert parent_run(tmp_path / "s", uri, "e", "sweep", settings) == one
    assert json.loads((tmp_path / "s" / "parent.json").read_text()) == {"uri": uri, "run": one}
    client = MlflowClient(uri)
    run = client.get_run(one)
    assert (run.data.params, run.info.status) == ({"metric": "x", "greatest": "True", "out": "a/b"}, "RUNNING")
    kept = Path(client.download_artifacts(one, "sweep.yaml")).read_text()
    assert "axes:\n  w:\n  - 0\n  - 1\n" in kept
    (tmp_path / "cells.json").write_text("[1]")
    end_run(tmp_path / "s", "FINISHED", [tmp_path / "cells.json"])
    assert Path(client.download_artifacts(one, "cells.json")).read_text() == "[1]"


def test_a_run_that_is_continued_keeps_its_id_and_its_status_is_true_at_every_time(uri, tmp_path):
    seen = []
    for outcome in (KeyboardInterrupt, ValueError, SystemExit, None):
        run = begun(tmp_path / "r", uri)
        run.flush()
        seen.append((run.run, run_of(uri, tmp_path / "r").info.status))
        try:
            with ending(tmp_path / "r", uri, ()):
                if outcome:
                    raise outcome
        except (KeyboardInterrupt, ValueError, SystemExit):
            pass
        seen.append((run.run, run_of(uri, tmp_path / "r").info.status))
    assert {run for run, _ in seen} == {seen[0][0]}
    statuses = [status for _, status in seen]
    assert statuses == ["RUNNING", "KILLED", "RUNNING", "FAILED", "RUNNING", "KILLED", "RUNNING", "FINISHED"]
    assert len(runs_in(uri)) == 1
    info = run_of(uri, tmp_path / "r").info
    assert info.start_time <= info.end_time <= time.time() * 1000


def begin_and_die(folder, uri, when):
    """In a process of its own, which a signal ends at the worst moment."""
    made = tracker.new_run if when == "before" else tracked.new_run

    def dies(*given):
        if when == "after":
            made(*given)
        os.kill(os.getpid(), signal.SIGKILL)

    tracked.new_run = dies
    run = begun(folder, uri)
    run.put({"metrics": {"x": 1.0}, "step": 0})
    run.send()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_while_the_run_is_made_leaves_one_run_with_all_that_was_said(uri, tmp_path, when):
    process = FORK.Process(target=begin_and_die, args=(tmp_path / "r", uri, when))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert json.loads((tmp_path / "r" / "mlflow.json").read_text())["run"] is None
    run = begun(tmp_path / "r", uri)
    run.send()
    assert [each.info.run_id for each in runs_in(uri)] == [run.run]
    assert history(uri, run.run, "x") == [(0, 1.0)]


def test_a_kill_before_the_folder_knows_its_run_loses_nothing(uri, tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as planted:
        planted.setattr(tracked, "write_json", dies)
        with pytest.raises(KeyboardInterrupt):
            begun(tmp_path / "r", uri)
    run = begun(tmp_path / "r", uri)
    run.send()
    assert [each.info.run_id for each in runs_in(uri)] == [run.run]


def test_another_tracker_than_that_of_the_folder_is_refused(uri, tmp_path):
    begun(tmp_path / "r", uri)
    with pytest.raises(ValueError, match=f"kept at {uri}, got sqlite:///{tmp_path}/other.db; say the former"):
        begun(tmp_path / "r", f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(ValueError, match=r"expected the folder of a run with mlflow.json or parent.json"):
        Tracked.of(tmp_path)


def test_the_address_of_a_database_does_not_depend_on_the_folder_and_nonsense_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("sqlite:///a/b.db?x=1") == f"sqlite:///{tmp_path}/a/b.db?x=1"
    for uri in ("http://h:1", "https://h", "postgresql+psycopg2://h/x", "databricks", f"sqlite:///{tmp_path}/c.db"):
        assert absolute(uri) == uri
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    for uri in ("mlruns", "sqlite://", "sqlite:///", "sqlite:a.db", "file:mlruns", "ftp://a:secret1@h"):
        with pytest.raises(ValueError, match="expected a database or a server, such as") as told:
            absolute(uri)
        assert "secret1" not in str(told.value)


# What is said -------------------------------------------------------------------------------------------------


def test_values_that_are_no_numbers_arrive_as_mlflow_keeps_them(uri, tmp_path):
    run = begun(tmp_path / "r", uri)
    values = {"nan": float("nan"), "inf": float("inf"), "low": float("-inf"), "nll_per_token": 0.1}
    run.put({"metrics": values, "step": 3})
    run.send()
    direct = MlflowClient(uri).create_run("0").info.run_id
    for name, value in values.items():
        MlflowClient(uri).log_metric(direct, name, value, step=3)
    for name in values:
        assert str(history(uri, run.run, name)) == str(history(uri, direct, name))


def test_a_parameter_that_changed_stays_as_it_was_and_new_ones_come(uri, tmp_path, caplog):
    run = begun(tmp_path / "r", uri)
    run.put({"params": {"a": "1", "long": "x" * 9000}})
    run.put({"params": {"a": "2", **{f"p{number}": number for number in range(250)}}})
    run.send()
    params = run_of(uri, tmp_path / "r").data.params
    assert (params["a"], len(params), len(params["long"])) == ("1", 252, tracked.LONGEST_PARAM)
    assert not caplog.records


def test_what_mlflow_refuses_for_good_is_told_and_holds_up_nothing(uri, tmp_path, caplog):
    run = begun(tmp_path / "r", uri)
    run.put({"metrics": {"a/../b": 1.0}, "step": 0})
    run.put({"tags": {"t": "1"}})
    run.put({"file": "gone.png", "to": "figures"})
    run.put({"metrics": {"x": 2.0}, "step": 0})
    assert run.flush()
    assert run_of(uri, tmp_path / "r").data.metrics == {"x": 2.0}
    assert run_of(uri, tmp_path / "r").data.tags["t"] == "1"
    assert "MLflow refused metrics, which is left out" in caplog.text
    assert "gone.png: gone before the tracker could be told of it" in caplog.text


def test_names_of_metrics_are_those_that_mlflow_takes(uri, tmp_path):
    names = ["val/beta/Chart é (x)", "a:b", "c\\d", "throughput/x_per-second.1"]
    run = begun(tmp_path / "r", uri)
    run.put({"metrics": {metric_name(name): 1.0 for name in names}, "step": 0})
    run.send()
    assert set(run_of(uri, tmp_path / "r").data.metrics) == {"val/beta/Chart  x", "ab", "cd", names[3]}


def test_metrics_of_outcomes_have_the_names_that_those_of_a_training_would_have(uri, tmp_path):
    begun(tmp_path / "r", uri)
    log_outcomes(tmp_path / "r", {"val/Chart (hard)": 0.5}, [], {})
    assert run_of(uri, tmp_path / "r").data.metrics == {"val/Chart hard": 0.5}


def test_outcomes_told_twice_are_the_same_as_once_and_later_ones_count(uri, tmp_path):
    begun(tmp_path / "r", uri).flush()
    file = tmp_path / "world.jsonl"
    file.write_text('{"item": "a", "correct": true}\n')
    os.utime(file, (1000, 1000))
    for _ in range(2):
        log_outcomes(tmp_path / "r", {"world/true": 0.75}, [file], {"mmrlhf.cell": "w0", "mmrlhf.seed": 0})
    run = run_of(uri, tmp_path / "r")
    assert run.data.tags["mmrlhf.cell"] == "w0"
    assert run.data.tags["mmrlhf.seed"] == "0"
    assert history(uri, run.info.run_id, "world/true") == [(0, 0.75)]
    os.utime(file, (2000, 2000))
    log_outcomes(tmp_path / "r", {"world/true": 0.5}, [file], {})
    assert run_of(uri, tmp_path / "r").data.metrics == {"world/true": 0.5}
    log_outcomes(tmp_path / "r", {}, [file], {}, under="outcomes/test")
    client = MlflowClient(uri)
    assert [each.path for each in client.list_artifacts(run.info.run_id, "outcomes")] == [
        "outcomes/test",
        "outcomes/world.jsonl",
    ]
    assert Path(client.download_artifacts(run.info.run_id, "outcomes/world.jsonl")).read_text() == file.read_text()


# A tracker that is down -------------------------------------------------------------------------------------


def disturbed(folder, uri, break_it, mend):
    """A run of 60 steps whose tracker is away from the 20th on; what it takes longest to say something."""
    run = begun(folder, uri)
    run.flush()
    sender, longest = Sender(run, every=0.01, pause=0.02), 0.0
    for step in range(60):
        if step == 20:
            time.sleep(0.1)
            break_it()
        if step == 40 and mend:
            time.sleep(0.2)
            mend()
        began = time.perf_counter()
        run.put({"metrics": {"x": step / 3, "y": -step}, "step": step})
        longest = max(longest, time.perf_counter() - began)
        time.sleep(0.005)
    sender.stop()
    return longest


def expected(name):
    return [(step, step / 3 if name == "x" else float(-step)) for step in range(60)]


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_database_that_is_away_for_a_while_has_all_in_the_end_after_one_warning(uri, tmp_path, caplog, comes_back):
    path, away = tmp_path / "mlflow.db", tmp_path / "away.db"
    back = lambda: away.rename(path)  # noqa: E731
    with caplog.at_level(logging.INFO, "mmrlhf"):
        disturbed(tmp_path / "r", uri, lambda: path.rename(away), back if comes_back else None)
        if not comes_back:
            end_run(tmp_path / "r", "FINISHED")
            assert f"also by `mmrlhf runs --flush {tmp_path}/r`" in caplog.text
            back()
            Tracked.of(tmp_path / "r").send()
        else:
            end_run(tmp_path / "r", "FINISHED")
            until = time.monotonic() + 5
            while "the tracker answers again" not in caplog.text and time.monotonic() < until:
                time.sleep(0.01)
            assert "the tracker answers again" in caplog.text
    warned = [record for record in caplog.records if "the tracker does not answer" in record.getMessage()]
    assert len(warned) == (1 if comes_back else 2)  # the training's, and that of its end
    run = run_of(uri, tmp_path / "r")
    assert run.info.status == "FINISHED"
    for name in ("x", "y"):
        assert history(uri, run.info.run_id, name) == expected(name)
    assert Tracked.of(tmp_path / "r")._spool.waiting() == 0


def test_a_server_that_is_stopped_and_comes_back_has_all_in_the_end(server, tmp_path):
    disturbed(tmp_path / "r", server.uri, server.stop, server.start)
    end_run(tmp_path / "r", "FINISHED")
    run = run_of(server.uri, tmp_path / "r")
    assert run.info.status == "FINISHED"
    assert history(server.uri, run.info.run_id, "x") == expected("x")


def test_a_server_that_hangs_delays_no_step_and_the_end_by_little(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    hanging = Hanging()
    began = time.perf_counter()
    assert disturbed(tmp_path / "r", hanging.uri, lambda: None, None) < 0.5
    end_run(tmp_path / "r", "FINISHED")
    assert time.perf_counter() - began < 8
    hanging.close()
    assert Tracked.of(tmp_path / "r").is_new
    assert caplog.text.count("the tracker does not answer") == 2
    with pytest.raises(ValueError, match=f"expected {hanging.uri} to answer before a sweep begins, got nothing"):
        parent_run(tmp_path / "s", hanging.uri, "e", "sweep", {})


def test_an_end_waits_only_while_there_is_headway(tmp_path, monkeypatch, caplog):
    run = begun(tmp_path / "r", "http://127.0.0.1:1")
    for step in range(5):
        run.put({"metrics": {"x": step}, "step": step})
    stuck = threading.Event()
    slow = iter([0.05, 0.05, None, 0])

    def sends(rows):
        pause = next(slow)
        stuck.wait(5 if pause is None else pause)

    monkeypatch.setattr(run, "send", lambda: run._spool.drain(sends, at_once=2))
    began = time.perf_counter()
    run.flush(patience=0.2)
    assert 0.3 < time.perf_counter() - began < 2
    assert "the tracker takes too long" in caplog.text
    stuck.set()


def broken(path, how):
    """A place that takes nothing."""
    if how == "a folder":
        path.mkdir()
    elif how == "no database":
        path.write_text("this is no database\n" * 100)
    elif how == "below a file":
        path.parent.write_text("a file")


@pytest.mark.parametrize("how", ["a folder", "no database", "below a file"])
def test_a_database_that_cannot_be_written_is_known_at_once_and_stops_nothing(tmp_path, how, caplog):
    path = tmp_path / "x" / "mlflow.db" if how == "below a file" else tmp_path / "mlflow.db"
    broken(path, how)
    began = time.perf_counter()
    run = begun(tmp_path / "r", f"sqlite:///{path}")
    assert not run.flush()
    with ending(tmp_path / "r", f"sqlite:///{path}", ()):
        run.put({"metrics": {"x": 1.0}, "step": 0})
    assert time.perf_counter() - began < 3
    assert "the work goes on" in caplog.text


def test_a_database_that_was_removed_is_not_made_anew_for_a_run_that_it_had(uri, tmp_path):
    run = begun(tmp_path / "r", uri)
    run.send()
    (tmp_path / "mlflow.db").unlink()
    run.put({"metrics": {"x": 1.0}, "step": 0})
    with pytest.raises(Unreachable, match="no such database"):
        run.send()
    assert not (tmp_path / "mlflow.db").exists()


def test_a_long_outage_is_sent_in_batches_that_mlflow_takes(uri, tmp_path, monkeypatch):
    run = begun(tmp_path / "r", uri)
    for step in range(120):
        run.put({"metrics": {f"m{number}": step for number in range(20)}, "step": step})
    sizes, plain = [], MlflowClient.log_batch

    def counted(client, run_id, metrics=(), params=(), tags=()):
        sizes.append(len(metrics))
        plain(client, run_id, metrics, params, tags)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    run.send()
    assert sizes == [1000, 1000, 400]
    assert history(uri, run.run, "m19") == [(step, float(step)) for step in range(120)]


# Secrets ------------------------------------------------------------------------------------------------------


def test_a_password_in_the_address_is_nowhere_in_the_folder_and_in_no_message(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    hanging = Hanging()
    uri = hanging.uri.replace("//", "//ann:walrus-pass@")
    with caplog.at_level(logging.DEBUG):
        begun(tmp_path / "r", uri).flush()
        with pytest.raises(Unreachable) as raised:
            Tracked.of(tmp_path / "r", uri).send()
    assert "walrus-pass" not in "".join(traceback.format_exception(raised.value))
    assert "the tracker does not answer" in caplog.text
    assert "walrus-pass" not in caplog.text.replace(f"DEBUG    {uri}", "")
    assert not [path for path in (tmp_path / "r").iterdir() if b"walrus-pass" in path.read_bytes()]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert Tracked.of(tmp_path / "r").uri == uri
    assert Tracked.of(tmp_path / "r", hanging.uri).uri == uri
    assert begun(tmp_path / "r", hanging.uri).uri == uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:walrus-pass@another:5000")
    assert Tracked.of(tmp_path / "r").uri == hanging.uri
    assert begun(tmp_path / "r", hanging.uri).uri == hanging.uri
    hanging.close()


def test_a_tag_a_text_and_a_file_reach_the_tracker_without_secrets(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY_TOKEN", "walrus-canary")
    run = begun(tmp_path / "r", uri, "named walrus-canary", t="walrus-canary")
    (tmp_path / "a.jsonl").write_text("walrus-canary and more")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\xff")
    run.put({"params": {"endpoint.key": "walrus-abc", "walrus-canary": 1}})
    run.put({"text": "a walrus-canary", "path": "a.txt"})
    run.put({"dict": {"endpoint": {"key": "walrus-abc"}}, "path": "a.yaml"})
    log_outcomes(tmp_path / "r", {}, [tmp_path / "a.jsonl", tmp_path / "a.png"], {"u": "walrus-canary"})
    folder = tmp_path / "mlartifacts" / run.run / "artifacts"
    assert (folder / "outcomes" / "a.jsonl").read_text() == "*** and more"
    assert (folder / "outcomes" / "a.png").read_bytes() == b"\x89PNG\xff"
    assert (folder / "a.txt").read_text() == "a ***"
    assert (folder / "a.yaml").read_text() == "endpoint:\n  key: '***'\n"
    (tmp_path / "a.jsonl").unlink()
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and b"walrus" in path.read_bytes()]
    assert holding == []


def test_parameters_that_mlflow_has_from_elsewhere_are_no_conflict(uri, tmp_path):
    run = begun(tmp_path / "r", uri)
    run.send()
    MlflowClient(uri).log_batch(run.run, params=[Param("a", "other")])
    run.put({"params": {"a": "mine", "b": "1"}})
    run.send()
    assert run_of(uri, tmp_path / "r").data.params == {"a": "other", "b": "1"}
