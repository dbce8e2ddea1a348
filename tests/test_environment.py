"""The report for bug reports: right where all is well, and still there where something is broken."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmrlhf import environment
from mmrlhf.cli import main


def git(folder, *words):
    me = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *me, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "a.txt").write_text("one")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "--quiet", "--message=one")
    git(tmp_path, "tag", "--annotate", "--message=v1", "v1")  # a name near by must not take the place of the hash
    return tmp_path


def test_json_holds_what_the_machine_says_of_itself(capsys):
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["python"].startswith(platform.python_version())
    assert report["packages"]["numpy"] == metadata.version("numpy")
    assert report["cpus"] == len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    assert report["devices"][0]["device"] == "cpu"


def test_text_holds_every_package_and_device(capsys):
    assert main(["env"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {*environment.PACKAGES, "mmrlhf", "commit", "python", "cpu"} <= set(names)


def test_memory_is_what_the_kernel_counts():
    if sys.platform != "linux":
        pytest.skip("reads /proc/meminfo")
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal"))
    assert environment.memory_gib() == pytest.approx(kib / 2**20, abs=0.1)


def test_a_missing_package_is_reported(monkeypatch):
    monkeypatch.setitem(environment.PACKAGES, "no-such-distribution", "no_such_module")
    assert environment.describe()["packages"]["no-such-distribution"] == "not installed"


def test_a_broken_package_is_reported(monkeypatch, tmp_path):
    (tmp_path / "cracked.py").write_text("raise OSError('libfoo.so.3:\\n  cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    assert environment.package("numpy", "cracked", load=False) == metadata.version("numpy")
    told = environment.package("numpy", "cracked", load=True)
    assert told == f"{metadata.version('numpy')} (broken: OSError: libfoo.so.3: cannot open)"


def test_without_torch_the_rest_is_still_reported(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["env", "--json"]) == 0
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    assert device["broken"].startswith("ModuleNotFoundError: ")


def fake_torch(bf16):
    card = SimpleNamespace(name="NVIDIA H200", total_memory=150 * 2**30, major=9, minor=0)
    return SimpleNamespace(
        cpu=SimpleNamespace(),
        backends=SimpleNamespace(
            cpu=SimpleNamespace(get_cpu_capability=lambda: "AVX2"),
            mps=SimpleNamespace(is_available=lambda: False),
        ),
        version=SimpleNamespace(cuda="13.2", hip=None),
        cuda=SimpleNamespace(
            device_count=lambda: 2,
            device=lambda index: contextlib.nullcontext(),
            get_device_properties=lambda index: card,
            is_bf16_supported=lambda including_emulation: bf16 and not including_emulation,
        ),
    )


@pytest.mark.parametrize("bf16", [True, False])
def test_each_gpu_is_listed_with_the_precision_it_is_fast_in(bf16, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", fake_torch(bf16))
    cpu, *gpus = environment.devices()
    assert cpu == {"device": "cpu", "instructions": "AVX2", "precision": "32-true"}
    assert [gpu["device"] for gpu in gpus] == ["cuda:0", "cuda:1"]
    assert (gpus[0]["name"], gpus[0]["memory_gib"], gpus[0]["capability"]) == ("NVIDIA H200", 150.0, "9.0")
    assert ("bf16-mixed" in gpus[0]["precision"]) is bf16


def test_the_commit_is_the_one_git_names(checkout):
    assert environment.commit(checkout) == git(checkout, "rev-parse", "HEAD")


def test_a_changed_file_makes_the_commit_dirty(checkout):
    (checkout / "a.txt").write_text("two")
    assert environment.commit(checkout) == git(checkout, "rev-parse", "HEAD") + "-dirty"


def test_a_package_inside_another_repository_has_no_commit(checkout):
    inside = checkout / "site-packages"
    inside.mkdir()
    assert environment.commit(inside) is None


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.commit(checkout) is None
