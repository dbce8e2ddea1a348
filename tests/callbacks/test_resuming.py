"""A training goes on from the newest checkpoint that is whole, and names those that it passes over."""

import logging
import os
from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from mmrlhf import durable
from mmrlhf.callbacks.resuming import by_step, chosen, folder_of, newest, require_readable


def saved(checkpoints, step, shards=False):
    folder = folder_of(checkpoints, step)
    draft = durable.begin(folder)
    if shards:
        (draft / "state").mkdir()
        (draft / "state" / "__0_0.distcp").write_bytes(b"weights")
    else:
        (draft / "state").write_bytes(b"weights")
    durable.publish(draft, folder, durable.settle(draft, durable.contents(draft)), {"step": step})
    return folder


def damage(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_without_checkpoints_a_training_begins(tmp_path):
    assert newest(tmp_path / "checkpoints") is None
    durable.begin(folder_of(tmp_path / "checkpoints", 4))
    assert newest(tmp_path / "checkpoints") is None, "a draft is no checkpoint"


def test_the_newest_is_that_of_the_most_steps_however_its_number_is_written(tmp_path):
    for step in (9, 10, 2):
        saved(tmp_path, step)
    (tmp_path / "step-00000010").rename(tmp_path / "step-10")
    (tmp_path / "step-00000011.tmp").mkdir()
    (tmp_path / "step-00000012.gone").mkdir()
    (tmp_path / "step-00000013").symlink_to(tmp_path / "step-10")
    assert list(by_step(tmp_path)) == [10, 9, 2]
    assert newest(tmp_path) == tmp_path / "step-10" / "state"


def test_what_is_damaged_or_incomplete_is_passed_over_and_named(tmp_path, caplog):
    for step in (2, 4, 6, 8):
        saved(tmp_path, step)
    damage(tmp_path / "step-00000008" / "state")
    (tmp_path / "step-00000006" / "COMPLETE.json").unlink()
    os.truncate(tmp_path / "step-00000004" / "state", 3)
    with caplog.at_level(logging.WARNING, "mmrlhf"):
        assert newest(tmp_path) == tmp_path / "step-00000002" / "state"
    told = [record.getMessage() for record in caplog.records]
    for step, why in ((8, "other contents"), (6, "no COMPLETE.json"), (4, "3 bytes instead of 7")):
        assert sum(f"step-0000000{step}: passed over" in line and why in line for line in told) == 1


def test_if_none_is_whole_a_training_does_not_silently_begin_again(tmp_path):
    damage(saved(tmp_path, 8) / "state")
    with pytest.raises(ValueError, match=r"step-00000008 \(damaged: state has other contents .* remove the folder"):
        newest(tmp_path)


def test_the_only_file_of_an_older_version_is_gone_on_from_where_there_is_nothing_better(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"old")
    assert newest(tmp_path) == tmp_path / "last.ckpt"
    folder = saved(tmp_path, 2)
    assert newest(tmp_path) == folder / "state"
    damage(folder / "state")
    assert newest(tmp_path) == tmp_path / "last.ckpt"


@pytest.fixture
def going_on(tmp_path, monkeypatch):
    """A training that, while its checkpoint after step 4 is verified, writes the next one and removes that."""
    digest = durable._digest

    def read(path):
        if "step-00000004" in str(path):
            durable.remove(tmp_path / "step-00000004")
            saved(tmp_path, 6)
        return digest(path)

    monkeypatch.setattr(durable, "_digest", read)


@pytest.mark.usefixtures("going_on")
@pytest.mark.parametrize("sought", [newest, chosen])
def test_a_checkpoint_that_is_removed_while_it_is_verified_gives_way_to_the_next(tmp_path, caplog, sought):
    saved(tmp_path, 4)
    with caplog.at_level(logging.WARNING, "mmrlhf"):
        assert sought(tmp_path) == tmp_path / "step-00000006" / "state"
    assert not caplog.records, "it was not damaged"


@pytest.mark.usefixtures("going_on")
def test_a_checkpoint_that_was_asked_for_and_is_removed_while_it_is_verified_is_told(tmp_path):
    saved(tmp_path, 4)
    with pytest.raises(ValueError, match="step-00000004: expected to read it to its end, but it was removed meanwhile"):
        chosen(tmp_path, 4)


def test_shards_that_are_removed_while_their_owner_is_looked_up_are_told(tmp_path, monkeypatch):
    state, real = saved(tmp_path, 4, shards=True) / "state", type(tmp_path).lstat

    def late(path):
        if path == state:
            durable.remove(tmp_path / "step-00000004")
        return real(path)

    monkeypatch.setattr("mmrlhf.callbacks.resuming.fault", lambda *_, **__: None)
    monkeypatch.setattr(type(tmp_path), "lstat", late)
    with pytest.raises(ValueError, match="step-00000004: expected to read it to its end, but it was removed meanwhile"):
        chosen(tmp_path)


def test_the_path_is_never_one_that_could_be_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "http-runs", 2)
    found = newest(type(tmp_path)("http-runs"))
    assert found.is_absolute()


def test_shards_are_read_for_all_ranks_by_the_first_and_one_file_by_each(tmp_path, monkeypatch):
    saved(tmp_path / "shards", 2)
    damage(saved(tmp_path / "shards", 4, shards=True) / "state" / "__0_0.distcp")
    saved(tmp_path / "file", 2)
    damage(saved(tmp_path / "file", 4) / "state")
    assert newest(tmp_path / "shards").parent.name == newest(tmp_path / "file").parent.name == "step-00000002"
    monkeypatch.setenv("RANK", "1")
    assert newest(tmp_path / "shards").parent.name == "step-00000004"
    assert newest(tmp_path / "file").parent.name == "step-00000002"
    os.truncate(tmp_path / "shards" / "step-00000004" / "state" / "__0_0.distcp", 1)
    assert newest(tmp_path / "shards").parent.name == "step-00000002"


def test_shards_are_refused_by_a_strategy_that_reads_one_file(tmp_path):
    shards, file = saved(tmp_path, 2, shards=True) / "state", saved(tmp_path, 4) / "state"
    for strategy in (SingleDeviceStrategy("cpu"), DDPStrategy()):
        require_readable(file, SimpleNamespace(strategy=strategy))
        with pytest.raises(ValueError, match=r"found shards; go on with the trainer\.strategy"):
            require_readable(shards, SimpleNamespace(strategy=strategy))
    require_readable(shards, SimpleNamespace(strategy=ModelParallelStrategy()))


@pytest.mark.parametrize("name", ["", "state", "state/__0_0.distcp"])
def test_shards_of_another_user_are_code_of_another_user_and_are_refused(tmp_path, monkeypatch, name):
    foreign, real = saved(tmp_path, 2, shards=True) / name, type(tmp_path).lstat
    state, trainer = tmp_path / "step-00000002" / "state", SimpleNamespace(strategy=ModelParallelStrategy())
    require_readable(state, trainer)
    other = SimpleNamespace(st_uid=os.getuid() + 1)
    monkeypatch.setattr(type(tmp_path), "lstat", lambda path: other if path == foreign else real(path))
    with pytest.raises(
        ValueError, match=f"{foreign}: expected shards of this user .* of user {os.getuid() + 1}; .*chown"
    ):
        require_readable(state, trainer)
