"""The verb `score`: what a model says of every response, computed once and kept in a file.

A door: rows come from the shards, log-probs from a backbone. A run asks one model and writes one file; where scores
are read, files add up.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils.data import DataLoader

from . import jsonl
from .checkpoints import resolved
from .datamodules.module import ScoredRows
from .datamodules.reading import Reading
from .datamodules.scores import DATA, MODEL, VALUES
from .datamodules.scoring import Batch, LaidOut, chosen, left_out, planned, readable, scored, unfinished
from .fingerprint import Fingerprint
from .ledger import Ledger
from .modules.families import family_of, why_not_shared
from .modules.loading import Number, load_backbone
from .modules.packed import Step
from .modules.scorer import ResponseScorer
from .modules.selfcheck import require_agreement
from .parallel import follow_parent
from .progress import bar
from .provenance import model_digest
from .queries import Split
from .settings import alone, claim

if TYPE_CHECKING:
    from .batches import PackedRows

log = logging.getLogger(__name__)
_MARKER, _JOURNAL = "score.json", "journal.jsonl"


def score(
    shards: Path,
    out: Path,
    reference: str | None = None,
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
) -> None:
    """Write the log-prob that a reference policy gives to every response of a set of shards.

    Run again, it continues where it was stopped, on another device or with other batches if need be; a finished file
    is left as it is. Responses that a training will leave out for their length are scored as well.

    Args:
        shards: Folder of a finished set (`mmrlhf pack`).
        out: File of scores, JSON lines; beside it is written what it was made from.
        reference: The policy as it is before the training: folder of a checkpoint, or its name on the hub.
        splits: Which splits are scored; default: all that there are.
        frames: Frames of a film, the same as in the training; default: as many as the processor's own.
        batch_tokens: At most so many tokens are computed at once, but never less than a query.
        step: Whether the responses of a query share one row with its prompt, or have a row each.
        chunk: At most so many rows of logits exist at once.
        dtype: The type of the weights.
        device: Where the model computes: auto, cpu, cuda or cuda:N.
        workers: Processes that load batches; any number gives the same.
        cache: Where it is kept which queries can be read; default: `admitted` beside the shards.
        max_skipped: The part of the queries that may be left out, each for a reason that is named.
    """
    _require_numbers(batch_tokens, chunk, frames, workers)
    place, (folder, way) = _device(device), _scorable(reference, step)
    reading = Reading(folder, frames=frames)
    padding, sets = reading.padding, chosen(shards, splits)
    data = {f"{DATA}{one.split}": one.digest for one in sets}
    model = {VALUES: "reference_logp", MODEL: model_digest(folder), "dtype": dtype}
    made_from, work = Fingerprint(model | reading.parts() | data), out.with_name(f"{out.name}.unfinished")
    if _is_there(out, work, made_from):
        return
    ready = [readable(one, reading, cache, workers, max_skipped) for one in sets]
    with alone(work):
        claim(work, _MARKER, made_from.parts, "scores")
        with jsonl.Journal(work / _JOURNAL, "query") as journal:
            left = unfinished(planned(ready, batch_tokens, way == "separate"), journal.done)
            if left:
                rows = _loaded(LaidOut(left, padding), workers)
                scorer = ResponseScorer(load_backbone(str(folder), dtype=dtype), way, chunk)
                _compute(scorer.eval().to(place), left, rows, journal)
        _finish(out, work, made_from, ready)
        shutil.rmtree(work)


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


def _scorable(reference: str | None, step: Step) -> tuple[Path, Literal["shared_prefix", "separate"]]:
    """The folder of a checkpoint of a known family, and the step that `step` means for it; no weights are read."""
    from transformers import AutoConfig

    if reference is None:
        raise ValueError("reference: expected the checkpoint that is to score, got none; give --reference FOLDER")
    folder = resolved(reference)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    reason, name = why_not_shared(config), family_of(config).name
    if step == "shared_prefix" and reason:
        raise ValueError(f"step: {name} cannot share a prefix: {reason}; say separate, or auto")
    return folder, "separate" if reason or step == "separate" else "shared_prefix"


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


def _loaded(batches: LaidOut, workers: int) -> Iterator[PackedRows]:
    """The batches in their order; reading begins now, before there are weights and threads that a fork would meet."""
    # Without `follow_parent` the workers would outlive a kill for seconds, and hold on to the locks of this process.
    return iter(DataLoader(batches, batch_size=None, num_workers=workers, worker_init_fn=_follow))


def _follow(_worker: int) -> None:
    follow_parent()


def _compute(scorer: ResponseScorer, left: Sequence[Batch], read: Iterator[PackedRows], journal: jsonl.Journal) -> None:
    """Write the log-probs of all batches into the journal, query by query."""
    device, checked = next(scorer.parameters()).device, scorer.step == "separate"
    with bar() as progress, torch.inference_mode():
        task = progress.add_task("scoring tokens", total=sum(batch.tokens for batch in left))
        for batch, laid_out in zip(left, read, strict=True):
            rows = move_data_to_device(laid_out, device)
            if not checked:
                require_agreement(scorer, rows)
                checked = True
            for name, logps in zip(batch.names, _logps(scorer, batch, rows), strict=True):
                if name not in journal.done:
                    journal.append({"query": name, "logps": logps})
            progress.advance(task, batch.tokens)


def _logps(scorer: ResponseScorer, batch: Batch, rows: PackedRows) -> list[list[float]]:
    """The summed log-probs of each query's responses."""
    try:
        sums = scorer(rows).sums.tolist()
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"batch_tokens: no memory for a batch of {len(batch.numbers)} queries with {batch.tokens:,} tokens; run "
            "again with fewer, or with fewer --frames for a single query"
        ) from error
    values = iter(sums)
    found = [list(islice(values, number)) for number in batch.responses]
    for name, logps in zip(batch.names, found, strict=True):
        if not all(map(math.isfinite, logps)):
            raise ValueError(f"query {name}: expected finite log-probs, got {logps}; check the weights, or the dtype")
    assert len(sums) == sum(batch.responses), (len(sums), batch.responses)
    return found


def _finish(out: Path, work: Path, made_from: Fingerprint, rows: Sequence[ScoredRows]) -> None:
    """Balance the account and write the file; last, for only then is it whole."""
    logps = {row["query"]: row["logps"] for row in jsonl.read(work / _JOURNAL)}
    lost, ledger = left_out(rows), Ledger("score")
    if lost:
        jsonl.write(out.with_name(f"{out.name}.rejects.jsonl"), lost)
    made_from.write(out)  # scores without a fingerprint would be taken for those of another tool
    written = jsonl.write(out, scored(rows, logps, ledger))
    log.info("%s; %s: %s responses", ledger, out, f"{written:,}")
