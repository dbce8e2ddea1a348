"""The verb `features`: what a frozen vision tower makes of all pictures, computed once and kept in a folder.

A door: pictures come from the shards, states from a backbone. A training with many epochs, many films or a small
decoder then skips the tower (`--model.backbone.features FOLDER`).
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from . import jsonl
from .batches import moved
from .checkpoints import resolved
from .datamodules.reading import Reading
from .datamodules.scores import DATA
from .datamodules.scoring import chosen, readable
from .fingerprint import of_file
from .modules.features import INDEX, INDEX_ROW, LAYOUT, STATES, Kept, Layout
from .modules.loading import Number, load_backbone
from .modules.towers import Tower
from .progress import track
from .queries import Split
from .settings import alone, claim, write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from .datamodules.module import ScoredRows
    from .modules.towers import Piece

log = logging.getLogger(__name__)
_MARKER, _PLAN = "features.json", "plan.npy"
_PLAN_ROW = np.dtype([*((name, INDEX_ROW[name]) for name in INDEX_ROW.names or ()), ("query", "<i8")])


class _Pictures(Dataset[dict[str, Any]]):
    """The media of queries, as a processor makes them; of a query without any there is nothing."""

    def __init__(self, sets: Sequence[ScoredRows]) -> None:
        self.places = [(rows, number) for rows in sets for number in range(len(rows))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, query: int) -> dict[str, Any]:
        rows, number = self.places[query]
        return rows[number].row.features


class _Plan(NamedTuple):
    """Which pieces are kept, in the order in which they first come."""

    rows: NDArray[Any]
    layout: Layout


def features(
    shards: Path,
    model: str,
    out: Path,
    splits: list[Split] | None = None,
    frames: int | None = None,
    weights: Number = "float32",
    dtype: Kept | None = None,
    batch: int = 32,
    device: str = "auto",
    workers: int = 1,
    cache: Path | None = None,
    max_skipped: float = 0.01,
    dry_run: bool = False,
) -> None:
    """Keep what the frozen vision tower makes of every picture of a set of shards, for trainings to read.

    The size is told before anything is written. A picture that comes twice is kept once. Run again, it continues where
    it was stopped; a finished folder is left as it is. The projector is not in it, and can be trained.

    Args:
        shards: Folder of a finished set (`mmrlhf pack`).
        model: The checkpoint whose tower it is: a folder, or its name on the hub. Others with the same tower read it.
        out: Folder of the states.
        splits: Which splits are read; default: all that there are. A training needs its own and that of validation.
        frames: Frames of a film, the same as in the training; default: as many as the processor's own.
        weights: The type of the weights, the same as in the training.
        dtype: The type in which states are kept; default: that of the weights, with which nothing is lost.
        batch: Tiles and frames that are computed at once.
        device: Where the tower computes: auto, cpu, cuda or cuda:N.
        workers: Processes that load pictures; any number gives the same.
        cache: Where it is kept which queries can be read; default: `admitted` beside the shards.
        max_skipped: The part of the queries that may be left out, each for a reason that is named.
        dry_run: Tell the size and write nothing.
    """
    if batch < 1:
        raise ValueError(f"batch: expected 1 or more, got {batch}")
    reading, kept = Reading(resolved(model), frames=frames), dtype or weights
    tower, sets = _tower(reading.folder, weights, device), chosen(shards, splits)
    made_from = tower.fingerprint
    data = {f"{DATA}{one.split}": one.digest for one in sets}
    settings = {**made_from.parts, "dtype": kept, **reading.parts(), **data}
    work = out.with_name(f"{out.name}.unfinished")
    if _is_there(out, work, settings):
        return
    pictures = _Pictures([readable(one, reading, cache, workers, max_skipped) for one in sets])
    plan = _read(work) or _planned(tower, pictures, kept, workers)
    _require_room(out, work, plan, len(pictures))
    if dry_run:
        return
    with alone(work), torch.inference_mode():
        claim(work, _MARKER, settings, "features")
        _write(work, plan)
        _compute(tower, pictures, plan, work / STATES, batch, workers)
        made_from.write(work / STATES)
        _finish(work, plan)
        work.rename(out)
    (out / _PLAN).unlink()  # only who continues needs it


def _is_there(out: Path, work: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the folder is finished; one that was made otherwise, or by somebody else, is kept."""
    if (work / _MARKER).exists():
        claim(work, _MARKER, settings, "features")
    if not (out / _MARKER).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out}: expected nothing there, found a file or a folder; give another --out")
        return False
    claim(out, _MARKER, settings, "features")
    log.info("%s: the features are there already", out)
    return True


