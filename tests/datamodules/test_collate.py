"""A batch holds the comparisons of its queries, and is computed as each of its sequences alone would be."""

import copy
import dataclasses
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaOnevisionImageProcessor

from mmrlhf.batches import IGNORED, visible
from mmrlhf.datamodules.collate import ScoredRow, collate, joined
from mmrlhf.datamodules.rows import Answers, Critiques, DropQueryError, fitted
from mmrlhf.prompts import Template
from mmrlhf.queries import Turn
from mmrlhf.records import PairStrategy, RankedQuery

from .made import picture, row, sample

STRATEGIES = get_args(PairStrategy)
LAYOUTS = ("packed", "rows")
PAD = 0


def scored(made, first=0.0, counted=True):
    """A row whose responses have the rewards `first`, `first` + 1, ... and ten times that as log-probs."""
    rewards = first + torch.arange(len(made.places), dtype=torch.float32)
    return ScoredRow(made, rewards, 10 * rewards, counted)


def batch(rows, layout="packed", pairs="all"):
    return collate(rows, padding=PAD, layout=layout, pairs=pairs)


# Comparisons ------------------------------------------------------------------------------------------------

QUERIES = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=2, max_size=5), min_size=1, max_size=4
)
"""Per query the rank and the length of each response."""


@settings(max_examples=60)
@given(QUERIES, st.sampled_from(STRATEGIES), st.sampled_from(LAYOUTS))
def test_pairs_and_ties_are_those_of_the_queries_as_far_as_their_responses_are_there(queries, strategy, layout):
    rows, winners, ties, texts = [], [], [], []
    for number, responses in enumerate(queries):
        made = row(3, [length for _, length in responses], ranks=[rank for rank, _ in responses])
        named = [
            dataclasses.replace(response, text=f"{number}/{place}")
            for place, response in enumerate(made.ranked.responses)
        ]
        made = made._replace(ranked=dataclasses.replace(made.ranked, responses=tuple(named)))
        kept = [response for response, (_, length) in zip(named, responses, strict=True) if length <= 6]
        try:
            rows.append(scored(fitted(made, 9, "drop_responses")[0]))
        except DropQueryError:
            assert len(kept) < 2
            continue
        reduced = RankedQuery(made.ranked.query, tuple(kept))
        winners += [(kept[a].text, kept[b].text) for a, b in reduced.pairs(strategy)]
        ties += [(kept[a].text, kept[b].text) for a, b in reduced.ties()]
        texts += [response.text for response in kept]
    if not rows:
        return
    made = batch(rows, layout, strategy)
    assert [(texts[a], texts[b]) for a, b in made.pairs.tolist()] == winners
    assert [(texts[a], texts[b]) for a, b in made.ties.tolist()] == ties
    assert made.pairs.dtype == made.ties.dtype == torch.long
    assert made.pairs.shape[1] == made.ties.shape[1] == 2
    assert made.responses.sum() == len(texts) == len(made.rewards) == len(made.reference_logps)
    assert len(made.rows.input_ids) == (len(rows) if layout == "packed" else len(texts))


def test_scores_and_names_stand_beside_their_responses():
    made = batch([scored(row(2, [1, 2])), scored(row(2, [1, 1, 1]), first=5)])
    assert made.rewards.tolist() == [0, 1, 5, 6, 7]
    assert made.reference_logps.tolist() == [0, 10, 50, 60, 70]
    assert made.responses.tolist() == [2, 3]
    assert made.ids == ("q", "q")


