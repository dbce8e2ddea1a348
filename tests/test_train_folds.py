"""`mmrlhf train-reward --folds`: a model for every fold that never saw it, and scores by the one that did not."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import mlflow
import pytest

from mmrlhf import cli, jsonl, runs, train
from mmrlhf.datamodules.folds import folds_of
from mmrlhf.datamodules.module import RankedDataModule
from mmrlhf.datamodules.reader import Shards
from mmrlhf.folds import Fold
from mmrlhf.provenance import model_digest
from mmrlhf.score import score

from .test_train import equal, weights
from .test_train_reward import (
    home,  # noqa: F401 - a fixture
    trains,
    words,
)
from .threads import one_thread  # noqa: F401 - as the processes have that are compared with this one

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
FOLDS, WHOLE_PASS = 2, ("--trainer.max_steps", "5")


def names(home, split="train"):  # noqa: F811
    return [sample.ranked.query.id for sample in Shards(home / "shards", split)]


@pytest.fixture(scope="module")
def folded(home, tmp_path_factory):  # noqa: F811
    """A finished run of two folds, made in this process, and which queries each training was given."""
    out, given, status = tmp_path_factory.mktemp("runs") / "judges", {}, []
    step = train.CritiqueRewardModule.training_step

    def watched(module, batch, number):
        given.setdefault(len(status), set()).update(batch.ids)
        return step(module, batch, number)

    def ended(line):
        status.append(cli.main(list(line)))
        return status[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.CritiqueRewardModule, "training_step", watched)
        patch.setattr(runs, "_ended", ended)
        uri = f"sqlite:///{out.parent}/mlflow.db"
        assert trains(home, out, *WHOLE_PASS, "--folds", str(FOLDS), "--run.tracking", uri) == 0
    assert status == [0] * FOLDS
    return out, given


def test_each_training_is_given_every_query_but_those_of_its_fold(home, folded):  # noqa: F811
    _, given = folded
    folds = folds_of(Shards(home / "shards", "train"), FOLDS)
    for out in range(FOLDS):
        assert given[out] == {name for name, fold in zip(names(home), folds, strict=True) if fold != out}
    assert not given[0] & given[1]
    assert given[0] | given[1] == {*names(home)}


def test_who_gave_a_reward_never_saw_the_query_nor_a_picture_of_it_and_who_gave_the_other_did(
    home,  # noqa: F811
    folded,
    tmp_path,
):
    """Who gave it is told by asking each model alone; what it saw was written down when it was trained."""
    out, given = folded
    score(home / "shards", tmp_path / "r.jsonl", reward=str(out), folds=True, critique="given", workers=0)
    alone = []
    for number in range(FOLDS):
        path = tmp_path / f"alone{number}.jsonl"
        score(home / "shards", path, reward=str(out / f"fold-{number}/model"), critique="given", workers=0)
        alone.append({(row["id"], row["response"]): row["reward"] for row in jsonl.read(path)})
    samples = {sample.ranked.query.id: sample for sample in Shards(home / "shards", "train")}
    shown = [{medium for name in given[number] for medium in samples[name].media} for number in range(FOLDS)]

    def who(at, value):
        (model,) = [one for one in range(FOLDS) if alone[one][at] == pytest.approx(value, rel=1e-6, abs=1e-6)]
        return model

    rows = list(jsonl.read(tmp_path / "r.jsonl"))
    for row in rows:
        at = row["id"], row["response"]
        unseen = who(at, row["reward"])
        assert row["id"] not in given[unseen]
        assert ("reward_seen" in row) == (row["id"] in samples)
        if row["id"] in samples:
            assert row["id"] in given[who(at, row["reward_seen"])]
            assert not shown[unseen].intersection(samples[row["id"]].media)
    assert {row["id"] for row in rows} == {*names(home), *names(home, "val"), *names(home, "test")}
    assert sum(map(len, shown)) < sum(len(sample.media) for sample in samples.values()), "some share a picture"
    data = RankedDataModule(home / "shards", home / "policy", scores=tmp_path / "r.jsonl", needs=("reward",), workers=0)
    read, found = data.rows("train"), {(row["id"], row["response"]): row["reward"] for row in rows}
    for number in range(len(read)):
        item = read[number]
        told = [found[item.row.ranked.query.id, place] for place in item.row.places]
        assert item.rewards.tolist() == pytest.approx(told)


def test_the_record_of_a_fold_names_its_data_and_its_model(home, folded):  # noqa: F811
    out, _ = folded
    shards = Shards(home / "shards", "train")
    told = [json.loads((out / f"fold-{number}/fold.json").read_text()) for number in range(FOLDS)]
    assert [(one["of"], one["out"], one["data"]) for one in told] == [(2, 0, shards.digest), (2, 1, shards.digest)]
    assert [one["model"] for one in told] == [model_digest(out / f"fold-{number}/model") for number in range(FOLDS)]
    assert told[0]["model"] != told[1]["model"]
    assert told[0]["training"] == told[1]["training"]
    settings = [json.loads((out / f"fold-{number}/run.json").read_text())["settings"] for number in range(FOLDS)]
    assert [one["data"]["fold"] for one in settings] == [{"of": 2, "out": 0}, {"of": 2, "out": 1}]


def test_each_fold_is_a_run_of_its_own_in_mlflow_and_its_card_tells_what_was_held_out(home, folded):  # noqa: F811
    out, given = folded
    mlflow.set_tracking_uri(f"sqlite:///{out.parent}/mlflow.db")
    rows = mlflow.search_runs(search_all_experiments=True).to_dict("records")
    assert sorted(row["tags.mlflow.runName"] for row in rows) == ["judges-fold-0", "judges-fold-1"]
    for number in range(FOLDS):
        card = (out / f"fold-{number}/model/README.md").read_text()
        assert f"| training queries | {len(given[number])} |" in card
        assert f"held_out {len(names(home)) - len(given[number])}" in card


def test_finished_folds_are_left_alone_one_that_is_missing_is_made_and_others_are_refused(
    home,  # noqa: F811
    folded,
    monkeypatch,
    capsys,
):
    out, _ = folded
    uri = f"sqlite:///{out.parent}/mlflow.db"
    again = (*WHOLE_PASS, "--run.folds", str(FOLDS), "--run.tracking", uri)
    monkeypatch.setattr(runs, "_ended", lambda line: cli.main(list(line)))
    before = {path: path.stat().st_mtime_ns for path in out.glob("fold-*/model/model.safetensors")}
    record = (out / "fold-1/fold.json").read_text()
    (out / "fold-1/fold.json").unlink()  # as after a kill between the last two things that are done
    assert trains(home, out, *again) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (out / "fold-1/fold.json").read_text() == record
    assert trains(home, out, *again, "--run.seed", "1") == 2
    error = capsys.readouterr().err
    assert "fold-0: holds a training with" in error
    assert "fold-0: the training without fold 0 of 2 ended with status 2, see above" in error
    assert trains(home, out, *again[:-3], "3", *again[-2:]) == 2
    assert "fold-0: holds a training with data" in capsys.readouterr().err


def test_a_fold_alone_is_the_same_training(home, folded, tmp_path):  # noqa: F811
    alone = ("--data.fold.of", "2", "--data.fold.out", "1")
    assert trains(home, tmp_path / "alone", *WHOLE_PASS, *alone) == 0
    assert equal(weights(folded[0] / "fold-1"), weights(tmp_path / "alone"))
    assert not equal(weights(folded[0] / "fold-0"), weights(tmp_path / "alone"))
    told = [json.loads((run / "fold.json").read_text()) for run in (folded[0] / "fold-1", tmp_path / "alone")]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--folds", "1"), "fold.of: expected 2 parts or more, got 1"),
        (("--folds=0",), "fold.of: expected 2 parts or more, got 0"),
        (("--run.folds", "2", "--data.fold.of", "2", "--data.fold.out", "1"), "run.folds: expected it or data.fold"),
        (("--data.fold.of", "2", "--data.fold.out", "2"), "fold.out: expected a part from 0 to 1, got 2"),
        (("--data.fold.of", "1", "--data.fold.out", "0"), "fold.of: expected 2 parts or more, got 1"),
        (("--data.fold.of", "500", "--data.fold.out", "0"), "fold.of: expected queries in each of 500 folds of"),
    ],
)
def test_what_is_no_fold_is_refused_on_one_line(home, tmp_path, capsys, monkeypatch, more, message):  # noqa: F811
    monkeypatch.setattr(runs, "_ended", lambda _: pytest.fail("nothing is to be started"))
    assert trains(home, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mmrlhf train-reward:")
    assert message in error


@pytest.mark.parametrize("several", [{"WORLD_SIZE": "2", "RANK": "1"}, {"SLURM_NTASKS": "4"}])
def test_one_of_several_processes_trains_no_folds_and_says_the_cure(home, tmp_path, capsys, monkeypatch, several):  # noqa: F811
    monkeypatch.setattr(runs, "_ended", lambda _: pytest.fail("nothing is to be started"))
    for name, value in several.items():
        monkeypatch.setenv(name, value)
    assert trains(home, tmp_path / "out", "--folds", "3") == 2
    error = capsys.readouterr().err
    assert f"--data.fold.of 3 --data.fold.out I --run.out {tmp_path}/out/fold-I" in error


def test_a_training_of_a_policy_can_leave_a_fold_out_too_and_is_then_another():
    config = ["--config", "configs/dpo/world.yaml"]
    made = [train.AlignCLI([*config, *more]) for more in ((), ("--data.fold.of", "3", "--data.fold.out", "1"))]
    assert [one.datamodule.fold for one in made] == [None, Fold(3, 1)]
    told = [runs.identity(one.settings)["data"].pop("fold") for one in made]
    assert told == [None, {"of": 3, "out": 1}]


# Processes ----------------------------------------------------------------------------------------------------


def stood_in(tmp_path, monkeypatch, script):
    """Another program in the place of Python."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{script}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(path))


