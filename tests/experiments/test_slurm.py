"""Cells as jobs: one array, queued again when they are told to leave, followed by whoever runs the sweep next."""

import os
import re
import signal
import sys
import time
from threading import Thread

import pytest

from mmrlhf.experiments import fleet, running, slurm
from mmrlhf.experiments.cells import Account
from mmrlhf.experiments.slurm import Slurm, executor_of, run_slurm

from . import cluster as cluster_of_this_machine
from .standing import HERE, Home, alive, wait_for

pytest.importorskip("submitit")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "_ACCOUNT_COMES", 2.0)
    home = Home(tmp_path, monkeypatch)
    home.options |= {"launcher": "slurm", "slurm": Slurm(poll=0.1)}
    yield home
    home.end(*(int(path.read_text()) for path in tmp_path.glob("cluster/*.pid")))


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster in PATH; the folder in which its jobs are kept."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    monkeypatch.setenv("CLUSTER", str(folder))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    cluster_of_this_machine.HOME = folder
    cluster_of_this_machine.install(folder)
    return folder


def directives(script):
    """The options of a job by name."""
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), re.MULTILINE)
    return {name: value.strip("'") for name, value in found}


def test_all_cells_are_one_array_and_are_done(home, cluster):
    home.sweep(max_parallel=2)
    [script] = cluster.glob("*.sbatch")
    assert directives(script)["array"] == "0-1%2"
    assert home.trained() == ["x1-seed0", "x2-seed0"]
    assert home.account("x2-seed0").metrics["world/true"] == 2.0
    home.sweep(seeds=2)
    assert home.trained() == ["x1-seed0", "x1-seed1", "x2-seed0", "x2-seed1"]


def test_the_job_asks_for_what_the_config_says(home, cluster):
    asked = Slurm("gpu", 90, 2, 4, 8, 64, 300, 5, ("module load cuda",), {"account": "vlm", "qos": "low"}, 0.1)
    home.sweep(axes={"x": [1]}, slurm=asked)
    [script] = cluster.glob("*.sbatch")
    told = directives(script)
    expected = {
        "partition": "gpu",
        "time": "90",
        "nodes": "2",
        "gpus-per-node": "4",
        "ntasks-per-node": "4",
        "cpus-per-task": "8",
        "mem": "64GB",
        "signal": "USR2@300",
        "requeue": "",
        "account": "vlm",
        "qos": "low",
        "open-mode": "append",
    }
    assert expected.items() <= told.items()
    lines = script.read_text().splitlines()
    command = next(line for line in lines if line.startswith("srun"))
    assert lines.index("module load cuda") < lines.index(command)
    assert "--kill-on-bad-exit=1" in command
    assert str(home.out.resolve() / "jobs") in command


@pytest.mark.slow
def test_a_failed_cell_is_told_as_anywhere_else(home, cluster, monkeypatch):
    monkeypatch.setenv("VERBS_FAIL", "x1-")
    with pytest.raises(ValueError, match=r"1 failed .*the loss is not a number"):
        home.sweep()
    monkeypatch.delenv("VERBS_FAIL")
    home.sweep(retry_failed=True)
    assert home.trained() == ["x1-seed0", "x2-seed0"]


def test_a_job_that_is_preempted_is_queued_again_and_goes_on(home, cluster, monkeypatch):
    gate = home.folder / "gate"
    monkeypatch.setenv("VERBS_WAIT", str(gate))
    process = home.start(axes={"x": [1]}, launcher="slurm", slurm=None)
    wait_for(lambda: len(home.pids()) == 2)
    old = home.pids()
    [number] = cluster.glob("*.pid")
    os.kill(int(number.read_text()), signal.SIGUSR2)
    wait_for(lambda: len(home.said("begin")) == 2, 40)
    assert not any(map(alive, old))
    assert home.account("x1-seed0").status == "running"
    gate.touch()
    assert process.wait(60) == 0
    assert home.account("x1-seed0").status == "done"
    assert home.said() == ["begin x1-seed0"] * 2 + ["end x1-seed0", "val x1-seed0"]


@pytest.mark.slow
def test_jobs_outlive_the_sweep_and_the_next_one_follows_them(home, cluster, monkeypatch):
    gate = home.folder / "gate"
    monkeypatch.setenv("VERBS_WAIT", str(gate))
    process = home.start(launcher="slurm", slurm=None)
    wait_for(lambda: len(home.pids()) == 4)
    process.send_signal(signal.SIGINT)
    process.wait(20)
    assert (
        "2 jobs go on by themselves: run again to follow them, or scancel 100_0 100_1"
        in (home.folder / "said").read_text()
    )
    assert all(map(alive, home.pids()))
    again = home.start(launcher="slurm", slurm=None)
    wait_for(lambda: "0 jobs submitted, 2 in the queue already" in (home.folder / "said").read_text())
    gate.touch()
    assert again.wait(60) == 0
    assert len(home.said("begin")) == 2
    assert len(list(cluster.glob("*.sbatch"))) == 1


