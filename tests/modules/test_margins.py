"""Margins are differences of the right two numbers, and chances are as random as they are fixed."""

import shutil
import subprocess
from math import nan

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from mmrlhf.batches import PackedQueries, pack
from mmrlhf.modules.margins import chance, margins, pair_chances

SCORES = {"reward": "rewards", "annotated": "annotated"}


def batch_of(queries, **told):
    """A batch of queries, given as (id, responses, pairs by places); `told` replaces what is known of responses."""
    counts = [count for _, count, _ in queries]
    starts = np.cumsum([0, *counts])
    pairs = [(a + start, b + start) for (_, _, own), start in zip(queries, starts, strict=False) for a, b in own]
    unknown = torch.full((sum(counts),), nan)
    return PackedQueries(
        rows=pack([torch.tensor([1])], [[]], {}, pad=0),  # nothing here looks at tokens
        pairs=torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
        ties=torch.empty(0, 2, dtype=torch.long),
        responses=torch.tensor(counts),
        ids=tuple(name for name, _, _ in queries),
        categories=("",) * len(queries),
        **{
            "rewards": unknown,
            "reference_logps": unknown,
            "ranks": torch.zeros(sum(counts), dtype=torch.long),
            "annotated": unknown,
            "scores": torch.full((sum(counts), 3), nan),
        }
        | told,
    )


THREE = [("cat", 3, [(0, 2), (1, 2)]), ("", 2, []), ("dog", 2, [(1, 0)])]
PAIRS = [(0, 2), (1, 2), (6, 5)]
GAP = torch.tensor([3.0, -4.0, 5.0])


# --- margins ---


@pytest.mark.parametrize("source", SCORES)
@given(numbers=st.lists(st.floats(-100, 100, width=32), min_size=7, max_size=7))
def test_a_margin_is_the_score_of_the_chosen_response_beyond_that_of_the_rejected(source, numbers):
    batch = batch_of(THREE, **{SCORES[source]: torch.tensor(numbers)})
    found = margins(source, batch, GAP, 0.1)
    assert found.tolist() == [np.float32(numbers[a]) - np.float32(numbers[b]) for a, b in PAIRS]


def test_a_margin_of_ranks_is_by_how_many_the_chosen_response_stands_before_the_rejected():
    batch = batch_of(THREE, ranks=torch.tensor([1, 2, 4, 0, 0, 3, 1]))
    found = margins("rank", batch, GAP, 0.1)
    assert found.tolist() == [3, 2, 2]
    assert found.dtype == torch.float32


def test_the_implicit_margin_is_the_policys_own_reward():
    gap = GAP.clone().requires_grad_()
    found = margins("implicit", batch_of(THREE), gap, 0.5)
    assert found.tolist() == [1.5, -2.0, 2.5]
    assert not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_margins_are_float32_whatever_scores_are(dtype):
    rewards = torch.arange(7).to(dtype)
    assert margins("reward", batch_of(THREE, rewards=rewards), GAP, 0.1).dtype == torch.float32
    assert margins("implicit", batch_of(THREE), GAP.to(dtype), 0.1).dtype == torch.float32


@pytest.mark.parametrize(
    ("source", "cure"),
    [("reward", "; run `mmrlhf score` on the same shards"), ("annotated", "; annotate these queries with scores")],
)
@pytest.mark.parametrize(
    ("place", "told"),
    [
        (0, r"1 of 3 pairs \(queries 'cat'\)"),
        (2, r"2 of 3 pairs \(queries 'cat'\)"),
        (5, r"1 of 3 pairs \(queries 'dog'\)"),
    ],
)
def test_a_missing_score_is_an_error_that_names_the_query_and_the_cure(source, cure, place, told):
    numbers = torch.arange(7.0)
    numbers[place] = nan
    batch = batch_of(THREE, **{SCORES[source]: numbers})
    with pytest.raises(
        ValueError, match=f"^margin by {source}: expected a number for every pair, got none for {told}{cure}"
    ):
        margins(source, batch, GAP, 0.1)


