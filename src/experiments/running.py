"""The process of one cell: train, evaluate, tell MLflow, and write the account, last.

    python -m mmrlhf.experiments.running OUT/cells/NAME

Run again after a kill it goes on: what is finished is not made again, and a training continues by itself.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import IO

from .. import jsonl
from ..preemption import REQUEUE
from ..settings import alone
from .cells import EVALUATION, LOG, Account, Task, flat, tail

log = logging.getLogger(__name__)
FOLLOW = "--follow"
_PATIENCE, _GRACE = 5.0, 10.0
_running: list[subprocess.Popen[bytes]] = []
"""The command of the cell, for whoever is told by a signal that this process has to go."""
_STOPPED = {130, REQUEUE, -signal.SIGINT, -signal.SIGTERM, -signal.SIGUSR2}


class CommandError(ValueError):
    """A command of the cell that failed, with its last words."""


class StoppedError(Exception):
    """A command of the cell that somebody has ended; the cell goes on when it is run again."""


def main() -> None:
    """Run the cell that the command line names; with `--follow`, only as long as the process that started it lives."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    folder, *flags = sys.argv[1:]
    if FOLLOW in flags:
        follow()
    try:
        done = run_cell(Path(folder))
    except (KeyboardInterrupt, StoppedError):
        sys.exit(130)
    sys.exit(0 if done else 1)


def follow() -> None:
    """End this process and its children once the other end of the standard input is closed: a kill closes it, too."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    Thread(target=wait, daemon=True).start()


def run_cell(folder: Path, *, own_group: bool = False) -> bool:
    """Do what the folder's task says, and return whether it is done; a failure stands in its account.

    With `own_group`, the commands get process groups of their own, so that a signal to this one does not reach them.
    """
    task = Task.read(folder)
    with _patiently_alone(folder):
        account = Account.opened(folder, task)
        if account.status == "done":
            return True
        account.write(folder)
        try:
            account = _finished(folder, task, account, own_group)
        except (CommandError, OSError, ValueError) as error:
            log.warning("%s failed: %s", task.name, error)
            _failed(folder, task, str(error))
            return False
        except StoppedError:
            replace(Account.opened(folder, task), status="stopped").write(folder)
            raise
        account.write(folder)
    return True


def _failed(folder: Path, task: Task, error: str) -> None:
    """Write that a cell has failed, and tell its run; what was evaluated is evaluated again if it is tried again."""
    account = Account.opened(folder, task)
    finished = min(account.finished, 0 if task.train is None else 1)
    account = replace(account, status="failed", error=error, finished=finished)
    account.write(folder)
    if (Path(task.run) / "mlflow.json").exists():
        _tell(folder, task, account)


def _finished(folder: Path, task: Task, account: Account, own_group: bool) -> Account:
    """Run the commands that are not finished yet, and collect their metrics."""
    train = [] if task.train is None else [task.train]
    for number, words in enumerate([*train, *task.evaluate]):
        if number < account.finished:
            continue
        began = time.monotonic()
        run_command([sys.executable, "-m", task.program, *words], folder / LOG, own_group)
        seconds = account.seconds + time.monotonic() - began
        account = replace(account, finished=number + 1, seconds=round(seconds, 3))
        account.write(folder)
    account = replace(account, metrics=collected(folder, task), status="done")
    _tell(folder, task, account)
    return account


def run_command(words: list[str], record: Path, own_group: bool = False) -> None:
    """Run one command, whose words go to the log; a failure is an error with the last of them."""
    with record.open("ab") as file:
        file.write(f"\n$ {' '.join(words)}\n".encode())
        file.flush()
        start = file.tell()
        child = _begun(words, file, own_group)
        try:
            code = child.wait()
        finally:  # interrupted, or asked to leave the machine
            _end(child, own_group)
            _running.remove(child)
    if code in _STOPPED:
        raise StoppedError(f"{record}: a command was ended with status {code}")
    if code:
        raise CommandError(
            f"{' '.join(words[2:4])} ended with status {code}: {tail(record, start) or 'without a word'}"
        )


def _begun(words: list[str], file: IO[bytes], own_group: bool) -> subprocess.Popen[bytes]:
    """Start a command; one with a group of its own does not hear SIGUSR2, which SLURM sends to all and means us."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2} if own_group else ())
    try:
        child = subprocess.Popen(  # noqa: S603 - a verb of ours
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=own_group
        )
        _running.append(child)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return child


