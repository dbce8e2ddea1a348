"""Cells as jobs of SLURM, one array for all that are new; a job that is preempted is queued again and goes on."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import jsonl
from ..settings import write_json
from .cells import Account, Task, state_of
from .running import StoppedError, leave, run_cell, run_command

if TYPE_CHECKING:
    import submitit

log = logging.getLogger(__name__)
JOB = "job.json"
_SIGNAL_COMES, _ACCOUNT_COMES = 60.0, 60.0
_REQUEUEING = 30.0
"""Seconds of the notice that are left for queuing a job again."""
_WAITING = {"PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "CONFIGURING", "COMPLETING", "RESIZING", "PREEMPTED"}


@dataclass(frozen=True)
class Slurm:
    """What a cell's job asks for.

    Args:
        partition: Of the cluster; null for its default.
        minutes: Limit of time; a training that needs longer is queued again and continues.
        nodes: Machines of a cell.
        gpus: Of a machine; each has a process of the training.
        cpus: Of a process.
        memory_gb: Of a machine; null for the cluster's default.
        notice: Seconds before the limit at which a job is told to leave.
        requeues: How many times a job that came to its limit is queued again; a preempted one always is.
        setup: Lines of shell before the job, such as module load.
        directives: Further options of sbatch by name, such as account or qos.
        poll: Seconds between two looks at the queue.
    """

    partition: str | None = None
    minutes: int = 240
    nodes: int = 1
    gpus: int = 0
    cpus: int = 4
    memory_gb: float | None = None
    notice: int = 120
    requeues: int = 20
    setup: tuple[str, ...] = ()
    directives: dict[str, Any] | None = None
    poll: float = 10.0


@dataclass(frozen=True)
class CellJob:
    """What a job runs. SLURM's signal makes submitit ask for `checkpoint`, and queue the same again."""

    notice: float = 120.0
    """Seconds from the signal to the end."""

    def __call__(self, folder: str) -> None:
        """Run a cell; of the processes of a training, the first keeps the account."""
        path, process = Path(folder), os.environ.get("SLURM_PROCID", "0")
        try:
            if process == "0":
                run_cell(path, own_group=True)
            elif (task := Task.read(path)).train is not None and state_of(path) != "done":
                run_command(
                    [sys.executable, "-m", task.program, *task.train], path / f"log-{process}.txt", own_group=True
                )
        except StoppedError:
            time.sleep(_SIGNAL_COMES)  # the signal that ended the command is on its way to this process, too
            raise

    def checkpoint(self, folder: str) -> submitit.helpers.DelayedSubmission:
        """The same again, once the training has saved and left: the cell itself knows what is finished."""
        import submitit

        leave(self.notice - _REQUEUEING)
        return submitit.helpers.DelayedSubmission(self, folder)


def run_slurm(
    folders: Sequence[Path], jobs: Path, asked: Slurm, parallel: int, cluster: str = "slurm"
) -> Iterator[Path]:
    """Submit the cells of these folders, but for those whose job is in the queue, and yield each when its job ended.

    Jobs go on when this process ends; the next call follows them.
    """
    executor = executor_of(jobs, asked, parallel, cluster)
    waiting = {folder: job for folder in folders if (job := _queued(folder, jobs, cluster)) is not None}
    fresh = [folder for folder in folders if folder not in waiting]
    for folder, job in zip(fresh, _submitted(executor, fresh, asked.notice), strict=True):
        write_json(folder / JOB, {"job": job.job_id})
        waiting[folder] = job
    log.info("%d jobs submitted, %d in the queue already", len(fresh), len(folders) - len(fresh))
    silent: dict[Path, float] = {}
    try:
        while waiting:
            for folder in [folder for folder, job in waiting.items() if _has_ended(folder, job, silent)]:
                del waiting[folder]
                yield folder
            time.sleep(asked.poll if waiting else 0)
    finally:
        if waiting:
            names = " ".join(sorted(job.job_id for job in waiting.values()))
            log.warning("%d jobs go on by themselves: run again to follow them, or scancel %s", len(waiting), names)


def executor_of(jobs: Path, asked: Slurm, parallel: int, cluster: str = "slurm") -> submitit.AutoExecutor:
    """What submits: an array of which so many jobs run at once."""
    try:
        import submitit
    except ImportError as error:
        raise ValueError("launcher: slurm needs submitit; pip install 'mmrlhf[slurm]'") from error
    try:
        executor = submitit.AutoExecutor(jobs, cluster=cluster, slurm_max_num_timeout=asked.requeues)
    except RuntimeError as error:
        raise ValueError(f"launcher: {error} Say local, or run it where sbatch and srun are") from error
    given = {"slurm_partition": asked.partition, "mem_gb": asked.memory_gb, "slurm_setup": list(asked.setup) or None}
    executor.update_parameters(
        name="mmrlhf-sweep",
        timeout_min=asked.minutes,
        nodes=asked.nodes,
        tasks_per_node=max(1, asked.gpus),
        cpus_per_task=asked.cpus,
        gpus_per_node=asked.gpus,
        slurm_signal_delay_s=asked.notice,
        slurm_array_parallelism=parallel,
        slurm_srun_args=["--kill-on-bad-exit=1"],
        slurm_additional_parameters={"requeue": True} | (asked.directives or {}),
        **{name: value for name, value in given.items() if value is not None},
    )
    return executor


def _submitted(executor: submitit.AutoExecutor, folders: Sequence[Path], notice: float) -> list[submitit.Job[None]]:
    if not folders:
        return []
    with executor.batch():
        return [executor.submit(CellJob(notice), str(folder)) for folder in folders]


def _queued(folder: Path, jobs: Path, cluster: str) -> submitit.Job[None] | None:
    """The job of a cell that an earlier call has submitted, if it waits or runs."""
    import submitit

    if not (folder / JOB).exists() or cluster != "slurm":
        return None
    job: submitit.Job[None] = submitit.SlurmJob(jobs, jsonl.loads((folder / JOB).read_bytes())["job"])
    return job if job.state.split()[0] in _WAITING else None


def _has_ended(folder: Path, job: submitit.Job[None], silent: dict[Path, float]) -> bool:
    """Whether the cell has its account, or its job is gone: one that is queued again may seem so for a while."""
    account = Account.read(folder)
    if account is not None and account.status in ("done", "failed"):
        return True
    if not job.done():
        silent.pop(folder, None)
        return False
    return time.monotonic() - silent.setdefault(folder, time.monotonic()) > _ACCOUNT_COMES
