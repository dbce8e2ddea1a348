"""Checkpoints are whole or not there: a full disk, a signal and a damaged file cost steps, never a result."""

import errno
import logging
import os
import pickle
import resource
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from mmrlhf import durable
from mmrlhf.callbacks.consumption import ConsumptionGuard
from mmrlhf.callbacks.resuming import by_step
from mmrlhf.callbacks.running import fitted, watched
from mmrlhf.callbacks.saving import LocalFile, SaveWhole
from mmrlhf.callbacks.seeds import StepSeeds
from mmrlhf.preemption import Preempted, heard
from tests.datamodules.training_script import GLOBAL_BATCH, MICRO_BATCH, Dropping

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, EVERY = 11, 3


class Does(Callback):
    """Does something in the middle of a step."""

    def __init__(self, step, work):
        self.step, self.work = step, work

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Do it before the second micro-batch."""
        if trainer.global_step == self.step and batch_idx % trainer.accumulate_grad_batches == 1:
            self.work()


def fit(folder, *callbacks, every=EVERY, steps=STEPS):
    """Go on to the last step as the trainers do, and return the weights."""
    folder.mkdir(exist_ok=True)
    model = Dropping(folder)
    model.workers = 0
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        use_distributed_sampler=False,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        accumulate_grad_batches=GLOBAL_BATCH // MICRO_BATCH,
        max_epochs=-1,
        max_steps=steps,
        plugins=[LocalFile()],
        callbacks=[ConsumptionGuard(), StepSeeds(0), *callbacks, SaveWhole(folder / "checkpoints", every)],
    )
    model.validated_at = steps
    fitted(trainer, model, None, folder / "checkpoints", steps)
    assert trainer.global_step == steps
    return model.state_dict()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("whole"))


def begun(folder):
    """Stop in the middle of the step after the second checkpoint."""

    def stop():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(folder, Does(7, stop))
    assert list(by_step(folder / "checkpoints")) == [6, 3]


def test_two_are_kept_the_last_step_among_them_and_each_is_whole(tmp_path):
    fit(tmp_path)
    found = by_step(tmp_path / "checkpoints")
    assert list(found) == [11, 9]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000009", "step-00000011"]
    for step, folder in found.items():
        assert durable.fault(folder) is None
        assert durable.sealed(folder)["step"] == step
        state = torch.load(folder / "state", weights_only=True)
        assert state["global_step"] == step
        assert {"optimizer_states", "lr_schedulers", "callbacks", "loops"} <= state.keys()


def test_what_went_wrong_inside_a_step_is_not_saved_and_the_same_command_ends_with_the_same_weights(
    tmp_path, undisturbed
):
    begun(tmp_path)
    assert equal(fit(tmp_path), undisturbed)


def test_after_a_damaged_newest_checkpoint_the_one_before_ends_with_the_same_weights(tmp_path, undisturbed):
    begun(tmp_path)
    state = tmp_path / "checkpoints" / "step-00000006" / "state"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    assert equal(fit(tmp_path), undisturbed)
    assert starts(tmp_path) == [0, 3]
    assert durable.fault(tmp_path / "checkpoints" / "step-00000011") is None


def starts(folder):
    return [int(line[6:]) for line in (folder / "samples.log").read_text().splitlines() if line.startswith("start")]


def test_one_that_was_passed_over_is_not_counted_among_the_good(tmp_path):
    begun(tmp_path)
    os.truncate(tmp_path / "checkpoints" / "step-00000006" / "state", 5)

    def look():
        assert list(by_step(tmp_path / "checkpoints")) == [5, 3], "6 is newer, and of no use"

    fit(tmp_path, Does(6, look), every=5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_go_in_the_middle_of_a_step_it_ends_that_saves_and_asks_for_another_start(
    tmp_path, undisturbed, number, caplog
):
    with pytest.raises(Preempted) as ended, caplog.at_level(logging.WARNING, "mmrlhf"):
        fit(tmp_path, Does(4, lambda: os.kill(os.getpid(), number)))
    assert ended.value.code == 75
    assert number.name in caplog.text
    assert list(by_step(tmp_path / "checkpoints")) == [5, 3]
    assert equal(fit(tmp_path), undisturbed)
    assert starts(tmp_path) == [0, 5]


def broken(number=None, *_):
    """What becomes of a step whose data have gone, because of a signal or of something else."""
    if isinstance(number, int):
        os.kill(os.getpid(), number)
    raise RuntimeError("DataLoader worker is gone")


def disguised(number):
    """The same where whoever was called when the worker died makes another error of it."""
    try:
        broken(number)
    except RuntimeError as error:
        raise TypeError("unsupported callable") from error


def full(number):
    """Another error at the same time."""
    os.kill(os.getpid(), number)
    raise OSError("disk full")


def test_the_death_of_a_worker_is_known_in_disguise_and_other_errors_are_told(tmp_path, undisturbed):
    with pytest.raises(OSError, match="disk full"):
        fit(tmp_path, Does(4, lambda: full(signal.SIGTERM)))
    with pytest.raises(Preempted):
        fit(tmp_path, Does(7, lambda: disguised(signal.SIGTERM)))
    assert equal(fit(tmp_path), undisturbed)


def test_what_breaks_after_it_was_told_to_go_asks_for_another_start_and_nothing_else_does(tmp_path, undisturbed):
    with pytest.raises(RuntimeError, match="worker is gone"):
        fit(tmp_path, Does(4, broken))
    with pytest.raises(Preempted) as ended:
        fit(tmp_path, Does(7, lambda: broken(signal.SIGTERM)))
    assert ended.value.code == 75
    assert heard() is None
    assert equal(fit(tmp_path), undisturbed)
    assert starts(tmp_path) == [0, 3, 6]


def test_a_finished_training_is_not_trained_on_and_ends_with_the_same_weights(tmp_path, undisturbed):
    fit(tmp_path)
    assert equal(fit(tmp_path), undisturbed), "killed before its model was saved, say"
    assert starts(tmp_path) == [0]


def test_shards_of_a_run_are_not_gone_on_with_by_a_strategy_that_reads_one_file(tmp_path):
    begun(tmp_path)
    draft = durable.begin(tmp_path / "checkpoints" / "step-00000007")
    (draft / "state").mkdir()
    durable.publish(draft, tmp_path / "checkpoints" / "step-00000007", {}, {})
    with pytest.raises(ValueError, match="expected one file for SingleDeviceStrategy, found shards"):
        fit(tmp_path)


def written_to_a_full_disk(patch):
    """Let the state of step 9 be written to a device that is always full."""
    begin = durable.begin

    def begun(folder):
        draft = begin(folder)
        if folder.name.endswith("9"):
            (draft / "state").symlink_to("/dev/full")
        return draft

    patch.setattr(durable, "begin", begun)


def failing(name):
    """Let one part of the protocol find the disk full at step 9."""
    real = getattr(durable, name)

    def fails(path, *rest):
        if "step-00000009" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *rest)

    return lambda patch: patch.setattr(durable, name, fails)


FULL = [written_to_a_full_disk, *map(failing, ("begin", "settle", "publish", "write_json", "_sync"))]


@pytest.mark.parametrize("disk", FULL, ids=["device", "begin", "settle", "publish", "seal", "sync"])
def test_a_disk_that_is_full_ends_the_training_and_leaves_what_was_saved(tmp_path, undisturbed, disk):
    with pytest.MonkeyPatch.context() as patch:
        disk(patch)
        with pytest.raises(ValueError, match=r"step 9 could not be .*No space left.* MB free: make room.*from step 6"):
            fit(tmp_path)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000003", "step-00000006"], "and the room that the draft took is free"
    assert equal(fit(tmp_path), undisturbed)


def busy(folder):
    raise OSError("busy")


def test_what_cannot_be_removed_is_named_and_in_nobodys_way(tmp_path, undisturbed, caplog):
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "mmrlhf"):
        patch.setattr(durable, "remove", busy)
        assert equal(fit(tmp_path), undisturbed)
    assert "step-00000003: could not be removed (busy)" in caplog.text


@pytest.mark.parametrize("numbers", [250_000, 300_000, 262_144])
def test_a_disk_that_is_full_in_the_middle_of_a_file_is_named_and_not_what_torch_makes_of_it(tmp_path, numbers):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            LocalFile().save_checkpoint({"a": torch.zeros(numbers), "b": torch.zeros(numbers // 3)}, tmp_path / "state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_another_failure_of_torch_is_not_taken_for_one_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="worker is gone"):
        LocalFile().save_checkpoint({}, tmp_path / "state")


def test_a_disk_on_which_nothing_can_be_made_ends_the_training_too(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(ValueError, match=r"the checkpoint of step 3 could not be written: rank 0: .*Not a directory"):
        fit(tmp_path)


def test_what_killed_writers_have_left_is_tidied_up(tmp_path):
    for name in ("step-00000002.tmp", "step-00000001.gone"):
        (tmp_path / "checkpoints" / name / "state").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes.txt").write_text("of a user")
    fit(tmp_path, steps=6)
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == ["notes.txt", "step-00000003", "step-00000006"]


def test_a_run_of_the_former_version_is_gone_on_with_and_its_file_goes_when_there_are_two(tmp_path, undisturbed):
    begun(tmp_path)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-00000003" / "state").rename(checkpoints / "last.ckpt")
    for folder in by_step(checkpoints).values():
        durable.remove(folder)

    def look():
        assert list(by_step(checkpoints)) == [6]
        assert (checkpoints / "last.ckpt").exists(), "the only other one"

    assert equal(fit(tmp_path, Does(7, look)), undisturbed)
    assert starts(tmp_path) == [0, 3]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000009", "step-00000011"]


class Runs:
    """Makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_that_would_run_code_and_a_url_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Runs()}, tmp_path / "hostile")
    for asked in (True, False, None):
        with pytest.raises(pickle.UnpicklingError):
            LocalFile().load_checkpoint(tmp_path / "hostile", weights_only=asked)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ValueError, match="expected a checkpoint in a local file"):
        LocalFile().load_checkpoint("http://127.0.0.1:9/state")


