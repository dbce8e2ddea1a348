"""The vision tower of any family, cut where its projector begins: what it encodes by itself, and what is read of it.

The table of families tells where tower and projector are. Which states a family reads is not told anywhere: it is
found out by watching, so nothing here repeats what transformers decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import jsonl
from ..fingerprint import Fingerprint, of_value

if TYPE_CHECKING:
    from torch import Tensor

    from .backbone import Backbone

KEY = 16
"""Bytes of a key: of a million million pieces, two share one by a chance of one in 10^15."""
_PASSING = ("_", "transformers_version", "dtype", "torch_dtype")
"""Of a tower's config, what says nothing of its numbers."""


class Piece(NamedTuple):
    """What a tower encodes by itself."""

    pixels: Tensor
    beside: Tensor | None
    """What it is told of them: which are real, or how many patches are in a column and in a row."""

    @property
    def key(self) -> bytes:
        """What stands for all of it."""
        digest = hashlib.sha256(repr((self.pixels.dtype, *self.shapes)).encode())
        for each in self:
            if each is not None:
                digest.update(raw_bytes(each))
        return digest.digest()[:KEY]

    @property
    def shapes(self) -> tuple[torch.Size | None, ...]:
        """What pieces must have in common to be encoded at once."""
        return tuple(None if each is None else each.shape for each in self)


class _Output:
    """Stands for the output of a tower: what is read of it, is taken by name."""

    def __init__(self, take: Callable[[str], Tensor], pooler_output: Any = None) -> None:  # noqa: ANN401
        self.take, self.pooler_output = take, pooler_output

    @property
    def last_hidden_state(self) -> Tensor:
        """Of the last layer."""
        return self.take("last_hidden_state")

    @property
    def hidden_states(self) -> _Layers:
        """Of any layer, by its number."""
        return _Layers(self.take)


class _Layers:
    def __init__(self, take: Callable[[str], Tensor]) -> None:
        self.take = take

    def __getitem__(self, layer: int) -> Tensor:
        return self.take(f"hidden_states {layer}")


class _Tiles:
    """A tower that takes tiles one behind the other, and whose family reads some of its states."""

    arguments = ("pixel_values", "patch_attention_mask")

    def __init__(self, module: Any) -> None:  # noqa: ANN401 - transformers is untyped
        self.module = module

    def pieces(self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None) -> list[Piece]:
        """Every tile, with its mask where there is one."""
        masks = [None] * len(pixel_values) if patch_attention_mask is None else list(patch_attention_mask.cpu())
        return [Piece(*each) for each in zip(pixel_values.cpu(), masks, strict=True)]

    def encode(self, pieces: Sequence[Piece], names: Sequence[str], told: Mapping[str, Any]) -> list[Tensor]:
        """The states of each tile, computed at once."""
        device = next(self.module.parameters()).device
        masks = [piece.beside.to(device) for piece in pieces if piece.beside is not None]
        beside = {"patch_attention_mask": torch.stack(masks)} if masks else {}
        found = self.module(torch.stack([piece.pixels for piece in pieces]).to(device), **beside, **told)
        return list(torch.stack([_state(found, name) for name in names], 1))

    def output(self, states: Sequence[Tensor], names: Sequence[str]) -> _Output:
        """What the tower would put out for tiles of these states."""
        found = dict(zip(names, torch.stack(list(states)).unbind(1), strict=True))

        def take(name: str) -> Tensor:
            if name not in found:
                raise ValueError(
                    f"features: expected {name} of the tower, they hold {', '.join(found)}; make the features again"
                )
            return found[name]

        return _Output(take)


class _Patches:
    """A tower that takes the patches of all pictures in one row, and whose last part is the projector."""

    arguments = ("hidden_states", "grid_thw")

    def __init__(self, module: Any, projector: str) -> None:  # noqa: ANN401
        self.module, self.projector = module, projector

    def pieces(self, hidden_states: Tensor, grid_thw: Tensor) -> list[Piece]:
        """Every picture, and every frame of a film: patches of two frames do not see each other."""
        frames = [torch.tensor([high, wide]) for time, high, wide in grid_thw.tolist() for _ in range(time)]
        parts = torch.split(hidden_states.cpu(), [int(frame.prod()) for frame in frames])
        return [Piece(*each) for each in zip(parts, frames, strict=True)]

    def encode(self, pieces: Sequence[Piece], names: Sequence[str], told: Mapping[str, Any]) -> list[Tensor]:
        """The projector's input; towers with windows put it in another order, which a projector of numbers tells."""
        device = next(self.module.parameters()).device
        group, read = self.module.spatial_merge_size**2, []

        def numbers(states: Tensor) -> Tensor:
            read.append(states.reshape(-1, group, states.shape[-1]))
            return torch.arange(len(read[0]), device=device)[:, None]

        sizes = torch.stack([piece.beside for piece in pieces if piece.beside is not None])
        grid = torch.nn.functional.pad(sizes, (1, 0), value=1).to(device)
        with instead(getattr(self.module, self.projector), numbers):
            order = self.module(torch.cat([piece.pixels for piece in pieces]).to(device), grid_thw=grid, **told)
        states = read[0][order.pooler_output[:, 0]].flatten(0, 1)
        return [part[None] for part in torch.split(states, sizes.prod(1).tolist())]

    def output(self, states: Sequence[Tensor], names: Sequence[str]) -> _Output:
        """What the tower would put out, projected now, so that the projector has its gradient."""
        return _Output(_nothing, getattr(self.module, self.projector)(torch.cat(list(states), 1)[0]))


