"""What a frozen vision tower makes of pictures, kept on disk: a training reads it instead of computing it again.

A tower encodes pieces apart from each other: the tiles of a picture, the frames of a film. Kept is what the projector
is made from, so the projector can still be trained. The key of a piece is a digest of its pixels: a picture that comes
twice is kept once, and who looks one up needs nothing but the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from .. import jsonl
from ..fingerprint import Fingerprint, of_file
from .towers import KEY, Tower, raw_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from .backbone import Backbone

Kept = Literal["float32", "bfloat16", "float16"]
STATES, INDEX, LAYOUT = "states.bin", "index.npy", "layout.json"
INDEX_ROW = np.dtype([("key", f"S{KEY}"), ("start", "<i8"), ("rows", "<i4")])
"""A piece in the index, which is sorted by key: where its states begin, in numbers, and how many rows they are."""
_RAW: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<i2"), "float16": np.dtype("<f2")}
_AGAIN = "make them again with `mmrlhf features`, or leave them off"


@dataclass(frozen=True)
class Layout:
    """How states lie in a store."""

    dtype: Kept
    states: tuple[str, ...]
    """Which of the tower's; of each piece they lie one behind the other."""
    width: int
    pieces: int
    numbers: int

    @property
    def size(self) -> int:
        """Of all states, in bytes."""
        return self.numbers * _RAW[self.dtype].itemsize

    def raw(self, states: Tensor) -> memoryview:
        """States as they are kept."""
        kept = states.to(getattr(torch, self.dtype)).cpu()
        if not kept.isfinite().all():
            raise ValueError(f"features: expected finite states, got others as {self.dtype}; give another --dtype")
        return raw_bytes(kept)

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self) | {"states": list(self.states)}

    @classmethod
    def of(cls, row: dict[str, Any]) -> Layout:
        """What `as_dict` told."""
        return cls(**row | {"states": tuple(row["states"])})


class Store:
    """States of pieces by key, from a finished folder, in memory that does not grow with it."""

    def __init__(self, folder: Path) -> None:
        if not (folder / LAYOUT).is_file():
            raise ValueError(f"{folder}: expected features, found no {LAYOUT}; {_AGAIN}")
        told = jsonl.loads((folder / LAYOUT).read_bytes())
        try:
            self.layout, index = Layout.of(told["layout"]), told["index"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / LAYOUT}: expected what lies in it, got {error!r}; {_AGAIN}") from error
        if of_file(folder / INDEX) != index or (folder / STATES).stat().st_size != self.layout.size:
            raise ValueError(f"{folder}: expected {INDEX} and {STATES} as {LAYOUT} tells, got others; {_AGAIN}")
        rows = np.load(folder / INDEX, allow_pickle=False)
        self._keys, self._starts, self._rows = (np.ascontiguousarray(rows[name]) for name in INDEX_ROW.names or ())
        self._numbers = np.memmap(folder / STATES, _RAW[self.layout.dtype], mode="r")

    def find(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        """Where in the index these keys are; -1 where they are not."""
        wanted = np.array(keys, self._keys.dtype)
        places = self._keys.searchsorted(wanted).clip(max=len(self._keys) - 1)
        return np.where(self._keys[places] == wanted, places, -1)

    def __getitem__(self, place: int) -> Tensor:
        """The states of one piece, (names, rows, width)."""
        rows, start, names = int(self._rows[place]), int(self._starts[place]), len(self.layout.states)
        numbers = np.array(self._numbers[start : start + names * rows * self.layout.width])
        kept = torch.from_numpy(numbers).view(getattr(torch, self.layout.dtype))
        return kept.reshape(names, rows, self.layout.width)


def require_frozen(backbone: Backbone, folder: Path) -> None:
    """Refuse to read from a store what a vision tower says that is trained."""
    trained = [name for name, weight in backbone.part("vision") if weight.requires_grad]
    if trained:
        raise ValueError(
            f"features: expected a frozen vision tower, got {len(trained)} parts of it that are trained, and what is "
            f"kept would not follow; set freeze.vision to true, or leave {folder} off"
        )


def use(backbone: Backbone, folder: Path) -> Backbone:
    """Let a backbone read what its vision tower says from a store; the tower itself then never computes."""
    require_frozen(backbone, folder)
    tower = Tower(backbone)
    tower.fingerprint.require(Fingerprint.read(folder / STATES, _AGAIN), str(folder), _AGAIN)
    store = Store(folder)

    def forward(*args: Any, **told: Any) -> Any:  # noqa: ANN401
        like = args[0] if args else told[tower.cut.arguments[0]]
        places = store.find([piece.key for piece in tower.pieces_of(args, told)])
        if missing := int((places < 0).sum()):
            raise ValueError(
                f"{folder}: expected all {len(places)} tiles and frames of a batch, {missing} are missing; make it "
                "again with the shards, splits, frames and processor of the training, or leave it off"
            )
        return tower.cut.output([store[place].to(like) for place in places], store.layout.states)

    tower.module.forward = forward
    backbone.tower_kept = True
    return backbone
