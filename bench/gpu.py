"""A training on one GPU at real shapes: memory against the estimate of `--dry-run`, tokens per second, MFU, resume.

    python bench/gpu.py --out gpu.json                              # LLaVA-OneVision 0.5B and 7B on the first GPU
    python bench/gpu.py --shape middle                              # smaller, of the same kind
    python bench/gpu.py --device cpu --shape tiny                   # every line that a CPU can run, under a minute

Weights are random, nothing is downloaded. A step is of one query, a picture of four tiles and four ranked responses,
by the real module, strategy and optimiser. Of 0.5B everything but the tower is trained, in float32 weights. 7B would
need 16 bytes per weight for that, 122 GB and its activations, which no single GPU has: there adapters are trained over
weights in bfloat16. Memory is the most that was allocated after the first step; on a CPU it is the tensors that were
alive, which is slow to watch, so speeds are those of the watching. `apart` is the difference of the first loss to that
of the first row. Saved and resumed with deterministic kernels; 7B needs 40 GB of disk for that (TMPDIR). What fails is
told with its reason, and the others go on; figures are written after every row. The exit status is 1 where a row
failed or its memory is more than 15 % off the estimate, as that of some tiny ones is, or a resume was not the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
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


def main() -> int:
    options = arguments()
    results: list[dict[str, Any]] = []
    for name in options.shape:
        told = {"shape": name, **machine(options)}
        print(", ".join(f"{key} {value}" for key, value in told.items()), flush=True)
        results.append(told | {"rows": [], "resume": None, "estimate_missed": [], "failed": []})
        with tempfile.TemporaryDirectory() as folder:
            one_shape(options, results, Path(folder))
    wrong = [each for result in results for each in faults(result)]
    print("\n".join(wrong or [f"memory is within {WITHIN:.0%} of the estimate, nothing failed"]), flush=True)
    return int(bool(wrong))


def one_shape(options: argparse.Namespace, results: list[dict[str, Any]], folder: Path) -> None:
    """Measure the last of the results; what is known is told, and kept, at once."""
    result = results[-1]
    print(line(COLUMNS), flush=True)
    for row in measured(options, result["shape"], folder):
        result["rows"].append(row)
        if row.get("ratio") and not 1 - WITHIN <= row["ratio"] <= 1 + WITHIN:
            result["estimate_missed"].append(row["way"])
        if "failed" in row:
            result["failed"].append(row["way"])
        print(told_of(row), flush=True)
        keep(options, results)
    try:
        result["resume"] = resume(options, result["shape"], folder)
    except Exception as error:  # noqa: BLE001 - other shapes go on, whatever it is
        result["resume"] = {"failed": reason(error)}
    print(", ".join(f"{key}: {value}" for key, value in result["resume"].items()), flush=True)
    keep(options, results)


def keep(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Write all that is known."""
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


def faults(result: dict[str, Any]) -> Iterator[str]:
    """What is not as it should be with a shape, each on a line."""
    for row in result["rows"]:
        if row["way"] in result["estimate_missed"]:
            yield (
                f"{result['shape']}: {row['way']}: memory is more than {WITHIN:.0%} off the estimate: ratio "
                f"{row['ratio']:.3f}"
            )
        if "failed" in row:
            yield f"{result['shape']}: {row['way']}: failed: {row['failed']}"
    if not result["resume"].get("bitwise the same"):
        yield f"{result['shape']}: resumed: {result['resume'].get('failed', 'not bitwise the same')}"


def reason(error: Exception) -> str:
    """Why something failed, on one line."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


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


def measured(options: argparse.Namespace, name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """A row per case; one that fails, or does not fit, says why, and the others go on."""
    before: float | None = None
    for way, case in cases(options, name, folder).items():
        row: dict[str, Any] = {"way": way}
        try:
            expected = case.estimate(case.batch()).device
            row["estimate"] = round(expected / GIB, 4)
            row |= figures(options, case, training.train(case, options.steps), expected)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told, and the others go on
            row["failed"] = reason(error)
        if "first loss" in row and case.queries == 1:  # of other queries it is another loss
            before = before or row["first loss"]
            row["apart"] = abs(row["first loss"] - before) / abs(before)
        yield row


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


def told_of(row: dict[str, Any]) -> str:
    """A row of the table; what there is no figure for is n/a, and why it failed stands behind."""
    cells = line((row["way"], *(_cell(name, row.get(name)) for name in COLUMNS[1:])))
    return f"{cells}  failed: {row['failed']}" if "failed" in row else cells


def line(cells: Sequence[str]) -> str:
    return f"{cells[0]:28}" + "".join(f"{cell:>14}" for cell in cells[1:])


def _cell(name: str, value: Any) -> str:  # noqa: ANN401
    if value is None:
        return "n/a"
    styles = {"tokens/s": ",.0f", "MFU": ".1%", "ratio": ".3f", "apart": ".1e"}
    return f"{value:{styles.get(name, '.4f')}}"


if __name__ == "__main__":
    sys.exit(main())
