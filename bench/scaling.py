"""What 0.5B, 7B and 72B need on 8 to 512 GPUs, on paper: the tables of docs/scaling.md.

    python bench/scaling.py            # prints them; under a minute, no GPU, no weights

Shapes are those of LLaVA-OneVision-Qwen2; models are built without weights. The query is one picture of four tiles of
384 pixels (2,976 tokens before the responses), and four responses of 150 tokens. Figures follow from
src/modules/memory.py, flops.py and pace.py, with what the latter assumes, and from `FEED` below.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import dpo_shapes as shapes
import torch

from mmrlhf.modules.backbone import Backbone, backbone_of
from mmrlhf.modules.loading import Freeze, Lora, adapted, frozen
from mmrlhf.modules.memory import Batches, Estimate, estimate
from mmrlhf.modules.pace import A100_80, H100, H200, Feed, Machine, Pace, Query, pace, strains
from mmrlhf.modules.weights import empty_model
from mmrlhf.ranks import Layout

SHAPES = {
    "0.5B": shapes.SHAPES["0.5b"],
    "7B": shapes.SHAPES["7b"],
    "72B": dataclasses.replace(
        shapes.SHAPES["7b"], width=8192, layers=80, inner=29_568, heads=64, kv_heads=8, vocabulary=152_064
    ),
}
QUERY = Query((2976 + 60, (150, 150, 150, 150)), supervised=600, patches=4 * 729)
FEED = Feed(cores=64, queries_per_core=40.0, bytes_per_query=150e3, disk=1e9)
"""Of a node. A core decodes and encodes 46 such pictures per second here, and a 144 kB JPEG holds one."""
GLOBAL_BATCH = 512
"""Queries per step: as many as the most ranks need."""
GIB = 2**30


class Row(NamedTuple):
    """One layout of one model, and what it needs."""

    model: str
    gpus: int
    layout: str
    again: bool
    found: Estimate
    pace: Pace


def main() -> None:
    print("\n\n".join(tables()))


def tables() -> Iterator[str]:
    """The tables of the document, in its order."""
    yield fits()
    yield steps()
    yield machines()
    yield feeds()
    yield breaks()


@cache
def body_of(model: str, lora: bool = False) -> Backbone:
    """The model without weights; with adapters, its weights are kept in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        shapes.build_config(SHAPES[model]).save_pretrained(folder)
        body = backbone_of(empty_model(Path(folder), torch.bfloat16 if lora else torch.float32, "sdpa", False))
    return adapted(body, Lora()) if lora else frozen(body, Freeze())


