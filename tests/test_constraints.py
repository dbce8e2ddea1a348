"""constraints.txt: the versions that are known to work together, and nothing else."""

from __future__ import annotations

import doctest
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "constraints.txt").read_text().splitlines()
PINS = {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in LINES}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("constraints", ROOT / "dev" / "constraints.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_line_is_a_name_and_a_version_that_any_index_could_serve():
    assert [line for line in LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[^ ]+", line)] == []
    assert [name for name, version in PINS.items() if version.local] == []


def test_every_direct_dependency_is_pinned_within_its_bounds():
    assert [str(need) for need in DIRECT if PINS[canonicalize_name(need.name)] not in need.specifier] == []


def test_each_name_is_pinned_once():
    assert len(PINS) == len(LINES)


def test_torch_is_a_version_that_every_machine_gets_from_the_same_place():
    # Some machines carry a local build of 2.13.0, without the torchvision that fits it.
    assert PINS["torch"] != Version("2.13.0")


def test_the_closure_follows_extras_and_markers(script):
    assert doctest.testmod(script).failed == 0
    graph = {
        "Root": ["One[Big]>=2", "absent; sys_platform == 'beos'"],
        "one": ["two", "three; extra == 'big'", "four; extra == 'small'"],
        "three": ["one", "Five_Six"],  # a circle, and a name to be normalised
    }
    graph["root"] = graph["Root"]
    assert script.closure("Root", graph.get) == {"one", "two", "three", "five-six"}


def test_a_stray_package_is_not_pinned(script):
    names = script.closure("pytest", script.metadata.requires)
    assert "pluggy" in names
    assert "torch" not in names


@pytest.mark.parametrize(("version", "url"), [("2.13.0+cpu", None), ("1.0", '{"url": "file:a.whl"}')])
def test_a_local_build_is_refused(script, monkeypatch, version, url):
    class Planted:
        name = "planted"
        read_text = staticmethod(lambda name: url)

    Planted.version = version
    monkeypatch.setattr(script.metadata, "distribution", lambda name: Planted)
    with pytest.raises(SystemExit, match="was built locally"):
        script.pin("planted")