def test_the_folds_are_trained_one_after_another_by_the_same_command(home, tmp_path, monkeypatch):  # noqa: F811
    stood_in(tmp_path, monkeypatch, "exit 0")
    assert trains(home, tmp_path / "out", "--folds", "3", "--run.name", "judge") == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    line = " ".join(["-m mmrlhf", *words(home, tmp_path / "out", "--run.folds", "3", "--run.name", "judge")])
    own = "--data.fold.of 3 --data.fold.out {0} --run.folds null --run.out {1}/out/fold-{0} --run.name judge-fold-{0}"
    assert calls == [f"{line} {own.format(number, tmp_path)}" for number in range(3)]


def test_a_fold_that_fails_ends_all_and_is_named(home, tmp_path, monkeypatch, capsys):  # noqa: F811
    stood_in(tmp_path, monkeypatch, 'case "$*" in *fold-1*) exit 7;; esac')
    assert trains(home, tmp_path / "out", "--folds", "3") == 2
    assert "out/fold-1: the training without fold 1 of 3 ended with status 7, see above" in capsys.readouterr().err
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


def test_a_fold_that_was_interrupted_ends_all_as_an_interrupt(home, tmp_path, monkeypatch, capsys):  # noqa: F811
    stood_in(tmp_path, monkeypatch, "exit 130")
    assert trains(home, tmp_path / "out", "--folds", "3") == 130
    assert "interrupted; run the same command again" in capsys.readouterr().err
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


