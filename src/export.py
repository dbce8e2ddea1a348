"""The verb `export`: a checkpoint of a training, as it goes on or has ended, as a folder that plain transformers loads.

A door: what a run is, is told by its settings; weights, adapters and card are written as at the end of a training.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .callbacks.compute import ComputeLedger
from .callbacks.resuming import chosen, removed
from .checkpoints import processor_of
from .durable import sealed
from .fingerprint import of_file, of_value
from .jsonl import loads
from .modules.cards import ALIGNED, JUDGES, Told, of_judge, of_policy, training_card
from .modules.critic import CritiqueRewardModule
from .modules.loading import Number
from .modules.mmdpo import MMDPOModule
from .modules.restoring import restore
from .modules.reward import RewardReader
from .modules.rewardmodel import ASKED, Judging, judging_of, save_reward_model
from .modules.saving import MADE_FROM, Form, save_folder
from .options import ExplainingParser, guard_configs
from .provenance import processor_digest
from .runs import CHECKPOINTS, CONFIG, DATA, MODEL
from .settings import differing

if TYPE_CHECKING:
    from collections.abc import Mapping


Learner = MMDPOModule | CritiqueRewardModule
log = logging.getLogger(__name__)


def export(
    run: Path,
    out: Path,
    step: int | None = None,
    merge: bool = True,
    dtype: Number | None = None,
    base: str | None = None,
) -> None:
    """Write a checkpoint of a training as a folder that plain transformers loads.

    It is the same folder that a training writes at its end, from any of its checkpoints: of a policy or of a reward
    model, in one file or in the parts of many ranks. The data of the training are not needed, nor is a GPU.

    Args:
        run: Folder of the training (`--run.out`), which may still go on.
        out: Folder that is written, whole or not at all. The same export again leaves it alone.
        step: After which optimizer step; null for the newest checkpoint that is whole.
        merge: Whether adapters are merged into the weights, and kept in `adapter` as well; otherwise they alone are
            written, for peft.
        dtype: The type of the weights that are written, float32 or bfloat16; null for the one that was trained.
        base: The checkpoint that the training began with, where it is not any more what the run's settings say: a
            folder, or its name on the hub.
    """
    settings = _settings(run)
    module = _module(settings, run / CONFIG, base)
    _require_possible(module, merge, dtype)
    _require_free(run, out)
    told = of_policy(module, settings) if isinstance(module, MMDPOModule) else of_judge(module, _asked(run))
    folder = _base(module, base)
    state = chosen(run / CHECKPOINTS, step)
    seal = _seal(state)
    made_from = {
        "checkpoint": state.parent.name,
        "files": of_value(seal.get("files")),
        "base": of_value([of_file(folder / "config.json"), processor_digest(folder)]),
        "merge": merge,
        "dtype": dtype,
    }
    if _is_there(out, made_from):
        log.info("%s: exported already, from %s", out, state.parent)
        return
    module.configure_model()
    kept = _restored(module, state)
    origin = told | {"checkpoint": state.parent.name}
    card = _card(ALIGNED if isinstance(module, MMDPOModule) else JUDGES, settings, origin, run, seal, kept)
    _write(module, processor_of(folder), run, out, card, Form(merge, dtype, made_from))
    files = [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    log.info("%s: %d files, %s bytes, from %s", out, len(files), f"{size:,}", state.parent)


def _settings(run: Path) -> dict[str, Any]:
    """All settings of a training, as they stand in its folder."""
    from omegaconf import OmegaConf
    from yaml import YAMLError  # type: ignore[import-untyped]

    path = run / CONFIG
    if not path.is_file():
        raise ValueError(f"run: expected the folder of a training, in which there is {CONFIG}, got {run}; check it")
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except YAMLError as error:
        raise ValueError(
            f"{path}: expected YAML, got {error}; start the training again, which writes it anew"
        ) from error
    if not isinstance(found, dict) or not {"run", "model", "data", "trainer"} <= found.keys():
        raise ValueError(f"{path}: expected the settings of a training, found others; give the folder of a training")
    return {str(name): value for name, value in found.items()}


def _module(settings: Mapping[str, Any], path: Path, base: str | None) -> Learner:
    """The module of a training, without its weights; what only computes, and needs other files, is left off."""
    guard_configs()
    model = dict(settings["model"])
    backbone = {
        name: value for name, value in model["backbone"].items() if name not in ("features", "vision_attention")
    }
    model["backbone"] = backbone | ({} if base is None else {"path": base})
    parser = ExplainingParser(parser_mode="omegaconf+")
    parser.add_class_arguments(MMDPOModule if "beta" in model else CritiqueRewardModule, "model")
    try:
        module: Learner = parser.instantiate(parser.parse_object({"model": model})).model
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return module


def _require_possible(module: Learner, merge: bool, dtype: Number | None) -> None:
    """Refuse to write adapters alone where that makes no model."""
    if merge:
        return
    if module.config.lora is None:
        raise ValueError("merge: expected true, as the training moved the weights themselves, got false; leave it out")
    if isinstance(module, CritiqueRewardModule):
        raise ValueError(  # noqa: TRY004 - the user chose the run
            "merge: expected true for a reward model, which is no reward model without its head, got false; leave it "
            "out: the adapters are in the folder `adapter` as well"
        )
    if dtype is not None:
        raise ValueError(f"dtype: expected null for adapters alone, which are written as they are, got {dtype}")


def _require_free(run: Path, out: Path) -> None:
    """Refuse a folder that is the training's own, and one that holds anything but an export."""
    own = [(run / name).resolve() for name in (CHECKPOINTS, MODEL)]
    if any(out.resolve().is_relative_to(folder) for folder in own):
        raise ValueError(f"out: expected a folder outside of what the training writes itself, got {out}; give another")
    if out.exists() and not (out / MADE_FROM).is_file():
        raise ValueError(f"{out}: expected nothing there, or an export, found something else; give another --out")


