"""A training's settings: how they are read, where it goes, and what makes it this one and no other."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from .folds import Fold, run_of
from .jsonl import loads
from .options import ConfigFile, ExplainingParser, guard_configs
from .parallel import is_rank_zero
from .preemption import REQUEUE, Preempted, listening, passing_on
from .ranks import Gpu
from .redaction import redacted
from .settings import alone, claim, write_json
from .tracked import catch_up, ending

log = logging.getLogger(__name__)
MODEL, CHECKPOINTS, FIGURES, CONFIG, DATA = "model", "checkpoints", "figures", "config.yaml", "data.json"

_FREE = {"shards", "scores", "processor", "workers", "cache", "micro_batch", "resume_inexact"}
"""Of the data, what may change from one start to the next: where the files lie (their contents are checked when the
training continues), and how, not what, is computed."""
_TRAINED_WITH = (
    *("max_epochs", "max_steps", "limit_train_batches", "overfit_batches"),
    *("precision", "gradient_clip_val", "gradient_clip_algorithm"),
)
_INTERRUPTED, _GRACE = 130, 2.0


@dataclass(frozen=True)
class Run:
    """Where a training goes, and how it is kept.

    Args:
        out: Folder of the run; the same command continues there.
        seed: Decides the order of the data, dropout and controls.
        tracking: Where MLflow keeps the run: a database or a server; null for nowhere.
        experiment: Under which name.
        name: Of the run; default: of its folder.
        parent: Id of the run under which it stands, such as a sweep's.
        save_every: Optimizer steps between checkpoints.
        dry_run: Tell ranks, memory, steps and tokens instead, and refuse what cannot work; `--dry-run` for short.
        gpu: For a dry run: the GPU whose memory and speed are assumed.
        device_memory: For a dry run: GiB of each device; default: of that GPU, or of the one that is here.
    """

    out: Path
    seed: int = 0
    tracking: str | None = "sqlite:///mlflow.db"
    experiment: str = "mmrlhf"
    name: str | None = None
    parent: str | None = None
    save_every: int = 50
    dry_run: bool = False
    gpu: Gpu | None = None
    device_memory: float | None = None


class TrainParser(ExplainingParser, LightningArgumentParser):
    """Lightning's parser with the errors of the other verbs."""


class TrainCLI(LightningCLI):
    """A module and its data from a config and dotted overrides; nothing is read and nothing begins yet."""

    verb: ClassVar[str]
    run_class: ClassVar[type[Run]] = Run

    def __init__(
        self,
        module: type[lightning.LightningModule],
        data: type[lightning.LightningDataModule],
        argv: Sequence[str],
        about: str,
    ) -> None:
        guard_configs()
        _hush()
        super().__init__(
            module,
            data,
            args=list(argv),
            run=False,
            save_config_callback=None,
            seed_everything_default=False,
            parser_class=TrainParser,
            parser_kwargs={"parser_mode": "omegaconf+", "prog": f"mmrlhf {self.verb}", "description": about},
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
        parser.add_class_arguments(self.run_class, "run")
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


def _named(path: str, revision: str | None) -> str:
    """A checkpoint with its revision as one word."""
    return f"{path}@{revision}" if revision else path


def once(cli: TrainCLI, run: Run, digest: Callable[[], str], train: Callable[[], None]) -> None:
    """Train, unless that is done already; another training in the same folder, or other data, are refused.

    `digest` stands for the data. The first rank finds out what others cannot, and the launcher ends them with it.
    """
    if not is_rank_zero():
        if not (run.out / MODEL).exists():
            with listening():
                train()
        return
    with alone(run.out):
        claim(run.out, "run.json", identity(cli.settings), "a training")
        require_same_data(run.out / DATA, digest())
        if (run.out / MODEL).exists():
            log.info("%s: trained already", run.out / MODEL)
            catch_up(run.out, run.tracking)
            return
        (run.out / CONFIG).write_text(redacted(cli.dumped("yaml")), encoding="utf-8")
        with listening(), ending(run.out, run.tracking, (f"{FIGURES}/*.png", f"{FIGURES}/*.csv", f"{MODEL}/README.md")):
            train()


def each_fold(verb: str, argv: Sequence[str], run: Run, folds: int) -> None:
    """Train without each of the folds in turn, every time in a process of its own, into `OUT/fold-I`.

    A fold that is done is left as it is by its own process; a failure, or an interrupt, ends all.
    """
    several = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))
    if several != "1":
        raise ValueError(
            f"run.folds: expected a single process, which starts all others, got one of {several}; launch one fold at "
            f"a time with --data.fold.of {folds} --data.fold.out I --run.out {run_of(run.out, 0).parent}/fold-I"
        )
    for fold in [Fold(folds, number) for number in range(max(folds, 1))]:  # none at all is refused as one is
        out = run_of(run.out, fold.out)
        log.info("%s: trains without fold %d of %d", out, fold.out, folds)
        own = {"data.fold.of": fold.of, "data.fold.out": fold.out, "run.folds": "null", "run.out": out}
        own["run.name"] = f"{run.name or run.out.name}-{out.name}"
        code = _ended([verb, *argv, *(word for name, value in own.items() for word in (f"--{name}", str(value)))])
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        if code == REQUEUE:
            raise Preempted(first=True)
        if code:
            raise ValueError(
                f"{out}: the training without fold {fold.out} of {folds} ended with status {code}, see above"
            )


def _ended(words: Sequence[str]) -> int:
    """The exit status of a command of ours, which speaks for itself; an interrupt reaches it, too."""
    with subprocess.Popen([sys.executable, "-m", "mmrlhf", *words]) as process, passing_on(process):  # noqa: S603
        try:
            return process.wait()
        except KeyboardInterrupt:
            try:
                process.wait(_GRACE)  # a terminal tells both
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                process.wait()
            raise


def identity(settings: dict[str, Any]) -> dict[str, Any]:
    """What makes a training this one: another start may not change it."""
    data = {name: value for name, value in settings["data"].items() if name not in _FREE}
    bounds = {name: settings["trainer"][name] for name in _TRAINED_WITH}
    if str(settings["model"].get("beta", {}).get("class_path")).endswith("ImplicitBeta"):
        data["micro_batch"] = settings["data"]["micro_batch"]  # whose pairs are its batch
    told = {"model": _without_features(settings["model"]), "data": data}
    schedule = {name: settings[name] for name in ("beta_schedule",) if name in settings}
    return told | schedule | bounds | {"seed": settings["run"]["seed"]}


def _without_features(model: dict[str, Any]) -> dict[str, Any]:
    """The settings of the model but for where cached features lie: their contents are checked."""
    return model | {"backbone": {name: value for name, value in model["backbone"].items() if name != "features"}}


def require_same_data(record: Path, digest: str) -> None:
    """Refuse to go on, or to be done, with other data, scores or processor than the run began with."""
    if not record.exists():
        write_json(record, {"admission": digest})
    elif (there := loads(record.read_bytes())) != {"admission": digest}:
        raise ValueError(
            f"{record}: expected the data that the run began with, got others ({digest:.8}.. instead of {there}): "
            "shards, scores or the processor have changed; give another --run.out"
        )


def _hush() -> None:
    """Leave out the advice that Lightning gives to everybody."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=".*(many workers|isinstance.treespec|logging interval|in eval mode|LightningCLI's args).*"
    )
