"""The door of the trainers: a config becomes a module, its data and its callbacks, and then a trained checkpoint.

`trainer`, `model` and `data` in a config are the keyword arguments of Lightning's Trainer, of the module and of the
data module; `run` says where everything goes. Killed and started again, the same command continues.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning
from lightning.pytorch.callbacks import LearningRateMonitor, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from .callbacks.beta_monitor import BetaMonitor
from .callbacks.beta_schedule import BetaSchedule
from .callbacks.compute import ComputeLedger
from .callbacks.consumption import ConsumptionGuard
from .callbacks.gradients import GradientCheck
from .callbacks.margin_check import MarginCheck
from .callbacks.saving import LAST, SaveWhole
from .callbacks.seeds import StepSeeds
from .callbacks.throughput import Throughput
from .callbacks.tracking import mlflow_logger
from .datamodules.compared import pair_margins
from .datamodules.module import RankedDataModule
from .fingerprint import of_value
from .jsonl import loads
from .modules.mmdpo import MMDPOModule, Plan
from .modules.saving import model_card, save_folder
from .options import ConfigFile, ExplainingParser, guard_configs
from .parallel import rank
from .provenance import model_digest
from .settings import alone, claim

if TYPE_CHECKING:
    from lightning.pytorch import Callback

log = logging.getLogger(__name__)
MODEL, CHECKPOINTS, FIGURES, CONFIG = "model", "checkpoints", "figures", "config.yaml"
_FREE = {"shards", "scores", "processor", "workers", "cache", "micro_batch", "resume_inexact"}
"""Of the data, what may change from one start to the next: where the files lie (their contents are checked when the
training continues), and how, not what, is computed."""
_TRAINED_WITH = ("max_epochs", "max_steps", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches")


@dataclass(frozen=True)
class Run:
    """Where a training goes, and how it is kept.

    Args:
        out: Folder of the run; the same command continues there.
        seed: Decides the order of the data, dropout and controls.
        tracking: Where MLflow keeps the run: a database or a server; null for nowhere.
        experiment: Under which name.
        name: Of the run; default: of its folder.
        save_every: Optimizer steps between checkpoints.
        any_reference: Accept log-probs of another reference than the checkpoint that is trained.
    """

    out: Path
    seed: int = 0
    tracking: str | None = "sqlite:///mlflow.db"
    experiment: str = "mm-dpo"
    name: str | None = None
    save_every: int = 50
    any_reference: bool = False


class TrainParser(ExplainingParser, LightningArgumentParser):
    """Lightning's parser with the errors of the other verbs."""


