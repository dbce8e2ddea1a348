"""A stage's account balances, says why when it does not, and survives merging, pickling and JSON."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrlhf.ledger import Ledger, LedgerError

REASONS = ["not_utf8", "too_long", "duplicate"]
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("took"), st.integers(0, 5)),
        st.tuples(st.just("gave"), st.integers(0, 5)),
        st.tuples(st.just("skip"), st.sampled_from(REASONS), st.sampled_from(["", "a.jsonl:1", "b.jsonl:2"])),
        st.tuples(st.just("fixed"), st.sampled_from(["bom", "nul"]), st.integers(0, 5)),
    )
)


def ledger_of(events, stage="import"):
    ledger = Ledger(stage)
    for name, *arguments in events:
        getattr(ledger, name)(*arguments)
    return ledger


def imported():
    """A thousand items: 990 went out, 6 were not UTF-8, 4 too long; one byte order mark was repaired."""
    ledger = Ledger("import")
    ledger.took(1000)
    ledger.gave(990)
    for line in range(4):
        ledger.skip("too_long", f"b.jsonl:{line}")
    for line in range(6):
        ledger.skip("not_utf8", f"a.jsonl:{line}")
    ledger.fixed("bom")
    return ledger


def test_an_account_reads_as_one_line_with_the_main_reason_first():
    line = "import: 1,000 in = 990 out + 10 skipped (not_utf8 6, too_long 4); fixed bom 1"
    assert str(imported()) == line


def test_an_account_without_losses_or_repairs_says_so():
    assert str(ledger_of([("took", 2), ("gave", 2)])) == "import: 2 in = 2 out + 0 skipped"


def test_an_account_that_does_not_balance_does_not_claim_to():
    assert str(ledger_of([("took", 2), ("gave", 1)])) == "import: 2 in != 1 out + 0 skipped"


@given(EVENTS)
def test_an_account_passes_exactly_when_the_sum_is_right(events):
    counts = [(name, arguments[0]) for name, *arguments in events]
    came = sum(n for name, n in counts if name == "took")
    went = sum(n for name, n in counts if name == "gave") + sum(name == "skip" for name, _ in counts)
    if came == went:
        ledger_of(events).check()
    else:
        with pytest.raises(LedgerError, match="bug"):
            ledger_of(events).check()


def test_an_imbalance_is_raised_even_where_asserts_are_switched_off():
    lost = "from mmrlhf.ledger import Ledger; a = Ledger('pack'); a.took(); a.check()"
    done = subprocess.run([sys.executable, "-O", "-c", lost], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "LedgerError: pack: 1 in != 0 out + 0 skipped" in done.stderr


def test_repairs_do_not_count_as_losses():
    ledger_of([("took", 1), ("fixed", "nul", 7), ("gave", 1)]).check(max_skipped=0)


def test_too_many_losses_are_an_error_that_names_reasons_and_first_items():
    with pytest.raises(ValueError, match="skipped") as caught:
        imported().check(max_skipped=0.005)
    assert str(caught.value) == (
        "import: expected at most 0.50% skipped, got 1.00% (10 of 1,000): "
        "not_utf8 6 (first: a.jsonl:0, a.jsonl:1, a.jsonl:2); "
        "too_long 4 (first: b.jsonl:0, b.jsonl:1, b.jsonl:2); repair these items or raise max_skipped"
    )


def test_the_limit_itself_is_still_allowed():
    imported().check(max_skipped=0.01)
    with pytest.raises(ValueError, match=r"1\.00%"):
        imported().check(max_skipped=0.0099)


def test_a_stage_without_input_passes_any_limit():
    Ledger("import").check(max_skipped=0)


@pytest.mark.parametrize("limit", [-0.1, 1.5, float("nan")])
def test_a_limit_in_percent_is_refused(limit):
    with pytest.raises(ValueError, match="max_skipped: expected 0 to 1"):
        imported().check(max_skipped=limit)


@given(EVENTS, st.data())
def test_workers_accounts_merge_into_the_account_of_one_worker(events, data):
    cut = data.draw(st.integers(0, len(events)))
    merged = ledger_of(events[:cut])
    merged.merge(ledger_of(events[cut:]))
    assert merged == ledger_of(events)


def test_a_merged_account_shares_nothing_with_its_source():
    source, whole = imported(), Ledger("import")
    whole.merge(source)
    whole.skip("not_utf8", "c.jsonl:1")
    assert source == imported()


def test_the_account_of_another_stage_is_not_merged():
    ledger = imported()
    with pytest.raises(ValueError, match="import: expected another account of this stage, got one of pack"):
        ledger.merge(Ledger("pack"))
    assert ledger == imported()


@given(EVENTS)
def test_an_account_survives_pickle_and_json(events):
    ledger = ledger_of(events)
    assert pickle.loads(pickle.dumps(ledger)) == ledger
    assert Ledger.from_dict(json.loads(json.dumps(ledger.as_dict()))) == ledger


def test_an_account_as_json_has_the_words_of_the_balance():
    assert ledger_of([("took", 2), ("gave", 1), ("skip", "nul", "a:1"), ("fixed", "bom", 3)]).as_dict() == {
        "stage": "import",
        "in": 2,
        "out": 1,
        "skipped": {"nul": 1},
        "first": {"nul": ["a:1"]},
        "fixed": {"bom": 3},
    }


def test_json_made_from_an_account_does_not_change_it():
    ledger = imported()
    row = ledger.as_dict()
    row["skipped"]["not_utf8"] = 99
    row["first"]["not_utf8"].append("x")
    row["fixed"].clear()
    assert ledger == imported()


NO_ACCOUNTS = {
    "negative": {"in": -1},
    "a truth value": {"in": True},
    "a fraction": {"out": 1.0},
    "a list": {"skipped": []},
    "a text as count": {"skipped": {"nul": "6"}},
    "no count": {"fixed": {"bom": None}},
    "no stage": {"stage": None},
    "one field more": {"x": 1},
}


@pytest.mark.parametrize("fault", NO_ACCOUNTS)
def test_json_that_is_no_account_is_refused(fault):
    with pytest.raises(ValueError, match="expected"):
        Ledger.from_dict(imported().as_dict() | NO_ACCOUNTS[fault])


@pytest.mark.parametrize("field", sorted(Ledger("import").as_dict()))
def test_json_that_lacks_a_field_is_no_account(field):
    row = imported().as_dict()
    del row[field]
    with pytest.raises(ValueError, match=r"ledger: expected stage \(str\), in \(int\)"):
        Ledger.from_dict(row)


@pytest.mark.parametrize("name", ["took", "gave"])
def test_nothing_is_counted_backwards(name):
    ledger = Ledger("import")
    with pytest.raises(ValueError, match=f"{name}: expected a count of 0 or more, got -1"):
        getattr(ledger, name)(-1)
    assert ledger == Ledger("import")
