"""The data module of both trainers: ranked queries from verified shards, in an order that resumes exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import lightning
import torch
from torch.utils.data import DataLoader, Dataset

from ..batches import PackedQueries
from ..fields import at_least
from ..fingerprint import Fingerprint, of_file
from ..folds import Fold
from ..queries import Split
from ..records import PairStrategy
from .admission import Admission, admit
from .collate import Layout, ScoredRow, collate
from .folds import kept
from .manifest import Manifest
from .order import Bucketed, Order
from .reader import Shards
from .reading import Reading, Task
from .rows import Answers, Critiques, CritiqueSource, TooLong
from .scores import DATA, Scale, Scores, fingerprints, reference_of, require_made_from
from .steps import PADDING, EvalBatches, ResumableLoader, StepBatches
from .terms import EveryQuery, Terms

Needed = Literal["reward", "reference_logp", "annotated"]
_KNOWN: dict[str, Any] = {
    "task": Task,
    "layout": Layout,
    "too_long": TooLong,
    "pairs": PairStrategy,
    "critique": CritiqueSource,
    "needs": Needed,
}
_STAGES: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}


def _require_known(**values: str) -> None:
    """Refuse a word that would fail late, or at every sample."""
    for name, value in values.items():
        if value not in get_args(_KNOWN[name]):
            raise ValueError(f"{name}: expected one of {', '.join(get_args(_KNOWN[name]))}, got {value!r}")


def _require_scores(paths: tuple[Path, ...], read: tuple[Scale, ...]) -> None:
    """Refuse a need without a file, and a file of which nobody says what must be in it."""
    if read and not paths:
        raise ValueError(f"scores: expected a file with {' and '.join(read)}, got none; run `mmrlhf score` first")
    if paths and not read:
        raise ValueError("needs: expected reward, reference_logp or both, since scores are given; say what is read")


def _paths(given: Path | tuple[Path, ...] | None) -> tuple[Path, ...]:
    several = given if isinstance(given, (tuple, list)) else () if given is None else (given,)
    return tuple(map(Path, several))


def _require_numbers(max_tokens: int, frames: int | None, bucket: int, workers: int, max_skipped: float) -> None:
    """Refuse a number that would fail late, or at every sample."""
    at_least(1, max_tokens=max_tokens, frames=frames)
    at_least(0, bucket=bucket, workers=workers)
    if not 0 <= max_skipped <= 1:
        raise ValueError(f"max_skipped: expected 0 to 1, got {max_skipped}; 0.01 means one in a hundred")


class ScoredRows(Dataset[ScoredRow]):
    """Admitted samples as rows; the number PADDING gives a row that is not counted."""

    def __init__(
        self, shards: Shards, admission: Admission, encode: Answers | Critiques, terms: Terms | EveryQuery
    ) -> None:
        self.shards, self.admission, self.encode, self.terms = shards, admission, encode, terms

    def __len__(self) -> int:
        return self.admission.n

    def __getitem__(self, number: int) -> ScoredRow:
        counted = number != PADDING
        admitted = self.admission[number if counted else 0]
        row, _ = self.terms.apply(self.encode(self.shards[admitted.sample]))
        now, then = (row.tokens, len(row.places)), (admitted.tokens, len(admitted.scores))
        if now != then:
            raise ValueError(
                f"query {row.ranked.query.id!r}: expected tokens and responses as admitted, {then}, got {now}: the "
                f"processor's code has changed; remove {self.admission.folder}, so that it is decided anew"
            )
        rewards, logps = torch.tensor(admitted.scores).reshape(-1, 2).unbind(1)
        return ScoredRow(row, rewards, logps, counted)

    def __getitems__(self, numbers: list[int]) -> list[ScoredRow]:
        self.shards.expect(self.admission[max(number, 0)].sample for number in numbers)
        return [self[number] for number in numbers]


class RankedDataModule(lightning.LightningDataModule):
    """Ranked queries for the reward model (`critiques`) and for the policy (`answers`).

    Args:
        shards: Folder of a finished set (`mmrlhf pack`).
        processor: The checkpoint whose processor turns text and media into tensors: a folder, or its name on the hub.
        task: Whether the responses are learned, or the critiques of them.
        global_batch: Queries of an optimizer step, over all ranks and accumulated micro-batches.
        micro_batch: Queries that one rank computes at once.
        scores: Files with rewards and reference log-probs per response, of `mmrlhf score` or any tool; they add up.
        needs: What every response must have: a reward or the reference's log-prob in `scores`, or annotated scores.
        pairs: Which comparisons a ranking makes.
        layout: One packed row per query, or a row per response.
        max_tokens: The longest sequence: what stands before a response, and the response.
        too_long: What happens to a longer one: the response is left out, the query is, or the response is cut.
        frames: Frames of a film; default: as many as the processor's own.
        template: The request to judge, by name or path.
        critique: Where critiques are taken from.
        bucket: Batches of similar length are drawn from windows of so many steps; 0: no such windows.
        workers: Processes that load batches; any number gives the same. With 0, every step waits for its batch.
        seed: Decides the order.
        max_skipped: The part of the queries that may be left out, each for a reason that is named.
        cache: Where it is kept which samples are used; default: `admitted` beside the shards.
        resume_inexact: Continue from a checkpoint of other data or settings, with a warning.
        fold: The part of the training queries that is held out, and how many parts there are.
    """

    def __init__(
        self,
        shards: Path,
        processor: str | Path,
        task: Task = "answers",
        global_batch: int = 32,
        micro_batch: int = 1,
        scores: Path | tuple[Path, ...] | None = None,
        needs: tuple[Needed, ...] = (),
        pairs: PairStrategy = "all",
        layout: Layout = "packed",
        max_tokens: int = 4096,
        too_long: TooLong = "drop_responses",
        frames: int | None = None,
        template: str = "critique",
        critique: CritiqueSource = "critique_or_reason",
        bucket: int = 0,
        workers: int = 1,
        seed: int = 0,
        max_skipped: float = 0.01,
        cache: Path | None = None,
        resume_inexact: bool = False,
        fold: Fold | None = None,
    ) -> None:
        super().__init__()
        _require_known(task=task, layout=layout, too_long=too_long, pairs=pairs, critique=critique)
        for need in needs:
            _require_known(needs=need)
        _require_numbers(max_tokens, frames, bucket, workers, max_skipped)
        self.scores = _paths(scores)
        self._read: tuple[Scale, ...] = tuple(need for need in needs if need != "annotated")
        _require_scores(self.scores, self._read)
        self.folder, self.cache = Path(shards), Path(shards) / "admitted" if cache is None else Path(cache)
        self.global_batch, self.micro_batch, self.bucket, self.seed = global_batch, micro_batch, bucket, seed
        self.needs, self.layout, self.workers = tuple(needs), layout, workers
        self.max_skipped, self.resume_inexact, self.fold = max_skipped, resume_inexact, fold
        self.terms = Terms(max_tokens, too_long, pairs, task == "critiques", "annotated" in needs)
        self._reading = Reading(processor, task, frames, template, critique)
        self._rows: dict[Split, ScoredRows] = {}

    def prepare_data(self) -> None:
        """Decide once per machine which samples are used; the other processes find it decided."""
        stage = None if self.trainer is None else self.trainer.state.fn
        self.setup("fit" if stage is None else stage.value)

    def setup(self, stage: str) -> None:
        """Open the admitted samples of a stage; a set without validation queries has none."""
        first, *others = _STAGES[stage]
        present = Manifest.read(self.folder).samples
        for split in (first, *(split for split in others if split in present)):
            self.rows(split)

    def rows(self, split: Split) -> ScoredRows:
        """The admitted rows of a split, by number."""
        if split not in self._rows:
            shards = Shards(self.folder, split)
            chosen = kept(shards, self.fold) if self.fold and split == "train" else None
            require_made_from(self._fingerprints, self._reading.parts() | {f"{DATA}{split}": shards.digest})
            encode = self._reading.encoder()
            scores = Scores(self.scores, self._read) if self.scores else None
            told = [*sorted(map(of_file, self.scores)), *sorted(self._read)]
            made_with = self._reading.digests() | {"scores": told}
            admission = admit(
                shards,
                encode,
                self.terms,
                made_with,
                scores=scores,
                cache=self.cache,
                workers=self.workers,
                max_skipped=self.max_skipped,
                chosen=chosen,
            )
            self._rows[split] = ScoredRows(shards, admission, encode, self.terms)
        return self._rows[split]

    @cached_property
    def _fingerprints(self) -> dict[Path, Fingerprint]:
        return fingerprints(self.scores)

    @property
    def reference_fingerprint(self) -> str | None:
        """What stands for the model whose log-probs are in the scores, as `provenance.model_digest` makes it."""
        return reference_of(self._fingerprints)

    @property
    def reference_dtype(self) -> str | None:
        """The type of the weights with which these log-probs were computed, where that is known."""
        return reference_of(self._fingerprints, "dtype")

    @property
    def processor(self) -> Any:  # noqa: ANN401 - transformers is untyped
        """The checkpoint's own processor."""
        return self._reading.processor

    @property
    def mean_pairs(self) -> float:
        """Pairs per admitted training query: what a step's loss is divided by, so that every pair weighs the same."""
        return self.rows("train").admission.mean_pairs

    @property
    def mean_ties(self) -> float:
        """The same of responses of equal rank."""
        return self.rows("train").admission.mean_ties

    @property
    def mean_critiques(self) -> float:
        """The same of critiques that are learned."""
        return self.rows("train").admission.mean_supervised

    @property
    def mean_scores(self) -> Mapping[str, float]:
        """The same of annotated scores, by dimension."""
        return self.rows("train").admission.mean_scores

    @property
    def steps_per_pass(self) -> float:
        """Optimizer steps in which every training query is seen once."""
        return len(self.rows("train")) / self.global_batch

    def train_dataloader(self) -> ResumableLoader:
        """The endless stream of training batches, from where a checkpoint left it."""
        rows = self.rows("train")
        rank, world = self._place()
        order = Order(len(rows), self.seed)
        window = self.bucket * self.global_batch
        batches = StepBatches(
            Bucketed(order, rows.admission.costs, self.global_batch, window) if window else order,
            global_batch=self.global_batch,
            micro_batch=self.micro_batch,
            data=rows.admission.digest,
            rank=rank,
            world_size=world,
            inexact=self.resume_inexact,
        )
        return ResumableLoader(rows, batches, **self._options())

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Every validation query once, over all ranks."""
        return self._evaluation("val") if "val" in Manifest.read(self.folder).samples else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Every test query once, over all ranks."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Every test query once, over all ranks."""
        return self._evaluation("test")

    def _evaluation(self, split: Split) -> DataLoader[Any]:
        rows = self.rows(split)
        batches = EvalBatches(len(rows), self.micro_batch, *self._place())
        return DataLoader(rows, batch_sampler=batches, **self._options())

    def batch(self, numbers: Iterable[int]) -> PackedQueries:
        """These training queries as a micro-batch."""
        rows, make = self.rows("train"), self._options()["collate_fn"]
        return cast("PackedQueries", make([rows[number] for number in numbers]))

    def _options(self) -> dict[str, Any]:
        make = partial(collate, padding=self._reading.padding, layout=self.layout, pairs=self.terms.pairs)
        return {"collate_fn": make, "num_workers": self.workers, "persistent_workers": self.workers > 0}

    def _place(self) -> tuple[int, int]:
        """Rank and number of ranks."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
