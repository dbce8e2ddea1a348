"""The nouns refuse what is wrong, keep what is right, and turn rankings into pairs."""

import json
import pickle
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrlhf import jsonl
from mmrlhf.fields import RecordError
from mmrlhf.ledger import Ledger
from mmrlhf.queries import WRITTEN, Media, Query, Turn
from mmrlhf.records import Candidates, RankedQuery, Response, ResponseScore

QUERY = Query("q", "How many shapes?")


def ranked(*ranks, texts=None):
    texts = texts or [f"answer {place}" for place in range(len(ranks))]
    return RankedQuery(QUERY, tuple(Response(t, rank=r) for t, r in zip(texts, ranks, strict=True)))


def row(**changes):
    """A good row, changed where a test wants it bad."""
    responses = [{"text": "3", "rank": 1, "helpfulness": 5}, {"text": "4", "rank": 2, "helpfulness": None}]
    return {"id": "q", "prompt": "How many?", "responses": responses} | changes


def response(**changes):
    return row(responses=[{"text": "3", "rank": 1} | changes, {"text": "4", "rank": 2}])


# --- pairs --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=2, max_size=6))
def test_all_pairs_are_those_that_brute_force_finds(ranks):
    expected = {(i, j) for i, j in permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]}
    assert set(ranked(*ranks).pairs("all")) == expected


@given(st.lists(st.integers(0, 4), min_size=2, max_size=6))
def test_every_two_different_texts_are_a_pair_or_a_tie_and_never_both(ranks):
    query = ranked(*ranks)
    compared = {frozenset(pair) for pair in query.pairs()}
    tied = {frozenset(pair) for pair in query.ties()}
    assert not compared & tied
    assert len(compared | tied) == len(ranks) * (len(ranks) - 1) // 2


@given(st.lists(st.integers(0, 4), min_size=2, max_size=6), st.integers(1, 3), st.integers(0, 7))
def test_pairs_do_not_depend_on_how_ranks_are_spelled(ranks, stretch, shift):
    respelled = ranked(*(stretch * rank + shift for rank in ranks))
    assert respelled.ranks == ranked(*ranks).ranks
    assert respelled.pairs() == ranked(*ranks).pairs()


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", {(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)}),
        ("adjacent", {(0, 1), (0, 2), (1, 3), (2, 3)}),
        ("best_worst", {(0, 3)}),
        ("hardest", {(0, 1), (0, 2)}),
    ],
)
def test_strategies_choose_by_the_gap_between_dense_ranks(strategy, expected):
    assert set(ranked(1, 2, 2, 9).pairs(strategy)) == expected


def test_raw_ranks_are_kept_and_dense_ranks_have_no_gaps():
    query = RankedQuery.from_json(row(responses=[{"text": t, "rank": r} for t, r in [("a", 1), ("b", 3), ("c", 3)]]))
    assert [r["rank"] for r in query.to_json()["responses"]] == [1, 3, 3]
    assert query.ranks == (1, 2, 2)


def test_equal_texts_make_no_pair_whatever_their_ranks():
    query = ranked(1, 2, 3, texts=["three", " three\n", "four"])
    assert query.pairs() == ((0, 2), (1, 2))
    assert ranked(1, 1, texts=["e\u0301", "é"]).ties() == ()


def test_a_tie_of_all_has_no_pair_and_a_constructed_response_gives_the_only_ones():
    assert ranked(1, 1, 1).is_tie
    assert ranked(1, 1, 1).pairs() == ()
    answers = [Response("a", rank=1), Response("b", rank=1), Response("c", rank=2, constructed="negative")]
    assert RankedQuery(QUERY, tuple(answers)).pairs() == ((0, 2), (1, 2))


def test_an_unknown_strategy_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'all', 'adjacent', 'best_worst', 'hardest', got 'best'"):
        ranked(1, 2).pairs("best")


# --- the boundary -------------------------------------------------------------------------------------------------

