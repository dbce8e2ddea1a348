"""Cross-fitting: the gap between margins of models that saw a query and of those that did not."""

import types

import numpy as np
import pytest

from mmrlhf.datamodules.crossfit import SEEN, CrossFit, Margins
from mmrlhf.datamodules.folds import digest_of, folds_of
from mmrlhf.datamodules.reader import Shards
from mmrlhf.stats import bootstrap_mean

from .made import packed_set, ranked

ROWS = [
    *(ranked(f"q{number}", ("x", "y", "z"), ranks=(1, 2, 2), prompt=f"Number {number}?") for number in range(20)),
    *(ranked(f"v{number}", prompt=f"Value {number}?", split="val") for number in range(6)),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return packed_set(tmp_path_factory.mktemp("crossed"), ROWS)


class Rows:
    """Every second sample of a split, as if the others could not be read."""

    def __init__(self, shards, split):
        self.shards = Shards(shards, split)
        self.admission = [types.SimpleNamespace(sample=sample) for sample in range(0, len(self.shards), 2)]

    def __len__(self):
        return len(self.admission)


def crossed(shards, of):
    sets = [Rows(shards, split) for split in ("train", "val")]
    return sets, CrossFit(sets, of, digest_of(folds_of(sets[0].shards, of)))


@pytest.mark.parametrize("of", [2, 3])
def test_a_training_query_is_for_the_model_without_its_fold_and_the_next_and_any_other_for_one(shards, of):
    (train, val), fit = crossed(shards, of)
    asked = [fit.asked(model) for model in range(of)]
    folds = folds_of(train.shards, of), folds_of(val.shards, of)
    for number, admitted in enumerate(train.admission):
        fold = folds[0][admitted.sample]
        assert {model for model in range(of) if number in asked[model][0]} == {fold, (fold + 1) % of}
    for number, admitted in enumerate(val.admission):
        fold = folds[1][admitted.sample]
        assert [model for model in range(of) if number in asked[model][1]] == [fold]
    told = [
        {
            f"{rows.shards.split}/{rows.admission[number].sample}": {"reward": [model, number], "critiques": [model]}
            for rows, numbers in zip((train, val), asked[model], strict=True)
            for number in numbers
        }
        for model in range(of)
    ]
    joined = fit.joined(told)
    assert len(joined) == len(train) + len(val)
    for number, admitted in enumerate(train.admission):
        fold = folds[0][admitted.sample]
        expected = {"reward": [fold, number], "critiques": [fold], SEEN: [(fold + 1) % of, number]}
        assert joined[f"train/{admitted.sample}"] == expected
    assert all(SEEN not in joined[name] for name in joined if name.startswith("val"))


def test_folds_that_are_not_those_of_the_training_are_refused(shards):
    sets = [Rows(shards, "train")]
    with pytest.raises(ValueError, match="expected the folds with which the models were trained, got others: a sample"):
        CrossFit(sets, 3, digest_of(folds_of(sets[0].shards, 2)))
    CrossFit([Rows(shards, "val")], 3, "anything, for nothing was trained on it")


def test_the_gap_is_that_of_every_pair_by_both_kinds_with_whole_queries_resampled():
    rng, margins, every = np.random.default_rng(0), Margins(), []
    for row in ROWS[:20]:
        unseen, seen = rng.normal(size=3).tolist(), (rng.normal(size=3) + np.array([1, 0, 0])).tolist()
        margins.add(row, {"reward": unseen, SEEN: seen})
        every += [(row.query.id, seen[0] - seen[loser], unseen[0] - unseen[loser]) for loser in (1, 2)]
    margins.add(ROWS[20], {"reward": [9.0, 0.0]})
    names, seen, unseen = (np.array(column) for column in zip(*every, strict=True))
    found = margins.difference()
    assert (found.pairs, found.queries) == (40, 20)
    assert (found.seen, found.unseen) == (pytest.approx(seen.mean()), pytest.approx(unseen.mean()))
    expected = bootstrap_mean(seen - unseen, names.tolist())
    assert found.gap == pytest.approx(expected)
    assert found.gap.low < 1 < found.gap.high
    assert (found.wrong_seen, found.wrong_unseen) == ((seen <= 0).mean(), (unseen <= 0).mean())
    assert 0 < found.wrong_seen < found.wrong_unseen
    told = f"sign wrong in {found.wrong_seen:.1%} and {found.wrong_unseen:.1%}"
    assert told in str(found)
    assert f"a difference of {found.gap.value:+.3f} [" in str(found)


def test_equal_rewards_are_a_wrong_sign_and_no_gap():
    margins = Margins()
    for row in ROWS[:4]:
        margins.add(row, {"reward": [1.0, 1.0, 0.0], SEEN: [1.0, 1.0, 0.0]})
    found = margins.difference()
    assert (found.gap.value, found.gap.low, found.gap.high) == (0, 0, 0)
    assert found.wrong_seen == found.wrong_unseen == 0.5


def test_of_a_single_query_no_gap_is_known():
    margins = Margins()
    assert margins.difference() is None
    margins.add(ROWS[0], {"reward": [1.0, 0.0, 0.0], SEEN: [2.0, 0.0, 0.0]})
    assert len(margins.queries) == 2
    assert margins.difference() is None
