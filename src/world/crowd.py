"""Several annotators on one question, and what they agree on."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean, median_low
from typing import TYPE_CHECKING

from ..records import DIMENSIONS, RankedQuery, Response
from .annotator import complete
from .truth import truth

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from .facts import Fact


def consensus(sheets: Sequence[RankedQuery], fact: Fact, rng: random.Random) -> RankedQuery:
    """One ranked query from the sheets of several annotators: mean ranks, median scores, the first one's words.

    What each constructed for a sheet of their own stays there: the candidates alone are merged, and if they are
    all bad or all good and tie, one response is constructed for the merged ranking. If opposite opinions cancel
    out although some answers are right and some wrong, the first annotator's ranking decides. A single sheet
    stands as it is.
    """
    if len(sheets) == 1:
        return sheets[0]
    opinions = [[response for response in sheet.responses if not response.constructed] for sheet in sheets]
    versions = list(zip(*opinions, strict=True))
    means = [fmean(version.rank or 0 for version in given) for given in versions]
    if len(set(means)) == 1 and len({truth(fact, response.text).right for response in opinions[0]}) > 1:
        means = [float(response.rank or 0) for response in opinions[0]]
    places = {mean: place for place, mean in enumerate(sorted(set(means)), start=1)}
    merged = [
        replace(given[0], rank=places[mean], scores=_medians(given))
        for given, mean in zip(versions, means, strict=True)
    ]
    return complete(sheets[0].query, merged, fact, rng)


def _medians(versions: Sequence[Response]) -> dict[str, int | None]:
    """The lower median of each score, over those who gave it; None where nobody did."""
    given = {
        dimension: [score for version in versions if (score := version.scores.get(dimension)) is not None]
        for dimension in DIMENSIONS
    }
    return {dimension: median_low(scores) if scores else None for dimension, scores in given.items()}
