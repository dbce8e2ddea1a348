"""The demo runs stages as a user would, goes on where it was stopped, and says what failed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmrlhf import cli, train
from mmrlhf.experiments import demonstration
from mmrlhf.experiments.demonstration import Stage, demo, stages
from mmrlhf.options import read_options

QUICK = Stage("the machine", 1.0, ("env", "--json"))


def said(out):
    return [json.loads(line)["stage"] for line in (out / "stages.jsonl").read_text().splitlines()]


@pytest.fixture
def quick(monkeypatch):
    """A demo of stages that take a second."""
    monkeypatch.setattr(demonstration, "stages", lambda *_: [QUICK, QUICK._replace(name="once more")])
    monkeypatch.setattr(demonstration, "_tell", lambda _: None)


@pytest.mark.parametrize("stage", stages(0, 0.05), ids=lambda stage: stage.name)
def test_every_stage_is_a_command_that_can_be_read(stage, monkeypatch):
    verb = stage.words[0] if stage.words[0] in cli.VERBS else " ".join(stage.words[:2])
    rest = list(stage.words[len(verb.split()) :])
    if verb == "train-reward":
        monkeypatch.setattr(train.RewardCLI, "instantiate_classes", lambda _: None)
        assert train.RewardCLI(rest).config["data"]["critique"] == "none"
    else:
        assert read_options(cli.verb_function(verb), verb, rest)


def test_what_is_done_is_not_done_again(quick, tmp_path):
    demo(tmp_path / "d")
    assert said(tmp_path / "d") == ["the machine", "once more"]
    logs = sorted((tmp_path / "d" / "logs").iterdir())
    before = [log.read_bytes() for log in logs]
    assert all(b"commit" in text for text in before)
    demo(tmp_path / "d")
    assert [log.read_bytes() for log in logs] == before


def test_a_stage_that_fails_is_named_with_its_last_words_and_is_tried_again(quick, tmp_path, monkeypatch):
    bad = Stage("shards", 1.0, ("pack", "--ranked", "nowhere.jsonl", "--media", "m", "--out", "s"))
    monkeypatch.setattr(demonstration, "stages", lambda *_: [QUICK, bad])
    with pytest.raises(ValueError, match=r"shards: `mmrlhf pack` ended with 2: .*nowhere.jsonl.*; see .*shards.log"):
        demo(tmp_path / "d")
    assert said(tmp_path / "d") == ["the machine"]
    monkeypatch.setattr(demonstration, "stages", lambda *_: [QUICK, QUICK._replace(name="shards")])
    demo(tmp_path / "d")
    assert said(tmp_path / "d") == ["the machine", "shards"]


def test_other_settings_are_refused_in_the_same_folder(quick, tmp_path):
    demo(tmp_path / "d")
    with pytest.raises(ValueError, match="holds a demo with seed 0 instead of 1"):
        demo(tmp_path / "d", seed=1)


def test_a_killed_demo_leaves_no_stage_behind(tmp_path):
    command = [sys.executable, "-m", "mmrlhf", "demo", "--out", str(tmp_path / "d"), "--effort", "0.2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (children := of_stage(tmp_path)):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, children))


def of_stage(folder):
    """The processes that work in the demo's folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder / "d":
                found.append(process)
        except OSError:
            continue
    return found


def alive(process):
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
