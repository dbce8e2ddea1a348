"""The door of the trainers: a config becomes a module, its data and its callbacks, and then a trained checkpoint.

`trainer`, `model` and `data` in a config are the keyword arguments of Lightning's Trainer, of the module and of the
data module; `run` says where everything goes. Killed and started again, the same command continues.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
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
from .callbacks.limits import limited, planned_steps, stopped_early
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
from .parallel import is_rank_zero
from .provenance import model_digest
from .runs import Run, identity, require_same_data
from .settings import alone, claim

if TYPE_CHECKING:
    from lightning.pytorch import Callback

log = logging.getLogger(__name__)
MODEL, CHECKPOINTS, FIGURES, CONFIG, DATA = "model", "checkpoints", "figures", "config.yaml", "data.json"


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
            trainer_defaults={"gradient_clip_val": 1.0, "log_every_n_steps": 10},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def init_parser(self, **options: Any) -> LightningArgumentParser:  # noqa: ANN401 - Lightning's
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
        parser.link_arguments(("model.backbone.path", "model.backbone.revision"), "data.processor", compute_fn=_named)
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
    if not is_rank_zero():  # the first rank finds out what others cannot, and the launcher ends them with it
        if not (run.out / MODEL).exists():
            _train(cli, run)
        return
    with alone(run.out):
        claim(run.out, "run.json", identity(cli.settings), "a training")
        require_same_data(run.out / DATA, cli.datamodule.rows("train").admission.digest)
        if (run.out / MODEL).exists():
            log.info("%s: trained already", run.out / MODEL)
            return
        (run.out / CONFIG).write_text(cli.dumped("yaml"), encoding="utf-8")
        _train(cli, run)


def _named(path: str, revision: str | None) -> str:
    """A checkpoint with its revision as one word."""
    return f"{path}@{revision}" if revision else path


def _train(cli: TrainCLI, run: Run) -> None:
    """Fit from the last checkpoint, or from the beginning, to the last step; then save a folder."""
    module, data = cli.model, cli.datamodule
    ledger = ComputeLedger()
    trainer = _trainer(cli, run, ledger)
    trainer.accumulate_grad_batches = _accumulation(data, trainer.world_size)
    if not run.any_reference:
        _require_reference(data, module, str(trainer.precision))
    module.expect(_plan(trainer, module, data))
    cli.config_init["beta_schedule"].total = cli.config_init["beta_schedule"].total or module.plan.steps
    last = run.out / CHECKPOINTS / LAST
    try:
        trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
    except SystemExit as exit_:
        if trainer.interrupted:  # Lightning makes an exit of an interrupt, and the hint to go on would be lost
            raise KeyboardInterrupt from exit_
        raise
    if trainer.global_step < module.plan.steps and not stopped_early(trainer):
        raise ValueError(
            f"{run.out}: stopped after step {trainer.global_step} of {module.plan.steps}; the same command continues"
        )
    if module.validated_at != trainer.global_step and data.val_dataloader():
        trainer.validate(module, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        card = _card(cli.settings, trainer, module, data, ledger)
        save_folder(module.scorer.backbone, data.processor, run.out / MODEL, card)
        log.info("%s: trained for %d steps", run.out / MODEL, trainer.global_step)


def _trainer(cli: TrainCLI, run: Run, ledger: ComputeLedger) -> lightning.Trainer:
    options = dict(cli.config_init["trainer"])
    if str(options["precision"]).endswith("-true"):
        raise ValueError(
            f"trainer.precision: expected null, 32 or bf16-mixed, got {options['precision']}, which would round the "
            "scores of the data as well; say bf16-mixed, and the type of the weights with model.backbone.dtype"
        )
    if options["max_epochs"] is None and options["max_steps"] == -1:
        options["max_epochs"] = 1
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
    whole = max(1, int(data.steps_per_pass)) * trainer.accumulate_grad_batches
    steps = planned_steps(trainer, limited(trainer, whole))
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
