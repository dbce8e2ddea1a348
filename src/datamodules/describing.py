"""The verb `data describe`: what a set of shards holds, as a table and as a figure."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import jsonl
from ..progress import track
from ..records import RankedQuery
from .indexing import ranked_of
from .manifest import Manifest
from .reader import Shards
from .shards import REQUIRED
from .splits import SPLITS
from .tally import NONE, Tally

log = logging.getLogger(__name__)
_DPI = 110


@dataclass
class Description:
    """What describing counts, by split where a row has splits."""

    tallies: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    ranks: Counter[int] = field(default_factory=Counter)
    """How many responses hold each rank, 1 for the best."""
    models: Counter[str] = field(default_factory=Counter)
    prompt_lengths: list[int] = field(default_factory=list)
    """In characters."""
    response_lengths: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """In characters, of the best, the worst and the responses between them."""

    def add(self, split: str, ranked: RankedQuery) -> None:
        """Count one query."""
        self.tallies[split].add(ranked)
        self.prompt_lengths.append(len(ranked.query.prompt))
        worst = max(ranked.ranks)
        for response, rank in zip(ranked.responses, ranked.ranks, strict=True):
            self.ranks[rank] += 1
            self.models[response.model or NONE] += 1
            place = "best" if rank == 1 else "worst" if rank == worst else "between"
            self.response_lengths[place].append(len(response.text))


def describe(shards: Path, figure: Path | None = None) -> None:
    """Print what a set of shards holds: queries, categories, sources, responses, pairs, ranks and lengths.

    Args:
        shards: The folder of a finished set.
        figure: Also draw it to this PNG.
    """
    found = described(shards)
    show(found, str(shards))
    if figure is not None:
        from .figures import drawn  # late: matplotlib

        drawn(found, str(shards)).savefig(figure, dpi=_DPI)
        log.info("figure: %s", figure)


def described(shards: Path) -> Description:
    """Count what a finished set holds."""
    manifest = Manifest.read(shards)
    found = Description()
    total = sum(manifest.samples.values())
    samples = (
        (split, index) for split in SPLITS if split in manifest.samples for index in range(manifest.samples[split])
    )
    opened = {split: Shards(shards, split) for split in SPLITS if split in manifest.samples}
    for split, index in track(samples, "reading", total=total):
        parts = opened[split].parts(index)
        try:
            found.add(split, ranked_of(jsonl.loads(parts[REQUIRED])))
        except ValueError as error:
            raise ValueError(f"{opened[split].place(index)}: expected a ranked query, but {error}") from error
    return found


def show(found: Description, title: str) -> None:
    """Print the tables."""
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for heading in [*found.tallies, "all"]:
        table.add_column(heading, justify="right")
    whole = Tally()
    for tally in found.tallies.values():
        whole.merge(tally)
    columns = [*found.tallies.values(), whole]
    for kind, heading in _HEADINGS.items():
        names = list(whole.counts[kind])
        names = sorted(names, key=int) if kind in ("responses", "levels") else sorted(names)
        for name in names:
            table.add_row(escape(heading.format(name)), *(f"{tally.counts[kind][name]:,}" for tally in columns))
        table.add_section()
    table.add_row("mean pairs per query", *(f"{tally.mean_pairs():.2f}" for tally in columns))
    Console().print(table)
    lengths = Table(title="characters", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "n", "median", "90 %", "longest"):
        lengths.add_column(heading, justify="left" if not heading else "right")
    kinds = {"prompt": found.prompt_lengths}
    kinds |= {f"{place} response": found.response_lengths[place] for place in ("best", "between", "worst")}
    for name, values in kinds.items():
        ordered = sorted(values)
        told = (ordered[len(ordered) // 2], ordered[len(ordered) * 9 // 10], ordered[-1]) if ordered else (0, 0, 0)
        lengths.add_row(name, f"{len(ordered):,}", *(f"{value:,}" for value in told))
    Console().print(lengths)


_HEADINGS = {
    "totals": "{}",
    "category": "category {}",
    "source": "source {}",
    "media": "{}s",
    "responses": "{} responses",
    "levels": "{} different ranks",
    "pairs": "pairs, {}",
}