@cache
def row(model: str, gpus: int, way: str, again: bool, machine: Machine = H100, global_batch: int = GLOBAL_BATCH) -> Row:
    """One line: `way` is DDP, FSDP, HSDP (a copy per node) or FSDP+LoRA."""
    body = body_of(model, way.endswith("LoRA"))
    nodes = max(1, gpus // machine.gpus_per_node)
    kind: Any = "ddp" if way.startswith("DDP") else "sharded"
    layout = Layout(gpus, kind, replicas=nodes if way == "HSDP" else 1, mixed=True)
    tokens = QUERY.lengths[0] + sum(QUERY.lengths[1])
    batches = Batches(tokens, global_batch, 1, steps=1, mean_tokens=tokens, patches=QUERY.patches, again=again)
    return Row(model, gpus, way, again, estimate(body, layout, batches), pace(body, layout, batches, QUERY, machine))


# Tables -----------------------------------------------------------------------------------------------------


def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """In Markdown."""
    lines = [title, "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def fits() -> str:
    """What a GPU holds, and where that is highest."""
    cells = []
    for model, gpus, way in (
        *((model, 8, way) for model in ("0.5B", "7B") for way in ("DDP", "FSDP", "DDP+LoRA", "FSDP+LoRA")),
        *(("7B", gpus, "FSDP") for gpus in (16, 512)),
        *(("72B", gpus, way) for gpus in (8, 16, 32, 64, 512) for way in ("FSDP", "FSDP+LoRA")),
        ("72B", 512, "HSDP"),
    ):
        kept, again = (row(model, gpus, way, again).found for again in (False, True))
        constant = kept.weights + kept.gradients + kept.optimiser
        marks = [_marked(each.device) for each in (kept, again)]
        cells.append((model, str(gpus), way, _gib(constant), _gib(kept.activations), *marks))
    columns = ("model", "GPUs", "layout", "weights, gradients, AdamW", "activations", "per GPU", "recomputed")
    return table(
        "GiB per GPU (bf16-mixed, one query at once; **bold**: above 72.7, does not fit 80 GB)", columns, cells
    )


def steps() -> str:
    """Seconds of a step on H100s, and what bounds them."""
    cells = []
    for model in SHAPES:
        for gpus in (8, 16, 64, 256, 512):
            for way in ("DDP", "FSDP", "HSDP") if gpus > 8 else ("DDP", "FSDP"):
                found = _cheapest(model, gpus, way)
                if found is None:
                    continue
                speed = found.pace
                cells.append(
                    (
                        model,
                        str(gpus),
                        way + (", recomputed" if found.again else ""),
                        *(f"{each:.2f}" for each in (speed.arithmetic, speed.tower, speed.network, speed.seconds)),
                        f"{speed.queries_per_second:,.0f}",
                        f"{speed.utilisation(H100, gpus):.0%}",
                        speed.bound,
                    )
                )
    columns = ("model", "GPUs", "layout", "arithmetic", "tower", "network", "step", "queries/s", "of peak", "bound by")
    return table(f"Seconds of a step of {GLOBAL_BATCH} queries on H100s, of layouts that fit", columns, cells)


def machines() -> str:
    """The same training on other GPUs."""
    cells = []
    for model, gpus in (("0.5B", 8), ("7B", 16), ("72B", 256)):
        for machine in (A100_80, H100, H200):
            found = _cheapest(model, gpus, "FSDP", machine)
            if found is None:
                cells.append((model, str(gpus), machine.name, "does not fit", "", "", ""))
                continue
            per_hour = 3600 * found.pace.queries_per_second
            again = "recomputed" if found.again else "kept"
            share = f"{found.found.device / machine.memory:.0%}"
            cells.append(
                (model, str(gpus), machine.name, again, share, f"{found.pace.seconds:.2f}", f"{per_hour:,.0f}")
            )
    columns = ("model", "GPUs", "GPU", "activations", "of its memory", "step, s", "queries per hour")
    return table("FSDP on other GPUs", columns, cells)


def feeds() -> str:
    """What a node must read and encode."""
    cells = []
    for model, gpus in (("0.5B", 8), ("7B", 16), ("72B", 64)):
        found = _cheapest(model, gpus, "FSDP")
        if found is None:
            continue
        per_node = found.pace.queries_per_second / (gpus / H100.gpus_per_node)
        cells.append(
            (
                model,
                f"{per_node:.1f}",
                f"{per_node * FEED.bytes_per_query / 1e6:.1f}",
                f"{per_node / FEED.queries_per_core:.1f}",
                f"{per_node / (FEED.cores * FEED.queries_per_core):.1%}",
            )
        )
    columns = ("model", "queries/s", "MB/s", "cores that decode and encode", f"of {FEED.cores} cores")
    return table("What a node of 8 H100s is fed", columns, cells)


def breaks() -> str:
    """How much of each limit is used, and which breaks first."""
    cells = []
    for model, way, many in (
        ("0.5B", "DDP", (8, 64, 512)),
        ("0.5B", "FSDP", (8, 64, 512)),
        ("7B", "FSDP", (8, 64, 512)),
        ("7B", "HSDP", (64, 512)),
        ("72B", "FSDP", (16, 64, 512)),
    ):
        for gpus in many:
            found = _cheapest(model, gpus, way) or row(model, gpus, way, again=True)
            used = strains(found.found, found.pace, H100, FEED)
            first = max(used, key=lambda name: used[name])
            cells.append((model, str(gpus), way, *(_percent(each) for each in used.values()), first))
    columns = ("model", "GPUs", "layout", "memory", "network", "global batch", "processors", "disk", "first")
    return table(f"How much of each limit is used (H100, {GLOBAL_BATCH} queries a step)", columns, cells)


def _percent(part: float) -> str:
    return f"{part:.0%}" if part >= 0.01 else f"{part:.2%}"


def _cheapest(model: str, gpus: int, way: str, machine: Machine = H100) -> Row | None:
    """With activations kept where they fit, else computed again; None where neither fits."""
    both = (row(model, gpus, way, again, machine) for again in (False, True))
    return next((each for each in both if each.found.device <= 0.92 * machine.memory), None)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def _marked(size: float) -> str:
    return f"**{_gib(size)}**" if size > 0.92 * H100.memory else _gib(size)


if __name__ == "__main__":
    main()