def options(**more):
    names = ("precision", "max_epochs", "enable_progress_bar", "logger", "callbacks", "plugins", "default_root_dir")
    return dict.fromkeys(names) | {"max_steps": 2, "accelerator": "cpu", "logger": False} | more


def run(folder):
    return SimpleNamespace(out=folder, seed=0, tracking=None, experiment="", name=None, parent=None, save_every=1)


@pytest.mark.parametrize("callback", [ModelCheckpoint, lambda: OnExceptionCheckpoint(".")])
def test_callbacks_that_save_checkpoints_of_their_own_are_refused(tmp_path, callback):
    with pytest.raises(ValueError, match=r"expected none that saves checkpoints, got (Model|OnException)Checkpoint"):
        watched(options(callbacks=[callback()]), run(tmp_path), {}, Callback(), [], tmp_path / "checkpoints")


def test_lightning_looks_for_no_checkpoints_of_a_job_where_the_command_was_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpc_ckpt_1.ckpt").write_text("of another training")
    trainer = watched(options(), run(tmp_path / "out"), {}, Callback(), [], tmp_path / "out" / "checkpoints")
    assert trainer._checkpoint_connector._hpc_resume_path is None


def test_saving_is_asked_for_at_every_step_or_more_seldom(tmp_path):
    with pytest.raises(ValueError, match="save_every: expected 1 step or more, got 0"):
        SaveWhole(tmp_path, 0)
