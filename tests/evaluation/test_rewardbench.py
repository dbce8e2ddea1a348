"""The benchmark's rule, on items of known outcome."""

import json
import math
import random
from collections import Counter

import pytest

from mmrlhf.evaluation.face import Grade
from mmrlhf.evaluation.reporting import is_papers_set
from mmrlhf.evaluation.rewardbench import RewardBench, Rewards, category_of
from mmrlhf.evaluation.rewards import read_rewards
from mmrlhf.evaluation.table4 import table4
from mmrlhf.ledger import Ledger

from .made import CRITIC, bench_row, outcomes, papers_rows, rewarded, scored, written

BENCH = RewardBench(resamples=500)


def graded(tmp_path, rows, rewards, bench=BENCH):
    items = bench.items(written(tmp_path / "items.jsonl", rows))
    found = read_rewards(written(tmp_path / "rewards.jsonl", rewards), items, Ledger("rewards"))
    return [bench.grade(item, found.get(item.key)) for item in items]


def test_the_papers_counts_come_out_of_outcomes_that_have_them(tmp_path):
    rows = papers_rows()
    summary = BENCH.summarize(graded(tmp_path, rows, rewarded(rows, outcomes(CRITIC))))
    assert (summary.overall.pairs, summary.overall.ids) == (170, 46)
    assert (summary.overall.right, summary.overall.right_ids) == (144, 31)
    assert {name: (line.right, line.right_ids) for name, line in summary.categories.items()} == CRITIC
    assert summary.overall.acc.value == 144 / 170
    assert summary.overall.acc_plus.value == 31 / 46
    # Not the pooled values, but what the mean of the paper's categories would be.
    assert summary.macro_acc.value == pytest.approx((39 / 42 + 37 / 37 + 24 / 34 + 21 / 32 + 23 / 25) / 5)
    assert summary.macro_acc_plus.value == pytest.approx((0.7 + 1.0 + 0.5 + 1 / 6 + 0.8) / 5)
    assert is_papers_set(summary)


def test_the_papers_cells_add_up_to_the_counts_that_were_found_by_hand():
    by_name = {row.system: row for row in table4()}
    assert by_name["MM-RLHF-Reward-7B"].counts == (144, 31)
    assert by_name["GPT-4o"].counts == (126, 23)
    assert by_name["RM, given critiques"].counts == (158, 40)
    assert {name: cell.counts for name, cell in by_name["MM-RLHF-Reward-7B"].cells.items()} == CRITIC


def test_only_two_of_the_papers_columns_are_in_doubt():
    doubts = {row.system: row.doubts for row in table4() if row.doubts}
    assert doubts == {
        "LLaVA-Critic (pairwise)": ("mcq: no counts round to what is printed",),
        "RM without critiques": (
            "video: no counts round to what is printed",
            "ACC 0.75 printed, 0.771 by its categories",
            "ACC+ 0.50 printed, 0.565 by its categories",
        ),
    }


@pytest.mark.parametrize(
    ("outcome", "correct", "status"),
    [
        (Rewards(0.2, 0.1), True, "judged"),
        (Rewards(0.1, 0.2), False, "judged"),
        (Rewards(0.1, 0.1), False, "tied"),
        (Rewards(-0.0, 0.0), False, "tied"),
        (Rewards(math.nextafter(0.1, 1), 0.1), True, "judged"),
        (Rewards(None, 0.1), False, "unparsable"),
        (Rewards(math.nan, 0.1), False, "unparsable"),
        (Rewards(math.inf, 0.1), False, "unparsable"),
        (None, False, "missing"),
    ],
)
def test_a_pair_is_right_only_if_the_chosen_answer_has_strictly_more(tmp_path, outcome, correct, status):
    [item] = BENCH.items(written(tmp_path / "items.jsonl", [bench_row("a", "mcq/a.png")]))
    grade = BENCH.grade(item, outcome)
    assert (grade.correct, grade.status, grade.cluster, grade.category) == (correct, status, "a", "mcq")
    assert Grade.from_json(json.loads(json.dumps(grade.to_json()))) == grade


def test_what_is_not_judged_stays_in_the_denominator_and_is_counted(tmp_path):
    rows = [bench_row("a", "mcq/a.png", number) for number in range(3)] + [bench_row("b", "long/b.png")]
    rewards = rewarded(rows, [True] * 4)
    rewards[1]["rewards"] = [1, 1]
    rewards[2]["rewards"] = [None, 1]
    summary = BENCH.summarize(graded(tmp_path, rows, rewards[:3]))
    assert summary.counts == {"judged": 1, "tied": 1, "missing": 1, "unparsable": 1}
    assert (summary.overall.acc.value, summary.overall.acc_plus.value) == (0.25, 0)
    assert (summary.coverage, summary.acc_covered) == (0.5, 0.5)


def test_one_wrong_pair_costs_its_id_but_not_another(tmp_path):
    rows = [bench_row(name, f"mcq/{name}.png", number) for name in "ab" for number in range(2)]
    line = BENCH.summarize(graded(tmp_path, rows, rewarded(rows, [True, False, True, True]))).overall
    assert (line.right, line.right_ids, line.ids) == (3, 1, 2)


