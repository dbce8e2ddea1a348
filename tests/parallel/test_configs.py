"""What is said of the machine is one file beside that of the training, and scripts of SLURM say it for many nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy

from mmrlhf.callbacks.sharding import Sharded
from mmrlhf.runs import TrainCLI
from mmrlhf.train import AlignCLI, RewardCLI

ROOT = Path(__file__).parents[2]
EXPECTED = {"cpu": str, "gpu": str, "ddp": DDPStrategy, "fsdp": Sharded, "fsdp_multinode": Sharded, "slurm": str}


def test_every_config_of_a_machine_is_read_here():
    assert {path.stem for path in (ROOT / "configs" / "trainer").glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize(
    ("cli", "training", "name"),
    [*((AlignCLI, "dpo/llava_ov_7b", name) for name in EXPECTED), (RewardCLI, "reward/llava_ov_7b", "fsdp")],
)
def test_a_machine_is_said_beside_any_training(name, cli, training, monkeypatch):
    machine = ROOT / "configs" / "trainer" / f"{name}.yaml"
    seen = []
    monkeypatch.setattr(TrainCLI, "instantiate_classes", lambda self: seen.append(self))
    cli(["--config", str(ROOT / "configs" / f"{training}.yaml"), "--config", str(machine)])
    options = seen[0].parser.instantiate(seen[0].config)["trainer"]
    assert isinstance(options["strategy"], EXPECTED[name])
    said = yaml.safe_load(machine.read_text())["trainer"]
    plain = {key: value for key, value in said.items() if key not in {"strategy", "plugins"}}
    assert {key: options[key] for key in plain} == plain
    if name == "slurm":
        assert isinstance(options["plugins"], SLURMEnvironment)
        assert not options["plugins"].auto_requeue
    if "fsdp" in name:
        assert said["strategy"]["init_args"]["replicas"] == options["num_nodes"] == options["strategy"].replicas


def test_a_strategy_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="replicas of 1 or more"):
        Sharded(replicas=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="offers gloo for the host beside NCCL")
def test_weights_in_host_memory_are_gathered_by_what_the_host_has():
    assert Sharded(cpu_offload=True).process_group_backend is None


# Templates of SLURM, with commands that stand for those of a cluster ------------------------------------------

SRUN = """#!/bin/bash
echo "srun $*" >> "$LOG"
trap 'echo told >> "$LOG"; exit 3' TERM
for _ in $(seq 100); do [ -e "$LOG.end" ] && exit "$(cat "$LOG.end")"; sleep 0.1; done
"""


@pytest.fixture
def cluster(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": '#!/bin/bash\necho "scontrol $*" >> "$LOG"\n'}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    place = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    return tmp_path / "log", place | {"SLURM_JOB_ID": "7", "SLURM_NNODES": "4", "SLURM_SUBMIT_DIR": str(ROOT)}


def start(script, *words, env):
    return subprocess.Popen(["bash", str(ROOT / "scripts" / "slurm" / script), *words], env=env, cwd=ROOT)


def told(log):
    deadline = time.monotonic() + 10
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return log.read_text().splitlines()


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_must_end_tells_its_ranks_and_is_put_back(cluster, sent):
    log, env = cluster
    job = start("train.sbatch", "train-dpo", "--config", "a b.yaml", env=env)
    expected = (
        "srun mmrlhf train-dpo --config a b.yaml --config configs/trainer/fsdp_multinode.yaml --config "
        "configs/trainer/slurm.yaml --trainer.num_nodes 4 --trainer.strategy.init_args.replicas 4"
    )
    assert told(log) == [expected]
    job.send_signal(sent)
    assert job.wait(10) == 0
    assert log.read_text().splitlines()[1:] == ["told", "scontrol requeue 7"]


@pytest.mark.parametrize("code", [0, 5])
def test_a_job_that_ends_by_itself_is_not_put_back(cluster, code):
    log, env = cluster
    Path(f"{log}.end").write_text(str(code))
    assert start("train.sbatch", "train-dpo", env=env | {"SLURM_NNODES": "1"}).wait(10) == code
    options = "--config configs/trainer/fsdp.yaml --config configs/trainer/slurm.yaml --trainer.num_nodes 1"
    assert told(log) == [f"srun mmrlhf train-dpo {options}"]


def test_a_task_of_an_array_takes_its_line(cluster, tmp_path):
    log, env = cluster
    (tmp_path / "grid").write_text("--model.beta.w 0.25 --run.out a\n--model.beta.w 0.5 --run.out b\n")
    Path(f"{log}.end").write_text("0")
    env |= {"SLURM_NNODES": "1", "TRAINER": "ddp"}
    task = start("sweep.sbatch", str(tmp_path / "grid"), "train-dpo", env=env | {"SLURM_ARRAY_TASK_ID": "2"})
    assert task.wait(10) == 0
    assert told(log)[0].startswith("srun mmrlhf train-dpo --model.beta.w 0.5 --run.out b --config configs/trainer/ddp")
    missing = start("sweep.sbatch", str(tmp_path / "grid"), "train-dpo", env=env | {"SLURM_ARRAY_TASK_ID": "3"})
    assert missing.wait(10) == 2
