"""Interrupted and killed sweeps: nothing runs on, nothing runs twice, and the next call goes on."""

import os
import signal
import time
from threading import Thread

import pytest

from mmrlhf.cli import main
from mmrlhf.experiments.cells import is_running, state_of
from mmrlhf.experiments.running import run_cell
from mmrlhf.settings import alone

from .standing import Home, alive, wait_for


@pytest.fixture
def home(tmp_path, monkeypatch):
    home = Home(tmp_path, monkeypatch)
    monkeypatch.setenv("VERBS_WAIT", str(tmp_path / "gate"))
    yield home
    home.end()


def opened(home):
    (home.folder / "gate").touch()


def waiting(home, cells):
    """Whether so many trainings have begun and started a child."""
    return len(home.pids()) == 2 * cells


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_whatever_ends_a_sweep_ends_its_cells_and_what_they_started_and_it_goes_on_later(home, sent):
    process = home.start(max_parallel=2)
    wait_for(lambda: waiting(home, 2))
    pids = home.pids()
    process.send_signal(sent)
    process.wait(30)
    wait_for(lambda: not any(map(alive, pids)))
    assert process.returncode != 0
    cells = [home.out / "cells" / name for name in ("x1-seed0", "x2-seed0")]
    assert [state_of(cell) for cell in cells] == ["stopped", "stopped"]  # and not failed
    opened(home)
    home.sweep()
    assert home.trained() == ["x1-seed0", "x2-seed0"]
    assert [home.account(name).status for name in home.trained()] == ["done", "done"]


def test_a_sweep_that_is_started_right_after_a_kill_does_not_train_beside_the_old_one(home):
    process = home.start(axes={"x": [1]})
    wait_for(lambda: waiting(home, 1))
    old = home.pids()
    os.kill(process.pid, signal.SIGKILL)
    again = home.start(axes={"x": [1]})
    wait_for(lambda: len(home.said("begin")) == 2)
    assert not any(map(alive, old))  # the second has begun only when the first was gone
    opened(home)
    assert again.wait(30) == 0
    process.wait(5)
    assert home.account("x1-seed0").status == "done"


def test_a_cell_waits_for_a_process_that_is_about_to_leave_its_folder(home):
    opened(home)
    home.sweep(axes={"x": [1]})
    done = []
    cell = Thread(target=lambda: done.append(run_cell(home.out / "cells" / "x1-seed0")))
    with alone(home.out / "cells" / "x1-seed0"):
        cell.start()
        time.sleep(0.5)
        assert cell.is_alive()
    cell.join(10)
    assert done == [True]


def test_a_cell_whose_own_process_is_killed_has_failed_and_leaves_nothing_behind(home):
    process = home.start()
    wait_for(lambda: waiting(home, 1))
    [training, worker] = home.pids()
    parent = int((home.out / "cells" / "x1-seed0").joinpath("run", "parent").read_text())
    os.kill(parent, signal.SIGKILL)
    wait_for(lambda: not alive(training) and not alive(worker))
    opened(home)
    assert process.wait(30) == 1
    failed = home.account("x1-seed0")
    assert failed.status == "failed"
    assert "its process ended before it was finished; last it said: " in failed.error
    assert home.account("x2-seed0").status == "done"


def test_two_sweeps_in_one_folder_are_refused(home):
    process = home.start(axes={"x": [1]})
    wait_for(lambda: waiting(home, 1))
    with pytest.raises(ValueError, match=r"another process writes into it"):
        home.sweep(axes={"x": [1]})
    home.sweep(axes={"x": [1]}, seeds=2, dry_run=True)  # a look is free
    assert is_running(home.out / "cells" / "x1-seed0")
    opened(home)
    assert process.wait(30) == 0
    assert home.trained() == ["x1-seed0"]


def test_a_cell_that_runs_elsewhere_is_neither_taken_nor_said_to_have_failed(home):
    opened(home)
    home.sweep(axes={"x": [1]})
    with alone(home.out / "cells" / "x2-seed0"), pytest.raises(ValueError, match=r"x2-seed0: .* runs elsewhere"):
        home.sweep()
    assert home.trained() == ["x1-seed0"]
    assert state_of(home.out / "cells" / "x2-seed0") in {"new", "stopped"}


def test_an_interrupt_of_the_command_says_how_to_go_on(monkeypatch, capsys):
    monkeypatch.setattr("mmrlhf.experiments.sweeping.sweep", interrupted)
    assert main(["sweep"], {"sweep": "tests.experiments.test_kills:interrupted"}) == 130
    assert "run the same command again" in capsys.readouterr().err


def interrupted() -> None:
    """Stop."""
    raise KeyboardInterrupt
