"""The ledger counts what every rank did, once, also through resumes; and logs happen when Lightning logs."""

from __future__ import annotations

import json
import logging
import multiprocessing
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy

from mmrlhf.callbacks import compute
from mmrlhf.callbacks.beta_monitor import BetaMonitor
from mmrlhf.callbacks.compute import ComputeLedger, Cost, LogInterval, gathered, peak_memory
from mmrlhf.callbacks.margin_check import MarginCheck
from mmrlhf.callbacks.throughput import Throughput
from mmrlhf.reports import PairReport, Work

from ..datamodules.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers, loggers and the like

BETA0, W, K = 0.1, 0.5, 0.7


@dataclass(frozen=True)
class Beta:
    """The paper's rule, for tests."""

    beta0: float = BETA0
    w: float = W
    needs_margin: bool = True


def report_of(number, pairs=5):
    """Hand-made pairs that follow from a number alone."""
    draw = np.random.default_rng(number)
    margin = torch.tensor(draw.normal(0.8, 1.5, pairs)).float()
    logps = [torch.tensor(draw.normal(-30, 9, pairs)).float() for _ in range(4)]
    chosen, rejected, of_chosen, of_rejected = logps
    gap = (chosen - of_chosen) - (rejected - of_rejected)
    beta = BETA0 * (1 + W * (1 - torch.exp(-K * margin.clamp(min=0))))
    categories = tuple(draw.choice(["VQA", "Safety"], pairs))
    rank_gap = torch.tensor(draw.integers(1, 3, pairs))
    cap = BETA0 * (1 + W)
    return PairReport(margin, beta, gap, *logps, torch.zeros(pairs), rank_gap, categories, BETA0, cap)


def work_of(number):
    return Work(queries=1 + number % 2, pairs=5, tokens=100 + number, unique_tokens=90 + number, flops=1e9 * number)


class Toy(LightningModule):
    """Learns one number; tells of each batch what follows from the batch's number and the rank."""

    def __init__(self, reports=report_of):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.beta = Beta()
        self.reports = reports

    def pull(self, margin):
        """Follow the margin."""
        return self.beta.beta0 * (1 + self.beta.w * (1 - torch.exp(-K * margin.clamp(min=0)))) / 2

    def training_step(self, batch, batch_idx):
        """Tell."""
        number = batch + 1000 * self.global_rank
        return {"loss": self.net(torch.ones(1)).sum(), "pairs": self.reports(number), "work": work_of(number)}

    def validation_step(self, batch, batch_idx):
        """Tell of other pairs."""
        return {"pairs": self.reports(batch + 500 + 1000 * self.global_rank), "work": work_of(batch)}

    def configure_optimizers(self):
        """Descend."""
        return torch.optim.SGD(self.parameters(), 0.1)


