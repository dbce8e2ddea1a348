"""Features are made once per picture, to the same bytes after a kill, and within the room that was told."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from mmrlhf import cli
from mmrlhf import features as door
from mmrlhf.datamodules.collate import packed
from mmrlhf.datamodules.reader import Shards
from mmrlhf.datamodules.rows import Answers
from mmrlhf.features import features
from mmrlhf.modules.features import Store
from mmrlhf.modules.loading import load_backbone
from mmrlhf.modules.scorer import ResponseScorer
from mmrlhf.modules.towers import Tower
from mmrlhf.queries import Media

from .datamodules.made import packed_set, picture, ranked
from .killing import kill
from .modules.families import SUPPORTS, built, saved
from .modules.queries import batch
from .threads import one_thread  # noqa: F401 - of itself, for the whole module

FAMILY, FRAMES = "llava_onevision", 3
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Pictures, of which two queries share one and one query holds one twice, a film, and a text alone."""
    folder = tmp_path_factory.mktemp("collection")
    (folder / "media" / "film").mkdir(parents=True)
    for seed, size in enumerate([(60, 40), (28, 28), (30, 90), (45, 45)]):
        (folder / "media" / f"{seed}.png").write_bytes(picture(seed, size))
    for frame in range(FRAMES):
        (folder / "media" / "film" / f"{frame}.png").write_bytes(picture(20 + frame, (28, 28)))
    shown = [["0"], ["1"], [], ["2", "2"], ["0"], ["film"], ["3"]]
    rows = []
    for number, names in enumerate(shown):
        media = [
            Media("video", name, place) if name == "film" else Media("image", f"{name}.png", place)
            for place, name in enumerate(names)
        ]
        rows.append(ranked(f"q{number}", media=media, split="val" if number == 6 else "train").to_json())
    return packed_set(folder, rows, folder / "media", num_frames=FRAMES)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(saved(FAMILY, tmp_path_factory.mktemp("model")))


def made(shards, model, out, **options):
    features(shards, model, out, **{"frames": FRAMES, "workers": 0, "batch": 4} | options)
    return out


@pytest.fixture(scope="module")
def whole(shards, model, tmp_path_factory):
    """All of it, made without a break."""
    return made(shards, model, tmp_path_factory.mktemp("whole") / "features")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def queries(shards, splits=("train", "val")):
    return [sample for split in splits for sample in Shards(shards, split)]


def tiles(sample):
    """The tiles and frames of a query by the processor alone."""
    row = Answers(built(FAMILY)[1], FRAMES)(sample)
    used = 1 if len(sample.media) > 1 else None  # of several pictures the model takes the overviews alone
    found = [tile for tiles in row.features.get("pixel_values", ()) for tile in tiles[:used] if tile.any()]
    return [*found, *row.features.get("pixel_values_videos", torch.empty(0, 0)).flatten(0, 1)]


# What is kept ------------------------------------------------------------------------------------------------


def test_every_query_is_scored_from_the_folder_as_by_the_tower(shards, model, whole):
    live, reading = load_backbone(model), load_backbone(model, features=whole)
    for sample in queries(shards):
        rows = packed([Answers(built(FAMILY)[1], FRAMES)(sample)], padding=0)
        found, expected = ResponseScorer(reading)(rows).sums, ResponseScorer(live)(rows).sums
        assert torch.allclose(found, expected, rtol=1e-6)


def test_a_tile_that_comes_twice_is_kept_once_and_none_is_left_out(shards, whole):
    pixels = [tile for sample in queries(shards) for tile in tiles(sample)]
    different = {tile.numpy().tobytes(): tile for tile in pixels}
    store = Store(whole)
    assert len(different) < len(pixels)
    assert sorted(contents(whole)) == [
        "features.json",
        "index.npy",
        "layout.json",
        "states.bin",
        "states.bin.fingerprint.json",
    ]
    assert store.layout.pieces == len(np.load(whole / "index.npy")) == len(different)
    assert store.layout.size == (whole / "states.bin").stat().st_size == len(different) * 16 * 32 * 4
    tower = built(FAMILY)[0].model.vision_tower
    kept = sorted(store[place].flatten().tolist() for place in range(len(different)))
    with torch.no_grad():
        states = tower(torch.stack(list(different.values())), output_hidden_states=True).hidden_states[-1]
    assert np.allclose(kept, sorted(state.flatten().tolist() for state in states), rtol=1e-4, atol=1e-5)


