"""What beta does to the pairs: distributions, shares at its bounds and effective margins, as metrics and figures.

All metrics of a training interval begin with `train/`, those of a validation with `val/`; behind it:

- `loss`, `pairs`, `delta/{mean,std,median,negative_share}`, `g/{mean,std}`, `beta/{mean,std,min,max}`,
  `beta/share_at_cap` (within a hundredth of the way from beta0), `beta/share_at_beta0`;
- in TRL's words `rewards/{chosen,rejected,margins,accuracies}` at each pair's own beta, `rewards/margins_std`, and
  `logps/{chosen,rejected}`. An accurate pair has z > 0; `rewards/ties` is the share with z = 0;
- `rewards_beta0/{chosen,rejected,margins}` at beta0, as plain DPO would log them (accuracies are the same);
- `pairs`, `delta/mean`, `beta/mean`, `rewards/margins`, `rewards/accuracies`, each followed by `/CATEGORY` or
  `/rank_gap_N`.

The median is of margins rounded to four digits. delta is left out where no pair has a margin, and g where beta has
no range. Several validation loaders count as one.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .. import jsonl
from ..reports import PairReport
from .figures import Spread, draw_betas
from .monitor import Monitor

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

_UNKNOWN = ("delta", "delta/negative_share", "g")  # may be no number; elsewhere that is a fault, and must show
_SHARES = ("delta/negative_share", "beta/share_at_cap", "beta/share_at_beta0", "rewards/accuracies", "rewards/ties")
_REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
_AT_BETA0 = ("rewards_beta0/chosen", "rewards_beta0/rejected", "rewards_beta0/margins")
_MEANS = ("loss", *_SHARES, *_REWARDS, *_AT_BETA0, "logps/chosen", "logps/rejected")
_COLUMNS = ("delta", "g", "beta", *_MEANS)
_PLACE = {name: place for place, name in enumerate(_COLUMNS)}
_MAY_BE_UNKNOWN = np.isin(_COLUMNS, _UNKNOWN)
MARGINS = "margins.csv"
_ALL = ""  # the group of all pairs


def columns_of(report: PairReport) -> Floats:
    """Return what is averaged, (columns, pairs)."""
    tensors = (report.margin, report.beta, report.gap, report.chosen_logps, report.rejected_logps)
    others = (report.reference_chosen, report.reference_rejected, report.loss)
    table = torch.stack([tensor.detach().float() for tensor in (*tensors, *others)])
    delta, beta, z, chosen, rejected, of_chosen, of_rejected, loss = table.cpu().double().numpy()
    width = report.cap - report.beta0
    bounded = width < np.inf and width > 1e-6 * report.beta0
    known = {
        "delta": delta,
        "delta/negative_share": np.where(np.isnan(delta), np.nan, delta < 0),
        "g": (beta - report.beta0) / width if bounded else np.full_like(beta, np.nan),
        "beta": beta,
        "loss": loss,
        # 1 - exp(-k delta) comes near 1 without reaching it; betas are float32, the bounds are not.
        "beta/share_at_cap": beta >= (report.cap - 0.01 * width if bounded else report.cap) * (1 - 1e-6),
        "beta/share_at_beta0": np.isclose(beta, report.beta0, rtol=1e-6, atol=0),
        "rewards/accuracies": z > 0,
        "rewards/ties": z == 0,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    implicit = (chosen - of_chosen, rejected - of_rejected, z)
    known |= {name: beta * value for name, value in zip(_REWARDS, implicit, strict=True)}
    known |= {name: report.beta0 * value for name, value in zip(_AT_BETA0, implicit, strict=True)}
    return np.stack([known[name].astype(np.float64) for name in _COLUMNS])


class Moments(NamedTuple):
    """Of every column: how many numbers, their mean, the sum of squares around it, and their bounds."""

    number: Floats
    mean: Floats
    squares: Floats
    low: Floats
    high: Floats

    def plus(self, other: Moments) -> Moments:
        """Return those of both together (Chan, Golub and LeVeque 1979)."""
        count = self.number + other.number
        share = other.number / np.maximum(count, 1)
        apart = other.mean - self.mean
        squares = self.squares + other.squares + apart**2 * self.number * share
        low, high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        return Moments(count, self.mean + apart * share, squares, low, high)

    def of(self, column: str) -> dict[str, float]:
        """Return the statistics of one column by their names; none where there is no number."""
        place = _PLACE[column]
        count = self.number[place]
        if not count:
            return {}
        deviation = float(np.sqrt(self.squares[place] / count))
        mean, low, high = (float(values[place]) for values in (self.mean, self.low, self.high))
        return {"mean": mean, "std": deviation, "min": low, "max": high}


def moments_of(table: Floats) -> Moments:
    """Return the moments of columns, (columns, pairs)."""
    counted = ~(np.isnan(table) & _MAY_BE_UNKNOWN[:, None])
    count = counted.sum(1).astype(np.float64)
    mean = np.where(counted, table, 0.0).sum(1) / np.maximum(count, 1)
    squares = (np.where(counted, table - mean[:, None], 0.0) ** 2).sum(1)
    low, high = (np.where(counted, table, bound) for bound in (np.inf, -np.inf))
    return Moments(count, mean, squares, low.min(1), high.max(1))


class Tally:
    """What is summed over pairs: moments per group, and a count per rounded margin and beta."""

    def __init__(self) -> None:
        self.groups: dict[str | int, Moments] = {}
        self.cells: Counter[tuple[float | None, float]] = Counter()
        self.bounds: tuple[float, float] | None = None
        """The last beta0 and cap."""

    def add(self, reports: list[PairReport]) -> None:
        """Add the pairs of some micro-batches."""
        if not (reports := [report for report in reports if len(report.beta)]):
            return
        table = np.concatenate([columns_of(report) for report in reports], axis=1)
        categories = [metric_part(name) for report in reports for name in report.categories]
        rank_gaps = [gap for report in reports for gap in report.rank_gap.tolist()]
        self._add_group(_ALL, moments_of(table))
        for labels in (categories, rank_gaps):
            for label in set(labels) - {_ALL}:
                self._add_group(label, moments_of(table[:, [name == label for name in labels]]))
        for delta, beta in zip(table[_PLACE["delta"]].tolist(), table[_PLACE["beta"]].tolist(), strict=True):
            self.cells[None if delta != delta else float(f"{delta:.4g}"), float(f"{beta:.4g}")] += 1
        self.bounds = reports[-1].beta0, reports[-1].cap

    def merge(self, other: Tally) -> None:
        """Add the pairs of another tally."""
        for label, moments in other.groups.items():
            self._add_group(label, moments)
        self.cells += other.cells
        self.bounds = other.bounds or self.bounds

    def _add_group(self, label: str | int, moments: Moments) -> None:
        self.groups[label] = self.groups[label].plus(moments) if label in self.groups else moments

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return everything by its name; nothing where there was no pair."""
        found: dict[str, float] = {}
        for label, moments in self.groups.items():
            behind = f"/rank_gap_{label}" if isinstance(label, int) else f"/{label}" * bool(label)
            found |= {f"{name}{behind}": value for name, value in _metrics_of(moments, label == _ALL).items()}
        margins = np.array([delta for delta, _ in self.cells.elements() if delta is not None])
        if len(margins):
            found["delta/median"] = float(np.median(margins))
        return {f"{prefix}/{name}": found[name] for name in sorted(found)}

    def spreads(self, kind: type[str] | type[int]) -> dict[str, Spread]:
        """Return how margins and betas lie in every category or rank gap."""
        of_kind = sorted(label for label in self.groups if isinstance(label, kind) and label != _ALL)
        found = {}
        for label in of_kind:
            delta, beta = self.groups[label].of("delta"), self.groups[label].of("beta")
            pairs = int(self.groups[label].number[_PLACE["beta"]])
            found[str(label)] = Spread(pairs, delta.get("mean", np.nan), beta["mean"], beta["std"])
        return found


