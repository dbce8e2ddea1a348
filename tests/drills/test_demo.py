"""A demo that is killed once in every stage ends with the numbers of one that was left alone."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager

import pandas as pd
import pytest

from mmrlhf.experiments.demonstration import stages

pytestmark = pytest.mark.slow
EFFORT = "0.03"


@contextmanager
def started(out):
    """The demo; it is killed at the end of the block, also where the test has failed in it."""
    command = [sys.executable, "-m", "mmrlhf", "demo", "--out", str(out), "--effort", EFFORT]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def done(out):
    journal = out / "stages.jsonl"
    return [json.loads(line)["stage"] for line in journal.read_text().splitlines()] if journal.exists() else []


def killed_in(out, name, after):
    """Start the demo, and kill it so many seconds after the stage has begun to speak."""
    log = out / "logs" / f"{name.replace(' ', '-')}.log"
    with started(out) as process:
        while not log.exists():
            assert process.poll() is None, f"ended before {name}"
            time.sleep(0.02)
        time.sleep(after)
    time.sleep(0.5)  # for what it had started


def numbers(out):
    """What the report says of every cell, but for how long it took."""
    found = pd.read_csv(out / "report" / "cells.csv")
    return found[[name for name in found.columns if "seconds" not in name]]


def test_a_demo_killed_in_every_stage_ends_with_the_same_numbers(tmp_path):
    names = [stage.name for stage in stages(0, float(EFFORT))]
    hit = 0
    for place, name in enumerate(names):
        killed_in(tmp_path / "killed", name, 1.0 + place % 3)
        hit += name not in done(tmp_path / "killed")
    for folder in ("killed", "whole"):
        with started(tmp_path / folder) as process:
            assert process.wait() == 0
    assert done(tmp_path / "killed") == done(tmp_path / "whole") == names
    pd.testing.assert_frame_equal(numbers(tmp_path / "killed"), numbers(tmp_path / "whole"))
    for pattern in ("rewards.jsonl", "reference.jsonl", "*/*/*.safetensors", "sweep/cells/*/run/model/*.safetensors"):
        files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").glob(pattern))
        assert files
        for file in files:
            assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    sys.stdout.write(f"killed in {len(names)} stages, in {hit} of them before they were done; the same numbers\n")
    assert hit >= len(names) - 2
