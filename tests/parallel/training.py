"""A training on any number of ranks: `python -m tests.parallel.training FOLDER '{"ways": ...}'`, or in forked ranks.

Whatever the ranks, a step is of the same four queries. What is in them makes ranks differ: one has pictures where
another has none, one has a film, one has no pair to compare, and in one step nobody has any media.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from mmrlhf.callbacks.gradients import GradientCheck
from mmrlhf.callbacks.sharding import Sharded
from mmrlhf.datamodules.collate import ScoredRow, collate
from mmrlhf.datamodules.rows import Answers, Critiques
from mmrlhf.modules.critic import CritiqueRewardModule, RewardPlan
from mmrlhf.modules.loading import BackboneConfig, Freeze, Lora
from mmrlhf.modules.mmdpo import MMDPOModule, Plan
from mmrlhf.modules.optimiser import Optimiser
from mmrlhf.modules.saving import save_folder
from mmrlhf.prompts import Template

from ..datamodules.made import sample
from ..modules.families import SUPPORTS, built
from ..modules.queries import FRAMES, samples

STEPS, GLOBAL_BATCH = 4, 4
TEMPLATE = Template("judge", "Judge it. Q: {question}\nA: {response}\nEvaluation:")
WORDS = ("It is right and clear.", "", "Wrong: there is no ring.")
NAMES = (
    ("image", "square", "text", "talk"),
    ("film", "tied", "images", "talk"),
    ("talk", "text", "text", "tied"),
    ("text", "images", "tied", "film"),
)
"""The queries of every step; with four ranks a column is a rank, with two a half."""


def queries(family):
    """All queries by name; where a family has no films, others stand for them."""
    kinds = [kind for kind in ("text", "image", "images", "film") if kind in SUPPORTS[family]]
    found = {case.ranked.query.id: case for case in samples(kinds)}
    found["tied"] = sample("tied", texts=("Yes.", "It is so."), ranks=(1, 1))
    found.setdefault("film", found["image"])
    return found


def judged(case):
    """The query with critiques of most of its responses."""
    told = tuple(
        dataclasses.replace(each, critique=WORDS[at % len(WORDS)]) for at, each in enumerate(case.ranked.responses)
    )
    return case._replace(ranked=dataclasses.replace(case.ranked, responses=told))


def batch(family, kind, names):
    """These queries as a micro-batch; what is known of a response depends on its query alone."""
    processor, known = built(family)[1], queries(family)
    encode = Answers(processor, FRAMES) if kind == "dpo" else Critiques(processor, FRAMES, TEMPLATE, "critique")
    rows = [encode(known[name] if kind == "dpo" else judged(known[name])) for name in names]
    scored = []
    for name, row in zip(names, rows, strict=True):
        chance = torch.Generator().manual_seed(sum(name.encode()))
        rewards, reference = (torch.randn(len(row.places), generator=chance) for _ in range(2))
        scored.append(ScoredRow(row, rewards, 4 * reference - 60, counted=True))
    return collate(scored, padding=processor.tokenizer.pad_token_id, layout="packed", pairs="all")


class Batches(lightning.LightningDataModule):
    """The micro-batches of a rank."""

    def __init__(self, family, kind, accumulated=1):
        super().__init__()
        self.family, self.kind, self.accumulated = family, kind, accumulated

    def train_dataloader(self):
        """As many per step as are accumulated."""
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        size = GLOBAL_BATCH // ranks // self.accumulated
        firsts = range(rank * size * self.accumulated, (rank + 1) * size * self.accumulated, size)
        mine = [names[first : first + size] for names in NAMES for first in firsts]
        return torch.utils.data.DataLoader(
            [batch(self.family, self.kind, names) for names in mine], batch_size=None, shuffle=False
        )

    def val_dataloader(self):
        """The same, without gradients."""
        return self.train_dataloader()


class Notes(lightning.Callback):
    """Keep the mean loss over all ranks of every step."""

    def __init__(self):
        self.losses, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Of a step."""
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        """Of a validation, whose losses are means over what is in a batch."""
        self.validated.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")))


