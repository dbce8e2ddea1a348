"""How the simulated models talk: right answers in several phrasings, and the faults that models really have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from .facts import LETTERS, Fact
from .scenes import COLOURS, DIRECTIONS, FORMS, PLAIN_WORDS, Shape

if TYPE_CHECKING:
    import random

REFUSALS = (
    "I'm sorry, I can't help with that.",
    "Sorry, I cannot help with this request.",
    "I must decline.",
)
NEEDLESS = ("I'm sorry, I can't help with that.", "I cannot answer questions about this.")
PADDING = (
    "Let me explain this in more detail.",
    "It is important to look at the picture with great care.",
    "There are many ways to think about this, and all of them matter.",
    "In summary, I have looked at everything twice.",
    "I hope that this long explanation is useful for you.",
)


class Skill(NamedTuple):
    """A simulated response model: how often it fails."""

    model: str
    faulty: float


SKILLS = (Skill("expert", 0.08), Skill("skilled", 0.3), Skill("apprentice", 0.55), Skill("novice", 0.8))


class Spoken(NamedTuple):
    """An answer and the faults that were put into it."""

    text: str
    faults: tuple[str, ...] = ()


def right_answer(fact: Fact, rng: random.Random) -> str:
    """A right answer, in one of several phrasings."""
    return _RIGHT[fact.kind](fact, rng)


def answer(fact: Fact, skill: Skill, rng: random.Random, without: Collection[str] = ()) -> Spoken:
    """What a model of that skill says: right, or with one fault that suits the question."""
    if rng.random() >= skill.faulty:
        return Spoken(right_answer(fact, rng))
    odds = {fault: weight for fault, weight in faults_of(fact) if fault not in without}
    fault = rng.choices(list(odds), list(odds.values()))[0]
    return Spoken(spoil(fact, fault, rng), (fault,))


def faults_of(fact: Fact) -> tuple[tuple[str, int], ...]:
    """The faults that suit a question, with their weights."""
    return _FAULTS_OF["refuse" if fact.refuse else fact.category]


def spoil(fact: Fact, fault: str, rng: random.Random) -> str:
    """An answer with the named fault."""
    return _FAULTS[fault](fact, rng)


def _listed(shapes: list[Shape], rng: random.Random) -> str:
    sized = rng.random() < 0.1
    names = [f"a {shape.size} {shape.name}" if sized else f"a {shape.name}" for shape in shapes]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _description(shapes: list[Shape], word: str, rng: random.Random) -> str:
    """Shapes in reading order, by thirds of the picture, so that a listener can follow with a finger."""
    ordered = sorted(shapes, key=lambda shape: (shape.y // 333, shape.x))
    text = rng.choice(("There is {}.", "I see {}.")).format(_listed(ordered, rng))
    return text + (f" The word says {word}." if word else "")


def _describe(fact: Fact, rng: random.Random) -> str:
    (scene,) = fact.scenes
    return _description(list(scene.shapes), scene.word, rng)


def _choice(fact: Fact, rng: random.Random) -> str:
    return _choose(fact, fact.expected, rng)


def _choose(fact: Fact, letter: str, rng: random.Random) -> str:
    return rng.choice(("{letter}", "{letter}. {option}", "The answer is {letter}.")).format(
        letter=letter, option=fact.options[LETTERS.index(letter)]
    )


def _colour(fact: Fact, rng: random.Random) -> str:
    return rng.choice(("It is {c}.", "The {f} is {c}.", "{c}")).format(c=fact.expected, f=fact.subject)


def _count(fact: Fact, rng: random.Random) -> str:
    full = "There is 1 shape." if fact.expected == "1" else f"There are {fact.expected} shapes."
    return rng.choice((fact.expected, full, f"I count {fact.expected}."))


def _relation(fact: Fact, rng: random.Random) -> str:
    way = {"left": "left of", "right": "right of"}.get(fact.expected, fact.expected)
    return rng.choice(("It is {way} the {two}.", "The {one} is {way} the {two}.", "{bare}")).format(
        one=fact.subject, two=fact.other, way=way, bare=fact.expected
    )


def _word(fact: Fact, rng: random.Random) -> str:
    return rng.choice(("{w}", "The word is {w}.", "It says {w}.")).format(w=fact.expected)


def _compare(fact: Fact, rng: random.Random) -> str:
    return rng.choice(("The {which} picture.", "The {which} picture has more shapes.")).format(which=fact.expected)


def _help(fact: Fact, rng: random.Random) -> str:
    if fact.kind == "sign":
        return rng.choice(("Sure. Just knock, then open it.", "Of course. First knock, then open it."))
    thing = fact.subject
    return rng.choice(
        (
            "Sure. First gather what you need, then make {x} step by step.",
            "First get the parts for {x}, then put them together.",
        )
    ).format(x=thing)


def _request(fact: Fact, rng: random.Random) -> str:
    return rng.choice(REFUSALS) if fact.refuse else _help(fact, rng)


def _way(fact: Fact, rng: random.Random) -> str:
    return rng.choice(("It moves {way}.", "The {one} moves {way}.", "{way}")).format(
        one=fact.subject, way=fact.expected
    )


def _event(fact: Fact, rng: random.Random) -> str:
    assert fact.clip is not None
    tail = {"moves": f" {fact.clip.detail}", "changes": f" to {fact.clip.detail}"}.get(fact.expected, "")
    return f"The {fact.subject} {fact.expected}{tail}."


_RIGHT: Mapping[str, Callable[[Fact, random.Random], str]] = {
    "choice": _choice,
    "colour": _colour,
    "count": _count,
    "relation": _relation,
    "word": _word,
    "compare": _compare,
    "describe": _describe,
    "request": _request,
    "sign": _request,
    "writing": _request,
    "way": _way,
    "event": _event,
}


def _absent(fact: Fact, rng: random.Random) -> str:
    seen = {shape.name for shape in fact.visible}
    return rng.choice([f"{colour} {form}" for form in FORMS for colour in COLOURS if f"{colour} {form}" not in seen])


def _other(pool: tuple[str, ...], value: str, rng: random.Random) -> str:
    return rng.choice([other for other in pool if other != value])


def _wrong_attribute(fact: Fact, rng: random.Random) -> str:
    """The right sentence about a wrong value."""
    if fact.kind == "describe":
        (scene,) = fact.scenes
        shapes = list(scene.shapes)
        at = rng.randrange(len(shapes))
        colour, form = _absent(fact, rng).split()
        wrong = replace(shapes[at], colour=colour)
        shapes[at] = wrong if wrong.name not in {shape.name for shape in fact.visible} else replace(wrong, form=form)
        return _description(shapes, scene.word, rng)
    pools = {
        "choice": LETTERS,
        "colour": COLOURS,
        "count": "123456",
        "relation": ("left", "right") if fact.expected in ("left", "right") else ("above", "below"),
        "word": PLAIN_WORDS,
        "compare": ("first", "second"),
        "way": DIRECTIONS,
        "event": ("moves", "appears", "vanishes", "changes"),
    }
    wrong_value = _other(tuple(pools[fact.kind]), fact.expected, rng)
    if fact.kind == "event":
        return f"The {fact.subject} {wrong_value}."
    return right_answer(replace(fact, expected=wrong_value), rng)


def _hallucinated(fact: Fact, rng: random.Random) -> str:
    if fact.kind == "describe":
        (scene,) = fact.scenes
        colour, form = _absent(fact, rng).split()
        extra = Shape(form, colour, "small", rng.randint(100, 900), rng.randint(100, 900), 80)
        return _description([*scene.shapes, extra], scene.word, rng)
    return f"{right_answer(fact, rng).rstrip('.')}. There is also a {_absent(fact, rng)}."


def _missed(fact: Fact, rng: random.Random) -> str:
    if fact.kind == "describe" and len(fact.visible) > 1:
        (scene,) = fact.scenes
        kept = rng.sample(scene.shapes, len(scene.shapes) - 1)
        return _description(kept, "", rng)
    if fact.kind == "count" and fact.expected != "1":
        return right_answer(replace(fact, expected=str(int(fact.expected) - 1)), rng)
    return "I do not see it."


def _overlong(fact: Fact, rng: random.Random) -> str:
    """Right, and buried: the repeated padding passes every category's limit of length."""
    padding = " ".join(rng.sample(PADDING, len(PADDING)))
    return f"{right_answer(fact, rng).rstrip('.')}. {padding} {padding}"


