"""What was written into MLflow is found again, and a report says it, whole and by itself."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from mmrlhf import jsonl
from mmrlhf.cli import main
from mmrlhf.experiments.beta_curves import margins_of_files
from mmrlhf.experiments.collect import cells_frame, histories_frame, margins_of_runs, outcomes, parent_of, sweep_record
from mmrlhf.experiments.report import report
from mmrlhf.experiments.results import collected
from mmrlhf.experiments.wording import findings
from mmrlhf.fingerprint import of_text

from .swept import BASELINE, BETTER, METRIC, K, Made, W, fill, rows_of, sweep, write

SELECTION = {
    "metric": METRIC,
    "split": "val",
    "selected": BETTER,
    "candidates": [{"cell": "many"}],
    "opened": "2026-11-21",
}


def everything() -> list[Made]:
    """The grid of 4 x 4 x 3, and what else a sweep leaves: test evaluations, a promoted run, one that still runs."""
    runs, draw = sweep(), np.random.default_rng(5)
    for run in runs:
        run.fraction = 0.2
    by_name = {run.name: run for run in runs}
    for cell, rate in ((BASELINE, 0.5), (BETTER, 0.7)):
        for seed in (0, 1, 2):
            run = by_name[f"{cell}-seed{seed}"]
            right = np.arange(100) < 100 * rate
            run.test_rows = rows_of(right)
            run.metrics[f"test/{METRIC}"] = float(right.mean())
            runs.append(
                Made(f"{run.name}-test", cell, seed, run.overrides, "test", metrics={METRIC: 0.9}, logged=False)
            )
    for cell in (BASELINE, BETTER, "w1-k1"):
        whole = Made(f"{cell}-seed0-full", cell, 0, by_name[f"{cell}-seed0"].overrides, "promoted")
        fill(whole, draw.random(240) < {BASELINE: 0.5, BETTER: 0.8}.get(cell, 0.6), draw)
        if cell == BETTER:  # what is promoted is tested instead of what led to it
            whole.test_rows = rows_of(np.arange(100) < 85)
            whole.metrics[f"test/{METRIC}"] = 0.85
        runs.append(whole)
    running = Made("w1-k2-seed3", "w1-k2", 3, {W: 1.0, K: 2.0}, status="running")
    return [*runs, running]


@pytest.fixture(scope="module")
def made():
    return everything()


@pytest.fixture(scope="module")
def kept(tmp_path_factory, made):
    """URI and parent run."""
    return write(tmp_path_factory.mktemp("mlflow"), made, selection=SELECTION)


@pytest.fixture(scope="module")
def told(tmp_path_factory, kept):
    """The folder of a report."""
    sweep_folder, out = tmp_path_factory.mktemp("sweep"), tmp_path_factory.mktemp("out") / "report"
    (sweep_folder / "parent.json").write_text(json.dumps({"uri": kept[0], "run": kept[1]}))
    report(out, sweep=sweep_folder, resamples=400)
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A smaller sweep, to be spoilt: folder, URI, parent run."""
    folder = tmp_path_factory.mktemp("small")
    return folder, *write(folder, sweep(items=20, ws=(0.5,), ks=(1.0,), seeds=(0,), failed=None))


# From MLflow --------------------------------------------------------------------------------------------------


def test_every_run_is_found_with_the_types_it_was_made_with(kept, made):
    frame = cells_frame(*kept).set_index("name")
    assert sorted(frame.index) == sorted(run.name for run in made)
    assert frame.reset_index().columns.is_unique
    for run in made:
        row = frame.loc[run.name]
        assert (row["cell"], row["seed"], row["role"], row["fraction"]) == (run.cell, run.seed, run.role, run.fraction)
        assert row["status"] == (run.status if run.logged or run.status == "failed" else "not in MLflow")
        for axis in (W, K):
            assert row[axis] == run.overrides[axis] if axis in run.overrides else np.isnan(row[axis])
        for name, value in run.metrics.items():
            assert row[name] == pytest.approx(value)
        assert run.status == "running" or row["seconds"] == 61.5
    assert frame[W].dtype == frame[K].dtype == float
    row = frame.loc[f"{BETTER}-seed0"]
    assert (row["rule.beta0"], row["rule.w"], row["rule.k"]) == (0.1, 0.5, 1.0)
    assert cells_frame(*kept).attrs["axes"] == (W, K)


