"""The verb `runs`: what MLflow keeps, as a table; two runs side by side; and what a run could not tell it yet."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..redaction import without_credentials
from ..tracked import SPOOL, Tracked
from ..tracker import Unreachable, absolute, answering, client_of, with_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)
USUAL = ("val/rewards/accuracies", "val/accuracy", "val/beta/mean", "ledger/device_seconds")
"""Metrics that a list shows where none is asked for, if they are there; before them those that sweeps declared."""
_MOST_PARAMS, _MOST_METRICS, _PAGE, _ID = 6, 4, 1000, 8


class Kept(NamedTuple):
    """A run as MLflow keeps it."""

    id: str
    name: str
    status: str
    started: float
    """In seconds since 1970."""
    seconds: float | None
    """None while it runs."""
    parent: str | None
    params: Mapping[str, str]
    metrics: Mapping[str, float]


def runs(  # the options of a verb
    tracking: str = "sqlite:///mlflow.db",
    experiment: str | None = None,
    parent: str | None = None,
    metric: list[str] | str | None = None,
    sort: str | None = None,
    descending: bool = False,
    compare: list[str] | str | None = None,
    flush: Path | None = None,
) -> None:
    """List the runs that MLflow keeps, compare some, or tell it what it missed.

    Runs are named by the beginning of their id, or by their name.

    Args:
        tracking: Where MLflow keeps them: a database or a server.
        experiment: Those of one experiment alone.
        parent: Those of one sweep alone, by its run.
        metric: Metrics to show, separated by commas; default: usual ones.
        sort: A metric or parameter by which runs are sorted; default: by their beginning.
        descending: Whether the largest comes first.
        compare: Show the parameters and metrics in which these runs differ instead, e.g. one,other.
        flush: Send what waits in the folder of a run, or of a sweep with all its runs, instead.
    """
    try:
        if flush is not None:
            _flush(flush)
            return
        uri = absolute(with_credentials(tracking))
        found = kept_runs(uri, experiment)
    except Unreachable as error:
        raise ValueError(f"the tracker does not answer: {error}; start it, or check the address") from error
    if compare is not None:
        shown = side_by_side([named(found, name) for name in _names(compare)])
    else:
        if parent is not None:
            above = named(found, parent)
            found = [run for run in found if above.id in {run.id, run.parent}]
        shown = listing(in_order(found, sort, descending), _names(metric) or usual(found))
    shown.caption = without_credentials(uri)
    Console().print(shown)


def _flush(folder: Path) -> None:
    """Send what waits in a folder and below."""
    spools = sorted(folder.rglob(SPOOL))
    if not spools:
        raise ValueError(f"{folder}: expected the folder of a run or a sweep with {SPOOL}, found none; check the path")
    for spool in spools:
        Tracked.of(spool.parent).send()
        log.info("%s: nothing waits any more", spool)


def _names(told: list[str] | str | None) -> list[str]:
    words = told.split(",") if isinstance(told, str) else told or []
    return [word.strip() for word in words if word.strip()]


def kept_runs(uri: str, experiment: str | None = None) -> list[Kept]:
    """All runs of a tracker, or those of one experiment."""
    with answering(uri):
        client = client_of(uri)
        known = {each.name: each.experiment_id for each in client.search_experiments()}
    if experiment is not None and experiment not in known:
        raise ValueError(f"experiment: expected one of {', '.join(sorted(known))}, got {experiment!r}")
    wanted = [known[experiment]] if experiment is not None else list(known.values())
    with answering(uri):
        return [_kept(run) for run in _pages(client, wanted)]


def _pages(client: MlflowClient, experiments: list[str]) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_runs(experiments, max_results=_PAGE, page_token=token, order_by=["start_time ASC"])
        yield from page
        if not (token := page.token):
            return


def _kept(run: Run) -> Kept:
    info, data = run.info, run.data
    ended = info.end_time if info.status != "RUNNING" else None
    return Kept(
        info.run_id,
        info.run_name,
        info.status,
        info.start_time / 1000,
        None if ended is None else (ended - info.start_time) / 1000,
        data.tags.get("mlflow.parentRunId"),
        data.params,
        data.metrics,
    )


def named(found: Sequence[Kept], name: str) -> Kept:
    """The one run whose id begins so, or that is called so."""
    fitting = [run for run in found if run.id.startswith(name)] or [run for run in found if run.name == name]
    if len(fitting) != 1:
        ids = ", ".join(run.id[:_ID] for run in fitting) or "none"
        raise ValueError(f"run {name!r}: expected one whose id begins so, or that is called so, got {ids}")
    return fitting[0]


def in_order(found: Sequence[Kept], sort: str | None, descending: bool) -> list[tuple[int, Kept]]:
    """The runs with their depth: children behind their parent, and all sorted; those without the value come last."""
    values: dict[str, float | str] = {run.id: run.started for run in found}
    if sort is not None:
        values = {run.id: value for run in found if (value := _value(run, sort)) is not None}
        if found and not values:
            raise ValueError(f"sort: expected a metric or parameter of these runs, got {sort!r}")
    ranked = [run for run in found if run.id in values]
    numbers = all(isinstance(value, float) for value in values.values())
    ranked.sort(key=lambda run: values[run.id] if numbers else str(values[run.id]), reverse=descending)
    ranked += [run for run in found if run.id not in values]
    ids = {run.id for run in found}
    rows: list[tuple[int, Kept]] = []
    for run in ranked:
        if run.parent not in ids:
            rows += [(0, run), *((1, child) for child in ranked if child.parent == run.id)]
    return rows


def _value(run: Kept, name: str) -> float | str | None:
    if name in run.metrics:
        return None if run.metrics[name] != run.metrics[name] else run.metrics[name]
    text = run.params.get(name)
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def usual(found: Sequence[Kept]) -> list[str]:
    """Metrics worth a column: what sweeps declared to look at, and a few that say most."""
    there = {name for run in found for name in run.metrics}
    declared = [run.params["metric"] for run in found if "metric" in run.params]
    wanted = [name for told in declared for name in sorted(there) if name == told or name.endswith(f"/{told}")]
    return list(dict.fromkeys([*wanted, *(name for name in USUAL if name in there)]))[:_MOST_METRICS]


def differing(found: Sequence[Kept]) -> list[str]:
    """The parameters in which runs differ."""
    names = dict.fromkeys(name for run in found for name in run.params)
    return [name for name in names if len({run.params.get(name) for run in found}) > 1]


def short(names: Sequence[str]) -> dict[str, str]:
    """The shortest endings of dotted names by which they are still told apart.

    >>> short(["model.beta.w", "model.loss.w", "run.seed"])
    {'model.beta.w': 'beta.w', 'model.loss.w': 'loss.w', 'run.seed': 'seed'}
    """
    endings = {name: [".".join(name.split(".")[at:]) for at in range(name.count("."), -1, -1)] for name in names}
    every = [ending for each in endings.values() for ending in each]
    return {name: next((one for one in endings[name] if every.count(one) == 1), name) for name in names}


def listing(rows: Sequence[tuple[int, Kept]], metrics: Sequence[str]) -> Table:
    """A line per run, children indented, with the parameters in which they differ and some metrics."""
    children = {run.parent for depth, run in rows if depth}
    params = differing([run for _, run in rows if run.id not in children])[:_MOST_PARAMS]
    heads = [*short(params).values(), *metrics]
    table = Table("run", "id", "status", "started", "seconds", box=box.SIMPLE, title=f"{len(rows)} runs")
    for head in heads:
        table.add_column(escape(head), justify="right", overflow="fold")
    for depth, run in rows:
        seconds = "" if run.seconds is None else f"{run.seconds:,.0f}"
        told = ["  " * depth + escape(run.name or ""), run.id[:_ID], run.status, _time(run.started), seconds]
        of_run = [escape(_last(run.params.get(name, ""))) for name in params]
        table.add_row(*told, *of_run, *(_number(run.metrics.get(name)) for name in metrics))
    return table


def side_by_side(found: Sequence[Kept]) -> Table:
    """The parameters and metrics in which runs differ, a column each."""
    if len(found) < 2:
        raise ValueError(f"compare: expected two runs or more, got {len(found)}; separate them by commas")
    table = Table("", *(f"{escape(run.name)}\n{run.id[:_ID]}" for run in found), box=box.SIMPLE)
    params = differing(found)
    for name in params:
        table.add_row(escape(name), *(escape(run.params.get(name, "-")) for run in found))
    names = sorted({name for run in found for name in run.metrics})
    metrics = [name for name in names if len({_number(run.metrics.get(name)) for run in found}) > 1]
    table.add_section()
    for name in metrics:
        table.add_row(escape(name), *(_number(run.metrics.get(name)) or "-" for run in found))
    equal = len({name for run in found for name in run.params}) - len(params), len(names) - len(metrics)
    table.title = f"different; {equal[0]} parameters and {equal[1]} metrics are equal"
    return table


def _last(value: str) -> str:
    """The class of a path to one: `mmrlhf.modules.losses.Sigmoid` takes too much room."""
    words = value.split(".")
    return words[-1] if len(words) > 1 and all(word.isidentifier() for word in words) else value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
