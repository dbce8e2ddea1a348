"""The verb `evaluate rewardbench`: files in, the same files out."""

import json
import random
from pathlib import Path

import pytest

from mmrlhf import jsonl
from mmrlhf.evaluation.face import Grade
from mmrlhf.evaluation.grading import evaluate_rewardbench, named
from mmrlhf.evaluation.rewardbench import RewardBench

from .made import CRITIC, PAIRS_OF_IDS, bench_row, outcomes, papers_rows, rewarded, scored, written

ALL_RIGHT = {name: (sum(sizes), len(sizes)) for name, sizes in PAIRS_OF_IDS.items()}


@pytest.fixture
def files(tmp_path):
    rows = papers_rows()
    items = written(tmp_path / "items.jsonl", rows)
    mine = written(tmp_path / "mine.jsonl", rewarded(rows, outcomes(CRITIC)))
    best = written(tmp_path / "best.jsonl", scored(rewarded(rows, outcomes(ALL_RIGHT))))
    return items, mine, best


def run(items, scores, out, **more):
    evaluate_rewardbench(items, scores, out, **{"resamples": 300, "figures": False} | more)
    return json.loads((out / "metrics.json").read_text())


def test_two_systems_are_graded_compared_and_reported_beside_the_paper(files, tmp_path, capsys):
    items, mine, best = files
    metrics = run(items, (mine, best), tmp_path / "out", figures=True)
    overall = metrics["systems"]["mine"]["overall"]
    assert (overall["right"], overall["right_ids"], overall["acc"]["value"]) == (144, 31, 144 / 170)
    assert metrics["systems"]["best"]["overall"]["acc_plus"]["value"] == 1
    acc, acc_plus = metrics["comparisons"]["tests"]
    assert (acc["only_one"], acc["only_two"], acc_plus["only_two"]) == (0, 26, 15)
    assert acc_plus["p"] == pytest.approx(2 * 0.5**15)
    [paper] = [row for row in metrics["paper_table_4"] if row["system"] == "MM-RLHF-Reward-7B"]
    assert (paper["acc_printed"], paper["acc_recomputed"]) == (0.85, 144 / 170)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| mine | mcq | 42 | 0.929 |" in report
    assert "| MM-RLHF-Reward-7B | 0.85 | 0.847 (144) | 0.67 | 0.674 (31) |" in report
    assert "not the paper's 170 pairs" not in report
    printed = capsys.readouterr().out
    assert "0.847" in printed
    assert "its numbers, not made here" in printed
    assert max(map(len, printed.splitlines())) <= 80
    pictures = sorted(path.name for path in (tmp_path / "out" / "figures").iterdir())
    assert pictures == [f"{name}-{kind}.png" for name in ("best", "mine") for kind in ("calibration", "length")]


def test_the_outcomes_alone_give_the_summary_again(files, tmp_path):
    items, mine, _ = files
    metrics = run(items, mine, tmp_path / "out")
    grades = list(jsonl.read(tmp_path / "out" / "outcomes" / "mine.jsonl", Grade.from_json))
    assert len(grades) == 170
    again = RewardBench(resamples=300).summarize(grades).to_json()
    assert json.loads(json.dumps(again)) == metrics["systems"]["mine"]


def test_another_order_of_the_rows_gives_the_same_bytes(files, tmp_path):
    items, mine, best = files
    made = [run(items, (mine, best), tmp_path / "one")]
    for path in files:
        rows = list(jsonl.read(path))
        jsonl.write(path, random.Random(5).sample(rows, len(rows)))
    made.append(run(items, (mine, best), tmp_path / "two"))
    assert made[0] == made[1]
    for name in ("metrics.json", "report.md", "outcomes/mine.jsonl", "outcomes/best.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_folder_of_other_settings_is_refused_and_the_same_is_made_again(files, tmp_path):
    items, mine, best = files
    first = run(items, mine, tmp_path / "out")
    assert run(items, mine, tmp_path / "out") == first
    with pytest.raises(ValueError, match="seed 0 instead of 1"):
        run(items, mine, tmp_path / "out", seed=1)
    with pytest.raises(ValueError, match="holds an evaluation with scores"):
        run(items, best, tmp_path / "out", names=("mine",))


def test_a_malformed_row_of_the_benchmark_is_an_error_unless_it_is_allowed(files, tmp_path):
    items, mine, _ = files
    with items.open("a") as file:
        file.write('{"id": "cut\n')
    with pytest.raises(ValueError, match=r"expected at most 0\.00% skipped.*not_json 1 \(first: .*items\.jsonl:171\)"):
        run(items, mine, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    metrics = run(items, mine, tmp_path / "out", max_skipped=0.01)
    assert metrics["accounts"]["rewardbench"]["skipped"] == {"not_json": 1}
    assert "171 in = 170 out + 1 skipped (not_json 1)" in (tmp_path / "out" / "report.md").read_text()


def test_missing_rewards_are_wrong_and_told(files, tmp_path):
    items, mine, _ = files
    rows = list(jsonl.read(mine))
    half = written(tmp_path / "half.jsonl", [row for row in rows if row["id"].startswith(("mcq", "long"))])
    metrics = run(items, half, tmp_path / "out")
    found = metrics["systems"]["half"]
    assert (found["counts"]["missing"], found["overall"]["right"]) == (91, 76)
    assert found["acc_covered"] == 76 / 79
    assert "half: 0.962 of the pairs that have rewards (46.5%)." in (tmp_path / "out" / "report.md").read_text()


def test_items_that_are_not_the_papers_are_said_to_be_no_measure_for_it(tmp_path):
    rows = [bench_row("a", "mcq/a.png"), bench_row("b", "mcq/b.png")]
    items = written(tmp_path / "items.jsonl", rows)
    run(items, written(tmp_path / "mine.jsonl", rewarded(rows, [True, False])), tmp_path / "out")
    assert "not the paper's 170 pairs" in (tmp_path / "out" / "report.md").read_text()


def test_names_of_systems_come_from_files_and_stay_apart():
    assert list(named([Path("a/mine.jsonl"), Path("b/other.jsonl")])) == ["mine", "other"]
    assert list(named([Path("a/s.jsonl"), Path("b/s.jsonl")], ("x", "y"))) == ["x", "y"]
    for names in (("x",), ("x", "x")):
        with pytest.raises(ValueError, match="2 different names"):
            named([Path("a/s.jsonl"), Path("b/s.jsonl")], names)
    with pytest.raises(ValueError, match=r"names that a file may have, got '\.\./x'"):
        named([Path("s.jsonl")], ("../x",))


def test_a_file_of_scores_that_is_not_there_is_named(files, tmp_path):
    with pytest.raises(ValueError, match=r"found none at .*gone\.jsonl"):
        run(files[0], tmp_path / "gone.jsonl", tmp_path / "out")