class TrainCLI(LightningCLI):
    """A module and ranked queries from a config and dotted overrides; nothing is read and nothing begins yet."""

    def __init__(self, module: type[lightning.LightningModule], argv: Sequence[str]) -> None:
        guard_configs()
        _hush()
        super().__init__(
            module,
            RankedDataModule,
            args=list(argv),
            run=False,
            save_config_callback=None,
            seed_everything_default=False,
            parser_class=TrainParser,
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "mmrlhf train-dpo", "description": __doc__},
            trainer_defaults={"max_epochs": 1, "gradient_clip_val": 1.0, "log_every_n_steps": 10},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def init_parser(self, **options: Any) -> LightningArgumentParser:  # noqa: ANN401 - Lightning's  # noqa: ANN401 - as the method it extends
        """Lightning's, with `--config` files whose errors name the file."""
        parser = self.parser_class(**options)
        parser.add_argument(
            "-c", "--config", action=ConfigFile, help="YAML with values; repeatable, the later one wins."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What is neither module nor data; and what follows from other values."""
        parser.add_class_arguments(Run, "run")
        parser.add_class_arguments(BetaSchedule, "beta_schedule")
        parser.link_arguments("model.backbone.path", "data.processor", compute_fn=Path)
        parser.link_arguments("run.seed", "data.seed")
        parser.link_arguments("model.needs", "data.needs", apply_on="instantiate")

    def instantiate_trainer(self, **options: Any) -> lightning.Trainer:  # noqa: ANN401
        """The trainer comes with the run, once the data are known."""
        return None  # type: ignore[return-value]  # Lightning keeps it in an attribute and does nothing with it

    @property
    def settings(self) -> dict[str, Any]:
        """All values as plain ones, as they stand in a file."""
        told: dict[str, Any] = loads(self.dumped("json").encode())
        return told

    def dumped(self, form: Literal["json", "yaml"]) -> str:
        """The same as the text of a file."""
        text: str = self.parser.dump(self.config, skip_none=False, skip_link_targets=False, format=form)
        return text


def train_dpo(argv: Sequence[str]) -> None:
    """Align a policy with ranked responses: MM-DPO, with a beta that follows the margin of each pair.

    Every value of `configs/dpo/*.yaml` is an option: `mmrlhf train-dpo --config configs/dpo/world.yaml
    --model.beta.w 0.25 --run.out runs/w025`.
    """
    cli = TrainCLI(MMDPOModule, argv)
    run: Run = cli.config_init["run"]
    if rank():
        _train(cli, run)
        return
    with alone(run.out):
        claim(run.out, "run.json", _identity(cli.settings), "a training")
        if (run.out / MODEL).exists():
            log.info("%s: trained already", run.out / MODEL)
            return
        (run.out / CONFIG).write_text(cli.dumped("yaml"), encoding="utf-8")
        _train(cli, run)


def _identity(settings: dict[str, Any]) -> dict[str, Any]:
    """What makes a training this one: another start may not change it."""
    data = {name: value for name, value in settings["data"].items() if name not in _FREE}
    bounds = {name: settings["trainer"][name] for name in _TRAINED_WITH}
    told = {"model": settings["model"], "data": data, "beta_schedule": settings["beta_schedule"]}
    return told | bounds | {"seed": settings["run"]["seed"]}


def _train(cli: TrainCLI, run: Run) -> None:
    """Fit from the last checkpoint, or from the beginning, to the last step; then save a folder."""
    module, data = cli.model, cli.datamodule
    ledger = ComputeLedger()
    trainer = _trainer(cli, run, ledger)
    trainer.accumulate_grad_batches = _accumulation(data, trainer.world_size)
    if not run.any_reference:
        _require_reference(data, module)
    module.expect(_plan(trainer, module, data))
    last = run.out / CHECKPOINTS / LAST
    try:
        trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
    except SystemExit as exit_:
        if trainer.interrupted:  # Lightning makes an exit of an interrupt, and the hint to go on would be lost
            raise KeyboardInterrupt from exit_
        raise
    if trainer.global_step < module.plan.steps and not trainer.should_stop:
        raise ValueError(
            f"{run.out}: stopped after step {trainer.global_step} of {module.plan.steps}; the same command continues"
        )
    if module.validated_at != trainer.global_step:
        trainer.validate(module, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        card = _card(cli.settings, trainer, module, data, ledger)
        save_folder(module.scorer.backbone, data.processor, run.out / MODEL, card)
        log.info("%s: trained for %d steps", run.out / MODEL, trainer.global_step)


def _trainer(cli: TrainCLI, run: Run, ledger: ComputeLedger) -> lightning.Trainer:
    options = dict(cli.config_init["trainer"])
    callbacks: list[Callback] = [
        ConsumptionGuard(),
        StepSeeds(run.seed),
        GradientCheck(),
        MarginCheck(),
        cli.config_init["beta_schedule"],
        BetaMonitor(run.out / FIGURES),
        ledger,
        Throughput(),
        *([] if options["enable_progress_bar"] is False else [RichProgressBar()]),
    ]
    if run.tracking and options["logger"] in (None, True):
        name = run.name or run.out.name
        options["logger"] = mlflow_logger(run.out, run.tracking, run.experiment, name, cli.settings)
        callbacks.append(LearningRateMonitor("step"))
    elif options["logger"] is None:
        options["logger"] = False
    callbacks += [*(options["callbacks"] or []), SaveWhole(run.out / CHECKPOINTS, run.save_every)]
    fixed = {"use_distributed_sampler": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return lightning.Trainer(**options | fixed | {"callbacks": callbacks})


def _plan(trainer: lightning.Trainer, module: MMDPOModule, data: RankedDataModule) -> Plan:
    """What is known before the first step, from the admitted data alone."""
    steps = trainer.max_steps
    if steps < 0:
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise ValueError("trainer: expected max_epochs or max_steps of 1 or more, got neither; set one")
        steps = trainer.max_epochs * max(1, int(data.steps_per_pass))
    known: tuple[float, ...] = ()
    if module.beta.needs_known:
        if module.margin == "implicit":
            raise ValueError("margin: expected reward, rank or annotated, got implicit, which nobody knows beforehand")
        known = tuple(pair_margins(data.rows("train"), module.margin))
    return Plan(steps, data.mean_pairs, known)


def _accumulation(data: RankedDataModule, ranks: int) -> int:
    """How many micro-batches of a rank make a step."""
    at_once = data.micro_batch * ranks
    if data.global_batch % at_once:
        raise ValueError(
            f"data.global_batch: expected a multiple of micro_batch x ranks = {data.micro_batch} x {ranks}, got "
            f"{data.global_batch}; choose one, such as {max(1, round(data.global_batch / at_once)) * at_once}"
        )
    return data.global_batch // at_once


def _require_reference(data: RankedDataModule, module: MMDPOModule) -> None:
    """Refuse log-probs of another reference than the checkpoint that the training begins with."""
    known = data.reference_fingerprint
    if known is not None and known != model_digest(module.config.folder):
        raise ValueError(
            f"data.scores: expected log-probs of the checkpoint that is trained ({module.config.path}), got those of "
            "another; run `mmrlhf score --reference` with it, or say run.any_reference true"
        )


def _card(
    settings: dict[str, Any],
    trainer: lightning.Trainer,
    module: MMDPOModule,
    data: RankedDataModule,
    ledger: ComputeLedger,
) -> str:
    """What a user of the model must know: where it comes from, what it was trained on and how, at which cost."""
    model = settings["model"]
    admission = data.rows("train").admission
    return model_card(
        f"{Path(model['backbone']['path']).name}, aligned by MM-DPO",
        {
            "Data": {
                "training queries": admission.n,
                "pairs per query": admission.mean_pairs,
                "left out": admission.ledger,
                "digest": admission.digest,
            },
            "Training": {
                "margin": module.margin,
                "beta": module.beta,
                "loss": module.loss,
                "sft_weight": module.sft_weight,
                "beta_schedule": settings["beta_schedule"],
                "optimiser": module.optimiser,
                "queries per step": data.global_batch,
                "steps": trainer.global_step,
                "seed": settings["run"]["seed"],
            },
            "Cost": ledger.totals()._asdict() | {"devices": trainer.world_size},
            "Config": {name: of_value(settings[name])[:16] for name in ("model", "data", "trainer")},
        },
    )


def _hush() -> None:
    """Leave out the advice that Lightning gives to everybody."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=".*(many workers|isinstance.treespec|logging interval|in eval mode|LightningCLI's args).*"
    )
