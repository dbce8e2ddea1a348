"""Folds: what shares a medium, a group or its words is in one, whatever the order of the files."""

import io
import random
import shutil
import tarfile
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrlhf import jsonl
from mmrlhf.datamodules import folds as room
from mmrlhf.datamodules.folds import assigned, digest_of, folds_of, kept
from mmrlhf.datamodules.indexing import index
from mmrlhf.datamodules.pack import pack
from mmrlhf.datamodules.reader import Shards
from mmrlhf.datamodules.splits import Belongs, assign
from mmrlhf.datamodules.tars import ShardError
from mmrlhf.folds import Fold
from mmrlhf.queries import Media
from mmrlhf.records import RankedQuery

from .made import packed_set, picture, ranked
from .packing import run
from .test_splits import groups

TIES = st.lists(
    st.tuples(st.integers(), st.lists(st.integers(0, 12), max_size=3)).map(
        lambda drawn: (f"id {drawn[0]}", *(f"media {number}" for number in drawn[1]))
    ),
    max_size=25,
)


# The hash -------------------------------------------------------------------------------------------------------


@given(TIES, st.integers(2, 7))
def test_whatever_is_tied_even_through_others_is_in_one_fold(ties, of):
    found = assigned(ties, of)
    assert {*found} <= {*range(of)}
    for group in groups([Belongs("", each, None) for each in ties]):
        assert len({found[place] for place in group}) == 1


@given(TIES, st.randoms(use_true_random=False))
def test_another_order_and_new_queries_move_no_group_that_they_are_not_tied_to(ties, rng):
    ties = [(f"id {number}", *others) for number, (_, *others) in enumerate(ties)]
    found = dict(zip(ties, assigned(ties, 5), strict=True))
    mixed = rng.sample([*ties, ("id new", "media new")], len(ties) + 1)
    assert {each: fold for each, fold in zip(mixed, assigned(mixed, 5), strict=True) if each in found} == found


def test_folds_are_of_one_size_also_among_what_a_split_left_to_training():
    names = [f"media {number}" for number in range(6000)]
    train = assign([Belongs(name, (name,), None) for name in names], 0.2, 0.2)
    left = [(name,) for name, split in zip(names, train, strict=True) if split == "train"]
    counts = Counter(assigned(left, 3))
    assert [counts[fold] / len(left) for fold in range(3)] == pytest.approx([1 / 3] * 3, abs=0.03)


# What ties ------------------------------------------------------------------------------------------------------


def brute(folder, split="train"):
    """Groups of samples by what they are made of, from their bytes as they are read."""
    ties = []
    for sample in Shards(folder, split):
        query = sample.ranked.query
        words = (query.system, query.history, query.prompt)
        ties.append((query.id, (query.source, query.group) if query.group else query.id, *(sample.media or [words])))
    return groups([Belongs("", each, None) for each in ties])


def test_in_a_set_of_every_kind_folds_hold_whole_groups_as_their_bytes_tell(folder, tmp_path):
    run(folder, tmp_path / "shards", val=0.1, test=0.1, queries_per_shard=7)
    for split in ("train", "val", "test"):
        shards = Shards(tmp_path / "shards", split)
        found, expected = folds_of(shards, 5), brute(tmp_path / "shards", split)
        assert len(found) == len(shards)
        for group in expected:
            assert len({found[place] for place in group}) == 1
        if split == "train":
            assert len(shards.names) > 1
            assert len(expected) > 15
            assert max(map(len, expected)) > 4
            assert {*found} == {*range(5)}


def parted(found, one, other):
    """Whether two queries are in different folds, for some number of folds."""
    return any(folds[one] != folds[other] for folds in found)


