"""A trained backbone as a folder that plain transformers loads, with a card that says what it is."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import Backbone

ADAPTER = "adapter"
"""The folder of PEFT adapters inside a saved checkpoint whose weights hold them merged."""


def save_folder(backbone: Backbone, processor: Any, folder: Path, card: str) -> None:  # noqa: ANN401
    """Write weights, processor and card, whole or not at all; adapters are kept apart, and merged into the weights.

    The backbone has no adapters afterwards.
    """
    draft = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    model = backbone.model
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(draft / ADAPTER)
        model = backbone.model = model.merge_and_unload()
    model.save_pretrained(draft)
    processor.save_pretrained(draft)
    (draft / "README.md").write_text(card, encoding="utf-8")
    if folder.exists():
        raise ValueError(f"{folder}: expected nothing there, found a file or a folder; remove it or give another --out")
    draft.replace(folder)


def model_card(title: str, told: Mapping[str, Mapping[str, object]]) -> str:
    """A card in Markdown: a table per part of what is told.

    >>> print(model_card("A policy", {"beta": {"w": 0.5, "k": 0.5}}))
    # A policy
    <BLANKLINE>
    ## beta
    <BLANKLINE>
    | | |
    |---|---|
    | w | 0.5 |
    | k | 0.5 |
    <BLANKLINE>
    """
    lines = [f"# {title}", ""]
    for part, values in told.items():
        lines += [f"## {part}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
