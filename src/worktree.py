"""What the code was that ran: a checkout's commit, and by how much its files differ from it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from .environment import commit, installed

_MOST = 2**20
_SECONDS = 30
_DIFF = ("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv")


def changes(root: Path) -> dict[str, str]:
    """Two files: `commit.txt`, and `diff.patch` where the checkout at `root` differs from its commit.

    Files that git does not know are not in the difference, and it is cut off at a mebibyte. Where there is no git or
    no checkout, the first file says so.
    """
    found = commit(root)
    if found is None:
        without = "no checkout" if shutil.which("git") else "no git"
        return {"commit.txt": f"unknown: {without}; mmrlhf {installed('mmrlhf')}\n"}
    told = {"commit.txt": f"{found}\n"}
    if found.endswith("-dirty"):
        told["diff.patch"] = _diff(root)
    return told


def _diff(root: Path) -> str:
    """What differs, as git tells it; its configuration runs no program."""
    words = [str(shutil.which("git")), "-C", str(root), *_DIFF]
    try:
        done = subprocess.run(words, capture_output=True, check=False, timeout=_SECONDS)  # noqa: S603 - our own words
    except subprocess.TimeoutExpired:
        return f"unknown: git took more than {_SECONDS} seconds\n"
    if done.returncode:
        return f"unknown: git says {done.stderr.decode(errors='replace').strip()}\n"
    text = done.stdout[:_MOST].decode(errors="replace")
    return text + f"\n[cut off: {len(done.stdout):,} bytes in all]\n" * (len(done.stdout) > _MOST)
