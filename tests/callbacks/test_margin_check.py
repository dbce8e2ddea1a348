"""A beta that ignores the margin is an error at the first batch that can tell."""

from __future__ import annotations

import logging
from math import exp, nan

import pytest
import torch

from mmrlhf.callbacks.margin_check import MarginCheck, slopes

from .test_compute import BETA0, Beta, K, Toy, W, fit, report_of

pytestmark = pytest.mark.filterwarnings("ignore")


class Overwritten(Toy):
    """The fault of the released code: beta comes from the batch, not from the margins."""

    def pull(self, margin):
        """Ignore the margin."""
        return torch.full_like(margin, 0.12) / 2


def with_margins(*margins):
    """Reports with these margins, one tuple for each micro-batch, the last one for all others."""

    def made(number):
        wanted = torch.tensor(margins[min(number, len(margins) - 1)])
        return report_of(number, pairs=len(wanted))._replace(margin=wanted)

    return made


def test_the_slopes_are_the_derivative_of_half_beta_at_free_pairs_only():
    margins = [-2.0, 0.0, 0.3, 1.7, 4.0, nan]
    found = slopes(Toy(), torch.tensor(margins))
    wanted = [BETA0 * W * K * exp(-K * delta) / 2 for delta in (0.3, 1.7, 4.0)]
    assert (found.pairs, found.seen, found.moved) == (3, 5, True)
    assert (found.low, found.high) == pytest.approx((min(wanted), max(wanted)), rel=1e-4)


@pytest.mark.parametrize("margin", [1e-6, 1e-3, 1.0, 30.0])
def test_movement_is_seen_at_margins_of_any_size(margin):
    found = slopes(Toy(), torch.tensor([margin]))
    assert found.moved
    assert found.low == pytest.approx(BETA0 * W * K * exp(-K * margin) / 2, rel=1e-3, abs=1e-12)


def test_a_sound_beta_is_told_once(caplog):
    with caplog.at_level(logging.INFO):
        fit(Toy(with_margins((-1.0, 1.0, 2.0))), MarginCheck())
    told = [record.message for record in caplog.records if "margin" in record.message]
    low, high = (BETA0 * W * K * exp(-K * delta) / 2 for delta in (2.0, 1.0))
    assert told == [f"beta moves with the margin: d|pull|/ddelta between {low:.3g} and {high:.3g} over 2 pairs"]


def test_a_beta_written_over_is_an_error_with_a_cure():
    with pytest.raises(ValueError, match=r"move with the margin \(w = 0.5\).*hand each pair's margin.*log 2 for every"):
        fit(Overwritten(), MarginCheck())


@pytest.mark.parametrize("beta", [Beta(w=0.0), Beta(needs_margin=False)])
def test_a_beta_that_need_not_move_is_not_checked(beta):
    model = Overwritten()
    model.beta = beta
    fit(model, MarginCheck())


def test_a_first_batch_that_cannot_tell_is_a_warning_and_the_next_one_is_asked(caplog):
    margins = ((-1.0, 0.0), (-3.0,), (1.0,))
    with caplog.at_level(logging.INFO):
        fit(Toy(with_margins(*margins)), MarginCheck())
    told = [(record.levelname, record.message) for record in caplog.records if "beta" in record.message]
    assert [level for level, _ in told] == ["WARNING", "INFO"]
    assert "all 2 margins of the first batch are 0 or less" in told[0][1]
    with pytest.raises(ValueError, match="those of 1 pairs"):
        fit(Overwritten(with_margins(*margins)), MarginCheck())


def test_pairs_at_the_cap_are_no_fault(caplog):
    with caplog.at_level(logging.INFO):
        fit(Toy(with_margins((500.0, 900.0))), MarginCheck())
    assert "over 2 pairs (all at the cap" in caplog.text


def test_every_training_is_checked_anew():
    check = MarginCheck()
    fit(Toy(), check)
    with pytest.raises(ValueError, match="move with the margin"):
        fit(Overwritten(), check)
