"""The verb `data make-rewardbench`: what it draws, how it writes it, and what it keeps out of training."""

import json
import random
import shutil
from functools import partial

import pytest
from PIL import Image

from mmrlhf import jsonl
from mmrlhf.evaluation.making import make_rewardbench
from mmrlhf.evaluation.rewardbench import RewardBench
from mmrlhf.excluded import Exclusions, Mark, is_excluded
from mmrlhf.formats.importing import import_data
from mmrlhf.ledger import Ledger
from mmrlhf.media import digest
from mmrlhf.queries import Media, Query, Turn
from mmrlhf.records import RankedQuery, Response

from .made import written

CATEGORIES = ("mcq", "long", "short", "safety", "video")


def ranked(name, category, *media, ranks=(1, 2, 2, 3), **more):
    query = Query(name, f"What is in {name}?", media, category=category, **more)
    said = (Response(f"{name} answer {n}", rank=rank, reason=f"reason {n}") for n, rank in enumerate(ranks))
    return RankedQuery(query, tuple(said))


def set_of(per_category=8):
    found = []
    for category in CATEGORIES:
        kind = "video" if category == "video" else "image"
        found += [
            ranked(
                f"{category} {n}", category, Media(kind, f"{category}/{n}.png"), source="made", group=f"{category}{n}"
            )
            for n in range(per_category)
        ]
    return found


def make(tmp_path, records, name="out", **more):
    path = written(tmp_path / f"{name}.ranked.jsonl", records)
    make_rewardbench(path, tmp_path / name, **{"per_category": 3} | more)
    rows = list(jsonl.read(tmp_path / name / "mm_reward_bench.jsonl"))
    return rows, tmp_path / name


def test_each_category_has_its_queries_with_all_their_pairs(tmp_path):
    rows, out = make(tmp_path, set_of())
    items = RewardBench().items(out / "mm_reward_bench.jsonl", Ledger("items"))
    summary = RewardBench(resamples=10).summarize([RewardBench().grade(item, None) for item in items])
    assert {name: (line.pairs, line.ids) for name, line in summary.categories.items()} == dict.fromkeys(
        CATEGORIES, (15, 3)
    )
    assert set(rows[0]) == {"id", "image", "prompt", "chosen", "rejected", "chosen_reason", "rejected_reason"}
    assert "video" in rows[-1]


def test_the_draw_depends_on_the_seed_and_not_on_the_order_of_the_file(tmp_path):
    records = set_of()
    drawn = make(tmp_path, records)[0]
    assert make(tmp_path, random.Random(1).sample(records, len(records)), "turned")[0] == drawn
    assert make(tmp_path, records, "other", seed=1)[0] != drawn
    # A query more changes at most one of those drawn.
    more = {row["id"] for row in make(tmp_path, [*records, ranked("mcq x", "mcq", Media("image", "x.png"))], "more")[0]}
    assert len({row["id"] for row in drawn} - more) <= 1


def test_an_importer_reads_the_rankings_back(tmp_path):
    records = set_of()
    _, out = make(tmp_path, records)
    import_data("mm-reward-bench", out / "mm_reward_bench.jsonl", tmp_path / "back.jsonl")
    back = list(jsonl.read(tmp_path / "back.jsonl", RankedQuery.from_json))
    origin = {record.query.id: record for record in records}
    assert len(back) == 15
    for record in back:
        expected = origin[record.query.id]
        assert record.query.prompt == expected.query.prompt
        assert record.query.media == expected.query.media
        assert record.query.category == expected.query.category
        ranks = dict(zip((one.text for one in record.responses), record.ranks, strict=True))
        assert ranks == dict(zip((one.text for one in expected.responses), expected.ranks, strict=True))
        assert {(one.text, one.reason) for one in record.responses} == {
            (one.text, one.reason) for one in expected.responses
        }


def test_several_media_make_a_list_and_the_category_is_written_where_the_folder_does_not_tell_it(tmp_path):
    media = (Media("image", "images/1.png"), Media("image", "images/2.png"), Media("video", "films/3"))
    rows, out = make(tmp_path, [ranked("a", "long", *media), ranked("b", "short")])
    first, last = rows[0], rows[-1]
    assert (first["image"], first["video"], first["category"]) == (["images/1.png", "images/2.png"], "films/3", "long")
    assert (last["category"], "image" in last) == ("short", False)
    items = RewardBench().items(out / "mm_reward_bench.jsonl")
    assert {item.id: (item.category, item.media) for item in items} == {"a": ("long", media), "b": ("short", ())}


def test_what_cannot_be_drawn_is_left_out_and_told(tmp_path, caplog):
    caplog.set_level("INFO", "mmrlhf")
    unfit = [
        ranked("tied", "mcq", ranks=(1, 1)),
        ranked("talk", "mcq", history=(Turn("user", "Hello"), Turn("assistant", "Hi"))),
        ranked("told", "mcq", system="Be short."),
        ranked("none", None, Media("image", "images/1.png")),
    ]
    rows, _ = make(tmp_path, [*unfit, ranked("fit", "mcq")])
    assert {row["id"] for row in rows} == {"fit"}
    assert "5 in = 1 out + 4 skipped (has_history 2, no_category 1, no_pairs 1)" in caplog.text
    assert "mcq: 3 queries were asked for, there are only 1" in caplog.text
    with pytest.raises(ValueError, match="expected queries that a benchmark can be made of, got none"):
        make(tmp_path, unfit, "none")


