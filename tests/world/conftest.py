"""A small world, made once per worker by the same command as a user's."""

import pytest

from mmrlhf import cli, jsonl
from mmrlhf.records import RankedQuery

QUERIES = 260


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "w"
    assert cli.main(["world", "--out", str(out), "--queries", str(QUERIES), "--no-policy", "--processes", "1"]) == 0
    return out


@pytest.fixture(scope="session")
def ranked(small_world):
    return list(jsonl.read(small_world / "ranked.jsonl", RankedQuery.from_json))