class _ReachedError(Exception):
    """The tower was reached, with these arguments."""


class Tower:
    """The vision tower of a backbone, cut where the projector begins."""

    def __init__(self, backbone: Backbone) -> None:
        family = backbone.family
        self.backbone, self.module = backbone, backbone.tower
        inside = [path.removeprefix(f"{family.vision}.") for path in family.projector if path.startswith(family.vision)]
        self.cut: Any = _Patches(self.module, inside[0]) if inside else _Tiles(self.module)
        self.names: tuple[str, ...] = ("projected",) if inside else ()
        """Which states are read of the tower's output; known from the first picture on."""
        self._told: dict[str, Any] = {}

    @property
    def fingerprint(self) -> Fingerprint:
        """What its states depend on, besides the pixels."""
        config = self.backbone.config
        vision = jsonl.loads(config.vision_config.to_json_string(use_diff=False).encode())
        lasting = {name: value for name, value in vision.items() if not name.startswith(_PASSING)}
        digest, weights = hashlib.sha256(), dict(self.backbone.whole.named_parameters())
        for name in sorted(name for name in weights if self.backbone.family.part_of(name) == "vision"):
            digest.update(repr((name, weights[name].shape)).encode() + b"\0")
            digest.update(raw_bytes(weights[name]))
        parts = {"tower": digest.hexdigest(), "tower_config": of_value(lasting)}
        layer = str(getattr(config, "vision_feature_layer", None))
        return Fingerprint(parts | {"layer": layer, "weights": str(self.module.dtype).removeprefix("torch.")})

    def pieces(self, features: Mapping[str, Tensor]) -> list[Piece]:
        """What the tower would encode of the media of one call, in its order; nothing is computed."""
        found = []
        for medium in self.backbone.family.media:
            if medium.pixels in features:
                try:
                    with instead(self.module, _reached):
                        self.backbone.encoded(medium, features)
                except _ReachedError as call:
                    found += self.pieces_of(*call.args)
        return found

    def pieces_of(self, args: tuple[Any, ...], told: Mapping[str, Any]) -> list[Piece]:
        """The pieces of a call of the tower."""
        mine = {name: value for name, value in told.items() if isinstance(value, torch.Tensor)}
        self._told = {name: value for name, value in told.items() if name not in mine}
        if unknown := sorted(mine.keys() - set(self.cut.arguments)):
            raise ValueError(
                f"features: expected a vision tower that is told {' and '.join(self.cut.arguments)} at most, "
                f"{type(self.module).__name__} is told {', '.join(unknown)}; leave features off"
            )
        pieces: list[Piece] = self.cut.pieces(*args, **mine)
        return pieces

    def learn(self, features: Mapping[str, Tensor]) -> None:
        """Find out which states are read of the tower's output, by encoding the media of one call."""
        real, names = self.module.forward, []

        def watched(*args: Any, **told: Any) -> _Output:  # noqa: ANN401
            found = real(*args, **told)

            def take(name: str) -> Tensor:
                names.append(name)
                return _state(found, name)

            return _Output(take)

        for medium in self.backbone.family.media:
            if not self.names and medium.pixels in features:
                with instead(self.module, watched):
                    self.backbone.encoded(medium, features)
                self.names = tuple(dict.fromkeys(names))

    def states(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """The states of each piece, (names, rows, width)."""
        groups = [list(group) for _, group in groupby(pieces, key=lambda piece: piece.shapes)]
        return [state for group in groups for state in self.cut.encode(group, self.names, self._told)]


@contextmanager
def instead(module: Any, forward: Callable[..., Any]) -> Iterator[None]:  # noqa: ANN401
    """Let another function compute a module for a while."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _reached(*args: Any, **told: Any) -> None:  # noqa: ANN401
    raise _ReachedError(args, told)


def _nothing(name: str) -> Tensor:
    raise ValueError(f"features: expected the projector's output to be read, got {name}; leave features off")


def _state(output: Any, name: str) -> Tensor:  # noqa: ANN401
    field, _, layer = name.partition(" ")
    found: Tensor = getattr(output, field)[int(layer)] if layer else getattr(output, field)
    return found


def raw_bytes(values: Tensor) -> memoryview:
    """The numbers of a tensor as they lie in memory."""
    return values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
