"""The verb `evaluate world`: what a policy answers to the world's questions, judged by the world's truth.

A door: the world knows what is true, a model answers, and each answer becomes a grade like those of any benchmark.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from . import jsonl
from .checkpoints import resolved
from .datamodules.reading import Reading
from .encoding import Part, messages_of
from .evaluation.face import Grade
from .evaluation.rates import Drawing, clustered_rate
from .fingerprint import of_file
from .ledger import Ledger
from .media import load
from .modules.answering import Answerer
from .modules.loading import Number
from .progress import track
from .provenance import model_digest, processor_digest
from .queries import Media, Query, Split
from .records import RankedQuery
from .settings import alone, claim, write_json
from .stats import Interval
from .world.truth import Verdict, judge

log = logging.getLogger(__name__)
MARKER, METRICS, _JOURNAL, _OUTCOMES = "evaluation.json", "metrics.json", "answers.jsonl", "outcomes/world.jsonl"
_REFUSAL = "I'm sorry, but I can't help with that."


def evaluate_world(
    model: str,
    world: Path,
    out: Path,
    split: Split = "val",
    max_new_tokens: int = 96,
    batch: int = 16,
    frames: int | None = None,
    dtype: Number = "float32",
    device: str = "auto",
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> None:
    """Let a policy answer the world's questions, and judge every answer by the world's truth.

    Answers are greedy. Intervals are bootstrapped over scenes, for the questions about one scene are not independent;
    where all answers are alike, they are Wilson's.
    Run again, it continues where it was stopped; what is finished is left as it is.

    Args:
        model: The policy: folder of a checkpoint, or its name on the hub.
        world: Folder of a world (`mmrlhf world`).
        out: Folder for answers, outcomes and metrics.json; created when missing.
        split: Which of the world's questions are asked.
        max_new_tokens: After so many an answer is cut, and counted as it then stands.
        batch: Questions that are answered at once; any number gives the same answers in float32.
        frames: Frames of a film; default: the processor's own.
        dtype: The type of the weights.
        device: Where the model computes: auto, cpu, cuda or cuda:N.
        level: Of the intervals.
        resamples: Draws of each bootstrap.
        seed: Of these draws.
    """
    if batch < 1 or max_new_tokens < 1:
        raise ValueError(f"batch, max_new_tokens: expected 1 or more, got {batch} and {max_new_tokens}")
    folder, asked, truth = resolved(model), _questions(world, split), judge(world)
    frames = Reading(folder, frames=frames).encoder().frames
    settings: dict[str, Any] = {"model": model_digest(folder), "processor": processor_digest(folder), "dtype": dtype}
    settings |= {name: of_file(world / f"{name}.jsonl") for name in ("ranked", "truth")}
    settings |= {"split": split, "max_new_tokens": max_new_tokens, "frames": frames}
    settings |= {"batch": batch} if dtype == "bfloat16" else {}
    drawing = Drawing(level=level, resamples=resamples, seed=seed)
    with alone(out):
        claim(out, MARKER, settings | dict(drawing), "an evaluation")
        if (out / METRICS).exists():
            log.info("%s: evaluated already", out)
            return
        with jsonl.Journal(out / _JOURNAL) as journal:
            if left := [query for query in asked if query.id not in journal.done]:
                answerer, show = Answerer(folder, dtype, device, batch), partial(load, world / "media", frames=frames)
                for row in _answered(answerer, left, show, max_new_tokens, batch):
                    journal.append(row)
        grades = _graded(asked, {row["id"]: row for row in jsonl.read(out / _JOURNAL)}, truth)
        metrics = measured(grades, drawing)
        _show(metrics, f"{folder.name}, {len(grades)} {split} questions")
        _write(out, grades, metrics)


def _write(out: Path, grades: Sequence[Grade], metrics: Mapping[str, Interval]) -> None:
    """Outcomes, intervals and, last, the metrics: with them the evaluation is finished."""
    (out / _OUTCOMES).parent.mkdir(exist_ok=True)
    jsonl.write(out / _OUTCOMES, grades)
    write_json(out / "intervals.json", {name: found._asdict() for name, found in metrics.items()})
    write_json(out / METRICS, {"world": {name: found.value for name, found in metrics.items()}})


def _questions(world: Path, split: Split) -> list[Query]:
    found = [ranked.query for ranked in jsonl.read(world / "ranked.jsonl", RankedQuery.from_json)]
    asked = [query for query in found if query.split == split]
    if not asked:
        raise ValueError(f"{world}: expected {split} questions in its ranked.jsonl, got none; is it a world's folder?")
    return asked


def _answered(
    answerer: Answerer, queries: Sequence[Query], show: Callable[[Media], Part], most: int, batch: int
) -> Iterator[dict[str, Any]]:
    """The answers as rows, those of similar length together."""
    ordered = sorted(queries, key=lambda query: (len(query.media), len(query.prompt), query.id))
    for some in track([ordered[at : at + batch] for at in range(0, len(ordered), batch)], "answering"):
        talks = [messages_of(query, show) for query in some]
        for query, answer in zip(some, answerer.answers(talks, most), strict=True):
            yield {"id": query.id, "answer": answer.text, "tokens": answer.tokens, "cut": answer.cut}


def _graded(
    asked: Sequence[Query], said: Mapping[str, Mapping[str, Any]], truth: Callable[[Query, str], Verdict]
) -> list[Grade]:
    """A grade for every question; the ledger is told of all."""
    ledger, grades = Ledger("answers"), []
    for query in asked:
        ledger.took()
        row, verdict = said[query.id], truth(query, said[query.id]["answer"])
        told = verdict._asdict() | {"answer": row["answer"], "forbidden": _forbidden(query, truth)}
        cluster, category = query.group or query.id, query.category or "none"
        grades.append(Grade(query.id, cluster, category, verdict.right, "judged", told))
        if row["cut"]:
            ledger.fixed("answer_cut")
        ledger.gave()
    ledger.check()
    log.info("%s", ledger)
    return grades


def _forbidden(query: Query, truth: Callable[[Query, str], Verdict]) -> bool:
    """Whether a refusal is the right answer: the world's truth holds it for one."""
    return query.category == "safety" and truth(query, _REFUSAL).right


def measured(grades: Sequence[Grade], drawing: Drawing) -> dict[str, Interval]:
    """The shares of true, hallucinated and refused answers, of all and of each category, with their intervals."""
    of = {
        "true": [(grade, grade.correct) for grade in grades],
        "hallucinated": [(grade, grade.detail["hallucinated"]) for grade in grades],
        "refused_harmless": [(grade, grade.detail["refused"]) for grade in grades if not grade.detail["forbidden"]],
        "refused_forbidden": [(grade, grade.detail["refused"]) for grade in grades if grade.detail["forbidden"]],
    }
    for category in sorted({grade.category for grade in grades}):
        of[f"true/{category}"] = [(grade, grade.correct) for grade in grades if grade.category == category]
    found = {}
    for name, told in of.items():
        if told:
            clusters = [grade.cluster for grade, _ in told]
            found[name] = clustered_rate([bool(value) for _, value in told], clusters, **drawing)
    return found


def _show(metrics: Mapping[str, Interval], title: str) -> None:
    table = Table("answers", "share", "interval", title=title, box=box.SIMPLE_HEAD)
    for name, found in metrics.items():
        table.add_row(name, f"{found.value:.3f}", f"{found.low:.2f}-{found.high:.2f}")
    Console().print(table)
