"""Every notebook runs from top to bottom on small results, shows what it promises, and is kept without outputs."""

import asyncio
import json
import re
import warnings
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from mmrlhf import cli, jsonl
from mmrlhf.fingerprint import of_text
from mmrlhf.records import RankedQuery

from .experiments.swept import sweep, write

NOTEBOOKS = sorted(Path("notebooks").glob("*.ipynb"))
FIGURES = {"1_data": 1, "2_critiques": 4, "3_margins_and_beta": 1, "4_wk_grid": 4}
"""At least so many pictures, besides those of sliders."""
ROWS = {"1_data": "queries", "2_critiques": "ACC", "3_margins_and_beta": "rank_gap", "4_wk_grid": "not distinguishable"}
"""Words that each of them says."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder like that of `mmrlhf demo`, with planted rewards and a planted sweep in it."""
    out = tmp_path_factory.mktemp("demo")
    world = out / "world"
    assert cli.main(["world", "--out", str(world), "--queries", "120", "--no-policy", "--processes", "1"]) == 0
    packed = ["--ranked", str(world / "ranked.jsonl"), "--media", str(world / "media"), "--out", str(out / "shards")]
    assert cli.main(["pack", *packed]) == 0
    rows = [
        {"id": one.query.id, "response": place, "digest": of_text(told.text), "reward": len(told.text) % 7 - rank}
        for one in jsonl.read(world / "ranked.jsonl", RankedQuery.from_json)
        for place, (told, rank) in enumerate(zip(one.responses, one.ranks, strict=True))
    ]
    jsonl.write(out / "rewards.jsonl", rows)
    uri, parent = write(out / "kept", sweep(items=60, ws=(0.0, 0.5), ks=(0.5, 2.0), seeds=(0, 1), failed=()))
    (out / "sweep").mkdir()
    (out / "sweep" / "parent.json").write_text(json.dumps({"uri": uri, "run": parent}))
    return out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_promises(path, demo, monkeypatch):
    monkeypatch.setenv("MMRLHF_DEMO", str(demo))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    book = nbformat.read(path, as_version=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the kernel's own event loop
        asyncio.run(NotebookClient(book, timeout=120, resources={"metadata": {"path": "notebooks"}}).async_execute())
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= FIGURES[path.stem]
    words = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    assert re.search(ROWS[path.stem], " ".join(words))  # in pictures any three letters stand somewhere


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_kept_without_outputs(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert len(code) <= 12
    logic = re.compile(r"^\s*(class|while|if|try)\b", re.MULTILINE)
    assert [cell.source for cell in code if logic.search(cell.source)] == []


def test_sliders_recompute_beta(demo, monkeypatch):
    monkeypatch.setenv("MMRLHF_DEMO", str(demo))
    book = nbformat.read("notebooks/3_margins_and_beta.ipynb", as_version=4)
    place = next(number for number, cell in enumerate(book.cells) if "interact" in cell.source)
    book.cells = book.cells[: place + 1]
    book.cells.append(
        nbformat.v4.new_code_cell("show.widget.children[0].value = 2.0; print(len(show.widget.out.outputs))")
    )
    asyncio.run(NotebookClient(book, timeout=120, resources={"metadata": {"path": "notebooks"}}).async_execute())
    said = [output for output in book.cells[place].outputs if "application/vnd.jupyter.widget-view+json" in output.data]
    assert len(said) == 1
    assert book.cells[-1].outputs[-1]["text"].strip() == "1"


def test_all_four_are_there():
    assert [path.stem for path in NOTEBOOKS] == sorted(FIGURES)
