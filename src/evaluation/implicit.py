"""The verb `implicit-rewards`: what a policy prefers over its reference, in the layout of a reward model's scores."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from .. import jsonl
from ..fields import RecordError
from ..fingerprint import Fingerprint
from ..ledger import Ledger
from ..records import ResponseScore

log = logging.getLogger(__name__)
_VALUES, _LOGPS, _MODEL, _PROCESSOR = "values", "reference_logp", "model", "processor"
_CURE = "run `mmrlhf score --reference` with both checkpoints on the same shards"


def implicit_rewards(
    policy: Path,
    reference: Path,
    out: Path,
    beta: float = 0.1,
    other_processor: bool = False,
    max_skipped: float = 0.0,
) -> None:
    """Write a policy's implicit DPO rewards: beta times its log-prob of a response less that of the reference.

    Both files are made by `mmrlhf score --reference`, of the same shards; what stands beside them must say so. The
    result is read as any rewards are.

    Args:
        policy: File of scores of the trained policy.
        reference: File of scores of the policy as it was before the training.
        out: File of rewards, JSON lines; beside it is written what it was made from.
        beta: The β of the training; it scales the rewards.
        other_processor: Whether the files of the two processors may differ, as where one was saved anew.
        max_skipped: The part of the responses that may be in one file alone, or have another text there.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta: expected a number above 0, got {beta}")
    made_from = _made_from(policy, reference, beta, other_processor)
    if out.exists():
        cure = "give another --out, or remove it"
        made_from.require(Fingerprint.read(out, cure), str(out), cure)
    ledger = Ledger("responses")
    rewards = list(implicit(_scores(policy), _scores(reference), beta, ledger))
    log.info("%s", ledger)
    ledger.check(max_skipped)
    if not rewards:
        raise ValueError(f"{policy} and {reference}: expected scores of the same responses, got none; {_CURE}")
    made_from.write(out)  # rewards without a fingerprint would be taken for those of another tool
    log.info("%s: %s rewards", out, f"{jsonl.write(out, rewards):,}")


def implicit(
    policy: Mapping[tuple[str, int], ResponseScore],
    reference: Mapping[tuple[str, int], ResponseScore],
    beta: float,
    ledger: Ledger,
) -> Iterator[ResponseScore]:
    """The rewards of all responses that both sides scored, in the policy's order; the others are counted."""
    for name, ours in policy.items():
        ledger.took()
        theirs = reference.get(name)
        if theirs is None:
            ledger.skip("no_reference", f"{name[0]}/{name[1]}")
        elif theirs.digest != ours.digest:
            ledger.skip("other_text", f"{name[0]}/{name[1]}")
        else:
            yield ResponseScore(ours.id, ours.response, ours.digest, beta * (_logp(ours) - _logp(theirs)))
            ledger.gave()
    for name in reference:
        if name not in policy:
            ledger.took()
            ledger.skip("no_policy", f"{name[0]}/{name[1]}")
    ledger.check()


def _logp(score: ResponseScore) -> float:
    if score.reference_logp is None:
        raise RecordError(
            f"score of response {score.response} of query {score.id!r}: expected a reference_logp, got none; {_CURE}"
        )
    return score.reference_logp


def _scores(path: Path) -> dict[tuple[str, int], ResponseScore]:
    rows = jsonl.read(path, ResponseScore.from_json, key=lambda row: f"{row.response} {row.id}")
    return {(row.id, row.response): row for row in rows}


def _made_from(policy: Path, reference: Path, beta: float, other_processor: bool) -> Fingerprint:
    """What the rewards are made from, once both sides prove to be of the same responses read in the same way."""
    sides = {path: dict(_fingerprint(path).parts) for path in (policy, reference)}
    ours, theirs = sides.values()
    if ours.get(_MODEL) == theirs.get(_MODEL):
        raise ValueError(
            f"{policy} and {reference}: expected scores of two models, got those of one, whose implicit rewards are 0; "
            "give the scores of the policy and those of its reference"
        )
    told = ours | {_VALUES: "reward", "beta": str(beta)} | {f"reference.{_MODEL}": theirs[_MODEL]}
    if other_processor:
        told[f"reference.{_PROCESSOR}"] = theirs[_PROCESSOR]
    may_differ = {_MODEL, _PROCESSOR} if other_processor else {_MODEL}
    alike = [Fingerprint({name: of[name] for name in of if name not in may_differ}) for of in (ours, theirs)]
    alike[0].require(alike[1], str(reference), f"{_CURE}, or see --other-processor")
    return Fingerprint(told)


def _fingerprint(path: Path) -> Fingerprint:
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of scores, found none; {_CURE}")
    found = Fingerprint.read(path, _CURE)
    if found.parts.get(_VALUES) != _LOGPS or not {_MODEL, _PROCESSOR} <= set(found.parts):
        told = found.parts.get(_VALUES, "nothing")
        raise ValueError(f"{path}: expected log-probs with their model and processor, got {told}; {_CURE}")
    return found
