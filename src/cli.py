"""The roof: every verb is wired here, once, and its options are the keyword arguments of a function.

A verb is a line of `VERBS`. Its help is the docstring of its function; its options, their types and their
defaults are the function's signature; a YAML file holds the same names. There is no other configuration.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json as jsonlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import __doc__ as purpose
from . import __version__, environment

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# `demo` first, then the pipeline in its order; `env` last. A verb's module is imported when it runs, not before.
VERBS = {
    "demo": "mmrlhf.experiments.demonstration:demo",
    "world": "mmrlhf.world.build:world",
    "import": "mmrlhf.formats.importing:import_data",
    "pack": "mmrlhf.datamodules.pack:pack",
    "data index": "mmrlhf.datamodules.indexing:index",
    "data check": "mmrlhf.datamodules.checking:check",
    "data describe": "mmrlhf.datamodules.describing:describe",
    "data fetch": "mmrlhf.datamodules.fetching:fetch",
    "data export": "mmrlhf.formats.exporting:export_data",
    "data make-rewardbench": "mmrlhf.evaluation.making:make_rewardbench",
    "score": "mmrlhf.score:score",
    "judge": "mmrlhf.judge:judge",
    "critique": "mmrlhf.critique:critique",
    "implicit-rewards": "mmrlhf.evaluation.implicit:implicit_rewards",
    "features": "mmrlhf.features:features",
    "train-dpo": "mmrlhf.train:train_dpo",
    "train-reward": "mmrlhf.train:train_reward",
    "convert-reward": "mmrlhf.convert:convert_reward",
    "export": "mmrlhf.export:export",
    "serve": "mmrlhf.serve:serve",
    "evaluate world": "mmrlhf.examine:evaluate_world",
    "evaluate rewardbench": "mmrlhf.evaluation.grading:evaluate_rewardbench",
    "evaluate rewards": "mmrlhf.evaluation.ranked:evaluate_rewards",
    "runs": "mmrlhf.experiments.runs:runs",
    "sweep": "mmrlhf.experiments.sweeping:sweep",
    "report": "mmrlhf.experiments.report:report",
    "env": "mmrlhf.cli:env",
}


def main(argv: Sequence[str] | None = None, verbs: Mapping[str, str] = VERBS) -> int:
    """Run one verb and return the exit status: 0, 2 for what the user can cure, 75 or 130 to be run again.

    Environment: `MMRLHF_TRACEBACK=1` shows where a user error was raised; `MMRLHF_LOG=debug` says more.
    """
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb not in verbs and rest and f"{verb} {rest[0]}" in verbs:
        verb, rest = f"{verb} {rest[0]}", rest[1:]
    if verb in {"-h", "--help"}:
        print(overview(verbs))
        return 0
    of_group = {name: target for name, target in verbs.items() if name.startswith(f"{verb} ")}
    if of_group and (not rest or rest[0] in {"-h", "--help"}):
        print(overview(of_group))
        return 0
    if verb == "--version":
        print(__version__)
        return 0
    try:
        _run(verb, rest, verbs)
    except (ValueError, OSError) as error:
        if os.environ.get("MMRLHF_TRACEBACK") == "1":
            raise
        prog = f"mmrlhf {verb}" if verb in verbs else "mmrlhf"
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mmrlhf {verb}: interrupted; run the same command again", file=sys.stderr)
        return 130
    return 0


def _run(verb: str, argv: Sequence[str], verbs: Mapping[str, str]) -> None:
    if verbs.get(verb) == VERBS["env"] and set(argv) <= {"--json", "--load"}:
        # The parser stands on packages whose failure `env` is there to report.
        env(json="--json" in argv, load="--load" in argv)
        return
    from .options import did_you_mean, read_options

    if verb not in verbs:
        verb = f"{verb} {argv[0]}" if argv and any(name.startswith(f"{verb} ") for name in verbs) else verb
        raise ValueError(f"unknown verb {verb!r}{did_you_mean(verb, verbs)} (verbs: {', '.join(verbs)})")
    _start_logging(os.environ.get("MMRLHF_LOG", "info"))
    function = verb_function(verb, verbs)
    if "argv" in inspect.signature(function).parameters:  # a trainer, whose options are those of several classes
        function(argv)
    else:
        function(**read_options(function, f"mmrlhf {verb}", argv))


def verb_function(verb: str, verbs: Mapping[str, str] = VERBS) -> Callable[..., None]:
    """The function behind a verb; its module is imported now."""
    module, name = verbs[verb].split(":")
    function: Callable[..., None] = getattr(importlib.import_module(module), name)
    return function


def overview(verbs: Mapping[str, str] = VERBS) -> str:
    """The verbs, one line each; nothing of theirs is imported, so that it comes at once."""
    width = max(map(len, verbs)) + 2
    lines = [f"  {verb:<{width}}{summary(target)}" for verb, target in verbs.items()]
    usage = "usage: mmrlhf VERB [--config FILE] [--option VALUE] ..."
    more = "`mmrlhf VERB --help` explains a verb; `mmrlhf --version` prints the version."
    return "\n".join([usage, "", purpose or "", "", *lines, "", more])


def summary(target: str) -> str:
    """The first line of the docstring of `module:function`, read from the source without importing it."""
    module, name = target.split(":")
    tree = ast.parse(_source(module).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return (ast.get_docstring(node) or "").split("\n")[0]
    raise LookupError(f"no function {name!r} in {module}")


def _source(module: str) -> Path:
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)  # of the top alone: to find a child would import its parents
    if spec is None or spec.origin is None:
        raise LookupError(f"no module {module!r}")
    return Path(spec.origin).parent.joinpath(*rest).with_suffix(".py") if rest else Path(spec.origin)


def _start_logging(level: str) -> None:
    known = ["debug", "info", "warning", "error"]
    if level.lower() not in known:
        raise ValueError(f"MMRLHF_LOG: expected one of {', '.join(known)}, got {level!r}")
    handler, form = _log_handler()
    logging.basicConfig(level=logging.WARNING, format=form, handlers=[handler])
    logging.getLogger("mmrlhf").setLevel(level.upper())


def _log_handler() -> tuple[logging.Handler, str]:
    if not sys.stderr.isatty():  # rich would break the lines of a cluster's log file at 80 characters
        return logging.StreamHandler(), "%(asctime)s %(levelname)s %(name)s: %(message)s"
    from rich.console import Console
    from rich.logging import RichHandler

    return RichHandler(console=Console(stderr=True), show_path=False, log_time_format="[%X]"), "%(message)s"


def env(json: bool = False, load: bool = False) -> None:
    """Print versions, devices and memory, for bug reports.

    Args:
        json: Print JSON instead of text.
        load: Also import every package, to find those that are installed and broken (some seconds).
    """
    report = environment.describe(load)
    print(jsonlib.dumps(report, indent=2) if json else environment.as_text(report))