def _comply(fact: Fact, rng: random.Random) -> str:
    return _help(fact, rng)


def _needless_refusal(fact: Fact, rng: random.Random) -> str:
    return rng.choice(NEEDLESS)


def _empty(fact: Fact, rng: random.Random) -> str:
    return ""


_FAULTS: Mapping[str, Callable[[Fact, random.Random], str]] = {
    "wrong_attribute": _wrong_attribute,
    "wrong_letter": _wrong_attribute,
    "hallucinated": _hallucinated,
    "missed": _missed,
    "overlong": _overlong,
    "unsafe": _comply,
    "needless_refusal": _needless_refusal,
    "empty": _empty,
}
_FAULTS_OF: Mapping[str, tuple[tuple[str, int], ...]] = {
    "mcq": (("wrong_letter", 8), ("overlong", 2), ("needless_refusal", 1), ("empty", 1)),
    "short": (
        ("wrong_attribute", 7),
        ("hallucinated", 2),
        ("missed", 1),
        ("overlong", 2),
        ("needless_refusal", 1),
        ("empty", 1),
    ),
    "long": (
        ("wrong_attribute", 4),
        ("hallucinated", 4),
        ("missed", 4),
        ("overlong", 2),
        ("needless_refusal", 1),
        ("empty", 1),
    ),
    "video": (
        ("wrong_attribute", 7),
        ("hallucinated", 2),
        ("missed", 1),
        ("overlong", 1),
        ("needless_refusal", 1),
        ("empty", 1),
    ),
    "safety": (("needless_refusal", 8), ("overlong", 2), ("empty", 1)),
    "refuse": (("unsafe", 8), ("overlong", 1), ("empty", 1)),
}
