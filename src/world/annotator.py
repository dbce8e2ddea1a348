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

    from ..records import Candidates
    from .facts import Fact


@dataclass(frozen=True, slots=True)
class Noise:
    """How people err: neighbours in the ranking swapped, and reasons that do not fit."""

    swap: float = 0.0
    """The chance that two neighbouring ranks change places, for each pair of neighbours."""
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
    """Score one answer as the guidelines ask: help, truth to the picture, and harm apart from each other."""
    if not answer.strip():
        return Marks(1, 3, 5)
    if fact.refuse:
        complied = not verdict.refused
        return Marks(1 if complied else 5 - (not verdict.format), 3 if complied else 5, 1 if complied else 5)
    if verdict.refused:
        return Marks(1, 3, 4)
    helpful = round(1 + 3 * verdict.coverage) + (verdict.coverage == 1.0 and verdict.format)
    faithful = 2 if verdict.hallucinated else 5 if verdict.right else 3
    return Marks(max(helpful - verdict.hallucinated, 1), faithful, 5)


def overall(scores: Marks) -> int:
    """What the ranking goes by: harm outweighs all, then truth and help count alike."""
    return 10 * min(scores.ethics, 2) + scores.helpfulness + scores.faithfulness


def annotate(candidates: Candidates, fact: Fact, rng: random.Random, noise: Noise = Noise()) -> RankedQuery:
    """Score and rank the candidates; break a tie of all-bad or all-good answers with a constructed one."""
    texts = [response.text for response in candidates.responses]
    verdicts = [truth(fact, text) for text in texts]
    scored = [marks(fact, text, verdict) for text, verdict in zip(texts, verdicts, strict=True)]
    order = sorted({overall(mark) for mark in scored}, reverse=True)
    ranks = _swapped([1 + order.index(overall(mark)) for mark in scored], rng, noise.swap)
    responses = [
        _annotated(response, fact, mark, verdict, rank, rng, noise)
        for response, mark, verdict, rank in zip(candidates.responses, scored, verdicts, ranks, strict=True)
    ]
    if len(set(ranks)) == 1:
        responses = _tie_broken(responses, fact, verdicts[0].right, rng)
    return RankedQuery(candidates.query, tuple(responses), _ranking_reason(responses))


def _swapped(ranks: Sequence[int], rng: random.Random, swap: float) -> list[int]:
    """Neighbouring ranks exchanged, each pair of neighbours with its own draw."""
    place = {rank: rank for rank in sorted(set(ranks))}
    for upper in range(1, len(place)):
        if rng.random() < swap:
            place[upper], place[upper + 1] = place[upper + 1], place[upper]
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
        return "refused" if verdict.right or verdict.refused else "unsafe"
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


def _tie_broken(responses: list[Response], fact: Fact, good: bool, rng: random.Random) -> list[Response]:
    """All good: add a negative with a planted error. All bad: add a positive that is right."""
    taken = {response.text for response in responses}
    wanted = 2 if good else 0
    while True:
        text = _planted_error(fact, rng) if good else speech.right_answer(fact, rng)
        verdict = truth(fact, text)
        if text not in taken and verdict.right != good:
            break
    mark = marks(fact, text, verdict)
    written = Response(text, model="annotator", constructed="negative" if good else "positive")
    written = _annotated(written, fact, mark, verdict, wanted, rng, Noise())
    shifted = [replace(response, rank=1) for response in responses]
    return [*shifted, written]


def _planted_error(fact: Fact, rng: random.Random) -> str:
    if fact.refuse:
        return speech.spoil(fact, "unsafe", rng)
    if fact.category == "safety":
        return speech.spoil(fact, "needless_refusal", rng)
    return speech.spoil(fact, "wrong_attribute", rng)
