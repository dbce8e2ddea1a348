"""A judge's words mean what they say, or nothing; a verdict counts that stands in both orders."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrlhf.endpoint import Reply
from mmrlhf.evaluation.rewardbench import Comparison, RewardBench, Rewards
from mmrlhf.evaluation.rewards import read_rewards
from mmrlhf.evaluation.verdicts import FIELDS, Verdicts, preference, questions, rating
from mmrlhf.fingerprint import of_text
from mmrlhf.ledger import Ledger
from mmrlhf.prompts import Template, load_template

from .made import bench_row, written

SHORT = Template("short", "{question}|{first}|{second}")
SINGLE = Template("single", "{question}|{response}")


def pairs(*rows):
    return [Comparison.from_json(row) for row in rows]


def answered(asked, answer, finish="stop"):
    """The replies of a judge that is a function from the text of a question."""
    return {one.name: Reply(one.name, answer(one.text), 10, 2, finish) for one in asked}


# Words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("Better: 1", "first"),
        ("The second one lies.\n\nBetter: 2\n", "second"),
        ("Better: 2\nNo, on reflection:\nBetter: 1", "first"),
        ("Same.\r\nbetter: TIE.", "tie"),
        ("**Better: 1**", "first"),
        ("**Better:** `2`", "second"),
        ("  _Better:2_  ", "second"),
        ("", None),
        (" \n ", None),
        ("Better: 1\nbecause it is right", None),
        ("I find that Better: 1", None),
        ("Better: 1 or 2", None),
        ("Better: 3", None),
        ("Better: 12", None),
        ("Better: first", None),
        ("Better: Response 1", None),
        ("Better 1", None),
        ("Better: \u0661", None),
        ("Better: 1\n---", None),
    ],
)
def test_a_preference_is_on_the_last_line_or_nowhere(text, meant):
    assert preference(text) == meant


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("Score: 7", 7.0),
        ("Good.\nScore: 1\n", 1.0),
        ("Score: 10", 10.0),
        ("**Score: 8.25**", 8.25),
        ("score: 8/10.", 8.0),
        ("Score: 8 / 10", 8.0),
        ("Score: 2\nScore: 3", 3.0),
        ("Score: 0", None),
        ("Score: 0.9", None),
        ("Score: 10.5", None),
        ("Score: 11", None),
        ("Score: 80/100", None),
        ("Score: 8/5", None),
        ("Score: -3", None),
        ("Score: 7,5", None),
        ("Score: 1e1", None),
        ("Score: nan", None),
        ("Score: seven", None),
        ("Score: 7 to 8", None),
        ("Score:", None),
        ("7", None),
        ("Score: \u0667", None),
        ("Score: 7\nIt is fine.", None),
    ],
)
def test_a_score_from_1_to_10_is_on_the_last_line_or_nowhere(text, meant):
    assert rating(text) == meant


@given(st.text())
def test_no_words_of_a_judge_are_an_error(text):
    assert preference(text) in {"first", "second", "tie", None}
    assert rating(text) is None or 1 <= rating(text) <= 10


# What is asked ------------------------------------------------------------------------------------------------


def test_a_pair_is_asked_in_both_orders_and_a_text_once():
    items = pairs(bench_row("q", "mcq/a.png", 1), bench_row("q", "mcq/a.png", 1, rejected="third"))
    texts = [one.text for one in questions(items, "pairwise", SHORT)]
    question, good, bad = "What is in q?", "good 1 of q", "bad 1 of q"
    expected = [(good, bad), (bad, good), (good, "third"), ("third", good)]
    assert texts == [f"{question}|{first}|{second}" for first, second in expected]
    assert [one.text for one in questions(items, "pointwise", SINGLE)] == [
        f"{question}|{text}" for text in (good, bad, "third")
    ]


def test_what_differs_in_anything_is_asked_by_itself_and_what_is_equal_once():
    row = bench_row("q", "mcq/a.png")
    same = pairs(row, row, row | {"chosen": row["rejected"], "rejected": row["chosen"]})
    assert len(questions(same, "pairwise", SHORT)) == 2
    others = pairs(row, row | {"id": "p"}, row | {"prompt": "Why?"}, row | {"image": "mcq/b.png"})
    assert len({one.name for one in questions(others, "pairwise", SHORT)}) == 8


def test_names_do_not_depend_on_the_company():
    rows = [bench_row(name, "mcq/a.png", number) for name in "pq" for number in range(2)]
    names = {one.text: one.name for one in questions(pairs(*rows), "pairwise", SHORT)}
    back = {one.text: one.name for one in questions(pairs(*rows[::-1]), "pairwise", SHORT)}
    assert names == back


def test_a_template_without_the_right_fields_is_refused():
    with pytest.raises(ValueError, match=r"expected the fields \['first', 'question', 'second'\]"):
        questions(pairs(bench_row("q", "mcq/a.png")), "pairwise", SINGLE)


@pytest.mark.parametrize("way", FIELDS)
def test_our_own_templates_ask_for_the_words_that_are_understood(way):
    template = load_template(f"judge_{way}")
    assert template.fields == set(FIELDS[way])
    if way == "pairwise":
        quoted = [
            preference(word) for word in ("Better: 1", "Better: 2", "Better: tie") if f'"{word}"' in template.text
        ]
        assert quoted == ["first", "second", "tie"]
    else:
        assert '"Score: N"' in template.text
        assert "from 1 (" in template.text
        assert "to 10 (" in template.text


# What follows -------------------------------------------------------------------------------------------------

WORDS = {"first": "Better: 1", "second": "Better: 2", "tie": "Better: tie", None: "Hm."}


@pytest.mark.parametrize(("one", "other"), list(product(WORDS, WORDS)))
def test_two_verdicts_come_to_one_as_the_table_says(one, other):
    """`one` is said of (chosen, rejected), `other` of (rejected, chosen)."""
    table = {
        ("first", "second"): ([1.0, 0.0], "judged"),
        ("second", "first"): ([0.0, 1.0], "judged"),
        ("tie", "tie"): ([0.5, 0.5], "tied"),
    }
    missing = ([None, None], "unparsable") if None in (one, other) else ([0.5, 0.5], "inconsistent")
    rewards, outcome = table.get((one, other), missing)
    items = pairs(bench_row("q", "mcq/a.png"))
    asked = questions(items, "pairwise", SHORT)
    said = dict(zip((each.text for each in asked), (WORDS[one], WORDS[other]), strict=True))
    verdicts = Verdicts("pairwise", answered(asked, said.get))
    (row,) = verdicts.rows(items)
    assert row["rewards"] == rewards
    assert verdicts.outcomes == {outcome: 1}
    assert row["said"] == [WORDS[one], WORDS[other]]
    known = {"first": 0, "second": 1}
    sides = ["chosen", "rejected"]
    assert row["orders"] == [
        sides[known[one]] if one in known else one,
        sides[::-1][known[other]] if other in known else other,
    ]
    assert (row["id"], row["chosen"], row["rejected"]) == ("q", items[0].chosen, items[0].rejected)


@pytest.mark.parametrize("finish", ["length", "content_filter", "refusal"])
def test_an_answer_that_did_not_come_to_its_end_is_no_opinion(finish):
    """Of a score of 10 that was cut behind its first digit, 1 would be left."""
    items = pairs(bench_row("q", "mcq/a.png"))
    for way, template, words in (("pairwise", SHORT, "Better: 1"), ("pointwise", SINGLE, "Score: 1")):
        asked = questions(items, way, template)
        for ending, counted in ((finish, "unparsable"), ("stop", "inconsistent" if way == "pairwise" else "judged")):
            verdicts = Verdicts(way, answered(asked, lambda _, words=words: words, ending))
            list(verdicts.rows(items))
            assert set(verdicts.outcomes) == {counted}


def judged(tmp_path, way, template, answer, rows):
    """What the benchmark makes of a judge's file: the status of every pair, and which are right."""
    items = RewardBench().items(written(tmp_path / "items.jsonl", rows))
    asked = questions(items, way, template)
    verdicts = Verdicts(way, answered(asked, answer))
    path = written(tmp_path / "verdicts.jsonl", list(verdicts.rows(items)))
    found = read_rewards(path, items, Ledger("scores"))
    grades = [RewardBench().grade(item, found.get(item.key)) for item in items]
    return verdicts, Counter((grade.status, grade.correct) for grade in grades), found


