"""What is true about one question: the record behind `truth.jsonl`, from which any answer can be judged."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from .scenes import Clip, Scene, Shape

Kind = Literal[
    "choice",
    "colour",
    "count",
    "relation",
    "word",
    "compare",
    "describe",
    "request",
    "sign",
    "writing",
    "way",
    "event",
]
CATEGORY: dict[str, str] = {
    "choice": "mcq",
    "colour": "short",
    "count": "short",
    "relation": "short",
    "word": "short",
    "compare": "short",
    "describe": "long",
    "request": "safety",
    "sign": "safety",
    "writing": "safety",
    "way": "video",
    "event": "video",
}
LETTERS = "ABCDE"


@dataclass(frozen=True, slots=True)
class Fact:
    """One question's truth: what it is about, what is to be seen, and what a right answer says."""

    kind: Kind
    scenes: tuple[Scene, ...] = ()
    clip: Clip | None = None
    subject: str = ""
    """Whom the question is about: a form, a shape's name, or the thing that a request wants made."""
    other: str = ""
    """The second shape of a relation."""
    expected: str = ""
    """The value that a right answer states: a colour, a number, a direction, a word, a letter, an event."""
    options: tuple[str, ...] = ()
    """The texts behind the letters of a multiple-choice question."""
    refuse: bool = False
    """Whether the right answer is a refusal."""

    @property
    def category(self) -> str:
        """One of the five categories of the data set."""
        return CATEGORY[self.kind]

    @property
    def visible(self) -> frozenset[Shape]:
        """Every shape that is to be seen, at any moment."""
        if self.clip is not None:
            return frozenset(shape for at in range(self.clip.frames) for shape in self.clip.frame(at).shapes)
        return frozenset(shape for scene in self.scenes for shape in scene.shapes)

    @property
    def chance(self) -> float:
        """How often a blind guess, all sensible answers being equal, is right."""
        return {
            "choice": 0.2,
            "colour": 1 / 6,
            "count": 0.2,
            "relation": 0.5,
            "word": 1 / 8,
            "compare": 0.5,
            "describe": 0.0,
            "way": 0.25,
            "event": 0.25,
        }.get(self.kind, 0.5)

    def to_json(self) -> dict[str, Any]:
        """The fact as plain JSON values, defaults left out."""
        row = {field.name: getattr(self, field.name) for field in fields(self)}
        row = {name: value for name, value in row.items() if value not in ((), "", None, False)}
        if self.scenes:
            row["scenes"] = [scene.to_json() for scene in self.scenes]
        if self.clip is not None:
            row["clip"] = self.clip.to_json()
        return row

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Fact:
        """The fact of `to_json`."""
        scenes = tuple(Scene.from_json(scene) for scene in row.get("scenes", ()))
        clip = Clip.from_json(row["clip"]) if "clip" in row else None
        return cls(**{**row, "scenes": scenes, "clip": clip, "options": tuple(row.get("options", ()))})