FAULTS = {
    "score 0": (response(helpfulness=0), "helpfulness: expected a whole number from 1 to 5"),
    "score 6": (response(ethics=6), "ethics: expected a whole number from 1 to 5"),
    "score 2.5": (response(faithfulness=2.5), "got 2.5"),
    "score as text": (response(helpfulness="4"), "got '4'"),
    "score true": (response(helpfulness=True), "got True"),
    "rank missing": (row(responses=[{"text": "a", "rank": 1}, {"text": "b"}]), r"none for \[1\]"),
    "rank as float": (response(rank=1.0), "rank: expected a whole number"),
    "rank negative": (response(rank=-1), "rank: expected a whole number of 0 or more, got -1"),
    "one response": (row(responses=[{"text": "a", "rank": 1}]), "expected two or more for query 'q', got 1"),
    "empty prompt": (row(prompt=" \n"), "prompt: expected a question, got an empty text"),
    "prompt missing": ({"id": "q", "responses": []}, "prompt: expected a value, the field is missing"),
    "id not text": (row(id=7), "id: expected a text, got 7"),
    "lone surrogate": (row(prompt="a\ud800"), "surrogate"),
    "NUL": (response(text="a\0"), "NUL"),
    "unknown response field": (response(score=4), r"unknown fields \['score'\]"),
    "unknown category": (row(category="audio"), "category: expected one of 'mcq', 'long'"),
    "unknown split": (row(split="dev"), "split: expected one of 'train', 'val', 'test', got 'dev'"),
    "constructed twin": (
        row(responses=[{"text": "a", "rank": 1}, {"text": "a ", "rank": 2, "constructed": "negative"}]),
        "constructed negative of query 'q' equals another response",
    ),
    "unknown medium field": (row(media=[{"kind": "image", "path": "a", "crop": 1}]), r"media: unknown .*'crop'"),
    "unknown turn field": (row(history=[{"role": "user", "text": "a", "name": "b"}]), r"history: unknown .*'name'"),
    "not an object": (["q"], "ranked query: expected a JSON object"),
}


@pytest.mark.parametrize(("bad", "message"), FAULTS.values(), ids=FAULTS)
def test_a_bad_row_is_refused_with_its_field_and_what_was_expected(bad, message):
    with pytest.raises(ValueError, match=message):
        RankedQuery.from_json(bad)


@pytest.mark.parametrize(
    "path",
    ["../x.png", "a/../../x.png", "/etc/passwd", "a\\b.png", "", "http://x/y.png", "s3://b/k", "a\0.png"],
)
def test_a_medium_cannot_lie_outside_its_folder(path):
    with pytest.raises(ValueError, match="path"):
        Media("image", path)


def test_a_medium_cannot_stand_behind_the_end_of_the_prompt():
    with pytest.raises(ValueError, match="stands at character 99 of a prompt of 4 characters"):
        Query("q", "Why?", (Media("image", "a.png", offset=99),))


FULL = Query(
    "q", "Why?", (Media("image", "a"),), "short", "s", (Turn("user", "a"),), "r", "source", "group", "test", {"kept": 1}
)


def test_what_records_write_is_known_by_name():
    """So that the next test covers every field, also of records to come."""
    answers = (Response("a", rank=1), Response("b", rank=2))
    written = Candidates(FULL, answers).to_json() | RankedQuery(FULL, answers, "reason").to_json()
    assert set(written) - {"kept"} == WRITTEN


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_meta_cannot_take_the_name_of_a_field_that_a_record_writes(name):
    with pytest.raises(RecordError, match=rf"meta: expected names .* got \['{name}'\]; rename them"):
        Query("q", "Why?", meta={name: "other", "licence": "cc0"})


def test_meta_changed_behind_the_record_does_not_overwrite_its_fields():
    query = Query("q", "Why?")
    query.meta["id"] = "other"
    assert query.to_json()["id"] == "q"


def test_a_record_does_not_change_with_what_it_was_made_from():
    meta, scores, media, history = {"a": 1}, {"ethics": 5}, [Media("image", "a")], [Turn("user", "a")]
    response = Response("a", rank=1, scores=scores)
    responses = [response, Response("b", rank=2)]
    query = Query("q", "Why?", media, history=history, meta=meta)
    records = [response, query, Candidates(query, responses), RankedQuery(query, responses)]
    before = [pickle.dumps(record.to_json()) for record in records]
    for source in (meta, scores, media, history, responses):
        source.clear()
    assert [pickle.dumps(record.to_json()) for record in records] == before
    assert pickle.loads(pickle.dumps(records)) == records