@pytest.mark.parametrize(
    ("paths", "given", "expected"),
    [
        (["video/mcq_1.mp4"], None, "video"),  # the first folder, not the first word of the list
        (["images/long_and_mcq.png"], None, "mcq"),  # the order of the list, not of the path
        (["images/a.png", "short/b.png"], "safety", "safety"),
        (["short/a.png", "long/b.png"], None, "short"),
        ([], "long", "long"),
    ],
)
def test_the_category_is_told_by_the_row_or_the_folder_or_a_word(paths, given, expected):
    assert category_of(paths, given) == expected


MALFORMED = [
    ("no_category", bench_row("x", "images/x.png")),
    ("no_category", bench_row("x", "mcq/x.png", category="hard")),
    ("no_id", {name: value for name, value in bench_row("x", "mcq/x.png").items() if name != "id"}),
    ("no_id", bench_row("x", "mcq/x.png", id=True)),
    ("invalid_record", bench_row("x", "mcq/x.png", chosen=None)),
    ("invalid_record", bench_row("x", "mcq/x.png", rejected=["no", "text"])),
    ("invalid_record", bench_row("x", "mcq/x.png", rejected_reason=7)),
    ("invalid_record", bench_row("x", "../x.png")),
    ("same_text", bench_row("x", "mcq/x.png", chosen="A ", rejected="A")),
    ("invalid_record", ["no", "object"]),
]


def test_malformed_rows_are_skipped_for_a_named_reason_and_the_rest_stays(tmp_path):
    path = tmp_path / "items.jsonl"
    lines = [json.dumps(row) for _, row in MALFORMED] + ['{"id": "cut off', json.dumps(bench_row("a", "mcq/a.png"))]
    path.write_text("\n".join(lines))
    ledger = Ledger("items")
    [item] = BENCH.items(path, ledger)
    assert item.id == "a"
    assert (ledger.taken, ledger.given) == (12, 1)
    assert ledger.skipped == Counter(reason for reason, _ in MALFORMED) + Counter(not_json=1)
    assert ledger.first["same_text"] == [f"{path}:9"]


@pytest.mark.parametrize(("reason", "row"), MALFORMED)
def test_a_malformed_row_is_an_error_that_names_its_line_where_nobody_keeps_an_account(tmp_path, reason, row):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(bench_row("a", "mcq/a.png")) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match=r"items\.jsonl:2: ") as caught:
        BENCH.items(path)
    assert caught.value.reason == reason


def test_an_id_of_two_categories_is_refused(tmp_path):
    rows = [bench_row("a", "mcq/a.png"), bench_row("a", "long/a.png", 1)]
    with pytest.raises(ValueError, match="one category for id 'a', got mcq and long"):
        BENCH.items(written(tmp_path / "items.jsonl", rows), Ledger("items"))


def test_rows_that_repeat_a_pair_count_as_often_as_they_stand_there(tmp_path):
    rows = [bench_row("a", "mcq/a.png")] * 2 + [bench_row("b", "mcq/b.png")]
    ledger = Ledger("items")
    items = BENCH.items(written(tmp_path / "items.jsonl", rows), ledger)
    assert len({item.key for item in items}) == 3
    assert ledger.repaired == {"repeated_pair": 1}
    once = rewarded(rows[1:], [False, True])
    assert BENCH.summarize(graded(tmp_path, rows, once)).overall.right == 1
    differing = rewarded(rows, [False, True, True])
    assert BENCH.summarize(graded(tmp_path, rows, differing)).overall.right == 2


def test_two_questions_with_the_same_answers_are_judged_apart(tmp_path):
    rows = [bench_row(name, f"mcq/{name}.png", chosen="B", rejected="C") for name in "ab"]
    items = BENCH.items(written(tmp_path / "items.jsonl", rows))
    assert [item.copy for item in items] == [0, 0]
    assert {grade.cluster: grade.correct for grade in graded(tmp_path, rows, rewarded(rows, [True, False]))} == {
        "a": True,
        "b": False,
    }


def test_grades_do_not_depend_on_the_order_of_either_file(tmp_path):
    rows = papers_rows()
    rewards = rewarded(rows, outcomes(CRITIC))
    expected = graded(tmp_path, rows, rewards)
    for seed in range(3):
        rng = random.Random(seed)
        one = graded(tmp_path, rng.sample(rows, len(rows)), rng.sample(rewards, len(rows)))
        assert one == expected
        assert BENCH.summarize(rng.sample(one, len(one))).to_json() == BENCH.summarize(expected).to_json()


def test_both_layouts_of_rewards_give_the_same_grades(tmp_path):
    rows = papers_rows()
    rewards = rewarded(rows, outcomes(CRITIC))
    assert graded(tmp_path, rows, scored(rewards)) == graded(tmp_path, rows, rewards)


def test_a_grade_that_is_right_without_an_opinion_is_refused():
    with pytest.raises(ValueError, match="expected false for an item that is tied"):
        Grade("a", "a", "mcq", correct=True, status="tied")


def test_the_numbers_that_a_run_logs_are_those_of_the_summary(tmp_path):
    rows = papers_rows()
    summary = BENCH.summarize(graded(tmp_path, rows, rewarded(rows, outcomes(CRITIC))))
    logged = summary.metrics("rewardbench")
    assert logged["rewardbench/acc"] == 144 / 170
    assert logged["rewardbench/safety/acc_plus"] == 1 / 6
    assert logged["rewardbench/coverage"] == 1
    assert logged["rewardbench/long/acc_high"] == 1
