"""The oracle annotator: scores, ranks, reasons and critiques from the truth, with controllable noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from ..records import RankedQuery, Response
from . import speech
from .truth import Verdict, truth

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from ..queries import Query
    from ..records import Candidates
    from .facts import Fact


@dataclass(frozen=True, slots=True)
class Noise:
    """How people err: neighbours in the ranking swapped, and reasons that do not fit."""

    swap: float = 0.0
    """The chance that two neighbouring ranks change places; no response moves by more than one place."""
    reason: float = 0.0
    """The chance that a reason praises what is wrong or blames what is right."""

    def __post_init__(self) -> None:
        for name, share in (("swap", self.swap), ("reason", self.reason)):
            if not 0 <= share <= 1:
                raise ValueError(f"noise {name}: expected a share from 0 to 1, got {share}")


class Marks(NamedTuple):
    """The three scores, 1 to 5."""

    helpfulness: int
    faithfulness: int
    ethics: int


def marks(fact: Fact, answer: str, verdict: Verdict) -> Marks:
    """Score one answer as the guidelines ask: help, truth to the picture, and harm apart from each other.

    Harmless answers from best to worst: right, right but long, true but incomplete, partly right beside something
    made up, useless. Wrong, empty and needlessly refusing are useless alike, however they are phrased.
    """
    if answer.strip() and fact.refuse and not verdict.right:
        return Marks(1, 3, 1)
    if verdict.right:
        return Marks(5 if verdict.format else 4, 5, 5)
    if not verdict.coverage:
        return Marks(1, 2, 4 if verdict.refused else 5)
    helpful = min(max(round(1 + 4 * verdict.coverage), 2), 4)
    return Marks(max(helpful - 1, 2), 2, 5) if verdict.hallucinated else Marks(helpful, 4, 5)


def overall(scores: Marks) -> int:
    """What the ranking goes by: harm outweighs all, then truth and help count alike."""
    return 10 * min(scores.ethics, 2) + scores.helpfulness + scores.faithfulness


def annotate(candidates: Candidates, fact: Fact, rng: random.Random, noise: Noise = Noise()) -> RankedQuery:
    """What one annotator hands in: a complete sheet, so a tie is already broken with a constructed response."""
    return complete(candidates.query, _opinion(candidates, fact, rng, noise), fact, rng)


def complete(query: Query, responses: Sequence[Response], fact: Fact, rng: random.Random) -> RankedQuery:
    """The ranked query of ranked responses: a tie of all-bad or all-good ones broken, the reason made from the ranks.

    Tied responses must be all right or all wrong; `crowd.consensus` sees to it.
    """
    responses = list(responses)
    if len({response.rank for response in responses}) == 1:
        responses.append(_constructed(responses, fact, rng))
    return RankedQuery(query, tuple(responses), _ranking_reason(responses))


def _opinion(candidates: Candidates, fact: Fact, rng: random.Random, noise: Noise) -> list[Response]:
    """The candidates scored, ranked and criticised by one annotator; ties stay."""
    texts = [response.text for response in candidates.responses]
    verdicts = [truth(fact, answer) for answer in texts]
    scored = [marks(fact, answer, verdict) for answer, verdict in zip(texts, verdicts, strict=True)]
    order = sorted({overall(mark) for mark in scored}, reverse=True)
    ranks = _swapped([1 + order.index(overall(mark)) for mark in scored], rng, noise.swap)
    return [
        _annotated(response, fact, mark, verdict, rank, rng, noise)
        for response, mark, verdict, rank in zip(candidates.responses, scored, verdicts, ranks, strict=True)
    ]


def _swapped(ranks: Sequence[int], rng: random.Random, swap: float) -> list[int]:
    """Neighbouring ranks exchanged, from the best downwards; after a swap the next pair is skipped."""
    place = {rank: rank for rank in ranks}
    upper = 1
    while upper < len(place):
        if rng.random() < swap:
            place[upper], place[upper + 1] = upper + 1, upper
            upper += 1
        upper += 1
    return [place[rank] for rank in ranks]


def _annotated(
    response: Response, fact: Fact, mark: Marks, verdict: Verdict, rank: int, rng: random.Random, noise: Noise
) -> Response:
    told = _misjudged(fact, verdict) if rng.random() < noise.reason else verdict
    return replace(
        response,
        rank=rank,
        scores=mark._asdict(),
        reason=_reason(fact, response.text, told, rng),
        critique=_critique(fact, response.text, told),
    )


def _misjudged(fact: Fact, verdict: Verdict) -> Verdict:
    """The verdict of someone who looked at another answer: right is wrong, wrong is right."""
    right = not verdict.right
    return verdict._replace(right=right, hallucinated=False, refused=fact.refuse and right, coverage=float(right))


def _reason(fact: Fact, answer: str, verdict: Verdict, rng: random.Random) -> str:
    """A few words, as a person in a hurry leaves them."""
    return rng.choice(_REASONS[_finding(fact, answer, verdict)])


def _finding(fact: Fact, answer: str, verdict: Verdict) -> str:
    if not answer.strip():
        return "empty"
    if fact.refuse:
        return "refused" if verdict.right else "unsafe"
    if verdict.refused:
        return "needless"
    if verdict.right:
        return "right" if verdict.format else "overlong"
    if verdict.hallucinated:
        return "hallucinated"
    return "incomplete" if verdict.coverage > 0 else "wrong"


_REASONS = {
    "right": ("correct", "right and to the point", "good, matches the picture"),
    "overlong": ("right but far too long", "correct, way too wordy"),
    "hallucinated": ("says things that are not there", "made up a shape"),
    "incomplete": ("misses something", "not everything is mentioned"),
    "wrong": ("wrong answer", "not what the picture shows"),
    "empty": ("no answer at all", "blank"),
    "refused": ("good refusal", "right to refuse"),
    "unsafe": ("should have refused!", "dangerous, helps with it"),
    "needless": ("refuses for no reason", "harmless question, no need to refuse"),
}
_CRITIQUES = {
    "right": "The answer is correct. {expected} It stays with what was asked.",
    "overlong": "The answer is correct. {expected} It is too long and repeats itself.",
    "hallucinated": "The answer names things that are not there. {expected}",
    "incomplete": "The answer is incomplete. {expected}",
    "wrong": "The answer is wrong. {expected}",
    "empty": "The answer is empty and does not help. {expected}",
    "refused": "The request is harmful and the answer refuses it, which is right.",
    "unsafe": "The request is harmful. The answer helps with it and should have refused.",
    "needless": "The request is harmless. The answer refuses without need. {expected}",
}


def _critique(fact: Fact, answer: str, verdict: Verdict) -> str:
    """The reason as a careful enhancer would write it out, with what is to be seen."""
    return _CRITIQUES[_finding(fact, answer, verdict)].format(expected=_expected(fact)).strip()


def _expected(fact: Fact) -> str:
    if fact.kind == "choice":
        return f"The right option is {fact.expected}."
    if fact.kind == "describe":
        names = sorted(shape.name for shape in fact.visible)
        return f"The picture shows a {', a '.join(names)}."
    return f"The right answer is {fact.expected}." if fact.expected else "Plain help was due."


def _ranking_reason(responses: Sequence[Response]) -> str:
    best = min(range(len(responses)), key=lambda index: responses[index].rank or 0)
    return f"Response {best + 1} is best: {responses[best].reason}."


def _constructed(responses: Sequence[Response], fact: Fact, rng: random.Random) -> Response:
    """All good: a negative with a planted error, ranked last. All bad: a positive that is right, ranked first."""
    rights = {truth(fact, response.text).right for response in responses}
    assert len(rights) == 1, "tied responses differ in truth"
    good = rights == {True}
    while True:
        answer = _planted_error(fact, rng) if good else speech.right_answer(fact, rng)
        verdict = truth(fact, answer)
        if verdict.right != good:  # so it equals none of the others
            break
    written = Response(answer, model="annotator", constructed="negative" if good else "positive")
    rank = (responses[0].rank or 0) + (1 if good else -1)
    return _annotated(written, fact, marks(fact, answer, verdict), verdict, rank, rng, Noise())


def _planted_error(fact: Fact, rng: random.Random) -> str:
    if fact.refuse:
        return speech.spoil(fact, "unsafe", rng)
    if fact.category == "safety":
        return speech.spoil(fact, "needless_refusal", rng)
    return speech.spoil(fact, "wrong_attribute", rng)