def _is_there(out: Path, made_from: Mapping[str, Any]) -> bool:
    """Whether the same export is there already; another one is refused."""
    if not out.exists():
        return False
    if other := differing(loads((out / MADE_FROM).read_bytes()), made_from):
        raise ValueError(f"{out}: holds an export with {other}; give another --out, or remove it")
    return True


def _asked(run: Path) -> Judging:
    """What the reward model of a training is asked; one begun before there was a file for that tells it at its end."""
    path = run / ASKED
    if path.is_file():
        return Judging.of(loads(path.read_bytes()))
    if (run / MODEL).exists():
        return judging_of(run / MODEL)
    raise ValueError(
        f"{path}: expected what the reward model is asked, found no such file, as the training was begun before there "
        "was one, and has not ended; go on with it by the command that it was begun with, which writes it"
    )


def _base(module: Learner, said: str | None) -> Path:
    """The folder of the checkpoint that the training began with."""
    try:
        return module.config.folder
    except ValueError as error:
        cure = "if the checkpoint that the training began with was moved, say --base"
        if said is None and not Path(module.config.path).expanduser().is_absolute():
            cure = "a run's paths are relative to where it was started: export from there; elsewhere, or " + cure
        raise ValueError(f"{error}; {cure}") from error


def _seal(state: Path) -> dict[str, Any]:
    """What the seal of a checkpoint says; nothing of the only one of an older run, which has none."""
    told = sealed(state.parent)
    if told is None and not state.exists():
        raise removed(state.parent)
    return told or {}


def _restored(module: Learner, state: Path) -> dict[str, Any]:
    """Give the module the weights of the checkpoint, which a training that goes on may remove meanwhile."""
    try:
        return restore(module, state)
    except OSError as error:
        if state.exists():
            raise
        raise removed(state.parent) from error


def _card(what: str, settings: Mapping[str, Any], told: Told, run: Path, seal: Told, kept: Mapping[str, Any]) -> str:
    """What is known of a model without the data that it was trained on."""
    digest = loads((run / DATA).read_bytes())["admission"] if (run / DATA).is_file() else "not known"
    data: Told = {"digest": digest, "all else": "not known, as the data were not read"}
    devices = seal.get("ranks", "not known")
    cost: Told = kept["callbacks"].get(ComputeLedger().state_key, {"all else": "not known"}) | {"devices": devices}
    steps = int(kept["global_step"])
    origin: Told = {"run": settings["run"]["name"] or run.resolve().name}
    return training_card(f"{what}, exported after step {steps}", settings, steps, data, origin | told, cost)


def _write(
    module: Learner,
    processor: Any,  # noqa: ANN401 - transformers is untyped
    run: Path,
    out: Path,
    card: str,
    form: Form,
) -> None:
    """Write what a training writes at its end."""
    whole = module.whole()
    assert whole is not None, "a single process has all of it"
    if isinstance(whole, RewardReader):
        save_reward_model(whole, processor, _asked(run), out, card, form)
    else:
        save_folder(whole.backbone, processor, out, card, form)
