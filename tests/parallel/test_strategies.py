"""The same training on one process, on ranks with copies, and on ranks with shards: the same losses and weights."""

from __future__ import annotations

import functools
import json
import multiprocessing
import time

import pytest
import torch

from mmrlhf.modules.loading import load_backbone
from mmrlhf.modules.saving import save_folder
from mmrlhf.modules.towers import Tower

from ..datamodules.ranks import run_ranks
from ..modules.families import BUILD, built, saved
from ..modules.test_features import store
from . import training

LIMIT = 240  # seconds, after which ranks are taken to wait for each other for ever
NAME = "llava_onevision"
DPO = {"kind": "dpo", "tower": True, "again": True}
REWARD = {"kind": "reward", "lora": True, "again": True}
slow = pytest.mark.slow
# Not forks of this process: after a backward pass with threads of its own, torch refuses another in a fork.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.parallel.training"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("strategies")


@functools.cache
def checkpoint(folder, family):
    return str(saved(family, folder / family))


def on_ranks(task, folder, ranks, **options):
    """Run a task on so many processes, which must end."""
    begun = time.monotonic()
    ended = run_ranks(PROCESSES, task, folder, ranks, options, lambda: time.monotonic() - begun > LIMIT, pause=0.05)
    assert ended, (folder / "output.txt").read_text()[-3000:]


@functools.cache
def _trained(folder, family, strategy, ranks, options):
    place = folder / f"run-{len(list(folder.glob('run-*')))}"
    machine = {"strategy": strategy, "ranks": ranks}
    options = json.loads(options)
    if "offload" in options:
        machine["offload"] = options.pop("offload")
    on_ranks(
        training.train, place, ranks, checkpoint=checkpoint(folder, family), family=family, machine=machine, **options
    )
    return json.loads((place / "notes.json").read_text()), torch.load(place / "weights.pt", weights_only=True)


def trained(folder, family, strategy, ranks, **options):
    """What the first rank wrote down, and the weights; made once."""
    return _trained(folder, family, strategy, ranks, json.dumps(options))


@functools.cache
def untrained(folder, family, options):
    module = training.module_of(checkpoint(folder, family), **json.loads(options))
    module.configure_model()
    return {name: weight.detach() for name, weight in module.whole().named_parameters() if weight.requires_grad}


def apart(one, other, start):
    """How far two trainings ended from each other, over how far the second has moved."""
    assert one.keys() == other.keys() == start.keys()
    squares = [
        ((one[name] - other[name]).double().square().sum(), (other[name] - start[name]).double().square().sum())
        for name in one
    ]
    return float((sum(each for each, _ in squares) / sum(each for _, each in squares)).sqrt())


def compared(folder, family, strategy, ranks, alone=None, **options):
    """The training on ranks against that of one process: losses of the last step, and how far weights are apart."""
    one = trained(folder, family, "one", 1, **options if alone is None else alone)
    several = trained(folder, family, strategy, ranks, **options)
    assert several[0]["world"] == ranks
    machine = {"offload", "precision", "accumulated"}
    start = untrained(folder, family, json.dumps({key: options[key] for key in options if key not in machine}))
    return one[0], several[0], apart(several[1], one[1], start)


FAST = [(DPO, "ddp", 2), (DPO, "sharded", 2), (REWARD, "sharded", 2)]
LONG = [
    (REWARD, "ddp", 2),
    (DPO, "ddp", 4),
    (DPO, "sharded", 4),
    (DPO, "sharded:2", 4),
    (DPO, "sharded:2", 2),
    (REWARD, "sharded", 4),
    (REWARD, "sharded:2", 4),
    ({"kind": "dpo"}, "sharded", 2),
    ({"kind": "dpo", "lora": True}, "sharded", 2),
    ({"kind": "reward"}, "ddp", 4),
    ({"kind": "reward"}, "sharded", 4),
    ({"kind": "reward", "tower": True}, "sharded", 2),
    ({"kind": "dpo", "step": "separate"}, "sharded", 2),
    ({"kind": "dpo", "offload": True}, "sharded", 2),
]


# Rounding: how many queries are summed in one process, and in which order gradients are added. AdamW makes more of it
# where a gradient is nothing but rounding (a bias of keys changes no attention), hence 1e-3 of the way for weights.
@pytest.mark.parametrize(("options", "strategy", "ranks"), [*FAST, *[pytest.param(*case, marks=slow) for case in LONG]])
def test_ranks_train_as_one_process_does(folder, options, strategy, ranks):
    alone = {key: value for key, value in options.items() if key != "offload"}
    one, several, distance = compared(folder, NAME, strategy, ranks, alone, **options)
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert distance < 1e-3
    within, after = several["validated"][: training.STEPS], several["validated"][training.STEPS :]
    assert within == after
    if (ranks, strategy) != (2, "ddp"):
        copied = trained(folder, NAME, "ddp", ranks, **alone)[0] if ranks == 2 else several
        assert within == pytest.approx(copied["validated"][: training.STEPS], rel=1e-4)
    share = 1 if strategy == "ddp" else int(strategy.partition(":")[2] or 1) / ranks
    assert several["held"] == pytest.approx(share * one["held"], rel=0.1)