def test_children_are_found_on_every_page_of_the_answer(small, monkeypatch):
    _, uri, parent = small
    monkeypatch.setattr("mmrlhf.experiments.collect._PAGE", 1)
    found = cells_frame(uri, parent)
    assert found["name"].tolist() == ["w0-seed0", f"{BETTER}-seed0"]
    assert found["run"].notna().all()


def test_the_parent_tells_what_was_declared(kept):
    parent = parent_of(*kept)
    assert (parent.name, parent.metric, parent.split, parent.test_split, parent.greatest) == (
        *("wk", METRIC, "val", "test", True),
    )
    assert parent.selection == SELECTION
    assert parent.settings == f"metric: {METRIC}\nname: <wk>\n"


def test_answers_and_histories_are_found_as_they_were_written(kept, made):
    run = next(run for run in made if run.name == f"{BETTER}-seed1")
    identity = cells_frame(*kept).set_index("name").loc[run.name, "run"]
    found = outcomes(kept[0], identity, "world")
    assert found.to_dict("records") == [
        {k: row[k] for k in ("item", "cluster", "category", "correct")} for row in run.rows
    ]
    assert len(outcomes(kept[0], identity, "world", "test/outcomes")) == 100
    histories = histories_frame(kept[0], [identity], list(run.histories))
    assert histories[["metric", "step", "value"]].values.tolist() == [
        [metric, step, pytest.approx(value)] for metric, points in run.histories.items() for step, value in points
    ]


def test_of_a_step_that_was_logged_twice_the_later_value_counts(small):
    _, uri, parent = small
    run = cells_frame(uri, parent)["run"][0]
    for time, value in ((2, 7.0), (1, 5.0)):
        MlflowClient(uri).log_batch(run, metrics=[Metric("again", value, time, 3)])
    assert histories_frame(uri, [run], ["again"])[["step", "value"]].values.tolist() == [[3, 7]]


def test_margins_that_a_run_keeps_are_found(small):
    _, uri, parent = small
    runs = cells_frame(uri, parent)["run"]
    assert len(margins_of_runs(uri, runs)) == 0
    MlflowClient(uri).log_text(runs[1], "delta,pairs\n0.5,3\n-1.25,2\n", "figures/margins.csv")
    assert margins_of_runs(uri, runs).values.tolist() == [[0.5, 3], [-1.25, 2]]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            '{"item": "a", "cluster": "a", "category": "x"}\n',
            "expected item, cluster, category, correct in every row of",
        ),
        (
            '{"item": "a", "cluster": "a", "category": "x", "correct": true}\n' * 2,
            "expected each item once in .* got 'a'",
        ),
    ],
)
def test_broken_answers_are_refused(small, text, error):
    _, uri, parent = small
    run = cells_frame(uri, parent)["run"][0]
    MlflowClient(uri).log_text(run, text, "broken/world.jsonl")
    with pytest.raises(ValueError, match=error):
        outcomes(uri, run, "world", "broken")


def test_answers_of_several_benchmarks_are_told_apart_by_the_name_of_the_metric(small):
    _, uri, parent = small
    run = cells_frame(uri, parent)["run"][0]
    for name in ("a", "b"):
        row = {"item": name, "cluster": name, "category": "", "correct": False}
        MlflowClient(uri).log_text(run, json.dumps(row) + "\n", f"several/{name}.jsonl")
    assert outcomes(uri, run, "b", "several")["item"].tolist() == ["b"]
    with pytest.raises(ValueError, match=r"expected several/c.jsonl, got several/a.jsonl, several/b.jsonl"):
        outcomes(uri, run, "c", "several")


# The report ---------------------------------------------------------------------------------------------------


def test_all_runs_are_accounted_for(told, made):
    used, excluded = pd.read_csv(told / "runs.csv")["name"], pd.read_csv(told / "excluded.csv")
    assert sorted([*used, *excluded["name"]]) == sorted(run.name for run in made)
    assert len(used) == 48
    assert excluded["reason"].value_counts().to_dict() == {"test": 6, "failed": 3, "promoted": 3, "unfinished": 1}
    verdicts = pd.read_csv(told / "cells.csv").set_index("cell")["verdict"]
    assert verdicts[verdicts == "above"].index.tolist() == [BETTER]
    assert (verdicts == "same").sum() == 14


