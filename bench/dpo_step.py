"""How fast a training step of MM-DPO is: ours against TRL's DPOTrainer, against naive all-pairs, and against the limit.

    python bench/dpo_step.py                              # under 3 minutes; the last line is one JSON object
    python bench/dpo_step.py --shape brief                # or prop, long: other small models and lengths
    python bench/dpo_step.py --shape 7b --device cuda     # or 0.5b: real shapes, random weights, bfloat16, with MFU

A step is the loss of all 6 pairs of 4 ranked responses to one picture, each pair with its own beta, forward and
backward, without an optimiser. Everybody has the same weights, frozen tower, tokens and pixels (compared by
`torch.equal`), the same attention and no activation checkpointing; on a CPU, one thread. Like is compared with like:
`cached` takes the reference's log-probs as given, `online` runs the reference forward in every step. TRL is the
installed release with its real `training_step`, a pair at a time, which is its cheapest. For images it knows `online`
only; `cached` is our patch of it, and the best that it could do. Its head scores labels only, as it does on CUDA.

Gradients are compared first, in the pass that also warms up; then all take turns, and the median counts: of CPU time
on a CPU, of wall time on a GPU. Rows marked `once` are asides, timed in that first pass only. Memory is what one step
takes above the loaded model, on a CPU in a fresh process each; for those who work by pairs it is that of one batch of
pairs. The limit is an ordinary causal pass over as many tokens as there are unique ones, picture and backward
included. It needs TRL beside the package: `pip install "trl>=1.16"`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import dpo_shapes as shapes
import torch
from dpo_opponents import contestant, difference, peak_mib, reference_logps, twin, useful_flops
from torch import Tensor

AT_LEAST = {"vs_trl_cached": 9, "vs_trl_online": 10, "vs_naive": 12}
AT_MOST = {"memory_vs_naive": 0.45, "grad_rel_err": 1e-5, "vs_limit": 1.1}
"""The bars, which hold for the default shape on a CPU."""
SAME = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Gradients that differ by more are not of the same step, and nothing is timed."""
PEAK_TFLOPS = 989.0  # of an H100 or H200 in bfloat16, dense
TITLES = {"trl cached": "TRL cached (our patch)", "trl online": "TRL online (stock)", "limit": "plain causal pass"}
MEASURED = ("shared_prefix", "separate", "trl", "naive")


