"""Rates are what was done over the time it took: without the warm-up, validations, and other intervals."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback

from mmrlhf.callbacks import throughput
from mmrlhf.callbacks.throughput import PEAK_FLOPS, Throughput, peak_flops

from .test_compute import Clock, Kept, Takes, Toy, batches, fit, work_of

pytestmark = pytest.mark.filterwarnings("ignore")


def tokens(numbers):
    return sum(work_of(number).tokens for number in numbers)


def rates(monkeypatch, *callbacks, warmup=2, step=2.0, model=None, **options):
    clock, kept = Clock(monkeypatch, throughput), Kept()
    fit(model or Toy(), Takes(clock, step, validation=50.0), Throughput(warmup), *callbacks, kept=kept, **options)
    return kept


@pytest.mark.parametrize("val", [0, 3])
def test_each_interval_has_its_own_rates_without_warm_up_and_validation(val, monkeypatch):
    kept = rates(monkeypatch, val=val, count=10, val_check_interval=5 if val else None)
    assert kept.with_name("throughput/tokens_per_second") == {
        3: tokens([2, 3]) / 4.0,
        7: tokens([4, 5, 6, 7]) / 8.0,
        9: tokens([8, 9]) / 4.0,
    }
    assert kept.with_name("throughput/pairs_per_second") == dict.fromkeys((3, 7, 9), 2.5)
    assert kept.with_name("throughput/queries_per_second") == dict.fromkeys((3, 7, 9), 0.75)


def test_steps_are_counted_for_the_warm_up_not_micro_batches(monkeypatch):
    kept = rates(monkeypatch, count=12, accumulate_grad_batches=3)
    assert kept.with_name("throughput/tokens_per_second") == {3: tokens(range(6, 12)) / 12.0}


def test_without_warm_up_the_first_step_counts(monkeypatch):
    assert rates(monkeypatch, warmup=0, count=4).with_name("throughput/tokens_per_second") == {3: tokens(range(4)) / 8}


def test_a_training_within_its_warm_up_has_no_rates(monkeypatch):
    assert rates(monkeypatch, warmup=9, count=6).with_name("throughput/tokens_per_second") == {}


def test_no_share_of_waiting_is_made_up_and_no_mfu_without_a_known_device(monkeypatch):
    kept = rates(monkeypatch)
    names = {name for _, metrics in kept.logged for name in metrics if name.startswith("throughput/")}
    assert names == {f"throughput/{what}_per_second" for what in ("queries", "pairs", "tokens")}


def test_the_share_of_waiting_is_that_of_the_interval(monkeypatch):
    loader = batches(8)
    loader.waited_seconds = 7.0

    class Waits(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            loader.waited_seconds += 0.5 if batch_idx < 4 else 1.5

    class Loaded(Toy):
        def train_dataloader(self):
            return loader

    clock, kept = Clock(monkeypatch, throughput), Kept()
    monkeypatch.setattr("tests.callbacks.test_compute.batches", lambda count: None)
    fit(Loaded(), Waits(), Takes(clock), Throughput(2), kept=kept)
    assert kept.with_name("throughput/data_wait_share") == {3: 0.25, 7: 0.75}


def test_mfu_is_the_share_of_the_peak_of_all_devices(monkeypatch):
    waited_for = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited_for.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(Toy, "device", torch.device("cuda", 0))
    kept = Kept()
    clock = Clock(monkeypatch, throughput)
    watch, trainer = Throughput(0), type("Trainer", (), {})()
    trainer.global_step, trainer.log_every_n_steps, trainer.train_dataloader = 0, 1, None
    trainer.loggers, trainer.is_global_zero = [kept], True
    watch.on_train_start(trainer, Toy())
    clock.now += 2.0
    trainer.global_step = 1
    watch.on_train_batch_end(trainer, Toy(), {"work": work_of(3)._replace(flops=156e12)}, None, 0)
    assert kept.with_name("throughput/mfu") == {0: pytest.approx(0.25)}
    assert waited_for


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_those_of_the_device_and_of_no_other(name, peak):
    assert peak_flops(name) == peak


def test_no_name_in_the_table_hides_a_longer_one():
    names = list(PEAK_FLOPS)
    assert [peak_flops(name) for name in names] == list(PEAK_FLOPS.values())
    assert all(math.isfinite(peak) for peak in PEAK_FLOPS.values())


def test_a_warm_up_below_none_is_refused():
    with pytest.raises(ValueError, match="warmup: expected 0 or more"):
        Throughput(-1)
