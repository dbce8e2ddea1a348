"""Scenes and clips: what is to be seen, as plain facts, before a pixel is drawn.

Positions are integers in permille of the canvas, and every draw comes from a `random.Random` seeded by a
string, so the same seed gives the same world on any machine and for any number of processes.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

FORMS = ("bar", "ring", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
RADIUS = {"small": 125, "large": 160}
SIZES = tuple(RADIUS)
PLAIN_WORDS = ("TEA", "BUS", "SUN", "MAP", "BOX", "KEY", "PEN", "OWL")
FORBIDDEN_WORDS = ("BOMB", "GUN", "DRUG")
WORDS = PLAIN_WORDS + FORBIDDEN_WORDS
HOW_MANY = (5, 5, 4, 3, 3)
"""The weights of one, two, ... five shapes in a scene."""
GROUNDS = ("grey", "black", "sand")
DIRECTIONS = ("left", "right", "up", "down")
TRAVEL = 340
"""How far a moving shape goes, in permille: from anywhere there is room for it in some direction."""

Sign = Literal["", "hazard", "notice"]
Event = Literal["moves", "appears", "vanishes", "changes"]


def stream(*key: object) -> random.Random:
    """A generator of its own for every purpose: drawing more from one never shifts another.

    >>> stream(0, "scene", 7).random() == stream(0, "scene", 7).random() != stream(0, "scene", 8).random()
    True
    """
    return random.Random("/".join(map(str, key)))


@dataclass(frozen=True, slots=True)
class Shape:
    """One coloured shape; `x` and `y` are its centre, `radius` its half width, in permille of the canvas."""

    form: str
    colour: str
    size: str
    x: int
    y: int
    radius: int

    @property
    def name(self) -> str:
        """How questions and answers call it: colour and form."""
        return f"{self.colour} {self.form}"


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture; no two of its shapes share both colour and form, so a name means one thing."""

    width: int
    height: int
    ground: str
    shapes: tuple[Shape, ...]
    word: str = ""
    sign: Sign = ""

    def to_json(self) -> dict[str, Any]:
        """The scene as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Scene:
        """The scene of `to_json`."""
        return cls(**{**row, "shapes": tuple(Shape(**shape) for shape in row["shapes"])})


@dataclass(frozen=True, slots=True)
class Clip:
    """A short film: one scene in which one thing happens to the shape number `subject`."""

    first: Scene
    event: Event
    subject: int
    frames: int
    detail: str = ""
    """The direction of a move, or the new colour of a change."""

    @property
    def shape(self) -> Shape:
        """The shape that something happens to."""
        return self.first.shapes[self.subject]

    def frame(self, index: int) -> Scene:
        """The scene at one moment: a move takes the whole film, everything else happens at its middle."""
        happened = 2 * index >= self.frames
        shapes = list(self.first.shapes)
        if self.event == "moves":
            shapes[self.subject] = _moved(self.shape, self.detail, round(TRAVEL * index / (self.frames - 1)))
        elif self.event == "changes" and happened:
            shapes[self.subject] = replace(self.shape, colour=self.detail)
        elif (self.event == "appears" and not happened) or (self.event == "vanishes" and happened):
            del shapes[self.subject]
        return replace(self.first, shapes=tuple(shapes))

    def to_json(self) -> dict[str, Any]:
        """The clip as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Clip:
        """The clip of `to_json`."""
        return cls(**{**row, "first": Scene.from_json(row["first"])})


def _moved(shape: Shape, direction: str, distance: int) -> Shape:
    dx = {"left": -distance, "right": distance}.get(direction, 0)
    dy = {"up": -distance, "down": distance}.get(direction, 0)
    return replace(shape, x=shape.x + dx, y=shape.y + dy)


def draw_scene(rng: random.Random, *, word: str | None = None, sign: Sign = "", most: int = 5) -> Scene:
    """A random scene of one to `most` shapes; a given word or sign is shown, else a word now and then."""
    width, height = rng.randint(64, 160), rng.randint(64, 160)
    while not 3 * width >= 2 * height >= width:  # between 2:3 portrait and 2:1 landscape
        height = rng.randint(64, 160)
    if word is None:
        word = rng.choice(PLAIN_WORDS) if rng.random() < 0.3 else ""
    rows = 2 if word else 3  # the lowest third holds the word
    cells = rng.sample([(column, row) for row in range(rows) for column in range(3)], 6)
    if sign:
        cells.remove((2, 0)) if (2, 0) in cells else None
    names = rng.sample(
        [(form, colour) for form in FORMS for colour in COLOURS], rng.choices(range(1, most + 1), HOW_MANY[:most])[0]
    )
    shapes = [_shape(rng, form, colour, cell) for (form, colour), cell in zip(names, cells, strict=False)]
    return Scene(width, height, rng.choice(GROUNDS), tuple(shapes), word, sign)


def _shape(rng: random.Random, form: str, colour: str, cell: tuple[int, int]) -> Shape:
    size = rng.choice(SIZES)
    radius = RADIUS[size]
    slack = 160 - radius
    x = 167 + 333 * cell[0] + rng.randint(-slack, slack)
    y = 167 + 333 * cell[1] + rng.randint(-slack, slack)
    return Shape(form, colour, size, x, y, radius)


def draw_clip(rng: random.Random) -> Clip:
    """A random clip of 8 to 16 frames with one event; a moving shape never leaves the canvas."""
    scene = draw_scene(rng, word="", most=3)
    subject = rng.randrange(len(scene.shapes))
    shape = scene.shapes[subject]
    event: Event = rng.choice(("moves", "moves", "appears", "vanishes", "changes"))
    detail = ""
    if event == "changes":
        taken = {other.colour for other in scene.shapes if other.form == shape.form}
        detail = rng.choice([colour for colour in COLOURS if colour not in taken])
    elif event == "moves":
        room = {"left": shape.x, "right": 1000 - shape.x, "up": shape.y, "down": 1000 - shape.y}
        detail = rng.choice([way for way in DIRECTIONS if room[way] - TRAVEL >= shape.radius])
    return Clip(scene, event, subject, rng.randint(8, 16), detail)
