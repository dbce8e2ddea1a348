"""Examples are chosen by the rule that the page states, and show their pictures small."""

import io
import random

import pytest
from PIL import Image

from mmrlhf.containers import MediaError
from mmrlhf.evaluation.examples import CHANCE, RIGHT, WRONG, choose, example_of
from mmrlhf.evaluation.joining import Judged
from mmrlhf.queries import Media

from .made import ranked_query


def judged(name, margin, category="short", **more):
    """A query whose worst pair has this margin."""
    return Judged(ranked_query(name, [1, 2, 3], category, **more), (margin, 0.0, -5.0), (), ("one", "", "three"))


MARGINS = {"good": 3.0, "better": 4.0, "bad": -1.0, "worse": -2.0, "even": 0.0}


def names(chosen, why=None):
    return [found.judged.ranked.query.id for found in chosen if why in (None, found.why)]


def test_the_surest_errors_and_successes_come_first_then_the_next():
    queries = [judged(name, margin) for name, margin in MARGINS.items()]
    assert [names(choose(queries, number, 0)) for number in (0, 1, 2)] == [[], ["worse"], ["worse", "better"]]
    every = choose(queries, 9, 0)
    assert sorted(names(every)) == sorted(MARGINS)
    assert names(every, WRONG)[0] == "worse"
    assert set(names(every, WRONG)) <= {"worse", "bad", "even"}
    assert set(names(every, RIGHT)) <= {"better", "good"}
    assert {found.judged.ranked.query.id: found.margin for found in every} == MARGINS


def test_each_category_has_its_turn():
    categories = ("mcq", "long", "short", "safety", "video", None)
    queries = [judged(f"{c} {n}", n - 4.5, c) for c in categories for n in range(10)]
    chosen = choose(queries, 18, 0)
    told = [(found.judged.ranked.query.category, found.why) for found in chosen]
    assert len(set(names(chosen))) == 18
    assert [category for category, _ in told] == sorted((c for c, _ in told), key=categories.index)
    for category in categories:
        assert {(category, WRONG), (category, RIGHT)} <= set(told)
        assert {f"{category} 0", f"{category} 9"} <= set(names(chosen))


def test_equal_rewards_are_no_success():
    assert [found.why for found in choose([judged("even", 0.0)], 1, 0)] == [WRONG]


def test_chance_decides_which_category_comes_first():
    queries = [judged(c, 1.0, c) for c in ("mcq", "long", "short", "safety", "video")]
    assert len({names(choose(queries, 1, seed))[0] for seed in range(20)}) > 2


def test_chance_depends_on_the_seed_and_not_on_the_order_of_the_queries():
    queries = [judged(f"q{n}", float(n)) for n in range(60)]
    drawn = [names(choose(random.Random(5).sample(queries, 60), 12, seed), CHANCE) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) >= 4
    assert names(choose(queries, 12, 0), CHANCE) == drawn[0]


def test_queries_without_a_pair_are_no_examples():
    tied = Judged(ranked_query("t", [1, 1]), (1.0, 0.0))
    assert names(choose([tied, judged("a", 1.0)], 5, 0)) == ["a"]


def test_an_example_shows_ranks_rewards_and_both_critiques():
    [chosen] = choose([judged("a", 1.5)], 1, 0)
    found = example_of(chosen)
    assert (found.id, found.category, found.why) == ("a", "short", f"{RIGHT} (worst pair: +1.500)")
    assert [(side.rank, side.reward, side.critique, side.reason) for side in found.sides] == [
        (1, 1.5, "one", "why 0"),
        (2, 0.0, "", "why 1"),
        (3, -5.0, "three", "why 2"),
    ]
    assert list(found.pictures) == []


def test_pictures_and_frames_of_films_are_shown_small(tmp_path):
    Image.new("RGB", (960, 480), "red").save(tmp_path / "a.png")
    (tmp_path / "film").mkdir()
    for number, colour in enumerate(("red", "green", "blue", "white", "black")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / "film" / f"{number}.png")
    [chosen] = choose([judged("a", 1.0, media=(Media("image", "a.png"), Media("video", "film")))], 1, 0)
    found = example_of(chosen, tmp_path)
    sizes = [Image.open(io.BytesIO(data), formats=["JPEG"]).size for data in found.pictures]
    assert sizes == [(240, 120), (40, 40), (40, 40), (40, 40)]
    assert found.media == ["a.png", "film"]
    (tmp_path / "a.png").unlink()
    with pytest.raises(MediaError, match=r"a\.png"):
        example_of(chosen, tmp_path)
