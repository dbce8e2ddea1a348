"""Who takes part in bench/dpo_step.py: ours, all pairs as the paper's code has it, TRL's DPOTrainer, and the limit.

All take the same tokens and the same weights. Each call of a step adds its gradients to those of the weights.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dpo_shapes import IMAGE, PAD, Problem, Setting
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.nn import functional

from mmrlhf.batches import Continuation, pack
from mmrlhf.modules.backbone import backbone_of
from mmrlhf.modules.scorer import ResponseScorer

Batch = dict[str, Tensor]


def contestant(setting: Setting, name: str, problem: Problem) -> Callable[..., None]:
    """Somebody's step, in modules of its own around the weights of all."""
    policy, reference = twin(setting.policy), twin(setting.reference)
    for module in (policy, reference):
        module.model.language_model.layers[0].register_forward_pre_hook(setting.count, with_kwargs=True)
    if name == "naive":
        step = Naive(policy, reference, problem, setting.options.pairs_per_batch)
    elif name == "trl":
        step = Trl(policy, reference, problem, setting.processor, setting.options.pairs_per_batch)
        setting.ready["trl"] = step.collating
    else:
        step = Limit(policy, problem) if name == "limit" else Ours(policy, reference, problem, name)
    for own, copied in ((setting.policy, policy), (setting.reference, reference)):
        assert all(map(torch.equal, own.parameters(), copied.parameters())), f"{name} has other weights"
    return step


def twin(model: Any) -> Any:  # noqa: ANN401 - transformers is untyped
    """The same weights in modules of its own, which may be patched without touching the first."""
    shared = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def pair_batches(problem: Problem, pairs_per_batch: int) -> list[Batch]:
    """Chosen responses, then rejected ones, each with its own copy of the prompt and of the image."""
    return [
        _batch(problem, chosen.tolist() + rejected.tolist())
        for chosen, rejected in (part.T for part in problem.pairs.split(pairs_per_batch))
    ]


def _batch(problem: Problem, responses: list[int]) -> Batch:
    query = torch.tensor([number for number, several in enumerate(problem.responses) for _ in several])[responses]
    prefixes = [problem.prefixes[number] for number in query]
    texts = [response for several in problem.responses for response in several]
    ids = [torch.cat([prefix, texts[number]]) for prefix, number in zip(prefixes, responses, strict=True)]
    said = [(torch.arange(len(row)) >= len(prefix)).long() for row, prefix in zip(ids, prefixes, strict=True)]
    columns = {"input_ids": ids, "attention_mask": [torch.ones_like(row) for row in ids], "completion_mask": said}
    padded = {
        name: nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD) for name, rows in columns.items()
    }
    return padded | {"pixel_values": problem.pixel_values[query], "image_sizes": problem.image_sizes[query]}


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The norm of the difference of two gradients over the norm of the second."""
    norms = []
    for one, kept in zip(found, expected, strict=True):
        other = kept.to(one.device).float()
        norms.append((float((one.float() - other).norm()) ** 2, float(other.norm()) ** 2))
    apart, whole = map(sum, zip(*norms, strict=True))
    return float((apart / whole) ** 0.5)


# Ours -------------------------------------------------------------------------------------------------------


class Ours:
    """The package's scorer over packed rows, and the loss of DPO on what it says."""

    def __init__(self, policy: nn.Module, reference: nn.Module, problem: Problem, step: Any) -> None:  # noqa: ANN401
        device = next(policy.parameters()).device
        none = torch.empty(0, dtype=torch.long)
        segments = [[Continuation(none, response) for response in query] for query in problem.responses]
        features = {"pixel_values": problem.pixel_values, "image_sizes": problem.image_sizes}
        self.rows = move_data_to_device(pack(problem.prefixes, segments, features, pad=0), device)
        self.problem = move_data_to_device(problem, device)
        # Four long rows at once may not fit a GPU; half of them at a time are computed again in the backward pass.
        at_once = 2 if device.type == "cuda" and step == "separate" else None
        self.policy, self.reference = (
            ResponseScorer(backbone_of(model), step=step, chunk=512, rows_at_once=at_once)
            for model in (policy, reference)
        )

    def __call__(self, *, online: bool) -> None:
        said, reference = self.policy(self.rows).sums, self.problem.reference
        if online:
            with torch.no_grad():
                reference = self.reference(self.rows).sums
        chosen, rejected = (said - reference)[self.problem.pairs.T]
        loss = -functional.logsigmoid(self.problem.betas * (chosen - rejected)).mean()
        loss.backward()


