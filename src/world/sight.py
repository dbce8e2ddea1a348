"""Teaching the tiny vision tower to see: which shape, word or sign each patch shows.

A real policy starts from a tower that was trained on millions of pictures, and keeps it frozen. This one learns
from the world's truth instead, and is frozen afterwards. From nothing, through the words of answers alone, two
cores would need far more than minutes (see dev/LOG.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import lightning
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import Dataset

from .draw import SEEN, label_map, picture
from .optimiser import adamw
from .scenes import WORDS, draw_scene, stream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .scenes import Scene

ROWS_PER_STEP = 64
LEAST_SHOWN = 0.12
"""A patch shows a thing that covers this share of it; less is nothing."""


class Seen(NamedTuple):
    """Pictures as the processor cuts them, and what their patches show."""

    pixels: Tensor  # (tiles, 3, side, side)
    labels: Tensor  # (tiles, patches)


class SightRows(Dataset["Scene"]):
    """An endless supply of scenes; number n is a pure function of (seed, n)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __getitem__(self, index: int) -> Scene:
        rng = stream(self.seed, "sight", index)
        extra = rng.random()
        if extra < 0.1:
            return draw_scene(rng, sign="hazard" if extra < 0.05 else "notice")
        return draw_scene(rng, word=rng.choice(WORDS)) if extra < 0.2 else draw_scene(rng)


def look(image_processor: Any, patch: int, scenes: Sequence[Scene]) -> Seen:  # noqa: ANN401 - transformers is untyped
    """Cut pictures and label maps the same way: both go through the checkpoint's own image processor."""
    pixels = image_processor([picture(scene) for scene in scenes], return_tensors="pt").pixel_values
    maps = image_processor(
        [label_map(scene).convert("RGB") for scene in scenes],
        return_tensors="pt", resample=0, do_rescale=False, do_normalize=False,
    ).pixel_values  # fmt: skip
    return Seen(pixels.flatten(0, 1), patch_labels(maps.flatten(0, 1)[:, 0].long(), patch))


def patch_labels(maps: Tensor, patch: int) -> Tensor:
    """What most of each patch shows, (tiles, patches), from maps of (tiles, side, side).

    >>> patch_labels(torch.tensor([[[0, 0, 3, 3], [0, 5, 3, 0]]]), patch=2)
    tensor([[5, 3]])
    """
    squares = maps.unfold(1, patch, patch).unfold(2, patch, patch).flatten(3).flatten(1, 2)
    counts = one_hot(squares, len(SEEN)).sum(2)
    counts[..., 0] = 0
    most = counts.max(2)
    return torch.where(most.values >= LEAST_SHOWN * patch * patch, most.indices, 0)


class SightModule(lightning.LightningModule):
    """A vision tower under a linear reading of every patch; the reading is thrown away afterwards."""

    def __init__(self, tower: Any, steps: int, seed: int = 0) -> None:  # noqa: ANN401
        super().__init__()
        self.tower = tower
        self.reading = torch.nn.Linear(tower.config.hidden_size, len(SEEN))
        # Seeded apart: the same seed must give the same weights whatever was drawn before.
        torch.nn.init.normal_(self.reading.weight, std=0.05, generator=torch.Generator().manual_seed(seed))
        torch.nn.init.zeros_(self.reading.bias)
        self.steps = steps

    def training_step(self, batch: Seen, batch_idx: int) -> Tensor:
        """Cross entropy of what each patch shows."""
        read = self.reading(self.tower(batch.pixels).last_hidden_state)
        loss = cross_entropy(read.flatten(0, 1), batch.labels.flatten())
        shown = batch.labels > 0
        self.log_dict({"loss": loss, "seen": (read.argmax(2) == batch.labels)[shown].float().mean()}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own union
        """AdamW, warmed up, then down to zero."""
        return adamw(self, self.steps)
