"""The bench runs to its end on a CPU, and says n/a for what needs a GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import gpu


def run(*options):
    return subprocess.run([sys.executable, gpu.__file__, *options], capture_output=True, text=True)


def test_every_row_is_there_and_a_training_resumes_bit_by_bit(tmp_path):
    out = tmp_path / "out.json"
    done = run("--device", "cpu", "--shape", "tiny", "--steps", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads(out.read_text())
    rows = {row["way"]: row for row in result["rows"]}
    assert rows.keys() == {
        "float32",
        "bf16",
        "bf16, compiled",
        "bf16, separate rows",
        "bf16, recomputed",
        "bf16, FSDP2",
        "bf16, FSDP2, two at once",
        "bf16, FSDP2, in two parts",
        "bf16, FSDP2, recomputed",
    }
    assert all(row["MFU"] is None and 0.7 < row["ratio"] < 1.3 for row in rows.values())
    assert rows["bf16, FSDP2, in two parts"]["first loss"] == pytest.approx(rows["bf16, FSDP2"]["first loss"], rel=1e-3)
    assert rows["bf16, separate rows"]["apart"] < 1e-2
    assert result["resume"]["resumed after step"] == 2
    assert result["resume"]["bitwise the same"] is True
    assert not result["resume"]["weights that moved since"].startswith("0 ")
    assert done.stdout.count("n/a") > len(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cpu", "--shape", "7b"), "expected tiny on a CPU, got 7b"),
        (("--device", "cpu", "--shape", "tiny", "--steps", "1"), "expected 2 or more, got 1"),
    ],
)
def test_what_cannot_run_is_refused(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    with pytest.raises(SystemExit, match="2"):
        gpu.arguments()
    assert message in capsys.readouterr().err
