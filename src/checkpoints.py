"""Where the files of a checkpoint lie: a folder of this machine, or one of the hub, kept in its cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_FILES, _WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model"), "*.safetensors"
"""What is fetched of a repository: nothing that has to be unpickled, and no code."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolved(name_or_path: str | Path, revision: str | None = None, code: bool = False, weights: bool = True) -> Path:
    """The folder of a checkpoint; a repository of the hub is fetched into its cache, where it is not yet.

    `owner/name@revision` names a commit, tag or branch as well. Python files come along only if `code` is to run, and
    the weights, which are large, unless nobody asks for them.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "processor_config.json").is_file():
            raise ValueError(f"{folder}: expected a checkpoint, found no config.json in it; check the path")
        return folder
    name, at, pinned = str(name_or_path).partition("@")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or bool(at) > bool(pinned):
        raise ValueError(
            f"checkpoint: expected a folder or the name of a repository (owner/name, or owner/name@revision), got "
            f"{str(name_or_path)!r}; check the path"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    revision = pinned or revision
    wanted = [*_FILES, *(["*.py"] if code else []), *([_WEIGHTS] if weights else [])]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"checkpoint {str(name_or_path)!r}: neither a folder here nor to be had from the hub "
            f"({type(error).__name__}); give the path of a folder, or fetch it on a machine with a connection"
        ) from error


def require_pinned(name_or_path: str | Path, trust_remote_code: bool, revision: str | None) -> None:
    """Refuse to run a checkpoint's own code unless it is of one commit, which nobody can change afterwards."""
    if not trust_remote_code or (revision is not None and _COMMIT.fullmatch(revision)):
        return
    raise ValueError(
        f"trust_remote_code: expected a revision that is a commit (40 hexadecimal digits) of {str(name_or_path)!r}, "
        f"got {revision!r}; pin the commit whose code you have read, or leave it off"
    )


def require_safetensors(folder: Path) -> None:
    """Refuse a folder without weights that can be read without running what is in them."""
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder}: expected weights as *.safetensors, found none; convert them, for others have to be unpickled, "
            "and that runs whatever is in them"
        )


def processor_of(folder: Path) -> Any:  # noqa: ANN401 - transformers is untyped
    """A checkpoint's own processor, whose code is that of transformers."""
    from transformers import AutoProcessor

    found = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not hasattr(found, "tokenizer"):  # where a folder has no processor, this is a part of one
        raise ValueError(
            f"processor: expected one with a tokenizer, got a {type(found).__name__} from {folder}; give the folder of "
            "a whole checkpoint"
        )
    return found