# Naive ------------------------------------------------------------------------------------------------------


def full_logps(model: nn.Module, batch: Batch) -> Tensor:
    """(rows,): through log-probs of the whole vocabulary at every position, in float32."""
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (logps * batch["completion_mask"][:, 1:]).sum(-1)


def reference_logps(model: nn.Module, problem: Problem) -> Tensor:
    """(responses,): what is cached."""
    device = next(model.parameters()).device
    with torch.no_grad():
        batches = [_batch(problem, [number]) for number in range(len(problem.reference))]
        return torch.cat([full_logps(model, move_data_to_device(batch, device)) for batch in batches]).cpu()


class Naive:
    """Every pair is a batch of two rows, or a few pairs of as many rows; gradients add up."""

    def __init__(self, policy: nn.Module, reference: nn.Module, problem: Problem, pairs_per_batch: int) -> None:
        self.policy, self.reference = policy, reference
        device = next(policy.parameters()).device
        self.problem = move_data_to_device(problem, device)
        self.size = pairs_per_batch
        self.batches = move_data_to_device(pair_batches(problem, pairs_per_batch), device)

    def __call__(self, *, online: bool) -> None:
        parts = zip(self.batches, self.problem.pairs.split(self.size), self.problem.betas.split(self.size), strict=True)
        for batch, pairs, betas in parts:
            logps = full_logps(self.policy, batch)
            reference = self.problem.reference[pairs.T.flatten()]
            if online:
                with torch.no_grad():
                    reference = full_logps(self.reference, batch)
            chosen, rejected = (logps - reference).chunk(2)
            loss = -functional.logsigmoid(betas * (chosen - rejected)).sum() / len(self.problem.pairs)
            loss.backward()


# TRL --------------------------------------------------------------------------------------------------------


class Trl:
    """The real DPOTrainer: its collator, its `training_step`, its loss.

    Three things are done to it from outside. Its one beta is set to each pair's before the pair's step. On a CPU it
    is told that its kernel's device scores labels only, as it does on CUDA. And with `online` off, reference
    log-probs are put into its batches, which it refuses for images by itself.
    """

    def __init__(
        self, policy: nn.Module, reference: nn.Module, problem: Problem, processor: object, pairs_per_batch: int
    ) -> None:
        import trl
        from datasets import Dataset

        device = next(policy.parameters()).device
        parts = problem.pairs.split(pairs_per_batch)
        self.betas = problem.betas.to(device).split(pairs_per_batch)
        self.folder = tempfile.TemporaryDirectory()
        if device.type == "cpu":
            trl.trainer.utils._use_triton = lambda _: True  # noqa: SLF001
        arguments = trl.DPOConfig(
            self.folder.name,
            use_cpu=device.type == "cpu",
            bf16=False,  # the weights have the dtype that they have; nothing is cast on the way
            gradient_checkpointing=False,
            per_device_train_batch_size=pairs_per_batch,
            gradient_accumulation_steps=len(parts),
            max_length=None,
            report_to=[],
        )
        data = Dataset.from_list(_examples(problem, parts[0]))
        self.trainer = trl.DPOTrainer(policy, reference, arguments, train_dataset=data, processing_class=processor)
        self.trainer.current_gradient_accumulation_steps = len(parts)  # as its `train` does
        started = time.perf_counter()
        batches = [dict(self.trainer.data_collator(_examples(problem, pairs))) for pairs in parts]
        self.collating = time.perf_counter() - started
        for theirs, ours, pairs in zip(batches, pair_batches(problem, pairs_per_batch), parts, strict=True):
            assert all(torch.equal(theirs[name], ours[name]) for name in ours), "not the same tokens or pixels"
            theirs["ref_chosen_logps"], theirs["ref_rejected_logps"] = problem.reference[pairs.T]
        self.batches = move_data_to_device(batches, device)

    def __call__(self, *, online: bool) -> None:
        self.trainer.precompute_ref_logps = not online
        for batch, betas in zip(self.batches, self.betas, strict=True):
            self.trainer.beta = betas
            self.trainer.training_step(self.trainer.model, batch)


