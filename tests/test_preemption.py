"""A signal that says to go is heard, and afterwards means what it meant before."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from mmrlhf import preemption
from mmrlhf.preemption import Preempted, heard, listen, listening, passing_on


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_heard_only_while_somebody_listens(number):
    before = signal.getsignal(number)
    with listening():
        assert heard() is None
        os.kill(os.getpid(), number)
        assert heard() == number.name
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard() == number.name, "the first one counts"
    assert heard() is None
    assert signal.getsignal(number) == before


def test_whoever_took_the_signals_meanwhile_can_be_taken_them_back():
    with listening():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard() is None
        listen()
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard() == "SIGTERM"


def test_a_thread_may_listen_but_changes_nothing():
    before, after = signal.getsignal(signal.SIGTERM), []

    def work():
        with listening():
            after.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert after == [before]


def test_only_the_first_rank_asks_for_another_start():
    assert Preempted(first=True).code == preemption.REQUEUE == os.EX_TEMPFAIL
    assert Preempted(first=False).code == 0


def test_signals_are_passed_on_to_who_does_the_work():
    script = "import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); print('on', flush=True)"
    command = [sys.executable, "-c", f"{script}; [signal.pause() for _ in range(9)]"]
    before = signal.getsignal(signal.SIGUSR1)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, passing_on(process):
        assert process.stdout.readline() == "on\n"
        os.kill(os.getpid(), signal.SIGUSR1)
        assert process.wait(20) == 75
    assert signal.getsignal(signal.SIGUSR1) == before
