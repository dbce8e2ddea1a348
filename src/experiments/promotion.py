"""The best combinations of a fraction of the data, trained on all; and whether the fraction ranked them alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..stats import kendall_tau_b
from .cells import Account


@dataclass(frozen=True)
class Candidate:
    """A combination whose seeds are all done, with the declared metric of each."""

    cell: str
    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.values.values())

    def to_json(self) -> dict[str, Any]:
        """As it stands in a record."""
        return {"cell": self.cell, "mean": self.mean, "seeds": {str(seed): self.values[seed] for seed in self.values}}


def candidates(accounts: Iterable[Account], metric: str) -> tuple[list[Candidate], dict[str, str]]:
    """The combinations that are done, and of the others why they are left out.

    One with a seed that failed is left out as a whole: the mean of the others would not be its mean.
    """
    values: dict[str, dict[int, float]] = {}
    excluded: dict[str, str] = {}
    for account in sorted(accounts, key=lambda account: account.seed):
        if account.status == "done" and account.metrics is not None:
            values.setdefault(account.cell, {})[account.seed] = account.metrics[metric]
        else:
            excluded.setdefault(account.cell, f"{account.name}: {account.error or account.status}")
    return [Candidate(cell, found) for cell, found in values.items() if cell not in excluded], excluded


def best(found: Sequence[Candidate], number: int, greatest: bool) -> list[Candidate]:
    """So many of the best by the mean over seeds; of equals the earlier one."""
    return sorted(found, key=lambda candidate: -candidate.mean if greatest else candidate.mean)[:number]


def rank_correlations(small: Sequence[float], whole: Sequence[float]) -> dict[str, float | None]:
    """Kendall's and Spearman's between the means on a fraction and on all data; None where there is nothing to rank.

    >>> rank_correlations([0.1, 0.2, 0.3], [0.5, 0.7, 0.6])["spearman"]
    0.5
    """
    if min(len(set(small)), len(set(whole))) < 2:
        return {"kendall": None, "spearman": None}
    ranks = np.corrcoef(_ranks(small), _ranks(whole))[0, 1]
    return {"kendall": kendall_tau_b(small, whole), "spearman": round(float(ranks), 12)}


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """The place of each value, equal ones at the mean of theirs."""
    given = np.asarray(values, dtype=float)
    below = (given[:, None] > given).sum(1)
    ranks: NDArray[np.float64] = below + (given[:, None] == given).sum(1) / 2
    return ranks


def compared(small: Mapping[str, Candidate], whole: Mapping[str, Candidate]) -> dict[str, Any]:
    """What is told of a promotion: both means of every promoted combination, and how alike they are ranked."""
    both = [cell for cell in whole if cell in small]
    means = [(small[cell].mean, whole[cell].mean) for cell in both]
    rows = [{"cell": cell, "fraction": part, "whole": all_} for cell, (part, all_) in zip(both, means, strict=True)]
    return {"cells": rows, **rank_correlations([part for part, _ in means], [all_ for _, all_ in means])}
