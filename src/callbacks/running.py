"""A trainer with what every training here is watched by, and a fit that goes on where it was killed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, RichProgressBar

from ..preemption import Preempted, heard, listening
from ..ranks import micro_batches
from .compute import ComputeLedger
from .consumption import ConsumptionGuard
from .gradients import GradientCheck
from .limits import limited, planned_steps, stopped_early
from .resuming import newest, require_readable
from .saving import LocalFile, SaveWhole
from .seeds import StepSeeds
from .throughput import Throughput
from .tracking import mlflow_logger

if TYPE_CHECKING:
    from lightning.pytorch import Callback


_log = logging.getLogger(__name__)


class Kept(Protocol):
    """Where a training goes, and how it is kept."""

    @property
    def out(self) -> Path:
        """Its folder."""

    @property
    def seed(self) -> int:
        """Of all that is drawn."""

    @property
    def tracking(self) -> str | None:
        """Where MLflow keeps it."""

    @property
    def experiment(self) -> str:
        """Under which name."""

    @property
    def name(self) -> str | None:
        """Of the run."""

    @property
    def parent(self) -> str | None:
        """The run under which MLflow keeps it."""

    @property
    def save_every(self) -> int:
        """Steps between checkpoints."""


class Batches(Protocol):
    """Data that come in steps of so many queries, and micro-batches of so many."""

    global_batch: int
    micro_batch: int

    @property
    def steps_per_pass(self) -> float:
        """Optimizer steps in which every training query is seen once."""


def watched(
    options: Mapping[str, Any],
    run: Kept,
    settings: Mapping[str, Any],
    ledger: ComputeLedger,
    particular: Sequence[Callback],
    checkpoints: Path,
) -> lightning.Trainer:
    """A trainer with the callbacks that every training has, and those that are particular to it."""
    options = dict(options)
    if str(options["precision"]).endswith("-true"):
        raise ValueError(
            f"trainer.precision: expected null, 32 or bf16-mixed, got {options['precision']}, which would round the "
            "scores of the data as well; say bf16-mixed, and the type of the weights with model.backbone.dtype"
        )
    if options["max_epochs"] is None and options["max_steps"] == -1:
        options["max_epochs"] = 1
    callbacks: list[Callback] = [ConsumptionGuard(), StepSeeds(run.seed), GradientCheck(), *particular]
    callbacks += [ledger, Throughput(), *([] if options["enable_progress_bar"] is False else [RichProgressBar()])]
    if run.tracking and options["logger"] in (None, True):
        name = run.name or run.out.name
        options["logger"] = mlflow_logger(run.out, run.tracking, run.experiment, name, settings, run.parent)
        callbacks.append(LearningRateMonitor("step"))
    elif options["logger"] is None:
        options["logger"] = False
    callbacks += [*_given(options["callbacks"]), SaveWhole(checkpoints, run.save_every)]
    options["plugins"] = [*_given(options["plugins"]), LocalFile()]
    # Where Lightning looks for checkpoints of its own, which a job of SLURM would go on from.
    options["default_root_dir"] = options["default_root_dir"] or run.out
    fixed = {"use_distributed_sampler": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    try:
        return lightning.Trainer(**options | fixed | {"callbacks": callbacks})
    except MisconfigurationException as error:
        raise ValueError(f"trainer: {error}; see configs/trainer for options that go together") from error


def planned(trainer: lightning.Trainer, data: Batches, ranks: int | None = None) -> int:
    """Tell the trainer how many micro-batches of a rank make a step, and return the number of its steps.

    `ranks`: those of another trainer, for which this one plans.
    """
    ranks = trainer.world_size if ranks is None else ranks
    trainer.accumulate_grad_batches = micro_batches(data.global_batch, data.micro_batch, ranks)
    whole = max(1, int(data.steps_per_pass)) * trainer.accumulate_grad_batches
    return planned_steps(trainer, limited(trainer, whole))


def fitted(trainer: lightning.Trainer, module: Any, data: Any, checkpoints: Path, steps: int) -> None:  # noqa: ANN401
    """Fit from the newest checkpoint, or from the beginning, to the last step, after which it is validated."""
    with listening():
        _fit(trainer, module, data, newest(checkpoints))
        _finish(trainer, module, data, checkpoints, steps)


def _fit(trainer: lightning.Trainer, module: Any, data: Any, state: Path | None) -> None:  # noqa: ANN401
    if state is not None:
        require_readable(state, trainer)
        _log.info("%s: goes on from here", state.parent)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=state, weights_only=True)
    except Preempted:
        raise
    except Exception as error:
        if heard() is None or not _of_processes(error):
            raise
        # A signal to all processes of a job also ends those that load batches, and other ranks.
        _log.warning("told to go (%s), and could not end the step: %s; the same command continues", heard(), error)
        raise Preempted(trainer.is_global_zero) from error
    except SystemExit as exit_:
        if trainer.interrupted:  # Lightning makes an exit of an interrupt, and the hint to go on would be lost
            raise KeyboardInterrupt from exit_
        raise


def _of_processes(error: BaseException | None) -> bool:
    """Whether it began with the death of another process: torch tells of it by an error wherever this one is.

    Whoever is called there may make another error of it.
    """
    while error is not None:
        if isinstance(error, RuntimeError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _finish(trainer: lightning.Trainer, module: Any, data: Any, checkpoints: Path, steps: int) -> None:  # noqa: ANN401
    if trainer.global_step < steps and not stopped_early(trainer):
        raise ValueError(
            f"{checkpoints.parent}: stopped after step {trainer.global_step} of {steps}; the same command continues"
        )
    if module.validated_at != trainer.global_step and data.val_dataloader():
        trainer.validate(module, datamodule=data, verbose=False)


def _given(several: Any) -> list[Any]:  # noqa: ANN401 - what Lightning takes
    """One, several or none as a list; what saves checkpoints is refused, as a run goes on from its own."""
    given = [] if several is None else several if isinstance(several, list) else [several]
    if saving := [type(each).__name__ for each in given if isinstance(each, Checkpoint)]:
        raise ValueError(
            f"trainer.callbacks: expected none that saves checkpoints, got {', '.join(saving)}; leave it out, and say "
            "run.save_every"
        )
    return given
