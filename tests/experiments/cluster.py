"""A cluster of this machine: `sbatch`, `srun`, `scontrol` and `sacct` that do what submitit asks of SLURM.

`python cluster.py NAME ARGUMENTS`. A job is queued again by writing its name into `requeue`, as SLURM does by itself.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

HOME = Path(os.environ.get("CLUSTER", "."))


def install(folder):
    """Scripts of these names in a folder for PATH."""
    for name in ("sbatch", "srun", "scontrol", "sacct"):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        path.chmod(0o755)


def sbatch(path):
    """Keep the script, and start its jobs in the background."""
    number = 100 + len(list(HOME.glob("*.sbatch")))
    script = HOME / f"{number}.sbatch"
    script.write_text(Path(path).read_text())
    found = re.search(r"--array=0-(\d+)", script.read_text())
    for place in range(int(found[1]) + 1) if found else [None]:
        words = [sys.executable, __file__, "job", str(script), "" if place is None else str(place)]
        subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    sys.stdout.write(f"Submitted batch job {number}\n")


def job(script, place):
    """Run a job, again as long as it is queued again."""
    number = Path(script).stem
    name = f"{number}_{place}" if place else number
    around = os.environ | {"SLURM_JOB_ID": str(int(number) * 10 + int(place or 0)), "SLURM_PROCID": "0"}
    around |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    around |= {"SLURM_JOB_NODELIST": "here", "SLURM_NODELIST": "here"}
    if place:
        around |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": place}
    else:
        around["SLURM_JOB_ID"] = number
    requeue = HOME / f"{name}.requeue"
    while True:
        (HOME / f"{name}.state").write_text("RUNNING")
        subprocess.run(["bash", script], env=around, check=False)
        if not requeue.exists():
            break
        requeue.unlink()
    (HOME / f"{name}.state").write_text("COMPLETED")


def srun(*words):
    """The command without srun's own options, as the process whose number is told."""
    command = words[next(place for place, word in enumerate(words) if word == sys.executable) :]
    output = Path(words[words.index("--output") + 1].replace("%A_%a", "job").replace("%j", "job").replace("%t", "0"))
    name = os.environ["SLURM_JOB_ID"]
    (HOME / f"{name}.pid").write_text(str(os.getpid()))
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.execv(command[0], command)


def scontrol(what, name):
    assert what == "requeue", what
    (HOME / f"{name}.requeue").touch()


def sacct(*_):
    sys.stdout.write("JobID|State|NodeList\n")
    for path in HOME.glob("*.state"):
        sys.stdout.write(f"{path.stem}|{path.read_text()}|here\n")


if __name__ == "__main__":
    {each.__name__: each for each in (sbatch, job, srun, scontrol, sacct)}[sys.argv[1]](*sys.argv[2:])
