"""The door of the trainers: a config becomes a module, its data and its callbacks, and then a trained checkpoint.

`trainer`, `model` and `data` in a config are the keyword arguments of Lightning's Trainer, of the module and of the
data module; `run` says where everything goes. Killed and started again, the same command continues.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .callbacks.beta_monitor import BetaMonitor
from .callbacks.beta_schedule import BetaSchedule
from .callbacks.compute import ComputeLedger
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
from .modules.critic import CritiqueRewardModule, RewardPlan
from .modules.mmdpo import MMDPOModule, Plan
from .modules.rewardmodel import Judging, save_reward_model
from .modules.saving import model_card, save_folder
from .parallel import is_rank_zero
from .provenance import model_digest
from .runs import CHECKPOINTS, FIGURES, MODEL, Run, TrainCLI, each_fold, identity, once

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
    cli = AlignCLI(argv)
    once(cli, cli.config_init["run"], lambda: _digest(cli), lambda: _align(cli))


def train_reward(argv: Sequence[str]) -> None:
    """Train a reward model on ranked responses: it writes a critique of each, and scores it where the critique ends.

    Every value of `configs/reward/*.yaml` is an option: `mmrlhf train-reward --config configs/reward/world.yaml
    --data.critique reason --run.out runs/human`. With `--folds 5` five models are trained one after another, each
    without another fifth of the queries.
    """
    argv = [f"--run.{word[2:]}" if word.partition("=")[0] == "--folds" else word for word in argv]
    cli = RewardCLI(argv)
    run: RewardRun = cli.config_init["run"]
    if run.folds is not None:
        each_fold(cli.verb, argv, run, run.folds)
        return
    once(cli, run, lambda: _digest(cli), lambda: _judge(cli))
    if cli.datamodule.fold is not None and is_rank_zero():
        _tell_fold(cli, run.out, cli.datamodule.fold)


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
    module.expect(Plan(steps, data.mean_pairs, _known_margins(module, data)))
    schedule.total = schedule.total or steps
    fitted(trainer, module, data, run.out / CHECKPOINTS, steps)
    whole = module.whole()  # all ranks take part
    if trainer.is_global_zero and whole is not None:
        told = {name: getattr(module, name) for name in ("margin", "beta", "loss", "sft_weight")}
        told["beta_schedule"] = cli.settings["beta_schedule"]
        card = _card(cli, trainer, ledger, "aligned by MM-DPO", {}, told)
        save_folder(whole.backbone, data.processor, run.out / MODEL, card)
        log.info("%s: trained for %d steps", run.out / MODEL, trainer.global_step)


def _judge(cli: RewardCLI) -> None:
    """Fit a reward model, and save it with its head and with what it is asked."""
    run: Run = cli.config_init["run"]
    module, data, ledger = cli.model, cli.datamodule, ComputeLedger()
    trainer = _trainer(cli, ledger, [RewardMonitor(run.out / FIGURES)])
    steps = planned(trainer, data)
    module.expect(_reward_plan(steps, module, data))
    fitted(trainer, module, data, run.out / CHECKPOINTS, steps)
    whole = module.whole()  # all ranks take part
    if trainer.is_global_zero and whole is not None:
        encode = _encoder(data)
        asked = {
            "ties per query": data.mean_ties,
            "critiques per query": data.mean_critiques,
            "critiques": encode.source,
        }
        told = {"template": f"{encode.template.name}, {encode.template.digest[:16]}", "frames of a film": encode.frames}
        told |= {"weights": module.weights, "dimensions": ", ".join(module.dimensions) or "none"}
        card = _card(cli, trainer, ledger, "a reward model that writes critiques", asked, told)
        judging = Judging(encode.template, encode.frames, module.dimensions)
        save_reward_model(whole, data.processor, judging, run.out / MODEL, card)
        log.info("%s: trained for %d steps", run.out / MODEL, trainer.global_step)


def _known_margins(module: MMDPOModule, data: RankedDataModule) -> tuple[float, ...]:
    """The margins of all training pairs, where beta needs to know them before the first step."""
    if not module.beta.needs_known:
        return ()
    if module.margin == "implicit":
        raise ValueError("margin: expected reward, rank or annotated, got implicit, which nobody knows beforehand")
    return tuple(pair_margins(data.rows("train"), module.margin))


def _reward_plan(steps: int, module: CritiqueRewardModule, data: RankedDataModule) -> RewardPlan:
    """What is known before the first step; what is to be learned and not in the data is refused."""
    source = _encoder(data).source
    if source != "none" and module.weights.critique and not data.mean_critiques:
        raise ValueError(
            f"data.critique: expected critiques in the training data ({source}), got none; say none, or enhance the "
            "annotators' reasons first"
        )
    unknown = [name for name in module.dimensions if not data.mean_scores[name]]
    if unknown:
        raise ValueError(
            f"model.dimensions: expected annotated scores of {' and '.join(unknown)} in the training data, got none; "
            "leave it out"
        )
    scores = sum(data.mean_scores[name] for name in module.dimensions)
    return RewardPlan(steps, data.mean_pairs, data.mean_ties, data.mean_critiques, scores)


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
    """What a user of the model must know: where it comes from, what it was trained on and how, at which cost."""
    settings, data = cli.settings, cli.datamodule
    admission = data.rows("train").admission
    return model_card(
        f"{Path(settings['model']['backbone']['path']).name}, {what}",
        {
            "Data": {
                "training queries": admission.n,
                "pairs per query": admission.mean_pairs,
                **of_data,
                "left out": admission.ledger,
                "digest": admission.digest,
            },
            "Training": {
                **of_training,
                "optimiser": cli.model.optimiser,
                "queries per step": data.global_batch,
                "steps": trainer.global_step,
                "seed": settings["run"]["seed"],
            },
            "Cost": ledger.totals()._asdict() | {"devices": trainer.world_size},
            "Config": {name: of_value(settings[name])[:16] for name in ("model", "data", "trainer")},
        },
    )
