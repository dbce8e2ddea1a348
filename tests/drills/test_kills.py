"""The promise: killed at any moment and started again with the same command, a training ends as if nothing had been.

On the embedded world's tiny policy, with dropout. What is measured is printed: `pytest -m slow -s tests/drills`.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mmrlhf import cli, durable
from mmrlhf.callbacks.resuming import by_step, newest
from mmrlhf.score import score
from mmrlhf.world.policy import build_model, build_processor
from tests.datamodules.ranks import run_ranks

from . import script

pytestmark = pytest.mark.slow
STEPS, EVERY, GLOBAL_BATCH, MICRO_BATCH = 12, 2, 4, 2
KILLS = 8
LAYOUTS = {
    "1 rank": (1, ("--trainer.strategy", "auto")),
    "2 DDP ranks": (2, ("--trainer.strategy", "ddp")),
    "2 FSDP2 ranks": (2, ("--trainer.strategy.class_path", "mmrlhf.callbacks.sharding.Sharded")),
}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.drills.script", "tests.datamodules.training_script"])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A world of a few queries, an untrained policy with dropout and one without, and their log-probs."""
    home = tmp_path_factory.mktemp("home")
    assert cli.main(["world", "--out", f"{home}/w", "--queries", "24", "--no-policy", "--processes", "1"]) == 0
    packing = ["--ranked", f"{home}/w/ranked.jsonl", "--media", f"{home}/w/media", "--out", f"{home}/shards"]
    assert cli.main(["pack", *packing, "--val", "0.1", "--test", "0.1", "--processes", "1"]) == 0
    processor = build_processor(AutoTokenizer.from_pretrained(home / "w" / "tokenizer"))
    for name, dropout in (("dropping", 0.1), ("plain", 0.0)):
        model = build_model(processor.tokenizer, 0)
        model.config.text_config.attention_dropout = dropout
        model.save_pretrained(home / name)
        processor.save_pretrained(home / name)
        score(home / "shards", home / f"{name}.jsonl", str(home / name), workers=0)
    return home


def words(home, folder, layout, policy="dropping"):
    """The command of a training; the same at every start."""
    ranks, strategy = LAYOUTS[layout]
    return [
        *("train-dpo", "--config", "configs/dpo/world.yaml", "--model.backbone.path", f"{home}/{policy}"),
        *("--data.shards", f"{home}/shards", "--data.scores", f"{home}/{policy}.jsonl", "--run.out", f"{folder}/out"),
        *("--data.global_batch", str(GLOBAL_BATCH), "--data.micro_batch", str(MICRO_BATCH), "--data.workers", "0"),
        *("--trainer.max_steps", str(STEPS), "--run.save_every", str(EVERY), "--run.tracking", "null"),
        *("--trainer.devices", str(ranks), *strategy),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
        *("--trainer.callbacks", f"{script.__name__}.Logs", "--trainer.callbacks.folder", str(folder)),
    ]


def start(home, folder, layout, overdue=lambda: False, dies=None, policy="dropping", more=()):
    """Start the command; whether it has finished."""
    options = {"argv": [*words(home, folder, layout, policy), *more], "dies": dies or {}}
    ready = folder / script.READY
    ready.unlink(missing_ok=True)
    overdue = ready.exists if dies else overdue
    return run_ranks(PROCESSES, script.run, folder, LAYOUTS[layout][0], options, overdue, pause=0.005)


# What was trained on ----------------------------------------------------------------------------------------


def log_of(folder):
    log = folder / "samples.log"
    return log.read_text().splitlines() if log.exists() else []


def trained_on(folder):
    """The queries of every step, sorted, without the steps that a later start did again."""
    steps = {}
    for line in log_of(folder):
        first, *rest = line.split(" ", 2)
        if first == "start":
            steps = {step: names for step, names in steps.items() if step < int(rest[0])}
        elif first != "now":
            steps.setdefault(int(first), []).append(rest[1])
    return [sorted(steps[step]) for step in sorted(steps)]


