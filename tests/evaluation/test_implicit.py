"""The verb `implicit-rewards`: β times the log-ratio, of texts and data that are proven to be the same."""

import json

import numpy as np
import pytest

from mmrlhf import jsonl
from mmrlhf.evaluation.agreement import pairs_of
from mmrlhf.evaluation.implicit import implicit_rewards
from mmrlhf.evaluation.joining import judged_queries
from mmrlhf.evaluation.making import rows_of
from mmrlhf.evaluation.rewardbench import RewardBench
from mmrlhf.evaluation.rewards import read_rewards
from mmrlhf.fingerprint import Fingerprint, of_text
from mmrlhf.ledger import Ledger
from mmrlhf.records import ResponseScore

from .made import ranked_query, scores_of, written

QUERIES = [ranked_query("a", [1, 2, 3]), ranked_query("b", [2, 1], "long")]
POLICY, REFERENCE = [[-1.0, -7.5, -3.0], [-4.0, -4.25]], [[-2.0, -6.0, -3.0], [-9.0, -1.0]]
PARTS = {
    "values": "reference_logp",
    "model": "of the policy",
    "processor": "p",
    "template": "chat",
    "frames": "8",
    "dtype": "float32",
    "data.test": "d",
}


def rows_with(logps):
    rows = scores_of(QUERIES, logps)
    return [{"reference_logp" if name == "reward" else name: value for name, value in row.items()} for row in rows]


class Files:
    """Both files of a sound call, in which a test plants a fault."""

    def __init__(self, folder):
        self.policy, self.reference, self.out = (folder / f"{name}.jsonl" for name in ("policy", "reference", "out"))
        self.ours, self.theirs = rows_with(POLICY), rows_with(REFERENCE)
        self.our_parts, self.their_parts = dict(PARTS), PARTS | {"model": "of the reference"}

    def run(self, **more):
        """Write both files, call the verb and read its rewards."""
        for path, rows, parts in (
            (self.policy, self.ours, self.our_parts),
            (self.reference, self.theirs, self.their_parts),
        ):
            written(path, rows)
            Fingerprint(parts).write(path)
        implicit_rewards(self.policy, self.reference, self.out, **more)
        return list(jsonl.read(self.out, ResponseScore.from_json))


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def test_a_reward_is_beta_times_the_log_ratio_whatever_the_order_of_the_rows(files):
    files.theirs.reverse()
    found = files.run(beta=0.5)
    assert [row.reward for row in found] == [0.5, -0.75, 0.0, 2.5, -1.625]
    assert [(row.id, row.response) for row in found] == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    assert found[1].digest == of_text(QUERIES[0].responses[1].text)
    assert {row.reference_logp for row in found} == {None}


def test_the_margin_of_a_pair_is_beta_times_z(files, tmp_path):
    files.run(beta=0.1)
    judged, _ = judged_queries(written(tmp_path / "ranked.jsonl", QUERIES), files.out, None, 0.0)
    expected = []
    for policy, reference, record in zip(POLICY, REFERENCE, QUERIES, strict=True):
        for winner, loser in record.pairs():
            expected.append((policy[winner] - policy[loser]) - (reference[winner] - reference[loser]))
    assert pairs_of(judged).deltas == pytest.approx(0.1 * np.array(expected))


def test_the_benchmark_reads_them_as_any_rewards(files, tmp_path):
    files.run(beta=1.0)
    rows = [row for record in QUERIES for row in rows_of(record, record.query.category)]
    items = RewardBench().items(written(tmp_path / "items.jsonl", rows))
    found = read_rewards(files.out, items, Ledger("rewards"))
    assert sorted(tuple(found[item.key]) for item in items) == [(-3.25, 5.0), (-1.5, 0.0), (1.0, -1.5), (1.0, 0.0)]


