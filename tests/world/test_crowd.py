"""Annotators agree on a ranking that has a pair, names its own best response, and is theirs, not one of theirs."""

from collections import Counter

import pytest

from mmrlhf.queries import Query
from mmrlhf.records import Candidates, RankedQuery, Response
from mmrlhf.world.annotator import Noise, annotate
from mmrlhf.world.crowd import consensus
from mmrlhf.world.facts import Fact
from mmrlhf.world.plan import MIX, plan
from mmrlhf.world.scenes import Scene, Shape, stream
from mmrlhf.world.truth import truth

SCENE = Scene(
    90, 90, "grey", (Shape("ring", "red", "small", 200, 200, 80), Shape("cross", "blue", "small", 700, 700, 80))
)
COUNT = Fact("count", (SCENE,), expected="2")
LONG = "I count 2. " + "I have looked at the picture with great care. " * 6


def sheets(people, *texts, swap=0.0, key=0):
    """What several annotators hand in on the count of two shapes."""
    candidates = Candidates(Query("q", "?"), tuple(Response(text) for text in texts))
    return [annotate(candidates, COUNT, stream("sheet", key, person), Noise(swap=swap)) for person in range(people)]


def said(texts, *rankings, scores=()):
    """Sheets written by hand: one ranking of the same texts for each annotator."""
    return [
        RankedQuery(
            Query("q", "?"),
            tuple(
                Response(text, rank=rank, reason=f"{text} by {person}", scores=dict(scores[person]) if scores else {})
                for text, rank in zip(texts, ranking, strict=True)
            ),
            f"Response {ranking.index(min(ranking)) + 1} is best: so says {person}.",
        )
        for person, ranking in enumerate(rankings)
    ]


def test_mean_ranks_make_the_ranking():
    merged = consensus(said(("2", "5", "4"), (1, 2, 3), (2, 1, 3), (1, 3, 2)), COUNT, stream("c"))
    assert merged.ranks == (1, 2, 3)
    assert consensus(said(("2", "5", "4"), (1, 2, 3), (1, 3, 2)), COUNT, stream("c")).ranks == (1, 2, 2)


def test_scores_are_medians_of_those_who_gave_them():
    given = ({"helpfulness": 5, "ethics": 4}, {"helpfulness": 1, "ethics": 5}, {"helpfulness": 2, "ethics": None})
    merged = consensus(said(("2", "5"), (1, 2), (1, 2), (1, 2), scores=given), COUNT, stream("c"))
    assert merged.responses[0].scores == {"helpfulness": 2, "faithfulness": None, "ethics": 4}


def test_the_reason_names_the_response_that_the_crowd_ranks_first():
    merged = consensus(said(("5", "2"), (1, 2), (2, 1), (2, 1)), COUNT, stream("c"))
    assert merged.ranks == (2, 1)
    assert merged.ranking_reason == "Response 2 is best: 2 by 0."


@pytest.mark.parametrize("first", [(1, 2), (2, 1)])
def test_of_opposite_opinions_on_right_and_wrong_the_first_decides(first):
    merged = consensus(said(("2", "5"), first, first[::-1]), COUNT, stream("c"))
    assert merged.ranks == first
    assert not any(response.constructed for response in merged.responses)


@pytest.mark.parametrize(("texts", "constructed"), [(("2", LONG), "negative"), (("5", "4"), "positive")])
def test_opposite_opinions_on_answers_alike_in_truth_get_a_constructed_response(texts, constructed):
    merged = consensus(said(texts, (1, 2), (2, 1)), COUNT, stream("c"))
    assert [response.constructed for response in merged.responses] == ["", "", constructed]
    assert merged.ranks == ((1, 1, 2) if constructed == "negative" else (2, 2, 1))


@pytest.mark.parametrize("people", [2, 3, 5])
@pytest.mark.parametrize(
    ("texts", "good"),
    [
        (("5", "3", "I count 4."), False),
        (("5", "3", "", "6"), False),
        (("2", "I count 2.", "There are 2 shapes."), True),
    ],
)
def test_a_tie_gets_one_response_written_once(people, texts, good):
    handed_in = sheets(people, *texts, swap=0.5)
    merged = consensus(handed_in, COUNT, stream("c"))
    assert [response.text for response in merged.responses[:-1]] == list(texts)
    written = merged.responses[-1]
    assert written.constructed == ("negative" if good else "positive")
    assert truth(COUNT, written.text).right != good
    assert written.scores == sheets(1, written.text)[0].responses[0].scores
    place = 1 if good else len(texts) + 1
    assert merged.ranking_reason.startswith(f"Response {place} is best")
    assert len(merged.pairs()) == len(texts)


def test_a_constructed_response_comes_from_its_own_seed():
    handed_in = sheets(3, "5", "3", "4")
    texts = {consensus(handed_in, COUNT, stream("c", n)).responses[-1].text for n in range(40)}
    assert texts == {"2", "There are 2 shapes.", "I count 2."}


def test_a_single_sheet_stands_as_it_is():
    for texts in (("2", "5"), ("5", "3", "4"), ("2", "I count 2.")):
        (sheet,) = sheets(1, *texts)
        assert consensus([sheet], COUNT, stream("c")) == sheet


def test_sheets_on_different_candidates_are_refused():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        consensus([*sheets(1, "2", "5"), *sheets(1, "2", "5", "3")], COUNT, stream("c"))


@pytest.mark.parametrize("people", [1, 2, 3, 4])
def test_every_question_has_a_pair_and_a_reason_that_names_its_best(people):
    for item in plan(5, 150, MIX):
        noise = Noise(swap=0.5, reason=0.3)
        handed_in = [annotate(item.candidates, item.fact, stream(item.query.id, n), noise) for n in range(people)]
        merged = consensus(handed_in, item.fact, stream("c", item.query.id))
        assert all(row.pairs() for row in [*handed_in, merged])
        named = int(merged.ranking_reason.split()[1]) - 1
        assert merged.ranks[named] == 1
        assert f"is best: {merged.responses[named].reason}." in merged.ranking_reason
        judged = [truth(item.fact, response.text).right for response in merged.responses]
        assert len(set(judged)) == 2 or not any(response.constructed for response in merged.responses)


def test_the_majority_of_noisy_annotators_is_nearer_to_the_truth_than_one():
    right = Counter()
    for n in range(300):
        handed_in = sheets(5, "2", "5", swap=0.3, key=n)
        right["one"] += handed_in[0].ranks == (1, 2)
        right["five"] += consensus(handed_in, COUNT, stream("c", n)).ranks == (1, 2)
    assert right["five"] > right["one"] + 20