def annotated_row(*scores):
    """A row whose responses people gave these scores."""
    made = row(2, [1] * len(scores))
    told = zip(made.ranked.responses, scores, strict=True)
    responses = tuple(dataclasses.replace(response, scores=given) for response, given in told)
    return made._replace(ranked=dataclasses.replace(made.ranked, responses=responses))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_annotated_scores_stand_by_dimension_and_are_unknown_where_nobody_scored(layout):
    one = annotated_row({"ethics": 5, "helpfulness": 1}, {})
    two = annotated_row({"faithfulness": None, "ethics": 2}, {"helpfulness": 3, "faithfulness": 4, "ethics": 5})
    made = batch([scored(one), scored(two), scored(two, counted=False)], layout)
    nan = torch.nan
    wanted = torch.tensor([[1, nan, 5], [nan, nan, nan], [nan, nan, 2], [3, 4, 5], [nan] * 3, [nan] * 3])
    torch.testing.assert_close(made.scores, wanted, equal_nan=True)
    assert made.annotated.tolist()[:4] == pytest.approx([3, nan, 2, 4], nan_ok=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pairs", STRATEGIES)
def test_a_filling_row_takes_part_in_nothing_and_moves_nothing(layout, pairs):
    rows = [row(4, [2, 3, 2], given=1, ranks=[1, 2, 2]), row(2, [3, 3], given=2, ranks=[1, 1])]
    whole = batch([scored(rows[0]), scored(rows[1], 5), scored(rows[0], 9)], layout, pairs)
    filled = batch([scored(rows[0]), scored(rows[1], 5), scored(rows[0], 9, counted=False)], layout, pairs)
    assert filled.pairs.tolist() == [pair for pair in whole.pairs.tolist() if max(pair) < 5]
    assert filled.ties.tolist() == [pair for pair in whole.ties.tolist() if max(pair) < 5]
    assert len(filled.ties) == 2
    assert filled.ids == ("q", "q", "")
    assert filled.rewards[:5].tolist() == [0, 1, 2, 5, 6]
    assert filled.rewards[5:].isnan().all()
    assert filled.reference_logps[5:].isnan().all()
    count = 2 if layout == "packed" else 5
    assert (filled.rows.labels[count:] == IGNORED).all()
    assert (whole.rows.labels[count:] != IGNORED).any()
    assert torch.equal(filled.rows.labels[:count], whole.rows.labels[:count])
    for name in ("input_ids", "position_ids", "segment_ids", "previous"):
        assert torch.equal(getattr(filled.rows, name), getattr(whole.rows, name))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_of_filling_rows_alone_has_no_comparison(layout):
    made = batch([scored(row(2, [1, 1]), counted=False)], layout)
    assert made.pairs.shape == made.ties.shape == (0, 2)
    assert made.ids == ("",)


def test_the_responses_of_a_filling_row_keep_their_places_among_the_others():
    made = batch([scored(row(2, [1, 1, 1]), counted=False), scored(row(2, [1, 1]), 5)])
    assert made.pairs.tolist() == [[3, 4]]
    assert made.rewards[3:].tolist() == [5, 6]


def test_padding_is_what_the_tokenizer_says():
    made = collate([scored(row(2, [1, 2])), scored(row(2, [1, 1]))], padding=77, layout="rows", pairs="all")
    assert made.rows.input_ids[:, -1].tolist() == [77, 1002, 77, 77]


# Media ------------------------------------------------------------------------------------------------------


def test_media_are_laid_end_to_end_and_filled_up_to_the_most_tiles():
    one, two = torch.ones(1, 2, 3, 4, 4), torch.full((2, 5, 3, 4, 4), 2.0)
    found = joined([{"pixel_values": one, "image_sizes": torch.ones(1, 2)}, {}, {"pixel_values": two}])
    assert found["pixel_values"].shape == (3, 5, 3, 4, 4)
    assert torch.equal(found["pixel_values"][0, :2], one[0])
    assert not found["pixel_values"][0, 2:].any()
    assert torch.equal(found["pixel_values"][1:], two)
    assert found["image_sizes"].shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("pixel_values_videos", [(1, 4, 3, 2, 2), (1, 5, 3, 2, 2)]), ("pixel_values", [(1, 3, 2, 2), (1, 2, 3, 2, 2)])],
)
def test_media_that_do_not_fit_into_one_batch_are_refused(name, shapes):
    with pytest.raises(ValueError, match=rf"{name}: expected media that fit into one batch, .*; use micro_batch 1"):
        joined([{name: torch.zeros(shape)} for shape in shapes])


# Logits -----------------------------------------------------------------------------------------------------

