"""Which combination is chosen, by what was declared before; written down before the test split is opened.

`selection.json` is never written over. A sweep that has grown since is chosen from again, into `selection-2.json` and
so on, and the record says that the test split had been opened before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import jsonl
from ..settings import write_json
from .design import Design
from .promotion import Candidate, best


def records(folder: Path) -> list[Path]:
    """All selections so far, in their order."""
    found = [folder / "selection.json"]
    while found[-1].exists():
        found.append(folder / f"selection-{len(found) + 1}.json")
    return found[:-1]


def selected(
    design: Design, found: Sequence[Candidate], baselines: Sequence[str], excluded: Mapping[str, str], fraction: float
) -> dict[str, Any]:
    """The record of the selection among these candidates: the one that is there, or a new one.

    It is there if nothing has changed since; the test split is then not opened anew, but what is unfinished goes on.
    """
    # By name: in whatever order cells are asked for, they are the same cells, and of equals the same one is chosen.
    found, baselines = sorted(found, key=lambda each: each.cell), sorted(baselines)
    [choice] = best(found, 1, design.greatest)
    decided = {
        "metric": design.metric,
        "greatest": design.greatest,
        "split": design.split,
        "fraction": fraction,
        "selected": choice.cell,
        "baselines": baselines,
        "candidates": [candidate.to_json() for candidate in found],
        "excluded": dict(excluded),
        "test_split": design.test_split,
    }
    before = records(design.out)
    if before:
        there: dict[str, Any] = jsonl.loads(before[-1].read_bytes())
        if all(there.get(name) == value for name, value in decided.items()):
            return there
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = decided | {"opened": now, "test_opened_before": bool(before)}
    path = design.out / ("selection.json" if not before else f"selection-{len(before) + 1}.json")
    write_json(path, record)
    return record
