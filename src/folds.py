"""Folds of the training queries: which of how many a model never saw, told beside it once it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import jsonl
from .settings import write_json

NAME = "fold.json"
_AGAIN = "run `mmrlhf train-reward --folds N` into this folder again"


@dataclass(frozen=True)
class Fold:
    """A part of the training queries that is held out of a training.

    Args:
        of: How many parts there are.
        out: Which of them is held out, from 0.
    """

    of: int
    out: int

    def __post_init__(self) -> None:
        if self.of < 2:
            raise ValueError(f"fold.of: expected 2 parts or more, got {self.of}; of one part nothing would be left")
        if not 0 <= self.out < self.of:
            raise ValueError(f"fold.out: expected a part from 0 to {self.of - 1}, got {self.out}")


@dataclass(frozen=True)
class Trained:
    """What is known of a model that was trained without a fold: the file `fold.json` in the folder of its run."""

    fold: Fold
    data: str
    """Digest of the training queries, those of the fold among them."""
    folds: str
    """Digest of which query is in which fold."""
    training: str
    """Digest of all settings but the fold: two models differ by their folds alone where it is equal."""
    model: str
    """`provenance.model_digest`."""

    def write(self, run: Path) -> None:
        """Write it into the folder of the run, whole or not at all."""
        told = {name: getattr(self, name) for name in ("data", "folds", "training", "model")}
        write_json(run / NAME, {"of": self.fold.of, "out": self.fold.out} | told)

    @classmethod
    def read(cls, run: Path) -> Trained:
        """What a finished run tells."""
        path = run / NAME
        if not path.is_file():
            raise ValueError(f"{run}: expected a fold that is trained, found no {NAME}; {_AGAIN}")
        row: Any = jsonl.loads(path.read_bytes())
        try:
            return cls(Fold(row.pop("of"), row.pop("out")), **row)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected what a training with a fold writes, got {row!r:.60}") from error


def run_of(out: Path, number: int) -> Path:
    """The folder of the run without that fold."""
    return out / f"fold-{number}"


def family(out: Path, data: str) -> list[Trained]:
    """The models of all folds of these data, by the number of what they never saw; others are refused."""
    first = Trained.read(run_of(out, 0))
    if first.data != data:
        raise ValueError(
            f"{run_of(out, 0)}: expected a model of a fold of these training queries ({data:.8}..), got one of others "
            f"({first.data:.8}..); give the shards that it was trained on, or train the folds again"
        )
    found = [first, *(Trained.read(run_of(out, number)) for number in range(1, first.fold.of))]
    for number, one in enumerate(found):
        if one.fold != Fold(first.fold.of, number):
            raise ValueError(
                f"{run_of(out, number)}: expected fold {number} of {first.fold.of}, as fold-0 is one of so many, got "
                f"fold {one.fold.out} of {one.fold.of}; train all of them into one folder"
            )
        if other := [name for name in ("data", "folds", "training") if getattr(one, name) != getattr(first, name)]:
            raise ValueError(
                f"{run_of(out, number)}: expected a model that differs from that of fold-0 by its fold alone, got "
                f"another {' and '.join(other)}; {_AGAIN}"
            )
    return found
