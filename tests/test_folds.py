"""What stands beside the model of a fold, and what is refused as no family of models."""

import dataclasses
import json

import pytest

from mmrlhf.folds import Fold, Trained, family, run_of


def written(out, of=3, **others):
    """The records of a family, some of them changed."""
    found = []
    for number in range(of):
        run_of(out, number).mkdir(parents=True)
        one = Trained(Fold(of, number), "data", "folds", "training", f"model {number}")
        found.append(dataclasses.replace(one, **others.get(f"fold{number}", {})))
        found[-1].write(run_of(out, number))
    return found


def test_a_family_is_what_was_written_in_the_order_of_the_folds(tmp_path):
    expected = written(tmp_path, of=11)
    assert family(tmp_path, "data") == expected
    assert json.loads((tmp_path / "fold-10" / "fold.json").read_text())["out"] == 10


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"fold1": {"data": "other"}}, r"fold-1: .* got another data; run `mmrlhf train-reward"),
        ({"fold2": {"folds": "other", "training": "other"}}, "fold-2: .* got another folds and training"),
        ({"fold1": {"fold": Fold(4, 1)}}, "fold-1: expected fold 1 of 3, .* got fold 1 of 4"),
        ({"fold2": {"fold": Fold(3, 1)}}, "fold-2: expected fold 2 of 3, .* got fold 1 of 3"),
        ({"fold0": {"fold": Fold(3, 1)}}, "fold-0: expected fold 0 of 3, .* got fold 1 of 3"),
        ({"fold0": {"data": "other"}}, r"fold-0: expected a model of a fold of these training queries \(data\.\."),
    ],
)
def test_models_that_are_not_of_one_kind_are_refused(tmp_path, others, message):
    written(tmp_path, **others)
    with pytest.raises(ValueError, match=message):
        family(tmp_path, "data")


@pytest.mark.parametrize("number", [0, 2])
def test_a_fold_that_is_not_trained_is_named(tmp_path, number):
    written(tmp_path)
    (run_of(tmp_path, number) / "fold.json").unlink()
    with pytest.raises(ValueError, match=rf"fold-{number}: expected a fold that is trained, found no fold.json; run"):
        family(tmp_path, "data")


@pytest.mark.parametrize("text", ["[]", "{}", '{"of": 3, "out": 0, "data": "d"}', '{"of": "3", "out": 0}'])
def test_a_file_that_is_no_record_of_a_fold_is_refused(tmp_path, text):
    written(tmp_path)
    (tmp_path / "fold-0" / "fold.json").write_text(text)
    with pytest.raises(ValueError, match=r"fold\.json: expected what a training with a fold writes"):
        family(tmp_path, "data")
