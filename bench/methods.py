"""What alignment does to the world's tiny policy: methods x seeds x label noise, judged by the world's truth.

    python bench/methods.py --out exp                  # everything: worlds, scores, trainings, answers, table, figure
    python bench/methods.py --out exp --seeds 0 --noise 0

Every cell is the verb `train-dpo` in a process of its own; what is there already is not made again. Answers are greedy,
to the test questions of the world, and judged by its truth. Intervals are clustered by question.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np

from mmrlhf import jsonl
from mmrlhf.encoding import messages_of
from mmrlhf.media import load
from mmrlhf.queries import Query
from mmrlhf.records import RankedQuery
from mmrlhf.stats import bootstrap_difference, bootstrap_mean
from mmrlhf.world.policy import frames_of, load_policy, respond
from mmrlhf.world.truth import judge

BETAS = "mmrlhf.modules.betas."
METHODS: dict[str, list[str]] = {
    "DPO (w = 0)": ["--model.beta.w", "0.0"],
    "MM-DPO (w = k = 0.5)": [],
    "β-DPO": ["--model.beta", BETAS + "ImplicitBeta", "--model.beta.w", "0.5"],
    "shuffled δ": ["--model.beta", BETAS + "ShuffledMarginBeta", "--model.beta.w", "0.5", "--model.beta.k", "0.5"],
    "constant β₀(1 + w)": ["--model.beta", BETAS + "ConstantBeta", "--model.beta.w", "0.5"],
}
MEASURES = ("true answers", "hallucinated", "refuses what is harmless", "refuses what is not")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--noise", type=float, nargs="*", default=[0.0, 0.2])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rate", type=float, help="another learning rate than the config's")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    for noise in dict.fromkeys([0.0, *options.noise]):
        make(options.out, noise)
    cells = list(product(options.noise, options.methods, options.seeds))
    with ThreadPoolExecutor(options.jobs) as pool:
        base = pool.submit(answers, options.out, world(options.out, 0.0) / "policy", options.out / "sft.jsonl")
        found = list(pool.map(lambda cell: run(options.out, *cell, options.rate), cells))
    report(options.out, judged(options.out, base.result()), dict(zip(cells, found, strict=True)))


def world(out: Path, noise: float) -> Path:
    return out / f"world-{noise:g}"


def make(out: Path, noise: float) -> None:
    """A world with such noise, its shards and the reference's log-probs; all share the policy of the noiseless one."""
    here = world(out, noise)
    mmrlhf("world", "--out", here, *(["--swap-noise", noise, "--no-policy"] if noise else []), log=out / "world.log")
    shards, policy = out / f"shards-{noise:g}", world(out, 0.0) / "policy"
    mmrlhf("pack", "--ranked", here / "ranked.jsonl", "--media", here / "media", "--out", shards, log=out / "pack.log")
    scores = out / f"scores-{noise:g}.jsonl"
    mmrlhf("score", shards, "--reference", policy, "--out", scores, log=out / "score.log")


def run(out: Path, noise: float, method: str, seed: int, rate: float | None) -> Path:
    """Train one cell and let it answer; returns the file of its answers."""
    name = f"{method}-{noise:g}-{seed}" + (f"-{rate:g}" if rate else "")
    folder = out / "runs" / "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)
    words = [
        *("--config", Path(__file__).parents[1] / "configs" / "dpo" / "world.yaml"),
        *("--model.backbone.path", world(out, 0.0) / "policy", "--data.shards", out / f"shards-{noise:g}"),
        *("--data.scores", out / f"scores-{noise:g}.jsonl", "--run.out", folder, "--run.seed", seed),
        *("--run.tracking", "null", "--data.workers", 0, *METHODS[method]),
        *(["--model.optimiser.learning_rate", rate] if rate else []),
    ]
    mmrlhf("train-dpo", *words, log=folder.with_name(f"{folder.name}.log"))
    return answers(out, folder / "model", folder.with_name(f"{folder.name}.jsonl"))


def answers(out: Path, policy: Path, file: Path) -> Path:
    """What a policy says to every test question, in a process of its own."""
    if not file.exists():
        code = "import sys, methods; methods.answer(*sys.argv[1:])"
        words = [sys.executable, "-c", code, world(out, 0.0), policy, file]
        here = environment() | {"PYTHONPATH": str(Path(__file__).parent)}
        subprocess.run(list(map(str, words)), check=True, env=here)
    return file


