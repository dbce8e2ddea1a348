"""Several annotators on one question, and what they agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median_low

from ..records import DIMENSIONS, RankedQuery, Response


def consensus(annotations: Sequence[RankedQuery]) -> RankedQuery:
    """One ranked query from several: mean ranks put in order, median scores, the first annotator's words.

    A response that only some annotators constructed stays out, unless without it nothing would be compared.
    """
    first = annotations[0]
    if len(annotations) == 1:
        return first
    shared = min(len(annotation.responses) for annotation in annotations)
    together = [
        _merged([annotation.responses[at] for annotation in annotations], annotations, at) for at in range(shared)
    ]
    means = [mean for _, mean in together]
    places = {mean: place for place, mean in enumerate(sorted(set(means)), start=1)}
    responses = tuple(replace(response, rank=places[mean]) for response, mean in together)
    if len(places) == 1 and shared < max(len(annotation.responses) for annotation in annotations):
        return next(annotation for annotation in annotations if len(annotation.responses) > shared)
    return replace(first, responses=responses)


def _merged(versions: Sequence[Response], annotations: Sequence[RankedQuery], at: int) -> tuple[Response, float]:
    scores = {}
    for dimension in DIMENSIONS:
        given = [score for version in versions if (score := version.scores.get(dimension)) is not None]
        scores[dimension] = median_low(given) if given else None
    return replace(versions[0], scores=scores), fmean(annotation.ranks[at] for annotation in annotations)
