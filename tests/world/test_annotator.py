"""The oracle ranks by the truth, errs exactly as often as it is told to, and breaks ties as people are asked to."""

from collections import Counter

import pytest

from mmrlhf.queries import Query
from mmrlhf.records import Candidates, Response
from mmrlhf.world import speech
from mmrlhf.world.annotator import Noise, annotate
from mmrlhf.world.crowd import consensus
from mmrlhf.world.facts import Fact
from mmrlhf.world.plan import MIX, plan
from mmrlhf.world.scenes import Scene, Shape, stream
from mmrlhf.world.truth import truth

PLANNED = plan(3, 400, MIX)
SCENE = Scene(
    90, 90, "grey", (Shape("ring", "red", "small", 200, 200, 80), Shape("cross", "blue", "small", 700, 700, 80))
)
COUNT = Fact("count", (SCENE,), expected="2")
FORBIDDEN = Fact("request", subject="poison", refuse=True)


def asked(fact, *texts):
    return Candidates(Query("q", "?"), tuple(Response(text) for text in texts))


def test_a_right_answer_never_ranks_below_a_wrong_one():
    for item in PLANNED:
        row = annotate(item.candidates, item.fact, stream("a", item.query.id))
        judged = [(truth(item.fact, r.text).right, rank) for r, rank in zip(row.responses, row.ranks, strict=True)]
        assert max((rank for right, rank in judged if right), default=0) <= min(
            (rank for right, rank in judged if not right), default=9
        )


COMPLIES = "Sure. First gather what you need, then make poison step by step."


@pytest.mark.parametrize(
    ("fact", "texts", "ranks"),
    [
        (COUNT, ("2", "5", "There are 2 shapes."), (1, 2, 1)),
        (COUNT, ("2. There is also a green bar.", "2", "5"), (2, 1, 3)),
        (COUNT, ("I'm sorry, I can't help with that.", "", "2"), (2, 2, 1)),
        (FORBIDDEN, (COMPLIES, "I must decline.", ""), (3, 1, 2)),
    ],
)
def test_ranks_go_by_harm_then_truth_and_help(fact, texts, ranks):
    assert annotate(asked(fact, *texts), fact, stream("r")).ranks == ranks


def test_unsafe_help_is_the_only_thing_that_ethics_condemns():
    row = annotate(asked(FORBIDDEN, COMPLIES, "I must decline."), FORBIDDEN, stream("e"))
    assert [r.scores["ethics"] for r in row.responses] == [1, 5]
    for item in PLANNED:
        for response in annotate(item.candidates, item.fact, stream("e", item.query.id)).responses:
            unsafe = item.fact.refuse and bool(response.text) and not truth(item.fact, response.text).refused
            assert (response.scores["ethics"] == 1) == unsafe


def test_all_bad_gets_a_written_positive_and_all_good_a_written_negative():
    bad = annotate(asked(COUNT, "5", "3"), COUNT, stream("t"))
    assert [r.constructed for r in bad.responses] == ["", "", "positive"]
    assert truth(COUNT, bad.responses[-1].text).right
    assert bad.pairs() == ((2, 0), (2, 1))
    good = annotate(asked(COUNT, "2", "There are 2 shapes."), COUNT, stream("t"))
    assert [r.constructed for r in good.responses] == ["", "", "negative"]
    assert not truth(COUNT, good.responses[-1].text).right
    assert good.pairs() == ((0, 2), (1, 2))


@pytest.mark.parametrize("swap", [0.0, 0.25, 1.0])
def test_neighbouring_ranks_are_swapped_as_often_as_asked(swap):
    texts = ("2", "5")
    swapped = [
        annotate(asked(COUNT, *texts), COUNT, stream("noise", n), Noise(swap=swap)).ranks == (2, 1) for n in range(600)
    ]
    assert sum(swapped) / len(swapped) == pytest.approx(swap, abs=0.06)


def test_wrong_reasons_leave_ranks_and_scores_alone():
    for n in range(30):
        honest = annotate(asked(COUNT, "2", "5"), COUNT, stream("w", n))
        lying = annotate(asked(COUNT, "2", "5"), COUNT, stream("w", n), Noise(reason=1.0))
        assert honest.ranks == lying.ranks
        assert [r.scores for r in honest.responses] == [r.scores for r in lying.responses]
        assert "wrong" in lying.responses[0].critique
        assert "correct" in honest.responses[0].critique


def test_a_critique_never_tells_scores_or_ranks():
    digits = set("12345")
    for item in PLANNED:
        if item.fact.kind in ("count", "choice", "describe", "compare"):
            continue
        for response in annotate(item.candidates, item.fact, stream("c", item.query.id)).responses:
            assert not digits & set(response.critique)
            assert response.critique


def test_the_majority_of_noisy_annotators_is_nearer_to_the_truth_than_one():
    right = Counter()
    for n in range(300):
        versions = [annotate(asked(COUNT, "2", "5"), COUNT, stream("m", n, p), Noise(swap=0.3)) for p in range(5)]
        right["one"] += versions[0].ranks == (1, 2)
        right["five"] += consensus(versions).ranks == (1, 2)
    assert right["five"] > right["one"] + 20


def test_more_skill_means_more_right_answers():
    shares = {}
    for skill in speech.SKILLS:
        shares[skill.model] = sum(
            truth(item.fact, speech.answer(item.fact, skill, stream("s", skill.model, item.query.id)).text).right
            for item in PLANNED
        ) / len(PLANNED)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert shares["expert"] > 0.85
    assert shares["novice"] < 0.45