def test_a_split_alone_has_its_own_pictures_only(shards, model, tmp_path):
    out = made(shards, model, tmp_path / "f", splits=["val"])
    assert Store(out).layout.pieces == len({t.numpy().tobytes() for s in queries(shards, ["val"]) for t in tiles(s)})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_the_type_is_half_the_size_and_the_rounded_numbers(shards, model, whole, dtype, tmp_path):
    out = made(shards, model, tmp_path / "f", dtype=dtype)
    assert 2 * (out / "states.bin").stat().st_size == (whole / "states.bin").stat().st_size
    full, half = Store(whole), Store(out)
    for place in range(full.layout.pieces):
        assert torch.equal(half[place], full[place].to(getattr(torch, dtype)))


@pytest.mark.parametrize("family", ["llava_next", "internvl", "qwen2_5_vl", "smolvlm"])
def test_other_families_are_kept_and_read_too(shards, family, tmp_path):
    checkpoint = str(saved(family, tmp_path / "model"))
    allowed = 0.0 if "film" in SUPPORTS[family] else 0.2
    out = made(shards, checkpoint, tmp_path / "f", max_skipped=allowed)
    live, reading = load_backbone(checkpoint), load_backbone(checkpoint, features=out)
    rows = batch(built(family)[1], [queries(shards)[3]]).rows
    assert torch.allclose(ResponseScorer(reading)(rows).sums, ResponseScorer(live)(rows).sums, rtol=1e-6)


# Kills -------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nobody catches it."""


def stop_at(monkeypatch, where, name, call):
    """Let the call of this number fail as if it were killed."""
    real, calls = getattr(where, name), []

    def stopped(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return real(*args, **options)

    monkeypatch.setattr(where, name, stopped)


@pytest.mark.parametrize(
    ("where", "name", "call"),
    [
        (Tower, "states", 1),  # while planning
        (door, "_states", 1),
        (door, "_states", 2),
        (door, "_states", 4),
        (door.os, "fsync", 5),
        (door, "write_json", 1),
        (door, "write_json", 2),
        (door, "of_file", 1),
        (door.Path, "rename", 1),
    ],
)
def test_after_a_kill_anywhere_it_continues_to_the_same_bytes(
    shards, model, whole, where, name, call, tmp_path, monkeypatch
):
    out, work = tmp_path / "f", tmp_path / "f.unfinished"
    with monkeypatch.context() as patch:
        stop_at(patch, where, name, call)
        with pytest.raises(Killed):
            made(shards, model, out)
    assert not out.exists()
    if (work / "states.bin").exists():
        with (work / "states.bin").open("ab") as file:
            file.write(b"half a state" * (not (work / "index.npy").exists()))
    made(shards, model, out)
    assert contents(out) == contents(whole)
    assert not work.exists()


@pytest.mark.parametrize(
    ("lost", "again"), [(0, 0), (1, 4), (3 * 16 * 32 * 4, 4), (4 * 16 * 32 * 4, 4), (8 * 16 * 32 * 4, 8)]
)
def test_after_a_killed_process_only_what_is_lost_is_done_again_in_the_same_batches(
    shards, model, whole, lost, again, tmp_path, monkeypatch
):
    kill(lambda: made(shards, model, tmp_path / "f"), door, "_states", 3, after=False)
    states = tmp_path / "f.unfinished" / "states.bin"
    assert states.stat().st_size == 8 * 16 * 32 * 4
    os.truncate(states, states.stat().st_size - lost)
    computed, real = [], Tower.states
    monkeypatch.setattr(Tower, "states", lambda tower, pieces: computed.extend(pieces) or real(tower, pieces))
    assert contents(made(shards, model, tmp_path / "f")) == contents(whole)
    assert len(computed) == Store(whole).layout.pieces - 8 + again


def test_pictures_that_have_changed_meanwhile_are_an_error(shards, model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, door, "_states", 2)
        with pytest.raises(Killed):
            made(shards, model, tmp_path / "f")
    real = Tower.pieces
    monkeypatch.setattr(
        Tower, "pieces", lambda *args: [piece._replace(pixels=piece.pixels + 1) for piece in real(*args)]
    )
    with pytest.raises(ValueError, match="its pictures are not those of before; remove the unfinished folder"):
        made(shards, model, tmp_path / "f")


# Before anything is written ----------------------------------------------------------------------------------


def test_a_dry_run_tells_the_size_and_writes_nothing(shards, model, whole, tmp_path, caplog):
    caplog.set_level(logging.INFO, "mmrlhf")
    made(shards, model, tmp_path / "f", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    found = re.search(r": ([0-9]+) distinct tiles and frames of 7 queries x ([0-9,]+) bytes", caplog.text)
    number, size = (int(part.replace(",", "")) for part in found.groups())
    assert number * size == (whole / "states.bin").stat().st_size


def test_a_disk_without_room_is_refused_before_anything_is_written(shards, model, whole, tmp_path, monkeypatch):
    size = (whole / "states.bin").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, size - 1))
    with pytest.raises(ValueError, match=r"f: expected room for 0\.0.* GiB, .* has 0\.0.* GiB; give an --out"):
        made(shards, model, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, size + 10_000))
    made(shards, model, tmp_path / "f")