def _examples(problem: Problem, pairs: Tensor) -> list[dict[str, Any]]:
    """Pairs as TRL's data sets have them."""
    said = [(query, text) for query in problem.queries for text in query.responses]
    return [
        {
            "images": [said[chosen][0].image],
            "prompt": said[chosen][0].prompt,
            "chosen": said[chosen][1],
            "rejected": said[rejected][1],
        }
        for chosen, rejected in pairs.tolist()
    ]


# The limit --------------------------------------------------------------------------------------------------


class Limit:
    """One ordinary causal pass, forward and backward, over as many tokens as there are unique ones.

    It computes nothing that trains; no step that looks at every token once can be faster by much. The image is
    encoded, and logits are made at as many positions as the responses have.
    """

    def __init__(self, policy: nn.Module, problem: Problem) -> None:
        self.policy = policy
        rows = [torch.cat([prefix, *texts]) for prefix, texts in zip(problem.prefixes, problem.responses, strict=True)]
        inputs = {
            "input_ids": torch.stack(rows),
            "pixel_values": problem.pixel_values,
            "image_sizes": problem.image_sizes,
        }
        self.inputs = move_data_to_device(inputs, next(policy.parameters()).device)
        self.scored = problem.response_tokens // len(rows)

    def __call__(self) -> None:
        logits = self.policy(**self.inputs, use_cache=False, logits_to_keep=self.scored + 1).logits[:, :-1]
        targets = self.inputs["input_ids"][:, -self.scored :]
        functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).backward()


def useful_flops(model: Any, problem: Problem) -> float:  # noqa: ANN401
    """Each unique token once, forward and backward, logits where responses are; the frozen tower forward only."""
    text = model.config.text_config
    prefix, image = sum(map(len, problem.prefixes)), sum(int((ids == IMAGE).sum()) for ids in problem.prefixes)
    looks = 0.0
    for ids, responses in zip(problem.prefixes, problem.responses, strict=True):
        looks += len(ids) * (len(ids) + 1) / 2
        looks += sum(len(one) * len(ids) + len(one) * (len(one) + 1) / 2 for one in responses)
    forward = 2 * _weights(model.model.language_model) * (prefix + problem.response_tokens)
    forward += 4 * text.hidden_size * text.num_hidden_layers * looks
    forward += 2 * _weights(model.model.multi_modal_projector) * image
    forward += 2 * text.hidden_size * text.vocab_size * problem.response_tokens
    return 3 * forward + _tower_flops(model, problem)


def _tower_flops(model: Any, problem: Problem) -> float:  # noqa: ANN401
    vision = model.config.vision_config
    tiles, patches = problem.pixel_values[..., 0, 0, 0].numel(), (vision.image_size // vision.patch_size) ** 2
    looking = 4 * vision.hidden_size * vision.num_hidden_layers * patches**2
    return tiles * (2 * _weights(model.model.vision_tower) * patches + looking)


def _weights(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


# Memory -----------------------------------------------------------------------------------------------------


def peak_mib(step: Callable[[], None], gpu: bool) -> float:
    """How much memory a step takes at most, above what there is before it."""
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    resident = _resident("VmRSS")
    step()
    return round((_resident("VmHWM") - resident) / 1024, 1)


def _resident(field: str) -> int:
    """Of this process, in KiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])