def test_submitits_local_executor_runs_a_cell_and_continues_it_after_a_preemption(home, monkeypatch):
    gate = home.folder / "gate"
    monkeypatch.setenv("VERBS_WAIT", str(gate))
    jobs = home.folder / "jobs"
    started = []
    real = slurm._submitted

    def submitted(executor, folders, notice):
        started.extend(real(executor, folders, notice))
        return started

    monkeypatch.setattr(slurm, "_submitted", submitted)
    monkeypatch.setattr(
        fleet,
        "run_slurm",
        lambda folders, _, asked, parallel: preempted(run_slurm(folders, jobs, asked, parallel, "local")),
    )

    def preempted(ended):
        poll, begun = slurm.time.sleep, []

        def sleep(seconds):
            poll(seconds)
            if len(home.pids()) == 2 and not begun:
                begun.extend(home.pids())
                for pid in map(int, os.popen(f"pgrep -P {started[0].job_id}").read().split()):
                    os.kill(pid, signal.SIGUSR2)
            if begun and len(home.said("begin")) == 2:
                gate.touch()

        monkeypatch.setattr(slurm.time, "sleep", sleep)
        yield from ended
        assert not any(map(alive, begun))

    home.sweep(axes={"x": [1]})
    assert home.said() == ["begin x1-seed0"] * 2 + ["end x1-seed0", "val x1-seed0"]


SAVES = """
import signal, sys, time
from pathlib import Path
def save(*_):
    time.sleep(0.3)
    Path(sys.argv[1], "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
Path(sys.argv[1], "ready").touch()
time.sleep(60)
"""


def test_a_training_may_save_before_its_job_is_queued_again_and_does_not_die_of_the_signal_for_the_job(tmp_path):
    """As submitit asks: in a handler above the very call that waits for the training."""
    asked = []

    def handler(*_):
        began = time.monotonic()
        os.kill(running._running[0].pid, signal.SIGUSR2)  # SLURM sends it to every process of a job
        asked.append(slurm.CellJob(slurm._REQUEUEING + 20).checkpoint(str(tmp_path)))
        asked.append(((tmp_path / "saved").exists(), time.monotonic() - began))

    def tell():
        wait_for((tmp_path / "ready").exists)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        Thread(target=tell).start()
        with pytest.raises(running.StoppedError):
            running.run_command([sys.executable, "-c", SAVES, str(tmp_path)], tmp_path / "log.txt", own_group=True)
    finally:
        signal.signal(signal.SIGUSR2, before)
    [again, (saved, seconds)] = asked
    assert (again.function, again.args) == (slurm.CellJob(50.0), (str(tmp_path),))
    assert saved
    assert seconds < 10, "it waits no longer than the training needs"
    assert not running._running


def test_a_job_that_is_gone_without_an_account_has_failed(home, cluster, monkeypatch):
    monkeypatch.setenv("VERBS_WAIT", str(home.folder / "gate"))
    process = home.start(axes={"x": [1]}, launcher="slurm", slurm=None, account_comes=1)
    wait_for(lambda: len(home.pids()) == 2)
    (home.folder / "gate").touch()
    [number] = cluster.glob("*.pid")
    os.kill(int(number.read_text()), signal.SIGKILL)
    assert process.wait(60) == 1
    assert "its process ended before it was finished" in home.account("x1-seed0").error


def test_of_the_processes_of_a_training_the_first_alone_evaluates(home, monkeypatch):
    monkeypatch.setattr(fleet, "run_slurm", lambda folders, *_: iter(folders))
    with pytest.raises(ValueError, match=r"1 failed"):
        home.sweep(axes={"x": [1]})
    folder = home.out / "cells" / "x1-seed0"
    monkeypatch.setenv("SLURM_PROCID", "1")
    (folder / "cell.json").unlink()
    slurm.CellJob()(str(folder))
    assert home.said() == ["begin x1-seed0", "end x1-seed0"]
    assert not (folder / "cell.json").exists()
    assert "learning rate" in (folder / "log-1.txt").read_text()
    monkeypatch.setenv("SLURM_PROCID", "0")
    slurm.CellJob()(str(folder))
    assert home.said("val") == ["val x1-seed0"]
    assert Account.read(folder).status == "done"


def test_without_slurm_it_says_what_is_missing(home, monkeypatch):
    monkeypatch.setenv("PATH", str(HERE))
    with pytest.raises(ValueError, match=r'launcher: .*"srun".* Say local'):
        executor_of(home.folder, Slurm(), 1)


def test_without_submitit_it_says_what_to_install(home, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'mmrlhf[slurm]'")):
        executor_of(home.folder, Slurm(), 1)
