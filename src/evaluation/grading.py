"""The verb `evaluate rewardbench`: rewards made anywhere become ACC and ACC+ with their uncertainty."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import jsonl
from ..fingerprint import of_file
from ..ledger import Ledger
from ..settings import alone, claim, write_json
from .comparing import Contrast, Family, contrasts
from .face import Grade
from .figures import calibration, length_bias
from .rates import Summary
from .reporting import contrasts_grid, coverage_grid, markdown, notes, paper_cells_grid, paper_grid, rates_grid, show
from .rewardbench import Comparison, RewardBench
from .rewards import read_rewards
from .table4 import table4

log = logging.getLogger(__name__)
MARKER = "evaluation.json"
_DPI = 110


def evaluate_rewardbench(
    items: Path,
    scores: Path | tuple[Path, ...],
    out: Path,
    names: tuple[str, ...] | None = None,
    compare: Family = "all",
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    figures: bool = True,
    max_skipped: float = 0.0,
) -> None:
    """Grade files of rewards by MM-RLHF-RewardBench: ACC and ACC+ with intervals, and paired comparisons.

    Files of rewards are those of the official evaluation (`rewards` beside chosen and rejected) or of `mmrlhf score`
    (a `reward` per response, joined by id and text). The same files give the same bytes, in whatever order their rows
    stand.

    Args:
        items: The benchmark, mm_reward_bench.jsonl or a file of the same layout.
        scores: File of rewards, or several, one for each system.
        out: Folder for outcomes, metrics.json, report.md and figures; created when missing.
        names: What to call the systems; default: after their files.
        compare: The family of comparisons, chosen beforehand: all systems with each other, or each with the first.
        level: Of the intervals.
        resamples: Draws of each bootstrap and permutation test.
        seed: Of these draws.
        figures: Whether to draw calibration and length bias of each system.
        max_skipped: The part of the benchmark's rows that may be malformed; each is named.
    """
    systems = named(scores if isinstance(scores, tuple) else (scores,), names)
    bench, ledger = RewardBench(level, resamples, seed), Ledger("items")
    pairs = bench.items(items, ledger)
    log.info("%s", ledger)
    ledger.check(max_skipped)
    settings: dict[str, Any] = {"benchmark": bench.name, "items": of_file(items), "scores": _digests(systems)}
    settings |= {"compare": compare, "level": level, "resamples": resamples, "seed": seed}
    graded, accounts = {}, {bench.name: ledger.as_dict()}
    for name, path in systems.items():
        graded[name], accounts[name] = _graded(bench, pairs, name, path)
    summaries = {name: bench.summarize(grades) for name, grades in graded.items()}
    tests = contrasts(graded, compare, level=level, resamples=resamples, seed=seed)
    with alone(out):
        claim(out, MARKER, settings, "an evaluation")
        _write(out, graded, _metrics(summaries, tests, accounts, compare))
        _report(out, summaries, tests, [f"{name}: {account}" for name, account in _told(accounts).items()])
        if figures:
            _draw(out / "figures", graded)
    log.info("%s: outcomes, metrics.json and report.md", out)


def named(paths: Sequence[Path], names: Sequence[str] | None = None) -> dict[str, Path]:
    """The files under the names of their systems: as given, or the file's name, with its folder's where two share it.

    >>> list(named([Path("a/scores.jsonl"), Path("b/scores.jsonl")]))
    ['a-scores', 'b-scores']
    """
    if not paths:
        raise ValueError("scores: expected at least one file, got none; name a file of rewards")
    if names is None:
        stems = [path.stem for path in paths]
        names = [
            stem if stems.count(stem) == 1 else f"{path.absolute().parent.name}-{stem}"
            for path, stem in zip(paths, stems, strict=True)
        ]
    if len(names) != len(paths) or len(set(names)) != len(names):
        expected = f"{len(paths)} different names, one per file of scores"
        raise ValueError(f"names: expected {expected}, got {list(names)}; give each file its own with --names")
    if unfit := [name for name in names if not name.strip() or "/" in name or name.startswith(".")]:
        raise ValueError(f"names: expected names that a file may have, got {unfit[0]!r}; choose another")
    return dict(zip(names, paths, strict=True))


def _digests(systems: Mapping[str, Path]) -> dict[str, str]:
    if missing := [path for path in systems.values() if not path.is_file()]:
        raise ValueError(f"scores: expected a file of rewards, found none at {missing[0]}; check the path")
    return {name: of_file(path) for name, path in systems.items()}


def _graded(
    bench: RewardBench, pairs: Sequence[Comparison], name: str, path: Path
) -> tuple[list[Grade], dict[str, Any]]:
    ledger = Ledger(name)
    found = read_rewards(path, pairs, ledger)
    log.info("%s", ledger)
    return [bench.grade(pair, found.get(pair.key)) for pair in pairs], ledger.as_dict()


def _metrics(
    summaries: Mapping[str, Summary], tests: Sequence[Contrast], accounts: Mapping[str, Any], family: Family
) -> dict[str, Any]:
    paper = [
        {
            "system": row.system,
            "acc_printed": row.overall.acc,
            "acc_recomputed": row.acc,
            "acc_plus_printed": row.overall.acc_plus,
            "acc_plus_recomputed": row.acc_plus,
            "doubts": list(row.doubts),
        }
        for row in table4()
    ]
    told = [summary.overall for summary in summaries.values()]
    of_one = (
        {RewardBench.name: {"acc": told[0].acc.value, "acc_plus": told[0].acc_plus.value}} if len(told) == 1 else {}
    )
    return of_one | {
        "systems": {name: summary.to_json() for name, summary in summaries.items()},
        "comparisons": {"family": family, "tests": [test.to_json() for test in tests]},
        "accounts": dict(accounts),
        "paper_table_4": paper,
    }


def _write(out: Path, graded: Mapping[str, Sequence[Grade]], metrics: Mapping[str, Any]) -> None:
    (out / "outcomes").mkdir(exist_ok=True)
    for name, grades in graded.items():
        jsonl.write(out / "outcomes" / f"{name}.jsonl", grades)
    write_json(out / "metrics.json", metrics)


def _told(accounts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The accounts in words; a file's own name is already in front."""
    return {name: str(Ledger.from_dict(account)).partition(": ")[2] for name, account in accounts.items()}


def _report(out: Path, summaries: Mapping[str, Summary], tests: Sequence[Contrast], preamble: Sequence[str]) -> None:
    grids = [rates_grid(summaries), coverage_grid(summaries)]
    grids += [contrasts_grid(tests)] if tests else []
    show([*grids, paper_grid()])
    page = markdown([*grids, paper_grid(), paper_cells_grid()], notes(summaries), preamble)
    with jsonl.replacing(out / "report.md") as file:
        file.write(page.encode())


def _draw(folder: Path, graded: Mapping[str, Sequence[Grade]]) -> None:
    folder.mkdir(exist_ok=True)
    for name, grades in graded.items():
        told = [grade for grade in grades if "rewards" in grade.detail]
        if not told:
            log.warning("%s: no pair has rewards, so there is nothing to draw", name)
            continue
        deltas = [grade.detail["rewards"][0] - grade.detail["rewards"][1] for grade in told]
        ids = [grade.cluster for grade in told]
        calibration(deltas, ids, title=name).savefig(folder / f"{name}-calibration.png", dpi=_DPI)
        longer = [grade.detail["longer"] for grade in told]
        length_bias(deltas, longer, ids, title=name).savefig(folder / f"{name}-length.png", dpi=_DPI)
