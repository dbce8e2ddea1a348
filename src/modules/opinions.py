"""What a model says of every response of a batch, as files of scores hold it: log-probs, or rewards."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from ..checkpoints import resolved
from ..text import mend
from .critic import as_scorer
from .families import family_of, why_not_shared
from .loading import Number, load_backbone
from .rewardmodel import RewardModel
from .scorer import ResponseScorer
from .selfcheck import COARSE, FINE, require_agreement
from .speaking import Saying, agreed, spoken

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from ..batches import PackedRows
    from .packed import PackedReader, Step, Way

log = logging.getLogger(__name__)


class Written(NamedTuple):
    """A critique by the model; of several, the one that is told."""

    text: str
    tokens: int
    """Of all of them."""
    cut: int
    """How many of them had to end before they said so."""


class Said(NamedTuple):
    """What is said of the responses of a batch, in their order."""

    values: Tensor  # (responses,)
    even: Tensor  # (responses,): the values on a scale on which rounding moves large and small ones alike
    written: tuple[Written, ...] = ()
    """The critique of each response, where the model wrote them."""


class Opinion(Protocol):
    """A model that is asked."""

    @property
    def reader(self) -> PackedReader:
        """How it reads packed rows."""

    def by(self, way: Way, rows: PackedRows) -> Said:
        """What it says, computed by a way that is named."""

    def require_agreement(self, rows: PackedRows) -> None:
        """Refuse to share prefixes where that is not exact."""


class Reference:
    """A policy before its training says how probable it finds every response.

    Args:
        folder: Of its checkpoint.
        way: How rows are computed.
        chunk: At most so many rows of logits exist at once.
        dtype: Of the weights.
        device: Where it computes.
    """

    def __init__(self, folder: Path, way: Way, chunk: int, dtype: Number, device: torch.device) -> None:
        self.reader = ResponseScorer(load_backbone(str(folder), dtype=dtype), way, chunk).eval().to(device)

    def by(self, way: Way, rows: PackedRows) -> Said:
        """The summed log-prob of every response."""
        found = self.reader.by(way, rows)
        return Said(found.sums, found.sums / found.tokens.clamp(min=1).sqrt())

    def require_agreement(self, rows: PackedRows) -> None:
        """Refuse to share prefixes where that is not exact."""
        require_agreement(self.reader, rows)


class Judge:
    """A reward model says how good it finds every response.

    Args:
        folder: Of its checkpoint.
        way: How rows are computed.
        chunk: At most so many rows of logits exist at once.
        dtype: Of the weights.
        device: Where it computes.
        saying: How it writes the critiques behind which rewards are read; None: those that the rows hold, or none.
    """

    def __init__(
        self,
        folder: Path,
        way: Way,
        chunk: int,
        dtype: Number,
        device: torch.device,
        saying: Saying | None = None,
    ) -> None:
        self.model = RewardModel.from_pretrained(folder, dtype=dtype, device=device, step=way, chunk=chunk)
        self.reader, self.saying = self.model.reader, saying

    def by(self, way: Way, rows: PackedRows) -> Said:
        """The reward of every response; of several critiques, the mean."""
        if self.saying is not None:
            return self._behind_its_own(self.saying, way, rows)
        rewards = self.reader.by(way, rows).rewards
        return Said(rewards, rewards.asinh())  # asinh: as the check of packed rows has it

    def _behind_its_own(self, saying: Saying, way: Way, rows: PackedRows) -> Said:
        own, self.reader.step = self.reader.step, way
        try:
            tokenizer, after = self.model.processor.tokenizer, self.model.judging.after_critique
            found = spoken(self.reader, tokenizer, rows, saying, after)
        finally:
            self.reader.step = own
        told = [agreed(each) for each in found]
        rewards = torch.tensor([one.reward for one in told], dtype=torch.float64)
        written = (
            Written(mend(one.text).text, sum(other.generated for other in each), sum(other.cut for other in each))
            for one, each in zip(told, found, strict=True)
        )
        return Said(rewards, rewards.asinh(), tuple(written))

    def require_agreement(self, rows: PackedRows) -> None:
        """Refuse to share prefixes where that is not exact."""
        require_agreement(as_scorer(self.reader), rows)


def require_alike(opinion: Opinion, rows: PackedRows, alone: Sequence[PackedRows], turned: PackedRows) -> None:
    """Refuse a model that says something else of a response by itself, or in the opposite order of all of them.

    Each response by itself is an ordinary row, without any of the packing. Where weights are coarse, two words may
    be as likely but for rounding: a critique that becomes another by that is told, and its reward not compared.
    """
    fine = next(opinion.reader.parameters()).dtype == torch.float32
    together, back = opinion.by(opinion.reader.step, rows), opinion.by(opinion.reader.step, turned)
    single = [opinion.by("separate", one) for one in alone]
    others = {
        "one at a time": (torch.cat([one.even for one in single]), [each for one in single for each in one.written]),
        "in the opposite order": (back.even.flip(0), list(back.written[::-1])),
    }
    allowed = FINE if fine else COARSE
    for how, (even, written) in others.items():
        changed = [one.text != other.text for one, other in zip(together.written, written, strict=True)]
        compared = torch.tensor([not one for one in changed] or [True] * len(even), device=even.device)
        apart = (together.even - even).abs()[compared].tolist()
        told = f"self-check: {len(even)} responses {how} differ by at most {max(apart, default=0):.1e}"
        told += f" (allowed {allowed:.0e}), and {sum(changed)} critiques"
        if not all(one <= allowed for one in apart) or (fine and any(changed)):  # not a number is no agreement
            raise ValueError(f"{told}; what else is in a batch must not matter: try --step separate, or float32")
        log.info("%s", told)


def scorable(name: str, step: Step) -> tuple[Path, Way]:
    """The folder of a checkpoint of a known family, and the step that `step` means for it; no weights are read."""
    from transformers import AutoConfig

    folder = resolved(name)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    reason, family = why_not_shared(config), family_of(config).name
    if step == "shared_prefix" and reason:
        raise ValueError(f"step: {family} cannot share a prefix: {reason}; say separate, or auto")
    return folder, "separate" if reason or step == "separate" else "shared_prefix"
