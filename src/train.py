"""The door of the trainers: a config becomes a module, its data and its callbacks, and then a trained checkpoint.

`trainer`, `model` and `data` in a config are the keyword arguments of Lightning's Trainer, of the module and of the
data module; `run` says where everything goes. Killed and started again, the same command continues.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from .callbacks.beta_monitor import BetaMonitor
from .callbacks.beta_schedule import BetaSchedule
from .callbacks.compute import ComputeLedger
from .callbacks.layouts import layout_of, memory_of, require_device
from .callbacks.margin_check import MarginCheck
from .callbacks.reward_monitor import RewardMonitor
from .callbacks.running import fitted, planned, watched
from .datamodules.compared import pair_margins
from .datamodules.folds import digest_of, folds_of
from .datamodules.module import RankedDataModule
from .datamodules.rows import Critiques
from .fingerprint import of_value
from .folds import NAME as FOLD
from .folds import Fold, Trained
from .modules.cards import ALIGNED, JUDGES, of_judge, of_policy, training_card
from .modules.critic import CritiqueRewardModule
from .modules.forecast import Steps, forecast
from .modules.mmdpo import MMDPOModule, Plan
from .modules.pace import MACHINES
from .modules.rewardmodel import ASKED, Judging, save_reward_model
from .modules.rewardplan import reward_plan
from .modules.saving import save_folder
from .parallel import is_rank_zero
from .provenance import model_digest
from .ranks import micro_batches
from .runs import CHECKPOINTS, FIGURES, MODEL, Run, TrainCLI, each_fold, identity, once
from .settings import write_json

if TYPE_CHECKING:
    import lightning
    from lightning.pytorch import Callback
    from lightning.pytorch.cli import LightningArgumentParser

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AlignRun(Run):
    """Where a training of a policy goes, and how it is kept.

    Args:
        any_reference: Accept log-probs of another reference than the checkpoint that is trained.
    """

    experiment: str = "mm-dpo"
    any_reference: bool = False


class AlignCLI(TrainCLI):
    """A policy and the ranked queries that it is aligned with."""

    verb, run_class = "train-dpo", AlignRun

    def __init__(self, argv: Sequence[str]) -> None:
        super().__init__(MMDPOModule, RankedDataModule, argv, str(__doc__))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Beta0 may follow a schedule."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(BetaSchedule, "beta_schedule")


@dataclass(frozen=True)
class RewardRun(Run):
    """Where a training of a reward model goes, and how it is kept.

    Args:
        folds: Train so many models instead, each without another part of the queries, into OUT/fold-I; then
            `mmrlhf score --folds` asks about each query one that never saw it.
    """

    experiment: str = "reward-model"
    folds: int | None = None


class RewardCLI(TrainCLI):
    """A reward model and the ranked queries that it learns to judge."""

    verb, run_class = "train-reward", RewardRun

    def __init__(self, argv: Sequence[str]) -> None:
        super().__init__(CritiqueRewardModule, RankedDataModule, argv, str(__doc__))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The task of the data is the module's."""
        super().add_arguments_to_parser(parser)
        parser.link_arguments("model.task", "data.task", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Refuse scores, of which nothing would be read, and folds within a fold."""
        if self.config["run"]["folds"] is not None and self.config["data"]["fold"]:
            raise ValueError("run.folds: expected it or data.fold, got both; leave out data.fold to train every fold")
        if self.config["data"]["scores"]:
            raise ValueError(
                "data.scores: expected none, since a reward model learns from rankings and critiques alone, got "
                f"{self.config['data']['scores']}; leave it out"
            )


def train_dpo(argv: Sequence[str]) -> None:
    """Align a policy with ranked responses: MM-DPO, with a beta that follows the margin of each pair.

    Every value of `configs/dpo/*.yaml` is an option: `mmrlhf train-dpo --config configs/dpo/world.yaml
    --model.beta.w 0.25 --run.out runs/w025`.
    """
    cli = AlignCLI(_spelt(argv))
    run: AlignRun = cli.config_init["run"]
    if run.dry_run:
        _foretell(cli, run)
        return
    require_device(cli.config_init["trainer"])
    once(cli, run, lambda: _digest(cli), lambda: _align(cli))


def train_reward(argv: Sequence[str]) -> None:
    """Train a reward model on ranked responses: it writes a critique of each, and scores it where the critique ends.

    Every value of `configs/reward/*.yaml` is an option: `mmrlhf train-reward --config configs/reward/world.yaml
    --data.critique reason --run.out runs/human`. With `--folds 5` five models are trained one after another, each
    without another fifth of the queries.
    """
    argv = _spelt(argv)
    cli = RewardCLI(argv)
    run: RewardRun = cli.config_init["run"]
    if run.dry_run:
        first = {} if run.folds is None else {"data.fold.of": run.folds, "data.fold.out": 0, "run.folds": "null"}
        cli = RewardCLI([*argv, *(f"--{name}={value}" for name, value in first.items())]) if first else cli
        reward_plan(1, cli.model, cli.datamodule, _encoder(cli.datamodule).source)
        _foretell(cli, run, f", the first of {run.folds} trainings" if first else "")
        return
    require_device(cli.config_init["trainer"])
    if run.folds is not None:
        each_fold(cli.verb, argv, run, run.folds)
        return
    once(cli, run, lambda: _digest(cli), lambda: _judge(cli))
    if cli.datamodule.fold is not None and is_rank_zero():
        _tell_fold(cli, run.out, cli.datamodule.fold)


def _spelt(argv: Sequence[str]) -> list[str]:
    """The command line with its short words as they are in a config."""
    dry = ("--dry-run", "--dry_run")
    parted = [("--dry-run=true" if word in dry else word).partition("=") for word in argv]
    names = dict.fromkeys(dry, "--run.dry_run") | {"--folds": "--run.folds"}
    return [f"{names.get(name, name)}{equals}{value}" for name, equals, value in parted]


def _foretell(cli: TrainCLI, run: Run, which: str = "") -> None:
    """Tell what the training would need, and refuse what cannot work; no weight is read, no run begun."""
    options: dict[str, Any] = dict(cli.config_init["trainer"])
    layout, data = layout_of(options), cli.datamodule
    micro_batches(data.global_batch, data.micro_batch, layout.ranks)
    here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False, "plugins": None}
    trainer = watched(options | here, run, cli.settings, ComputeLedger(), [], run.out / CHECKPOINTS)
    tokens = data.rows("train").admission.costs(range(len(data.rows("train"))))
    steps = Steps(data.global_batch, data.micro_batch, planned(trainer, data, layout.ranks))
    told = forecast(cli.model, layout, steps, tokens, data.batch, run.gpu)
    table = Table("", f"{cli.verb}, {len(tokens):,} queries{which}", box=box.SIMPLE_HEAD)
    for row in told.rows():
        table.add_row(*row)
    Console().print(table)
    known = MACHINES[run.gpu].memory if run.gpu and run.device_memory is None else None
    memory = known or memory_of(options, run.device_memory)
    if run.gpu and told.seconds is None:
        log.info("how long it takes is known for packed rows with weights on the GPU alone")
    if memory is None:
        log.info("whether that fits is not known here; say --run.gpu H100, or --run.device_memory 80")
    else:
        told.found.require_fits(memory)


def _tell_fold(cli: RewardCLI, out: Path, fold: Fold) -> None:
    """Write what the trained model never saw, once."""
    if (out / FOLD).exists():
        return
    shards, told = cli.datamodule.rows("train").shards, identity(cli.settings)
    told["data"].pop("fold")
    folds, model = digest_of(folds_of(shards, fold.of)), model_digest(out / MODEL)
    Trained(fold, shards.digest, folds, of_value(told), model).write(out)


def _digest(cli: TrainCLI) -> str:
    """What stands for the data."""
    digest: str = cli.datamodule.rows("train").admission.digest
    return digest


def _trainer(cli: TrainCLI, ledger: ComputeLedger, particular: Sequence[Callback]) -> lightning.Trainer:
    run: Run = cli.config_init["run"]
    return watched(cli.config_init["trainer"], run, cli.settings, ledger, particular, run.out / CHECKPOINTS)


def _align(cli: AlignCLI) -> None:
    """Fit a policy, and save it as a folder."""
    run: AlignRun = cli.config_init["run"]
    module, data, ledger = cli.model, cli.datamodule, ComputeLedger()
    schedule: BetaSchedule = cli.config_init["beta_schedule"]
    trainer = _trainer(cli, ledger, [MarginCheck(), schedule, BetaMonitor(run.out / FIGURES)])
    steps = planned(trainer, data)
    if not run.any_reference:
        _require_reference(data, module, str(trainer.precision))
    known = tuple(pair_margins(data.rows("train"), module.margin)) if module.beta.needs_known else ()
    module.expect(Plan(steps, data.mean_pairs, known))
    schedule.total = schedule.total or steps
    fitted(trainer, module, data, run.out / CHECKPOINTS, steps)
    whole = module.whole()  # all ranks take part
    if trainer.is_global_zero and whole is not None:
        card = _card(cli, trainer, ledger, ALIGNED, {}, of_policy(module, cli.settings))
        save_folder(whole.backbone, data.processor, run.out / MODEL, card)
        log.info("%s: trained for %d steps", run.out / MODEL, trainer.global_step)


def _judge(cli: RewardCLI) -> None:
    """Fit a reward model, and save it with its head and with what it is asked."""
    run: Run = cli.config_init["run"]
    module, data, ledger = cli.model, cli.datamodule, ComputeLedger()
    trainer = _trainer(cli, ledger, [RewardMonitor(run.out / FIGURES)])
    steps = planned(trainer, data)
    encode = _encoder(data)
    module.expect(reward_plan(steps, module, data, encode.source))
    judging = Judging(encode.template, encode.frames, module.dimensions)
    if trainer.is_global_zero:
        write_json(run.out / ASKED, judging.as_dict())  # whoever exports a checkpoint has no data
    fitted(trainer, module, data, run.out / CHECKPOINTS, steps)
    whole = module.whole()  # all ranks take part
    if trainer.is_global_zero and whole is not None:
        asked = {
            "ties per query": data.mean_ties,
            "critiques per query": data.mean_critiques,
            "critiques": encode.source,
        }
        card = _card(cli, trainer, ledger, JUDGES, asked, of_judge(module, judging))
        save_reward_model(whole, data.processor, judging, run.out / MODEL, card)
        log.info("%s: trained for %d steps", run.out / MODEL, trainer.global_step)


def _encoder(data: RankedDataModule) -> Critiques:
    """How the samples are made a request to judge."""
    encode = data.rows("train").encode
    assert isinstance(encode, Critiques), encode
    return encode


def _require_reference(data: RankedDataModule, module: MMDPOModule, precision: str) -> None:
    """Refuse log-probs of another reference than the checkpoint that the training begins with."""
    known, dtype = data.reference_fingerprint, "bfloat16" if precision.startswith("bf16") else module.config.dtype
    if data.reference_dtype not in (None, dtype):
        log.warning(
            "the reference's log-probs were computed in %s, the policy's are in %s: they differ by rounding from the "
            "first step on; `mmrlhf score --dtype` makes them alike",
            data.reference_dtype,
            dtype,
        )
    if known is not None and known != model_digest(module.config.folder):
        raise ValueError(
            f"data.scores: expected log-probs of the checkpoint that is trained ({module.config.path}), got those of "
            "another; run `mmrlhf score --reference` with it, or say run.any_reference true"
        )


def _card(
    cli: TrainCLI,
    trainer: lightning.Trainer,
    ledger: ComputeLedger,
    what: str,
    of_data: dict[str, object],
    of_training: dict[str, object],
) -> str:
    """The card of a training that has ended, with what is known of its data."""
    admission = cli.datamodule.rows("train").admission
    known = {
        "training queries": admission.n,
        "pairs per query": admission.mean_pairs,
        **of_data,
        "left out": admission.ledger,
        "digest": admission.digest,
    }
    cost = ledger.totals()._asdict() | {"devices": trainer.world_size}
    return training_card(what, cli.settings, trainer.global_step, known, of_training, cost)
