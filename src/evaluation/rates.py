"""Shares of right items with their uncertainty, where several items stand on one question."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, Unpack, get_args

import numpy as np
from numpy.typing import NDArray

from ..stats import Interval, bootstrap_mean, detectable_difference, mcnemar_power, wilson
from .face import Grade, Status

_CELLS = 1_000_000  # draws held at once
_POWER = 0.8  # the default of `detectable_difference`


class Drawing(TypedDict):
    """How intervals are made."""

    level: float
    resamples: int
    seed: int


class Line(NamedTuple):
    """One category, or all."""

    pairs: int
    ids: int
    right: int
    """Pairs that are right."""
    right_ids: int
    """Ids all of whose pairs are right."""
    acc: Interval
    acc_plus: Interval

    def to_json(self) -> dict[str, Any]:
        """Counts, values and intervals as plain values."""
        row = self._asdict()
        return row | {"acc": as_json(self.acc), "acc_plus": as_json(self.acc_plus)}


@dataclass(frozen=True)
class Summary:
    """What a run got right."""

    overall: Line
    categories: Mapping[str, Line]
    macro_acc: Interval
    macro_acc_plus: Interval
    counts: Mapping[Status, int]
    detectable: Mapping[str, float | None]
    """The least gain that a test would find four times in five: of ACC+ over the ids; of ACC if pairs were independent
    (`acc_low`) and if the pairs of an id always agreed (`acc_high`); None where no gain would be found."""

    @property
    def coverage(self) -> float:
        """The part of the pairs about which there is an opinion."""
        return (self.counts["judged"] + self.counts["tied"]) / self.overall.pairs

    @property
    def acc_covered(self) -> float | None:
        """ACC of these pairs alone; a number that can be raised by silence, so it is never the headline."""
        covered = self.counts["judged"] + self.counts["tied"]
        return self.overall.right / covered if covered else None

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "overall": self.overall.to_json(),
            "macro": {"acc": as_json(self.macro_acc), "acc_plus": as_json(self.macro_acc_plus)},
            "categories": {name: line.to_json() for name, line in self.categories.items()},
            "counts": dict(self.counts),
            "coverage": self.coverage,
            "acc_covered": self.acc_covered,
            "detectable_difference": dict(self.detectable),
        }

    def metrics(self, name: str) -> dict[str, float]:
        """The numbers that a run logs, under the name of the benchmark."""
        found = {f"{name}/macro_acc": self.macro_acc.value, f"{name}/macro_acc_plus": self.macro_acc_plus.value}
        for part, line in {"": self.overall, **{f"{each}/": of for each, of in self.categories.items()}}.items():
            for metric, interval in (("acc", line.acc), ("acc_plus", line.acc_plus)):
                found[f"{name}/{part}{metric}"] = interval.value
                found |= {f"{name}/{part}{metric}_low": interval.low, f"{name}/{part}{metric}_high": interval.high}
        return found | {f"{name}/coverage": self.coverage, f"{name}/ties": float(self.counts["tied"])}


def as_json(interval: Interval) -> dict[str, float | None]:
    """An interval as an object, for a list of four numbers explains nothing; a bound that nothing tells is null."""
    return {name: value if math.isfinite(value) else None for name, value in interval._asdict().items()}


def whole_ids(grades: Sequence[Grade]) -> dict[str, bool]:
    """Whether all items of a cluster are right, by the cluster's name, in an order of their own."""
    found: dict[str, bool] = {}
    for grade in grades:
        found[grade.cluster] = found.get(grade.cluster, True) and grade.correct
    return dict(sorted(found.items()))


def clustered_rate(
    values: Sequence[bool] | NDArray[np.float64], clusters: Sequence[str], *, level: float, resamples: int, seed: int
) -> Interval:
    """A share with a bootstrap interval over whole clusters; where all values agree, with Wilson's over clusters.

    Values are 0 or 1, or a half for what is neither. Resampling sees no spread among equal values, and would call ten
    right clusters out of ten a proof.
    """
    n, share = len(set(clusters)), float(np.mean(values))
    if share in (0, 1):
        return wilson(n if share else 0, n, level)
    if n == 1:
        return Interval(share, 0.0, 1.0, level)  # one question tells nothing of others
    return bootstrap_mean(np.asarray(values), clusters, level=level, resamples=resamples, seed=seed)


