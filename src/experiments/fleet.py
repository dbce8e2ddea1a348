"""Tasks are run by a launcher, with progress on the error stream; what has become of each is read from its folder."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..progress import bar
from .cells import Account, Task, settled
from .design import Design
from .launching import run_local
from .planning import Plan, planned
from .slurm import Slurm, run_slurm

if TYPE_CHECKING:
    from collections.abc import Generator

Launcher = Literal["local", "slurm"]
log = logging.getLogger(__name__)


class Fleet:
    """What runs the tasks of a sweep, and how many at once."""

    def __init__(
        self, design: Design, launcher: Launcher, slurm: Slurm, max_parallel: int | None, retry_failed: bool
    ) -> None:
        if max_parallel is not None and max_parallel < 1:
            raise ValueError(f"max_parallel: expected one or more, got {max_parallel}")
        self.design, self.launcher, self.slurm = design, launcher, slurm
        self.max_parallel, self.retry_failed = max_parallel, retry_failed

    def parallel(self, tasks: int) -> int:
        """How many of so many tasks run at once, if nothing is in their way."""
        return max(1, min(tasks, self.max_parallel or (1 if self.launcher == "local" else tasks)))

    def plan(self, tasks: Sequence[Task]) -> Plan:
        """What has become of the tasks, and which are to be run."""
        return planned(tasks, {task.name: self.design.folder(task.name) for task in tasks}, self.retry_failed)

    def run(self, tasks: Sequence[Task], what: str) -> dict[str, Account]:
        """Run the tasks that are to be run, and return the accounts of all that have one."""
        to_do = self.plan(tasks).to_do
        for task in to_do:
            folder = self.design.folder(task.name)
            task.write(folder)
            there = Account.read(folder)
            if there is not None and there.status in ("failed", "stopped"):  # a past end is not the next one's
                Account.opened(folder, task).write(folder)
        if to_do:
            self._run([self.design.folder(task.name) for task in to_do], what)
        return dict(self.plan(tasks).accounts)

    def _run(self, folders: Sequence[Path], what: str) -> None:
        counts: Counter[str] = Counter()
        with bar() as shown, closing(self._launched(folders)) as ended:
            line = shown.add_task(what, total=len(folders))
            for number, folder in enumerate(ended, 1):
                account = settled(folder)
                status = "runs elsewhere" if account is None else account.status
                counts[status] += 1
                told = f"{folder.name}: {status}"
                if account is not None:
                    told += f" after {account.seconds:.0f} s"
                log.info("%s (%d of %d, %d failed)", told, number, len(folders), counts["failed"])
                running = self.parallel(len(folders) - number) if number < len(folders) else 0
                about = f"{what}: {counts['done']} done, {counts['failed']} failed, {running} running"
                shown.update(line, advance=1, description=about)

    def _launched(self, folders: Sequence[Path]) -> Generator[Path, None, None]:
        parallel = self.parallel(len(folders))
        if self.launcher == "local":
            yield from run_local(folders, parallel)
        else:
            yield from run_slurm(folders, self.design.out.resolve() / "jobs", self.slurm, parallel)
