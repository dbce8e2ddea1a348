"""Where the checkpoints of a training lie, and from which one it goes on: the newest that is whole.

Each is a folder `step-N` with what Lightning saved, `state` (a file, or the shards of all ranks), and the seal.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from ..durable import fault
from ..parallel import is_rank_zero

if TYPE_CHECKING:
    import lightning

STATE = "state"
LAST = "last.ckpt"
"""The only checkpoint of a run that was begun before there were folders."""

_NAME = re.compile(r"step-(\d+)")
_log = logging.getLogger(__name__)


def folder_of(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint after a step."""
    return checkpoints / f"step-{step:08d}"


def by_step(checkpoints: Path) -> dict[int, Path]:
    """The folders of all checkpoints, the newest first; drafts are none."""
    found = checkpoints.iterdir() if checkpoints.is_dir() else ()
    folders = [path for path in found if path.is_dir() and not path.is_symlink()]
    named = {int(name[1]): path for path in folders if (name := _NAME.fullmatch(path.name))}
    return dict(sorted(named.items(), reverse=True))


def newest(checkpoints: Path) -> Path | None:
    """The state of the newest checkpoint that is whole, if there is one; what is passed over is named with its fault.

    The first rank reads shards for all, whose strategy takes the path from it; a single file is read by every rank.
    """
    state, faults = _sought(checkpoints)
    if state is None and faults:
        raise ValueError(
            f"{checkpoints}: expected a checkpoint that is whole, found {'; '.join(faults)}; remove the folder to "
            "begin again from the first step"
        )
    return state


def _sought(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The state of the newest checkpoint that is whole, and the faults of those that are newer."""
    # Absolute: Lightning would download what begins with "http".
    checkpoints = checkpoints.resolve()
    faults: dict[Path, str] = {}
    # Listed anew each time: a training that goes on writes others, and removes what is looked at.
    while folder := next((each for each in by_step(checkpoints).values() if each not in faults), None):
        state = folder / STATE
        found = fault(folder, thorough=is_rank_zero() or not state.is_dir())
        if not folder.exists():
            continue
        if found is None:
            return state, list(faults.values())
        faults[folder] = f"{folder.name} ({found})"
        _log.warning("%s: passed over, %s", folder, found)
    last = checkpoints / LAST
    return last if last.is_file() else None, list(faults.values())


def chosen(checkpoints: Path, step: int | None = None) -> Path:
    """The state of the checkpoint after a step, or of the newest that is whole, for whoever reads and does not train.

    Shards that somebody else has written are refused.
    """
    there = by_step(checkpoints.resolve())
    if step is None:
        state, faults = _sought(checkpoints)
        if state is None:
            raise ValueError(
                f"{checkpoints}: expected a checkpoint that is whole, found {'; '.join(faults) or 'none'}; let the "
                "training write one: the command that it was begun with continues it"
            )
    elif step not in there:
        raise ValueError(
            f"step: expected one of which {checkpoints} has a checkpoint ({', '.join(map(str, there)) or 'none'}), got "
            f"{step}; leave it out for the newest"
        )
    else:
        state, found = there[step] / STATE, fault(there[step])
        if not there[step].exists():
            raise removed(there[step])
        if found:
            raise ValueError(
                f"{there[step]}: expected a checkpoint that is whole, found it {found}; leave the step out for the "
                "newest that is whole"
            )
    if state.is_dir():
        try:
            _require_own(state)
        except FileNotFoundError as error:
            raise removed(state.parent) from error
    return state


def removed(folder: Path) -> ValueError:
    """What to tell of a checkpoint that was there, to whoever reads and does not train."""
    return ValueError(
        f"{folder}: expected to read it to its end, but it was removed meanwhile, as a training that goes on keeps the "
        "newest alone; export again, or copy the folder first"
    )


def require_readable(state: Path, trainer: lightning.Trainer) -> None:
    """Refuse shards that somebody else has written, and shards under a strategy that reads one file."""
    if state.is_dir():
        _require_own(state)
    if state.is_dir() and not isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
        raise ValueError(
            f"{state}: expected one file for {type(trainer.strategy).__name__}, found shards; go on with the "
            "trainer.strategy that the run was begun with, on any number of ranks, also on one"
        )


def _require_own(state: Path) -> None:
    """Refuse shards of another user: their metadata is unpickled, so they are code."""
    for path in (state.parent, state, *state.rglob("*")):
        if (owner := path.lstat().st_uid) != os.getuid():
            raise ValueError(
                f"{path}: expected shards of this user ({os.getuid()}), as reading them runs what their writer put "
                f"there, found those of user {owner}; go on as that user, or, if you trust them, take them over with "
                "chown"
            )
