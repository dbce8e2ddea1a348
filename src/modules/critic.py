"""The reward model in training: it writes a critique of every response, and scores it where the critique ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning
import torch

from ..records import DIMENSIONS
from ..reports import RewardReport, RewardTerms, Work
from .attention import Kernel
from .flops import Cost
from .loading import BackboneConfig
from .logps import ResponseLogps
from .losses import take
from .optimiser import Optimiser, require_fine
from .packed import Step, Way
from .reward import Judged, RewardHead, RewardReader, require_dimensions, width_of
from .rewardlosses import (
    RewardWeights,
    centre_loss,
    critique_nll,
    dimension_loss,
    ranking_loss,
    reward_loss,
    tie_loss,
)
from .rewardplan import RewardPlan
from .selfcheck import TwoWays, settle
from .sharded import Shard, built, gathered

if TYPE_CHECKING:
    from torch import Tensor

    from ..batches import PackedQueries, PackedRows
    from .backbone import Backbone


class CritiqueRewardModule(lightning.LightningModule):
    """A critique of every response, taught by its words, and a reward read where it ends (MM-RLHF, section 3.3).

    All responses of a query share one row. A response without a critique is asked for one in the same words, and its
    reward is read where the critique would begin; it has no part in the critiques' loss.

    Args:
        backbone: The checkpoint that learns to judge.
        weights: How much each term of the loss counts.
        dimensions: Scores beside the reward, learned from those of the annotators: helpfulness, faithfulness, ethics.
        step: One packed row per query, or a row per response; auto: the former where it is exact.
        chunk: At most so many rows of logits exist at once.
        kernel: How responses look back at a shared prefix.
        rows_at_once: Of separate rows, how many are kept for the backward pass; the others are computed again.
        head_seed: Decides the head's weights before the training.
        optimiser: How weights are moved.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        weights: RewardWeights = RewardWeights(),  # noqa: B008 - frozen
        dimensions: tuple[str, ...] = (),
        step: Step = "auto",
        chunk: int = 512,
        kernel: Kernel = "auto",
        rows_at_once: int | None = None,
        head_seed: int = 0,
        optimiser: Optimiser = Optimiser(),  # noqa: B008
    ) -> None:
        super().__init__()
        require_dimensions(dimensions)
        self.config, self.weights, self.dimensions = backbone, weights, tuple(dimensions)
        self.head_seed, self.optimiser = head_seed, optimiser
        self._way: dict[str, Any] = {"step": step, "chunk": chunk, "kernel": kernel, "rows_at_once": rows_at_once}
        self.reader: RewardReader | None = None
        self.shard: Shard | None = None
        """Set by a strategy that shards weights."""
        self.plan: RewardPlan | None = None
        self.validated_at = -1
        self._checked = False

    @property
    def needs(self) -> tuple[str, ...]:
        """What every response must have beside its text: nothing; scores that are not there are not learned."""
        return ()

    @property
    def task(self) -> str:
        """What is learned of the data."""
        return "critiques"

    def expect(self, plan: RewardPlan) -> None:
        """Take note of what the data tell, before the training."""
        self.plan = plan

    def configure_model(self) -> None:
        """Load the weights, or this rank's part, once, when the trainer asks; the head is new, and trained whole."""
        if self.reader is None:
            self.reader = built(self.config, self._over, self.shard)
            require_fine(self.reader)
            self._cost = Cost(self.reader.backbone)

    def _over(self, body: Backbone) -> RewardReader:
        # Float32 beside adapters on coarser weights too: what is trained must not be rounded.
        head = RewardHead(width_of(body), len(self.dimensions), seed=self.head_seed)
        return RewardReader(body, head, **self._way)

    def empty(self) -> RewardReader:
        """The reader without weights, of which shapes alone are known."""
        return self._over(self.config.shapes())

    def whole(self) -> RewardReader | None:
        """The reader with all its weights; of ranks that hold parts, on the first alone, and all must call it."""
        return gathered(self._reader, lambda: self._over(self.config.load()))

    def parts(self) -> dict[str, list[torch.nn.Parameter]]:
        """What is trained, by part of the body."""
        return self._reader.backbone.trained()

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own union
        """AdamW over the planned number of steps."""
        return self.optimiser.over(self, self._planned.steps)

    @property
    def _planned(self) -> RewardPlan:
        if self.plan is None:
            raise ValueError(
                "CritiqueRewardModule: expected `expect(RewardPlan(steps, mean_pairs, ...))` before the training; "
                "call it"
            )
        return self.plan

    @property
    def _reader(self) -> RewardReader:
        if self.reader is None:
            raise ValueError("CritiqueRewardModule: expected its weights to be loaded; call `configure_model()` first")
        return self.reader

    def training_step(self, batch: PackedQueries, batch_idx: int) -> dict[str, Any]:
        """The loss of a micro-batch, and what callbacks are told of it."""
        if not self._checked:
            self._checked = True
            settle(as_scorer(self._reader), self._reader, self._way["step"], batch.rows)
        judged = self._reader(batch.rows)
        terms = self._terms(batch, judged)
        loss = reward_loss(over_data(terms, self._planned, len(batch.ids)), self.weights)
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=len(batch.ids))
        return {"loss": loss, "report": report_of(batch, judged, terms), "work": self._work(batch)}

    def validation_step(self, batch: PackedQueries, batch_idx: int) -> dict[str, Any]:
        """The same without a gradient, over what is in the batch; a row that only fills it up has no part in it."""
        judged = self._reader(batch.rows)
        terms = self._terms(batch, judged)
        means = RewardTerms(*(losses.sum() / max(1, len(losses)) for losses in terms))
        loss = reward_loss(means, self.weights)
        return {"loss": loss, "report": report_of(batch, judged, terms), "work": self._work(batch)}

    def on_validation_end(self) -> None:
        """Remember after which step this was."""
        self.validated_at = self.trainer.global_step

    def _terms(self, batch: PackedQueries, judged: Judged) -> RewardTerms:
        """The losses of everything that the batch asks."""
        return RewardTerms(
            critique=critique_nll(judged.critiques.sums, judged.critiques.tokens),
            ranking=ranking_loss(judged.rewards, batch.pairs),
            tie=tie_loss(judged.rewards, batch.ties),
            centre=centre_loss(judged.rewards, batch.pairs),
            dimension=dimension_loss(judged.dimensions, self._annotated(batch)),
        )

    def _annotated(self, batch: PackedQueries) -> Tensor:
        """What people gave the responses in the dimensions that are learned, (responses, dimensions)."""
        return batch.scores[:, [DIMENSIONS.index(name) for name in self.dimensions]]

    def _work(self, batch: PackedQueries) -> Work:
        """What a micro-batch costs, from its shapes."""
        return self._cost.work(batch, self._reader.step == "shared_prefix", self.config.activation_checkpointing)


