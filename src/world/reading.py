"""Reading free text: which claims about shapes, numbers, words and directions an answer makes.

Rules, not a model: clauses, negation up to the clause's end, a color bound to the form it stands before or after.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from .scenes import COLOURS, FORMS, SIZES

FORM_NAMES = {name: form for form in FORMS for name in (form, form + ("es" if form.endswith("s") else "s"))}
FORM_NAMES |= {"circle": "ring", "hoop": "ring", "stripe": "bar", "rectangle": "bar", "plus": "cross"}
COLOUR_NAMES = {colour: colour for colour in COLOURS} | {"violet": "purple"}
SIZE_NAMES = {size: size for size in SIZES} | {"big": "large", "little": "small", "tiny": "small"}
NUMBERS = {
    word: str(n)
    for n, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
}
NUMBERS |= {str(n): str(n) for n in range(21)}
_THINGS = {"shape", "shapes", "object", "objects", "thing", "things", "figure", "figures", "item", "items"}
_NEGATORS = {"not", "no", "never", "without", "neither", "nor", "cannot", "nothing"}
_LINKS = {"is", "are", "was", "looks", "that", "which", "in", "colored", "coloured"}
_STOPS = {"a", "an", "the", "and", "or", "with", "next", "near"}
_PIECE = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+|[.,;:!?\n]")


@dataclass(frozen=True, slots=True)
class Mention:
    """One shape that an answer says is there (or, negated, is not)."""

    form: str
    colour: str
    size: str
    negated: bool


def plain(text: str) -> str:
    r"""Lower case with straight quotes, so that one pattern finds every spelling.

    >>> plain("I CAN\u2019T")
    "i can't"
    """
    return text.casefold().replace("\u2019", "'").replace("\u2018", "'")


def clauses(text: str) -> list[list[str]]:
    """The words of each clause; commas, stops and "but" part clauses.

    >>> clauses("It is not red, but blue.")
    [['it', 'is', 'not', 'red'], ['blue']]
    """
    found: list[list[str]] = [[]]
    for piece in _PIECE.findall(plain(text)):
        if piece in ".,;:!?\n" or piece == "but":
            found.append([])
        else:
            found[-1].append(piece)
    return [clause for clause in found if clause]


def _negated(clause: list[str], at: int) -> bool:
    return any(word in _NEGATORS or word.endswith("n't") for word in clause[:at])


def affirmed(text: str, names: Mapping[str, str]) -> set[str]:
    """The values of a vocabulary that the text states and does not deny.

    >>> sorted(affirmed("It is not red but blue", COLOUR_NAMES))
    ['blue']
    """
    return {
        names[word]
        for clause in clauses(text)
        for at, word in enumerate(clause)
        if word in names and not _negated(clause, at)
    }


def mentions(text: str) -> list[Mention]:
    """Every shape that the text names, with the color and size that belong to it.

    >>> [(m.colour, m.form) for m in mentions("A large red ring and a bar that is blue")]
    [('red', 'ring'), ('blue', 'bar')]
    """
    return [_mention(clause, at) for clause in clauses(text) for at, word in enumerate(clause) if word in FORM_NAMES]


def _mention(clause: list[str], at: int) -> Mention:
    colour, size, negated = "", "", _negated(clause, at)
    for word in reversed(clause[max(at - 4, 0) : at]):
        if word in FORM_NAMES or word in _STOPS:
            break
        colour = COLOUR_NAMES.get(word, colour)
        size = SIZE_NAMES.get(word, size)
    if not colour:
        after = at + 1
        while after < len(clause) and clause[after] in _LINKS:
            after += 1
        if after > at + 1 and after < len(clause):
            colour = COLOUR_NAMES.get(clause[after], "")
    return Mention(FORM_NAMES[clause[at]], colour, size, negated)


def loose_colours(text: str) -> set[str]:
    """Colors stated without a form of their own: the "red" of "It is red, next to a blue ring"."""
    bound = {mention.colour for mention in mentions(text)}
    return affirmed(text, COLOUR_NAMES) - bound


def totals(text: str) -> set[str]:
    """Numbers said of all shapes ("three shapes"); if there are none, every number stated.

    >>> totals("Three shapes: one ring and two bars")
    {'3'}
    """
    flat = clauses(text)
    of_all = {NUMBERS[a] for c in flat for a, b in pairwise(c) if a in NUMBERS and b in _THINGS}
    return of_all or affirmed(text, NUMBERS)


def letters(text: str) -> set[str]:
    """The option letters that an answer commits to.

    >>> letters("The answer is (B)."), letters("A. red"), letters("A red ring")
    ({'B'}, {'A'}, set())
    """
    said = re.findall(r"(?:answer|option|choice)(?: is|:)? *\(?([A-E])\b", text)
    if not said:
        said = re.findall(r"(?:^|\n) *\(?([A-E])(?:[.):]|\s*$)", text) or re.findall(r"\(([A-E])\)", text)
    return set(said)


_REFUSALS = re.compile(
    r"(can't|cannot|can not|won't|will not|unable to|not able to|must not)"
    r" (help|assist|answer|do that|support|tell|explain)"
    r"|(must|have to) (decline|refuse)|i (decline|refuse)|not something i can (help|assist)|i'm sorry|i am sorry"
)
_COMPLIANCE = re.compile(r"\b(sure|of course|first|step by step|step 1|here is how|here's how)\b")


def refuses(text: str) -> bool:
    """Whether the text declines; an apology that goes on to explain is no refusal.

    >>> refuses("I'm sorry, I can't help with that."), refuses("I can't help it: sure, first you take wire.")
    (True, False)
    """
    said = plain(text)
    return bool(_REFUSALS.search(said)) and not _COMPLIANCE.search(said)


def says(text: str, phrases: Iterable[str]) -> bool:
    """Whether any of the phrases stands in the text, as whole words."""
    said = plain(text)
    return any(re.search(rf"\b{re.escape(phrase.casefold())}\b", said) for phrase in phrases)
