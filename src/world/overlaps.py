"""Planted leaks: copies of test questions and pictures, so that contamination checks can be measured.

They lie in a file of their own and are no part of any split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from . import draw
from .media import write_whole
from .plan import Planned, paraphrased
from .scenes import stream


def _cropped(image: Image.Image) -> Image.Image:
    """A twentieth off each side."""
    dx, dy = image.width // 20, image.height // 20
    return image.crop((dx, dy, image.width - dx, image.height - dy))


EDITS: Mapping[str, Callable[[Image.Image], bytes]] = {
    "reencoded": partial(draw.jpeg, quality=40),
    "cropped": lambda image: draw.jpeg(_cropped(image)),
    "flipped": lambda image: draw.jpeg(ImageOps.mirror(image)),
}
"""How a copied picture differs; `exact` is the same bytes, `paraphrased` the same picture with another prompt."""
KINDS = ("exact", *EDITS, "paraphrased")


def plant(media: Path, planned: Sequence[Planned], seed: int) -> list[dict[str, Any]]:
    """Plant a copy of each kind for every fifth one-picture test question; the rows say `kind` and `of`."""
    test = [item for item in planned if item.query.split == "test" and len(item.fact.scenes) == 1]
    return [_planted(media, item, kind, seed) for item in test[::5] or test[:1] for kind in KINDS]


def _planted(media: Path, item: Planned, kind: str, seed: int) -> dict[str, Any]:
    (original,) = item.query.media
    data = (media / original.path).read_bytes()
    path = f"overlaps/{item.query.id}-{kind}{Path(original.path).suffix}"
    query = item.query
    if kind in EDITS:
        path = str(Path(path).with_suffix(".jpg"))
        with Image.open(media / original.path) as image:
            data = EDITS[kind](image.convert("RGB"))
    elif kind == "paraphrased":
        query = paraphrased(item, stream(seed, "paraphrase", query.id))
    write_whole(media / path, data)
    copy = replace(query, id=f"{query.id}-{kind}", media=(replace(original, path=path),), split=None)
    return copy.to_json() | {"kind": kind, "of": item.query.id}
