"""The tensors of a LLaVA-OneVision with a reward head as the authors of MM-RLHF name them, and as we do.

Their classes stand on LLaVA's, which wrap the vision tower twice and keep the decoder without a name of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..ledger import Ledger

Shapes = Mapping[str, tuple[int, ...]]
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "rm_head"
"""What tells the size of the vocabulary, and where the reward head is."""
CHAT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'video' %}<video>\n"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The turns as LLaVA lays them out: ChatML that always has a system turn. The one on the hub is another."""
_PARTS = {
    "lm_head.": "lm_head.",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
    "model.image_newline": "model.image_newline",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    f"{HEAD}.dense.": "reward_head.dense.",
    f"{HEAD}.out_proj.": "reward_head.out.",
}
_COMPUTED = (".inv_freq", ".position_ids")
_ARITHMETIC = ("hidden_act", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps")
_FIRST = 3


def renamed(theirs: Shapes, ours: Shapes) -> tuple[dict[str, str], Ledger]:
    """Our name for each of their tensors, and the account of all of them; all of ours are there, in their shapes.

    What follows from the configuration is left out, under the reason `computed`.
    """
    if not any(name.startswith(f"{HEAD}.") for name in theirs):
        raise ValueError(
            f"expected a reward head ({HEAD}.dense and {HEAD}.out_proj), got none among {len(theirs):,} tensors; this "
            "is a policy, or was saved without its head: give the checkpoint of a reward model"
        )
    # transformers had another module around the tower's once.
    spelled = {name.replace("vision_tower.vision_model.", "vision_tower."): name for name in ours}
    ledger = Ledger("convert")
    ledger.took(len(theirs))
    names = {name: spelled.get(_in_parts(name), "") for name in sorted(theirs) if not name.endswith(_COMPUTED)}
    _require_all(names, theirs, ours)
    for name in theirs.keys() - names:
        ledger.skip("computed", name)
    ledger.gave(len(set(names.values())))
    ledger.check()
    return names, ledger


def require_same_arithmetic(theirs: Mapping[str, Any], text: Any) -> None:  # noqa: ANN401 - transformers is untyped
    """Refuse a decoder that computes otherwise, which shapes would not show; `theirs` is their configuration."""
    ours = {name: getattr(text, name) for name in _ARITHMETIC}
    ours["rope_theta"], ours["use_sliding_window"] = text.rope_parameters["rope_theta"], text.use_sliding_window
    other = [f"{name} {theirs.get(name)}, not {value}" for name, value in ours.items() if theirs.get(name) != value]
    if other or text.rope_parameters["rope_type"] != "default":
        raise ValueError(
            f"expected a configuration that computes as the body does, with plain rotary positions; got "
            f"{'; '.join(other) or text.rope_parameters}; give the body that the checkpoint was trained from"
        )


def _in_parts(name: str) -> str:
    """Our name of a tensor, "" where we have none."""
    return next((ours + name.removeprefix(part) for part, ours in _PARTS.items() if name.startswith(part)), "")


def _require_all(names: Mapping[str, str], theirs: Shapes, ours: Shapes) -> None:
    """Refuse tensors that are not ours, are not there, or have another shape."""
    faults = {
        "missing": sorted(ours.keys() - names.values()),
        "unexpected": [name for name, target in names.items() if not target],
        "misshapen": [
            f"{name} {theirs[name]} instead of {ours[target]}"
            for name, target in names.items()
            if target and theirs[name] != ours[target]
        ],
    }
    if any(faults.values()):
        raise ValueError(
            f"expected the {len(ours):,} tensors of the body and of a reward head; "
            f"{'; '.join(f'{len(found):,} {kind} ({_first(found)})' for kind, found in faults.items() if found)}; "
            "fetch all of its files, or give the body that it was trained from"
        )


def _first(found: Sequence[str]) -> str:
    return ", ".join(found[:_FIRST]) + ", ..." * (len(found) > _FIRST)
