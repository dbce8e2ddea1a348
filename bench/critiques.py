"""What critiques do for a reward model on the world: the rows of the paper's ablation, and the implicit reward of DPO.

    python bench/critiques.py --out exp                 # world, benchmark, trainings, table: over an hour
    python bench/critiques.py --out exp --seeds 0

Every step is a verb in a process of its own; what is there already is not made again. The benchmark is drawn from the
world's test questions, which no model was trained on. Intervals are clustered by question, over the mean of the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import methods
import numpy as np
from methods import METHODS, mmrlhf

from mmrlhf import jsonl
from mmrlhf.evaluation.face import Grade
from mmrlhf.stats import Interval, bootstrap_difference, bootstrap_mean, holm, paired_permutation

ROWS = {
    "no critique": ("none", "none"),
    "people's words, generated": ("reason", "generated"),
    "enhanced, generated": ("critique", "generated"),
    "enhanced, given": ("critique", "given"),
}
"""What a model learns to write, and what its reward is read behind."""
IMPLICIT = "implicit reward of DPO"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4, help="passes over the data")
    options = parser.parse_args()
    out: Path = options.out
    methods.make(out, 0.0)
    world = methods.world(out, 0.0)
    made = ("--ranked", world / "ranked.jsonl", "--media", world / "media", "--split", "test", "--per-category", 60)
    mmrlhf("data", "make-rewardbench", *made, "--out", out / "bench", log=out / "bench.log")
    graded = {
        name: [critiques(out, seed, options.epochs, *row) for seed in options.seeds] for name, row in ROWS.items()
    }
    graded[IMPLICIT] = [implicit(out, seed) for seed in options.seeds]
    report(graded)


def critiques(out: Path, seed: int, epochs: int, learned: str, asked: str) -> list[Grade]:
    """Train a reward model, let it judge, and return its grades."""
    run, scores = out / "judges" / f"{learned}-{seed}", out / "judges" / f"{learned}-{seed}-{asked}.jsonl"
    words = [
        *("--config", Path(__file__).parents[1] / "configs" / "reward" / "world.yaml"),
        *("--model.backbone.path", methods.world(out, 0.0) / "policy", "--data.shards", out / "shards-0"),
        *(
            "--data.critique",
            learned,
            "--trainer.max_epochs",
            epochs,
            "--run.out",
            run,
            "--run.seed",
            seed,
            "--run.tracking",
            "null",
        ),
    ]
    mmrlhf("train-reward", *words, log=run.with_suffix(".log"))
    told = ("--reward", run / "model", "--critique", asked, "--splits", "[test]", "--out", scores)
    given = ("--critique-from", "critique") if asked == "given" else ()
    mmrlhf("score", out / "shards-0", *told, *given, log=scores.with_suffix(".log"))
    return grades(out, scores)


def implicit(out: Path, seed: int) -> list[Grade]:
    """The grades of beta times the log-prob by a policy that DPO has aligned, less that of its reference."""
    method = next(iter(METHODS))
    methods.run(out, 0.0, method, seed, None)
    (policy,) = (out / "runs").glob(f"DPO*-0-{seed}/model")
    files = [out / "judges" / f"{name}-logps.jsonl" for name in ("reference", f"dpo-{seed}")]
    for folder, file in zip((methods.world(out, 0.0) / "policy", policy), files, strict=True):
        told = ("--reference", folder, "--splits", "[test]", "--out", file)
        mmrlhf("score", out / "shards-0", *told, log=file.with_suffix(".log"))
    rewards = out / "judges" / f"implicit-{seed}.jsonl"
    told = ("--reference", files[0], "--policy", files[1], "--out", rewards)
    mmrlhf("implicit-rewards", *told, log=rewards.with_suffix(".log"))
    return grades(out, rewards)


def grades(out: Path, scores: Path) -> list[Grade]:
    """How a file of rewards does on the benchmark, in the order of the pairs."""
    folder, items = scores.with_name(f"{scores.stem}-graded"), out / "bench" / "mm_reward_bench.jsonl"
    words = ("--items", items, "--scores", scores, "--out", folder, "--no-figures")
    mmrlhf("evaluate", "rewardbench", *words, log=scores.with_suffix(".log"))
    found = jsonl.read(folder / "outcomes" / f"{scores.stem}.jsonl", Grade.from_json)
    return sorted(found, key=lambda grade: grade.item)


def report(graded: dict[str, list[list[Grade]]]) -> None:
    """Print ACC and ACC+ of every row, and all differences of ACC with Holm's correction."""
    means, clusters = {}, [grade.cluster for grade in next(iter(graded.values()))[0]]
    print("| | ACC | of the seeds | ACC+ |")
    print("|---|---|---|---|")
    summary = {}
    for name, runs in graded.items():
        table = np.array([[grade.correct for grade in run] for run in runs], dtype=float)
        whole, names = whole_queries(table, clusters)
        means[name] = table.mean(0)
        acc, plus = bootstrap_mean(means[name], clusters), bootstrap_mean(whole.mean(0), names)
        seeds = ", ".join(f"{value:.3f}" for value in table.mean(1))
        print(f"| {name} | {shown(acc)} | {seeds} | {shown(plus)} |")
        summary[name] = {"acc": round(acc.value, 4), "acc_plus": round(plus.value, 4)}
    both = list(itertools.combinations(means, 2))
    tests = [paired_permutation(means[one], means[two], clusters) for one, two in both]
    for (one, two), p in zip(both, holm(tests), strict=True):
        found = bootstrap_difference(means[one], means[two], clusters)
        print(f"{one} - {two}: {found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f}), p = {p:.4f} (Holm)")
    print(json.dumps(summary))


def whole_queries(table: np.ndarray, clusters: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Whether all pairs of each query are right, (runs, queries), and the queries."""
    names, places = np.unique(clusters, return_inverse=True)
    return np.array([[row[places == number].all() for number in range(len(names))] for row in table], float), list(
        names
    )


def shown(found: Interval) -> str:
    return f"{found.value:.3f} ({found.low:.3f}-{found.high:.3f})"


if __name__ == "__main__":
    main()
