"""A training tells MLflow what it stands on, measures and comes to; it tells no secret, and no outage stops it."""

import inspect
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from mlflow import MlflowClient

from mmrlhf import environment
from mmrlhf.callbacks import tracking
from mmrlhf.callbacks.beta_monitor import BetaMonitor
from mmrlhf.callbacks.compute import ComputeLedger
from mmrlhf.callbacks.running import watched
from mmrlhf.callbacks.tracking import COMPARED, TrackedLogger, compared, flat, mlflow_logger
from mmrlhf.provenance import model_digest
from mmrlhf.runs import CHECKPOINTS, Run, once
from mmrlhf.tracked import Tracked, parent_run

from ..tracking import Hanging, Server, empty_database
from .test_compute import Toy, batches

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = {name: each.default for name, each in inspect.signature(Trainer).parameters.items()}
OPTIONS |= {"max_epochs": 1, "max_steps": -1, "accelerator": "cpu", "log_every_n_steps": 1}
OPTIONS |= {"enable_progress_bar": False, "enable_model_summary": False}
SETTINGS = {
    "model": {
        "backbone": {"path": "org/model", "revision": "abc"},
        "beta": {"class_path": "a.RewardMarginBeta", "init_args": {"beta0": 0.1, "w": 0.5, "k": 1.0}},
        "loss": {"class_path": "a.Sigmoid"},
        "optimiser": {"learning_rate": 0.1, "warmup": None},
        "chunk": 512,
    },
    "data": {"global_batch": 4, "pairs": "all", "workers": 3},
    "trainer": {"max_steps": -1, "precision": None} | dict.fromkeys(("max_epochs", "limit_train_batches"), 1),
}
SETTINGS["trainer"] |= dict.fromkeys(("overfit_batches", "gradient_clip_val", "gradient_clip_algorithm"))


class Learns(Toy):
    """A toy whose data are what its numbers say."""

    def on_train_start(self):
        """Have something that the gradient check finds."""
        self.validated_at = -1


class Words:
    """What `once` wants of a command line."""

    def __init__(self, run, more=None):
        self.settings = SETTINGS | (more or {}) | {"run": {"seed": run.seed, "tracking": run.tracking}}

    def dumped(self, form):
        """Dump as one form."""
        assert form == "yaml"
        return yaml.safe_dump(self.settings)


class At(Callback):
    """Calls a function after some steps."""

    def __init__(self, calls):
        self.calls, self.longest, self._began = calls, 0.0, 0.0

    def on_train_batch_start(self, *_):
        """Look at the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer, *_):
        """Call."""
        if (call := self.calls.get(trainer.global_step)) is not None:
            call()
        self.longest = max(self.longest, time.perf_counter() - self._began)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A database in which the runs of these tests stand, under one parent."""
    folder = tmp_path_factory.mktemp("tracked")
    uri = empty_database(folder)
    return uri, parent_run(folder / "sweep", uri, "toys", "sweep", {"metric": "train/beta/mean"})


def train(out, uri, parent=None, calls=None, more=None, experiment="toys"):
    """A whole training of the toy, as a door does it; return what took longest of a step."""
    run, at = Run(out, tracking=uri, experiment=experiment, parent=parent, save_every=1000), At(calls or {})
    words = Words(run, more)

    def work():
        particular = [BetaMonitor(out / "figures"), at]
        trainer = watched(OPTIONS, run, words.settings, ComputeLedger(), particular, out / CHECKPOINTS)
        trainer.callbacks = [each for each in trainer.callbacks if type(each).__name__ != "ConsumptionGuard"]
        trainer.fit(Learns(), batches(12), batches(2))
        (out / "model").mkdir()
        (out / "model" / "README.md").write_text("# A card\n")

    once(words, run, lambda: "digest-of-data", work)
    return at.longest


