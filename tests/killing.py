"""A process that is killed in the middle of its work, at a place that a test names."""

import multiprocessing
import os
import signal

FORKED = multiprocessing.get_context("fork")
"""Its processes know all that was imported and made here, and nothing that they change comes back."""


def kill(work, target, name, call, after):
    """Do some work in a process of its own, and kill it at a call of `target.name`, before or after what that does."""
    process = FORKED.Process(target=_doomed, args=(work, target, name, call, after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"expected a kill at call {call} of {name}, got {process.exitcode}"


def _doomed(work, target, name, call, after):
    function, calls = getattr(target, name), []

    def dying(*args, **options):
        calls.append(name)
        if len(calls) == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = function(*args, **options)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(target, name, dying)
    work()
