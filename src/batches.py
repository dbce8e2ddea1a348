"""What data modules hand to models: NamedTuples of tensors, and the packing that makes them.

One row holds a prefix (chat template, media, and what all continuations share) and any number of segments after
it. A segment sees the prefix and itself, and its positions go on from the prefix's end: each (prefix, segment)
is computed exactly as if it stood alone, and the prefix is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")
IGNORED = -100
"""The label of a token that is not supervised, as torch's cross entropy has it."""
PREFIX, PADDING = 0, -1
"""Segment numbers with a meaning; continuations count from 1."""


class Continuation(NamedTuple):
    """One segment of a row: `given` is context, `supervised` is what the model learns to say."""

    given: Tensor  # (tokens,)
    supervised: Tensor  # (tokens,)


class PackedRows(NamedTuple):
    """Rows of one prefix and its segments, padded to the longest on the right."""

    input_ids: Tensor  # (rows, tokens)
    position_ids: Tensor  # (rows, tokens): restarted after the prefix for every segment
    segment_ids: Tensor  # (rows, tokens): PREFIX, 1, 2, ..., PADDING
    labels: Tensor  # (rows, tokens): the token itself where supervised, else IGNORED
    previous: Tensor  # (rows, tokens): the column whose state predicts this token; 0 where none does, and for padding
    features: dict[str, Tensor]  # pixels and their shapes, as the processor names them
    per_token: dict[str, Tensor]  # (rows, tokens): what a family tells of every token, such as its type


class PackedQueries(NamedTuple):
    """Ranked queries with what is known of every response; the responses of a query are consecutive.

    `rows` holds a query in one row with a segment per response, or a row per response, each with one segment: the
    responses have the same order in both.
    """

    rows: PackedRows
    pairs: Tensor  # (pairs, 2): indices into the batch's responses, the winner first
    ties: Tensor  # (ties, 2): indices of two responses of equal rank
    responses: Tensor  # (queries,): how many responses each query has
    rewards: Tensor  # (responses,): not a number where there is none
    reference_logps: Tensor  # (responses,): summed over the supervised tokens; not a number where there is none
    ranks: Tensor  # (responses,): as annotated, without gaps, 1 for the best
    annotated: Tensor  # (responses,): the mean of the annotated scores, 1 to 5; not a number where there is none
    scores: Tensor  # (responses, 3): the annotated scores in the order of DIMENSIONS; not a number where there is none
    categories: tuple[str, ...]  # (queries,): empty where there is none
    ids: tuple[str, ...]  # (queries,): empty for a row that only fills up an evaluation batch, in which nothing counts


def pack(
    prefixes: Sequence[Tensor],
    continuations: Sequence[Sequence[Continuation]],
    features: Mapping[str, Tensor],
    pad: int,
    per_token: Sequence[Mapping[str, Tensor]] = (),
) -> PackedRows:
    """Lay prefixes and their continuations out as rows.

    `per_token` is what is told of the tokens of each prefix; of the others, which are text, it is 0.

    The first token of every segment is predicted by the prefix's last, which need not be the column before it.

    >>> row = pack([torch.tensor([5, 6])], [[Continuation(torch.tensor([7]), torch.tensor([8]))] * 2], {}, pad=0)
    >>> row.input_ids.tolist(), row.position_ids.tolist(), row.segment_ids.tolist()
    ([[5, 6, 7, 8, 7, 8]], [[0, 1, 2, 3, 2, 3]], [[0, 0, 1, 1, 2, 2]])
    >>> row.labels.tolist()
    [[-100, -100, -100, 8, -100, 8]]
    >>> row.previous.tolist()
    [[0, 0, 1, 2, 1, 4]]
    """
    if len(prefixes) != len(continuations):
        raise ValueError(f"pack: {len(prefixes)} prefixes for {len(continuations)} rows of continuations")
    columns = [_row(prefix, segments) for prefix, segments in zip(prefixes, continuations, strict=True)]
    fills = (pad, 0, PADDING, IGNORED, 0)
    stacked = [
        torch.nn.utils.rnn.pad_sequence([row[kind] for row in columns], batch_first=True, padding_value=fill)
        for kind, fill in enumerate(fills)
    ]
    ids, positions, numbers, labels, previous = stacked
    told = _told_of_all(per_token, ids)
    return PackedRows(ids, positions, numbers, labels, previous, dict(features), told)


def _told_of_all(per_token: Sequence[Mapping[str, Tensor]], ids: Tensor) -> dict[str, Tensor]:
    """What is told of the prefixes' tokens, with 0 for those behind them."""
    told: dict[str, Tensor] = {}
    for row, of_prefix in enumerate(per_token):
        for name, value in of_prefix.items():
            told.setdefault(name, torch.zeros(ids.shape, dtype=value.dtype))[row, : len(value)] = value
    return told


def _row(prefix: Tensor, segments: Sequence[Continuation]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ids, positions, segment numbers, labels and previous columns of one row."""
    start, ids = len(prefix), [prefix]
    positions, numbers = [torch.arange(start)], [torch.full((start,), PREFIX)]
    labels = [torch.full((start,), IGNORED)]
    previous, at = [_columns_before(0, start, first=0)], start
    for number, segment in enumerate(segments, start=1):
        length = len(segment.given) + len(segment.supervised)
        if not start and not len(segment.given) and len(segment.supervised):
            raise ValueError(
                f"pack: expected something before the supervised tokens of continuation {number}, got an empty prefix "
                "and nothing given, so no state predicts its first token; put at least one token into either"
            )
        ids += [segment.given, segment.supervised]
        positions.append(torch.arange(start, start + length))
        numbers.append(torch.full((length,), number))
        labels += [torch.full_like(segment.given, IGNORED), segment.supervised]
        previous.append(_columns_before(at, length, first=max(start - 1, 0)))
        at += length
    return torch.cat(ids), torch.cat(positions), torch.cat(numbers), torch.cat(labels), torch.cat(previous)


def _columns_before(start: int, length: int, first: int) -> Tensor:
    """The column before each of `length` columns from `start` on, but `first` for the first of them.

    >>> _columns_before(7, 3, first=2)
    tensor([2, 7, 8])
    """
    columns = torch.arange(start - 1, start + length - 1)
    columns[:1] = first
    return columns


def visible(segment_ids: Tensor) -> Tensor:
    """Which token may look at which, (rows, 1, tokens, tokens): back to the prefix and to its own segment.

    Padding looks at itself alone, so that no softmax runs over nothing.

    >>> visible(torch.tensor([[0, 1, 2]]))[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    tokens = segment_ids.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=segment_ids.device).tril()
    allowed = causal & ((query == key) | (key == PREFIX)) & (key != PADDING) & (query != PADDING)
    return (allowed | torch.eye(tokens, dtype=torch.bool, device=segment_ids.device))[:, None]


def moved(value: T, device: torch.device | str) -> T:
    """The same on a device, whatever holds the tensors: a named tuple, a list, a dict; nothing else is touched.

    >>> moved(Continuation(torch.ones(1), torch.ones(0)), "meta").given.device.type
    'meta'
    """
    found: Any = value
    if isinstance(value, torch.Tensor):
        found = value.to(device)
    elif isinstance(value, dict):
        found = {name: moved(part, device) for name, part in value.items()}
    elif isinstance(value, (tuple, list)):
        parts = [moved(part, device) for part in value]
        found = type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return cast("T", found)
