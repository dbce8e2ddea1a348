"""A check of the first step: what is to learn has a gradient, and what is frozen has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

_NAMED = 3  # parameters in a message


@runtime_checkable
class HasParts(Protocol):
    """A module that tells which of its parameters are trained, by part."""

    def parts(self) -> Mapping[str, Sequence[torch.nn.Parameter]]:
        """The trained parameters of vision, projector and language."""


class GradientCheck(Callback):
    """Before the first step, make an error of trainable parameters without a gradient and frozen ones with.

    Both train in silence otherwise: the one not at all, the other for nothing. A part of the model that a step with
    media leaves without any gradient (`parts()` of the module tells them) is an error too: zeros are no learning.
    Gradients are looked at where a step is due: a strategy may keep those of its micro-batches elsewhere until then.
    """

    def __init__(self) -> None:
        self._due = self._parts_due = True
        self._media = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check this training too."""
        self._due = self._parts_due = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """See whether a batch of the step has media."""
        self._media |= bool(getattr(getattr(batch, "rows", None), "features", None))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check once; the parts at the first step with media."""
        media, self._media = self._media, False
        if self._parts_due and media and isinstance(pl_module, HasParts):
            self._parts_due = False
            _require_learning(pl_module)
        if not self._due:
            return
        self._due = False
        named = list(pl_module.named_parameters())
        still = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
        if still:
            raise ValueError(
                f"first step: expected a gradient for every trainable parameter, got none for {_some(still)}; "
                "freeze what the loss does not depend on (`freeze`), or let every batch pass through it (a batch "
                "without media leaves out the vision path)"
            )
        moved = [name for name, parameter in named if not parameter.requires_grad and parameter.grad is not None]
        if moved:
            raise ValueError(
                f"first step: expected no gradient for frozen parameters, got one for {_some(moved)}; freeze "
                "before training starts, and clear what an earlier backward left (`zero_grad`)"
            )


def _require_learning(module: HasParts) -> None:
    for part, weights in module.parts().items():
        gradients = [_own(weight.grad) for weight in weights if weight.grad is not None]
        held = len(gradients) < len(weights) or any(gradient.numel() for gradient in gradients)
        if held and not any(bool(gradient.any()) for gradient in gradients):
            raise ValueError(
                f"first step: expected a gradient that is not zero somewhere in the {part}, which is trained, from "
                f"batches with media, got none; freeze it (`freeze.{part}`), or find what detaches it"
            )


def _own(gradient: torch.Tensor) -> torch.Tensor:
    """Of a sharded gradient what this rank holds: other ranks may not be asking."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _some(names: list[str]) -> str:
    """Name a few, and count the others.

    >>> _some(list("abcde"))
    'a, b, c and 2 more'
    """
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
