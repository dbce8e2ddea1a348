"""The verb `report`: a sweep as one page, with its pictures, its tables, and what they do not say."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd  # type: ignore[import-untyped]

from .. import jsonl
from .beta_curves import draw_beta_curves, margins_of_files
from .collect import RULE, histories_frame, sweep_record
from .costs import draw_cost
from .curves import TRAINING, draw_differences, draw_training
from .heatmap import draw_grid
from .page import Picture, Report, as_html, as_markdown
from .results import Results, collected
from .tables import Table, cells_table, excluded_table, promoted_table, record_table, runs_table
from .wording import findings, notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)
_DPI = 150
_CURVE = 3
"""So many points are a curve."""
_CAPTIONS = {
    "wk_grid": (
        "The grid",
        (
            "Each cell once, with all of its seeds, and the baseline once, over all values of an axis that "
            "means nothing for it."
        ),
    ),
    "differences": (
        "Differences from the baseline",
        "Filled: a paired test on the same items tells it from the baseline, after Holm's correction.",
    ),
    "beta_curves": (
        "β over δ",
        (
            "β of a pair by its margin, for every w and k of the grid; behind the lines lie the margins "
            "that were measured, if any are known."
        ),
    ),
    "training": (
        "Through the training",
        "Means over seeds at the steps that all of them logged, with bands from the lowest to the highest.",
    ),
    "cost": (
        "Performance and cost",
        "Small dots are runs, marks are cells with their intervals. Costs are those of the training alone.",
    ),
}
"""Titles and captions of the pictures, in their order."""


def report(
    out: Path,
    sweep: Path | None = None,
    run: str | None = None,
    tracking: str = "sqlite:///mlflow.db",
    metric: str | None = None,
    baseline: str | None = None,
    fix: dict[str, bool | float | str] | None = None,
    ranked: Path | None = None,
    scores: Path | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> None:
    """Tell what a sweep found: heat map, β(δ), training, cost, tables, and what can be told from the baseline.

    Results are read from MLflow alone. The folder gets `report.html`, which needs nothing beside it, the same as
    `report.md`, the pictures (`wk_grid.png` is the heat map) and the numbers as CSV; those that are there are replaced.

    Args:
        out: Folder of the report.
        sweep: Folder of the sweep, which knows where its results are kept.
        run: The sweep's parent run in MLflow, instead of its folder.
        tracking: Where that run is kept; a sweep's folder knows it.
        metric: What is compared; default: the one that the sweep declared.
        baseline: The cell that all are compared with; default: the only one with this role.
        fix: Values of axes that are not drawn, where more than two vary, e.g. {"data.pairs": "all"}.
        ranked: Rankings, to measure δ where the runs have not kept theirs; needs scores.
        scores: Rewards of these responses, as `mmrlhf score --reward` writes them.
        level: Of the intervals; what is left to 1 is the error that Holm's correction allows in all tests together.
        resamples: Draws of each bootstrap and permutation test.
        seed: Of these draws.
    """
    if (sweep is None) == (run is None):
        raise ValueError("report: expected either --sweep FOLDER or --run PARENT_RUN, got both or neither; give one")
    if (ranked is None) != (scores is None):
        raise ValueError("report: expected --ranked and --scores together, got one of them; give both or neither")
    uri, parent = sweep_record(sweep) if sweep is not None else (tracking, str(run))
    measured = margins_of_files(ranked, scores) if ranked and scores else None
    asked: dict[str, Any] = {"baseline": baseline, "fix": fix, "margins": measured}
    asked |= {"level": level, "resamples": resamples, "seed": seed}
    found = collected(uri, parent, metric, **asked)
    out.mkdir(parents=True, exist_ok=True)
    _write(out, found, drawn(found))
    log.info("%s; %s", found.chosen.ledger, out / "report.html")


def drawn(found: Results) -> dict[str, Figure]:
    """The pictures of a report by the names of their files; those of which nothing is known are left out."""
    used, up, across = found.chosen.used, found.up, found.across
    shown: dict[str, Any] = {"metric": found.metric, "percent": found.items is not None}
    chosen: dict[str, Any] = {"selected": found.selected, **shown}
    pictures = {"wk_grid": draw_grid(found.cells, up, across, level=found.level, **chosen)}
    if found.cells["p"].notna().any():
        pictures["differences"] = draw_differences(found.cells, level=found.level, **shown)
    rules = used[["cell", *RULE]].rename(columns=lambda name: name.removeprefix("rule."))
    if rules["w"].notna().any():
        pictures["beta_curves"] = draw_beta_curves(rules, found.margins)
    if (histories := _histories(found)) is not None:
        metrics = list(dict.fromkeys(histories["metric"]))
        pictures["training"] = draw_training(histories, used, up, across, metrics=metrics, baseline=found.baseline)
    return pictures | {"cost": draw_cost(found.cells, used, up, across, **chosen)}


def _histories(found: Results) -> pd.DataFrame | None:
    """How validation went or, where that was one point, the training itself; None where nothing was logged."""
    used, histories = found.chosen.used, None
    for split in ("val", "train"):
        metrics = [name for name in (f"{split}/{each}" for each in TRAINING) if name in used]
        if metrics and (histories is None or histories["step"].nunique() < _CURVE):
            histories = histories_frame(found.uri, used["run"], metrics)
    return histories


def tables(found: Results) -> list[Table]:
    """The tables of a report."""
    percent, excluded = found.items is not None, found.chosen.excluded
    made = [cells_table(found.cells, found.metric, percent, found.level)]
    if found.parent.selection is not None:
        told = {name: value for name, value in found.parent.selection.items() if name not in ("candidates", "excluded")}
        made.append(record_table("What was declared, and what was selected by it", told))
    if found.test is not None:
        name = f"{found.parent.test_split}/{found.metric}"
        made.append(cells_table(found.test, name, percent, found.level))
    if found.promoted is not None:
        made.append(promoted_table(found.promoted, found.cells, found.metric, percent))
    return [*made, runs_table(found.chosen.used, found.metric, percent), excluded_table(excluded)]


def _write(out: Path, found: Results, pictures: dict[str, Figure]) -> None:
    parts: list[Picture | Table] = []
    for name, figure in pictures.items():
        png = as_png(figure)
        jsonl.replace(out / f"{name}.png", png)
        parts.append(Picture(*_CAPTIONS[name], f"{name}.png", png, float(figure.get_figwidth())))
    first, *rest = tables(found)
    parts = [*parts[:1], first, *parts[1:], *rest]
    source = f"MLflow run {found.parent.run}; {found.chosen.ledger}"
    page = Report(f"Sweep {found.parent.name}", source, findings(found), parts, notes(found), found.parent.settings)
    jsonl.replace(out / "report.html", as_html(page).encode())
    jsonl.replace(out / "report.md", as_markdown(page).encode())
    frames = {"cells": found.cells, "runs": found.chosen.used, "excluded": found.chosen.excluded}
    frames |= {} if found.test is None else {"test": found.test}
    for name, frame in frames.items():
        jsonl.replace(out / f"{name}.csv", frame.to_csv(index=False).encode())


def as_png(figure: Figure) -> bytes:
    """A picture that is sharp on paper; the same figure gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, dpi=_DPI, format="png", metadata={"Software": None})
    return file.getvalue()