def by_name(out):
    """For several numbers of folds, the fold of each query by its name."""
    shards = Shards(out, "train")
    names = [sample.ranked.query.id for sample in shards]
    return [
        dict(zip(names, folds_of(shards, of), strict=True)) for of in (2, 3, 5, 7, 101)
    ]  # hashes that are near to each other are parted by many folds alone


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """Queries that share something, and some that only seem to."""
    media = tmp_path_factory.mktemp("tied")
    for name, seed in (("a", 1), ("b", 2), ("again", 1), ("c", 3), ("d", 4)):
        (media / f"{name}.png").write_bytes(picture(seed))
    for film, seeds in (("f", (7, 8, 9)), ("g", (7, 10, 11)), ("h", (7, 8, 9))):
        (media / film).mkdir()
        for place, seed in enumerate(seeds):
            (media / film / f"{place}.png").write_bytes(picture(seed))

    def of(name, kind="image"):
        return Media(kind, name if kind == "video" else f"{name}.png")

    rows = [
        ranked("a", media=[of("a")]),
        ranked("ab", media=[of("a"), of("b")], prompt="Both?"),
        ranked("b", media=[of("b")], prompt="What else?"),
        ranked("again", media=[of("again")], prompt="Again?"),
        ranked("c in group", media=[of("c")], prompt="C?", source="s", group="one"),
        ranked("words in group", prompt="No picture.", source="s", group="one"),
        ranked("other source", prompt="Another.", source="t", group="one"),
        ranked("words", prompt="How many?"),
        ranked("words again", ("1", "2"), prompt="How many?"),
        ranked("words with system", prompt="How many?", system="Be brief."),
        ranked("words with picture", media=[of("d")], prompt="How many?"),
        ranked("film", media=[of("f", "video")], prompt="Does it move?"),
        ranked("same film", media=[of("h", "video")], prompt="Where?"),
        ranked("same first frame", media=[of("g", "video")], prompt="When?"),
    ]
    return rows, media


TOGETHER = [
    ("a", "ab", "b", "again"),
    ("c in group", "words in group"),
    ("words", "words again"),
    ("film", "same film"),
]
APART = [("c in group", "other source"), ("words", "words with system"), ("words", "words with picture")]
APART += [("film", "same first frame"), ("a", "c in group"), ("a", "words")]


def test_a_medium_by_its_bytes_a_group_of_its_source_and_words_without_media_tie_and_nothing_else(tied, tmp_path):
    found = by_name(packed_set(tmp_path, *tied))
    for names in TOGETHER:
        assert not any(parted(found, names[0], name) for name in names[1:]), names
    for one, other in APART:
        assert parted(found, one, other), (one, other)


def test_another_order_of_the_file_and_other_shards_give_the_same_folds(tied, tmp_path):
    rows, media = tied
    mixed = random.Random(1).sample(rows, len(rows))
    one = packed_set(tmp_path / "one", rows, media)
    other = packed_set(tmp_path / "other", mixed, media, queries_per_shard=3)
    assert by_name(one) == by_name(other)
    digests = {digest_of(folds_of(Shards(out, "train"), 5)) for out in (one, other)}
    assert len(digests) == 2, "the order of the samples is another"


def test_no_byte_of_a_medium_is_read(tied, tmp_path, monkeypatch):
    out = packed_set(tmp_path, *tied)
    before, data = by_name(out), (out / "train-00000.tar").read_bytes()
    pixels = [member for sample in Shards(out, "train") for film in sample.media for member in film]
    for each in pixels:
        data = data.replace(each, bytes(len(each)))
    (out / "train-00000.tar").write_bytes(data)
    read = []
    monkeypatch.setattr(room, "_read", lambda *given, found=room._read: read.append(int(given[2])) or found(*given))
    assert folds_of(Shards(out, "train"), 5) == list(before[2].values())
    assert sum(read) < len(data) - sum(map(len, pixels))
    assert max(map(len, pixels)) > max(read), "the control"


