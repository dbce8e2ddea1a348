"""Whatever learns nothing, or learns what it should not, is an error before the first step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmrlhf.callbacks.gradients import GradientCheck

from .test_compute import Toy, fit

pytestmark = pytest.mark.filterwarnings("ignore")


class Parts(Toy):
    """Some parts are used and some are not, some are frozen."""

    def __init__(self, unused=0, frozen=0):
        super().__init__()
        self.unused = torch.nn.ModuleList(torch.nn.Linear(1, 1, bias=False) for _ in range(unused))
        self.frozen = torch.nn.ModuleList(torch.nn.Linear(1, 1).requires_grad_(False) for _ in range(frozen))
        self.steps = 0

    def training_step(self, batch, batch_idx):
        """Pass through what is frozen too."""
        self.steps += 1
        found = super().training_step(batch, batch_idx)
        return found | {"loss": found["loss"] + sum(part(found["loss"].view(1)).sum() for part in self.frozen)}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_sound_model_trains(accumulation):
    model = Parts(frozen=2)
    fit(model, GradientCheck(), accumulate_grad_batches=accumulation)
    assert model.steps == 12


@pytest.mark.parametrize("accumulation", [1, 3])
def test_what_is_trainable_and_unused_is_named_before_the_first_step(accumulation):
    model = Parts(unused=5)
    message = r"got none for unused.0.weight, unused.1.weight, unused.2.weight and 2 more; freeze"
    with pytest.raises(ValueError, match=message):
        fit(model, GradientCheck(), accumulate_grad_batches=accumulation)
    assert model.steps == accumulation


def test_a_frozen_parameter_with_a_gradient_is_named():
    class Late(Parts):
        def backward(self, loss):
            self.frozen.requires_grad_(True)
            loss.backward()
            self.frozen[0].weight.grad = torch.ones(1, 1)
            self.frozen.requires_grad_(False)

    with pytest.raises(ValueError, match=r"expected no gradient for frozen parameters, got one for frozen.0.weight;"):
        fit(Late(frozen=1), GradientCheck())


def test_every_training_is_checked_anew():
    check = GradientCheck()
    fit(Parts(), check)
    with pytest.raises(ValueError, match=r"got none for unused\.0\.weight;"):
        fit(Parts(unused=1), check)


class Cut(torch.nn.Module):
    """A model whose projector gets zeros."""

    def __init__(self):
        super().__init__()
        self.projector = torch.nn.Linear(1, 1)
        for weight in self.parameters():
            weight.grad = torch.zeros_like(weight)

    def parts(self):
        """What is trained, by part."""
        return {"projector": list(self.parameters())}


def steps_of(check, model, *steps):
    """Steps of micro-batches that have media or not."""
    check.on_train_start(None, model)
    for step in steps:
        for number, media in enumerate(step):
            rows = SimpleNamespace(features={"pixel_values": 1} if media else {})
            check.on_train_batch_start(None, model, SimpleNamespace(rows=rows), number)
        check.on_before_optimizer_step(None, model, None)


@pytest.mark.parametrize("steps", [[(True, False)], [(False, True)], [(False, False), (True, False)]])
def test_a_part_that_learns_nothing_of_a_step_with_media_is_named(steps):
    with pytest.raises(ValueError, match=r"not zero somewhere in the projector, which is trained, from batches with"):
        steps_of(GradientCheck(), Cut(), *steps)


def test_steps_without_media_tell_nothing_of_a_projector():
    steps_of(GradientCheck(), Cut(), (False, False), (False,))
