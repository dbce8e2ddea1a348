"""Which of several systems is better? Paired tests on the same items, corrected for how many are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np

from ..stats import Interval, bootstrap_difference, holm, mcnemar, paired_permutation
from .face import Grade
from .rates import as_json, whole_ids

Family = Literal["all", "first"]
"""Which systems are compared: every two, or each with the first. It is chosen before the results are seen."""


class Contrast(NamedTuple):
    """One test of the family."""

    one: str
    two: str
    metric: Literal["acc", "acc_plus"]
    difference: Interval
    """Of the first from the second."""
    only_one: int
    """Pairs, or for ACC+ ids, that only the first got right."""
    only_two: int
    test: str
    p: float
    p_holm: float
    """Adjusted for all tests of the family."""

    def to_json(self) -> dict[str, Any]:
        """The test as plain values."""
        return self._asdict() | {"difference": as_json(self.difference)}


def contrasts(
    graded: Mapping[str, Sequence[Grade]],
    family: Family = "all",
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Contrast]:
    """Compare systems by ACC (signs flipped id by id) and ACC+ (McNemar's exact test on ids), with Holm over both."""
    names = list(graded)
    if family not in ("all", "first"):
        raise ValueError(f"compare: expected all or first, got {family!r}")
    drawing: dict[str, Any] = {"resamples": resamples, "seed": seed}
    couples = [couple for couple in combinations(names, 2) if family == "all" or couple[0] == names[0]]
    found = []
    for one, two in couples:
        a, b = (sorted(graded[name], key=lambda grade: grade.item) for name in (one, two))
        if [grade.item for grade in a] != [grade.item for grade in b]:
            raise ValueError(f"{one} and {two}: expected grades of the same items, got others; grade the same file")
        found += [_by_pairs(one, two, a, b, level, drawing), _by_ids(one, two, a, b, level, drawing)]
    adjusted = holm([contrast.p for contrast in found]) if found else ()
    return [contrast._replace(p_holm=float(p)) for contrast, p in zip(found, adjusted, strict=True)]


def _by_pairs(
    one: str, two: str, a: Sequence[Grade], b: Sequence[Grade], level: float, drawing: Mapping[str, Any]
) -> Contrast:
    first, second = (np.array([grade.correct for grade in side], dtype=np.float64) for side in (a, b))
    clusters = [grade.cluster for grade in a]
    p = paired_permutation(first, second, clusters, **drawing)
    only = int((first > second).sum()), int((second > first).sum())
    difference = _difference(first, second, clusters, level, drawing)
    return Contrast(one, two, "acc", difference, *only, "permutation by id", p, p)


def _by_ids(
    one: str, two: str, a: Sequence[Grade], b: Sequence[Grade], level: float, drawing: Mapping[str, Any]
) -> Contrast:
    whole = [whole_ids(side) for side in (a, b)]
    first, second = (np.array(list(side.values()), dtype=np.float64) for side in whole)
    found = mcnemar(first, second)
    difference = _difference(first, second, list(whole[0]), level, drawing)
    return Contrast(one, two, "acc_plus", difference, found.only_a, found.only_b, "McNemar on ids", found.p, found.p)


def _difference(first: Any, second: Any, clusters: Sequence[str], level: float, drawing: Mapping[str, Any]) -> Interval:  # noqa: ANN401
    if len(set(clusters)) == 1:
        return Interval(float(np.mean(first - second)), -1.0, 1.0, level)  # one question tells nothing of others
    return bootstrap_difference(first, second, clusters, level=level, **drawing)