def test_the_page_needs_nothing_beside_it_and_runs_nothing(told):
    page = (told / "report.html").read_text("utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"<script|<link|<iframe|javascript:|\son\w+=|https?://|@import|url\(", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 5
    for source, name in zip(sources, ("wk_grid", "differences", "beta_curves", "training", "cost"), strict=True):
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert b64decode(data) == (told / f"{name}.png").read_bytes()
        assert b64decode(data).startswith(b"\x89PNG")


def test_texts_from_elsewhere_are_no_markup(told):
    page, plain = (told / "report.html").read_text("utf-8"), (told / "report.md").read_text("utf-8")
    assert "loss &lt;nan&gt; at step 3 &amp; no more" in page
    assert "name: &lt;wk&gt;" in page
    assert "<nan>" not in page + plain
    assert "loss &lt;nan&gt; at step 3 &amp; no more" in plain


def test_the_page_says_what_was_found_and_what_was_left_out(told):
    page = (told / "report.html").read_text("utf-8")
    for words in (
        "Of 15 cells, 1 is above w0 in world/true, 0 are below it, and 14 are not distinguishable from it",
        f"By world/true on val, as declared beforehand, {BETTER} was selected. On test: 75.0",
        "+25.0 from w0",
        "61 in = 48 out + 13 skipped (test 6, failed 3, promoted 3, unfinished 1)",
        f"The highest mean is that of {BETTER}",
        "Trained again on all data: w0, w0.5-k1, w1-k1; rank correlation of their means",
        "240 items in 120 clusters",
        "δ: no run has kept its margins",
    ):
        assert words in page, words
    assert "many" not in page  # the candidates are in the table of cells already
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    assert sum("w1-k2-seed" in row and "the cell failed" in row for row in rows) == 3
    assert sum(row.count("<td") == 8 for row in rows) == 48  # a row of costs for every run


def test_what_is_said_of_the_selected_cell_is_as_sure_as_it_is():
    row = {"cell": "b", "mean": 0.7, "low": 0.6, "high": 0.8, "difference": 0.1, "difference_low": 0.0}
    row |= {"difference_high": 0.2, "p": 0.03, "p_holm": 0.06}
    parent = SimpleNamespace(metric=METRIC, split="val", test_split="test", selection={"test_opened_before": False})
    found = SimpleNamespace(parent=parent, baseline="a", selected="b", cells=pd.DataFrame({"p": [float("nan")]}))
    found.test = pd.DataFrame([row])
    [told] = findings(found)
    assert told.endswith("p = 0.0300).")
    found.test = pd.DataFrame([row, row | {"cell": "c"}])
    parent.selection = {"test_opened_before": True}
    [told] = findings(found)
    assert "p = 0.0600 by Holm over 2 tests)." in told
    assert told.endswith("The test split had been opened before, for an earlier selection.")


def test_tables_are_as_wide_as_their_headings(told):
    blocks = re.findall(r"(?:^\|.*\n)+", (told / "report.md").read_text("utf-8"), re.MULTILINE)
    assert len(blocks) == 6
    for block in blocks:
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    linked = re.findall(r"!\[.*\]\((.*)\)", (told / "report.md").read_text("utf-8"))
    assert len(linked) == 5
    assert all((told / name).exists() for name in linked)


def test_numbers_are_there_as_csv(told, made):
    runs = pd.read_csv(told / "runs.csv").set_index("name")
    assert runs.loc[f"{BETTER}-seed2", METRIC] == next(r for r in made if r.name == f"{BETTER}-seed2").metrics[METRIC]
    assert pd.read_csv(told / "cells.csv").set_index("cell").loc[BETTER, "verdict"] == "above"
    assert len(pd.read_csv(told / "excluded.csv")) == 13
    test = pd.read_csv(told / "test.csv").set_index("cell")
    assert test.loc[BETTER, ["mean", "difference"]].tolist() == pytest.approx([0.75, 0.25])


def test_the_same_sweep_gives_the_same_report(told, kept, tmp_path):
    report(tmp_path, run=kept[1], tracking=kept[0], resamples=400)
    files = sorted(path.name for path in told.iterdir())
    assert files == sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in files if (told / name).read_bytes() != (tmp_path / name).read_bytes()] == []


