"""What the monitors of both trainers do alike: take the reports of steps, and log them over all ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, cast

from lightning.pytorch import Callback
from lightning.pytorch.loggers import MLFlowLogger

from .compute import LogInterval, gathered, log_every, log_now

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from matplotlib.figure import Figure

R = TypeVar("R")


class Sums(Protocol[R]):
    """What is summed over reports, in whatever order they come."""

    def add(self, reports: list[R]) -> None:
        """Add some reports."""

    def merge(self, other: Any) -> None:  # noqa: ANN401 - its own kind
        """Add what another one has."""

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return everything by its name; nothing where there was nothing."""


T = TypeVar("T", bound=Sums[Any])


class Monitor(Callback, ABC, Generic[R, T]):
    """Log sums over reports, per log interval in training, and with a figure per validation; over all ranks.

    The figure is an artifact of an MLFlowLogger, and a PNG in `folder` where one is given.
    """

    told: ClassVar[str]
    """Under which name a step hands its report on."""
    figure_name: ClassVar[str]
    tally: ClassVar[type[Any]]
    """What sums reports."""

    def __init__(self, folder: str | Path | None = None) -> None:
        """Write figures to `folder` too."""
        self.folder = None if folder is None else Path(folder)
        self._interval = LogInterval()
        # Reports wait as they are, so that no GPU has to be waited for at every step.
        self._trained: list[R] = []
        self._validated: list[R] = []

    @abstractmethod
    def draw(self, tally: T, title: str) -> Figure | None:
        """Draw a validation; nothing where there is nothing to see."""

    def keep(self, tally: T, folder: Path) -> None:
        """Write the numbers behind a figure beside it; by default none."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an interval."""
        self._interval.start(trainer)
        self._trained = []

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401  # Lightning's
        batch: object,
        batch_idx: int,
    ) -> None:
        """Take a report, and log those of the interval where it ends."""
        if log_every(trainer):
            self._trained.append(outputs[self.told])
        if self._interval.due(trainer):
            self._log_trained(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is left."""
        if log_every(trainer) and self._interval.unfinished(trainer):
            self._log_trained(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with nothing."""
        self._validated = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401  # Lightning's
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take a report."""
        if not trainer.sanity_checking:
            self._validated.append(outputs[self.told])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics, so that checkpoints can be chosen by them, and the figure."""
        if trainer.sanity_checking:
            return
        tally = self._of_all(self._validated)
        self._validated = []
        # Equal on all ranks already; told otherwise, Lightning advises to make them so.
        pl_module.log_dict(cast("Any", tally.metrics("val")), on_epoch=True, sync_dist=True, batch_size=1)
        if trainer.is_global_zero:
            self._show(trainer, tally)

    def _log_trained(self, trainer: Trainer) -> None:
        reports, self._trained = self._trained, []
        log_now(trainer, self._of_all(reports).metrics("train"))

    def _of_all(self, mine: list[R]) -> T:
        """The sums of all ranks' reports. All ranks must call it, also those without any."""
        own: T = self.tally()
        own.add(mine)
        total: T = self.tally()
        for tally in gathered(own):
            total.merge(tally)
        return total

    def _show(self, trainer: Trainer, tally: T) -> None:
        # Only a logger that the user gives is one: to our own run, figures go from the folder when it ends.
        stores = [logger for logger in trainer.loggers if isinstance(logger, MLFlowLogger)]
        if not stores and self.folder is None:
            return
        figure = self.draw(tally, f"Validation at step {trainer.global_step:,}")
        if figure is None:
            return
        name = f"{self.figure_name}-{trainer.global_step:08d}.png"
        for store in stores:
            store.experiment.log_figure(store.run_id, figure, f"figures/{name}")
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.folder / name, dpi=150)
            self.keep(tally, self.folder)
