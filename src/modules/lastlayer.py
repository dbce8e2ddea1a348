"""The last layer of a decoder, computed for those tokens alone whose states somebody reads.

Of a packed row only the states are read that predict a supervised token. All layers but the last need every token, as
later ones look back at them; of the last one the rest is of no use, in the forward and in the backward pass.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from .attention import SharedPrefixes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
"""Of a layer that normalises before attention and before its network, as all families with shared prefixes have it."""


def shorten(decoder: Any) -> None:  # noqa: ANN401 - transformers is untyped
    """Let the last layer of a decoder leave out what is not read, where a layout says what is."""
    layer = decoder.layers[-1]
    short = isinstance(layer.forward, partial)  # adapters make a second backbone of the same decoder
    if not short and {name for name, _ in layer.named_children()} == set(PARTS):
        layer.forward = partial(_only_needed, layer, layer.forward)


def _only_needed(
    layer: Any,  # noqa: ANN401
    whole: Callable[..., Any],
    hidden_states: Tensor,
    *args: Any,  # noqa: ANN401
    shared_prefix: SharedPrefixes | None = None,
    **others: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """The layer of a packed row, (1, needed tokens, width); of any other row, as it is."""
    if shared_prefix is None or shared_prefix.needed is None:
        return whole(hidden_states, *args, shared_prefix=shared_prefix, **others)
    layout = shared_prefix._replace(last=True)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), shared_prefix=layout, **others)
    states = (hidden_states + attended)[:, shared_prefix.needed]
    return states + layer.mlp(layer.post_attention_layernorm(states))
