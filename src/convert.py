"""The verb `convert-reward`: the authors' reward model as a folder of ours.

A door: what tensors are called is known to the backbones' wing; here they are read, checked and written.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoints import processor_of, require_safetensors, resolved
from .jsonl import loads
from .modules.backbone import backbone_of
from .modules.families import family_of
from .modules.llava_qwen import CHAT, EMBEDDINGS, renamed, require_same_arithmetic
from .modules.reward import RewardHead, RewardReader
from .modules.rewardmodel import HEAD, Judging, save_reward_model
from .modules.saving import model_card
from .prompts import Template, load_template
from .provenance import model_digest, processor_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .ledger import Ledger
    from .modules.llava_qwen import Shapes

log = logging.getLogger(__name__)
_FAMILY, _END, _AFTER = "llava_onevision", "<|im_end|>", "\n"


def convert_reward(checkpoint: str, body: str, template: Path, out: Path, frames: int = 32) -> None:
    """Convert a reward model that the authors' code saved (llava_qwen with `rm_head`) to a folder of ours.

    Weights and head are the checkpoint's, in the types that they have there; architecture and processor are the
    body's, and the turns of its chat template are laid out as in the authors' training. Behind a critique the
    reward is read where theirs is: at the newline after the end of its turn.

    Args:
        checkpoint: Folder of the authors' layout with safetensors, or its name on the hub.
        body: What it was trained from, as transformers has it: folder of a LLaVA-OneVision, or its name on the hub.
        template: Text file with the request to judge that it was trained with, {question} and {response} in it.
        out: Folder of the reward model.
        frames: Frames of a film; the authors' evaluation shows 32.
    """
    from transformers import AutoConfig

    if out.exists():
        raise ValueError(f"{out}: expected nothing there, found a file or a folder; remove it or give another --out")
    judging = Judging(_told(template), frames, after_critique=_AFTER)
    source, base = resolved(checkpoint), resolved(body)
    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    if (family := family_of(config).name) != _FAMILY:
        raise ValueError(f"body: expected a {_FAMILY}, got a {family} in {base}; the authors trained from no other")
    processor = processor_of(base)
    shapes, files = _stored(source)
    try:
        require_same_arithmetic(loads((source / "config.json").read_bytes()), config.get_text_config())
        _fit_vocabulary(config, processor.tokenizer, shapes)
        reader, ledger = _filled(config, shapes, files)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    log.info("%s", ledger)
    processor.chat_template = CHAT
    card = model_card(
        "A reward model, converted",
        {
            "checkpoint": {"name": checkpoint, "digest": model_digest(source), "tensors": ledger},
            "body": {"name": body, "processor": processor_digest(base)},
            "asked": {"template": judging.template.name, "digest": judging.template.digest, "frames": frames},
        },
    )
    save_reward_model(reader, processor, judging, out, card)


def _told(path: Path) -> Template:
    """The request in a file: the words of a training are data, and none of this package's own are them."""
    if not path.is_file():
        raise ValueError(f"template: expected a text file with the request to judge, got {path}; check the path")
    return Template(path.stem, load_template(path.resolve()).text)


def _stored(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Path]]:
    """The shape of every tensor of a checkpoint, and the file in which it is."""
    from safetensors import SafetensorError, safe_open

    require_safetensors(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as tensors:
                here = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: expected safetensors, got {error}; fetch the file again") from error
        if twice := sorted(here.keys() & files):
            raise ValueError(
                f"{path}: expected every tensor once, got {twice[0]} in {files[twice[0]].name} too ({len(twice):,} in "
                "all); leave the files of one checkpoint there"
            )
        shapes |= here
        files |= dict.fromkeys(here, path)
    return shapes, files


def _fit_vocabulary(config: Any, tokenizer: Any, shapes: Shapes) -> None:  # noqa: ANN401
    """Give the architecture the rows of the checkpoint: the body has more, for the tokens of media and for padding."""
    if tokenizer.eos_token != _END:
        raise ValueError(f"expected a body whose turns end with {_END}, got {tokenizer.eos_token!r}; give another body")
    rows, tokens = shapes.get(EMBEDDINGS, (0,))[0], max(tokenizer.get_vocab().values()) + 1
    if rows < tokens:
        raise ValueError(
            f"{EMBEDDINGS}: expected a row for each of {tokens:,} tokens of the body, got {rows:,}; give the body that "
            "the checkpoint was trained from"
        )
    config.get_text_config().vocab_size = rows


def _filled(config: Any, shapes: Shapes, files: Mapping[str, Path]) -> tuple[RewardReader, Ledger]:  # noqa: ANN401
    """Body and head with the weights of a checkpoint, and the account of its tensors."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    head = RewardHead(config.get_text_config().hidden_size)
    ours = dict(model.named_parameters()) | {f"{HEAD}.{name}": weight for name, weight in head.named_parameters()}
    names, ledger = renamed(shapes, {name: tuple(weight.shape) for name, weight in ours.items()})
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as tensors:
            weights |= {names[name]: tensors.get_tensor(name) for name in tensors.keys() if name in names}  # noqa: SIM118
    if wild := sorted(name for name, weight in weights.items() if not weight.isfinite().all()):
        raise ValueError(f"expected finite numbers, got others in {len(wild):,} tensors ({wild[0]}); fetch it again")
    of_head = {name: weights.pop(f"{HEAD}.{name}") for name, _ in head.named_parameters()}
    head.load_state_dict(of_head, assign=True)
    model.load_state_dict(weights, strict=False, assign=True)  # a tied head is no tensor of its own
    model.tie_weights()
    return RewardReader(backbone_of(model.eval()), head), ledger
