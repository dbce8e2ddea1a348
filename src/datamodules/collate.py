"""From rows to a batch: one packed row per query, or a row per response, with pairs, ties and scores beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch.nn.functional import pad

from ..batches import Continuation, PackedQueries, PackedRows, pack
from ..records import DIMENSIONS

if TYPE_CHECKING:
    from torch import Tensor

    from ..records import Pair, PairStrategy, Response
    from .rows import Row

Layout = Literal["packed", "rows"]
FILMS = "pixel_values_videos"


class ScoredRow(NamedTuple):
    """A row with the scores of its responses; one that only fills up a batch is not counted."""

    row: Row
    rewards: Tensor  # (responses,)
    reference_logps: Tensor  # (responses,)
    counted: bool


def collate(rows: Sequence[ScoredRow], *, padding: int, layout: Layout, pairs: PairStrategy) -> PackedQueries:
    """Make a batch of rows; in one that is not counted nothing is supervised, compared, scored or named."""
    rows = [item if item.counted else _filling(item) for item in rows]
    winners: list[Pair] = []
    ties: list[Pair] = []
    start = 0
    for item in rows:
        if item.counted:
            ranked = item.row.ranked
            winners += [_shifted(pair, start) for pair in ranked.pairs(pairs)]
            ties += [_shifted(pair, start) for pair in ranked.ties()]
        start += len(item.row.places)
    return PackedQueries(
        rows=packed([item.row for item in rows], padding) if layout == "packed" else separate(rows, padding),
        pairs=torch.tensor(winners, dtype=torch.long).reshape(-1, 2),
        ties=torch.tensor(ties, dtype=torch.long).reshape(-1, 2),
        responses=torch.tensor([len(item.row.places) for item in rows]),
        rewards=torch.cat([item.rewards for item in rows]),
        reference_logps=torch.cat([item.reference_logps for item in rows]),
        ranks=torch.tensor([rank for item in rows for rank in item.row.ranked.ranks]),
        annotated=torch.tensor([annotated(said) for item in rows for said in item.row.ranked.responses]),
        scores=torch.cat([_by_dimension(item) for item in rows]),
        categories=tuple((item.row.ranked.query.category or "") if item.counted else "" for item in rows),
        ids=tuple(item.row.ranked.query.id if item.counted else "" for item in rows),
    )


def annotated(response: Response) -> float:
    """The mean of what people gave a response, over the dimensions that they scored."""
    given = [score for score in response.scores.values() if score is not None]
    return sum(given) / len(given) if given else math.nan


def _by_dimension(item: ScoredRow) -> Tensor:
    """What people gave every response in every dimension, (responses, dimensions)."""
    said = [response.scores for response in item.row.ranked.responses]
    given = [[scores.get(name) if item.counted else None for name in DIMENSIONS] for scores in said]
    return torch.tensor([[math.nan if score is None else float(score) for score in each] for each in given])


def _filling(item: ScoredRow) -> ScoredRow:
    """The same tokens at the same places, of which none is supervised and no score is known."""
    told = tuple(Continuation(torch.cat(told), told.supervised[:0]) for told in item.row.continuations)
    unknown = torch.full_like(item.rewards, torch.nan)
    return item._replace(row=item.row._replace(continuations=told), rewards=unknown, reference_logps=unknown)


def packed(rows: Sequence[Row], padding: int) -> PackedRows:
    """One row per query: its prefix once, then a segment per response."""
    return _laid_out([(row, row.continuations) for row in rows], padding)


def separate(rows: Sequence[ScoredRow], padding: int) -> PackedRows:
    """One row per response; the prefix and the media are repeated."""
    return _laid_out([(item.row, [told]) for item in rows for told in item.row.continuations], padding)


def _laid_out(rows: Sequence[tuple[Row, Sequence[Continuation]]], padding: int) -> PackedRows:
    return pack(
        [row.prefix for row, _ in rows],
        [told for _, told in rows],
        joined([row.features for row, _ in rows]),
        padding,
        [row.per_token for row, _ in rows],
    )


def joined(features: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The media of all rows behind each other, in the order of their placeholders.

    Families stack the tiles of a picture to the largest number in a call, and tell its real size beside it: so tiles
    of several calls may be filled up. The frames of a film are all looked at, so they must be equally many.
    """
    names = dict.fromkeys(name for row in features for name in row)
    return {name: _stacked(name, [row[name] for row in features if name in row]) for name in names}


def _stacked(name: str, parts: Sequence[Tensor]) -> Tensor:
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) == 1:
        return torch.cat(list(parts))
    if name == FILMS or len({len(shape) for shape in shapes}) > 1:
        raise ValueError(
            f"{name}: expected media that fit into one batch, got the shapes {sorted(map(tuple, shapes))}; "
            "use micro_batch 1"
        )
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    filled = []
    for part in parts:
        missing = [size - have for size, have in zip(largest, part.shape[1:], strict=True)]
        filled.append(pad(part, [amount for size in reversed(missing) for amount in (0, size)]))
    return torch.cat(filled)


def _shifted(pair: Pair, start: int) -> Pair:
    return pair._replace(winner=pair.winner + start, loser=pair.loser + start)
