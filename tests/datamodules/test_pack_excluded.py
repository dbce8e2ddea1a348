"""What a benchmark was made of stays out of the shards, and the account says so."""

import json

import pytest

from mmrlhf import jsonl
from mmrlhf.datamodules.manifest import Manifest
from mmrlhf.datamodules.pack import pack
from mmrlhf.datamodules.reader import Shards
from mmrlhf.evaluation.making import make_rewardbench
from mmrlhf.records import RankedQuery


@pytest.fixture(scope="module")
def bench(world_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "b"
    make_rewardbench(world_folder / "ranked.jsonl", out, per_category=2, media=world_folder / "media")
    return out


def packed(world_folder, out, **options):
    pack(world_folder / "ranked.jsonl", world_folder / "media", out, val=0.1, test=0.1, processes=1, **options)
    return {sample.ranked.query.id for split in Manifest.read(out).samples for sample in Shards(out, split)}


def test_the_queries_of_a_benchmark_and_what_shares_their_pictures_stay_out(world_folder, bench, tmp_path):
    every = {row.query.id: row for row in jsonl.read(world_folder / "ranked.jsonl", RankedQuery.from_json)}
    asked = {row["id"] for row in map(json.loads, (bench / "mm_reward_bench.jsonl").open())}
    kept = packed(world_folder, tmp_path / "s", exclude=bench / "excluded.jsonl")
    shown = {medium.path for name in asked for medium in every[name].query.media}
    related = {name for name, row in every.items() if shown & {medium.path for medium in row.query.media}}
    assert asked
    assert not kept & (asked | related)
    rejects = {row["id"]: row["reason"] for row in jsonl.read(tmp_path / "s" / "rejects.jsonl")}
    assert set(rejects.values()) == {"excluded"}
    assert kept | set(rejects) == set(every)
    assert Manifest.read(tmp_path / "s").ledger["skipped"] == {"excluded": len(rejects)}


def test_a_set_made_with_exclusions_is_another_set(world_folder, bench, tmp_path):
    packed(world_folder, tmp_path / "s", exclude=bench / "excluded.jsonl")
    with pytest.raises(ValueError, match="holds shards with exclude"):
        packed(world_folder, tmp_path / "s")
    (tmp_path / "all.jsonl").write_text("")
    assert len(packed(world_folder, tmp_path / "t", exclude=tmp_path / "all.jsonl")) == 80
