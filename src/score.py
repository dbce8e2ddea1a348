"""The verb `score`: what a model says of every response, computed once and kept in a file.

A door: rows come from the shards, log-probs and rewards from a model, or from the models of all folds, each asked
about what it never saw. A run writes one file; where scores are read, files add up.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch

from . import jsonl
from .batches import moved
from .datamodules.crossfit import CrossFit, Margins, Told
from .datamodules.manifest import Manifest
from .datamodules.module import ScoredRows
from .datamodules.reading import Reading
from .datamodules.scores import DATA, MODEL, VALUES, Scale
from .datamodules.scoring import (
    Batch,
    LaidOut,
    chosen,
    compute,
    finish,
    is_there,
    loaded,
    otherwise,
    planned,
    readable,
    unfinished,
)
from .datamodules.written import Given, source_of
from .fields import at_least
from .fingerprint import Fingerprint, of_file
from .folds import Trained, family, run_of
from .modules.answering import placed
from .modules.loading import Number
from .modules.opinions import Judge, Opinion, Reference, require_alike, scorable
from .modules.packed import Step, Way
from .modules.rewardmodel import judging_of
from .modules.speaking import Saying
from .provenance import model_digest
from .queries import Split
from .runs import MODEL as IN_RUN
from .settings import alone, claim

if TYPE_CHECKING:
    from .batches import PackedRows
    from .datamodules.reader import Shards

log = logging.getLogger(__name__)
_MARKER = "score.json"
Critique = Literal["given", "none", "generated"]


class _Asked(NamedTuple):
    """Whom a run asks, and what; no weights are read for it."""

    column: Scale
    folder: Path
    reading: Reading
    way: Way
    load: Callable[..., Opinion]
    told: dict[str, str]
    """What the numbers depend on besides the model, its rows and its type."""
    written: int = 0
    """At most so many tokens are written about a response."""


class _How(NamedTuple):
    """How it is computed."""

    batch_tokens: int
    chunk: int
    dtype: Number
    device: torch.device
    workers: int
    padding: int
    check: bool


def score(
    shards: Path,
    out: Path,
    reference: str | None = None,
    reward: str | None = None,
    folds: bool = False,
    critique: Critique | None = None,
    critique_from: Given | Path = "critique_or_reason",
    saying: Saying | None = None,
    splits: list[Split] | None = None,
    frames: int | None = None,
    batch_tokens: int = 16384,
    step: Step = "auto",
    chunk: int = 512,
    dtype: Number = "float32",
    device: str = "auto",
    workers: int = 1,
    cache: Path | None = None,
    max_skipped: float = 0.01,
    self_check: bool = False,
) -> None:
    """Write what a model says of every response of a set of shards: a reference its log-prob, a reward model a reward.

    Run again, it continues where it was stopped, on another device or with other batches if need be; a finished file
    is left as it is. Responses that a training will leave out for their length are scored as well.

    Args:
        shards: Folder of a finished set (`mmrlhf pack`).
        out: File of scores, JSON lines; beside it is written what it was made from.
        reference: The policy as it is before the training: folder of a checkpoint, or its name on the hub.
        reward: A trained reward model instead: folder or name. Its folder says in which words it is asked.
        folds: Whether `reward` is the folder of a `train-reward --folds`, of whose models each query is judged by one
            that never saw it; and beside that by one that did, so that the gap between the two is known.
        critique: What the reward is read behind: a critique of the data, none, or one that the model writes.
        critique_from: Where given critiques are taken from: the data, or the file of another model's critiques
            (`mmrlhf critique`); a response that has none is judged without.
        saying: How the model writes critiques; default: the likeliest words, at most 512 tokens. Of several critiques
            the file holds the mean of the rewards, and the critique whose own is nearest to it.
        splits: Which splits are scored; default: all that there are.
        frames: Frames of a film, as in the training; default: the processor's own, or those of the reward model.
        batch_tokens: At most so many tokens are computed at once, but never less than a query.
        step: Whether the responses of a query share one row with its prompt, or have a row each.
        chunk: At most so many rows of logits exist at once.
        dtype: The type of the weights.
        device: Where the model computes: auto, cpu, cuda or cuda:N.
        workers: Processes that load batches; any number gives the same.
        cache: Where it is kept which queries can be read; default: `admitted` beside the shards.
        max_skipped: The part of the queries that may be left out, each for a reason that is named.
        self_check: Whether the first batch is also scored one response at a time and in another order, and compared.
    """
    at_least(1, batch_tokens=batch_tokens, chunk=chunk, frames=frames)
    at_least(0, workers=workers)
    place, (names, trained) = placed(device), _models(reward, folds, shards)
    asked = [_asked(reference, one, critique, critique_from, saying, frames, step) for one in names]
    how = _How(batch_tokens, chunk, dtype, place, workers, asked[0].reading.padding, self_check)
    sets = chosen(shards, splits)
    made_from, work = _made_from(asked, trained, dtype, sets), out.with_name(f"{out.name}.unfinished")
    if is_there(out, work, made_from):
        return
    ready = [readable(one, asked[0].reading, cache, workers, max_skipped) for one in sets]
    crossed, margins = CrossFit(ready, trained[0].fold.of, trained[0].folds) if trained else None, Margins()
    with alone(work):
        claim(work, _MARKER, made_from.parts, "scores")
        told = _told(asked, crossed, how, ready, work)
        finish(out, made_from, ready, told, margins.add)
        shutil.rmtree(work)
    if crossed:
        log.info("cross-fitted: %s", margins.difference() or "fewer than two queries have pairs, so no gap is known")


def _models(reward: str | None, folds: bool, shards: Path) -> tuple[Sequence[str | None], Sequence[Trained]]:
    """The model of this name; or those of all folds, with what is known of their trainings."""
    if not folds:
        return [reward], []
    if reward is None:
        raise ValueError("folds: expected it beside reward, the folder of `train-reward --folds`; leave it off")
    trained = family(Path(reward), Manifest.read(shards).tables.get("train", "none"))
    return [str(run_of(Path(reward), one.fold.out) / IN_RUN) for one in trained], trained


def _made_from(
    asked: Sequence[_Asked], trained: Sequence[Trained], dtype: Number, sets: Sequence[Shards]
) -> Fingerprint:
    """What the numbers depend on; the models of folds must be those that were trained, and read alike."""
    parts = [one.reading.parts() for one in asked]
    digests = [model_digest(one.folder) for one in asked]  # last, for it reads the weights
    for one, digest, told, part in zip(asked, digests, trained, parts, strict=bool(trained)):
        if digest != told.model or part != parts[0]:
            what = "the model of which fold.json tells" if digest != told.model else "the processor of fold-0"
            raise ValueError(f"{one.folder}: expected {what}, got another; train the folds again")
    models = {f"{MODEL}.{number}": digest for number, digest in enumerate(digests)} if trained else {MODEL: digests[0]}
    folds = {"folds": trained[0].folds} if trained else {}
    data = {f"{DATA}{one.split}": one.digest for one in sets}
    return Fingerprint(
        {VALUES: asked[0].column, **models, **folds, "dtype": dtype, **parts[0], **asked[0].told, **data}
    )


def _told(
    asked: Sequence[_Asked], crossed: CrossFit | None, how: _How, ready: Sequence[ScoredRows], work: Path
) -> Told:
    """What is said of every query by name, computed as far as an earlier run did not."""
    if crossed is None:
        return _answers(asked[0], how, ready, None, work / "journal.jsonl")
    return crossed.joined(
        [
            _answers(one, how, ready, crossed.asked(number), work / f"journal-{number}.jsonl")
            for number, one in enumerate(asked)
        ]
    )


def _answers(
    asked: _Asked, how: _How, ready: Sequence[ScoredRows], numbers: Sequence[Sequence[int]] | None, path: Path
) -> Told:
    """What one model says of the queries about which it is asked; it is loaded if a journal does not hold all of it."""
    with jsonl.Journal(path, "query") as journal:
        batches = planned(ready, how.batch_tokens, asked.way == "separate", asked.written, numbers)
        if left := unfinished(batches, journal.done):
            rows = loaded(LaidOut(left, how.padding), how.workers)
            model = asked.load(asked.folder, asked.way, how.chunk, how.dtype, how.device)
            check = partial(_check, model, how.padding if how.check else None)
            compute(left, rows, journal, asked.column, how.device, partial(model.by, model.reader.step), check)
    return {row["query"]: row for row in jsonl.read(path)}


def _asked(
    reference: str | None,
    reward: str | None,
    critique: Critique | None,
    critique_from: Given | Path,
    saying: Saying | None,
    frames: int | None,
    step: Step,
) -> _Asked:
    """What is asked of a reference, or of a reward model."""
    if critique != "given" and critique_from != "critique_or_reason":
        raise ValueError(f"critique_from: expected it with critique given alone, got it with {critique}; leave it off")
    if reward is not None:
        if reference is not None:
            raise ValueError("reward: expected this or reference, got both; score twice, into two files")
        return _asked_of_judge(reward, critique, critique_from, saying, frames, step)
    if reference is None:
        raise ValueError(
            "reference: expected the checkpoint that is to score, got none; give --reference FOLDER, or --reward FOLDER"
        )
    if critique is not None or saying is not None:
        raise ValueError(
            f"critique: expected none beside reference, which judges nothing, got {critique or saying}; leave it off"
        )
    folder, way = scorable(reference, step)
    return _Asked("reference_logp", folder, Reading(folder, frames=frames), way, Reference, {})


def _asked_of_judge(
    reward: str,
    critique: Critique | None,
    critique_from: Given | Path,
    saying: Saying | None,
    frames: int | None,
    step: Step,
) -> _Asked:
    if critique is None or critique not in get_args(Critique):
        raise ValueError(
            f"critique: expected {', '.join(get_args(Critique))} beside reward, got {critique!r}; say which, for "
            "rewards differ by it"
        )
    if saying is not None and critique != "generated":
        raise ValueError(f"saying: expected it with critique generated alone, got it with {critique}; leave it off")
    folder, way = scorable(reward, step)
    judging = judging_of(folder)
    if frames not in (None, judging.frames):
        raise ValueError(
            f"frames: expected {judging.frames}, with which {folder} was trained, got {frames}; leave it off"
        )
    source, written = source_of(critique == "given", critique_from)
    reading = Reading(
        folder, "critiques", judging.frames, "", source, judging.template, judging.after_critique, written
    )
    if critique != "generated":
        return _Asked("reward", folder, reading, way, Judge, {"critique": of_file(written) if written else source})
    saying = saying or Saying()
    told = {"critique": "generated"} | {f"saying.{name}": str(value) for name, value in asdict(saying).items()}
    most = saying.max_new_tokens * saying.samples
    return _Asked("reward", folder, reading, way, partial(Judge, saying=saying), told, most)


def _check(model: Opinion, padding: int | None, batch: Batch, rows: PackedRows) -> None:
    """Refuse packed rows that are not exact and, where there is a padding for it, whatever changes with the batch."""
    if model.reader.step == "shared_prefix":
        model.require_agreement(rows)
    if padding is not None:
        alone, turned = moved(otherwise(batch, padding), rows.input_ids.device)
        require_alike(model, rows, alone, turned)
