"""Intervals, paired tests, power and agreement, for verdicts that come in clusters.

Several pairs are judged on one query, so items are not independent: whole clusters are resampled or flipped.
Every random result follows from its `seed`; none depends on the order of the items or on the clusters' names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from statistics import NormalDist
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Labels = Iterable[str] | Iterable[int] | None
Metric = Literal["ordinal", "interval", "nominal"]

_CELLS = 1_000_000  # draws held at once: three arrays of 8 MB, whatever the number of clusters and resamples
_ROUNDING = 1e-9  # numbers that are equal on paper may differ by this share in floating point


class Interval(NamedTuple):
    """An estimate and the confidence interval around it."""

    value: float
    low: float
    high: float
    level: float


class McNemar(NamedTuple):
    """How many items only one of two systems got right, and the two-sided p value."""

    only_a: int
    only_b: int
    p: float


def _fault(name: str, expected: str, got: object, cure: str) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {got}; {cure}")


def _numbers(name: str, values: ArrayLike, *, dimensions: int = 1, missing: bool = False) -> Floats:
    """Return `values` as floats, all finite but for NaN where a value may be `missing`."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf" or array.ndim != dimensions or array.size == 0:
        raise _fault(name, f"{dimensions}-D numbers, not empty", f"{array.dtype} {array.shape}", "convert it")
    floats = array.astype(np.float64)
    if (bad := floats[~np.isfinite(floats) & ~(missing & np.isnan(floats))]).size:
        raise _fault(name, "finite numbers", f"{bad[0]} ({bad.size} not finite)", "repair or drop these")
    return floats


def _paired(name_a: str, a: ArrayLike, name_b: str, b: ArrayLike) -> tuple[Floats, Floats]:
    first, second = _numbers(name_a, a), _numbers(name_b, b)
    if len(first) != len(second):
        raise _fault(f"{name_a} and {name_b}", "equal lengths", f"{len(first)}, {len(second)}", "align them")
    return first, second


def _whole(name: str, value: int, least: int) -> int:
    if not isinstance(value, int | np.integer) or value < least:
        raise _fault(name, f"a whole number of at least {least}", repr(value), "pass a count")
    return int(value)


def _between(name: str, value: float, low: float, high: float, *, strict: bool = False) -> float:
    if not (low < value < high if strict else low <= value <= high):
        raise _fault(name, f"{low} to {high}" + " exclusive" * strict, value, "pass a fraction, not percent")
    return float(value)


def _cluster_totals(values: Floats, clusters: Labels) -> tuple[Floats, Floats]:
    """Return each cluster's sum and size, in an order that the data alone decide."""
    labels: list[object] = list(range(len(values)) if clusters is None else clusters)
    if len(labels) != len(values):
        raise _fault("clusters", f"{len(values)} labels, one per item", len(labels), "align them by item")
    if odd := [label for label in labels if not isinstance(label, str | int | np.integer)]:
        raise _fault("clusters", "strings or whole numbers as labels", repr(odd[0]), "name each cluster")
    index: dict[object, int] = {}
    codes = np.array([index.setdefault(label, len(index)) for label in labels])
    # Floating-point sums depend on the order of their terms, so the terms are sorted before they are added.
    order = np.argsort(values)
    sums = np.asarray(np.bincount(codes[order], weights=values[order]), dtype=np.float64)
    sizes = np.bincount(codes).astype(np.float64)
    canonical = np.lexsort((sums, sizes))
    return sums[canonical], sizes[canonical]


def _chunks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield shapes that may be held at once and together make `rows` rows of `width` cells."""
    step = max(1, _CELLS // width)
    for start in range(0, rows, step):
        yield min(step, rows - start), width


def bootstrap_mean(
    values: ArrayLike, clusters: Labels = None, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the pooled mean with a percentile interval from resampling whole clusters.

    The interval has no width where all values agree; for a rate near 0 or 1 prefer `wilson`.

    >>> votes, queries = [1, 1, 1, 0, 0, 0, 1, 0], ["a", "a", "a", "b", "b", "b", "c", "d"]
    >>> alone, clustered = bootstrap_mean(votes), bootstrap_mean(votes, queries)
    >>> alone.high - alone.low < clustered.high - clustered.low
    True
    """
    _between("level", level, 0, 1, strict=True)
    sums, sizes = _cluster_totals(_numbers("values", values), clusters)
    if len(sums) == 1:
        raise _fault("clusters", "at least 2", 1, "one shows no spread: judge more clusters")
    rng, means = np.random.default_rng(seed), []
    for shape in _chunks(_whole("resamples", resamples, least=1), len(sums)):
        drawn = rng.integers(len(sums), size=shape)
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sums.sum() / sizes.sum()), float(low), float(high), level)