def foreign(path, samples, kind):
    """A tar of another tool: no field `members`, long names, headers of its own."""
    with tarfile.open(path, "w", format=kind) as tar:
        for key, members in samples.items():
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"folder/{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_shards_of_other_tools_are_folded_too(kind, tmp_path):
    def sample(name, seed, prompt):
        row = ranked(name, media=[Media("image", "0.png")], prompt=prompt)
        return {"png": picture(seed), "json": jsonl.dumps(row.to_json()).encode()}

    keys = [f"{'k' * 120}{number}" for number in range(12)]
    samples = {key: sample(f"q{at}", at // 2, f"Number {at}?") for at, key in enumerate(keys)}
    samples["text"] = {"json": jsonl.dumps(ranked("text").to_json()).encode()}
    samples["none"] = {"json": b'{"nothing": "ranked"}'}
    foreign(tmp_path / "train-0.tar", samples, kind)
    index(tmp_path, processes=1)
    shards = Shards(tmp_path, "train")
    found = [folds_of(shards, of) for of in (2, 3, 5, 7, 101)]
    assert {len(folds) for folds in found} == {14}
    for at in range(0, 12, 2):
        assert not parted(found, at, at + 1)
    assert all(parted(found, 0, at) for at in range(2, 14))


# What is held out -----------------------------------------------------------------------------------------------


def test_every_query_is_held_out_once(tied, tmp_path):
    shards = Shards(packed_set(tmp_path, *tied), "train")
    left = [kept(shards, Fold(2, out)) for out in range(2)]
    assert sorted(left[0] + left[1]) == [*range(len(shards))]
    folds = folds_of(shards, 2)
    assert [folds[at] for at in left[0]] == [1] * len(left[0])
    assert all(left)


def test_folds_that_hold_nothing_are_refused_and_named(tied, tmp_path):
    shards = Shards(packed_set(tmp_path, *tied), "train")
    empty = sorted({*range(40)} - {*folds_of(shards, 40)})
    message = rf"fold.of: expected queries in each of 40 folds .*got none in \[{empty[0]}, .*there are 8 groups"
    with pytest.raises(ValueError, match=message):
        kept(shards, Fold(40, 3))


@pytest.mark.parametrize(("of", "out", "message"), [(1, 0, r"fold\.of: expected 2"), (0, 0, "2 parts or more, got 0")])
def test_one_part_is_no_fold(of, out, message):
    with pytest.raises(ValueError, match=message):
        Fold(of, out)


@pytest.mark.parametrize("out", [-1, 5])
def test_a_fold_that_is_not_there_is_refused(out):
    with pytest.raises(ValueError, match=rf"fold.out: expected a part from 0 to 4, got {out}"):
        Fold(5, out)


def test_an_index_that_is_not_the_manifests_is_refused(tied, tmp_path):
    out = packed_set(tmp_path, *tied)
    path = out / "train-00000.idx.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ShardError, match=r"idx\.npy: expected the index of the manifest, got another"):
        folds_of(Shards(out, "train"), 2)
    path.unlink()
    with pytest.raises(ShardError, match="got no file"):
        folds_of(Shards(out, "train"), 2)


@pytest.mark.parametrize("place", [b"How many?", b".json\0"])
def test_a_damaged_record_stands_alone_and_moves_no_other(tied, tmp_path, place):
    out = shutil.copytree(packed_set(tmp_path, *tied), tmp_path / "damaged")
    before, data = folds_of(Shards(out, "train"), 11), (out / "train-00000.tar").read_bytes()
    at = data.index(place) + 2
    (out / "train-00000.tar").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    ties = list(room._ties(Shards(out, "train")))
    alone = [sample for sample, each in enumerate(ties) if each == (f"sample {sample}",)]
    assert len(alone) == 1
    after = folds_of(Shards(out, "train"), 11)
    assert len(after) == len(before)


def test_the_world_is_cut_into_folds_that_share_no_picture(world_shards):
    shards = Shards(world_shards, "train")
    folds, seen = folds_of(shards, 4), {}
    for sample, fold in zip(shards, folds, strict=True):
        for medium in sample.media:
            seen.setdefault(medium, set()).add(fold)
    assert {len(each) for each in seen.values()} == {1}
    assert len(seen) < len(shards), "the control: some are shared"


def test_a_record_that_is_packed_again_keeps_its_fold(tied, tmp_path):
    rows, media = tied
    jsonl.write(tmp_path / "ranked.jsonl", rows)
    assert list(jsonl.read(tmp_path / "ranked.jsonl", RankedQuery.from_json)) == rows
    pack(tmp_path / "ranked.jsonl", media, tmp_path / "few", processes=1, val=0.0, test=0.0, queries_per_shard=2)
    assert by_name(tmp_path / "few") == by_name(packed_set(tmp_path / "all", rows, media))