def module_of(checkpoint, kind, lora=False, tower=False, again=False, dtype="float32", features=None, **options):
    """The module; `tower`: the vision tower is trained, `again`: activations are computed again."""
    backbone = BackboneConfig(
        str(checkpoint),
        dtype=dtype,
        freeze=Freeze(vision=not tower),
        lora=Lora(rank=3, alpha=6) if lora else None,
        activation_checkpointing=again,
        features=features and Path(features),
    )
    optimiser = Optimiser(learning_rate=1e-3, warmup=0.0, weight_decay=0.01)
    if kind == "dpo":
        module = MMDPOModule(backbone, optimiser=optimiser, **options)
        module.expect(Plan(STEPS, 2.5, (0.1, 0.5, 1.0)))
        return module
    module = CritiqueRewardModule(backbone, optimiser=optimiser, **options)
    module.expect(RewardPlan(STEPS, mean_pairs=2.5, mean_ties=0.7, mean_critiques=1.9))
    return module


def strategy_of(name, cpu_offload=False):
    """By name; `sharded:2` is in two replicas."""
    kind, _, replicas = name.partition(":")
    if kind == "sharded":
        return Sharded(replicas=int(replicas or 1), cpu_offload=cpu_offload, minutes=1.0)
    return DDPStrategy(process_group_backend="gloo") if kind == "ddp" else "auto"


def trainer_of(strategy, ranks=1, nodes=1, offload=False, **options):
    """A trainer that writes nothing down and says nothing."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return lightning.Trainer(
        accelerator="cpu",
        devices=ranks // nodes,
        num_nodes=nodes,
        strategy=strategy_of(strategy, offload),
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        **options,
    )


def train(folder, checkpoint, family, precision="32-true", clip=0.5, accumulated=1, machine=None, **told):
    """Train from the checkpoint; the first rank writes down losses, whole weights, and how much of them it held."""
    module, notes = module_of(checkpoint, **told), Notes()
    options = {"precision": precision, "gradient_clip_val": clip, "accumulate_grad_batches": accumulated}
    trainer = trainer_of(**machine or {"strategy": "one"}, **options, callbacks=[GradientCheck(), notes])
    batches = Batches(family, told["kind"], accumulated)
    with counted_sums() as summed:
        trainer.fit(module, datamodule=batches)
    trainer.validate(module, datamodule=batches, verbose=False)  # which leaves weights as they are computed with
    together = trainer.optimizers[0].defaults["foreach"]  # on a GPU, the others are by themselves
    assert together is (True if hasattr(trainer.strategy, "replicas") else None)
    whole = module.whole()
    if trainer.is_global_zero:
        trained = {name: weight.detach().clone() for name, weight in whole.named_parameters() if weight.requires_grad}
        torch.save(trained, folder / "weights.pt")
        found = {"losses": notes.losses, "validated": notes.validated, "held": held(module), "summed": len(summed)}
        (folder / "notes.json").write_text(json.dumps(found | {"world": trainer.world_size}))


@contextmanager
def counted_sums():
    """The sizes of what is summed over ranks as a whole, but for single numbers."""
    sizes, original = [], dist.all_reduce

    def counting(values, *told, **more):
        if values.numel() > 1:
            sizes.append(values.numel())
        return original(values, *told, **more)

    dist.all_reduce = counting
    try:
        yield sizes
    finally:
        dist.all_reduce = original


def held(module):
    """How many numbers of the weights are in this process."""
    return sum(
        weight.to_local().numel() if hasattr(weight, "to_local") else weight.numel() for weight in module.parameters()
    )


def save(folder, checkpoint, family, machine, **told):
    """Load, look at all batches, and save as it is; every rank compares its part with the checkpoint."""
    from transformers import AutoModelForImageTextToText

    module = module_of(checkpoint, **told)
    trainer = trainer_of(**machine)
    trainer.validate(module, datamodule=Batches(family, told["kind"]), verbose=False)
    whole = module.whole()
    plain = dict(AutoModelForImageTextToText.from_pretrained(checkpoint).named_parameters())
    for name, weight in module.scorer.backbone.model.named_parameters():
        assert torch.equal(weight.full_tensor(), plain[name]), name
    if trainer.is_global_zero:
        save_folder(whole.backbone, built(family)[1], folder / "saved", "# A card")


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    train(Path(sys.argv[1]), **given)