def test_a_missing_score_of_a_response_in_no_pair_is_none_of_ours():
    numbers = torch.arange(7.0)
    numbers[[3, 4]] = nan  # those of the row that only fills up
    assert margins("reward", batch_of(THREE, rewards=numbers), GAP, 0.1).tolist() == [-2, -1, 1]


def test_an_implicit_margin_without_a_reference_is_an_error():
    with pytest.raises(ValueError, match=r"margin by implicit: .* 1 of 3 pairs \(queries 'cat'\); give all responses"):
        margins("implicit", batch_of(THREE), torch.tensor([1.0, nan, 1.0]), 0.1)


def test_of_many_queries_without_scores_three_are_named():
    batch = batch_of([(f"q{number}", 2, [(0, 1)]) for number in range(5)])
    with pytest.raises(ValueError, match=r"5 of 5 pairs \(queries 'q0', 'q1', 'q2', \.\.\.\)"):
        margins("reward", batch, torch.zeros(5), 0.1)


def test_a_margin_that_nothing_needs_may_be_missing():
    numbers = torch.arange(7.0)
    numbers[0] = nan
    found = margins("reward", batch_of(THREE, rewards=numbers), GAP, 0.1, required=False)
    assert found.isnan().tolist() == [True, False, False]
    assert found[1:].tolist() == [-1, 1]


@pytest.mark.parametrize("source", ["reward", "rank", "annotated", "implicit"])
def test_a_batch_without_pairs_has_no_margins(source):
    assert margins(source, batch_of([("", 2, [])]), torch.empty(0), 0.1).shape == (0,)


# --- chances ---


def test_chances_are_uniform_and_those_of_neighbours_independent():
    """Over queries with names that differ little, as real ones do, and over the pairs of one query."""
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    found = pair_chances(batch_of([(f"train{number}", 4, pairs) for number in range(2000)])).double()
    assert scipy_stats.kstest(found, "uniform").pvalue > 0.01
    table = found.reshape(2000, len(pairs))
    assert all(scipy_stats.kstest(column, "uniform").pvalue > 0.001 for column in table.T)
    among_pairs = np.corrcoef(table.T)[~np.eye(len(pairs), dtype=bool)]
    assert np.abs(among_pairs).max() < 0.1
    assert scipy_stats.pearsonr(table[1:, 0], table[:-1, 0]).pvalue > 0.01
    assert found.unique().numel() > 0.99 * found.numel()


def test_a_chance_is_the_one_that_another_program_finds():
    """So it depends on no process, no machine and no seed of Python's own hash."""
    if shutil.which("b2sum") is None:
        pytest.skip("b2sum (coreutils) is not installed")
    for name, winner, loser in [("train2", 0, 3), ("Katze-ä 猫", 12, 1)]:
        told = f"{name}\n{winner}\n{loser}".encode()
        digest = subprocess.run(["b2sum", "-l", "24"], input=told, capture_output=True, check=True).stdout.split()[0]
        expected = int(digest, 16) / 0x1000000
        assert chance(name, winner, loser) == expected
        assert pair_chances(batch_of([(name, 13, [(winner, loser)])])).item() == expected


@given(st.permutations(THREE))
def test_the_chance_of_a_pair_does_not_depend_on_its_batch(queries):
    alone = [value for query in queries for value in pair_chances(batch_of([query])).tolist()]
    assert pair_chances(batch_of(queries)).tolist() == alone
    assert len(set(alone)) == 3


def test_a_chance_depends_on_the_query_and_on_both_places():
    found = {
        chance(*pair) for pair in [("a", 0, 1), ("a", 1, 0), ("a", 0, 2), ("a", 2, 1), ("b", 0, 1), ("a\n0", 1, 1)]
    }
    assert len(found) == 6


def test_chances_fit_into_a_float32_and_stay_below_1():
    found = pair_chances(batch_of([(str(number), 2, [(0, 1)]) for number in range(3000)]))
    assert found.dtype == torch.float32
    assert found.double().tolist() == [chance(str(number), 0, 1) for number in range(3000)]
    assert found.ge(0).all()
    assert found.lt(1).all()


def test_a_batch_without_pairs_has_no_chances():
    assert pair_chances(batch_of([("", 2, []), ("cat", 1, [])])).shape == (0,)