def clustered_mean(
    values: NDArray[np.float64], clusters: Sequence[str] | None, *, level: float, resamples: int, seed: int
) -> Interval:
    """A mean with a bootstrap interval over whole clusters; one cluster tells nothing of others and gives no bounds."""
    if len(values if clusters is None else set(clusters)) == 1:
        return Interval(math.fsum(values) / len(values), -math.inf, math.inf, level)
    return bootstrap_mean(values, clusters, level=level, resamples=resamples, seed=seed)


def macro_rate(
    values: Sequence[bool],
    clusters: Sequence[str],
    categories: Sequence[str],
    *,
    level: float,
    resamples: int,
    seed: int,
) -> Interval:
    """The mean over categories of their shares, clusters being resampled within each category.

    >>> macro_rate([True, True, False], ["a", "b", "c"], ["x", "x", "y"], level=0.95, resamples=9, seed=0).value
    0.5
    """
    if len(set(values)) == 1:
        return clustered_rate(values, clusters, level=level, resamples=resamples, seed=seed)
    rng, names = np.random.default_rng(seed), sorted(set(categories))
    drawn, value = np.zeros(resamples), 0.0
    for name in names:
        sums, sizes = _totals([(c, v) for v, c, of in zip(values, clusters, categories, strict=True) if of == name])
        value += float(sums.sum() / sizes.sum()) / len(names)
        for rows in np.array_split(np.arange(resamples), 1 + resamples * len(sums) // _CELLS):
            picks = rng.integers(len(sums), size=(len(rows), len(sums)))
            drawn[rows] += sums[picks].sum(axis=1) / sizes[picks].sum(axis=1) / len(names)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)


def _totals(members: Sequence[tuple[str, bool]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and size of each cluster, in an order that neither names nor the file decide."""
    sums, sizes = Counter[str](), Counter[str]()
    for cluster, value in members:
        sums[cluster] += value
        sizes[cluster] += 1
    table = np.array(sorted((sizes[cluster], sums[cluster]) for cluster in sizes), dtype=np.float64)
    return table[:, 1], table[:, 0]


def summary_of(
    grades: Sequence[Grade], order: Mapping[str, int], *, level: float, resamples: int, seed: int
) -> Summary:
    """Count and estimate all there is to say about the grades; categories stand in the given order."""
    if not grades:
        raise ValueError("grades: expected at least one, got none; grade the items first")
    of: dict[str, list[Grade]] = {}
    for grade in sorted(grades, key=lambda grade: (order.get(grade.category, len(order)), grade.category, grade.item)):
        of.setdefault(grade.category, []).append(grade)
    drawing: Drawing = {"level": level, "resamples": resamples, "seed": seed}
    right = [grade.correct for grade in grades]
    clusters, categories = [grade.cluster for grade in grades], [grade.category for grade in grades]
    whole = {name: whole_ids(members) for name, members in of.items()}
    ids = [(identity, name, good) for name, found in whole.items() for identity, good in found.items()]
    overall = line_of(grades, **drawing)
    counts = Counter(grade.status for grade in grades)
    return Summary(
        overall,
        {name: line_of(members, **drawing) for name, members in of.items()},
        macro_rate(right, clusters, categories, **drawing),
        macro_rate([good for *_, good in ids], [one for one, *_ in ids], [name for _, name, _ in ids], **drawing),
        {status: counts[status] for status in get_args(Status)},
        {
            "acc_plus": _detectable(overall.ids, overall.acc_plus.value),
            "acc_low": _detectable(overall.pairs, overall.acc.value),
            "acc_high": _detectable(overall.ids, overall.acc.value),
        },
    )


def line_of(grades: Sequence[Grade], **drawing: Unpack[Drawing]) -> Line:
    """Count and estimate one group of grades."""
    right = [grade.correct for grade in grades]
    whole = list(whole_ids(grades).values())
    acc = clustered_rate(right, [grade.cluster for grade in grades], **drawing)
    acc_plus = wilson(sum(whole), len(whole), drawing["level"])
    return Line(len(grades), len(whole), sum(right), sum(whole), acc, acc_plus)


def _detectable(n: int, p: float) -> float | None:
    """None where even a flawless rival would be found to be better less than four times in five."""
    return detectable_difference(n, p=p) if mcnemar_power(1.0, p, n) >= _POWER else None
