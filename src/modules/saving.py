"""A trained backbone as a folder that plain transformers loads, with a card that says what it is."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..settings import write_json
from .loading import Number

if TYPE_CHECKING:
    from .backbone import Backbone

ADAPTER = "adapter"
"""The folder of PEFT adapters inside a saved checkpoint whose weights hold them merged."""
MADE_FROM = "export.json"
"""The file in a saved checkpoint that tells what it was made from, where that is told."""


@dataclass(frozen=True)
class Form:
    """How a model is written.

    Args:
        merge: Adapters are merged into the weights, and kept apart as well; otherwise they alone are written.
        dtype: The type of the weights; None: the one that they have.
        made_from: What whoever would write the same again compares.
    """

    merge: bool = True
    dtype: Number | None = None
    made_from: Mapping[str, Any] | None = None


def save_folder(
    backbone: Backbone,
    processor: Any,  # noqa: ANN401
    folder: Path,
    card: str,
    form: Form = Form(),
    fine: Sequence[torch.nn.Module] = (),
) -> None:
    """Write weights, processor and card, whole or not at all; adapters are kept apart, and merged into the weights.

    The backbone has no adapters afterwards, unless they alone are written. `fine`: parts of the model that keep the
    type of their weights.
    """
    draft = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    if hasattr(backbone.model, "merge_and_unload"):
        # None of them is of the embeddings, for which peft would look at the base, perhaps on the hub.
        backbone.model.save_pretrained(draft / ADAPTER if form.merge else draft, save_embedding_layers=False)
    if form.merge:
        _merge(backbone, form.dtype, fine)
        backbone.model.save_pretrained(draft)
    processor.save_pretrained(draft)
    (draft / "README.md").write_text(card, encoding="utf-8")
    if form.made_from is not None:
        write_json(draft / MADE_FROM, form.made_from)
    if folder.exists():
        raise ValueError(f"{folder}: expected nothing there, found a file or a folder; remove it or give another --out")
    draft.replace(folder)


def _merge(backbone: Backbone, dtype: Number | None, fine: Sequence[torch.nn.Module]) -> None:
    """Merge adapters, where there are any, and give the weights a type: a finer one before, a coarser one after."""
    if dtype == "float32":
        _give(backbone, torch.float32, fine)
    if hasattr(backbone.model, "merge_and_unload"):
        backbone.model = backbone.model.merge_and_unload()
    if dtype is not None:
        _give(backbone, getattr(torch, dtype), fine)


def _give(backbone: Backbone, dtype: torch.dtype, fine: Sequence[torch.nn.Module]) -> None:
    apart = {id(weight) for part in fine for weight in part.parameters()}
    for weight in backbone.model.parameters():
        if id(weight) not in apart:
            weight.data = weight.data.to(dtype)


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