def lost_and_repeated(folder, queries):
    """Over whole passes: how often a query was not trained on that should have been, and once too often."""
    seen = [name for names in trained_on(folder) for name in names]
    assert len(seen) == STEPS * GLOBAL_BATCH
    passes, lost, repeated = len(seen) // len(queries), 0, 0
    for name in queries:
        times = seen[: passes * len(queries)].count(name)
        lost, repeated = lost + max(0, passes - times), repeated + max(0, times - passes)
    return lost, repeated


def doing(folder):
    """What the training was at when it was killed, as far as it had said."""
    lines = log_of(folder)
    last = max((place for place, line in enumerate(lines) if line.startswith("start")), default=-1)
    if not lines[last + 1 :]:
        return "starting"
    return lines[-1].removeprefix("now ") if lines[-1].startswith("now") else "a step"


# What came of it --------------------------------------------------------------------------------------------


def weights(folder):
    return load_file(folder / "out" / "model" / "model.safetensors")


def same(one, other):
    """Whether two trees of tensors and numbers are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def ended_with(folder):
    """Optimiser, schedule, and what was counted, as in the last checkpoint; seconds and memory are no result."""
    state = newest(folder / "out" / "checkpoints")
    told = torch.load(state / "meta.pt" if state.is_dir() else state, weights_only=True)
    ledger = {name: value for name, value in told["callbacks"]["ComputeLedger"].items() if name in COUNTED}
    return {name: told[name] for name in ("optimizer_states", "lr_schedulers", "global_step") if name in told} | ledger


COUNTED = {"tokens", "unique_tokens", "pairs", "queries", "flops"}


@pytest.fixture(scope="module")
def undisturbed(home, tmp_path_factory):
    """Trainings that were left alone, and how long they took."""
    done = {}

    def of(layout, policy="dropping", more=()):
        if (layout, policy) not in done:
            folder, begun = tmp_path_factory.mktemp("alone"), time.monotonic()
            assert start(home, folder, layout, policy=policy, more=more)
            done[layout, policy] = folder, time.monotonic() - begun
        return done[layout, policy]

    return of


def queries_of(folder):
    return {name for names in trained_on(folder) for name in names}


def bytes_of(folder):
    log = folder / "samples.log"
    return log.stat().st_size if log.exists() else 0


def moments(folder, draw, whole_log, seconds, kills_left):
    """When to kill: while it starts, or after so much more of the log and a while, wherever that is.

    How much more leaves something to do for the kills that are left.
    """
    begun = time.monotonic()
    if draw.random() < 0.2:
        end = begun + draw.uniform(0, seconds)
        return lambda: time.monotonic() > end
    done = max(by_step(folder / "out" / "checkpoints"), default=0)
    ahead = whole_log * (STEPS - done) / STEPS
    limit = bytes_of(folder) + min(draw.uniform(0, 2.5 * ahead / (kills_left + 1)), 0.9 * ahead)
    wait, reached = draw.uniform(0, 0.5), []

    def overdue():
        if not reached and bytes_of(folder) >= limit:
            reached.append(time.monotonic() + wait)
        return bool(reached) and time.monotonic() > reached[0]

    return overdue


def report(capsys, *told):
    with capsys.disabled():
        print("\n  " + "; ".join(told), flush=True)  # noqa: T201 - what a drill is for


def require_the_same(folder, alone):
    """No sample lost or repeated, each step with its own, and the same bits in the end."""
    lost, repeated = lost_and_repeated(folder, queries_of(alone))
    equal = same(weights(folder), weights(alone)) and same(ended_with(folder), ended_with(alone))
    assert (lost, repeated, equal) == (0, 0, True)
    assert trained_on(folder) == trained_on(alone)
    return f"lost {lost}, repeated {repeated}, bitwise {'yes' if equal else 'no'}"


def test_dropout_is_on_and_every_rank_draws_its_own(undisturbed):
    (alone, _), (together, _) = undisturbed("1 rank"), undisturbed("2 DDP ranks")
    assert trained_on(alone) == trained_on(together)
    assert not same(weights(alone), weights(together))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_random_moments_a_training_ends_with_the_same_bits(layout, home, undisturbed, tmp_path, capsys):
    alone, seconds = undisturbed(layout)
    draw, killed, begun = random.Random(len(layout)), [], time.monotonic()
    while not (tmp_path / "out" / "model").exists():
        left = KILLS - len(killed)
        moment = moments(tmp_path, draw, bytes_of(alone), seconds / 3, left) if left else lambda: False
        if not start(home, tmp_path, layout, moment):
            killed.append(doing(tmp_path))
    assert len(killed) >= KILLS, "it finished before it was killed often enough to mean something"
    found = require_the_same(tmp_path, alone)
    where = ", ".join(f"{what} {killed.count(what)}" for what in sorted(set(killed)))
    began = sorted({int(line.split()[1]) for line in log_of(tmp_path) if line.startswith("start")})
    took = f"{time.monotonic() - begun:.0f} s in place of {seconds:.0f} s"
    report(
        capsys, f"{layout}: {len(killed)} kills at random moments ({where})", f"went on from steps {began}", found, took
    )
    assert len(began) > 2, "it went on from more than one checkpoint"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_while_it_saves_a_training_ends_with_the_same_bits(layout, home, undisturbed, tmp_path, capsys):
    alone, _ = undisturbed(layout)
    draw, kills, drafts = random.Random(7), 0, 0
    ranks = LAYOUTS[layout][0]
    for _ in range(KILLS):
        rank = draw.randrange(ranks) if "FSDP" in layout else 0  # of others the first one alone writes
        calls = draw.randrange(4) if rank else draw.randrange(30)
        kills += not start(home, tmp_path, layout, dies={rank: calls})
        drafts += bool(list((tmp_path / "out" / "checkpoints").glob("step-*[pe]")))  # .tmp or .gone
        assert all(durable.fault(folder) is None for folder in by_step(tmp_path / "out" / "checkpoints").values())
        if (tmp_path / "out" / "model").exists():
            break
    while not (tmp_path / "out" / "model").exists():
        start(home, tmp_path, layout)
    assert kills >= 4
    assert drafts >= 1
    found = require_the_same(tmp_path, alone)
    report(capsys, f"{layout}: {kills} kills while saving, of which {drafts} left a draft", found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_a_damaged_newest_checkpoint_a_training_ends_with_the_same_bits(
    layout, home, undisturbed, tmp_path, capsys
):
    alone, _ = undisturbed(layout)
    half = bytes_of(alone) / 2
    assert not start(home, tmp_path, layout, lambda: bytes_of(tmp_path) > half)
    checkpoints = by_step(tmp_path / "out" / "checkpoints")
    step, before = list(checkpoints)[:2]
    files = [path for path in checkpoints[step].rglob("*") if path.is_file() and path.name != durable.SEAL]
    largest = max(files, key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert start(home, tmp_path, layout)
    assert [line for line in log_of(tmp_path) if line.startswith("start")] == ["start 0", f"start {before}"]
    told = (tmp_path / "output.txt").read_text()
    assert f"{checkpoints[step].name}: passed over, damaged: " in told
    found = require_the_same(tmp_path, alone)
    report(capsys, f"{layout}: a flipped bit in the newest of {len(checkpoints)} checkpoints", found)


@pytest.mark.parametrize(
    "layouts", [("1 rank", "2 DDP ranks"), ("2 DDP ranks", "1 rank"), ("2 FSDP2 ranks", "1 FSDP2 rank")], ids=str
)
def test_on_another_number_of_ranks_every_step_has_the_same_samples_and_weights_agree(
    layouts, home, undisturbed, tmp_path, capsys, monkeypatch
):
    """Without dropout, of which every rank draws its own; four micro-batches, as the sum of two is exact."""
    monkeypatch.setitem(LAYOUTS, "1 FSDP2 rank", (1, LAYOUTS["2 FSDP2 ranks"][1]))
    (before, after), options = layouts, {"policy": "plain", "more": ("--data.global_batch", str(4 * MICRO_BATCH))}
    alone, _ = undisturbed(before, **options)
    half = bytes_of(alone) / 2
    assert not start(home, tmp_path, before, lambda: bytes_of(tmp_path) > half, **options)
    assert start(home, tmp_path, after, **options)
    assert trained_on(tmp_path) == trained_on(alone)
    one, other, first = weights(tmp_path), weights(alone), load_file(home / "plain" / "model.safetensors")
    apart = max(float((one[name] - other[name]).abs().max()) for name in one)
    moved = max(float((other[name] - first[name]).abs().max()) for name in one)
    assert apart < 0.01 * moved
    report(
        capsys,
        f"{before} to {after}: every step the same samples",
        f"weights at most {apart:.1e} apart, having moved by up to {moved:.1e}",
    )


# As the command -------------------------------------------------------------------------------------------


def command(home, folder, layout, *more):
    return [sys.executable, "-m", "mmrlhf", *words(home, folder, layout), *more]


def environment():
    """This process's, without what launchers say, and with one thread for each rank."""
    launched = {"LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"}
    known = {name: value for name, value in os.environ.items() if name not in launched}
    return known | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.mark.parametrize(
    ("layout", "number", "everybody"),
    [
        ("1 rank", signal.SIGUSR1, False),
        ("2 DDP ranks", signal.SIGTERM, False),
        ("2 DDP ranks", signal.SIGTERM, True),
        ("2 FSDP2 ranks", signal.SIGUSR1, False),
    ],
)
def test_told_to_go_the_command_saves_and_asks_to_be_started_again(
    layout, number, everybody, home, undisturbed, tmp_path, capsys
):
    """One process is told, or all of them are, also those that load batches, and die of it."""
    alone, _ = undisturbed(layout)
    place = {"cwd": Path(__file__).parents[2], "env": environment()}
    with (tmp_path / "output.txt").open("w") as output:
        words = command(home, tmp_path, layout, "--data.workers", "1")
        process = subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True, **place)
    limit = bytes_of(alone) / 3
    while process.poll() is None and bytes_of(tmp_path) < limit:
        time.sleep(0.005)
    (os.killpg if everybody else os.kill)(process.pid, number)
    told = time.monotonic()
    assert process.wait(120) == 75, (tmp_path / "output.txt").read_text()[-3000:]
    took = time.monotonic() - told
    (saved, *_) = by_step(tmp_path / "out" / "checkpoints")
    done = max(int(line.split()[0]) for line in log_of(tmp_path) if line[0].isdigit()) + 1
    assert everybody or saved == done, "the step that was under way is saved, and none was begun after it"
    assert subprocess.run(words, capture_output=True, check=False, **place).returncode == 0
    who = "every process" if everybody else "one process"
    found = require_the_same(tmp_path, alone)
    report(capsys, f"{layout}: {number.name} to {who}, status 75 after {took:.1f} s, {done - saved} steps lost", found)


