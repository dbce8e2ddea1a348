"""What is to be done before it is begun: which cells are done, which failed, which remain, and how long that takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from ..fingerprint import of_value
from .cells import TASK, TRAINING, Account, State, Task, state_of
from .design import Design
from .grid import Cell, option
from .rehearsing import rehearse


@dataclass(frozen=True)
class Plan:
    """Tasks with what has become of them so far."""

    tasks: Sequence[Task]
    states: Mapping[str, State]
    accounts: Mapping[str, Account]
    retry_failed: bool

    @property
    def to_do(self) -> list[Task]:
        """What is to be run, in the order of the tasks."""
        wanted = {"new", "stopped"} | ({"failed"} if self.retry_failed else set())
        return [task for task in self.tasks if self.states[task.name] in wanted]

    def seconds(self, parallel: int) -> float | None:
        """How long the rest takes, going by the cells that are done; None where none is."""
        if not self.to_do:
            return 0.0
        known = [account.seconds for account in self.accounts.values() if account.status == "done"]
        return fmean(known) * len(self.to_do) / min(parallel, len(self.to_do)) if known else None


def planned(tasks: Sequence[Task], folder_of: Mapping[str, Path], retry_failed: bool) -> Plan:
    """Look at the folders of all tasks."""
    accounts = {task.name: Account.read(folder_of[task.name]) for task in tasks}
    return Plan(
        tasks,
        {task.name: state_of(folder_of[task.name]) for task in tasks},
        {name: account for name, account in accounts.items() if account is not None},
        retry_failed,
    )


def rehearsed(design: Design, cells: Sequence[Cell]) -> dict[str, str]:
    """A digest of every combination's resolved settings: those of cells that are done are known, others are read.

    Two combinations that are the same training are refused, and so is one that has become another training.
    """
    tasks = [Task.read(path.parent) for path in sorted((design.out / "cells").glob(f"*/{TASK}"))]
    known = {task.cell: task.digest for task in tasks}
    begun = {task.name: of_value(task.overrides) for task in tasks if state_of(design.folder(task.name)) == "done"}
    unread = {cell.group: cell for cell in cells if begun.get(cell.name) != of_value(cell.overrides)}
    found = _read(design, list(unread.values())) if unread else {}
    if other := [group for group, digest in found.items() if known.get(group, digest) != digest]:
        raise ValueError(
            f"{other[0]}: expected the settings with which it was begun, got others: the program, or a value's type, "
            "has changed; give another out"
        )
    _require_distinct(known | found)
    return known | found


def _read(design: Design, cells: Sequence[Cell]) -> dict[str, str]:
    """Let the program read the options of these combinations and of their evaluations."""
    plain = [option("run.out", "rehearsal"), option("run.tracking", None)]
    commands = [(*design.training(cell, design.fraction), *plain) for cell in cells]
    for split in filter(None, (design.split, design.test_split)):
        commands += design.evaluations(Path("cell"), Path("cell", TRAINING), split, 0, "cell")
    return dict(zip([cell.group for cell in cells], rehearse(design.program, commands), strict=False))


def _require_distinct(digests: Mapping[str, str]) -> None:
    seen: dict[str, str] = {}
    for group, digest in digests.items():
        if digest in seen:
            raise ValueError(
                f"axes: expected different trainings, got {seen[digest]} and {group}, whose settings are the same; say "
                "in void where an axis says nothing, or keep one value"
            )
        seen[digest] = group


def show(design: Design, plan: Plan, parallel: int, console: Console | None = None) -> None:
    """Print a line for each combination: its cells by what has become of them, and the metric's mean."""
    table = Table("cell", "done", "failed", "to do", design.metric, title=f"{design.name}: {len(plan.tasks)} cells")
    to_do = Counter(task.cell for task in plan.to_do)
    for group in dict.fromkeys(task.cell for task in plan.tasks):
        names = [task.name for task in plan.tasks if task.cell == group]
        states = Counter(plan.states[name] for name in names)
        metrics = [plan.accounts[name].metrics for name in names if plan.states[name] == "done"]
        values = [found[design.metric] for found in metrics if found is not None]
        mean = f"{fmean(values):.4g}" if values else ""
        table.add_row(group, *(str(number) for number in (states["done"], states["failed"], to_do[group])), mean)
    total = Counter(plan.states.values())
    table.add_section()
    table.add_row("all", str(total["done"]), str(total["failed"]), str(len(plan.to_do)), "")
    printer = console or Console()
    printer.print(table)
    printer.print(f"to do: {len(plan.to_do)} cells, time: {told_time(plan.seconds(parallel))}")


def told_time(seconds: float | None) -> str:
    """A time in words.

    >>> told_time(None), told_time(42.4), told_time(3725)
    ('unknown', '42 s', '1 h 02 min')
    """
    if seconds is None:
        return "unknown"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
