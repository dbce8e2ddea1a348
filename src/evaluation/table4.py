"""Table 4 of MM-RLHF (Zhang et al. 2025): what its authors report on the benchmark, and what their cells add up to.

The paper prints two decimals per category and an overall value. A count is recovered from each cell, and the counts
are pooled; where the printed overall value is another, both are shown.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

_HALF = 0.005 + 1e-9  # what rounding to two decimals may take away, and what a float may add


class Cell(NamedTuple):
    """One category of one system, as printed."""

    pairs: int
    ids: int
    acc: float
    acc_plus: float

    @property
    def counts(self) -> tuple[int, int]:
        """The pairs and ids that come nearest to the two values."""
        return int(self.acc * self.pairs + 0.5), int(self.acc_plus * self.ids + 0.5)

    @property
    def possible(self) -> bool:
        """Whether any counts give the two values when rounded."""
        shares = zip(self.counts, (self.pairs, self.ids), (self.acc, self.acc_plus), strict=True)
        return all(abs(count / of - printed) <= _HALF for count, of, printed in shares)


class Reported(NamedTuple):
    """One column of the table: a system."""

    system: str
    cells: Mapping[str, Cell]
    overall: Cell
    """As printed."""

    @property
    def counts(self) -> tuple[int, int]:
        """Right pairs and ids, added up over the categories."""
        pairs, ids = zip(*(cell.counts for cell in self.cells.values()), strict=True)
        return sum(pairs), sum(ids)

    @property
    def acc(self) -> float:
        """Recomputed from the categories."""
        return self.counts[0] / self.overall.pairs

    @property
    def acc_plus(self) -> float:
        """Recomputed from the categories."""
        return self.counts[1] / self.overall.ids

    @property
    def doubts(self) -> tuple[str, ...]:
        """Printed values that no counts give, and overall values that the categories contradict."""
        found = [
            f"{name}: no counts round to what is printed" for name, cell in self.cells.items() if not cell.possible
        ]
        for name, printed, value in (
            ("ACC", self.overall.acc, self.acc),
            ("ACC+", self.overall.acc_plus, self.acc_plus),
        ):
            if abs(printed - value) > _HALF:
                found.append(f"{name} {printed:.2f} printed, {value:.3f} by its categories")
        return tuple(found)


@cache
def table4() -> tuple[Reported, ...]:
    """The paper's rows, in its order."""
    rows: dict[str, dict[str, Cell]] = {}
    with Path(__file__).with_name("table4.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            cell = Cell(int(row["pairs"]), int(row["ids"]), float(row["acc"]), float(row["acc_plus"]))
            rows.setdefault(row["system"], {})[row["category"]] = cell
    return tuple(Reported(system, cells, cells.pop("all")) for system, cells in rows.items())