def leave(seconds: float) -> None:
    """Tell the command that runs to save and go, and give it so many seconds; called from a handler of signals."""
    until = time.monotonic() + seconds
    for child in _running:
        child.send_signal(signal.SIGTERM)
        while not _has_left(child) and time.monotonic() < until:
            time.sleep(0.1)


def _has_left(child: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended, which is still waited for below the handler: `poll` would never see it."""
    try:
        return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _end(child: subprocess.Popen[bytes], own_group: bool) -> None:
    """End a command that still runs; with a group of its own, whatever it has left there, too."""
    for sent in (signal.SIGINT, signal.SIGKILL):
        if child.poll() is None:
            child.send_signal(sent)
            try:
                child.wait(_GRACE)
            except subprocess.TimeoutExpired:
                continue
    if own_group:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def collected(folder: Path, task: Task) -> dict[str, float]:
    """The metrics of all evaluations of a cell, by name; the declared one must be among them."""
    found: dict[str, float] = {}
    for number in range(len(task.evaluate)):
        place = folder / EVALUATION / str(number)
        path = place / "metrics.json"
        if not path.exists() and any(str(place) in word for word in chain(*task.evaluate[number + 1 : number + 2])):
            continue  # it made what the next one reads
        if not path.exists():
            raise CommandError(f"evaluate: expected {path} from command {number}, found none; it must write to {{out}}")
        metrics = flat(jsonl.loads(path.read_bytes()))
        if twice := sorted(set(found) & set(metrics)):
            raise CommandError(
                f"evaluate: expected each metric once, got {twice[0]!r} from two commands; leave one out"
            )
        found |= metrics
    if task.metric not in found:
        raise CommandError(f"metric: expected one of {', '.join(sorted(found)) or 'none'}, got {task.metric!r}")
    return found


def outcome_files(folder: Path, task: Task) -> list[Path]:
    """How every item was answered: the files that the evaluations left in `outcomes`."""
    several = [folder / EVALUATION / str(number) / "outcomes" for number in range(len(task.evaluate))]
    found = [file for outcomes in several for file in sorted(outcomes.glob("*.jsonl"))]
    names = [file.name for file in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise CommandError(f"evaluate: expected files of different names in outcomes, got two {min(twice)!r}")
    return found


def _tell(folder: Path, task: Task, account: Account) -> None:
    """Tell MLflow what has become of the cell; of a failed one only that it has failed."""
    if not task.tracked:
        return
    from ..tracked import log_outcomes

    done = account.status == "done"
    metrics = {f"{task.prefix}{name}": value for name, value in (account.metrics or {}).items()}
    files = outcome_files(folder, task) if done else []
    log_outcomes(Path(task.run), metrics, files, tags_of(task, account), under=f"{task.prefix}outcomes")


def tags_of(task: Task, account: Account) -> Mapping[str, str]:
    """What tells the cell's run from others; where it is only evaluated again, the tags are the training's."""
    if task.role == "test":
        return {"mmrlhf.test": account.status}
    told = {
        "sweep": task.sweep,
        "cell": task.cell,
        "seed": task.seed,
        "overrides": jsonl.dumps(dict(task.overrides)),
        "role": task.role,
        "status": account.status,
        "fraction": task.fraction,
    }
    return {f"mmrlhf.{name}": str(value) for name, value in told.items()}


@contextmanager
def _patiently_alone(folder: Path) -> Iterator[None]:
    """The folder for this process alone; one that is being ended gets time to leave it."""
    until = time.monotonic() + _PATIENCE
    while True:
        attempt = alone(folder)
        try:
            attempt.__enter__()
        except ValueError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
            continue
        break
    try:
        yield
    finally:
        attempt.__exit__(None, None, None)


if __name__ == "__main__":
    main()