JUDGE = Template("judge", "Question: {question}\nAnswer: {response}\nVerdict:")
FILM, LONG_FILM = [picture(seed) for seed in (1, 2, 3)], [picture(seed) for seed in range(4, 16)]
MIXED = [
    sample("a", texts=("It is red.", "Blue", "A green ring, I think."), reasons=("So it is.", "No", "Hm")),
    sample("b", [[picture(20)]], texts=("yes, three of them", "no"), ranks=(2, 1), reasons=("", "Yes.")),
    sample("c", [[picture(21)], [picture(22)], [picture(23)]], offsets=[6, 0, 3], prompt="Compare!", reasons=("x",)),
    sample("d", [LONG_FILM], texts=("up", "down", "left"), ranks=(1, 2, 2), reasons=("a", "b", "c")),
    sample("e", [[picture(24)], FILM, [picture(25)]], offsets=[0, 2, 4], reasons=("e", "f"), system="Be kind."),
    sample("f", texts=("no media again", "none"), history=(Turn("user", "Hi"), Turn("assistant", "Ho"))),
    sample("g", [FILM], texts=("it moves", "it rests")),
]


def alone(model, made):
    """The logits of the supervised tokens of each (prompt, response), run through the model alone."""
    found = []
    for told in made.continuations:
        ids = torch.cat([made.prefix, told.given, told.supervised])[None]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **made.features).logits[0]
        start = len(made.prefix) + len(told.given)
        found.append(logits[start - 1 : start - 1 + len(told.supervised)])
    return torch.cat(found)


def together(model, made):
    """The logits of the supervised tokens of a batch."""
    with torch.no_grad():
        logits = model(
            input_ids=made.rows.input_ids,
            attention_mask=visible(made.rows.segment_ids),
            position_ids=made.rows.position_ids,
            **made.rows.features,
        ).logits
    told = made.rows.labels != IGNORED
    return logits[told.nonzero(as_tuple=True)[0], made.rows.previous[told]]


def encoder(processor, task):
    return Answers(processor, 4) if task == "answers" else Critiques(processor, 4, JUDGE)


@pytest.fixture(scope="module", params=["answers", "critiques"])
def mixed(request, processor, tiny_model):
    rows = [encoder(processor, request.param)(case) for case in MIXED]
    return rows, torch.cat([alone(tiny_model, made) for made in rows])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_of_all_sorts_is_computed_as_each_sequence_alone(tiny_model, mixed, layout):
    rows, expected = mixed
    made = batch([scored(one) for one in rows], layout)
    assert torch.allclose(together(tiny_model, made), expected, atol=1e-4)
    told = [told.supervised for one in rows for told in one.continuations]
    assert torch.equal(made.rows.labels[made.rows.labels != IGNORED], torch.cat(told))


def test_pictures_that_are_exchanged_would_be_noticed(tiny_model, mixed):
    rows, expected = mixed
    made = batch([scored(one) for one in rows])
    for name in ("pixel_values", "pixel_values_videos"):
        turned = made.rows.features | {name: made.rows.features[name].flip(0)}
        found = together(tiny_model, made._replace(rows=made.rows._replace(features=turned)))
        assert (found - expected).abs().max() > 1e-2


@pytest.fixture(scope="module")
def tiled(processor, tiny_model):
    """A processor that cuts large pictures into up to four tiles, and a model of the same mind."""
    pinpoints = [[48, 48], [48, 96], [96, 48], [96, 96]]
    processor, model = copy.copy(processor), copy.deepcopy(tiny_model)
    size = {"height": 48, "width": 48}
    processor.image_processor = LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints)
    model.config.image_grid_pinpoints = pinpoints
    return processor, model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_of_other_numbers_of_tiles_do_not_disturb_each_other(tiled, layout):
    processor, model = tiled
    sizes = [(48, 48), (90, 40), (40, 90), (120, 100), (200, 60)]
    pictures = [picture(seed, size) for seed, size in enumerate(sizes)]
    cases = [sample(f"q{at}", [[data]], texts=("a ring", "no")) for at, data in enumerate(pictures)]
    cases += [sample("both", [[pictures[0]], [pictures[3]]], offsets=[0, 3]), sample("none"), sample("film", [FILM])]
    rows = [Answers(processor, 4)(case) for case in cases]
    tiles = {made.features["pixel_values"].shape[1] for made in rows if "pixel_values" in made.features}
    assert len(tiles) >= 3
    expected = torch.cat([alone(model, made) for made in rows])
    assert torch.allclose(together(model, batch([scored(made) for made in rows], layout)), expected, atol=1e-4)