@pytest.mark.parametrize(
    ("side", "change", "reasons"),
    [
        ("ours", {"digest": of_text("another")}, {"other_text": 1}),
        ("theirs", {"digest": of_text("another")}, {"other_text": 1}),
        ("ours", {"response": 7}, {"no_reference": 1, "no_policy": 1}),
        ("theirs", {"id": "c"}, {"no_reference": 1, "no_policy": 1}),
    ],
)
def test_what_one_side_lacks_is_counted_and_refused(files, caplog, side, change, reasons):
    getattr(files, side)[0] |= change
    with pytest.raises(ValueError, match=r"responses: expected at most 0\.00% skipped.*first: (a|c)/"):
        files.run()
    assert not files.out.exists()
    with caplog.at_level("INFO"):
        found = files.run(max_skipped=0.4)
    assert [(row.id, row.response) for row in found] == [("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    assert all(f"{reason} {number}" in caplog.text for reason, number in reasons.items())


def test_rows_of_one_side_alone_are_counted(files):
    files.ours = files.ours[1:]
    with pytest.raises(ValueError, match="no_policy 1 "):
        files.run()
    files.ours, files.theirs = rows_with(POLICY), []
    with pytest.raises(ValueError, match="expected scores of the same responses, got none"):
        files.run(max_skipped=1.0)


def test_a_response_that_stands_twice_or_has_no_log_prob_is_an_error(files):
    files.ours.append(files.ours[0])
    with pytest.raises(ValueError, match=r"policy\.jsonl:6: expected each key once"):
        files.run()
    files.ours = scores_of(QUERIES, POLICY)
    with pytest.raises(ValueError, match="response 0 of query 'a': expected a reference_logp, got none"):
        files.run()


@pytest.mark.parametrize("part", ["processor", "template", "frames", "dtype", "data.test"])
def test_scores_that_were_made_otherwise_are_refused(files, part):
    files.their_parts[part] = "other"
    with pytest.raises(ValueError, match=rf"reference\.jsonl was made with another {part} \(other\.\. instead of"):
        files.run()
    assert not files.out.exists()


def test_scores_of_another_split_are_refused_on_either_side(files):
    files.our_parts["data.val"] = "v"
    with pytest.raises(ValueError, match=r"another data\.val \(none instead of v"):
        files.run()
    files.their_parts |= {"data.val": "v", "data.train": "t"}
    with pytest.raises(ValueError, match=r"another data\.train \(t\.\. instead of none"):
        files.run()


def test_another_processor_is_taken_where_the_user_says_so_and_nothing_else_is(files):
    files.their_parts["processor"] = "saved anew"
    assert len(files.run(other_processor=True)) == 5
    assert Fingerprint.read(files.out).parts["reference.processor"] == "saved anew"
    files.their_parts["frames"] = "4"
    with pytest.raises(ValueError, match="another frames"):
        files.run(other_processor=True)


def test_scores_of_one_model_have_no_ratio(files):
    files.their_parts["model"] = files.our_parts["model"]
    with pytest.raises(ValueError, match="expected scores of two models, got those of one"):
        files.run()


def test_scores_that_are_no_log_probs_or_tell_nothing_are_refused(files):
    files.their_parts["values"] = "reward"
    with pytest.raises(
        ValueError, match=r"reference\.jsonl: expected log-probs with their model and processor, got rew"
    ):
        files.run()
    files.their_parts["values"] = "reference_logp"
    files.run()
    (files.policy.parent / "policy.jsonl.fingerprint.json").unlink()
    with pytest.raises(ValueError, match=r"no policy\.jsonl\.fingerprint\.json beside it"):
        implicit_rewards(files.policy, files.reference, files.out)
    with pytest.raises(ValueError, match=r"gone\.jsonl: expected a file of scores, found none"):
        implicit_rewards(files.policy.with_name("gone.jsonl"), files.reference, files.out)


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan"), float("inf")])
def test_a_beta_that_is_none_is_refused(files, beta):
    with pytest.raises(ValueError, match="beta: expected a number above 0"):
        files.run(beta=beta)


def test_the_rewards_tell_what_they_were_made_from_and_others_are_kept(files):
    first = files.run(beta=0.25)
    assert Fingerprint.read(files.out).parts == PARTS | {
        "values": "reward",
        "beta": "0.25",
        "reference.model": "of the reference",
    }
    assert files.run(beta=0.25) == first
    with pytest.raises(ValueError, match=r"another beta \(0\.25\.\. instead of 0\.5.*give another --out"):
        files.run(beta=0.5)
    assert list(jsonl.read(files.out, ResponseScore.from_json)) == first
    json.loads((files.out.parent / "out.jsonl.fingerprint.json").read_text())
    with pytest.raises(ValueError, match="was made with another"):
        implicit_rewards(files.policy, files.reference, files.reference)
