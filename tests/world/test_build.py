"""The world's files: the same bytes from the same seed, whatever happens on the way, and what they promise."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmrlhf import cli, jsonl
from mmrlhf.fingerprint import of_tree
from mmrlhf.queries import Query
from mmrlhf.records import Candidates, RankedQuery
from mmrlhf.world import films
from mmrlhf.world.draw import picture
from mmrlhf.world.facts import Fact
from mmrlhf.world.plan import MIX, plan, quotas
from mmrlhf.world.truth import judge, truth

from .conftest import QUERIES

COMMAND = ["world", "--queries", str(QUERIES), "--no-policy"]


def rows(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_processes(small_world, tmp_path):
    assert cli.main([*COMMAND, "--out", str(tmp_path / "w"), "--processes", "2"]) == 0
    assert of_tree(tmp_path / "w") == of_tree(small_world)


def test_another_seed_gives_another_world(small_world, tmp_path):
    assert cli.main([*COMMAND, "--out", str(tmp_path / "w"), "--processes", "1", "--seed", "1"]) == 0
    for name in ("ranked.jsonl", "raw.jsonl", "truth.jsonl"):
        assert (tmp_path / "w" / name).read_bytes() != (small_world / name).read_bytes()


def test_a_killed_world_goes_on_and_ends_the_same(small_world, tmp_path):
    out = tmp_path / "w"
    command = [sys.executable, "-m", "mmrlhf", *COMMAND, "--out", str(out), "--processes", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(out.glob("media/images/*")):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (out / "truth.jsonl").exists()
    (out / "media/images/torn.jpg.tmp").write_bytes(b"half a pict")
    assert cli.main(command[3:]) == 0
    assert of_tree(out) == of_tree(small_world)


def test_a_finished_world_is_left_as_it_is(small_world):
    before = {path: path.stat().st_mtime_ns for path in small_world.rglob("*")}
    assert cli.main([*COMMAND, "--out", str(small_world)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in small_world.rglob("*")}


def test_a_folder_with_another_world_is_refused_and_left_alone(small_world, capsys):
    before = of_tree(small_world)
    assert cli.main(["world", "--out", str(small_world), "--queries", "5", "--no-policy"]) == 2
    assert f"holds a world with queries {QUERIES} instead of 5; give another --out" in capsys.readouterr().err
    assert of_tree(small_world) == before


def test_a_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert cli.main([*COMMAND, "--out", str(tmp_path)]) == 2
    assert "expected an empty folder or a world, found other files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--queries", "0"], "queries: expected one or more, got 0"),
        (["--swap-noise", "1.5"], "noise swap: expected a share from 0 to 1, got 1.5"),
        (["--annotators", "0"], "annotators: expected one or more, got 0"),
        (["--mix", '{"audio": 1}'], "mix: expected weights"),
        (["--mix", '{"long": 0}'], "mix: expected weights"),
    ],
)
def test_a_bad_setting_is_refused_before_anything_is_written(tmp_path, capsys, option, message):
    assert cli.main(["world", "--out", str(tmp_path / "w"), "--no-policy", *option]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_categories_come_in_the_proportions_of_the_published_data(ranked):
    counts = Counter(row.query.category for row in ranked)
    total = sum(MIX.values())
    assert sum(counts.values()) == QUERIES
    for category, weight in MIX.items():
        assert abs(counts[category] - QUERIES * weight / total) < 1
    assert quotas(1, {"a": 1, "b": 1, "c": 1}) == {"a": 1, "b": 0, "c": 0}


def test_splits_share_no_scene_and_have_their_sizes():
    splits = {}
    facts = {}
    for item in plan(0, 3000, MIX):
        splits.setdefault(item.query.group, set()).add(item.query.split)
        if item.fact.scenes or item.fact.clip:
            facts.setdefault(json.dumps(item.fact.to_json().get("scenes") or item.fact.to_json()["clip"]), set()).add(
                item.query.group
            )
    assert all(len(found) == 1 for found in splits.values())
    assert all(len(groups) == 1 for groups in facts.values()), "one scene was drawn for two groups"
    sizes = Counter(next(iter(found)) for found in splits.values())
    assert sizes["test"] / len(splits) == pytest.approx(0.1, abs=0.025)
    assert sizes["val"] / len(splits) == pytest.approx(0.1, abs=0.025)


def test_a_scene_has_the_same_split_in_every_world_of_a_seed():
    small = {item.query.group: item.query.split for item in plan(0, 400, MIX)}
    large = {item.query.group: item.query.split for item in plan(0, 500, MIX)}
    assert len(small.keys() & large.keys()) > 100
    assert {group: large[group] for group in small.keys() & large.keys()}.items() <= small.items()


def test_no_question_is_asked_twice_about_one_picture():
    asked = Counter((item.query.group, item.query.prompt) for item in plan(0, 2000, MIX) if item.query.media)
    assert max(asked.values()) == 1


def test_a_forbidden_request_of_the_test_split_is_in_no_other():
    splits = {}
    for item in plan(0, 3000, MIX):
        if item.fact.kind == "request":
            splits.setdefault(item.fact.subject, set()).add(item.query.split)
    assert all(len(found) == 1 for found in splits.values())


def test_the_order_in_which_a_mix_is_written_decides_nothing(tmp_path):
    short = ["world", "--queries", "20", "--no-policy", "--processes", "1"]
    for name, mix in (("a", '{"long": 1, "short": 2}'), ("b", '{"short": 2, "long": 1}')):
        assert cli.main([*short, "--out", str(tmp_path / name), "--mix", mix]) == 0
    assert of_tree(tmp_path / "a") == of_tree(tmp_path / "b")


def test_bytes_do_not_depend_on_hash_seed_locale_or_processor_features(small_world, tmp_path):
    """In another process, without the vector code of the JPEG library, hashing and sorting otherwise."""
    out = tmp_path / "w"
    command = [sys.executable, "-m", "mmrlhf", *COMMAND, "--out", str(out), "--processes", "1"]
    odd = {"PYTHONHASHSEED": "77", "LC_ALL": "C", "TZ": "Asia/Tokyo", "JSIMD_FORCENONE": "1"}
    subprocess.run(command, check=True, capture_output=True, env=os.environ | odd)
    assert of_tree(out) == of_tree(small_world)


def test_a_kill_in_the_very_first_write_leaves_a_folder_that_can_be_used(tmp_path):
    (tmp_path / "world.json.tmp").write_text('{"sett')
    assert cli.main(["world", "--queries", "5", "--no-policy", "--processes", "1", "--out", str(tmp_path)]) == 0


def test_a_foreign_world_json_is_refused(tmp_path, capsys):
    (tmp_path / "world.json").write_text('{"name": 1}')
    assert cli.main([*COMMAND, "--out", str(tmp_path)]) == 2
    assert "world.json: expected the settings of a world, found another file" in capsys.readouterr().err


def test_every_question_has_its_responses_a_truth_and_at_least_one_pair(small_world, ranked):
    candidates = list(jsonl.read(small_world / "candidates.jsonl", Candidates.from_json))
    truths = {row["id"]: row for row in rows(small_world / "truth.jsonl")}
    for asked, row in zip(candidates, ranked, strict=True):
        assert asked.query == row.query
        assert len(asked.responses) == (3 if row.query.category == "video" else 4)
        assert [r.text for r in row.responses[: len(asked.responses)]] == [r.text for r in asked.responses]
        assert row.pairs(), row
        fact = Fact.from_json(truths[row.query.id]["fact"])
        for told, response in zip(truths[row.query.id]["responses"], row.responses, strict=False):
            assert truth(fact, response.text) == tuple(
                told[k] for k in ("right", "hallucinated", "refused", "format", "coverage")
            )


def test_the_judge_of_a_world_knows_its_questions_and_no_others(small_world, ranked):
    verdict = judge(small_world)
    for row in ranked[:50]:
        assert verdict(row.query, row.query.reference_answer).right
        assert not verdict(row.query, "").right
    with pytest.raises(ValueError, match="no question 'elsewhere'; is this the world it comes from"):
        verdict(Query("elsewhere", "?"), "2")


def test_raw_conversations_hold_every_question_and_some_have_several_turns(small_world, ranked):
    asked = Counter()
    turns = Counter()
    for row in rows(small_world / "raw.jsonl"):
        humans = [turn["value"] for turn in row["conversations"] if turn["from"] == "human"]
        turns[len(humans)] += 1
        media = [
            m
            for kind in ("image", "video")
            for m in ([row[kind]] if isinstance(row.get(kind), str) else row.get(kind, []))
        ]
        assert humans[0].count("<image>") + humans[0].count("<video>") == len(media)
        asked.update(text.replace("<image>\n", "").replace("<video>\n", "") for text in humans)
    assert asked == Counter(row.query.prompt for row in ranked)
    assert turns[2] > 0


def test_every_medium_is_there_and_shows_its_scene(small_world, ranked):
    kinds = Counter()
    truths = {row["id"]: Fact.from_json(row["fact"]) for row in rows(small_world / "truth.jsonl")}
    for row in ranked:
        for medium in row.query.media:
            path = small_world / "media" / medium.path
            kinds[path.suffix or "frames"] += 1
            kinds[medium.kind] += 1
        fact = truths[row.query.id]
        shown = [small_world / "media" / medium.path for medium in row.query.media]
        scenes = fact.scenes if fact.clip is None else [fact.clip.frame(at) for at in range(fact.clip.frames)]
        seen = films.frames(shown[0]) if fact.clip else [Image.open(path).convert("RGB") for path in shown]
        for scene, image in zip(scenes, seen, strict=True):
            drawn = np.asarray(picture(scene), int)[: image.height, : image.width]
            assert 64 <= min(scene.width, scene.height) <= max(scene.width, scene.height) <= 160
            assert np.abs(np.asarray(image, int) - drawn).mean() < 8, row.query.id
    assert kinds.keys() == {".jpg", ".png", ".mp4", "frames", "image", "video"}


def test_planted_overlaps_are_what_they_say(small_world):
    media = small_world / "media"
    originals = {row["id"]: row for row in rows(small_world / "ranked.jsonl")}
    kinds = Counter()
    for row in rows(small_world / "overlaps.jsonl"):
        original = originals[row["of"]]
        assert original["split"] == "test"
        assert "split" not in row
        kinds[row["kind"]] += 1
        paths = [media / r["media"][0]["path"] for r in (row, original)]
        copy, shown = (Image.open(path).convert("RGB") for path in paths)
        same_bytes = paths[0].read_bytes() == paths[1].read_bytes()
        assert same_bytes == (row["kind"] in ("exact", "paraphrased"))
        assert (row["prompt"] != original["prompt"]) == (row["kind"] == "paraphrased")
        if row["kind"] == "cropped":
            assert copy.width < shown.width
        else:
            straight = ImageOps.mirror(copy) if row["kind"] == "flipped" else copy
            assert np.abs(np.asarray(straight, int) - np.asarray(shown, int)).mean() < 12
    assert set(kinds) == {"exact", "reencoded", "cropped", "flipped", "paraphrased"}
    assert len(set(kinds.values())) == 1


def test_several_annotators_leave_their_sheets_and_a_consensus(tmp_path):
    out = tmp_path / "w"
    command = ["world", "--queries", "40", "--no-policy", "--processes", "1", "--out", str(out)]
    assert cli.main([*command, "--annotators", "3", "--swap-noise", "0.3"]) == 0
    sheets = rows(out / "annotations.jsonl")
    assert Counter(row["annotator"] for row in sheets) == {f"annotator-{n}": 40 for n in range(3)}
    assert (
        len({json.dumps([r["rank"] for r in row["responses"]]) for row in sheets if row["id"] == sheets[0]["id"]}) >= 1
    )
    assert len(list(jsonl.read(out / "ranked.jsonl", RankedQuery.from_json))) == 40


@pytest.mark.parametrize("alone", [True, False])
def test_the_contact_sheet_is_a_picture(small_world, tmp_path, alone):
    sheet = tmp_path / "deep" / "sheet.png"
    where = [] if alone else ["--out", str(small_world)]
    assert cli.main([*COMMAND, *where, "--processes", "1", "--preview", str(sheet)]) == 0
    with Image.open(sheet) as image:
        assert image.width > 1000
        assert len(set(image.convert("L").resize((64, 64)).get_flattened_data())) > 20


def test_a_world_needs_a_place_or_a_preview(capsys):
    assert cli.main(COMMAND) == 2
    assert "give --out DIR (or --preview FILE" in capsys.readouterr().err