def test_the_measure_tells_trainings_apart(folder):
    one = trained(folder, NAME, "one", 1, **DPO)
    other = trained(folder, NAME, "one", 1, **DPO, sft_weight=0.2)
    assert other[0]["losses"] != pytest.approx(one[0]["losses"], rel=1e-5)
    assert apart(other[1], one[1], untrained(folder, NAME, json.dumps(DPO))) > 1e-2


@slow
@pytest.mark.parametrize("family", [family for family in BUILD if family != NAME])
def test_every_family_can_be_sharded(folder, family):
    one, several, distance = compared(folder, family, "sharded", 2, kind="dpo", tower=True)
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert distance < 1e-3


@slow
@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize("strategy", ["ddp", "sharded", "sharded:2"])
def test_micro_batches_can_be_accumulated_on_ranks(folder, strategy, tower):
    alone = {"kind": "dpo", "tower": tower}
    one, several, distance = compared(folder, NAME, strategy, 2, alone=alone, **alone, accumulated=2)
    pairs = zip(several["losses"][::2], several["losses"][1::2], strict=True)
    assert [sum(pair) for pair in pairs] == pytest.approx(one["losses"], rel=1e-5)
    assert distance < 1e-3


@slow
def test_groups_of_ranks_sum_their_gradients_once_a_step(folder):
    one, two = (trained(folder, NAME, "sharded:2", 2, kind="dpo", accumulated=each)[0]["summed"] for each in (1, 2))
    assert one == two > training.STEPS


@slow
@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_mixed_precision_rounds_shards_as_much_as_copies(folder, kind):
    fine = trained(folder, NAME, "one", 1, kind=kind)
    start = untrained(folder, NAME, json.dumps({"kind": kind}))
    coarse = {name: trained(folder, NAME, name, 2, kind=kind, precision="bf16-mixed") for name in ("ddp", "sharded")}
    away = {name: apart(run[1], fine[1], start) for name, run in coarse.items()}
    assert coarse["sharded"][0]["losses"] == pytest.approx(fine[0]["losses"], rel=1e-2)
    assert 1e-4 < away["sharded"] < 4 * away["ddp"], away
    assert all(weight.dtype == torch.float32 for weight in coarse["sharded"][1].values())


@slow
def test_adapters_on_coarse_weights_are_sharded_as_they_are_copied(folder):
    options = {"kind": "dpo", "lora": True, "dtype": "bfloat16", "precision": "bf16-mixed"}
    copied, parted = (trained(folder, NAME, name, 2, **options) for name in ("ddp", "sharded"))
    start = untrained(folder, NAME, json.dumps({"kind": "dpo", "lora": True, "dtype": "bfloat16"}))
    assert parted[0]["losses"] == pytest.approx(copied[0]["losses"], rel=1e-5)
    assert apart(parted[1], copied[1], start) < 1e-3


@slow
@pytest.mark.parametrize("family", [NAME, "qwen2_5_vl"])  # the projector of the second is inside of its tower
def test_what_the_tower_said_is_read_from_disk_on_ranks(folder, family):
    tower = Tower(load_backbone(checkpoint(folder, family)))
    names = [name for names in training.NAMES for name in names]
    place = store(folder / f"features-{family}", tower, training.batch(family, "dpo", names).rows.features)
    one = trained(folder, family, "one", 1, kind="dpo")
    read = trained(folder, family, "sharded", 2, kind="dpo", features=str(place))
    assert read[0]["losses"] == pytest.approx(one[0]["losses"], rel=1e-5)
    assert apart(read[1], one[1], untrained(folder, family, json.dumps({"kind": "dpo"}))) < 1e-3


@pytest.mark.parametrize("family", [NAME, pytest.param("qwen2_5_vl", marks=slow)])
def test_shards_are_loaded_and_saved_to_the_bit(folder, family):
    place, source = folder / f"saving-{family}", checkpoint(folder, family)
    machine = {"strategy": "sharded", "ranks": 2}
    on_ranks(training.save, place, 2, checkpoint=source, family=family, machine=machine, kind="dpo", tower=True)
    save_folder(load_backbone(source), built(family)[1], place / "alone", "# A card")
    one, other = ({path.name: path.read_bytes() for path in (place / name).iterdir()} for name in ("alone", "saved"))
    assert one == other
