"""The verb `sweep`: a grid of trainings in processes of their own, compared by what was declared before the first."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from ..redaction import without_credentials
from ..settings import alone, claim, write_json
from ..tracked import parent_run
from ..tracker import absolute
from .cells import ACCOUNT, LOG, Account, Role, Task
from .design import Design, Training
from .fleet import Fleet, Launcher
from .grid import Cell, grid
from .planning import rehearsed, show
from .promotion import Candidate, best, candidates, compared
from .publishing import PROMOTION, accounts, published
from .selection import selected
from .slurm import Slurm

log = logging.getLogger(__name__)
OpenTest = Literal["complete", "despite_failures", "never"]
_MARKER = "sweep.json"


def sweep(
    train: Training,
    axes: dict[str, list[Any]],
    evaluate: list[list[str]],
    metric: str,
    out: Path,
    seeds: int | list[int] = 3,
    void: dict[str, dict[str, Any]] | None = None,
    baselines: list[dict[str, Any]] | None = None,
    greatest: bool = True,
    split: str = "val",
    test_split: str | None = None,
    open_test: OpenTest = "complete",
    fraction: float = 1.0,
    promote: int = 0,
    name: str | None = None,
    tracking: str | None = "sqlite:///mlflow.db",
    experiment: str = "sweeps",
    launcher: Launcher = "local",
    max_parallel: int | None = None,
    slurm: Slurm | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
) -> None:
    """Train and evaluate every combination of some options with every seed, each in a process of its own.

    Run again, it continues: cells that are done are not made again, and more values or seeds add cells. `--axes.NAME
    1,2,4` and `--train.overrides.NAME VALUE` take the place of what the config says of that option.

    Args:
        train: The trainer, its config, and what all cells override.
        axes: Values of each option, by its dotted name.
        evaluate: Commands that evaluate a trained cell, one after another; metrics are read from metrics.json in
            the {out} of each. Also {model}, {run}, {split}, {seed}, {name} and {before}, the {out} of the command
            before, are filled in.
        metric: What cells are compared by, a name in metrics.json with slashes.
        out: Folder of the sweep.
        seeds: How many, or which.
        void: Where an axis says nothing: values of other axes. Cells that differ in nothing else are one.
        baselines: What the overrides of baselines hold; default: the cells in which an axis is void.
        greatest: Whether the greatest metric is the best one.
        split: On which cells are compared.
        test_split: On which the selected cell and the baselines are evaluated at the end, once; default: on none.
        open_test: Whether that happens when all is done, also when some cells failed, or not at all.
        fraction: Part of a pass over the data that a cell is trained on.
        promote: So many of the best cells, and the baselines, are then trained on all data, and compared there.
        name: Of the sweep in MLflow; default: of its folder.
        tracking: Where MLflow keeps it: a database or a server; null for nowhere.
        experiment: Under which name.
        launcher: Where cells run: as processes of this machine, or as jobs of SLURM.
        max_parallel: So many cells at once; default: one as a process, all as jobs.
        slurm: What a job asks for.
        retry_failed: Whether cells that failed are run again.
        dry_run: Print what would be done, with an estimate of its time, and do nothing.
    """
    cells = grid(axes, void or {}, list(range(seeds)) if isinstance(seeds, int) else seeds)
    kept = (out, name or out.resolve().name, _bare(tracking), experiment)
    measured = (metric, greatest, split, test_split, baselines, fraction)
    design = Design(train, tuple(axes), void or {}, evaluate, *measured, *kept)
    design.check_baselines(cells)
    if promote and (fraction == 1 or promote < 0):
        raise ValueError(f"promote: expected cells on a fraction of the data, got {promote} at fraction {fraction:g}")
    fleet = Fleet(design, launcher, slurm or Slurm(), max_parallel, retry_failed)
    with _checked(design, dry_run):
        digests = rehearsed(design, cells)
        tasks = [design.task(cell, _role(design, cell), fraction, None, digests[cell.group]) for cell in cells]
        show(design, fleet.plan(tasks), fleet.parallel(len(tasks)))
        if not dry_run:
            claim(out, _MARKER, design.claimed(), "a sweep")
            Sweep(design, fleet, digests, promote, open_test).run(cells, axes)


def _bare(tracking: str | None) -> str | None:
    """The address as it may be kept; the processes of the cells find user and password in their environment."""
    if tracking is None or without_credentials(tracking) == tracking:
        return tracking
    os.environ["MLFLOW_TRACKING_URI"] = absolute(tracking)
    return without_credentials(absolute(tracking))


@contextmanager
def _checked(design: Design, dry_run: bool) -> Iterator[None]:
    """The folder for this process alone, of this sweep if it is one's; a plan only looks, and makes no folder."""
    with nullcontext() if dry_run else alone(design.out):
        if (design.out / _MARKER).exists():
            claim(design.out, _MARKER, design.claimed(), "a sweep")
        yield


def _role(design: Design, cell: Cell) -> Role:
    return "baseline" if design.is_baseline(cell) else "cell"