def bootstrap_difference(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Labels = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return mean(a) - mean(b) over paired items, the same clusters being resampled for both.

    >>> bootstrap_difference([3, 5, 9], [2, 4, 8])  # the items differ widely, the pairs do not
    Interval(value=1.0, low=1.0, high=1.0, level=0.95)
    """
    first, second = _paired("a", a, "b", b)
    # With the same clusters in both, the difference of the means is the mean of the differences.
    return bootstrap_mean(first - second, clusters, level=level, resamples=resamples, seed=seed)


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Return a success rate with Wilson's score interval, for independent items.

    >>> wilson(10, 10).low < 0.75  # ten out of ten is no proof of perfection
    True
    """
    if _whole("successes", successes, least=0) > _whole("n", n, least=1):
        raise _fault("successes", f"at most n = {n}", successes, "were the arguments swapped?")
    z = NormalDist().inv_cdf((1 + _between("level", level, 0, 1, strict=True)) / 2)
    rate, shrink = successes / n, 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / shrink
    reach = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / shrink
    # On paper the ends are 0 without a success and 1 without a failure; rounding must not spoil that.
    low, high = 0.0 if successes == 0 else centre - reach, 1.0 if successes == n else centre + reach
    return Interval(rate, low, high, level)


def paired_permutation(
    a: ArrayLike, b: ArrayLike, clusters: Labels = None, *, resamples: int = 10_000, seed: int = 0
) -> float:
    """Return the two-sided p value of equal paired means, from flipping the signs of whole clusters.

    The value is exact where `resamples` suffice to try every pattern of signs, and drawn otherwise.

    >>> paired_permutation([2, 2, 2], [1, 1, 1])  # in 2 of 8 patterns all signs agree
    0.25
    """
    first, second = _paired("a", a, "b", b)
    sums, _ = _cluster_totals(first - second, clusters)
    sizes = np.sort(np.abs(sums))  # without the observed signs, swapping `a` and `b` changes no draw
    threshold = abs(sums.sum()) - _ROUNDING * sizes.sum()
    if 2 ** len(sizes) <= _whole("resamples", resamples, least=1):
        outcomes = np.zeros(1)
        for size in sizes:
            outcomes = np.concatenate([outcomes - size, outcomes + size])
        return float(np.mean(np.abs(outcomes) >= threshold))
    rng, extreme = np.random.default_rng(seed), 1  # the observed pattern is a draw too, so p is never 0
    for shape in _chunks(resamples, len(sizes)):
        outcomes = 2 * ((rng.random(shape) < 0.5) @ sizes) - sizes.sum()
        extreme += int((np.abs(outcomes) >= threshold).sum())
    return extreme / (resamples + 1)


def _binomial(n: int, p: float) -> Floats:
    """Return the probabilities of 0 to n successes, computed as logarithms so that no large n overflows."""
    k = np.arange(n + 1)
    if p in (0, 1):
        return np.asarray(k == n * p, dtype=np.float64)
    choose = np.cumsum(np.log(np.append(1, (n - k[:-1]) / k[1:])))
    return np.asarray(np.exp(choose + k * math.log(p) + (n - k) * math.log1p(-p)), dtype=np.float64)


def mcnemar(a: ArrayLike, b: ArrayLike) -> McNemar:
    """Return McNemar's exact test of paired successes, in which only items with different outcomes count.

    >>> mcnemar([True, True, True, False], [False, False, True, False])
    McNemar(only_a=2, only_b=0, p=0.5)
    """
    first, second = _paired("a", a, "b", b)
    if odd := {*first, *second} - {0, 1}:
        raise _fault("a and b", "booleans or 0 and 1", min(odd), "threshold scores and drop ties first")
    only_a, only_b = int((first > second).sum()), int((second > first).sum())
    tail = _binomial(only_a + only_b, 0.5)[: min(only_a, only_b) + 1].sum()
    return McNemar(only_a, only_b, min(1.0, float(2 * tail)))  # at equal counts both tails hold the middle


def holm(p_values: ArrayLike) -> Floats:
    """Return Holm's adjusted p values, in the order of the input.

    >>> holm([0.25, 0.01, 0.02]).tolist()
    [0.25, 0.03, 0.04]
    """
    p = _numbers("p_values", p_values)
    for extreme in (p.min(), p.max()):
        _between("p_values", extreme, 0, 1)
    order = np.argsort(p)
    adjusted: Floats = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted[np.argsort(order)]


def mcnemar_power(p_a: float, p_b: float, n: int, *, correlation: float = 0.5, alpha: float = 0.05) -> float:
    """Return how often McNemar's exact test finds two success rates to differ on n items.

    `correlation` is the phi of the two outcomes; where the rates exclude it, the nearest possible one counts.

    >>> [round(mcnemar_power(0.67, 0.57, n), 2) for n in (50, 200, 400)]
    [0.21, 0.8, 0.98]
    """
    product = _between("p_a", p_a, 0, 1) * _between("p_b", p_b, 0, 1)
    size = _between("alpha", alpha, 0, 1, strict=True) * (1 + _ROUNDING)
    phi = _between("correlation", correlation, -1, 1)
    wanted = product + phi * math.sqrt(product * (1 - p_a) * (1 - p_b))
    both = min(max(wanted, 0.0, p_a + p_b - 1), p_a, p_b)
    discordant = (p_a - both) + (p_b - both)
    share = (p_a - both) / discordant if discordant else 0.5
    power, weights = 0.0, _binomial(_whole("n", n, least=1), discordant)
    for pairs in map(int, np.flatnonzero(weights > 1e-16)):  # all others together weigh less than rounding
        tail = int(np.searchsorted(2 * np.cumsum(_binomial(pairs, 0.5)), size, side="right"))
        outcomes = _binomial(pairs, share)
        power += float(weights[pairs] * (outcomes[:tail].sum() + outcomes[pairs + 1 - tail :].sum()))
    return min(1.0, power)


def detectable_difference(
    n: int, *, p: float = 0.5, power: float = 0.8, correlation: float = 0.5, alpha: float = 0.05
) -> float:
    """Return, to a millionth, the least gain over success rate `p` that McNemar's test shows on n items."""
    _between("power", power, _between("alpha", alpha, 0, 1, strict=True), 1, strict=True)
    low, gain, high = 0.0, 1 - _between("p", p, 0, 1), 1.0  # the first trial is the greatest gain there is
    while high - low > 1e-6:
        if mcnemar_power(p + gain, p, n, correlation=correlation, alpha=alpha) >= power:
            high = gain
        elif gain == 1 - p:
            raise _fault("n", f"enough items for power {power} at p = {p}", n, "add items or lower either")
        else:
            low = gain
        gain = (low + high) / 2
    return high


def kendall_tau_b(x: ArrayLike, y: ArrayLike) -> float:
    """Return Kendall's rank correlation, corrected for ties on either side."""
    ranks = np.stack([np.unique(side, return_inverse=True)[1] for side in _paired("x", x, "y", y)])
    products = np.zeros((2, 2))
    for i in range(ranks.shape[1]):
        signs = np.sign(ranks[:, i:] - ranks[:, [i]])
        products += signs @ signs.T  # untied pairs on the diagonal, agreement less disagreement beside it
    for name, untied in zip("xy", products.diagonal(), strict=True):
        if untied == 0:
            raise _fault(name, "at least two different values", "a constant", "it has no ranks: drop it")
    return float(products[0, 1] / math.sqrt(products[0, 0] * products[1, 1]))


def krippendorff_alpha(ratings: ArrayLike, *, metric: Metric = "ordinal") -> float:
    """Return Krippendorff's alpha of annotators (rows) over units (columns), NaN marking a missing rating.

    Units with fewer than two ratings do not count; where the rest are equal, alpha is undefined and refused.
    """
    if metric not in get_args(Metric):
        raise _fault("metric", "one of " + ", ".join(get_args(Metric)), repr(metric), "choose one of these")
    table = _numbers("ratings", ratings, dimensions=2, missing=True)
    table = table[:, (~np.isnan(table)).sum(axis=0) >= 2]
    values = np.unique(table[~np.isnan(table)])
    if len(values) < 2:
        got = f"{table.shape[1]} such units with {len(values)} different ratings"
        raise _fault("ratings", "units rated twice or more that differ", got, "collect more varied ratings")
    counts = np.stack([(table == value).sum(axis=0) for value in values], axis=1).astype(np.float64)
    weights = 1 / (counts.sum(axis=1) - 1)
    coincidences = (counts * weights[:, None]).T @ counts - np.diag(weights @ counts)
    totals = coincidences.sum(axis=1)
    # Krippendorff's ordinal distance is the interval distance between the middle ranks of two values.
    scale = np.cumsum(totals) - totals / 2 if metric == "ordinal" else values
    steps = (scale[:, None] - scale) / (scale[-1] - scale[0])  # in shares of the range: no square overflows
    distances = steps != 0 if metric == "nominal" else steps**2
    observed, expected = (coincidences * distances).sum(), totals @ distances @ totals
    return float(1 - (totals.sum() - 1) * observed / expected)
