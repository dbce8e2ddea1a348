"""The house stands as drawn: imports point down, and every room is registered, documented and small."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import mmrlhf
from mmrlhf.cli import VERBS, verb_function
from mmrlhf.options import read_options

ROOT = Path(__file__).parents[1]
SOURCE = {str(path.relative_to(ROOT / "src")): path.read_text() for path in sorted((ROOT / "src").rglob("*.py"))}
DOORS = {"convert", "critique", "examine", "export", "features", "judge", "score", "serve", "train"}
ROOF = {"cli", "__main__"}
LINES_OF_A_FILE = 300
LINES_OF_A_FUNCTION = 40
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# The one law ------------------------------------------------------------------------------------------------


def violations(files: dict[str, str]) -> list[str]:
    """What breaks the law: arrows point down (roof, doors, wings, ground); neighbours do not know each other.

    `files` maps a path below `src` to its text. A wing is a folder. A file beside it is ground, unless it is
    a door or the roof. Ground files must not import in circles.
    """
    wings = {path.split("/")[0] for path in files if "/" in path}
    rooms = {path.split("/")[0].removesuffix(".py") for path in files}
    ground_imports: dict[str, set[str]] = {}
    found = []
    for path, text in sorted(files.items()):
        room = path.split("/")[0].removesuffix(".py")
        for line, target in imported_rooms(path, text, rooms):
            if target == "(absolute)":
                found.append(f"{path}:{line}: imports the package by its name; import relatively")
            elif target == "(outside)":
                found.append(f"{path}:{line}: imports from outside the package")
            elif target != room and not may_import(room, target, wings):
                found.append(f"{path}:{line}: {room} must not import {target}")
            elif target != room and floor(room, wings) == "ground":
                ground_imports.setdefault(room, set()).add(target)
    return found + [f"{room}.py: imports itself in a circle" for room in sorted(circular(ground_imports))]


def imported_rooms(path: str, text: str, rooms: set[str]) -> list[tuple[int, str]]:
    """Line and room of every import of our own, wherever it stands in the file."""
    folder = path.split("/")[:-1]
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
            found += [(node.lineno, "(absolute)") for name in names if name in {"mmrlhf", "src"}]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if (node.module or "").split(".")[0] in {"mmrlhf", "src"}:
                found.append((node.lineno, "(absolute)"))
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) + 1 - node.level] + (node.module or "").split(".") * bool(node.module)
            if node.level > len(folder) + 1:
                found.append((node.lineno, "(outside)"))
            elif base:
                found.append((node.lineno, base[0]))
            else:
                names = [alias.name for alias in node.names]
                found += [(node.lineno, name if name in rooms else "__init__") for name in names]
    return found


def floor(room: str, wings: set[str]) -> str:
    if room in ROOF:
        return "roof"
    if room in DOORS:
        return "door"
    return "wing" if room in wings else "ground"


def may_import(room: str, target: str, wings: set[str]) -> bool:
    below = {
        "roof": {"door", "wing", "ground"},
        "door": {"wing", "ground"},
        "wing": {"ground"},
        "ground": {"ground"},
    }
    return floor(room, wings) == "roof" or floor(target, wings) in below[floor(room, wings)]


def circular(graph: dict[str, set[str]]) -> set[str]:
    """The nodes that can be reached from themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen

    return {node for node in graph if node in reached(node)}


def test_imports_point_down():
    assert violations(SOURCE) == []


SOUND = {
    "__init__.py": "",
    "text.py": "",
    "records.py": "from .text import clean",
    "world/__init__.py": "",
    "world/build.py": "from ..records import Query\nfrom .draw import picture\nimport json",
    "world/draw.py": "from .. import text, __version__",
    "train.py": "from .world.build import world\nfrom . import records",
    "cli.py": "from . import train, world",
}


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        (
            "world/draw.py",
            "from ..curation.steps import x",
            "world/draw.py:1: world must not import curation",
        ),
        (
            "world/draw.py",
            "def f():\n    from .. import curation",
            "world/draw.py:2: world must not import curation",
        ),
        (
            "world/draw.py",
            "if TYPE_CHECKING:\n  from ..train import fit",
            "world/draw.py:2: world must not import train",
        ),
        ("text.py", "from .world import draw", "text.py:1: text must not import world"),
        ("text.py", "from . import cli", "text.py:1: text must not import cli"),
        ("score.py", "from .train import fit", "score.py:1: score must not import train"),
        ("text.py", "import mmrlhf.records", "text.py:1: imports the package by its name; import relatively"),
        ("cli.py", "from src.train import x", "cli.py:1: imports the package by its name; import relatively"),
        ("text.py", "from .. import x", "text.py:1: imports from outside the package"),
        ("world/draw.py", "from ... import x", "world/draw.py:1: imports from outside the package"),
    ],
)
def test_a_planted_violation_is_found(path, text, expected):
    neighbours = {"curation/__init__.py": "", "curation/steps.py": ""}
    assert violations(SOUND | neighbours) == []
    assert violations(SOUND | neighbours | {path: text}) == [expected]