class Sweep:
    """The stages after the plan: cells, promoted cells, and the test split of the selected one."""

    def __init__(
        self, design: Design, fleet: Fleet, digests: Mapping[str, str], promote: int, open_test: OpenTest
    ) -> None:
        self.design, self.fleet, self.digests = design, fleet, digests
        self.promote, self.open_test = promote, open_test
        self.parent: str | None = None
        self.excluded: dict[str, str] = {}
        """Combinations that are not done, and why."""

    def run(self, cells: Sequence[Cell], axes: Mapping[str, Sequence[Any]]) -> None:
        """Run all stages, and end with an error that names what failed."""
        design = self.design
        asked = _begun(design, cells)
        if design.tracking is not None:
            declared = design.claimed() | {"axes": dict(axes), "cells": len(asked), "promote": self.promote}
            self.parent = parent_run(design.out, design.tracking, design.experiment, design.name, declared)
        with published(design):
            tasks = [self._task(cell, _role(design, cell), design.fraction) for cell in cells]
            self.fleet.run(tasks, "cells")
            everything = [self._task(cell, _role(design, cell), design.fraction) for cell in asked]
            found = self._candidates(everything)
            whole = self._promoted(asked, found) if self.promote else found
            self._tested(asked, whole)
            show(design, self.fleet.plan(everything), 1)
        self._require_done(tasks)

    def _require_done(self, tasks: Sequence[Task]) -> None:
        failed = [account for account in accounts(self.design.out) if account.status == "failed"]
        if failed:
            told = "; ".join(
                f"{account.name}: {(account.error or '').rpartition(chr(10))[2]}" for account in failed[:5]
            )
            raise ValueError(
                f"{len(failed)} failed ({told}); their logs are {self.design.out}/cells/NAME/{LOG}; mend what failed, "
                "then run again with --retry-failed"
            )
        states = self.fleet.plan(tasks).states
        if left := [name for name, state in states.items() if state != "done"]:
            raise ValueError(
                f"{', '.join(left)}: expected to be done, but it was stopped, or runs elsewhere; run again when it has "
                "ended"
            )

    def _task(self, cell: Cell, role: Role, fraction: float) -> Task:
        return self.design.task(cell, role, fraction, self.parent, self.digests.get(cell.group, ""))

    def _candidates(self, tasks: Sequence[Task]) -> dict[str, Candidate]:
        """The combinations that are done; of the others it is kept why they are not."""
        there = {task.name: Account.read(self.design.folder(task.name)) for task in tasks}
        lacking = {task.cell: f"{task.name}: not run" for task in tasks if there[task.name] is None}
        found, excluded = candidates([each for each in there.values() if each is not None], self.design.metric)
        self.excluded = excluded | lacking
        return {candidate.cell: candidate for candidate in found if candidate.cell not in lacking}

    def _baselines(self, asked: Sequence[Cell]) -> list[str]:
        return list(dict.fromkeys(cell.group for cell in asked if self.design.is_baseline(cell)))

    def _promoted(self, asked: Sequence[Cell], found: Mapping[str, Candidate]) -> dict[str, Candidate]:
        """The best combinations and the baselines, trained on all data, and how alike both rankings are."""
        baselines = self._baselines(asked)
        rivals = [candidate for candidate in found.values() if candidate.cell not in baselines]
        chosen = [candidate.cell for candidate in best(rivals, self.promote, self.design.greatest)] + baselines
        tasks = [self._task(cell, "promoted", 1.0) for cell in asked if cell.group in chosen and cell.group in found]
        before = self.excluded
        self.fleet.run(tasks, "promoted cells")
        whole = self._candidates(tasks)
        self.excluded = before | self.excluded
        told = {"metric": self.design.metric, "split": self.design.split, "fraction": self.design.fraction}
        write_json(self.design.out / PROMOTION, told | compared(found, whole))
        return whole

    def _tested(self, asked: Sequence[Cell], found: Mapping[str, Candidate]) -> None:
        """Open the test split for the selected combination and the baselines, as declared."""
        design = self.design
        if design.test_split is None or self.open_test == "never" or not found:
            return
        if self.excluded and self.open_test == "complete":
            log.warning("the split %r stays closed, since not all is done: %s", design.test_split, self.excluded)
            return
        fraction: float = 1.0 if self.promote else design.fraction
        baselines = [cell for cell in self._baselines(asked) if cell in found]
        record = selected(design, list(found.values()), baselines, self.excluded, fraction)
        opened = {record["selected"], *baselines}
        log.info("selected by %s on %s: %s", design.metric, design.split, record["selected"])
        role: Role = "promoted" if self.promote else "cell"
        cells = [cell for cell in asked if cell.group in opened]
        self.fleet.run([design.test(cell, role, fraction, self.digests[cell.group]) for cell in cells], "test")


def _begun(design: Design, cells: Sequence[Cell]) -> list[Cell]:
    """These cells and all that earlier calls have begun: who asks for fewer later does not choose among fewer."""
    paths = sorted((design.out / "cells").glob(f"*/{ACCOUNT}"))
    tasks = [task for task in (Task.read(path.parent) for path in paths) if task.role in ("cell", "baseline")]
    known = {cell.name: cell for cell in cells}
    return list((known | {task.name: Cell(task.cell, task.overrides, task.seed) for task in tasks}).values())
