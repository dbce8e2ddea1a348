"""How fast the training goes, and how much of the time it waits for data."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback

from ..reports import Work
from .compute import LogInterval, gathered, log_now

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H800 PCIe": 756e12,
    "NVIDIA H800": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A800": 312e12,
    "NVIDIA A40": 150e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
}
"""What makers promise of dense bfloat16 per second; of names that begin alike, the longer one stands first."""


def peak_flops(device: str) -> float | None:
    """Return the dense bfloat16 FLOP per second of a GPU by its name, and None for one that is not known.

    >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("NVIDIA A100-SXM4-80GB MIG 1g.10gb")
    (989000000000000.0, None)
    """
    if " MIG " in device:
        return None  # a part of the device has a part of its peak
    for name, peak in PEAK_FLOPS.items():
        if device == name or device.startswith((f"{name} ", f"{name}-")):
            return peak
    return None


@runtime_checkable
class Waits(Protocol):
    """A loader that knows for how long it was waited for."""

    waited_seconds: float


class _Span(NamedTuple):
    """What one rank did in an interval."""

    queries: int = 0
    pairs: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0  # not a number where the loader does not tell

    def plus(self, other: _Span) -> _Span:
        """Return both together."""
        return _Span._make(one + two for one, two in zip(self, other, strict=True))


class Throughput(Callback):
    """Log `throughput/*` of the last log interval: per second over all ranks, without validations.

    MFU, the share of the GPUs' dense bfloat16 peak, is logged where the device is in `PEAK_FLOPS`.
    """

    def __init__(self, warmup: int = 3) -> None:
        """Leave the first `warmup` steps out after every start, in which libraries choose and compile."""
        if warmup < 0:
            raise ValueError(f"warmup: expected 0 or more steps, got {warmup}; 3 is usual")
        self.warmup = warmup
        self._interval = LogInterval()
        self._first = 0
        self._warm = False
        self._span = _Span()
        self._since: float | None = None
        self._waited = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to warm up."""
        self._interval.start(trainer)
        self._first, self._warm, self._since = trainer.global_step, False, None
        if not self.warmup:
            self._begin(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401  # Lightning's
        batch: object,
        batch_idx: int,
    ) -> None:
        """Add a micro-batch."""
        due = self._interval.due(trainer)
        if self._warm:
            work: Work = outputs["work"]
            self._span = self._span.plus(_Span(work.queries, work.pairs, work.tokens, work.flops))
            if due:
                self._pause(pl_module)
                self._report(trainer, pl_module)
        if due if self._warm else trainer.global_step - self._first >= self.warmup:
            self._begin(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._pause(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the clock run again."""
        self._since = perf_counter() if self._warm else None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the last interval, if it has a step."""
        if self._warm and self._interval.unfinished(trainer):
            self._pause(pl_module)
            self._report(trainer, pl_module)
        self._warm, self._since = False, None

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _finish(pl_module.device)
        self._warm, self._span, self._since = True, _Span(), perf_counter()
        self._waited = _waited(trainer)

    def _pause(self, pl_module: LightningModule) -> None:
        if self._since is not None:
            _finish(pl_module.device)
            self._span = self._span.plus(_Span(seconds=perf_counter() - self._since))
            self._since = None

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = gathered(self._span.plus(_Span(waited=_waited(trainer) - self._waited)))
        total = _Span._make(sum(values) for values in zip(*every, strict=True))
        if not total.queries or not total.seconds:
            return
        together = total.seconds / len(every)
        rates = {"queries": total.queries, "pairs": total.pairs, "tokens": total.tokens}
        metrics = {f"throughput/{name}_per_second": number / together for name, number in rates.items()}
        if total.waited == total.waited:
            metrics["throughput/data_wait_share"] = total.waited / total.seconds
        device = pl_module.device
        if device.type == "cuda" and (peak := peak_flops(torch.cuda.get_device_name(device))):
            metrics["throughput/mfu"] = total.flops / (total.seconds * peak)
        log_now(trainer, metrics)


def _waited(trainer: Trainer) -> float:
    loader = trainer.train_dataloader
    return loader.waited_seconds if isinstance(loader, Waits) else float("nan")


def _finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was told, or the clock would measure the telling."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