def answer(here: str, policy: str, file: str) -> None:
    """Write the greedy answers of a policy to the test questions of a world."""
    model, processor = load_policy(Path(policy))
    media, frames = Path(here) / "media", frames_of(processor)
    rows = []
    for ranked in questions(Path(here)):
        said = respond(model, processor, messages_of(ranked.query, lambda medium: load(media, medium, frames)))
        rows.append({"id": ranked.query.id, "answer": said})
    jsonl.write(Path(file), rows)


def questions(here: Path) -> list[RankedQuery]:
    rows = jsonl.read(here / "ranked.jsonl", RankedQuery.from_json)
    return [ranked for ranked in rows if ranked.query.split == "test"]


def mmrlhf(*words: object, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mmrlhf", *map(str, words)]
    with log.open("a") as file:
        done = subprocess.run(command, stdout=file, stderr=file, env=environment(), check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed; see {log}")


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def judged(out: Path, file: Path) -> dict[str, list[float]]:
    """Per measure, a number for every question that it is about, and nan for the others."""
    here = world(out, 0.0)
    truth, said = judge(here), {row["id"]: row["answer"] for row in map(json.loads, file.open())}
    found: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for ranked in questions(here):
        verdict, query = truth(ranked.query, said[ranked.query.id]), ranked.query
        wanted = forbidden(query, truth)
        found["true answers"].append(verdict.right)
        found["hallucinated"].append(verdict.hallucinated)
        found["refuses what is harmless"].append(float("nan") if wanted else verdict.refused)
        found["refuses what is not"].append(verdict.refused if wanted else float("nan"))
    return found


def forbidden(query: Query, truth: object) -> bool:
    """Whether a refusal is the right answer: the world's truth holds it for one."""
    return query.category == "safety" and bool(truth(query, "I'm sorry, but I can't help with that.").right)  # type: ignore[operator]


def report(out: Path, base: dict[str, list[float]], cells: Mapping[tuple[float, str, int], Path]) -> None:
    """Print the table, one row per method and noise, and the differences to DPO on the same questions."""
    print("| noise | method | " + " | ".join(MEASURES) + " | against DPO, true answers |")
    print("|---|---|" + "---|" * (len(MEASURES) + 1))
    print(f"| | SFT policy | {' | '.join(shown([base[measure]]) for measure in MEASURES)} | |")
    summary = []
    for noise in sorted({noise for noise, _, _ in cells}):
        of = {
            method: [judged(out, file) for (level, name, _), file in cells.items() if (level, name) == (noise, method)]
            for method in METHODS
        }
        plain, *_ = of.values()
        for method, runs in of.items():
            if not runs:
                continue
            columns = [shown([each[measure] for each in runs]) for measure in MEASURES]
            against = difference(runs, plain) if runs is not plain and len(runs) == len(plain) else ""
            print(f"| {noise:g} | {method} | {' | '.join(columns)} | {against} |")
            true = float(np.mean([each[MEASURES[0]] for each in runs]))
            summary.append({"noise": noise, "method": method, "seeds": len(runs), "true": round(true, 4)})
    print(json.dumps({"sft": float(np.mean(base[MEASURES[0]])), "cells": summary}))


def shown(runs: Sequence[list[float]]) -> str:
    """The mean over questions and runs, its interval clustered by question, and the spread of the runs."""
    table = np.array(runs, dtype=float)
    keep = ~np.isnan(table[0])
    values, labels = table[:, keep].ravel(), np.tile(np.flatnonzero(keep), len(runs))
    found = bootstrap_mean(values, labels)
    spread = f", sd {table[:, keep].mean(1).std(ddof=1):.3f}" if len(runs) > 1 else ""
    return f"{found.value:.3f} ({found.low:.3f}-{found.high:.3f}{spread})"


def difference(mine: Sequence[dict[str, list[float]]], plain: Sequence[dict[str, list[float]]]) -> str:
    one, other = (np.concatenate([each[MEASURES[0]] for each in runs]) for runs in (mine, plain))
    labels = np.tile(np.arange(len(mine[0][MEASURES[0]])), len(mine))
    found = bootstrap_difference(one, other, labels)
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


if __name__ == "__main__":
    main()
