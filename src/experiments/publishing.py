"""What a sweep's parent run in MLflow is given at the end: the accounts of all cells, and what was selected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from ..jsonl import dumps, replacing
from ..tracked import end_run
from .cells import ACCOUNT, Account
from .design import Design
from .selection import records

PROMOTION, CELLS = "promotion.json", "cells.json"


def accounts(folder: Path) -> list[Account]:
    """The accounts of all cells of a sweep that have begun."""
    found = (Account.read(path.parent) for path in sorted((folder / "cells").glob(f"*/{ACCOUNT}")))
    return [account for account in found if account is not None]


@contextmanager
def published(design: Design) -> Iterator[None]:
    """Tell the parent run how the block ended and what is known then, also when it was interrupted."""
    status = "FAILED"
    try:
        yield
        if all(account.status == "done" for account in accounts(design.out)):
            status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        with replacing(design.out / CELLS) as file:
            told = [asdict(account) for account in accounts(design.out)]
            file.write(b"[\n" + ",\n".join(map(dumps, told)).encode() + b"\n]\n")
        if design.tracking is not None:
            files = [design.out / CELLS, design.out / PROMOTION, *records(design.out)]
            end_run(design.out, status, [file for file in files if file.exists()])
