"""Rewards and critiques of all responses of a batch, from one pass: a head on the state at the end of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import linear

from ..records import DIMENSIONS
from .logps import ResponseLogps, summed, token_logps
from .packed import PackedReader, Places, Step, Way, lengths
from .scorer import told

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..batches import PackedRows
    from .attention import Kernel
    from .backbone import Backbone


class Judged(NamedTuple):
    """What a reward model says of every response of a batch."""

    rewards: Tensor  # (responses,)
    dimensions: Tensor  # (responses, dimensions): where 1 to 5 of the annotators is -1 to 1
    critiques: ResponseLogps
    """Of the given critiques; a response without one has no tokens."""


class RewardHead(torch.nn.Module):
    """From a state to a reward, and to a score per dimension: two linear layers with tanh between them.

    It computes in float32 at least, whatever the type of its weights, and whatever autocast says.

    Args:
        width: Of the states.
        dimensions: How many scores there are beside the reward.
        dtype: Of the weights.
        seed: Decides the weights before training, the same on all ranks.
    """

    def __init__(self, width: int, dimensions: int = 0, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(width, width, dtype=dtype, device="cpu")
        self.out = torch.nn.Linear(width, 1 + dimensions, dtype=dtype, device="cpu")
        chance, bound = torch.Generator().manual_seed(seed), width**-0.5
        with torch.no_grad():
            for weight in self.parameters():
                weight.uniform_(-bound, bound, generator=chance)

    @property
    def width(self) -> int:
        """Of the states that it reads."""
        return self.dense.in_features

    @property
    def dimensions(self) -> int:
        """How many scores it gives beside the reward."""
        return self.out.out_features - 1

    def forward(self, states: Tensor) -> Tensor:
        """The reward and the scores of states, (states, 1 + dimensions)."""
        with torch.autocast(states.device.type, enabled=False):
            return _finely(self.out, _finely(self.dense, states).tanh())


def _finely(layer: torch.nn.Linear, states: Tensor) -> Tensor:
    """The layer in float32, or in the states' type where that is finer."""
    number = torch.promote_types(states.dtype, torch.float32)
    return linear(states.to(number), layer.weight.to(number), layer.bias.to(number))


def ends(rows: PackedRows) -> Places:
    """The last token of every response, with its critique where there is one, in the order of the responses.

    Where nothing follows the prefix, that is the prefix's last.
    """
    row, column = [], []
    for number, (prefix, segments) in enumerate(lengths(rows)):
        stop = prefix
        for length in segments:
            stop += length
            row.append(number)
            column.append(stop - 1 if length else prefix - 1)
    device = rows.input_ids.device
    return Places(
        torch.tensor(row, device=device), torch.tensor(column, device=device), torch.arange(len(row), device=device)
    )


class RewardReader(PackedReader):
    """Rewards, and the log-probs of critiques, from one pass over packed rows.

    Args:
        backbone: Whose states and log-probs.
        head: From states to rewards.
        step: `shared_prefix`, `separate`, or `auto`: the former where it is exact.
        chunk: At most so many rows of logits exist at once.
        kernel: How segments look back at a shared prefix.
        rows_at_once: Of separate rows, computed again in the backward pass where there are more; None: all.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: RewardHead,
        step: Step = "auto",
        chunk: int = 512,
        kernel: Kernel = "auto",
        rows_at_once: int | None = None,
    ) -> None:
        super().__init__(backbone, step, chunk, kernel, rows_at_once)
        if head.width != (width := width_of(backbone)):
            raise ValueError(
                f"reward head: expected one for states of width {width}, got one of {head.width}; head and body are of "
                "different checkpoints"
            )
        self.head = head

    def fine(self) -> tuple[torch.nn.Module, ...]:
        """The head."""
        return (self.head,)

    def forward(self, rows: PackedRows, step: Way | None = None) -> Judged:
        """What there is to say of the responses of packed rows, in order; `step`: by another way than its own."""
        said, last = told(rows), ends(rows)
        places = Places(*(torch.cat(both) for both in zip(said.predicted_by, last, strict=True)))
        states, words = self.states(step or self.step, rows, places), len(said.targets)
        logps = token_logps(states[:words], self.backbone.head.weight, said.targets, self.chunk)
        scores = self.head(states[words:])
        return Judged(scores[:, 0], scores[:, 1:], summed(logps, said.predicted_by.owners, said.responses))

    def by(self, step: Way, rows: PackedRows) -> Judged:
        """The same by a way that is named."""
        found: Judged = self(rows, step)
        return found


def width_of(backbone: Backbone) -> int:
    """The width of a backbone's states."""
    return int(backbone.config.get_text_config().hidden_size)


def require_dimensions(names: Sequence[str]) -> None:
    """Refuse dimensions that nobody annotates, and one that is named twice."""
    if any(name not in DIMENSIONS for name in names) or len(set(names)) != len(names):
        raise ValueError(f"dimensions: expected some of {', '.join(DIMENSIONS)}, each once, got {list(names)}")