def test_only_the_split_that_is_asked_for_is_drawn_from(tmp_path):
    records = [ranked(f"q{n}", "mcq", split=("train", "test")[n % 2]) for n in range(10)]
    rows, _ = make(tmp_path, records, split="test", per_category=9)
    assert {row["id"] for row in rows} == {"q1", "q3", "q5", "q7", "q9"}


def test_no_two_queries_of_a_benchmark_share_a_picture_or_a_group(tmp_path):
    same_picture = [ranked(f"p{n}", ("mcq", "long")[n % 2], Media("image", "a.png")) for n in range(6)]
    same_group = [ranked(f"g{n}", "short", Media("image", f"{n}.png"), group="film") for n in range(6)]
    rows, _ = make(tmp_path, [*same_picture, *same_group])
    drawn = {row["id"] for row in rows}
    assert len([name for name in drawn if name[0] == "p"]) == 1
    assert len([name for name in drawn if name[0] == "g"]) == 1


def test_every_drawn_query_is_excluded_and_no_other(tmp_path):
    records = set_of()
    rows, out = make(tmp_path, records)
    kept_out = Exclusions.read(out / "excluded.jsonl")
    drawn = {row["id"] for row in rows}
    assert {record.query.id for record in records if is_excluded(record.query, kept_out)} == drawn
    renamed = ranked("other", "mcq", *next(r.query.media for r in records if r.query.id in drawn))
    assert is_excluded(renamed.query, kept_out)
    assert "What is in" not in (out / "excluded.jsonl").read_text()


@pytest.fixture
def media(tmp_path):
    root = tmp_path / "media"
    for name, colour in (("one.png", "red"), ("two.png", "blue"), ("film/0.png", "red"), ("film/1.png", "blue")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(root / name)
    shutil.copy(root / "one.png", root / "copy.png")
    shutil.copytree(root / "film", root / "copied")
    return root


def test_a_picture_or_film_is_known_under_another_name(tmp_path, media):
    records = [
        ranked("a", "short", Media("image", "one.png")),
        ranked("b", "video", Media("video", "film")),
    ]
    _, out = make(tmp_path, records, media=media)
    kept_out = Exclusions.read(out / "excluded.jsonl")
    for kind, path, expected in (
        ("image", "copy.png", "media"),
        ("video", "copied", "media"),
        ("image", "two.png", ""),
    ):
        query = Query("train", "Another question?", (Media(kind, path),))
        assert kept_out.reason(Mark.of(query, partial(digest, media))) == expected


def test_an_equal_path_of_another_picture_excludes_only_where_the_files_are_not_there(tmp_path, media):
    _, out = make(tmp_path, [ranked("a", "short", Media("image", "one.png"))], media=media)
    kept_out = Exclusions.read(out / "excluded.jsonl")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(media / "two.png", elsewhere / "one.png")
    query = Query("train", "What is in a?", (Media("image", "one.png"),))
    assert kept_out.reason(Mark.of(query, partial(digest, elsewhere))) == ""
    assert kept_out.reason(Mark.of(query, partial(digest, media))) == "question"
    assert kept_out.reason(Mark.of(query)) == "question"
    assert kept_out.reason(Mark.of(Query("train", "Else?", query.media))) == "path"


def test_a_question_without_media_is_known_by_its_text_and_not_by_its_id():
    kept_out = Exclusions([Mark.of(Query("7", "How many ducks?", group="g", source="s"))])
    assert kept_out.reason(Mark.of(Query("8", " How many ducks?\r\n"))) == "question"
    assert kept_out.reason(Mark.of(Query("7", "How many geese?"))) == ""
    assert kept_out.reason(Mark.of(Query("9", "How many geese?", group="g", source="s"))) == "group"
    assert kept_out.reason(Mark.of(Query("9", "How many geese?", group="g", source="t"))) == ""
    assert kept_out.reason(Mark.of(Query("9", "How many ducks?", (Media("image", "pond.png"),)))) == ""


def test_a_common_question_about_another_picture_is_not_excluded():
    kept_out = Exclusions([Mark.of(Query("a", "Describe the image.", (Media("image", "a.png"),)))])
    assert kept_out.reason(Mark.of(Query("b", "Describe the image.", (Media("image", "b.png"),)))) == ""


def test_a_file_of_exclusions_that_was_made_by_hand_is_refused(tmp_path):
    path = tmp_path / "excluded.jsonl"
    path.write_text(json.dumps({"question": "How many ducks?"}))
    with pytest.raises(ValueError, match=r"excluded\.jsonl:1: .*expected a SHA-256 of 64 digits"):
        Exclusions.read(path)