@pytest.fixture
def small_disk(tmp_path):
    """A disk whose size can be said, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "none", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_when_the_disk_is_full_the_command_says_so_and_goes_on_once_there_is_room(
    layout, home, undisturbed, small_disk, capsys
):
    alone, _ = undisturbed(layout)
    size = sum(path.stat().st_size for path in next(iter(by_step(alone / "out" / "checkpoints").values())).rglob("*"))
    resize = ["mount", "-o", f"remount,size={int(2.5 * size)}", str(small_disk)]
    subprocess.run(resize, check=True)
    place = {"cwd": Path(__file__).parents[2], "env": environment()}
    full = subprocess.run(command(home, small_disk, layout), capture_output=True, text=True, check=False, **place)
    assert full.returncode in {2, -signal.SIGKILL}  # by the launcher, if it saw another rank's status first
    assert "the checkpoint of step 6 could not be written" in full.stderr
    assert "FSDP" in layout or "No space left on device" in full.stderr
    left = by_step(small_disk / "out" / "checkpoints")
    assert list(left) == [4, 2]
    assert all(durable.fault(folder) is None for folder in left.values())
    subprocess.run([*resize[:2], f"remount,size={10 * size}", str(small_disk)], check=True)
    assert subprocess.run(command(home, small_disk, layout), capture_output=True, check=False, **place).returncode == 0
    found = require_the_same(small_disk, alone)
    report(capsys, f"{layout}: disk full at step 6, status {full.returncode}, gone on from step 4", found)