def test_a_finished_folder_is_left_as_it_is_and_other_settings_are_refused(shards, model, whole, monkeypatch):
    before = contents(whole)
    with monkeypatch.context() as patch:
        patch.setattr(door, "readable", lambda *_: pytest.fail("reads pictures"))
        made(shards, model, whole)
        made(shards, model, whole, splits=["val"])  # which is in it
        for change, named in (
            ({"dtype": "bfloat16"}, "dtype 'float32' instead of 'bfloat16'"),
            ({"weights": "bfloat16"}, "weights 'float32' instead of 'bfloat16'"),
            ({"frames": 2}, "frames '3' instead of '2'"),
        ):
            with pytest.raises(ValueError, match=f"holds features with .*{named}"):
                made(shards, model, whole, **change)
    assert contents(whole) == before


def test_a_folder_of_somebody_else_is_kept(shards, model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected nothing there, found a file or a folder"):
        made(shards, model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_texts_alone_have_no_features(model, tmp_path):
    shards = packed_set(tmp_path / "c", [ranked(f"q{n}").to_json() for n in range(3)])
    with pytest.raises(ValueError, match="expected queries with pictures, found none"):
        made(shards, model, tmp_path / "f")
    assert not (tmp_path / "f.unfinished").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch": 0}, "batch: expected 1 or more, got 0"), ({"device": "gpu"}, "device: expected auto, cpu, cuda")],
)
def test_options_that_cannot_be_met_are_refused(shards, model, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        made(shards, model, tmp_path / "f", **options)


def test_the_verb_makes_them_and_says_what_it_does(shards, model, tmp_path, capsys):
    words = ["--shards", str(shards), "--model", model, "--out", str(tmp_path / "f"), "--splits", "[val]"]
    assert cli.main(["features", *words, "--workers", "0", "--dtype", "bfloat16"]) == 0
    told = json.loads((tmp_path / "f" / "features.json").read_text())["settings"]
    assert told["dtype"] == "bfloat16"
    assert cli.main(["features", *words, "--workers", "0"]) == 2
    assert "dtype 'bfloat16' instead of 'float32'" in capsys.readouterr().err
