"""Summed log-probs of all responses of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..batches import IGNORED, PackedRows
from .logps import ResponseLogps, summed, token_logps
from .packed import PackedReader, Places, Way

if TYPE_CHECKING:
    from torch import Tensor


class Told(NamedTuple):
    """The supervised tokens of packed rows, in the order of the rows."""

    predicted_by: Places
    targets: Tensor  # (tokens,)
    responses: int
    """Of the whole batch."""


def told(rows: PackedRows) -> Told:
    """What is supervised in packed rows, by which states it is predicted, and whose it is."""
    where = rows.labels != IGNORED
    row = where.nonzero(as_tuple=True)[0]
    counts = rows.segment_ids.amax(1)  # (rows,)
    first = counts.cumsum(0) - counts
    owners = first[row] + rows.segment_ids[where] - 1
    return Told(Places(row, rows.previous[where], owners), rows.labels[where], int(counts.sum()))


class ResponseScorer(PackedReader):
    """The log-probs of responses, computed inside one forward, where a sharded head is whole."""

    def forward(self, rows: PackedRows, step: Way | None = None) -> ResponseLogps:
        """Sums and counts of the responses of packed rows, in their order; `step`: by another way than its own."""
        said = told(rows)
        states = self.states(step or self.step, rows, said.predicted_by)
        logps = token_logps(states, self.backbone.head.weight, said.targets, self.chunk)
        return summed(logps, said.predicted_by.owners, said.responses)

    def by(self, step: Way, rows: PackedRows) -> ResponseLogps:
        """The same by a way that is named."""
        found: ResponseLogps = self(rows, step)
        return found
