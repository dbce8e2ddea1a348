"""The verb `score`: what a model says of every response, computed once and kept in a file.

A door: rows come from the shards, log-probs and rewards from a model. A run asks one model and writes one file; where
scores are read, files add up.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from lightning.fabric.utilities import move_data_to_device

from . import jsonl
from .datamodules.module import ScoredRows
from .datamodules.reading import Reading
from .datamodules.scores import DATA, MODEL, VALUES, Scale
from .datamodules.scoring import (
    Batch,
    LaidOut,
    chosen,
    in_memory,
    left_out,
    loaded,
    otherwise,
    planned,
    readable,
    scored,
    unfinished,
)
from .fingerprint import Fingerprint
from .ledger import Ledger
from .modules.loading import Number
from .modules.opinions import Judge, Opinion, Reference, judging_of, require_alike, scorable
from .modules.packed import Step, Way
from .modules.speaking import Saying
from .progress import bar
from .provenance import model_digest
from .queries import Split
from .settings import alone, claim

if TYPE_CHECKING:
    from .batches import PackedRows
    from .datamodules.reader import Shards

log = logging.getLogger(__name__)
_MARKER, _JOURNAL = "score.json", "journal.jsonl"
_WORDS: dict[Scale, str] = {"reference_logp": "log-probs", "reward": "rewards"}
Critique = Literal["given", "none", "generated"]
Given = Literal["critique_or_reason", "critique", "reason"]


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


def score(
    shards: Path,
    out: Path,
    reference: str | None = None,
    reward: str | None = None,
    critique: Critique | None = None,
    critique_from: Given = "critique_or_reason",
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
        critique: What the reward is read behind: a critique of the data, none, or one that the model writes.
        critique_from: Where given critiques are taken from; a response that has none is judged without.
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
    _require_numbers(batch_tokens, chunk, frames, workers)
    place, asked = _device(device), _asked(reference, reward, critique, critique_from, saying, frames, step)
    padding, sets = asked.reading.padding, chosen(shards, splits)
    made_from, work = _made_from(asked, dtype, sets), out.with_name(f"{out.name}.unfinished")
    if _is_there(out, work, made_from):
        return
    ready = [readable(one, asked.reading, cache, workers, max_skipped) for one in sets]
    with alone(work):
        claim(work, _MARKER, made_from.parts, "scores")
        with jsonl.Journal(work / _JOURNAL, "query") as journal:
            left = unfinished(planned(ready, batch_tokens, asked.way == "separate", asked.written), journal.done)
            if left:
                rows = loaded(LaidOut(left, padding), workers)
                model = asked.load(asked.folder, asked.way, chunk, dtype, place)
                _compute(model, asked.column, left, rows, journal, padding if self_check else None)
        _finish(out, work, made_from, asked.column, ready)
        shutil.rmtree(work)


def _made_from(asked: _Asked, dtype: Number, sets: Sequence[Shards]) -> Fingerprint:
    model = {VALUES: asked.column, MODEL: model_digest(asked.folder), "dtype": dtype}
    data = {f"{DATA}{one.split}": one.digest for one in sets}
    return Fingerprint(model | asked.reading.parts() | asked.told | data)


def _require_numbers(batch_tokens: int, chunk: int, frames: int | None, workers: int) -> None:
    least = {"batch_tokens": (batch_tokens, 1), "chunk": (chunk, 1), "frames": (frames, 1), "workers": (workers, 0)}
    for name, (value, smallest) in least.items():
        if value is not None and value < smallest:
            raise ValueError(f"{name}: expected {smallest} or more, got {value}")


def _device(name: str) -> torch.device:
    """The device of this name, if it is here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r} ({reason})") from error