ROWS = [bench_row(name, "mcq/a.png", number) for name in "pqr" for number in range(3)]


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (lambda text: f"Better: {1 if text.split('|')[1].startswith('good') else 2}", ("judged", True)),
        (lambda text: f"Better: {2 if text.split('|')[1].startswith('good') else 1}", ("judged", False)),
        (lambda text: "Better: 1", ("tied", False)),
        (lambda text: "Better: tie", ("tied", False)),
        (lambda text: "Both are nice.", ("unparsable", False)),
    ],
)
def test_the_benchmark_reads_the_verdicts_of_judges_of_every_kind(answer, status, tmp_path):
    for rows in (ROWS, ROWS + ROWS[:4]):  # the second has rows that repeat others
        _, counts, found = judged(tmp_path, "pairwise", SHORT, answer, rows)
        assert counts == {status: len(rows)}
        assert len(found) == len(rows)


def test_the_benchmark_reads_scores_of_single_texts(tmp_path):
    def answer(text):
        _, response = text.split("|")
        if response.startswith("bad 2"):
            return "Score: fine"
        return "Score: 5" if response.startswith(("good 0", "bad")) else "Score: 8.5"

    verdicts, counts, found = judged(tmp_path, "pointwise", SINGLE, answer, ROWS)
    assert counts == {("judged", True): 3, ("tied", False): 3, ("unparsable", False): 3}
    assert Counter(found.values()) == {Rewards(8.5, 5.0): 3, Rewards(5.0, 5.0): 3, Rewards(8.5, None): 3}
    assert verdicts.outcomes == {"judged": 15, "unparsable": 3}


