"""A cell on the disk: `task.json` says what is to be done in its folder, `cell.json` what has become of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from .. import jsonl
from ..settings import alone, write_json

Role = Literal["cell", "baseline", "promoted", "test"]
State = Literal["new", "stopped", "done", "failed"]
TASK, ACCOUNT, LOG, EVALUATION, TRAINING = "task.json", "cell.json", "log.txt", "evaluation", "run"
_TOLD_LINES, _TOLD_LETTERS = 12, 2000


@dataclass(frozen=True)
class Task:
    """What is done in a cell's folder: commands, and what is read from what they write."""

    name: str
    cell: str
    seed: int
    overrides: Mapping[str, Any]
    role: Role
    fraction: float
    program: str
    train: Sequence[str] | None
    """None where an earlier training is evaluated."""
    run: str
    """Folder of the training."""
    evaluate: Sequence[Sequence[str]]
    metric: str
    prefix: str
    """Of the metrics' names in MLflow."""
    sweep: str
    tracked: bool
    digest: str
    """Of the training's resolved settings but for seed and folder; they may not change while the sweep grows."""

    @classmethod
    def read(cls, folder: Path) -> Task:
        """What was written into a cell's folder."""
        return cls(**jsonl.loads((folder / TASK).read_bytes()))

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / TASK, asdict(self))


@dataclass(frozen=True)
class Account:
    """What has become of a cell."""

    name: str
    cell: str
    overrides: Mapping[str, Any]
    seed: int
    role: Role
    fraction: float
    status: Literal["running", "stopped", "done", "failed"] = "running"
    started: float = 0.0
    """When it first began, in seconds of the epoch."""
    seconds: float = 0.0
    """What the finished commands took, of all attempts."""
    finished: int = 0
    """How many commands are finished."""
    error: str | None = None
    metrics: Mapping[str, float] | None = None

    @classmethod
    def read(cls, folder: Path) -> Account | None:
        """The account of a cell that has begun."""
        path = folder / ACCOUNT
        return cls(**jsonl.loads(path.read_bytes())) if path.exists() else None

    @classmethod
    def opened(cls, folder: Path, task: Task) -> Account:
        """The account of a cell that begins, or goes on."""
        there = cls.read(folder)
        if there is not None:
            return there if there.status == "done" else replace(there, status="running", error=None)
        return cls(task.name, task.cell, task.overrides, task.seed, task.role, task.fraction, started=time.time())

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        write_json(folder / ACCOUNT, asdict(self))


def state_of(folder: Path) -> State:
    """What has become of a cell that nobody runs now."""
    account = Account.read(folder)
    if account is None:
        return "new"
    return "stopped" if account.status == "running" else account.status


def is_running(folder: Path) -> bool:
    """Whether a process works in the folder."""
    try:
        with alone(folder):
            return False
    except ValueError:
        return True


def settled(folder: Path) -> Account | None:
    """The account of a cell whose process has ended; one that ended without a word has failed.

    None where another process still works in the folder.
    """
    account = Account.read(folder)
    if account is None or account.status == "running":
        if is_running(folder):
            return None
        task = Task.read(folder)
        account = replace(Account.opened(folder, task), status="failed", error=_last_words(folder))
        account.write(folder)
    return account


def _last_words(folder: Path) -> str:
    said = tail(folder / LOG)
    return f"its process ended before it was finished{f'; last it said: {said}' if said else ''}"


def tail(path: Path, start: int = 0) -> str:
    """The last lines of a log, of what came after `start` bytes."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - 16 * _TOLD_LETTERS))
        lines = file.read().decode("utf-8", "replace").splitlines()
        return "\n".join([line.rstrip() for line in lines if line.strip()][-_TOLD_LINES:])[-_TOLD_LETTERS:]
    return ""


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """The finite numbers of nested metrics, by their names with slashes.

    >>> flat({"world": {"true": 0.5, "n": 213, "by": [1, 2], "sound": True}, "nothing": None})
    {'world/true': 0.5, 'world/n': 213.0}
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value):
            found[f"{before}{name}"] = float(value)
    return found