def main() -> None:
    options = arguments()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    bench = Bench(options)
    if options.measure:
        print(bench.highest(options.measure))
        return
    print(", ".join(f"{name} {value}" for name, value in bench.told().items()), flush=True)
    memory = memories(bench)
    bench.ask_reference()
    rows = rows_of(bench)
    first = first_pass(bench, rows)
    seconds = in_turn(bench, rows, first)
    result = summary(bench, first, seconds, memory)
    print(table(bench, rows, first, seconds, memory))
    print(json.dumps(result))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="lite")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--queries", type=int, default=1, help="in one micro-batch of ours")
    parser.add_argument("--pairs-per-batch", type=int, default=1, help="of TRL and of naive; on a CPU 1 is cheapest")
    parser.add_argument("--response", type=int, help="tokens of a response, instead of the shape's")
    parser.add_argument("--tiles", type=int, nargs=2, help="rows and columns of a picture, instead of the shape's")
    parser.add_argument("--warm-up", type=int, help="passes; default: 1 on a CPU, 5 on a GPU")
    parser.add_argument("--repeat", type=int, help="passes that count; default: 3 on a CPU, 20 on a GPU")
    parser.add_argument("--peak", type=float, default=PEAK_TFLOPS, help="TFLOP/s of the GPU, for MFU")
    parser.add_argument("--measure", choices=MEASURED, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    pairs = 6 * options.queries
    if pairs < 1 or options.pairs_per_batch < 1 or pairs % options.pairs_per_batch:
        parser.error(f"--pairs-per-batch: expected a divisor of {pairs} pairs, got {options.pairs_per_batch}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a GPU that torch can see, got none; run it on a machine that has one")
    if options.device == "cpu" and shapes.SHAPES[options.shape].gpu:
        parser.error(f"--shape {options.shape}: expected --device cuda, got cpu, on which one step takes an hour")
    if not importlib.util.find_spec("trl"):
        parser.error('expected TRL as opponent, got none; run: pip install "trl>=1.16"')
    return options


# Measuring -------------------------------------------------------------------------------------------------


class Seconds(NamedTuple):
    """What a step took."""

    cpu: float
    wall: float


class Bench(shapes.Setting):
    """Who works on a setting, and how that is measured."""

    def ask_reference(self) -> None:
        """What `cached` rows are given."""
        self.problem = self.problem._replace(reference=reference_logps(twin(self.reference), self.problem))

    def clocked(self, step: Callable[[], None]) -> Seconds:
        """Of one step, from no gradients to all of them."""
        self.forget()
        self.tokens = 0
        started = time.process_time(), time.perf_counter()
        step()
        if self.gpu:
            torch.cuda.synchronize()
        return Seconds(time.process_time() - started[0], time.perf_counter() - started[1])

    def forget(self) -> None:
        for weight in self.weights:
            weight.grad = None
        gc.collect()
        if self.gpu:
            torch.cuda.synchronize()

    def highest(self, name: str) -> float:
        """MiB above the loaded model that one micro-batch takes."""
        pairs = len(self.problem.pairs) if name in ("shared_prefix", "separate") else self.options.pairs_per_batch
        problem = self.problem._replace(pairs=self.problem.pairs[:pairs], betas=self.problem.betas[:pairs])
        step = partial(contestant(self, name, problem), online=False)
        step()  # brings libraries into memory
        self.forget()
        return peak_mib(step, self.gpu)


# Passes -----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One line of the table."""

    name: str
    step: Callable[[], None]
    rival: str
    """Our row of the same kind."""
    once: bool = False


class First(NamedTuple):
    """What the first pass tells of a row."""

    seconds: Seconds
    tokens: int
    error: float | None
    """Of the gradient, against naive cached."""
    to_ours: float | None


def rows_of(bench: Bench) -> list[Row]:
    """Naive and ours come first: the others' gradients are compared with theirs."""
    rows = []
    for name in ("naive", "shared_prefix", "separate", "trl"):
        step = contestant(bench, name, bench.problem)
        for online in (False, True):
            mode = "online" if online else "cached"
            aside = online and name in ("naive", "separate") and not bench.gpu
            rows.append(Row(f"{name} {mode}", partial(step, online=online), f"shared_prefix {mode}", aside))
    return [*rows, Row("limit", contestant(bench, "limit", bench.problem), "shared_prefix cached")]


def first_pass(bench: Bench, rows: list[Row]) -> dict[str, First]:
    """Every row once, with its gradients; it ends the run where these differ."""
    found: dict[str, First] = {}
    kept: dict[str, list[Tensor]] = {}
    for row in rows:
        seconds = bench.clocked(row.step)
        gradients = [weight.grad for weight in bench.weights]
        if row.name in ("naive cached", "shared_prefix cached"):
            kept[row.name] = [gradient.cpu() for gradient in gradients]  # a GPU's memory is for the steps
        errors = [
            difference(gradients, kept[name]) if row.name != "limit" and name in kept else None
            for name in ("naive cached", "shared_prefix cached")
        ]
        found[row.name] = First(seconds, bench.tokens, *errors)
        if errors[0] is not None and not errors[0] < SAME[bench.dtype]:
            sys.exit(f"{row.name}: expected the gradient of naive all-pairs, got one that differs by {errors[0]:.1e}")
    return found


def in_turn(bench: Bench, rows: list[Row], first: dict[str, First]) -> dict[str, Seconds]:
    """The medians; who begins changes from pass to pass."""
    warm_up, repeat = bench.options.warm_up or (5 if bench.gpu else 1), bench.options.repeat or (20 if bench.gpu else 3)
    running = [row for row in rows if not row.once]
    taken: dict[str, list[Seconds]] = {row.name: [] for row in running}
    for number in range(warm_up - 1 + repeat):
        begin = number % len(running)
        for row in running[begin:] + running[:begin]:
            seconds = bench.clocked(row.step)
            if number >= warm_up - 1:
                taken[row.name].append(seconds)
    medians = {name: Seconds(*map(statistics.median, zip(*all_of, strict=True))) for name, all_of in taken.items()}
    return {row.name: medians.get(row.name, first[row.name].seconds) for row in rows}


def memories(bench: Bench) -> dict[str, float]:
    """Of one micro-batch each; on a CPU two processes at a time, before anything is timed."""
    if bench.gpu:
        return {name: bench.highest(name) for name in MEASURED}

    # What is freed goes back to the system at once, so that tensors are measured and not the allocator's reserves.
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}

    def of(name: str) -> float:
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", name]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=exact).stdout  # noqa: S603
        return float(told.splitlines()[-1])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(MEASURED, pool.map(of, MEASURED), strict=True))