def _metrics_of(moments: Moments, everything: bool) -> dict[str, float]:
    found = {"pairs": float(moments.number[_PLACE["beta"]])}
    wanted: dict[str, tuple[str, ...]] = {"delta": ("mean",), "beta": ("mean",)}
    plain: tuple[str, ...] = ("rewards/margins", "rewards/accuracies")
    if everything:
        wanted = {"delta": ("mean", "std"), "g": ("mean", "std"), "beta": ("mean", "std", "min", "max")}
        plain = _MEANS
        found["rewards/margins_std"] = moments.of("rewards/margins")["std"]
    for column, names in wanted.items():
        numbers = moments.of(column)
        found |= {f"{column}/{name}": numbers[name] for name in names if numbers}
    return found | {column: moments.of(column)["mean"] for column in plain if moments.of(column)}


def metric_part(category: str) -> str:
    """A category as a part of a metric's name, in which MLflow allows few signs.

    >>> metric_part("Chart/OCR (hard)")
    'Chart_OCR _hard_'
    """
    return re.sub(r"[^\w\- ]", "_", category)


class BetaMonitor(Monitor[PairReport, Tally]):
    """Log what beta does, per log interval in training, and with a figure per validation; over all ranks."""

    told, figure_name, tally = "pairs", "beta", Tally

    def draw(self, tally: Tally, title: str) -> Figure | None:
        """Draw margins and betas; nothing where there was no pair."""
        if tally.bounds is None:
            return None
        margins, betas = zip(*tally.cells, strict=True)
        return draw_betas(
            np.array(margins, dtype=np.float64),
            np.array(betas),
            np.array(list(tally.cells.values())),
            beta0=tally.bounds[0],
            cap=tally.bounds[1],
            categories=tally.spreads(str),
            rank_gaps=tally.spreads(int),
            title=title,
        )

    def keep(self, tally: Tally, folder: Path) -> None:
        """Write how many pairs have which margin, those of the last validation, for reports on many runs."""
        counted = Counter[float]()
        for (delta, _), pairs in tally.cells.items():
            if delta is not None:
                counted[delta] += pairs
        rows = [f"{delta!r},{pairs}" for delta, pairs in sorted(counted.items())]
        jsonl.replace(folder / MARGINS, "\n".join(["delta,pairs", *rows, ""]).encode())
