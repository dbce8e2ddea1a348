"""The bench runs to its end on a CPU, and says n/a for what needs a GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import gpu


def run(*options):
    return subprocess.run([sys.executable, gpu.__file__, *options], capture_output=True, text=True)


def test_every_row_is_there_and_a_training_resumes_bit_by_bit(tmp_path):
    out = tmp_path / "out.json"
    done = run("--device", "cpu", "--shape", "tiny", "--steps", "2", "--out", str(out))
    assert out.exists(), done.stderr[-2000:]
    (result,) = json.loads(out.read_text())
    off = [row["way"] for row in result["rows"] if abs(row["ratio"] - 1) > 0.15]
    assert result["estimate_missed"] == off
    assert all(f"tiny: {way}: memory is more than 15% off the estimate: ratio" in done.stdout for way in off)
    assert (done.returncode, result["failed"]) == (bool(off), []), done.stderr[-2000:]
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


def in_turn(monkeypatch, tmp_path, train, resume=lambda *_: {"bitwise the same": True}):
    """The bench with trainings that another function tells of; the exit status, and what was kept."""
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--shape", "tiny", "--out", str(out)])
    monkeypatch.setattr(gpu.training, "train", train)
    monkeypatch.setattr(gpu, "resume", resume)
    return gpu.main(), json.loads(out.read_text())[0]


def told(case, off=1.0):
    """A training whose memory is the estimate, or off it."""
    peak = case.estimate(case.batch()).device / off
    return gpu.training.Trained([1.0, 0.5], [0.1, 0.1], peak, 1e9, 100, None)


def test_a_row_that_fails_is_told_with_its_reason_and_the_others_are_kept(monkeypatch, tmp_path, capsys):
    kept = []

    def train(case, steps):
        if kept:
            kept.append(len(json.loads((tmp_path / "out.json").read_text())[0]["rows"]))
        else:
            kept.append(0)
        if case.compiled:
            raise RuntimeError("no compiler\nand much more")
        if case.again:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return told(case)

    code, result = in_turn(monkeypatch, tmp_path, train)
    assert code == 1
    assert kept == list(range(9)), "all rows before it were written"
    failed = {row["way"]: row["failed"] for row in result["rows"] if "failed" in row}
    assert failed == {
        "bf16, compiled": "RuntimeError: no compiler",
        "bf16, recomputed": "out of memory",
        "bf16, FSDP2, recomputed": "out of memory",
    }
    assert result["failed"] == list(failed)
    shown = capsys.readouterr().out.splitlines()
    for way, why in failed.items():
        assert any(line.startswith(f"{way} ") and line.endswith(f"failed: {why}") for line in shown)
        assert f"tiny: {way}: failed: {why}" in shown


@pytest.mark.parametrize(("off", "code"), [(0.86, 0), (1.14, 0), (0.84, 1), (1.16, 1)])
def test_an_estimate_is_missed_above_fifteen_percent_and_the_exit_status_says_so(
    monkeypatch, tmp_path, capsys, off, code
):
    found = in_turn(monkeypatch, tmp_path, lambda case, _: told(case, off if case.queries == 2 else 1.0))
    missed = ["bf16, FSDP2, two at once"] * code
    assert (found[0], found[1]["estimate_missed"]) == (code, missed)
    assert ("tiny: bf16, FSDP2, two at once: memory is more than 15%" in capsys.readouterr().out) == bool(code)


def test_a_resume_that_fails_or_is_not_the_same_is_told(monkeypatch, tmp_path, capsys):
    def broken(*_):
        raise OSError(28, "No space left on device")

    code, result = in_turn(monkeypatch, tmp_path, lambda case, _: told(case), broken)
    assert (code, len(result["rows"])) == (1, 9)
    assert result["resume"] == {"failed": "OSError: [Errno 28] No space left on device"}
    assert "tiny: resumed: OSError: [Errno 28] No space left on device" in capsys.readouterr().out
    other = {"bitwise the same": False}
    assert in_turn(monkeypatch, tmp_path, lambda case, _: told(case), lambda *_: other)[0] == 1
    assert "tiny: resumed: not bitwise the same" in capsys.readouterr().out


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
