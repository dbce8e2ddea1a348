"""A checkpoint is a folder here or one of the hub's cache; nothing that runs or is unpickled comes along."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest

from mmrlhf.checkpoints import require_pinned, require_safetensors, resolved

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A cache of the hub with a repository in it, and no connection."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub/models--somebody--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the hub is asked for."""
    calls = []

    def download(name, **options):
        calls.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return calls


@pytest.mark.parametrize("name", ["config.json", "processor_config.json"])
def test_a_folder_with_a_checkpoint_is_itself(name, tmp_path):
    (tmp_path / name).write_text("{}")
    assert resolved(tmp_path) == tmp_path
    assert resolved(str(tmp_path), revision="main") == tmp_path


def test_a_folder_of_the_home_may_be_abbreviated(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/config.json").write_text("{}")
    assert resolved("~/policy") == tmp_path / "policy"


def test_a_folder_is_preferred_to_a_repository_of_the_same_name(monkeypatch, tmp_path, asked):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    Path("owner/name/config.json").write_text("{}")
    assert resolved("owner/name") == Path("owner/name")
    assert not asked


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a checkpoint, found no config.json in it; check the path") as told:
        resolved(tmp_path)
    assert str(tmp_path) in str(told.value)


@pytest.mark.parametrize(
    "name", ["nothing", "/no/where", "a/b/c", "./a", "https://hub/a/b", "a b/c", "../../a/b", "../a", ".a/b", ""]
)
def test_what_is_neither_a_folder_nor_the_name_of_a_repository_is_refused(name, asked, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"expected a (folder or the name of a repository|checkpoint)"):
        resolved(name)
    assert not asked


def test_what_the_hub_calls_no_name_is_refused_as_any_other():
    with pytest.raises(ValueError, match=r"checkpoint 'runs/last\.': neither a folder here nor to be had from the hub"):
        resolved("runs/last.")


def test_a_repository_in_the_cache_needs_no_connection(hub):
    assert resolved("somebody/something") == hub
    assert resolved("somebody/something", revision=COMMIT) == hub


@pytest.mark.parametrize(
    ("name", "revision"), [("nobody/nothing", None), ("somebody/something", "f" * 40), ("somebody/something", "dev")]
)
def test_what_is_not_in_the_cache_cannot_be_had_without_a_connection(hub, name, revision):
    with pytest.raises(ValueError, match=rf"checkpoint '{name}': neither a folder here nor to be had from the hub \("):
        resolved(name, revision)


@pytest.mark.parametrize("code", [False, True])
def test_neither_pickles_nor_unasked_code_are_fetched(code, asked, tmp_path):
    assert resolved("owner/name", "v1", code=code) == tmp_path
    [(name, options)] = asked
    assert (name, options["revision"]) == ("owner/name", "v1")

    def comes(file):
        return any(fnmatch.fnmatch(file, pattern) for pattern in options["allow_patterns"])

    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    assert all(map(comes, [*wanted, "chat_template.jinja", "merges.txt"]))
    assert not any(map(comes, ["pytorch_model.bin", "a.pt", "a.pth", "a.ckpt", "a.pkl", "a.h5", "a.msgpack"]))
    assert comes("modeling_theirs.py") == code


@pytest.mark.parametrize(("trusted", "revision"), [(False, None), (False, "main"), (True, COMMIT)])
def test_code_of_one_commit_may_run(trusted, revision):
    require_pinned("owner/name", trusted, revision)


@pytest.mark.parametrize("revision", [None, "", "main", COMMIT[:-1], COMMIT + "0", COMMIT.upper(), f"{COMMIT}\n"])
def test_code_that_may_change_is_refused(revision):
    with pytest.raises(ValueError, match=r"a commit \(40 hexadecimal digits\) of 'owner/name', got ") as told:
        require_pinned("owner/name", True, revision)
    assert repr(revision) in str(told.value)


def test_weights_are_there_as_safetensors_or_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"expected weights as \*\.safetensors, found none; convert them"):
        require_safetensors(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    require_safetensors(tmp_path)
