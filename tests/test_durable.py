"""A folder that is whole or not there: a writer is killed at every call that touches the disk, and at every byte."""

import os
import resource
import signal
import sys
from pathlib import Path

import pytest

from mmrlhf import durable
from mmrlhf.jsonl import loads

CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fsync"}
FILES = {"state/one": b"a" * 40, "state/deep/two": b"b" * 5000, "three": b""}


def write(folder, files=FILES):
    """Write a folder as a single process does."""
    draft = durable.begin(folder)
    for name, content in files.items():
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        (draft / name).write_bytes(content)
    durable.publish(draft, folder, durable.settle(draft, durable.contents(draft)), {"step": 1})


def audited_fsync(fsync=os.fsync):
    def synced(descriptor):
        sys.audit("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    return synced


def in_child(work):
    """Do something in a process of its own, and return how that ended."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(number, root, work):
    """Kill a process before its `number`th call that touches something below `root`; whether it came to that."""

    def counted():
        left = [number]

        def hook(event, args):
            where = str(args[0]) if event in CALLS else "/"
            if where.startswith(str(root)) or not where.startswith("/"):  # rmtree names what is inside by itself
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = audited_fsync()
        sys.addaudithook(hook)
        work()

    code = in_child(counted)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_a_written_folder_is_whole_and_says_so(tmp_path):
    write(tmp_path / "step-1")
    assert durable.fault(tmp_path / "step-1") is None
    assert {name: (tmp_path / "step-1" / name).read_bytes() for name in FILES} == FILES
    assert durable.sealed(tmp_path / "step-1")["step"] == 1
    assert sorted(durable.contents(tmp_path / "step-1")) == sorted(FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_killed_before_any_call_a_writer_leaves_nothing_that_looks_whole_and_is_not(tmp_path):
    number = 0
    while True:
        root = tmp_path / str(number)
        write(root / "step-1")
        died = killed_at(number, root, lambda root=root: write(root / "step-2"))
        assert durable.fault(root / "step-1") is None
        assert not (root / "step-2").exists() or durable.fault(root / "step-2") is None
        write(root / "step-2")
        assert durable.fault(root / "step-2") is None
        assert {path.name for path in root.iterdir()} == {"step-1", "step-2"}
        if not died:
            break
        number += 1
    assert number > 20, "so many calls a writer makes at least"


def test_killed_while_it_replaces_a_damaged_folder_a_writer_leaves_the_others(tmp_path):
    number, found = 0, set()
    while True:
        root = tmp_path / str(number)
        write(root / "step-1")
        write(root / "step-2")
        (root / "step-2" / "three").write_bytes(b"damage")
        died = killed_at(number, root, lambda root=root: write(root / "step-2"))
        assert durable.fault(root / "step-1") is None
        found.add(durable.fault(root / "step-2") if (root / "step-2").exists() else "away")
        if not died:
            break
        number += 1
    assert found == {"damaged: three has 6 bytes instead of 0", "away", None}


def test_killed_while_it_removes_a_folder_nothing_of_it_looks_whole_and_is_not(tmp_path):
    number = 0
    while True:
        root = tmp_path / str(number)
        write(root / "step-1")
        died = killed_at(number, root, lambda root=root: durable.remove(root / "step-1"))
        assert not (root / "step-1").exists() or durable.fault(root / "step-1") is None
        for left in root.iterdir():
            durable.remove(left)
        assert not list(root.iterdir())
        if not died:
            break
        number += 1
    assert number > 5


@pytest.mark.parametrize("limit", [0, 1, 30, 60, 120, 4999])
def test_killed_in_the_middle_of_a_file_or_of_the_seal_a_writer_leaves_a_draft(tmp_path, limit):
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        write(tmp_path / "step-2", {"state": b"s" * 20} if limit < 300 else FILES)

    write(tmp_path / "step-1")
    assert in_child(work) == -signal.SIGXFSZ
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-2.tmp"}
    assert durable.fault(tmp_path / "step-2.tmp").startswith("incomplete: no COMPLETE.json")
    assert durable.fault(tmp_path / "step-1") is None


def test_all_that_is_in_a_folder_is_on_the_disk_before_its_seal_and_that_before_its_name(tmp_path):
    told, read = os.pipe()[::-1]

    def work():
        def hook(event, args):
            if event in CALLS:
                os.write(told, f"{event} {args[0]}\n".encode())

        os.fsync = audited_fsync()
        sys.addaudithook(hook)
        write(tmp_path / "step-1")

    assert in_child(work) == 0
    os.close(told)
    with os.fdopen(read) as file:
        events = [line.split(" ", 1) for line in file.read().splitlines()]
    draft = tmp_path / "step-1.tmp"
    order = [(event, path) for event, path in events if event in {"fsync", "os.rename"}]
    sealed = order.index(("os.rename", str(draft / "COMPLETE.json.tmp")))
    named = order.index(("os.rename", str(draft)))
    synced = {path for event, path in order[:sealed] if event == "fsync"}
    assert synced >= {str(draft / name) for name in FILES} | {str(draft / "COMPLETE.json.tmp")}
    folders = {path for event, path in order[sealed:named] if event == "fsync"}
    assert folders >= {str(draft), str(draft / "state"), str(draft / "state" / "deep")}
    assert ("fsync", str(tmp_path)) in order[named:]


def flipped(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda folder: flipped(folder / "state/one", 0), "damaged: state/one has other contents than were written"),
        (lambda folder: flipped(folder / "state/deep/two", 4999), "damaged: state/deep/two has other contents"),
        (lambda folder: os.truncate(folder / "state/one", 39), "damaged: state/one has 39 bytes instead of 40"),
        (lambda folder: (folder / "three").write_bytes(b"!"), "damaged: three has 1 bytes instead of 0"),
        (lambda folder: (folder / "three").unlink(), "damaged: three is missing, or a link"),
        (lambda folder: (folder / "three").rename(folder / "x").with_name("three").symlink_to("x"), "or a link"),
        (lambda folder: (folder / "COMPLETE.json").unlink(), "incomplete: no COMPLETE.json that can be read"),
        (lambda folder: os.truncate(folder / "COMPLETE.json", 50), "incomplete: no COMPLETE.json that can be read"),
        (lambda folder: (folder / "COMPLETE.json").write_text("[]"), "incomplete: no COMPLETE.json that can be read"),
        (lambda folder: (folder / "COMPLETE.json").write_text('{"files": 3}'), "incomplete: no COMPLETE.json"),
        (lambda folder: (folder / "COMPLETE.json").write_text('{"files": {"three": 3}}'), "not described by the seal"),
    ],
)
def test_every_damage_is_found_and_named(tmp_path, damage, found):
    write(tmp_path / "step-1")
    damage(tmp_path / "step-1")
    assert found in durable.fault(tmp_path / "step-1")


@pytest.mark.parametrize("looks", [1, 2, 3])
def test_a_file_that_goes_while_it_is_looked_at_is_damage_and_no_error(tmp_path, monkeypatch, looks):
    write(tmp_path / "step-1")
    left, stat = [looks], os.stat

    def seen(path, **told):
        found = stat(path, **told)
        if str(path).endswith("three"):
            left[0] -= 1
            if left[0] == 0:
                Path(path).unlink()
        return found

    monkeypatch.setattr(os, "stat", seen)
    found = durable.fault(tmp_path / "step-1")
    monkeypatch.undo()
    there = (tmp_path / "step-1" / "three").exists()
    assert (found is None) if there else found.startswith("damaged: three ")


def test_what_can_be_seen_without_reading_is_found_without_reading(tmp_path):
    write(tmp_path / "step-1")
    flipped(tmp_path / "step-1" / "state/one", 0)
    assert durable.fault(tmp_path / "step-1", thorough=False) is None
    os.truncate(tmp_path / "step-1" / "state/one", 39)
    assert "39 bytes" in durable.fault(tmp_path / "step-1", thorough=False)


def test_a_file_that_only_its_writer_sees_is_not_sealed(tmp_path):
    draft = durable.begin(tmp_path / "step-1")
    (draft / "state").write_bytes(b"here")
    told = durable.settle(draft, ["state"])
    for elsewhere in ({"other": told["state"]}, {"state": told["state"] | {"bytes": 5}}):
        with pytest.raises(OSError, match="one file system"):
            durable.publish(draft, tmp_path / "step-1", elsewhere, {})
        assert not (tmp_path / "step-1").exists()


def test_the_seal_tells_sizes_and_sha256_as_other_tools_do(tmp_path):
    write(tmp_path / "step-1", {"abc": b"abc"})
    told = loads((tmp_path / "step-1" / "COMPLETE.json").read_bytes())
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert told == {"step": 1, "files": {"abc": {"bytes": 3, "sha256": digest}}}