def over_data(terms: RewardTerms, plan: RewardPlan, queries: int) -> RewardTerms:
    """What the losses of a micro-batch of so many queries add to the mean of each term over the data, each ().

    So every pair, tie, critique and score weighs the same, into whatever micro-batches and ranks queries fall.
    """
    means = (plan.mean_critiques, plan.mean_pairs, plan.mean_ties, plan.mean_pairs, plan.mean_scores)
    kinds = ("mean_critiques", "mean_pairs", "mean_ties", "mean_pairs", "mean_scores")
    return RewardTerms(*(_share(*each, queries) for each in zip(terms, means, kinds, strict=True)))


def _share(losses: Tensor, mean: float, kind: str, queries: int) -> Tensor:
    if not len(losses):
        return losses.sum()
    if not mean > 0:
        raise ValueError(f"plan: expected {kind} above 0, got {mean} and {len(losses)} in a batch; count the data")
    return losses.sum() / (queries * mean)


def report_of(batch: PackedQueries, judged: Judged, terms: RewardTerms) -> RewardReport:
    """What callbacks are told."""
    chosen, rejected = take(judged.rewards.detach(), batch.pairs)
    one, other = take(judged.rewards.detach(), batch.ties)
    best, worse = take(batch.ranks, batch.pairs)
    counts = batch.responses.tolist()
    query = [number for number, count in enumerate(counts) for _ in range(count)]
    counted = torch.tensor([bool(batch.ids[number]) for number in query], device=judged.rewards.device)
    owners = [query[winner] for winner in batch.pairs[:, 0].tolist()]
    return RewardReport(
        margin=chosen - rejected,
        correct=chosen > rejected,
        chosen=chosen,
        rejected=rejected,
        rank_gap=worse - best,
        categories=tuple(batch.categories[owner] for owner in owners),
        ids=tuple(batch.ids[owner] for owner in owners),
        terms=RewardTerms(*(losses.detach() for losses in terms)),
        tie_distance=(one - other).abs(),
        rewards=judged.rewards.detach()[counted],
        critique_tokens=judged.critiques.tokens[judged.critiques.tokens > 0],
    )


def as_scorer(reader: RewardReader) -> TwoWays:
    """A reader as the self-check takes it: rewards and scores are compared beside the log-probs of critiques."""
    return _AsSums(reader)


class _AsSums(torch.nn.Module):
    """A reader all of whose numbers stand as sums of log-probs: a reward as that of one token."""

    def __init__(self, reader: RewardReader) -> None:
        super().__init__()
        self.reader = reader

    @property
    def backbone(self) -> Backbone:
        """That of the reader."""
        return self.reader.backbone

    def by(self, step: Way, rows: PackedRows) -> ResponseLogps:
        """All its numbers by a way that is named."""
        judged = self.reader.by(step, rows)
        scores = torch.cat([judged.rewards[:, None], judged.dimensions], dim=1).flatten()
        # asinh: differences of large rewards count by what they are of them, those of small ones as they are.
        sums = torch.cat([judged.critiques.sums, scores.asinh()])
        return ResponseLogps(sums, torch.cat([judged.critiques.tokens, torch.ones_like(scores, dtype=torch.long)]))
