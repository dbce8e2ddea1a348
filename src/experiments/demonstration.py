"""The verb `demo`: everything on the embedded world, from nothing to a heat map over w and k.

Every stage is a verb in a process of its own, as a user would run it; what is finished is not made again.

    python -m mmrlhf.experiments.demonstration VERB ...     # one stage, which ends with whoever started it
"""

from __future__ import annotations

import logging
import runpy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import pandas as pd  # type: ignore[import-untyped]
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from .. import jsonl
from ..settings import alone, claim
from .cells import tail
from .collect import sweep_record
from .launching import end_all, has_ended, started
from .results import Results, collected
from .running import follow
from .wording import findings

log = logging.getLogger(__name__)
_MARKER, _JOURNAL, _LOGS = "demo.json", "stages.jsonl", "logs"
_RESAMPLES = 2000
_QUESTIONS, _SIGHT, _TALK, _JUDGING, _ALIGNING = 1500, 220, 450, 150, 40
"""Less than elsewhere, so that all of it takes minutes: questions of the world, and steps of each training."""
_POLL = 0.1


class Stage(NamedTuple):
    """A verb with its options, run in the demo's folder."""

    name: str
    seconds: float
    """About what it takes on two cores."""
    words: tuple[str, ...]


def demo(out: Path, seed: int = 0, effort: float = 1.0) -> None:
    """Build the world, a reward model and a small grid over w and k, and report what it shows; in minutes.

    Run again, it continues where it was stopped; what is finished is left as it is.

    Args:
        out: Folder of all that is made; created when missing.
        seed: Of the world and of the reward model.
        effort: Part of the usual questions and training steps; less than 1 is for trying the demo out.
    """
    if not 0 < effort <= 1:
        raise ValueError(f"effort: expected more than 0 and at most 1, got {effort}")
    with alone(out):
        claim(out, _MARKER, {"seed": seed, "effort": effort}, "a demo")
        (out / _LOGS).mkdir(exist_ok=True)
        with jsonl.Journal(out / _JOURNAL, "stage") as journal:
            planned = stages(seed, effort)
            left = [stage for stage in planned if stage.name not in journal.done]
            with _display(planned, left) as advance:
                for stage in left:
                    began = time.monotonic()
                    _run(stage, out, advance)
                    journal.append({"stage": stage.name, "seconds": round(time.monotonic() - began, 1)})
    _tell(out)


def stages(seed: int, effort: float) -> list[Stage]:
    """All stages in their order."""
    configs = {
        name: str(files(__package__).joinpath("demonstrated", f"{name}.yaml")) for name in ("reward", "dpo", "sweep")
    }

    def part(number: int) -> str:
        return str(max(2, round(number * effort)))

    cell = ("--train.verb", "train-dpo", "--train.config", configs["dpo"])
    made = ("--ranked", "world/ranked.jsonl", "--media", "world/media")
    steps = ("--trainer.max_steps", part(_JUDGING))
    return [
        Stage("the world", 170, ("world", "--out", "world", "--preview", "world.png", "--seed", str(seed), "--queries",
              str(max(80, round(_QUESTIONS * effort))), "--sight-steps", part(_SIGHT), "--talk-steps", part(_TALK))),
        Stage("shards", 8, ("pack", *made, "--out", "shards")),
        Stage("a reward model", 50, ("train-reward", "--config", configs["reward"], "--run.seed", str(seed), *steps)),
        Stage("rewards", 20, ("score", "shards", "--reward", "reward/model", "--critique", "none", "--out",
              "rewards.jsonl")),
        Stage("log-probs of the reference", 20, ("score", "shards", "--reference", "world/policy", "--out",
              "reference.jsonl")),
        Stage("what the rewards are worth", 10, ("evaluate", "rewards", *made, "--scores", "rewards.jsonl", "--split",
              "test", "--out", "rewards", "--resamples", str(_RESAMPLES))),
        Stage("the grid over w and k", 220, ("sweep", "--config", configs["sweep"], "--retry-failed", *cell,
              "--train.overrides.trainer.max_steps", part(_ALIGNING), "--max-parallel", "2")),
        Stage("the report", 15, ("report", "--sweep", "sweep", "--out", "report", "--resamples", str(_RESAMPLES))),
    ]  # fmt: skip


@contextmanager
def _display(planned: Sequence[Stage], left: Sequence[Stage]) -> Iterator[Progress]:
    """One line that names the stage, and the time that is left if the stages take what they usually do."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    total = sum(stage.seconds for stage in planned)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        progress.update(progress.add_task("demo", total=total), completed=total - sum(stage.seconds for stage in left))
        yield progress


def _run(stage: Stage, out: Path, progress: Progress) -> None:
    """Run one stage to its end; what it says goes to its log."""
    [task] = progress.task_ids
    before = progress.tasks[0].completed
    progress.update(task, description=stage.name)
    record = out / _LOGS / f"{stage.name.replace(' ', '-')}.log"
    began = time.monotonic()
    with record.open("ab") as file:
        start = file.tell()
        process = started([__name__, *stage.words], file, cwd=out)
        try:
            while not has_ended(process):
                time.sleep(_POLL)
                share = min(0.95, (time.monotonic() - began) / stage.seconds)
                progress.update(task, completed=before + share * stage.seconds)
        finally:
            end_all([process])
    if process.returncode:
        said = tail(record, start) or "without a word"
        raise ValueError(
            f"{stage.name}: `mmrlhf {stage.words[0]}` ended with {process.returncode}: {said}; see {record}"
        )
    progress.update(task, completed=before + stage.seconds)


def _tell(out: Path) -> None:
    """What was found, where it stands, and how to look further."""
    found = _found(out)
    console = Console()
    table = RichTable("cell", "mean", "95 %", "from DPO", "95 %", "", title=found.metric, box=box.SIMPLE_HEAD)
    for _, row in found.cells.iterrows():
        away = (
            ("", "") if pd.isna(row["difference"]) else _shown(row, "difference", "difference_low", "difference_high")
        )
        table.add_row(row["cell"], *_shown(row, "mean", "low", "high"), *away, row["verdict"])
    console.print(table)
    for line in findings(found):
        console.print(line, highlight=False)
    told = {
        "the report": out / "report" / "report.html",
        "what the rewards are worth": out / "rewards" / "report.md",
        "all runs": f"mlflow ui --backend-store-uri sqlite:///{out / 'mlflow.db'}",
    }
    for name, where in told.items():
        console.print(f"{name}: {where}", highlight=False, soft_wrap=True)


def _shown(row: pd.Series, value: str, low: str, high: str) -> tuple[str, str]:
    return f"{row[value]:.3f}", f"{row[low]:.3f} to {row[high]:.3f}"


def _found(out: Path) -> Results:
    uri, parent = sweep_record(out / "sweep")
    return collected(uri, parent, resamples=_RESAMPLES)


def main() -> None:
    """Run the verb that the command line names, as long as the process that started this one lives."""
    follow()
    runpy.run_module("mmrlhf", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
