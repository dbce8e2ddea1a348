"""beta0 follows from the step alone, whatever was done before it."""

from __future__ import annotations

from math import cos, pi

import pytest
from lightning.pytorch import Callback

from mmrlhf.callbacks.beta_schedule import BetaSchedule, beta0_at

from .test_compute import BETA0, Beta, Kept, Save, Toy, fit

pytestmark = pytest.mark.filterwarnings("ignore")


class Watched(Toy):
    """Writes down the beta of every step."""

    def __init__(self):
        super().__init__()
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        """Write down."""
        self.seen.append((self.global_step, self.beta.beta0))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        """Write down."""
        self.validated.append((self.global_step, self.beta.beta0))
        return super().validation_step(batch, batch_idx)


def linear(steps, total, end=0.3):
    return [(step, pytest.approx(BETA0 + (end - BETA0) * step / total)) for step in steps]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_step_has_the_beta0_of_its_schedule(accumulation):
    model, kept = Watched(), Kept()
    fit(model, BetaSchedule("linear", 0.3), kept=kept, accumulate_grad_batches=accumulation, log_every_n_steps=2)
    total = 12 // accumulation
    assert model.seen == linear([step for step in range(total) for _ in range(accumulation)], total)
    assert kept.with_name("beta/beta0") == pytest.approx(
        {step: BETA0 + 0.2 * step / total for step in range(1, total, 2)}, rel=1e-6
    )


def test_a_cosine_is_a_cosine():
    model = Watched()
    fit(model, BetaSchedule("cosine", 0.02))
    assert [beta0 for _, beta0 in model.seen] == pytest.approx(
        [0.02 + (BETA0 - 0.02) * (1 + cos(pi * step / 12)) / 2 for step in range(12)]
    )


def test_a_constant_stays():
    model = Watched()
    fit(model, BetaSchedule())
    assert {beta0 for _, beta0 in model.seen} == {BETA0}


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_both_ends_are_exact_and_the_last_is_kept(kind):
    assert beta0_at(0, 7, kind, 0.1, 0.7) == 0.1
    assert beta0_at(7, 7, kind, 0.1, 0.7) == beta0_at(9, 7, kind, 0.1, 0.7) == 0.7


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"max_epochs": 3, "max_steps": 4}, 4),
        ({"max_epochs": 2, "max_steps": 100}, 24),
        ({"max_epochs": -1, "max_steps": 5}, 5),
        ({"max_epochs": 1, "accumulate_grad_batches": 5}, 3),
        ({"max_epochs": 1, "limit_train_batches": 6}, 6),
    ],
)
def test_the_total_is_the_number_of_steps_that_the_trainer_takes(options, total):
    model = Watched()
    trainer = fit(model, BetaSchedule("linear", 0.3), **options)
    assert trainer.global_step == total
    assert [dict(model.seen)[step] for step in range(total)] == [beta0 for _, beta0 in linear(range(total), total)]


def test_a_given_total_is_taken():
    model = Watched()
    fit(model, BetaSchedule("linear", 0.3, total=4), max_epochs=-1, max_steps=6)
    assert [beta0 for _, beta0 in model.seen] == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3, 0.3])


def test_a_training_without_an_end_is_refused():
    with pytest.raises(ValueError, match="expected a training that ends"):
        fit(Watched(), BetaSchedule("linear", 0.3), max_epochs=-1, max_steps=-1)


@pytest.mark.parametrize("new", ["nothing", "callback", "process"])
def test_a_resume_gives_every_step_the_same_beta0(new, tmp_path):
    class Stops(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                raise RuntimeError("planted")

    model, schedule = Watched(), BetaSchedule("linear", 0.3)
    with pytest.raises(RuntimeError, match="planted"):
        fit(model, schedule, Save(tmp_path / "x.ckpt", 4), Stops())
    assert model.seen == linear(range(5), 12)
    model = Watched() if new == "process" else model
    model.seen = []
    schedule = schedule if new == "nothing" else BetaSchedule("linear", 0.3)
    fit(model, schedule, resume=tmp_path / "x.ckpt")
    assert model.seen == linear(range(4, 12), 12)


def test_a_second_training_of_the_same_module_begins_at_the_configured_beta0():
    model, schedule = Watched(), BetaSchedule("linear", 0.3)
    fit(model, schedule)
    assert model.beta == Beta()
    model.seen = []
    fit(model, schedule)
    assert model.seen == linear(range(12), 12)


def test_a_validation_sees_the_beta0_of_the_step_that_was_reached():
    model = Watched()
    fit(model, BetaSchedule("linear", 0.3), val=1, val_check_interval=6, num_sanity_val_steps=1)
    assert model.validated == [(0, BETA0), *linear([6, 12], 12)]


def test_the_rest_of_beta_is_left_alone():
    class Checked(Watched):
        def training_step(self, batch, batch_idx):
            assert self.beta == Beta(beta0=self.beta.beta0)
            return super().training_step(batch, batch_idx)

    fit(Checked(), BetaSchedule("cosine", 0.3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "step"}, "kind: expected one of constant, linear, cosine, got 'step'"),
        ({"kind": "linear"}, "end: expected the last beta0"),
        ({"kind": "constant", "end": 0.2}, "end: expected none"),
        ({"kind": "linear", "end": 0.0}, "end: expected a number above 0"),
        ({"kind": "linear", "end": float("nan")}, "end: expected a number above 0"),
        ({"total": 0}, "total: expected 1 step or more"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BetaSchedule(**options)