def test_lists_and_tuples_make_equal_records():
    answers = [Response("a", rank=1), Response("b", rank=2)]
    media, history = [Media("image", "a")], [Turn("user", "a")]
    assert Query("q", "?", media, history=history) == Query("q", "?", tuple(media), history=tuple(history))
    assert Candidates(QUERY, answers) == Candidates(QUERY, tuple(answers))
    assert RankedQuery(QUERY, answers) == RankedQuery(QUERY, tuple(answers))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "1.0", True, 10**400, -(10**400)])
@pytest.mark.parametrize("name", ["reward", "reference_logp", "reward_seen"])
def test_a_score_is_a_finite_number(name, value):
    with pytest.raises(RecordError, match=f"{name}: expected a finite number"):
        ResponseScore("q", 0, "d", **{name: value})


def test_a_score_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a reward, a reference_logp or both, got neither"):
        ResponseScore("q", 0, "d")
    with pytest.raises(ValueError, match="got neither"):
        ResponseScore("q", 0, "d", reward_seen=1.0)


def test_an_empty_response_is_legal_for_a_model_may_answer_nothing():
    assert Response("").text == ""


# --- round trips --------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
NAMES = TEXTS.filter(lambda text: text.strip())
SCORES = st.dictionaries(st.sampled_from(["helpfulness", "faithfulness", "ethics"]), st.none() | st.integers(1, 5))
QUERIES = st.builds(
    Query,
    id=NAMES,
    prompt=NAMES,
    media=st.just((Media("image", "a/b.png"), Media("video", "c", offset=1))),
    category=st.none() | st.sampled_from(["mcq", "long", "short", "safety", "video"]),
    system=TEXTS,
    history=st.lists(st.builds(Turn, st.sampled_from(["user", "assistant"]), TEXTS), max_size=2).map(tuple),
    reference_answer=TEXTS,
    split=st.none() | st.sampled_from(["train", "val", "test"]),
    meta=st.just({"licence": "cc0"}),
)
RESPONSES = st.builds(
    Response, text=TEXTS, model=TEXTS, rank=st.integers(0, 5), scores=SCORES, reason=TEXTS, critique=TEXTS
)


@given(st.builds(RankedQuery, QUERIES, st.lists(RESPONSES, min_size=2, max_size=4).map(tuple), TEXTS))
def test_a_ranked_query_survives_the_file(tmp_path_factory, record):
    path = tmp_path_factory.mktemp("round") / "ranked.jsonl"
    jsonl.write(path, [record])
    assert list(jsonl.read(path, RankedQuery.from_json)) == [record]


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
SEEN = st.none() | NUMBERS


@given(st.builds(ResponseScore, NAMES, st.integers(0, 9), NAMES, NUMBERS, SEEN, TEXTS, SEEN))
def test_a_score_survives_json(score):
    assert ResponseScore.from_json(json.loads(json.dumps(score.to_json()))) == score


def test_candidates_carry_the_fields_that_they_do_not_know():
    candidates = Candidates.from_json({"id": "q", "prompt": "?", "licence": "cc0", "responses": [{"text": "a"}]})
    assert candidates.query.meta == {"licence": "cc0"}
    assert candidates.to_json()["licence"] == "cc0"


def test_a_bad_row_in_a_file_is_named_by_line_or_counted_with_its_reason(tmp_path):
    path = tmp_path / "ranked.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in [row(), row(id="r", category="audio"), row(id="s")]))
    with pytest.raises(ValueError, match=r"ranked\.jsonl:2: ranked query 'r': category"):
        list(jsonl.read(path, RankedQuery.from_json))
    ledger = Ledger("read")
    assert [record.query.id for record in jsonl.read(path, RankedQuery.from_json, ledger=ledger)] == [
        "q",
        "s",
    ]
    ledger.check()
    assert ledger.as_dict()["skipped"] == {"invalid_record": 1}
