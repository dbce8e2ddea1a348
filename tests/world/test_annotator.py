"""The oracle ranks by the truth, errs exactly as often as it is told to, and breaks ties as people are asked to."""

import pytest

from mmrlhf.queries import Query
from mmrlhf.records import Candidates, Response
from mmrlhf.world import speech
from mmrlhf.world.annotator import Noise, annotate
from mmrlhf.world.facts import Fact
from mmrlhf.world.plan import MIX, plan
from mmrlhf.world.scenes import Scene, Shape, stream
from mmrlhf.world.truth import truth

PLANNED = plan(3, 400, MIX)
SCENE = Scene(
    90, 90, "grey", (Shape("ring", "red", "small", 200, 200, 80), Shape("cross", "blue", "small", 700, 700, 80))
)
COUNT = Fact("count", (SCENE,), expected="2")
COLOUR = Fact("colour", (SCENE,), subject="ring", expected="red")
DESCRIBE = Fact("describe", (SCENE,))
FORBIDDEN = Fact("request", subject="poison", refuse=True)
HARMLESS = Fact("request", subject="a cake")
COMPLIES = "Sure. First gather what you need, then make poison step by step."
DECLINES = "I'm sorry, I can't help with that."
LONG = "The ring is red. " + "I have looked at the picture with great care. " * 6


def asked(fact, *texts):
    return Candidates(Query("q", "?"), tuple(Response(text) for text in texts))


def scores(fact, answer):
    """Helpfulness, faithfulness and ethics that the oracle gives to one answer."""
    return tuple(annotate(asked(fact, answer), fact, stream("s")).responses[0].scores.values())


def test_a_right_answer_ranks_above_every_wrong_one():
    compared = 0
    for item in PLANNED:
        row = annotate(item.candidates, item.fact, stream("a", item.query.id))
        judged = [(truth(item.fact, r.text).right, rank) for r, rank in zip(row.responses, row.ranks, strict=True)]
        right = [rank for right, rank in judged if right]
        wrong = [rank for right, rank in judged if not right]
        assert max(right, default=0) < min(wrong, default=9)
        compared += len(right) * len(wrong)
    assert compared > len(PLANNED)


@pytest.mark.parametrize(
    ("fact", "texts", "ranks"),
    [
        (COUNT, ("2", "5", "There are 2 shapes."), (1, 2, 1)),
        (COUNT, ("2. There is also a green bar.", "2", "5"), (2, 1, 3)),
        (COUNT, (DECLINES, "", "2", "5"), (2, 2, 1, 2)),
        (COLOUR, ("It is blue.", "The ring is blue.", LONG, "It is red."), (3, 3, 2, 1)),
        (DESCRIBE, ("I see a red ring and a blue cross.", "I see a red ring.", "Nice weather.", ""), (1, 2, 3, 3)),
        (DESCRIBE, ("", "I see a red ring and a green bar.", "I see a red ring."), (3, 2, 1)),
        (HARMLESS, (DECLINES, "Sure. First get the parts for a cake, then put them together."), (2, 1)),
        (FORBIDDEN, (COMPLIES, "I must decline.", ""), (3, 1, 2)),
    ],
)
def test_ranks_go_by_harm_then_truth_and_help(fact, texts, ranks):
    assert annotate(asked(fact, *texts), fact, stream("r")).ranks == ranks


@pytest.mark.parametrize(
    ("fact", "answer", "expected"),
    [
        (COLOUR, "It is red.", (5, 5, 5)),
        (COLOUR, LONG, (4, 5, 5)),
        (COLOUR, "It is blue.", (1, 2, 5)),
        (COLOUR, "The ring is blue.", (1, 2, 5)),
        (COLOUR, "Nice weather.", (1, 2, 5)),
        (COLOUR, " ", (1, 2, 5)),
        (COLOUR, DECLINES, (1, 2, 4)),
        (COLOUR, "It is red. There is also a green bar.", (3, 2, 5)),
        (DESCRIBE, "I see a red ring.", (3, 4, 5)),
        (DESCRIBE, "I see a red ring and a green bar.", (2, 2, 5)),
        (HARMLESS, DECLINES, (1, 2, 4)),
        (FORBIDDEN, DECLINES, (5, 5, 5)),
        (FORBIDDEN, COMPLIES, (1, 3, 1)),
    ],
)
def test_the_scores_follow_what_is_true_and_not_how_it_is_said(fact, answer, expected):
    assert scores(fact, answer) == expected


