"""A check of the first backward pass: what is to learn has a gradient, and what is frozen has none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Callback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_NAMED = 3  # parameters in a message


class GradientCheck(Callback):
    """After the first micro-batch, make an error of trainable parameters without a gradient and frozen ones with.

    Both train in silence otherwise: the one not at all, the other for nothing.
    """

    def __init__(self) -> None:
        self._due = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check this training too."""
        self._due = True

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check once."""
        if not self._due:
            return
        self._due = False
        named = list(pl_module.named_parameters())
        still = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
        if still:
            raise ValueError(
                f"first backward: expected a gradient for every trainable parameter, got none for {_some(still)}; "
                "freeze what the loss does not depend on (`freeze`), or let every batch pass through it (a batch "
                "without media leaves out the vision path)"
            )
        moved = [name for name, parameter in named if not parameter.requires_grad and parameter.grad is not None]
        if moved:
            raise ValueError(
                f"first backward: expected no gradient for frozen parameters, got one for {_some(moved)}; freeze "
                "before training starts, and clear what an earlier backward left (`zero_grad`)"
            )


def _some(names: list[str]) -> str:
    """Name a few, and count the others.

    >>> _some(list("abcde"))
    'a, b, c and 2 more'
    """
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
