"""Work in several processes: in order, bounded, gone with their parent, and never in silence."""

import os
import signal
import time
from itertools import count, islice

import pytest

from mmrlhf.parallel import in_order, is_rank_zero, workers


def late(number):
    """The later, the sooner."""
    time.sleep(0.05 * (3 - number % 4))
    return number


def die(number):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def handled(_):
    return signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def refuse(number):
    raise ValueError(f"number {number}: expected another")


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_the_order_of_the_work_and_only_as_far_as_they_are_asked_for(processes):
    asked = count()
    with workers(processes) as pool:
        found = list(islice(in_order(pool, late, ((number,) for number in asked), ahead=4), 6))
    assert found == [0, 1, 2, 3, 4, 5]
    assert next(asked) <= 6 + 4 + 1


def test_a_process_that_dies_is_an_error_that_says_so():
    with pytest.raises(ChildProcessError, match="one died, often because the memory was used up"), workers(2) as pool:
        list(in_order(pool, die, ((number,) for number in range(4))))


def test_an_error_of_the_work_is_the_error(capfd):
    with pytest.raises(ValueError, match="number 0: expected another"), workers(2) as pool:
        list(in_order(pool, refuse, [(0,)]))


def test_an_interrupt_is_the_parents_affair():
    with workers(2) as pool:
        assert list(in_order(pool, handled, [(0,), (1,)])) == [True, True]


def test_no_processes_at_all_are_refused():
    with pytest.raises(ValueError, match="processes: expected one or more, got 0"), workers(0):
        pass


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "3"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1", "SLURM_PROCID": "0"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"NODE_RANK": "0"}, True),
        ({"SLURM_PROCID": "5"}, False),
        ({"SLURM_PROCID": "0"}, True),
    ],
)
def test_the_first_process_of_a_training_knows_itself(variables, first, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_rank_zero() == first