class Kept(Logger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.logged = []

    name, version = "kept", 0

    def log_hyperparams(self, *_, **__):
        """Keep nothing."""

    def log_metrics(self, metrics, step=None):
        """Keep."""
        self.logged.append((step, dict(metrics)))

    def with_name(self, name):
        """Return what was logged under a name, by step."""
        return {step: metrics[name] for step, metrics in self.logged if name in metrics}


class Save(Callback):
    """Saves after these micro-batches."""

    def __init__(self, path, *batches):
        self.path, self.batches = path, batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Save."""
        if batch_idx + 1 in self.batches:
            trainer.save_checkpoint(self.path)


def batches(count):
    return torch.utils.data.DataLoader(range(count), batch_size=None)


def fit(model, *callbacks, count=12, val=0, resume=None, kept=None, **options):
    """One epoch of `count` micro-batches."""
    settings = {"max_epochs": 1, "log_every_n_steps": 4, "num_sanity_val_steps": 0, "accelerator": "cpu"} | options
    trainer = Trainer(
        logger=kept or False,
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **settings,
    )
    val_batches = batches(val) if val else None
    trainer.fit(model, batches(count), val_batches, ckpt_path=resume, weights_only=True)
    return trainer


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self, monkeypatch, module):
        self.now = 100.0
        monkeypatch.setattr(module, "perf_counter", lambda: self.now)


class Takes(Callback):
    """Lets every micro-batch and every validation take some seconds of a clock."""

    def __init__(self, clock, step=2.0, validation=0.0):
        self.clock, self.step, self.validation = clock, step, validation

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Pass."""
        self.clock.now += self.step

    def on_validation_batch_start(self, *_):
        """Pass."""
        self.clock.now += self.validation


def expected_cost(numbers):
    works = [work_of(number) for number in numbers]
    return {name: sum(getattr(work, name) for work in works) for name in Work._fields}


def without_clock(cost):
    return {name: getattr(cost, name) for name in Work._fields}


# The ledger -------------------------------------------------------------------------------------------------


def test_the_ledger_is_the_sum_of_all_work_and_of_the_time_between(monkeypatch):
    clock, ledger, kept = Clock(monkeypatch, compute), ComputeLedger(), Kept()
    fit(Toy(), ledger, Takes(clock, 2.0, validation=5.0), kept=kept, val=3)
    assert without_clock(ledger.totals()) == expected_cost(range(12))
    assert ledger.totals().device_seconds == 12 * 2.0 + 3 * 5.0
    assert kept.with_name("ledger/tokens") == {
        3: sum(range(100, 104)),
        7: sum(range(100, 108)),
        11: sum(range(100, 112)),
    }
    assert kept.with_name("ledger/device_seconds")[3] == 8.0


@pytest.mark.parametrize("same_callback", [False, True])
@pytest.mark.parametrize("saved", [5, 8])
def test_a_resume_counts_every_micro_batch_once(saved, same_callback, monkeypatch, tmp_path):
    """The eighth step is one at which Lightning logs, the fifth is none."""
    clock, ledger = Clock(monkeypatch, compute), ComputeLedger()
    fit(Toy(), ledger, Takes(clock), Save(tmp_path / "x.ckpt", saved), max_steps=saved + 1)
    clock.now += 1e6  # between the two nothing is computed
    resumed = ledger if same_callback else ComputeLedger()
    # A plain loader begins again: it hands out what it had handed out.
    fit(Toy(), resumed, Takes(clock), resume=tmp_path / "x.ckpt")
    assert (
        resumed.totals().queries == expected_cost(range(saved))["queries"] + expected_cost(range(12 - saved))["queries"]
    )
    assert resumed.totals().pairs == 60
    assert resumed.totals().device_seconds == 24.0


def test_a_training_that_fails_is_counted_up_to_its_end(monkeypatch):
    class Fails(Toy):
        def training_step(self, batch, batch_idx):
            if batch == 6:
                raise RuntimeError("planted")
            return super().training_step(batch, batch_idx)

    clock, ledger = Clock(monkeypatch, compute), ComputeLedger()
    with pytest.raises(RuntimeError, match="planted"):
        fit(Fails(), ledger, Takes(clock))
    clock.now += 1e6
    assert Cost(**ledger.state_dict()).device_seconds == 14.0
    assert ledger.totals().pairs == 30


def test_an_interrupted_rank_asks_no_other(monkeypatch, caplog):
    ledger = ComputeLedger()
    ledger._own = Cost(tokens=3)
    monkeypatch.setattr(compute.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(compute.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(compute.dist, "all_gather_object", lambda *_: pytest.fail("the others were asked"))
    ledger.on_exception(None, None, RuntimeError())
    with caplog.at_level(logging.WARNING):
        assert ledger.state_dict()["tokens"] == 3
    assert "what other ranks did since the last log interval is not counted" in caplog.text


def test_the_peak_of_memory_is_that_of_this_process():
    held = np.ones(60_000_000 // 8)  # 60 MB, all written
    peak = peak_memory(torch.device("cpu"))
    assert peak > held.nbytes
    lines = Path("/proc/self/status").read_text().splitlines()
    told = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    assert abs(peak - told) < 30e6


# When it is logged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("every", [0, 1, 2, 5])
def test_intervals_end_once_where_lightning_logs(every, accumulation):
    class Watches(Callback):
        def __init__(self):
            self.interval, self.ended = LogInterval(), []

        def on_train_start(self, trainer, pl_module):
            self.interval.start(trainer)

        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.log("seen", 1.0)
            if self.interval.due(trainer):
                self.ended.append(trainer.global_step - 1)

    watches, kept = Watches(), Kept()
    fit(Toy(), watches, kept=kept, log_every_n_steps=every, accumulate_grad_batches=accumulation)
    assert watches.ended == list(kept.with_name("seen"))
    assert len(watches.ended) == (12 // accumulation // every if every else 0)


# Ranks ------------------------------------------------------------------------------------------------------


class Uneven(Toy):
    """The second rank has no pair in any validation."""

    def validation_step(self, batch, batch_idx):
        """Tell of nothing on the second rank."""
        found = super().validation_step(batch, batch_idx)
        return found if self.global_rank == 0 else found | {"pairs": report_of(0, pairs=0)}


def train_on_ranks(folder, ranks):
    """Train with all that sums over ranks, and write down what each rank knows at the end."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ledger, kept = ComputeLedger(), Kept()
    watchers = (ledger, BetaMonitor(folder / "figures"), Throughput(warmup=1), MarginCheck())
    trainer = fit(
        Uneven(),
        *watchers,
        Save(folder / "ranks.ckpt", 5),
        kept=kept,
        val=2,
        count=6,
        devices=ranks,
        strategy=DDPStrategy(process_group_backend="gloo"),
    )
    monitored = {name: value.item() for name, value in trainer.callback_metrics.items()}
    told = {
        "ledger": ledger.totals()._asdict(),
        "logged": kept.logged,
        "monitored": monitored,
        "all": gathered(trainer.global_rank),
    }
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    assert run_ranks(
        multiprocessing.get_context("fork"), train_on_ranks, folder, 2, {"ranks": 2}, lambda: False, pause=0.1
    )
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_both_ranks_know_the_cost_of_both(two_ranks):
    folder, (first, second) = two_ranks
    assert first["all"] == second["all"] == [0, 1]
    numbers = [*range(6), *range(1000, 1006)]
    assert without_clock(Cost(**first["ledger"])) == expected_cost(numbers)
    assert first["ledger"] == second["ledger"]
    saved = torch.load(folder / "ranks.ckpt", weights_only=True)["callbacks"]["ComputeLedger"]
    assert without_clock(Cost(**saved)) == expected_cost([*range(5), *range(1000, 1005)])


def test_metrics_of_pairs_are_those_of_both_ranks(two_ranks):
    folder, (first, second) = two_ranks
    logged = {step: metrics for step, metrics in first["logged"] if "train/pairs" in metrics}
    margins = torch.cat([report_of(number).margin for number in (*range(4), *range(1000, 1004))]).double()
    assert logged[3]["train/delta/mean"] == pytest.approx(margins.mean().item(), rel=1e-6)
    assert logged[3]["train/delta/std"] == pytest.approx(margins.std(correction=0).item(), rel=1e-6)
    assert [logged[step]["train/pairs"] for step in (3, 5)] == [40, 20]
    assert not any("train/pairs" in metrics for _, metrics in second["logged"])
    validated = torch.cat([report_of(number).margin for number in (500, 501)])
    for told in (first, second):
        assert told["monitored"]["val/delta/mean"] == pytest.approx(validated.mean().item(), rel=1e-5)
        assert told["monitored"]["val/pairs"] == 10
    assert sorted(path.name for path in (folder / "figures").iterdir()) == ["beta-00000006.png", "margins.csv"]


def test_rates_are_those_of_both_ranks(two_ranks):
    _, (first, _) = two_ranks
    rates = [metrics for _, metrics in first["logged"] if "throughput/tokens_per_second" in metrics]
    # After one step of warm-up, steps 1 to 3 on both ranks.
    tokens = sum(work_of(number).tokens for number in (1, 2, 3, 1001, 1002, 1003))
    ratio = rates[0]["throughput/tokens_per_second"] / rates[0]["throughput/pairs_per_second"]
    assert ratio == pytest.approx(tokens / 30)
