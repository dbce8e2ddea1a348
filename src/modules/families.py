"""The table of backbone families: where each keeps its parts, and what it does with media and positions.

To add a family is to add a row; `tests/modules` then runs it against the family's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["vision", "projector", "language"]


@dataclass(frozen=True)
class Medium:
    """One kind of media: which token stands for it, and how its features are obtained."""

    token: str
    """The name of its token's number in the config."""
    pixels: str
    """The processor's name for its pixels; a batch without it has none of this kind."""
    method: str
    """The method of the inner model that makes features, projected, in the order of the tokens."""
    arguments: tuple[str, ...]
    """What the processor tells beside the pixels, and the method takes where it is there."""


def _image(*arguments: str) -> Medium:
    return Medium("image_token_id", "pixel_values", "get_image_features", arguments)


def _video(*arguments: str) -> Medium:
    return Medium("video_token_id", "pixel_values_videos", "get_video_features", arguments)


def _masks_with_blocks(config: Any, embeds: Tensor, mask: Tensor, positions: Tensor, types: Tensor) -> Any:  # noqa: ANN401
    """Gemma's masks: a picture's tokens see each other, some layers see a window only."""
    from transformers.models.gemma3 import modeling_gemma3 as gemma3

    return gemma3.create_masks_for_vision_model(
        config=config,
        inputs_embeds=embeds,
        attention_mask=mask,
        past_key_values=None,
        position_ids=positions,
        block_sequence_ids=gemma3.get_block_sequence_ids_for_mask(types, device=embeds.device),
    )


@dataclass(frozen=True)
class Family:
    """A row of the table. Paths start at the inner model, the one without a head."""

    name: str
    vision: str
    """The vision tower."""
    decoder: str = "language_model"
    projector: tuple[str, ...] = ("multi_modal_projector",)
    """What stands between tower and decoder; may lie inside the tower."""
    media: tuple[Medium, ...] = field(default_factory=lambda: (_image(),))
    positions: Literal["running", "mrope"] = "running"
    """One number per token, or three of time, height and width."""
    token_types: str = ""
    """What the processor calls the types of tokens, where positions or masks follow from them."""
    masks: Callable[[Any, Tensor, Tensor, Tensor, Tensor], Any] | None = None
    """Where a token may see later ones, so that a prefix cannot be shared: how masks of ordinary rows are made."""

    def part_of(self, name: str) -> Part:
        """To which part a parameter belongs, by its name in the whole model.

        >>> qwen = FAMILIES["qwen2_vl"]
        >>> [qwen.part_of(f"{name}.weight") for name in ("model.visual.merger.0", "model.visual.blocks.0", "lm_head")]
        ['projector', 'vision', 'language']
        """
        path = f".{name}"
        if any(f".{projector}." in f"{path}." for projector in self.projector):
            return "projector"
        return "vision" if f".{self.vision}." in path else "language"


_LLAVA = ("multi_modal_projector", "image_newline")
_QWEN: dict[str, Any] = {
    "vision": "visual",
    "projector": ("visual.merger",),
    "media": (_image("image_grid_thw"), _video("video_grid_thw")),
    "positions": "mrope",
    "token_types": "mm_token_type_ids",
}
_IDEFICS: dict[str, Any] = {
    "vision": "vision_model",
    "projector": ("connector",),
    "decoder": "text_model",
    "media": (_image("pixel_attention_mask"),),
}

FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        Family(
            "llava_onevision",
            "vision_tower",
            projector=_LLAVA,
            media=(_image("image_sizes", "batch_num_images"), _video()),
        ),
        Family("llava_next", "vision_tower", projector=_LLAVA, media=(_image("image_sizes"),)),
        Family("llava", "vision_tower"),
        Family("qwen2_vl", **_QWEN),
        Family("qwen2_5_vl", **_QWEN),
        Family("internvl", "vision_tower"),
        Family("idefics3", **_IDEFICS),
        Family("smolvlm", **_IDEFICS),
        Family("gemma3", "vision_tower", token_types="token_type_ids", masks=_masks_with_blocks),  # noqa: S106
    )
}
"""By the `model_type` of a checkpoint's config."""


def family_of(config: Any) -> Family:  # noqa: ANN401 - transformers is untyped
    """The row of a checkpoint's family."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(
            f"unknown backbone family {kind!r}; known: {', '.join(sorted(FAMILIES))}; convert the checkpoint to one of "
            "these (transformers' own classes), or add a row to the table of families"
        )
    return FAMILIES[kind]


def why_not_shared(config: Any) -> str:  # noqa: ANN401
    """Why a prefix cannot be shared by several responses in this model; empty where it can.

    Responses behind one prefix are exact where every layer is causal and sees everything before it. What is not
    known to be so is refused.
    """
    family, text = family_of(config), config.get_text_config()
    if family.masks is not None:
        return f"in {family.name} tokens of a picture see later ones"
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"its decoder has layers of {', '.join(sorted(kinds))}"
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        return f"its decoder sees a window of {text.sliding_window:,} tokens"
    if getattr(text, "attention_chunk_size", None):
        return "its decoder sees chunks"
    known = {"qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "llama", "mistral"}
    return "" if text.model_type in known else f"its decoder ({text.model_type}) is not known to be plainly causal"
