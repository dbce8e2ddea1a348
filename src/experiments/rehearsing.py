"""Every command of a sweep is read before the first one runs, so that a misspelt option costs seconds, not a night.

The process of this module runs the program again and again with `--print_config`, which reads all options, prints them
and does nothing else; it imports the program once.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence

from ..fingerprint import of_text
from ..jsonl import loads
from ..progress import bar

_PRINT = "--print_config"


def rehearse(program: str, commands: Sequence[Sequence[str]]) -> list[str]:
    """Let the program read the options of all commands, and return a digest of each one's settings.

    The first that it refuses is an error, in the program's words.
    """
    process = subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-m", __name__, program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
    )
    with process, bar() as shown:
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps([list(words) for words in commands]))
            process.stdin.close()
            return [_told(process, words) for words in shown.track(commands, description="reading options")]
        finally:
            process.kill()


def _told(process: subprocess.Popen[str], words: Sequence[str]) -> str:
    """What the process tells of the next command."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise ValueError(f"{' '.join(words)}: the program ended while it read these options; see above")
    told = loads(line.encode())
    if told["code"]:
        raise ValueError(f"{told['said'].strip() or 'refused'} (in the command: {' '.join(words)})")
    return of_text(told["settings"])


def main() -> None:
    """Read commands from the standard input, and tell of each how reading its options ended."""
    out = sys.stdout
    for words in json.load(sys.stdin):
        code, settings, said = _read(sys.argv[1], words)
        out.write(json.dumps({"code": code, "settings": settings, "said": said}) + "\n")
        out.flush()


def _read(program: str, words: list[str]) -> tuple[int, str, str]:
    out, errors = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = [program, *words, _PRINT]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            runpy.run_module(program, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
        if isinstance(end.code, str):
            errors.write(end.code)
    else:
        code = 0
    finally:
        sys.argv = before
    return code, out.getvalue(), errors.getvalue()


if __name__ == "__main__":
    main()