def test_a_circle_on_the_ground_is_found():
    planted = SOUND | {"text.py": "def f():\n    from .stats import g", "stats.py": "from .records import h"}
    assert violations(planted) == [f"{room}.py: imports itself in a circle" for room in ("records", "stats", "text")]


# Packaging, documentation, size -----------------------------------------------------------------------------


def test_pyproject_lists_every_package():
    folders = {path.removesuffix("__init__.py").strip("/") for path in SOURCE if path.endswith("__init__.py")}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(declared) == sorted(".".join(["mmrlhf", *filter(None, name.split("/"))]) for name in folders)
    assert {str(Path(path).parent) for path in SOURCE} == {name or "." for name in folders}


@pytest.mark.parametrize("name", [module.name for module in pkgutil.walk_packages(mmrlhf.__path__, "mmrlhf.")])
def test_doctests_hold(name):
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.failed == 0


@pytest.mark.parametrize("path", SOURCE)
def test_files_and_functions_are_small(path):
    assert SOURCE[path].count("\n") < LINES_OF_A_FILE
    nodes = [node for node in ast.walk(ast.parse(SOURCE[path])) if isinstance(node, FUNCTIONS)]
    assert [node.name for node in nodes if length(node) >= LINES_OF_A_FUNCTION] == []


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function without its docstring and decorators."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    docstring = function.body[0]
    return lines - ((docstring.end_lineno or 0) - docstring.lineno + 1)


def test_the_length_of_a_function_leaves_out_its_docstring():
    (function,) = ast.parse('@cached\ndef f(\n    x: int,\n):\n    """One.\n\n    Two.\n    """\n    return x\n').body
    assert isinstance(function, ast.FunctionDef)
    assert length(function) == 4


@pytest.mark.parametrize("path", SOURCE)
def test_every_public_name_is_documented(path):
    tree = ast.parse(SOURCE[path])
    assert ast.get_docstring(tree)
    members = [member for node in tree.body if isinstance(node, ast.ClassDef) for member in node.body]
    named = [node for node in [*tree.body, *members] if isinstance(node, (*FUNCTIONS, ast.ClassDef))]
    public = [node for node in named if node.name[0] != "_" and not is_overload(node)]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def is_overload(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Whether this is one signature of several, which the implementation documents."""
    return any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)


# The whole repository ---------------------------------------------------------------------------------------


def repository_files() -> list[Path]:
    """The files that are or would be committed; without git, the sources."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return [ROOT / "src" / path for path in SOURCE]
    words = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_no_room_is_a_drawer_for_everything():
    drawers = {"utils", "util", "common", "helpers", "helper", "misc"}
    parts = {part.split(".")[0] for path in repository_files() for part in path.relative_to(ROOT).parts}
    assert parts & drawers == set()


def test_no_file_points_out_of_the_repository():
    # Each in two pieces, so that this file does not find itself.
    outside = re.compile("|".join([r"\.\./" + "shared", "/wo" + "rk/", "/tm" + "p/(bash|w/)", "/ro" + "ot/"]).encode())
    found = [str(path.relative_to(ROOT)) for path in repository_files() if outside.search(path.read_bytes())]
    assert found == []


# Configs: configs/VERB.yaml shows every option at its default; configs/VERB/NAME.yaml are others.
# The file of a verb of two words has a dash between them. A trainer's options are those of several classes: its
# configs are in a folder of their own, and tests/test_train.py reads them; what they run on is in configs/trainer,
# which tests/parallel/test_configs.py reads. --------------------------------------------------------------

TRAINERS = {"train-dpo": "dpo", "train-reward": "reward"}
MACHINES = "trainer"
CONFIGS = sorted(
    str(path.relative_to(ROOT / "configs"))
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name not in {MACHINES, *TRAINERS.values()}
)


def verb_of(name: str) -> str:
    stem = Path(name).parts[0].removesuffix(".yaml")
    return {verb.replace(" ", "-"): verb for verb in VERBS}.get(stem, stem)


def test_every_verb_with_options_has_a_config():
    assert {verb_of(name) for name in CONFIGS if "/" not in name} == set(VERBS) - {"env"} - set(TRAINERS)
    assert all(list((ROOT / "configs" / folder).glob("*.yaml")) for folder in TRAINERS.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_understood_by_its_verb(name):
    verb = verb_of(name)
    assert verb in VERBS, f"configs/{name}: call it after a verb ({', '.join(VERBS)}), or put it in such a folder"
    options = read_options(verb_function(verb), f"mmrlhf {verb}", ["--config", str(ROOT / "configs" / name)])
    assert yaml.safe_load((ROOT / "configs" / name).read_text()).keys() <= options.keys()


@pytest.mark.parametrize("name", [name for name in CONFIGS if "/" not in name])
def test_the_config_of_a_verb_shows_every_default(name):
    parameters = inspect.signature(verb_function(verb_of(name))).parameters.values()
    written = yaml.safe_load((ROOT / "configs" / name).read_text())
    assert list(written) == [parameter.name for parameter in parameters]
    defaults = {
        parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty
    }
    assert {key: written[key] for key in defaults} == defaults
