"""A training on one GPU at real shapes: memory against the estimate of `--dry-run`, tokens per second, MFU, resume.

    python bench/gpu.py --out gpu.json                              # LLaVA-OneVision 0.5B and 7B on the first GPU
    python bench/gpu.py --shape middle                              # smaller, of the same kind
    python bench/gpu.py --device cpu --shape tiny                   # every line that a CPU can run, under a minute

Weights are random, nothing is downloaded. A step is of one query, a picture of four tiles and four ranked responses,
by the real module, strategy and optimiser. Of 0.5B everything but the tower is trained, in float32 weights. 7B would
need 16 bytes per weight for that, 122 GB and its activations, which no single GPU has: there adapters are trained over
weights in bfloat16. Memory is the most that was allocated after the first step; on a CPU it is the tensors that were
alive, which is slow to watch, so speeds are those of the watching. `apart` is the difference of the first loss to that
of the first row. Saved and resumed with deterministic kernels; 7B needs 40 GB of disk for that (TMPDIR).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA begins; deterministic kernels ask for it

import gpu_training as training
import torch

from mmrlhf.callbacks.throughput import peak_flops

GIB = 2**30
WITHIN = 0.15
"""Of the estimate, that measured memory may be off."""
COLUMNS = ("way", "s/step", "tokens/s", "MFU", "peak GiB", "estimate", "ratio", "first loss", "last loss", "apart")


def main() -> None:
    options = arguments()
    results = []
    for name in options.shape:
        told = {"shape": name, **machine(options)}
        print(", ".join(f"{key} {value}" for key, value in told.items()), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            rows = measured(options, name, Path(folder))
            print(table(rows))
            resumed = resume(options, name, Path(folder))
        print(", ".join(f"{key}: {value}" for key, value in resumed.items()), flush=True)
        off = [row["way"] for row in rows if row.get("ratio") and not 1 - WITHIN <= row["ratio"] <= 1 + WITHIN]
        results.append(told | {"rows": rows, "resume": resumed, "estimate_missed": off})
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shape", choices=training.SHAPES, nargs="+", default=["0.5b", "7b"])
    parser.add_argument("--steps", type=int, help="of each row; default: 10 on a GPU, 3 on a CPU")
    parser.add_argument("--peak", type=float, help="dense bfloat16 TFLOP/s of the GPU; default: by its name")
    parser.add_argument("--out", type=Path, help="a file for all figures, as JSON")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a GPU that torch can use, found none; say --device cpu --shape tiny")
    if options.device == "cpu" and set(options.shape) - {"tiny"}:
        parser.error(f"--shape: expected tiny on a CPU, got {' '.join(options.shape)}, which take hours there")
    options.steps = options.steps or (10 if options.device == "cuda" else 3)
    if options.steps < 2:
        parser.error(f"--steps: expected 2 or more, got {options.steps}; the first one is not counted")
    return options


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What it was run on."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    return {"device": device, **{name: version(name) for name in ("torch", "transformers", "lightning")}}


def cases(options: argparse.Namespace, name: str, folder: Path) -> dict[str, training.Case]:
    """Every row by its name, the plainest first."""
    lora = name == "7b"
    backend = "inductor" if options.device == "cuda" else "aot_eager"  # the latter needs no compiler of C
    mixed = training.Case(training.SHAPES[name], folder, options.device, mixed=True, lora=lora)
    vary = dataclasses.replace
    found = {} if lora else {"float32": vary(mixed, mixed=False)}
    return found | {
        "bf16": mixed,
        "bf16, compiled": vary(mixed, compiled=backend),
        "bf16, separate rows": vary(mixed, step="separate"),
        "bf16, recomputed": vary(mixed, again=True),
        "bf16, FSDP2": vary(mixed, sharded=True),
        "bf16, FSDP2, two at once": vary(mixed, sharded=True, queries=2),
        "bf16, FSDP2, in two parts": vary(mixed, sharded=True, accumulated=2),
        "bf16, FSDP2, recomputed": vary(mixed, sharded=True, again=True),
    }


def measured(options: argparse.Namespace, name: str, folder: Path) -> list[dict[str, Any]]:
    """A row per case; one that does not fit says so, and the others go on."""
    rows: list[dict[str, Any]] = []
    for way, case in cases(options, name, folder).items():
        expected = case.estimate(case.batch()).device
        row: dict[str, Any] = {"way": way, "estimate": round(expected / GIB, 4)}
        try:
            row |= figures(options, case, training.train(case, options.steps), expected)
        except torch.cuda.OutOfMemoryError:
            row["peak GiB"] = "out of memory"
        if "first loss" in row and case.queries == 1:  # of other queries it is another loss
            before = next((each["first loss"] for each in rows if "first loss" in each), row["first loss"])
            row["apart"] = abs(row["first loss"] - before) / abs(before)
        rows.append(row)
    return rows


def figures(
    options: argparse.Namespace, case: training.Case, found: training.Trained, expected: float
) -> dict[str, Any]:
    """What is told of a training that ended."""
    often = case.accumulated
    peak = options.peak * 1e12 if options.peak else None
    if options.device == "cuda":
        peak = peak or peak_flops(torch.cuda.get_device_name())
    return {
        "s/step": found.pace,
        "tokens/s": often * found.tokens / found.pace,
        "MFU": often * found.flops / (found.pace * peak) if peak else None,
        "peak GiB": round(found.peak / GIB, 4),
        "ratio": round(expected / found.peak, 3),
        # Lightning divides the loss of a part by the number of parts.
        "first loss": found.losses[0] * often,
        "last loss": found.losses[-1] * often,
    }


def resume(options: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """Shards saved in the middle, read by a new training, and gone on with: is it the same, bit by bit?"""
    case = cases(options, name, folder)["bf16, FSDP2"]
    kept = folder / "checkpoints"
    torch.use_deterministic_algorithms(mode=True)
    try:
        whole = training.weights(training.train(case, 4, watch=False).module)
        begun = training.weights(training.train(case, 2, keep=kept, watch=False).module)
        on = training.train(case, 4, resumed=True, keep=kept, watch=False)
    finally:
        torch.use_deterministic_algorithms(mode=False)
    found = training.weights(on.module)
    moved = sum(not torch.equal(found[name], begun[name]) for name in found)
    return {
        "resumed after step": 4 - len(on.losses),
        "weights that moved since": f"{moved} of {len(found)}",
        "bitwise the same": all(torch.equal(found[name], whole[name]) for name in whole),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """All rows; what there is no figure for is n/a."""
    head = f"{COLUMNS[0]:28}" + "".join(f"{name:>14}" for name in COLUMNS[1:])
    told = (f"{row['way']:28}" + "".join(f"{_cell(name, row.get(name)):>14}" for name in COLUMNS[1:]) for row in rows)
    return "\n".join([head, *told])


def _cell(name: str, value: Any) -> str:  # noqa: ANN401
    if value is None:
        return "n/a"
    if isinstance(value, str):
        return value
    styles = {"tokens/s": ",.0f", "MFU": ".1%", "ratio": ".3f", "apart": ".1e"}
    return f"{value:{styles.get(name, '.4f')}}"


if __name__ == "__main__":
    main()
