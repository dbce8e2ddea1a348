"""Two agents of torchrun train as one process does: on one machine, and in two that have a wire between them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ..modules.families import saved
from . import training
from .test_strategies import NAME, apart

ROOT = Path(__file__).parents[2]
OPTIONS = {"kind": "dpo", "tower": True}
LIMIT = 300
pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def agent(folder, node, address, port, task, before=(), per_node=2):
    """A node of two, with so many ranks."""
    words = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", str(per_node)]
    words += ["--master-addr", address, "--master-port", str(port), "-m", "tests.parallel.training", str(folder), task]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = (folder / f"node-{node}.txt").open("w")
    command = [*before, sys.executable, "-m", "torch.distributed.run", *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)


def finished(folder, agents):
    """What the first rank wrote down."""
    try:
        codes = [each.wait(LIMIT) for each in agents]
    except subprocess.TimeoutExpired:
        codes = [each.poll() for each in agents]
    finally:
        for each in agents:
            each.kill()
    assert codes == [0, 0], f"{codes}" + "".join((folder / f"node-{node}.txt").read_text()[-2000:] for node in (0, 1))
    return json.loads((folder / "notes.json").read_text()), torch.load(folder / "weights.pt", weights_only=True)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The checkpoint, and its training by one process."""
    folder = tmp_path_factory.mktemp("nodes")
    checkpoint = str(saved(NAME, folder / NAME))
    task = json.dumps({"checkpoint": checkpoint, "family": NAME, **OPTIONS})
    words = [sys.executable, "-m", "tests.parallel.training", str(folder), task]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True, timeout=LIMIT)
    notes = json.loads((folder / "notes.json").read_text())
    module = training.module_of(checkpoint, **OPTIONS)
    module.configure_model()
    start = {name: weight.detach() for name, weight in module.whole().named_parameters() if weight.requires_grad}
    return checkpoint, notes, torch.load(folder / "weights.pt", weights_only=True), start


def compare(one, folder, strategy, address="127.0.0.1", port=None, before=((), ()), per_node=2):
    checkpoint, notes, weights, start = one
    machine = {"strategy": strategy, "ranks": 2 * per_node, "nodes": 2}
    task = json.dumps({"checkpoint": checkpoint, "family": NAME, "machine": machine, **OPTIONS})
    port = port or free_port()
    agents = [agent(folder, node, address, port, task, before[node], per_node) for node in (0, 1)]
    found, trained = finished(folder, agents)
    assert found["world"] == 2 * per_node
    assert found["losses"] == pytest.approx(notes["losses"], rel=1e-5)
    assert apart(trained, weights, start) < 1e-3


@pytest.mark.parametrize("strategy", ["ddp", "sharded", "sharded:2"])
def test_two_agents_on_one_machine_train_as_one_process_does(one, tmp_path, strategy):
    compare(one, tmp_path, strategy)


@contextmanager
def two_networks():
    """Two network namespaces with a wire between them; the words that run a command in each."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces take root and the command `ip`")
    names = [f"mmrlhf{os.getpid()}n{node}" for node in (0, 1)]
    wires = [f"mm{os.getpid() % 10**6}v{node}" for node in (0, 1)]
    commands = [["ip", "netns", "add", name] for name in names]
    commands.append(["ip", "link", "add", wires[0], "type", "veth", "peer", "name", wires[1]])
    for node, (name, wire) in enumerate(zip(names, wires, strict=True)):
        inside = ["ip", "netns", "exec", name, "ip"]
        commands.append(["ip", "link", "set", wire, "netns", name])
        commands.append([*inside, "addr", "add", f"10.77.0.1{node}/24", "dev", wire])
        commands += [[*inside, "link", "set", each, "up"] for each in (wire, "lo")]
    try:
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"this machine allows no network namespaces: {done.stderr.strip() or command}")
        execs = [["ip", "netns", "exec", name] for name in names]
        yield [["env", f"GLOO_SOCKET_IFNAME={wire}", *words] for wire, words in zip(wires, execs, strict=True)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_machines_on_a_wire_train_as_one_process_does(one, tmp_path, strategy):
    with two_networks() as before:
        compare(one, tmp_path, strategy, "10.77.0.10", 29555, before, per_node=1)
