"""A sweep over the verbs of `verbs.py`, in this process or in one that can be interrupted and killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mmrlhf.experiments import design
from mmrlhf.experiments.cells import Account
from mmrlhf.experiments.design import Training
from mmrlhf.experiments.sweeping import sweep

HERE = Path(__file__).parent


class Home:
    """A folder with a config, and what a sweep in it is asked for."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.out, self.log = folder, folder / "out", folder / "log"
        self.log.touch()
        (folder / "config.yaml").write_text("k: 1.0\n")
        monkeypatch.setattr(design, "PROGRAM", "verbs")
        monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
        monkeypatch.setenv("VERBS_LOG", str(self.log))
        self.options = {
            "axes": {"x": [1, 2]},
            "evaluate": [["evaluate", "--model", "{model}", "--split", "{split}", "--out", "{out}"]],
            "metric": "world/true",
            "seeds": 1,
            "tracking": None,
        }

    def sweep(self, **changes):
        """Run it here, with some options changed."""
        training = changes.pop("train", Training("train", self.folder / "config.yaml"))
        sweep(train=training, **{"out": self.out} | self.options | changes)

    def start(self, **changes):
        """The same in a process of its own."""
        path = self.folder / "options.json"
        train = {"verb": "train", "config": str(self.folder / "config.yaml")}
        path.write_text(json.dumps({"train": train, "out": str(self.out)} | self.options | changes))
        with (self.folder / "said").open("ab") as file:
            return subprocess.Popen([sys.executable, HERE / "drive.py", path], stdout=file, stderr=file)

    def said(self, what=""):
        """The verbs that were run, without what they tell of their process."""
        lines = [line.rsplit(" ", 2)[0] for line in self.log.read_text().splitlines()]
        return [line for line in lines if line.startswith(what)]

    def trained(self):
        """Names of the runs whose training came to its end."""
        return sorted(line.removeprefix("end ") for line in self.said("end "))

    def account(self, name):
        """Of a cell."""
        return Account.read(self.out / "cells" / name)

    def read(self, name):
        """A JSON file of the sweep."""
        return json.loads((self.out / name).read_text())

    def pids(self):
        """Of the trainings and of their children."""
        found = [*self.out.glob("cells/*/run/pid"), *self.out.glob("cells/*/run/worker")]
        return [int(path.read_text()) for path in found if path.read_text()]

    def end(self, *others):
        """Leave no process behind, whatever a test has found."""
        for pid in (*self.pids(), *others):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def alive(pid):
    """Whether a process runs; one that is only not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
