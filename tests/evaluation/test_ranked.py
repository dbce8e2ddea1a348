"""The verb `evaluate rewards`: files in, numbers, figures and a page out."""

import json
import random

import numpy as np
import pytest
from PIL import Image

from mmrlhf import jsonl
from mmrlhf.evaluation import ranked as verb
from mmrlhf.evaluation.agreement import agreement, pairs_of
from mmrlhf.evaluation.examples import choose
from mmrlhf.evaluation.face import Grade
from mmrlhf.evaluation.joining import judged_queries
from mmrlhf.evaluation.ranked import evaluate_rewards
from mmrlhf.fingerprint import Fingerprint
from mmrlhf.queries import Media

from .made import ranked_query, scores_of, written

CATEGORIES = ["mcq", "long", "short", "safety", "video"]


@pytest.fixture
def files(tmp_path):
    """Forty queries of the test split and ten of the training split, rewards that are mostly right, and their rows."""
    rng = np.random.default_rng(0)
    records = [
        ranked_query(
            f"q{n:02}",
            rng.permutation([1, 2, 2, 3]).tolist(),
            CATEGORIES[n % 5],
            media=(Media("image", "a.png"),),
            split="test" if n < 40 else "train",
        )
        for n in range(50)
    ]
    rewards = [(rng.normal(scale=0.7, size=4) - np.array(record.ranks)).tolist() for record in records]
    rows = scores_of(records, rewards, critique=[["<b>said</b>"] * 4] * 50)
    return written(tmp_path / "ranked.jsonl", records), written(tmp_path / "mine.jsonl", rows), rows


def run(ranked, scores, out, **more):
    evaluate_rewards(ranked, scores, out, **{"resamples": 200, "split": "test"} | more)
    return json.loads((out / "metrics.json").read_text())


def test_numbers_figures_and_examples_come_of_one_call(files, tmp_path, capsys):
    ranked, scores, _ = files
    Image.new("RGB", (64, 32), "red").save(tmp_path / "a.png")
    out = tmp_path / "out"
    metrics = run(ranked, scores, out, media=tmp_path)
    overall = metrics["accuracy"]["overall"]
    assert (overall["pairs"], overall["ids"]) == (200, 40)
    assert set(metrics["accuracy"]["categories"]) == set(CATEGORIES) == set(metrics["kendall_tau_b"]) - {"all"}
    assert metrics["folds"] is None
    assert metrics["accounts"]["queries"]["out"] == 40
    assert metrics["accounts"]["scores"]["skipped"] == {"other_split": 40}
    assert sorted(path.name for path in (out / "figures").iterdir()) == [
        "calibration.png",
        "delta_by_gap.png",
        "length_bias.png",
        "reward_by_rank.png",
    ]
    page = (out / "critiques.html").read_text()
    assert page.count("<section>") == 12 == page.count("data:image/jpeg;base64,")
    assert "&lt;b&gt;said&lt;/b&gt;" in page
    assert "one drawn by chance" in page
    report = (out / "report.md").read_text()
    assert "- ranked: 50 in = 40 out + 10 skipped (other_split 10)" in report
    assert f"| mine | mcq | 40 | {metrics['accuracy']['categories']['mcq']['acc']['value']:.3f} |" in report
    printed = capsys.readouterr().out
    assert f"{overall['acc']['value']:.3f}" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_the_outcomes_alone_give_the_accuracy_again(files, tmp_path):
    ranked, scores, rows = files
    metrics = run(ranked, scores, tmp_path / "out")
    grades = list(jsonl.read(tmp_path / "out" / "outcomes" / "rewards.jsonl", Grade.from_json))
    assert sum(grade.correct for grade in grades) == metrics["accuracy"]["overall"]["right"]
    reward = {(row["id"], row["response"]): row["reward"] for row in rows}
    for grade in grades:
        winner, loser = map(int, grade.item.partition(":")[2].split(">"))
        assert grade.detail["delta"] == reward[grade.cluster, winner] - reward[grade.cluster, loser]


def test_rewards_by_models_that_saw_the_query_are_compared_and_drawn(files, tmp_path):
    ranked, _, rows = files
    ranks = {record["id"]: [of["rank"] for of in record["responses"]] for record in jsonl.read(ranked)}
    better = [row | {"reward_seen": row["reward"] - 0.5 * ranks[row["id"]][row["response"]]} for row in rows]
    metrics = run(ranked, written(tmp_path / "folds.jsonl", better), tmp_path / "out")
    folds, gaps = metrics["folds"], metrics["rank_gaps"]
    expected = 0.5 * (gaps["1"]["pairs"] + 2 * gaps["2"]["pairs"]) / 200
    assert folds["delta_gap"]["value"] == pytest.approx(expected)
    assert folds["accuracy_unseen"]["value"] == metrics["accuracy"]["overall"]["acc"]["value"]
    assert folds["accuracy_gap"]["low"] > 0
    assert (tmp_path / "out" / "figures" / "seen.png").is_file()
    report = (tmp_path / "out" / "report.md").read_text()
    for name in ("seen", "unseen"):
        delta, acc = (f"{folds[f'{what}_{name}']['value']:.3f}" for what in ("delta", "accuracy"))
        [line] = [line for line in report.splitlines() if line.startswith(f"| {name} | +{delta} | ")]
        assert f" | {acc} | " in line
    assert "| seen less unseen | +0.600 |" in report