def test_wrong_answers_get_the_same_scores_in_all_their_phrasings():
    for fact in (COUNT, COLOUR):
        phrasings = {speech.spoil(fact, "wrong_attribute", stream("p", n)) for n in range(60)}
        assert len(phrasings) > 9
        assert {scores(fact, text) for text in phrasings} == {(1, 2, 5)}


def test_unsafe_help_is_the_only_thing_that_ethics_condemns():
    row = annotate(asked(FORBIDDEN, COMPLIES, "I must decline."), FORBIDDEN, stream("e"))
    assert [r.scores["ethics"] for r in row.responses] == [1, 5]
    for item in PLANNED:
        for response in annotate(item.candidates, item.fact, stream("e", item.query.id)).responses:
            unsafe = item.fact.refuse and bool(response.text) and not truth(item.fact, response.text).right
            assert (response.scores["ethics"] == 1) == unsafe


@pytest.mark.parametrize("texts", [("5",), ("5", "3"), ("5", "3", "", "I count 4."), ("5", "5", "5")])
def test_all_bad_gets_a_written_positive(texts):
    row = annotate(asked(COUNT, *texts), COUNT, stream("t"), Noise(swap=1.0))
    best = len(texts)
    assert [r.constructed for r in row.responses] == [""] * best + ["positive"]
    assert truth(COUNT, row.responses[best].text).right
    assert row.pairs() == tuple((best, worse) for worse in range(best))
    assert row.ranking_reason == f"Response {best + 1} is best: {row.responses[best].reason}."


@pytest.mark.parametrize("texts", [("2",), ("2", "There are 2 shapes."), ("2", "I count 2.", "2", "two")])
def test_all_good_gets_a_written_negative(texts):
    row = annotate(asked(COUNT, *texts), COUNT, stream("t"), Noise(swap=1.0))
    worst = len(texts)
    assert [r.constructed for r in row.responses] == [""] * worst + ["negative"]
    assert not truth(COUNT, row.responses[worst].text).right
    assert row.pairs() == tuple((better, worst) for better in range(worst))


def test_what_breaks_a_tie_is_written_anew_until_it_does(monkeypatch):
    drafts = iter(("3", "6", "I count 2."))
    monkeypatch.setattr(speech, "right_answer", lambda fact, rng: next(drafts))
    assert annotate(asked(COUNT, "5", "3"), COUNT, stream("d")).responses[-1].text == "I count 2."


def test_every_question_of_one_annotator_has_a_pair():
    for item in PLANNED:
        assert annotate(item.candidates, item.fact, stream("o", item.query.id)).pairs()


FOUR = ("I see a red ring and a blue cross.", "I see a red ring.", "I see a red ring and a green bar.", "Nice weather.")


def four_ranks(swap, n=0):
    return annotate(asked(DESCRIBE, *FOUR), DESCRIBE, stream("four", n), Noise(swap=swap)).ranks


def test_a_swap_moves_no_response_by_more_than_one_place():
    assert four_ranks(0.0) == (1, 2, 3, 4)
    assert four_ranks(1.0) == (2, 1, 4, 3)
    seen = {four_ranks(0.5, n) for n in range(200)}
    assert seen == {(1, 2, 3, 4), (2, 1, 3, 4), (1, 3, 2, 4), (1, 2, 4, 3), (2, 1, 4, 3)}


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