@pytest.fixture
def interruptible():
    """What a shell starts in the background ignores interrupts, and hands that on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_of_this_process_alone_reaches_the_other_and_ends_all(home, tmp_path, monkeypatch):  # noqa: F811
    wait = f"trap 'echo interrupted >> {tmp_path}/calls; exit 130' INT\nwhile :; do sleep 0.05; done"
    stood_in(tmp_path, monkeypatch, wait)
    monkeypatch.setattr(runs, "_GRACE", 0.2)

    def interrupt():
        while not (tmp_path / "calls").exists():
            time.sleep(0.02)
        time.sleep(0.2)  # until the trap is set
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert trains(home, tmp_path / "out", "--folds", "3") == 130
    lines = (tmp_path / "calls").read_text().splitlines()
    assert len(lines) == 2
    assert lines[1] == "interrupted"


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_in_processes_of_their_own_the_folds_are_the_same_and_an_interrupt_is_continued(home, folded, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mmrlhf", *words(home, out, *WHOLE_PASS, "--folds", str(FOLDS))]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, start_new_session=True, env=one) as process:
        while not (out / "fold-1" / "run.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 130
    assert (out / "fold-0" / "fold.json").exists()
    assert not (out / "fold-1" / "fold.json").exists()
    assert subprocess.run(command, check=False, env=one).returncode == 0
    for number in range(FOLDS):
        assert equal(weights(out / f"fold-{number}"), weights(folded[0] / f"fold-{number}"))
