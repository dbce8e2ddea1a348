"""What a sweep is: declared before its first cell, and kept; and the commands that follow from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..fingerprint import of_file
from ..tracker import metric_name
from .cells import EVALUATION, TRAINING, Role, Task
from .grid import Cell, Void, option

PROGRAM = "mmrlhf"
FRACTION = "trainer.limit_train_batches"
"""Of one pass over the data, in the seeded order of the training: another seed sees another part of the queries."""
_OURS = ("run.out", "run.seed", "run.name", "run.parent", "run.tracking", "run.experiment")
_PLACES = ("model", "run", "split", "out", "before", "seed", "name")


@dataclass(frozen=True)
class Training:
    """What every cell trains.

    Args:
        verb: A trainer, such as train-dpo.
        config: Its YAML.
        overrides: Options of all cells, by dotted name.
    """

    verb: str
    config: Path
    overrides: dict[str, Any] | None = None


@dataclass(frozen=True)
class Design:
    """A sweep but for the values of its axes and its seeds, which may grow."""

    train: Training
    axes: tuple[str, ...]
    void: Void
    evaluate: Sequence[Sequence[str]]
    metric: str
    greatest: bool
    split: str
    test_split: str | None
    baselines: Sequence[Mapping[str, Any]] | None
    """What the overrides of baselines hold; None: cells in which an axis is void."""
    fraction: float
    out: Path
    name: str
    tracking: str | None
    experiment: str

    def __post_init__(self) -> None:
        if not self.train.config.is_file():
            raise ValueError(f"train.config: expected a YAML, found none at {self.train.config}; check the path")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: expected more than 0 and at most 1, got {self.fraction}")
        if metric_name(self.metric) != self.metric:
            raise ValueError(
                f"metric: expected a name of letters, digits and _ / . - and spaces, which MLflow takes, got "
                f"{self.metric!r}; let the evaluation call it {metric_name(self.metric)!r}"
            )
        given = {"axes": self.axes, "train.overrides": tuple(self.train.overrides or ())}
        taken = (*_OURS, FRACTION) if self.fraction < 1 else _OURS
        for where, names in given.items():
            if ours := [name for name in names if name in taken]:
                raise ValueError(f"{where}: {ours[0]} is said by the sweep itself; leave it out")
        if twice := set(self.axes) & set(self.train.overrides or ()):
            raise ValueError(f"train.overrides: {min(twice)} is an axis; leave it out of one of them")
        self._check_evaluation()

    def _check_evaluation(self) -> None:
        if not self.evaluate:
            raise ValueError("evaluate: expected one command or more, got none; they measure the metric")
        for number, words in enumerate(self.evaluate):
            places = {place for word in words for place in re.findall(r"\{(\w+)\}", word)}
            known = set(_PLACES) - ({"before"} if number == 0 else set())
            if unknown := places - known:
                told = ", ".join(f"{{{place}}}" for place in _PLACES if place in known)
                raise ValueError(f"evaluate.{number}: expected {told}, got {{{min(unknown)}}}")
            asks = bool(places & {"model", "run"})
            needed = {"out"} | ({"split"} if self.test_split and asks else set())
            if not needed <= places or not (asks or "before" in places):
                raise ValueError(
                    f"evaluate.{number}: expected {{out}}, and {{model}} or {{run}}, with {{split}} where there is a "
                    f"test_split, or {{before}} behind another command, got {' '.join(words)!r}"
                )

    def claimed(self) -> dict[str, Any]:
        """What may not change once the sweep has begun."""
        return {
            "train": {
                "verb": self.train.verb,
                "config": of_file(self.train.config),
                "overrides": self.train.overrides or {},
            },
            "axes": list(self.axes),
            "void": {axis: dict(where) for axis, where in self.void.items()},
            "evaluate": [list(words) for words in self.evaluate],
            "metric": self.metric,
            "greatest": self.greatest,
            "split": self.split,
            "test_split": self.test_split,
            "baselines": None if self.baselines is None else [dict(each) for each in self.baselines],
            "fraction": self.fraction,
            "name": self.name,
            "tracking": self.tracking,
            "experiment": self.experiment,
        }

    @property
    def program(self) -> str:
        """The module whose verbs are run."""
        return PROGRAM

    def is_baseline(self, cell: Cell) -> bool:
        """Whether a cell is what the others are compared with."""
        if self.baselines is None:
            return len(cell.overrides) < len(self.axes)
        return any(
            all(axis in cell.overrides and cell.overrides[axis] == value for axis, value in each.items())
            for each in self.baselines
        )

    def check_baselines(self, cells: Sequence[Cell]) -> None:
        """Refuse a baseline that is no cell."""
        for each in self.baselines or ():
            if not any(each.items() <= dict(cell.overrides).items() for cell in cells):
                raise ValueError(f"baselines: expected overrides of a cell, got {dict(each)}; name values of the axes")

    def folder(self, name: str) -> Path:
        """Where a cell is kept."""
        return self.out.resolve() / "cells" / name

    def task(self, cell: Cell, role: Role, fraction: float, parent: str | None, digest: str) -> Task:
        """What is done for a cell."""
        name = cell.name if role != "promoted" else f"{cell.name}-full"
        folder = self.folder(name)
        run = folder / TRAINING
        own = {"run.seed": cell.seed, "run.out": str(run), "run.name": name, "run.tracking": self.tracking}
        if parent is not None:
            own |= {"run.experiment": self.experiment, "run.parent": parent}
        train = (*self.training(cell, fraction), *(option(key, value) for key, value in own.items()))
        return self._task(cell, name, role, fraction, digest, train, run, self.split)

    def test(self, cell: Cell, role: Role, fraction: float, digest: str) -> Task:
        """The evaluation of a trained cell on the test split; `role` is what it was trained as."""
        assert self.test_split is not None
        run = Path(self.task(cell, role, fraction, None, digest).run)
        return self._task(cell, f"{run.parent.name}-test", "test", fraction, digest, None, run, self.test_split)

    def _task(
        self,
        cell: Cell,
        name: str,
        role: Role,
        fraction: float,
        digest: str,
        train: Sequence[str] | None,
        run: Path,
        split: str,
    ) -> Task:
        folder = self.folder(name)
        return Task(
            name=name,
            cell=cell.group,
            seed=cell.seed,
            overrides=cell.overrides,
            role=role,
            fraction=fraction,
            program=self.program,
            train=train,
            run=str(run),
            evaluate=self.evaluations(folder, run, split, cell.seed, name),
            metric=self.metric,
            prefix=f"{split}/" if role == "test" else "",
            sweep=self.name,
            tracked=self.tracking is not None,
            digest=digest,
        )

    def training(self, cell: Cell, fraction: float) -> tuple[str, ...]:
        """The command of a training, but for what names its run."""
        said = {**(self.train.overrides or {}), **cell.overrides, **({FRACTION: fraction} if fraction < 1 else {})}
        words = (*self.train.verb.split(), "--config", str(self.train.config))
        return (*words, *(option(name, value) for name, value in said.items()))

    def evaluations(self, folder: Path, run: Path, split: str, seed: int, name: str) -> tuple[tuple[str, ...], ...]:
        """The commands that evaluate a run, with the places in them filled."""
        known = {"model": str(run / "model"), "run": str(run), "split": split, "seed": str(seed), "name": name}

        def filled(number: int, word: str) -> str:
            places = known | {"out": str(folder / EVALUATION / str(number))}
            places["before"] = str(folder / EVALUATION / str(number - 1))
            return re.sub(r"\{(\w+)\}", lambda found: places[found[1]], word)

        return tuple(tuple(filled(number, word) for word in words) for number, words in enumerate(self.evaluate))