def _tower(folder: Path, weights: Number, device: str) -> Tower:
    backbone = load_backbone(str(folder), dtype=weights).eval()
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        backbone.to(name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {device!r} ({reason})") from error
    return Tower(backbone)


def _loaded(pictures: _Pictures, queries: Sequence[int], workers: int, what: str) -> Iterator[tuple[int, Any]]:
    """The media of these queries, with their numbers."""
    apart = "spawn" if workers else None  # forked ones would outlive a kill, and hold on to the locks of this process
    loader = DataLoader(pictures, batch_size=None, sampler=queries, num_workers=workers, multiprocessing_context=apart)
    yield from zip(queries, track(loader, what, total=len(queries)), strict=True)


@torch.inference_mode()
def _planned(tower: Tower, pictures: _Pictures, kept: Kept, workers: int) -> _Plan:
    """Look at all pictures, and compute one of each shape."""
    sizes: dict[Any, tuple[int, ...]] = {}
    seen: set[bytes] = set()
    rows, start = [], 0
    device = next(tower.module.parameters()).device
    for query, told in _loaded(pictures, range(len(pictures)), workers, "looking at pictures"):
        if not tower.names:
            tower.learn(moved(told, device))
        for piece in tower.pieces(told):
            if piece.key in seen:
                continue
            seen.add(piece.key)
            if piece.shapes not in sizes:
                sizes[piece.shapes] = tuple(tower.states([piece])[0].shape)
            rows.append((piece.key, start, sizes[piece.shapes][1], query))
            start += math.prod(sizes[piece.shapes])
    if not rows:
        raise ValueError("features: expected queries with pictures, found none; there is nothing to be kept")
    width = {size[-1] for size in sizes.values()}
    assert len(width) == 1, width
    return _Plan(np.array(rows, _PLAN_ROW), Layout(kept, tower.names, width.pop(), len(rows), start))


def _require_room(out: Path, work: Path, plan: _Plan, queries: int) -> None:
    """Tell the size; a disk that has not that much room is refused."""
    states = work / STATES
    size, there = plan.layout.size + plan.rows.nbytes, states.stat().st_size if states.exists() else 0
    log.info(
        "%s: %s distinct tiles and frames of %s queries x %s bytes on average (%s) = %.3f GiB",
        out,
        f"{plan.layout.pieces:,}",
        f"{queries:,}",
        f"{plan.layout.size // plan.layout.pieces:,}",
        plan.layout.dtype,
        size / 2**30,
    )
    disk = next(folder for folder in out.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(disk).free + there) < size:
        raise ValueError(
            f"{out}: expected room for {size / 2**30:,.3f} GiB, {disk} has {free / 2**30:,.3f} GiB; give an --out on "
            "another disk, fewer --splits or --dtype bfloat16"
        )


def _write(work: Path, plan: _Plan) -> None:
    """Keep the plan for who continues; the layout comes last."""
    with jsonl.replacing(work / _PLAN) as file:
        np.save(file, plan.rows, allow_pickle=False)
    write_json(work / LAYOUT, {"layout": plan.layout.as_dict()})


def _read(work: Path) -> _Plan | None:
    if not (work / LAYOUT).exists():
        return None
    layout = Layout.of(jsonl.loads((work / LAYOUT).read_bytes())["layout"])
    return _Plan(np.load(work / _PLAN, allow_pickle=False), layout)


def _compute(tower: Tower, pictures: _Pictures, plan: _Plan, path: Path, batch: int, workers: int) -> None:
    """Append the states of all pieces that are not there yet, batch by batch."""
    tower.names, starts = plan.layout.states, [*plan.rows["start"].tolist(), plan.layout.numbers]
    item = plan.layout.size // plan.layout.numbers
    with path.open("ab") as file:
        whole = int(np.searchsorted(starts, file.tell() // item, side="right")) - 1
        # Cut where a batch begins: the same pieces are then computed at once as without a kill, to the same bits.
        done = whole if whole == plan.layout.pieces else whole - whole % batch
        file.truncate(starts[done] * item)
        queries = np.unique(plan.rows["query"][done:]).tolist()
        missing = _missing(tower, _loaded(pictures, queries, workers, "computing features"), plan, done)
        for pieces in _batched(missing, batch):
            for states in _states(tower, pieces):
                file.write(plan.layout.raw(states))
            file.flush()
            os.fsync(file.fileno())
        assert file.seek(0, os.SEEK_END) == plan.layout.size, (file.tell(), plan.layout)


def _missing(tower: Tower, loaded: Iterable[tuple[int, Any]], plan: _Plan, done: int) -> Iterator[Piece]:
    """The pieces from this place of the plan on, in its order."""
    for query, told in loaded:
        for piece in tower.pieces(told):
            if done < plan.layout.pieces and piece.key == plan.rows["key"][done].ljust(len(piece.key), b"\0"):
                done += 1
                yield piece
        if done < plan.layout.pieces and plan.rows["query"][done] <= query:
            raise ValueError(f"query {query}: its pictures are not those of before; remove the unfinished folder")


def _batched(pieces: Iterable[Piece], most: int) -> Iterator[list[Piece]]:
    some: list[Piece] = []
    for piece in pieces:
        some.append(piece)
        if len(some) == most:
            yield some
            some = []
    if some:
        yield some


def _states(tower: Tower, pieces: Sequence[Piece]) -> list[Tensor]:
    try:
        return tower.states(pieces)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"batch: no memory for {len(pieces)} tiles at once; run again with fewer") from error


def _finish(work: Path, plan: _Plan) -> None:
    """Write the index, by key."""
    index = np.sort(plan.rows[list(INDEX_ROW.names or ())].astype(INDEX_ROW), order="key")
    with jsonl.replacing(work / INDEX) as file:
        np.save(file, index, allow_pickle=False)
    write_json(work / LAYOUT, {"layout": plan.layout.as_dict(), "index": of_file(work / INDEX)})