def test_a_text_that_stands_in_many_pairs_has_one_row(tmp_path):
    rows = [bench_row("q", "mcq/a.png", rejected=f"bad {number}") for number in range(3)]
    items = RewardBench().items(written(tmp_path / "items.jsonl", rows))
    replies = answered(questions(items, "pointwise", SINGLE), lambda _: "Score: 3")
    found = [(row["id"], row["digest"]) for row in Verdicts("pointwise", replies).rows(items)]
    assert sorted(found) == sorted(("q", of_text(text)) for text in ("good 0 of q", "bad 0", "bad 1", "bad 2"))


def test_the_account_tells_outcomes_what_was_lost_and_how_often_the_first_won():
    items = pairs(*ROWS)
    asked = questions(items, "pairwise", SHORT)
    words = iter(["Better: 1", "Better: 1"] * 4 + ["Better: 2", "Better: 1"] * 3 + ["Better: tie", "Hm", "Better: 1"])
    replies = answered(asked, lambda _: next(words, "Better: 1"))
    last = asked[-1].name
    replies[last] = replies[last]._replace(finish="length")
    verdicts = Verdicts("pairwise", replies)
    list(verdicts.rows(items))
    assert verdicts.outcomes == {"inconsistent": 4, "judged": 3, "unparsable": 2}
    assert verdicts.preferred == {"first": 12, "second": 3, "tie": 1, "None": 1}
    assert verdicts.told() == (
        "4 inconsistent, 3 judged, 2 unparsable; 18 questions of which 1 cut; the first of two was preferred 12 times "
        "of 15 (80%); 180 tokens read and 36 written"
    )
