"""Every prompt that is not a user's: a template file and a function, the same in training and at inference.

A template is a text file with names in braces. Its digest is recorded with whatever was made with it, so a
changed word is a changed fingerprint. A path in the config puts another file in its place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from .fingerprint import of_text
from .jsonl import dumps

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Template:
    """A prompt with fields to fill.

    >>> Template("ask", "Q: {question}").fill(question="Is {question} a field?")
    'Q: Is {question} a field?'
    """

    name: str
    text: str

    @cached_property
    def fields(self) -> frozenset[str]:
        """The names in braces."""
        return frozenset(_FIELD.findall(self.text))

    @property
    def digest(self) -> str:
        """The content hash that goes into fingerprints."""
        return of_text(self.text)

    def fill(self, **values: str) -> str:
        """Put the values into their fields, in one pass: braces inside a value stay what they are."""
        if self.fields != values.keys():
            raise ValueError(
                f"template {self.name!r}: expected the fields {sorted(values)}, the file has {sorted(self.fields)}"
            )
        return _FIELD.sub(lambda field: values[field[1]], self.text)


def load_template(name: str | Path) -> Template:
    """A template of this package by its name, or any other by its path."""
    folder = files(__package__).joinpath("templates")
    known = sorted(entry.name.removesuffix(".txt") for entry in folder.iterdir())
    if str(name) in known:
        return Template(str(name), folder.joinpath(f"{name}.txt").read_text("utf-8").rstrip("\n"))
    if not Path(name).is_file():
        raise ValueError(f"template {str(name)!r}: expected one of {', '.join(known)}, or the path of a text file")
    return Template(str(name), Path(name).read_text("utf-8").rstrip("\n"))


def critique_prompt(template: Template, question: str, response: str) -> str:
    """What the reward model is asked: to judge one response; its critique is the answer."""
    return template.fill(question=question, response=response)


def enhance_prompt(template: Template, question: str, response: str, reason: str) -> str:
    """What an enhancer is asked: to write a person's short comment out; the material is quoted as JSON."""
    return template.fill(question=dumps(question), response=dumps(response), reason=dumps(reason))
