"""The verb `evaluate rewards`: rewards of all responses of a set become numbers, figures and examples."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import jsonl
from ..fingerprint import Fingerprint, of_file
from ..ledger import Ledger
from ..queries import Split
from ..settings import alone, claim, write_json
from .agreement import Agreement, agreement, grades_of, pairs_of
from .examples import RULE, choose, example_of
from .figures import calibration, delta_by_gap, in_and_out_of_fold, length_bias, reward_by_rank
from .grading import MARKER
from .joining import Judged, judged_queries
from .page import critiques_page
from .reporting import Grid, folds_grid, gaps_grid, markdown, measures_grid, rates_grid, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)
_DPI = 110
_OUTCOMES = "outcomes/rewards.jsonl"
_TITLE = "Rewards against people's rankings"
_NOTES = """\
A pair is right if the response that people prefer has strictly the larger reward; a tie is wrong. ACC counts pairs, \
ACC+ queries (ids) all of whose pairs are right.
Intervals: bootstrap over queries (Wilson over queries where all agree); Wilson for ACC+; bootstrap within each \
category for macro.
Kendall's tau-b is the mean over queries, 0 for a query whose rewards are all equal. A query whose responses are all \
of one rank has none.
Calibration: sigmoid(δ) is read as the probability that people prefer the response. The error is the mean distance \
between what is claimed and what is right, in bins of equally many pairs; few pairs make it larger.
Length: over pairs whose lengths differ; a reward that prefers neither counts half.""".splitlines()


def evaluate_rewards(
    ranked: Path,
    scores: Path,
    out: Path,
    split: Split | None = None,
    media: Path | None = None,
    examples: int = 12,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    max_skipped: float = 0.01,
) -> None:
    """Compare the rewards of a whole set with people's rankings: numbers with intervals, figures, examples.

    Scores are those of `mmrlhf score --reward` or `mmrlhf implicit-rewards`, joined by id, place and text. Where they
    also say what a model thinks that was trained on the query (`reward_seen`), both margins are compared. The order
    of the rows changes no number, no figure and no example.

    Args:
        ranked: Ranked queries, one JSON object a line.
        scores: File of rewards, a row per response.
        out: Folder for metrics.json, report.md, outcomes, critiques.html and figures; created when missing.
        split: Only queries of this split; default: all.
        media: Folder of the media, for small pictures beside the examples; default: they are named alone.
        examples: How many queries critiques.html shows side by side.
        level: Of the intervals.
        resamples: Draws of each bootstrap.
        seed: Of these draws, and of the examples that are drawn by chance.
        max_skipped: The part of the queries that may lack a reward of some response; each is counted.
    """
    if examples < 0:
        raise ValueError(f"examples: expected 0 or more, got {examples}")
    judged, accounts = judged_queries(ranked, scores, split, max_skipped)
    for account in accounts:
        log.info("%s", account)
    made_from = _made_from(scores)
    settings: dict[str, Any] = {"ranked": of_file(ranked), "scores": of_file(scores), "split": split}
    settings |= {"media": media is not None, "examples": examples, "level": level, "resamples": resamples, "seed": seed}
    found = agreement(judged, level=level, resamples=resamples, seed=seed)
    page = critiques_page((example_of(one, media) for one in choose(judged, examples, seed)), scores.stem, RULE)
    with alone(out):
        claim(out, MARKER, settings, "an evaluation of rewards")
        (out / _OUTCOMES).parent.mkdir(exist_ok=True)
        jsonl.write(out / _OUTCOMES, grades_of(pairs_of(judged)))
        line = found.accuracy.overall
        kept: dict[str, Any] = {"rewards": {"acc": line.acc.value, "acc_plus": line.acc_plus.value}}
        kept |= {"made_from": made_from, "accounts": {one.stage: one.as_dict() for one in accounts}}
        write_json(out / "metrics.json", kept | found.to_json())
        jsonl.replace(out / "critiques.html", page.encode())
        jsonl.replace(out / "report.md", _report(scores.stem, found, accounts, made_from).encode())
        _draw(out / "figures", judged, scores.stem)
    log.info("%s: metrics.json, report.md, critiques.html and figures", out)


def _made_from(scores: Path) -> dict[str, str] | None:
    """The parts of the scores' fingerprint; None for a file of another tool."""
    beside = scores.with_name(f"{scores.name}.fingerprint.json")
    return dict(Fingerprint.read(scores).parts) if beside.exists() else None


def grids(name: str, found: Agreement) -> list[Grid]:
    """The tables of a report."""
    told = [rates_grid({name: found.accuracy}, _TITLE), gaps_grid(found), measures_grid(found)]
    return told + ([folds_grid(found.folds)] if found.folds else [])


def _report(name: str, found: Agreement, accounts: Sequence[Ledger], made_from: Mapping[str, str] | None) -> str:
    tables = grids(name, found)
    show(tables)
    told = [", ".join(f"{part} {value[:16]}" for part, value in made_from.items())] if made_from else []
    return markdown(tables, [*_NOTES, f"critiques.html: {RULE}"], [*map(str, accounts), *told], _TITLE)


def figures_of(judged: Sequence[Judged], title: str) -> dict[str, Figure]:
    """The figures of a report by the names of their files."""
    pairs = pairs_of(judged)
    responses = [
        (reward, rank, one.ranked.query.id)
        for one in judged
        for reward, rank in zip(one.rewards, one.ranked.ranks, strict=True)
    ]
    rewards, ranks, queries = zip(*responses, strict=True)
    figures = {
        "reward_by_rank": reward_by_rank(rewards, ranks, queries, title=title),
        "delta_by_gap": delta_by_gap(pairs.deltas, pairs.gaps, pairs.queries, title=title),
        "calibration": calibration(pairs.deltas, pairs.queries, title=title),
        "length_bias": length_bias(pairs.deltas, pairs.longer, pairs.queries, title=title),
    }
    if np.isfinite(pairs.seen).any():
        both = pairs.where(np.isfinite(pairs.seen))
        figures["seen"] = in_and_out_of_fold(both.seen, both.deltas, both.queries, title=title)
    return figures


def _draw(folder: Path, judged: Sequence[Judged], title: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, figure in figures_of(judged, title).items():
        figure.savefig(folder / f"{name}.png", dpi=_DPI)