# What is told -----------------------------------------------------------------------------------------------


def summary(
    bench: Bench, first: dict[str, First], seconds: dict[str, Seconds], memory: dict[str, float]
) -> dict[str, Any]:
    """The object of the last line: ratios are the opponent's time over ours, for the limit ours over its."""
    clock = "wall" if bench.gpu else "cpu"
    taken = {name: getattr(each, clock) for name, each in seconds.items()}
    cached, online = taken["shared_prefix cached"], taken["shared_prefix online"]
    ratios = {
        "vs_trl_cached": round(taken["trl cached"] / cached, 2),
        "vs_trl_online": round(taken["trl online"] / online, 2),
        "vs_naive": round(taken["naive cached"] / cached, 2),
        "vs_naive_online": round(taken["naive online"] / online, 2),
        "vs_separate": round(taken["separate cached"] / cached, 2),
        "vs_limit": round(cached / taken["limit"], 3),
        "memory_vs_naive": round(memory["shared_prefix"] / memory["naive"], 3),
        "memory_vs_trl": round(memory["shared_prefix"] / memory["trl"], 3),
        "tokens_vs_limit": round(first["shared_prefix cached"].tokens / bench.problem.unique_tokens, 3),
        "grad_rel_err": max(first[f"{name} cached"].error for name in ("shared_prefix", "separate")),
        "grad_rel_err_trl": first["trl cached"].to_ours,
    }
    result = bench.told() | ratios
    if bench.gpu:
        result["mfu"] = {name: round(mfu(bench, each), 4) for name, each in seconds.items()}
    elif bench.options.shape == "lite":
        result["missed"] = [name for name, bar in AT_LEAST.items() if ratios[name] < bar]
        result["missed"] += [name for name, bar in AT_MOST.items() if ratios[name] > bar]
    times = {name: round(each, 4) for name, each in taken.items()}
    return result | {f"{clock}_s": times, "memory_mib": memory, "batches_ready_s": bench.ready}


def mfu(bench: Bench, seconds: Seconds) -> float:
    """The share of the GPU's peak that goes into work that nobody can do without."""
    return useful_flops(bench.policy, bench.problem) / (seconds.wall * bench.options.peak * 1e12)


def table(
    bench: Bench, rows: list[Row], first: dict[str, First], seconds: dict[str, Seconds], memory: dict[str, float]
) -> str:
    clock = "wall" if bench.gpu else "cpu"
    columns = ("CPU s", "wall s", "x ours", "MiB", "tokens", "x unique", "gradient off", "MFU")
    lines = [f"{'':24}" + "".join(f"{column:>13}" for column in columns[: None if bench.gpu else -1])]
    for row in rows:
        taken, told = seconds[row.name], first[row.name]
        cells = [f"{taken.cpu:.3f}", f"{taken.wall:.3f}"]
        cells.append(f"{getattr(taken, clock) / getattr(seconds[row.rival], clock):.2f}")
        who, _, mode = row.name.partition(" ")
        cells.append(f"{memory[who]:,.0f}" if mode == "cached" else "")
        cells += [f"{told.tokens:,}", f"{told.tokens / bench.problem.unique_tokens:.2f}"]
        cells.append("" if told.error is None else f"{told.error:.1e}")
        cells += [f"{mfu(bench, taken):.1%}"] if bench.gpu else []
        lines.append(
            f"{TITLES.get(row.name, row.name):24}" + "".join(f"{cell:>13}" for cell in cells) + "  once" * row.once
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
