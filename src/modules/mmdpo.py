"""MM-DPO: ranked responses, all pairs of a query from one forward, and one beta per pair."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import lightning
import torch

from ..reports import PairReport, Work
from .attention import Kernel
from .betas import Evidence, ImplicitBeta, PairBeta, RewardMarginBeta, updated_gap
from .flops import Cost
from .loading import BackboneConfig
from .losses import PreferenceLoss, Sigmoid, log_ratio, response_nll, take
from .margins import MarginSource, margins, pair_chances
from .optimiser import Optimiser, require_fine
from .packed import Step
from .scorer import ResponseScorer
from .selfcheck import settle
from .sharded import Shard, built, gathered

if TYPE_CHECKING:
    from torch import Tensor

    from ..batches import PackedQueries
    from .backbone import Backbone
    from .logps import ResponseLogps

Weighting = Literal["pair", "query"]


class Plan(NamedTuple):
    """What the data tell the training before it begins."""

    steps: int
    """Optimizer steps in all."""
    mean_pairs: float
    """Pairs per training query."""
    margins: tuple[float, ...] = ()
    """Of all training pairs, where the beta needs to know them."""


class MMDPOModule(lightning.LightningModule):
    """Direct preference optimisation with a beta that follows the margin of each pair (MM-RLHF, section 4.2).

    The policy alone is in memory: what the reference says of a response comes with the data (`mmrlhf score`).

    Args:
        backbone: The checkpoint that is aligned.
        beta: How beta follows from what is known of a pair.
        loss: What is asked of a pair.
        margin: Who says by how much a response is the better one: a reward model (the scores of the data), the
            annotators by rank or by score, or the policy itself (implicit).
        sft_weight: Of the negative log-likelihood per token of the chosen response, added to the loss of each pair.
        weighting: Whether every pair weighs the same over the data, or every query.
        step: One packed row per query, or a row per response; auto: the former where it is exact.
        chunk: At most so many rows of logits exist at once.
        kernel: How responses look back at a shared prefix.
        rows_at_once: Of separate rows, how many are kept for the backward pass; the others are computed again.
        optimiser: How weights are moved.
    """

    usual_gap: Tensor
    known: Tensor

    def __init__(
        self,
        backbone: BackboneConfig,
        beta: PairBeta = RewardMarginBeta(),  # noqa: B008 - frozen
        loss: PreferenceLoss = Sigmoid(),  # noqa: B008
        margin: MarginSource = "reward",
        sft_weight: float = 0.25,
        weighting: Weighting = "pair",
        step: Step = "auto",
        chunk: int = 512,
        kernel: Kernel = "auto",
        rows_at_once: int | None = None,
        optimiser: Optimiser = Optimiser(),  # noqa: B008
    ) -> None:
        super().__init__()
        if sft_weight < 0:
            raise ValueError(f"sft_weight: expected 0 or more, got {sft_weight}; 0.25 is usual")
        self.config, self.beta, self.loss, self.margin = backbone, beta, loss, margin
        self.sft_weight, self.weighting, self.optimiser = sft_weight, weighting, optimiser
        self._way: dict[str, Any] = {"step": step, "chunk": chunk, "kernel": kernel, "rows_at_once": rows_at_once}
        self.scorer: ResponseScorer | None = None
        self.shard: Shard | None = None
        """Set by a strategy that shards weights."""
        self.plan: Plan | None = None
        self.validated_at = -1
        self._checked = False
        self.register_buffer("usual_gap", torch.tensor(torch.nan))
        self.register_buffer("known", torch.empty(0), persistent=False)

    @property
    def margin_needed(self) -> bool:
        """Whether a pair without a margin cannot be trained on."""
        return self.beta.needs_margin or self.beta.needs_known or self.loss.needs_margin

    @property
    def needs(self) -> tuple[str, ...]:
        """What every response must have beside its text."""
        of_margin = {"reward": ("reward",), "annotated": ("annotated",)}.get(self.margin, ())
        return ("reference_logp", *(of_margin if self.margin_needed else ()))

    def expect(self, plan: Plan) -> None:
        """Take note of what the data tell, before the training."""
        self.plan = plan
        self.known = torch.tensor(plan.margins, dtype=torch.float32).sort().values

    def configure_model(self) -> None:
        """Load the weights, or this rank's part, once, when the trainer asks for them."""
        if self.scorer is None:
            self.scorer = built(self.config, self._over, self.shard)
            require_fine(self.scorer)
            self._cost = Cost(self.scorer.backbone)

    def _over(self, body: Backbone) -> ResponseScorer:
        return ResponseScorer(body, **self._way)

    def empty(self) -> ResponseScorer:
        """The scorer without weights, of which shapes alone are known."""
        return self._over(self.config.shapes())

    def whole(self) -> ResponseScorer | None:
        """The scorer with all its weights; of ranks that hold parts, on the first alone, and all must call it."""
        return gathered(self._scorer, lambda: self._over(self.config.load()))

    def parts(self) -> dict[str, list[torch.nn.Parameter]]:
        """What is trained, by part of the model."""
        return self._scorer.backbone.trained()

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own union
        """AdamW over the planned number of steps."""
        return self.optimiser.over(self, self._planned.steps)

    @property
    def _planned(self) -> Plan:
        if self.plan is None:
            raise ValueError("MMDPOModule: expected `expect(Plan(steps, mean_pairs))` before the training; call it")
        return self.plan

    @property
    def _scorer(self) -> ResponseScorer:
        if self.scorer is None:
            raise ValueError("MMDPOModule: expected its weights to be loaded; call `configure_model()` first")
        return self.scorer

    def training_step(self, batch: PackedQueries, batch_idx: int) -> dict[str, Any]:
        """The loss of a micro-batch, and what callbacks are told of it."""
        if not self._checked:
            self._checked = True
            settle(self._scorer, self._scorer, self._way["step"], batch.rows)
        losses, report = self._compare(batch, self._scorer(batch.rows))
        self._remember(report)
        loss = self._weighed(losses, batch)
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=len(batch.ids))
        return {"loss": loss, "pairs": report, "work": self._work(batch)}

    def validation_step(self, batch: PackedQueries, batch_idx: int) -> dict[str, Any]:
        """The same without a gradient; a row that only fills up a batch makes no pair."""
        losses, report = self._compare(batch, self._scorer(batch.rows))
        return {"loss": losses.sum() / max(1, len(losses)), "pairs": report, "work": self._work(batch)}

    def on_validation_end(self) -> None:
        """Remember after which step this was."""
        self.validated_at = self.trainer.global_step

    def _compare(self, batch: PackedQueries, logps: ResponseLogps) -> tuple[Tensor, PairReport]:
        """The loss of every pair, (pairs,), and what there is to tell of it."""
        assert batch.reference_logps.dtype == batch.rewards.dtype == torch.float32, batch.rewards.dtype
        policy, reference = take(logps.sums, batch.pairs), take(batch.reference_logps, batch.pairs)
        z = log_ratio(policy, reference)
        gap = z.detach()
        margin = margins(self.margin, batch, gap, self.beta.beta0, required=self.margin_needed)
        beta = self.beta(Evidence(margin, gap, pair_chances(batch), self.usual_gap, self.known))
        if self.loss.mean_logps:
            tokens = logps.tokens.clamp(min=1)
            z = log_ratio(take(logps.sums / tokens, batch.pairs), take(batch.reference_logps / tokens, batch.pairs))
        losses = self.loss(z, beta, margin)
        if self.sft_weight:
            losses = losses + self.sft_weight * response_nll(logps.sums, logps.tokens, batch.pairs)
        winners, losers = batch.pairs.unbind(1)
        categories = _per_response(batch)
        report = PairReport(
            margin=margin,
            beta=beta,
            gap=gap,
            chosen_logps=policy.chosen.detach(),
            rejected_logps=policy.rejected.detach(),
            reference_chosen=reference.chosen,
            reference_rejected=reference.rejected,
            loss=losses.detach(),
            rank_gap=batch.ranks[losers] - batch.ranks[winners],
            categories=tuple(categories[winner] for winner in winners.tolist()),
            beta0=self.beta.beta0,
            cap=self.beta.cap,
        )
        return losses, report

    def _weighed(self, losses: Tensor, batch: PackedQueries) -> Tensor:
        """One number from the losses of a micro-batch, so that its pairs weigh as they do over the whole data."""
        queries = len(batch.ids)
        if self.weighting == "pair":
            return losses.sum() / (queries * self._planned.mean_pairs)
        owner = torch.arange(queries, device=losses.device).repeat_interleave(batch.responses)[batch.pairs[:, 0]]
        return (losses / torch.bincount(owner, minlength=queries)[owner]).sum() / queries

    def _remember(self, report: PairReport) -> None:
        """Follow the usual gap, over all ranks, where beta is compared with it."""
        if isinstance(self.beta, ImplicitBeta):
            gaps = self.trainer.strategy.reduce(self.beta.beta0 * report.gap.mean(), reduce_op="mean")
            self.usual_gap = updated_gap(self.usual_gap, torch.as_tensor(gaps).reshape(1), self.beta.momentum)

    def _work(self, batch: PackedQueries) -> Work:
        """What a micro-batch costs, from its shapes."""
        return self._cost.work(batch, self._scorer.step == "shared_prefix", self.config.activation_checkpointing)

    def pull(self, margin: Tensor) -> Tensor:
        """How hard the loss pulls at z where the policy is the reference still, |dloss / dz|, per margin."""
        z = torch.zeros_like(margin, requires_grad=True)
        half = torch.full_like(margin, 0.5)
        beta = self.beta(Evidence(margin, z.detach(), half, self.usual_gap, self.known))
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.loss(z, beta, margin).sum(), z)
        return slope.abs()


def _per_response(batch: PackedQueries) -> list[str]:
    """The category of every response of the batch."""
    counts = batch.responses.tolist()
    return [category for category, count in zip(batch.categories, counts, strict=True) for _ in range(count)]
