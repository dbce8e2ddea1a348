"""The cells of a sweep: every combination of the axes' values with every seed, each under a name of its own.

A name says what the cell is (`w0.25-k1-seed0`) and depends on nothing else, so it stays when the axes get more values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..fingerprint import of_value
from ..jsonl import dumps

Axes = Mapping[str, Sequence[Any]]
Void = Mapping[str, Mapping[str, Any]]
_LONGEST, _DIGITS = 40, 8
_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True)
class Cell:
    """One training of a sweep: what it overrides, and its seed."""

    group: str
    overrides: Mapping[str, Any]
    seed: int

    @property
    def name(self) -> str:
        """What the cell is called: its group, which all seeds share, and its seed."""
        return f"{self.group}-seed{self.seed}"


def grid(axes: Axes, void: Void, seeds: Sequence[int]) -> tuple[Cell, ...]:
    """All cells, the first seed of every combination before the second.

    An axis is left out where it is `void`: where the other axes have the values that are given there, it says nothing,
    and combinations that differ in nothing else are one cell.

    >>> [cell.name for cell in grid({"beta.w": [0.0, 1.0], "beta.k": [0.5, 2.0]}, {"beta.k": {"beta.w": 0.0}}, [7])]
    ['w0-seed7', 'w1-k0.5-seed7', 'w1-k2-seed7']
    """
    _check(axes, void, seeds)
    names, groups = short_names(axes), dict[str, dict[str, Any]]()
    for values in product(*axes.values()):
        whole = dict(zip(axes, values, strict=True))
        said = {axis: value for axis, value in whole.items() if not _is_void(void.get(axis), whole)}
        group = "-".join(f"{names[axis]}{text_of(value)}" for axis, value in said.items()) or "base"
        if of_value(groups.setdefault(group, said)) != of_value(said):
            raise ValueError(f"axes: expected a name for each cell, got {group!r} for {groups[group]} and {said}")
    return tuple(Cell(group, said, seed) for seed in seeds for group, said in groups.items())


def short_names(axes: Axes) -> dict[str, str]:
    """The last part of each dotted name, or as many of the last as tell it from the others.

    >>> short_names({"model.beta.w": [], "model.loss.w": [], "data.pairs": []})
    {'model.beta.w': 'beta.w', 'model.loss.w': 'loss.w', 'data.pairs': 'pairs'}
    """
    found = {}
    for axis in axes:
        parts = axis.split(".")
        ends = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
        shared = [end for end in ends if sum(f".{other}".endswith(f".{end}") for other in axes) > 1]
        found[axis] = ends[len(shared)] if len(shared) < len(ends) else axis
    return found


def text_of(value: object) -> str:
    """A value as part of a file's name: 1 and 1.0 look alike, and what a name cannot hold has a digest.

    >>> [text_of(value) for value in (0.25, 1.0, -3, 1e-06, True, None, "mmrlhf.modules.betas.ImplicitBeta")]
    ['0.25', '1', '-3', '1e-06', 'true', 'null', 'ImplicitBeta']
    """
    if value is None or isinstance(value, bool):
        return dumps(value)
    if isinstance(value, (int, float)):
        return str(int(value)) if float(value).is_integer() and abs(value) < 1e16 else repr(value)
    if not isinstance(value, str):
        return of_value(value)[:_DIGITS]
    if _CLASS.fullmatch(value):
        value = value.rpartition(".")[2]
    safe = re.sub(r"[^A-Za-z0-9_.+]+", "_", value)
    if safe == value and 0 < len(value) <= _LONGEST and value.strip("."):
        return value
    return f"{safe[:_LONGEST]}_{of_value(value)[:_DIGITS]}"


def option(name: str, value: object) -> str:
    """An override as a word of a command line, in which numbers keep their type.

    >>> option("model.beta.w", 1.0), option("data.frames", None), option("data.needs", ["reward"])
    ('--model.beta.w=1.0', '--data.frames=null', '--data.needs=["reward"]')
    """
    return f"--{name}={value if isinstance(value, str) else dumps(value)}"


def _is_void(where: Mapping[str, Any] | None, whole: Mapping[str, Any]) -> bool:
    return where is not None and all(whole[axis] == value for axis, value in where.items())


def _check(axes: Axes, void: Void, seeds: Sequence[int]) -> None:
    for axis, values in axes.items():
        if not re.fullmatch(r"\w+(\.\w+)*", axis):
            raise ValueError(f"axes: expected dotted names of options, got {axis!r}")
        if not values:
            raise ValueError(f"axes.{axis}: expected one value or more, got none; leave the axis out")
        _require_distinct(f"axes.{axis}", values)
    for axis, where in void.items():
        if unknown := {axis, *where} - set(axes):
            raise ValueError(f"void: expected names of axes, got {min(unknown)!r}; name one of {', '.join(axes)}")
        if not where or axis in where:
            raise ValueError(
                f"void.{axis}: expected values of other axes, got {dict(where)}; say where it says nothing"
            )
    if not seeds:
        raise ValueError("seeds: expected one or more, got none")
    _require_distinct("seeds", seeds)


def _require_distinct(name: str, values: Sequence[Any]) -> None:
    seen: dict[str, Any] = {}
    for value in values:
        text = text_of(value).casefold()  # a folder's name may not know capitals
        if text in seen:
            raise ValueError(f"{name}: expected values that differ, got {seen[text]!r} and {value!r}; keep one")
        seen[text] = value