def copied(database, folder):
    """The address of a database of one's own: to make one takes seconds."""
    shutil.copy(database[0].removeprefix("sqlite:///"), folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"


def of(uri, out):
    return MlflowClient(uri).get_run(json.loads((out / "mlflow.json").read_text())["run"])


def histories(uri, out):
    """Every point of every metric that does not tell the time or the memory."""
    client, run = MlflowClient(uri), of(uri, out)
    names = [name for name in run.data.metrics if "throughput" not in name and name.count("seconds") == 0]
    points = {name: client.get_metric_history(run.info.run_id, name) for name in names if "memory" not in name}
    return {name: [(each.step, str(each.value)) for each in found] for name, found in points.items()}


@pytest.fixture(scope="module")
def undisturbed(database, tmp_path_factory):
    uri, parent = database
    out = tmp_path_factory.mktemp("first") / "out"
    train(out, uri, parent)
    return out


# What is told -------------------------------------------------------------------------------------------------


def test_a_training_is_a_child_with_what_it_stands_on_and_what_came_of_it(database, undisturbed):
    uri, parent = database
    run, client = of(uri, undisturbed), MlflowClient(uri)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "out"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["mmrlhf.fingerprint.data"] == "digest-of-data"
    assert run.data.tags["mmrlhf.fingerprint.model"] == "org/model@abc"
    assert run.info.experiment_id == client.get_run(parent).info.experiment_id
    assert run.data.params == {
        "model.backbone.path": "org/model",
        "model.backbone.revision": "abc",
        "model.beta.class_path": "a.RewardMarginBeta",
        "model.beta.init_args.beta0": "0.1",
        "model.beta.init_args.w": "0.5",
        "model.beta.init_args.k": "1.0",
        "model.loss.class_path": "a.Sigmoid",
        "model.optimiser.learning_rate": "0.1",
        "data.global_batch": "4",
        "data.pairs": "all",
        "trainer.max_steps": "-1",
        "trainer.max_epochs": "1",
        "trainer.limit_train_batches": "1",
        "run.seed": "0",
    }


def test_all_settings_the_machine_the_code_the_figures_and_the_card_are_artifacts(database, undisturbed):
    uri, _ = database
    run, client = of(uri, undisturbed), MlflowClient(uri)
    kept = Path(run.info.artifact_uri)
    assert yaml.safe_load((kept / "config.yaml").read_text()) == Words(Run(undisturbed, tracking=uri)).settings
    assert json.loads((kept / "env.json").read_text()) == json.loads(json.dumps(environment.describe()))
    commit = (kept / "git" / "commit.txt").read_text()
    assert commit.strip() == (environment.commit(Path(environment.__file__).parents[1]) or commit.strip())
    assert (kept / "model" / "README.md").read_text() == "# A card\n"
    figures = client.list_artifacts(run.info.run_id, "figures")
    assert sorted(Path(each.path).suffix for each in figures) == [".csv", ".png"]
    for each in figures:
        assert (kept / each.path).read_bytes() == (undisturbed / each.path).read_bytes()


def test_the_metrics_of_every_step_are_there_and_nothing_waits(database, undisturbed):
    uri, _ = database
    found = histories(uri, undisturbed)
    assert [step for step, _ in found["train/beta/mean"]] == list(range(12))
    assert [float(value) for _, value in found["ledger/tokens"]] == [
        sum(range(100, 101 + step)) for step in range(12)
    ] + [sum(range(100, 112))] * (len(found["ledger/tokens"]) - 12)
    assert "lr-SGD" in found
    assert Tracked.of(undisturbed)._spool.waiting() == 0


def test_what_is_compared_exists_in_the_settings_of_a_trainer_and_cells_differ_in_it():
    from mmrlhf.train import AlignCLI, RewardCLI

    class Align(AlignCLI):
        def instantiate_classes(self):
            """Read nothing."""

    class Reward(RewardCLI):
        def instantiate_classes(self):
            """Read nothing."""

    told = [Align(["--config", "configs/dpo/world.yaml"]), Reward(["--config", "configs/reward/world.yaml"])]
    names = {name for each in told for name, _ in flat(each.settings)}
    assert [one for one in COMPARED if not any(name == one or name.startswith(f"{one}.") for name in names)] == []
    dpo = compared(told[0].settings)
    assert (dpo["model.beta.init_args.w"], dpo["model.optimiser.learning_rate"]) == ("0.5", "0.0001")
    assert len(dpo) < 40
    assert not any(name.startswith(("run.out", "run.tracking", "data.shards", "trainer.devices")) for name in dpo)


def test_the_fingerprint_of_a_local_model_is_that_of_scores(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    settings = {"model": {"backbone": {"path": str(tmp_path), "revision": None}}}
    assert tracking.fingerprints(tmp_path, settings) == {"mmrlhf.fingerprint.model": model_digest(tmp_path)}
    assert tracking.fingerprints(tmp_path, {}) == {}


def test_only_the_first_rank_makes_a_run(database, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    logger = mlflow_logger(tmp_path, database[0], "toys", "n", SETTINGS)
    logger.log_metrics({"x": 1.0}, 0)
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []
    assert (logger.name, logger.version) == ("toys", None)


# How it ends ----------------------------------------------------------------------------------------------------


def raising(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("planted"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (None, "KILLED")]
)
def test_how_a_training_ended_is_its_status_and_the_next_start_continues_it(database, tmp_path, error, status):
    uri, parent = database
    out = tmp_path / "out"
    if error is None:  # as Slurm does it, and Kubernetes
        error = SystemExit(143)
    with pytest.raises((ValueError, KeyboardInterrupt, SystemExit)):
        train(out, uri, parent, {5: raising(error)})
    first = of(uri, out)
    assert first.info.status == status
    train(out, uri, parent)
    again = of(uri, out)
    assert (again.info.run_id, again.info.status) == (first.info.run_id, "FINISHED")


def test_a_training_that_is_killed_is_left_running_and_then_continued(database, tmp_path):
    uri, parent = database
    out = tmp_path / "out"
    dies = {8: lambda: os.kill(os.getpid(), signal.SIGKILL)}
    process = multiprocessing.get_context("fork").Process(target=train, args=(out, uri, parent, dies))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = of(uri, out)
    assert left.info.status == "RUNNING"
    train(out, uri, parent)
    done = of(uri, out)
    assert (done.info.run_id, done.info.status) == (left.info.run_id, "FINISHED")
    steps = [step for step, _ in histories(uri, out)["train/beta/mean"]]
    assert set(steps) == set(range(12))
    assert len(steps) > 12 + 5  # what the killed one said is not lost


# A tracker that is down ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("since", [0, 4])
def test_after_the_flush_the_metrics_are_those_of_a_run_whose_database_was_always_there(
    database, undisturbed, tmp_path, since, caplog
):
    uri, away = copied(database, tmp_path), tmp_path / "away.db"
    breaks = lambda: (tmp_path / "mlflow.db").rename(away) and (tmp_path / "mlflow.db").mkdir()  # noqa: E731
    if not since:
        breaks()
    train(tmp_path / "out", uri, calls={since: breaks} if since else None)
    assert (tmp_path / "out" / "model").exists()
    assert "the tracker does not answer" in caplog.text
    (tmp_path / "mlflow.db").rmdir()
    away.rename(tmp_path / "mlflow.db")
    Tracked.of(tmp_path / "out").send()
    assert histories(uri, tmp_path / "out") == histories(database[0], undisturbed)
    run = of(uri, tmp_path / "out")
    assert run.info.status == "FINISHED"
    assert run.data.params == of(database[0], undisturbed).data.params
    client, ids = MlflowClient(uri), (run.info.run_id, of(database[0], undisturbed).info.run_id)
    one, other = ([each.path for each in client.list_artifacts(each_id)] for each_id in ids)
    assert one == other


def test_after_the_next_start_the_metrics_are_those_of_a_run_whose_server_never_stopped(
    database, undisturbed, tmp_path
):
    path = Path(copied(database, tmp_path).removeprefix("sqlite:///"))
    with pytest.MonkeyPatch.context() as patch:
        server = Server(patch, path, tmp_path / "artifacts")
        longest = train(tmp_path / "out", server.uri, calls={4: server.stop})
        assert longest < 1.5
        assert of(f"sqlite:///{path}", tmp_path / "out").info.status == "RUNNING"
        server.start()
        train(tmp_path / "out", server.uri)  # is trained already
        assert histories(server.uri, tmp_path / "out") == histories(database[0], undisturbed)
        assert of(server.uri, tmp_path / "out").info.status == "FINISHED"
        server.stop()


def test_a_server_that_never_answers_delays_no_step(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    hanging, began = Hanging(), time.perf_counter()
    assert train(tmp_path / "out", hanging.uri) < 1.0
    assert time.perf_counter() - began < 15
    assert (tmp_path / "out" / "model").exists()
    hanging.close()


def test_metrics_come_to_the_tracker_while_the_training_runs(database, tmp_path):
    logger = mlflow_logger(tmp_path, database[0], "toys", "n", SETTINGS)
    logger.log_metrics({"x (y)": torch.tensor(1.5)}, 3)
    until = time.monotonic() + 10
    while "x y" not in of(database[0], tmp_path).data.metrics and time.monotonic() < until:
        time.sleep(0.05)
    logger.finalize("success")
    assert of(database[0], tmp_path).data.metrics == {"x y": 1.5}
    assert logger.version == of(database[0], tmp_path).info.run_id


# Secrets ------------------------------------------------------------------------------------------------------

CANARIES = {
    "of a variable": "walrus-variable",
    "of an address": "walrus-address",
    "of a setting": "walrus-setting",
    "in the code": "hf_walruswalruswalruswalrus",
    "of the remote": "walrus-remote",
}


def test_no_secret_is_in_the_database_in_an_artifact_or_in_the_run(database, tmp_path, monkeypatch):
    root = tmp_path / "code"
    (root / "src").mkdir(parents=True)
    (root / "src" / "a.py").write_text("one\n")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    subprocess.run([*git, "remote", "add", "origin", "https://walrus-remote@host/a.git"], check=True)
    (root / "src" / "a.py").write_text('TOKEN = "hf_walruswalruswalruswalrus"\nMORE = "walrus-variable"\nplain = 1\n')
    monkeypatch.setattr(environment, "__file__", str(root / "src" / "environment.py"))
    monkeypatch.setenv("OPENAI_API_KEY", "walrus-variable")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    secret = {"endpoint": {"key": "walrus-setting", "url": "http://ann:walrus-address@host/v1"}}
    secret["data"] = SETTINGS["data"] | {"pairs": "walrus-variable"}
    uri = copied(database, tmp_path)
    MlflowClient(uri).create_experiment("own", artifact_location=str(tmp_path / "mlartifacts"))
    train(tmp_path / "out", uri, more=secret, experiment="own")
    patch = (Path(of(uri, tmp_path / "out").info.artifact_uri) / "git" / "diff.patch").read_text()
    assert "+plain = 1" in patch
    assert "***" in patch
    places = [tmp_path / "out", tmp_path / "mlartifacts", tmp_path / "mlflow.db"]
    files = [path for place in places for path in [place, *place.rglob("*")] if path.is_file()]
    assert len(files) > 10
    # These are their owner's, to begin the same run again and no other; but none can be given away with an address.
    own = {tmp_path / "out" / name for name in ("config.yaml", "run.json")}
    assert {path for path in files if b"walrus" in path.read_bytes()} <= own
    config = (tmp_path / "out" / "config.yaml").read_text()
    assert [name for name in CANARIES.values() if name in config] == ["walrus-setting"]


def test_the_logger_takes_no_settings_from_lightning(database, tmp_path):
    logger = mlflow_logger(tmp_path, database[0], "toys", "n", {"model": {"margin": "rank"}})
    logger.log_hyperparams({"learning_rate": "walrus"})
    logger.finalize("success")
    assert isinstance(logger, TrackedLogger)
    Tracked.of(tmp_path).flush()
    assert of(database[0], tmp_path).data.params == {"model.margin": "rank"}
