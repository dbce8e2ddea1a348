"""The record of the code says what git says."""

import subprocess

import pytest

from mmrlhf import worktree
from mmrlhf.worktree import changes


@pytest.fixture
def checkout(tmp_path):
    """A repository with one commit."""

    def git(*words):
        told = subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True, text=True)
        return told.stdout.strip()

    git("init", "-q")
    (tmp_path / "a.py").write_text("one\n")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    return tmp_path, git


def test_a_clean_checkout_is_its_commit(checkout):
    root, git = checkout
    (root / "untracked.txt").write_text("nobody asked for this\n")
    assert changes(root) == {"commit.txt": git("rev-parse", "HEAD") + "\n"}


def test_what_differs_is_a_patch_that_makes_the_same_files_again_without_those_git_does_not_know(checkout):
    root, git = checkout
    (root / "untracked.txt").write_text("nobody asked for this\n")
    (root / "b.py").write_text("staged\n")
    git("add", "b.py")
    (root / "a.py").write_text("two\n")
    git("config", "diff.external", "false")
    git("config", "color.ui", "always")
    told = changes(root)
    assert told["commit.txt"] == git("rev-parse", "HEAD") + "-dirty\n"
    assert "nobody asked" not in told["diff.patch"]
    git("reset", "-q", "--hard")
    assert not (root / "b.py").exists()
    subprocess.run(["git", "-C", str(root), "apply"], input=told["diff.patch"], text=True, check=True)
    assert (root / "a.py").read_text() == "two\n"
    assert (root / "b.py").read_text() == "staged\n"


def test_a_long_difference_is_cut_off_and_says_so(checkout, monkeypatch):
    root, _ = checkout
    monkeypatch.setattr(worktree, "_MOST", 100)
    (root / "a.py").write_text("a line\n" * 1000)
    text = changes(root)["diff.patch"]
    assert len(text) < 150
    assert text.endswith("bytes in all]\n")


def test_where_there_is_no_checkout_or_no_git_that_is_said(tmp_path, checkout, monkeypatch):
    nowhere = tmp_path / "x"
    nowhere.mkdir()
    assert changes(nowhere)["commit.txt"].startswith("unknown: no checkout; mmrlhf ")
    monkeypatch.setenv("PATH", str(nowhere))
    assert changes(checkout[0]) == {"commit.txt": changes(nowhere)["commit.txt"]}
    assert changes(nowhere)["commit.txt"].startswith("unknown: no git;")