def test_an_axis_can_be_fixed_and_another_metric_asked_for_in_a_config(kept, tmp_path, capsys):
    config = tmp_path / "report.yaml"
    config.write_text(f"out: {tmp_path / 'out'}\nfix: {{{K}: 1.0}}\nresamples: 400\n")
    words = ["--run", kept[1], "--tracking", kept[0], "--metric", "val/rewards/margins"]
    assert main(["report", "--config", str(config), *words]) == 0
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "36 skipped" not in page
    assert "not_fixed 33" in page
    assert "The sweep declared world/true; val/rewards/margins was asked for afterwards" in page
    assert "there are no intervals over items and no tests" in page
    assert not (tmp_path / "out" / "differences.png").exists()


# What is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, "expected either --sweep FOLDER or --run"),
        ({"run": "x", "ranked": "r.jsonl"}, "expected --ranked and --scores together"),
        ({"run": "0" * 32}, "expected a run '0000.*', found none"),
        ({"metric": "world/tru"}, "got 'world/tru'; did you mean 'world/true'"),
        ({"baseline": "w9"}, "expected a finished cell, got 'w9'"),
        ({"resamples": 100}, "expected 299 or more for 15 tests"),
    ],
)
def test_what_cannot_be_reported_is_refused_with_the_cure(kept, tmp_path, options, error):
    known = {"run": kept[1], "tracking": kept[0]} if options else {}
    with pytest.raises(ValueError, match=error):
        report(tmp_path / "out", **known | options)
    assert not (tmp_path / "out").exists()


def test_a_database_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises((ValueError, OSError), match="no such database"):
        report(tmp_path / "out", run="x", tracking=f"sqlite:///{tmp_path / 'none.db'}")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_sweep_and_a_run_without_children_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match=r"expected the folder of a sweep with parent.json, found none"):
        sweep_record(tmp_path)
    _, uri, parent = small
    lonely = cells_frame(uri, parent)["run"][0]
    with pytest.raises(ValueError, match="expected the parent of a sweep, got a run without children"):
        cells_frame(uri, lonely)


def test_a_sweep_of_which_nothing_is_finished_is_refused(tmp_path):
    runs = deepcopy(sweep(items=4, ws=(0.5,), ks=(1.0,), seeds=(0,), failed=None))
    for run in runs:
        run.status = "running"
    uri, parent = write(tmp_path, runs)
    with pytest.raises(ValueError, match=r"2 skipped \(unfinished 2\): expected at least one finished run"):
        collected(uri, parent)


# Margins from files -------------------------------------------------------------------------------------------


def ranked(tmp_path, texts=("good", "fair", "bad"), ranks=(1, 2, 3)):
    responses = [{"text": text, "rank": rank} for text, rank in zip(texts, ranks, strict=True)]
    jsonl.write(tmp_path / "ranked.jsonl", [{"id": "q", "prompt": "?", "category": "mcq", "responses": responses}])
    return tmp_path / "ranked.jsonl"


def rewarded(tmp_path, rows):
    jsonl.write(tmp_path / "scores.jsonl", [{"id": "q", "more": 1, **row} for row in rows])
    return tmp_path / "scores.jsonl"


def test_margins_are_differences_of_rewards_of_the_texts_that_were_ranked(tmp_path):
    rows = [
        {"response": n, "digest": of_text(t), "reward": r}
        for n, (t, r) in enumerate([("good", 2.0), ("fair", 2.5), ("bad", -1.0)])
    ]
    found = margins_of_files(ranked(tmp_path), rewarded(tmp_path, rows))
    assert sorted(zip(found["delta"], found["rank_gap"], strict=True)) == [(-0.5, 1), (3.0, 2), (3.5, 1)]
    assert set(found["category"]) == {"mcq"}
    rows[2]["digest"] = of_text("another text")
    found = margins_of_files(ranked(tmp_path), rewarded(tmp_path, rows))
    assert found["delta"].tolist() == [-0.5]
    with pytest.raises(ValueError, match=r"expected rewards of the responses in .*, got none that fit"):
        margins_of_files(ranked(tmp_path), rewarded(tmp_path, rows[2:]))