def _asked(
    reference: str | None,
    reward: str | None,
    critique: Critique | None,
    critique_from: Given,
    saying: Saying | None,
    frames: int | None,
    step: Step,
) -> _Asked:
    """What is asked of a reference, or of a reward model."""
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
    reward: str, critique: Critique | None, critique_from: Given, saying: Saying | None, frames: int | None, step: Step
) -> _Asked:
    if critique not in get_args(Critique) or critique_from not in get_args(Given):
        raise ValueError(
            f"critique: expected {', '.join(get_args(Critique))} beside reward, from {', '.join(get_args(Given))}; "
            f"got {critique!r} from {critique_from!r}; say which, for rewards differ by it"
        )
    if saying is not None and critique != "generated":
        raise ValueError(f"saying: expected it with critique generated alone, got it with {critique}; leave it off")
    folder, way = scorable(reward, step)
    judging = judging_of(folder)
    if frames not in (None, judging.frames):
        raise ValueError(
            f"frames: expected {judging.frames}, with which {folder} was trained, got {frames}; leave it off"
        )
    if judging.after_critique:
        raise ValueError(
            f"reward: {folder} reads its rewards behind {judging.after_critique!r}, which follows a critique, and rows "
            "of shards end before it; ask it by RewardModel.score, with critiques that are given"
        )
    source = critique_from if critique == "given" else "none"
    reading = Reading(folder, "critiques", judging.frames, critique=source, request=judging.template)
    if critique != "generated":
        return _Asked("reward", folder, reading, way, Judge, {"critique": source})
    saying = saying or Saying()
    told = {"critique": "generated"} | {f"saying.{name}": str(value) for name, value in asdict(saying).items()}
    most = saying.max_new_tokens * saying.samples
    return _Asked("reward", folder, reading, way, partial(Judge, saying=saying), told, most)


def _is_there(out: Path, work: Path, made_from: Fingerprint) -> bool:
    """Whether the file is finished; one that was made from something else, or by somebody else, is kept."""
    if not out.exists():
        return False
    cure = "give another --out, or remove it"
    made_from.require(Fingerprint.read(out, cure), str(out), cure)
    log.info("%s: the scores are there already", out)
    if work.exists():  # a kill came between the last two things that are done
        shutil.rmtree(work)
    return True


def _compute(
    model: Opinion,
    column: Scale,
    left: Sequence[Batch],
    read: Iterator[PackedRows],
    journal: jsonl.Journal,
    check: int | None,
) -> None:
    """Write what the model says of all batches into the journal, query by query; `check` is the padding for that."""
    device, first, began = next(model.reader.parameters()).device, True, time.monotonic()
    tokens = sum(batch.tokens for batch in left)
    with bar() as progress, torch.inference_mode():
        task = progress.add_task("scoring tokens", total=tokens)
        for batch, laid_out in zip(left, read, strict=True):
            with in_memory(batch):
                rows = move_data_to_device(laid_out, device)
                if first:
                    _check(model, batch, rows, check)
                first, said = False, _said(model, column, batch, rows)
            for name, row in zip(batch.names, said, strict=True):
                if name not in journal.done:
                    journal.append({"query": name} | row)
            progress.advance(task, batch.tokens)
    log.info("scored %s tokens in %.1f s", f"{tokens:,}", time.monotonic() - began)


def _check(model: Opinion, batch: Batch, rows: PackedRows, padding: int | None) -> None:
    """Refuse packed rows that are not exact and, where it is asked for, whatever changes with the batch."""
    if model.reader.step == "shared_prefix":
        model.require_agreement(rows)
    if padding is not None:
        alone, turned = move_data_to_device(otherwise(batch, padding), rows.input_ids.device)
        require_alike(model, rows, alone, turned)


def _said(model: Opinion, column: Scale, batch: Batch, rows: PackedRows) -> list[dict[str, Any]]:
    """What the model says of each query's responses."""
    said = model.by(model.reader.step, rows)
    every = said.values.tolist()
    assert len(every) == sum(batch.responses), (len(every), batch.responses)
    values, written, found = iter(every), iter(said.written), []
    for name, number in zip(batch.names, batch.responses, strict=True):
        told = list(islice(values, number))
        if not all(map(math.isfinite, told)):
            raise ValueError(f"query {name}: expected finite {_WORDS[column]}, got {told}; check the weights, or dtype")
        texts, tokens, cut = zip(*islice(written, number), strict=True) if said.written else ((), (), ())
        critiques = {"critiques": list(texts), "written": sum(tokens), "cut": sum(cut)} if texts else {}
        found.append({column: told} | critiques)
    return found


def _finish(out: Path, work: Path, made_from: Fingerprint, column: Scale, rows: Sequence[ScoredRows]) -> None:
    """Balance the account and write the file; last, for only then is it whole."""
    told = {row["query"]: row for row in jsonl.read(work / _JOURNAL)}
    lost, ledger = left_out(rows), Ledger("score")
    if lost:
        jsonl.write(out.with_name(f"{out.name}.rejects.jsonl"), lost)
    made_from.write(out)  # scores without a fingerprint would be taken for those of another tool
    written = jsonl.write(out, scored(rows, told, column, ledger))
    tokens = sum(row.get("written", 0) for row in told.values())
    log.info("%s; %s: %s responses, %s tokens of critiques", ledger, out, f"{written:,}", f"{tokens:,}")