def test_another_order_of_the_rows_gives_the_same_bytes(files, tmp_path):
    ranked, scores, _ = files
    one = run(ranked, scores, tmp_path / "one")
    for path in (ranked, scores):
        rows = list(jsonl.read(path))
        jsonl.write(path, random.Random(5).sample(rows, len(rows)))
    two = run(ranked, scores, tmp_path / "two")
    # The accounts name the first lines that were left out.
    assert {**one, "accounts": ""} == {**two, "accounts": ""}
    made = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(made) == 9
    for name in set(map(str, made)) - {"metrics.json", "evaluation.json"}:  # which has the digests of the files
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_what_the_scores_were_made_from_is_kept(files, tmp_path):
    ranked, scores, _ = files
    Fingerprint({"values": "reward", "model": "abc"}).write(scores)
    assert run(ranked, scores, tmp_path / "out")["made_from"] == {"values": "reward", "model": "abc"}
    assert "- values reward, model abc" in (tmp_path / "out" / "report.md").read_text()


def test_the_report_has_the_numbers(files, tmp_path):
    ranked, scores, _ = files
    metrics = run(ranked, scores, tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text()
    for gap, line in metrics["rank_gaps"].items():
        assert f"| {gap} | {line['pairs']} | 40 | {line['delta']['value']:+.3f} | " in report
        assert f" | {line['acc']['value']:.3f} | {line['acc']['low']:.2f}-{line['acc']['high']:.2f} |" in report
    for name, tau in metrics["kendall_tau_b"].items():
        assert f"| Kendall's tau-b, {name} | {tau['value']['value']:+.3f} | " in report
        assert f" to {tau['value']['high']:+.3f} | {40 if name == 'all' else 8} queries |" in report
    for name in ("people", "rewards"):
        assert f"preferred by {name} | {metrics['length'][name]['value']:.3f} | " in report
    assert f"| calibration error | {metrics['calibration_error']:.3f} |" in report


def test_every_option_reaches_what_it_is_about(files, tmp_path):
    ranked, scores, _ = files
    options = {"level": 0.8, "resamples": 150, "seed": 3}
    metrics = run(ranked, scores, tmp_path / "out", split="train", examples=2, **options)
    judged, _ = judged_queries(ranked, scores, "train", 0.0)
    expected = json.loads(json.dumps(agreement(judged, **options).to_json()))
    assert {name: metrics[name] for name in expected} == expected
    page = (tmp_path / "out" / "critiques.html").read_text()
    assert page.count("<section>") == 2
    assert all(f">{one.judged.ranked.query.id} · " in page for one in choose(judged, 2, 3))
    assert {one.judged.ranked.query.id for one in choose(judged, 2, 3)} != {
        one.judged.ranked.query.id for one in choose(judged, 2, 0)
    }


def test_each_figure_is_of_its_own_columns(files, tmp_path, monkeypatch):
    ranked, _, rows = files
    drawn = {}

    def recording(name, draw):
        def record(*columns, **more):
            drawn[name] = [list(column) for column in columns]
            return draw(*columns, **more)

        return record

    for name in ("reward_by_rank", "delta_by_gap", "length_bias", "in_and_out_of_fold", "calibration"):
        monkeypatch.setattr(verb, name, recording(name, getattr(verb, name)))
    rows = [row | {"reward_seen": row["reward"] + 1.5 * row["response"]} for row in rows]
    scores = written(tmp_path / "folds.jsonl", rows)
    run(ranked, scores, tmp_path / "out")
    judged, _ = judged_queries(ranked, scores, "test", 0.0)
    pairs = pairs_of(judged)
    deltas, queries = pairs.deltas.tolist(), list(pairs.queries)
    assert drawn["delta_by_gap"] == [deltas, pairs.gaps.tolist(), queries]
    assert drawn["length_bias"] == [deltas, pairs.longer.tolist(), queries]
    assert drawn["in_and_out_of_fold"] == [pairs.seen.tolist(), deltas, queries]
    assert drawn["calibration"] == [deltas, queries]
    rewards, ranks, of = drawn["reward_by_rank"]
    assert [(rewards[n], ranks[n], of[n]) for n in range(4)] == [
        (reward, rank, "q00") for reward, rank in zip(judged[0].rewards, judged[0].ranked.ranks, strict=True)
    ]


def test_a_folder_of_another_evaluation_is_refused_and_the_same_is_made_again(files, tmp_path):
    ranked, scores, _ = files
    first = run(ranked, scores, tmp_path / "out")
    assert run(ranked, scores, tmp_path / "out") == first
    with pytest.raises(ValueError, match="examples 12 instead of 3"):
        run(ranked, scores, tmp_path / "out", examples=3)
    with pytest.raises(ValueError, match="split 'test' instead of 'train'"):
        run(ranked, scores, tmp_path / "out", split="train")
    with pytest.raises(ValueError, match="examples: expected 0 or more"):
        run(ranked, scores, tmp_path / "other", examples=-1)


def test_queries_without_scores_are_refused_before_anything_is_written(files, tmp_path):
    ranked, _, rows = files
    some = written(tmp_path / "some.jsonl", rows[:-44])  # those of one test query are missing, and all of training
    with pytest.raises(
        ValueError, match=r"queries: expected at most 1\.00% skipped, got 2\.50% \(1 of 40\): no_scores"
    ):
        run(ranked, some, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run(ranked, some, tmp_path / "out", max_skipped=0.03)["accuracy"]["overall"]["ids"] == 39
