"""`mmrlhf score --folds`: each training query is judged by the model that never saw it, and by one that did."""

import dataclasses
import json
import logging
import shutil

import pytest
import torch

from mmrlhf import cli, jsonl
from mmrlhf.datamodules import scoring
from mmrlhf.datamodules.folds import digest_of, folds_of
from mmrlhf.datamodules.module import RankedDataModule
from mmrlhf.datamodules.reader import Shards
from mmrlhf.fingerprint import Fingerprint
from mmrlhf.folds import Fold, Trained, run_of
from mmrlhf.modules import opinions
from mmrlhf.modules.reward import RewardReader
from mmrlhf.modules.rewardmodel import save_reward_model
from mmrlhf.provenance import model_digest, processor_digest
from mmrlhf.score import score

from .datamodules.made import packed_set
from .killing import kill
from .modules.families import saved
from .modules.test_reward import lively_head
from .modules.test_scorer import made, ours
from .test_score import (
    FRAMES,
    media,  # noqa: F401 - a fixture
    one_thread,  # noqa: F401 - of this file too
)
from .test_score_reward import FAMILY, JUDGING, SHORT, TEMPLATE, criticised, values, written

FOLDS = 3


def asked_by_name(shards):
    """The fold of every query, by split and name."""
    found = {}
    for split in ("train", "val", "test"):
        folds = folds_of(Shards(shards, split), FOLDS)
        found[split] = {sample.ranked.query.id: fold for sample, fold in zip(Shards(shards, split), folds, strict=True)}
    return found


@pytest.fixture(scope="module")
def shards(media, tmp_path_factory):  # noqa: F811
    out = packed_set(tmp_path_factory.mktemp("set"), criticised(), media)
    assert {*asked_by_name(out)["train"].values()} == {0, 1, 2}
    return out


def told(run, number, shards, **others):
    """Write what a training without a fold writes."""
    train = Shards(shards, "train")
    folds = digest_of(folds_of(train, FOLDS))
    record = Trained(Fold(FOLDS, number), train.digest, folds, "training", model_digest(run / "model"))
    dataclasses.replace(record, **others).write(run)


@pytest.fixture(scope="module")
def judges(shards, tmp_path_factory):
    """A model of every fold, each with a head of its own."""
    out = tmp_path_factory.mktemp("judges") / "run"
    for number in range(FOLDS):
        run = run_of(out, number)
        run.mkdir(parents=True)
        head = lively_head()
        with torch.no_grad():
            head.out.weight.mul_(1 + number).roll(number, 1)
            head.out.bias.add_(number)
        save_reward_model(RewardReader(ours(FAMILY), head), made(FAMILY)[1], JUDGING, run / "model", "# A judge")
        told(run, number, shards)
    return out


def crossed(shards, folder, judges, **options):
    folder.mkdir(exist_ok=True)
    return written(shards, folder, judges, folds=True, **{"batch_tokens": 1} | options)


@pytest.fixture(scope="module")
def whole(shards, judges, tmp_path_factory):
    """The file of a run that was left alone."""
    return crossed(shards, tmp_path_factory.mktemp("whole"), judges)


@pytest.fixture(scope="module")
def each(shards, judges, tmp_path_factory):
    """What each model says of everything, asked alone."""
    folders = [tmp_path_factory.mktemp(f"alone{number}") for number in range(FOLDS)]
    return [written(shards, folder, run_of(judges, at) / "model") for at, folder in enumerate(folders)]


# Who is asked -------------------------------------------------------------------------------------------------


def seen(out):
    return {(row["id"], row["response"]): row["reward_seen"] for row in jsonl.read(out) if "reward_seen" in row}


def check(out, each, shards):
    """Every reward is that of the model that never saw the query, and every other that of the next one."""
    folds, by_model, other = asked_by_name(shards), [values(one) for one in each], seen(out)
    for at, reward in values(out).items():
        (split,) = [split for split in folds if at[0] in folds[split]]
        fold = folds[split][at[0]]
        assert reward == pytest.approx(by_model[fold][at], rel=1e-5, abs=1e-5)
        assert (at in other) == (split == "train")
        if split == "train":
            assert other[at] == pytest.approx(by_model[(fold + 1) % FOLDS][at], rel=1e-5, abs=1e-5)
    assert all(abs(by_model[0][at] - by_model[1][at]) > 1e-3 for at in by_model[0]), "the control"
    assert values(out).keys() == by_model[0].keys()


@pytest.mark.parametrize("options", [{}, {"batch_tokens": 10**6, "workers": 1}, {"step": "separate"}])
def test_rewards_are_those_of_the_model_that_never_saw_the_query_beside_one_that_did(
    options, whole, each, shards, judges, tmp_path
):
    check(crossed(shards, tmp_path, judges, **options) if options else whole, each, shards)


def test_it_holds_without_critiques_and_with_those_that_each_model_writes_itself(shards, judges, tmp_path):
    for options in ({"critique": "none"}, {"critique": "generated", "saying": SHORT}):
        folder = tmp_path / options["critique"]
        alone = []
        for number in range(FOLDS):
            (folder / str(number)).mkdir(parents=True)
            alone.append(written(shards, folder / str(number), run_of(judges, number) / "model", **options))
        out = crossed(shards, folder, judges, **options)
        check(out, alone, shards)
        texts = [
            {(row["id"], row["response"]): row.get("critique", "") for row in jsonl.read(one)} for one in (out, *alone)
        ]
        folds = {name: fold for split in asked_by_name(shards).values() for name, fold in split.items()}
        assert all(text == texts[1 + folds[at[0]]][at] for at, text in texts[0].items())


def test_the_fingerprint_names_every_model_and_the_folds(whole, shards, judges):
    parts = {
        "values": "reward",
        **{f"model.{number}": model_digest(run_of(judges, number) / "model") for number in range(FOLDS)},
        "folds": digest_of(folds_of(Shards(shards, "train"), FOLDS)),
        "processor": processor_digest(run_of(judges, 0) / "model"),
        "template": TEMPLATE.digest,
        "frames": "4",
        "dtype": "float32",
        "critique": "critique_or_reason",
        **{f"data.{split}": Shards(shards, split).digest for split in ("train", "val", "test")},
    }
    assert Fingerprint.read(whole).parts == parts
    assert len({parts[f"model.{number}"] for number in range(FOLDS)}) == FOLDS


def test_the_gap_is_told_of_every_training_pair_and_the_account_balances(whole, each, shards, judges, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "mmrlhf"):
        crossed(shards, tmp_path, judges)
    rewards, other, margins = values(whole), seen(whole), []
    for sample in Shards(shards, "train"):
        name = sample.ranked.query.id
        for pair in sample.ranked.pairs():
            winner, loser = ((name, place) for place in pair)
            margins.append((other[winner] - other[loser], rewards[winner] - rewards[loser]))
    one, two = (sum(column) / len(margins) for column in zip(*margins, strict=True))
    queries = sum(bool(sample.ranked.pairs()) for sample in Shards(shards, "train"))
    line = f"cross-fitted: {len(margins)} pairs of {queries} queries: mean margin {one:.3f} by a model that saw the "
    assert f"{line}query, {two:.3f} by one that did not, a difference of {one - two:+.3f} [" in caplog.text
    assert "score: 9 in = 9 out + 0 skipped; fixed no_critique" in caplog.text


def test_each_model_is_loaded_once(whole, shards, judges, tmp_path, monkeypatch):
    loaded, init = [], opinions.Judge.__init__
    monkeypatch.setattr(
        opinions.Judge, "__init__", lambda judge, folder, *more: loaded.append(folder) or init(judge, folder, *more)
    )
    out = crossed(shards, tmp_path, judges)
    assert loaded == [run_of(judges, number) / "model" for number in range(FOLDS)]
    assert out.read_bytes() == whole.read_bytes()
    crossed(shards, tmp_path, judges)
    assert len(loaded) == FOLDS, "what is finished is left alone"


def test_only_the_splits_that_are_asked_for_are_scored(whole, shards, judges, tmp_path):
    out = crossed(shards, tmp_path, judges, splits=["val", "test"])
    assert whole.read_bytes().endswith(out.read_bytes())
    assert {name for name, _ in values(out)} == {"other", "last"}


# Kills, and what is there already -----------------------------------------------------------------------------


@pytest.mark.parametrize("call", [1, 9, 16])
def test_killed_and_continued_the_file_has_the_same_bytes(call, whole, shards, judges, tmp_path, monkeypatch):
    options = {"batch_tokens": 1, "folds": True}
    kill(lambda: written(shards, tmp_path, judges, **options), jsonl.Journal, "append", call, after=True)
    journals = sorted((tmp_path / "rewards.jsonl.unfinished").glob("journal-*.jsonl"))
    assert sum(len(list(jsonl.read(path))) for path in journals) == call
    computed = []
    monkeypatch.setattr(scoring, "by_query", lambda *args, found=scoring.by_query: computed.append(1) or found(*args))
    out = crossed(shards, tmp_path, judges)
    assert out.read_bytes() == whole.read_bytes()
    assert len(computed) == 2 * 7 + 2 - call
    assert not (tmp_path / "rewards.jsonl.unfinished").exists()


def test_a_file_of_one_model_is_not_taken_for_one_of_folds(whole, each, shards, judges, tmp_path):
    for path in each[0].parent.glob("rewards.jsonl*"):
        shutil.copy(path, tmp_path)
    with pytest.raises(ValueError, match=r"rewards.jsonl was made with another model.0 \(none instead of"):
        crossed(shards, tmp_path, judges)


# What is refused ----------------------------------------------------------------------------------------------


@pytest.fixture
def changed(judges, tmp_path):
    return shutil.copytree(judges, tmp_path / "changed")


def other_weight(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def other_tokenizer(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"more": 1}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run, shards: (run / "fold-1" / "fold.json").unlink(), "fold-1: expected a fold that is trained, found"),
        (lambda run, shards: shutil.rmtree(run / "fold-2"), "fold-2: expected a fold that is trained, found no fold"),
        (
            lambda run, shards: told(run / "fold-0", 0, shards, data="other"),
            "expected a model of a fold of these train",
        ),
        (lambda run, shards: told(run / "fold-2", 2, shards, data="other"), "fold-2: .* got another data; run `mmrlhf"),
        (lambda run, shards: told(run / "fold-1", 1, shards, fold=Fold(4, 1)), "fold-1: expected fold 1 of 3"),
        (lambda run, shards: told(run / "fold-1", 1, shards, training="other"), "fold-1: .* got another training"),
        (lambda run, shards: other_weight(run / "fold-1" / "model"), "fold-1/model: expected the model of which fold"),
        (
            lambda run, shards: other_tokenizer(run / "fold-2" / "model"),
            "fold-2/model: expected the processor of fold-0",
        ),
        (
            lambda run, shards: [told(run / f"fold-{at}", at, shards, folds="other") for at in range(FOLDS)],
            "expected the folds with which the models were trained, got others",
        ),
    ],
)
def test_models_that_are_not_those_of_these_folds_are_refused(change, message, changed, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(opinions.Judge, "__init__", lambda *_: pytest.fail("no weights are to be read"))
    change(changed, shards)
    with pytest.raises(ValueError, match=message):
        crossed(shards, tmp_path, changed)
    assert not (tmp_path / "rewards.jsonl").exists()
    assert not (tmp_path / "rewards.jsonl.unfinished").exists()


def test_other_shards_and_shards_without_training_queries_are_refused(judges, tmp_path, media):  # noqa: F811
    for rows in (criticised()[1:], criticised()[-1:]):
        other = packed_set(tmp_path / str(len(rows)), rows, media)
        with pytest.raises(ValueError, match=r"fold-0: expected a model of a fold of these training queries"):
            crossed(other, tmp_path, judges)


def test_folds_are_of_a_reward_model_and_a_single_model_has_none(shards, judges, tmp_path):
    for options in ({}, {"reference": str(judges)}):
        with pytest.raises(ValueError, match="folds: expected it beside reward"):
            score(shards, tmp_path / "out.jsonl", folds=True, **options)
    with pytest.raises(ValueError, match=r"model/fold-0: expected a fold that is trained, found no fold\.json"):
        crossed(shards, tmp_path, judges / "fold-0" / "model")


# Where it is read ---------------------------------------------------------------------------------------------


def test_a_training_reads_the_rewards_of_who_never_saw_the_query(whole, shards, tmp_path):
    policy = saved(FAMILY, tmp_path / "policy")
    options = {"global_batch": 1, "cache": tmp_path, "frames": FRAMES, "workers": 0, "max_skipped": 1.0}
    module = RankedDataModule(shards, policy, scores=whole, needs=("reward",), **options)
    rewards, found = values(whole), {}
    for batch in module.train_dataloader():
        found |= {(batch.ids[0], place): reward for place, reward in enumerate(batch.rewards.tolist())}
    assert len({name for name, _ in found}) == 5
    assert found == {at: pytest.approx(rewards[at], rel=1e-6) for at in found}
    assert any(abs(seen(whole)[at] - found[at]) > 1e-3 for at in found), "the control"


def test_the_command_does_the_same(whole, shards, judges, tmp_path):
    words = ["score", shards, "--reward", judges, "--folds", "--critique", "given", "--out", tmp_path / "rewards.jsonl"]
    words += ["--cache", tmp_path, "--batch-tokens", "1", "--workers", "0"]
    assert cli.main([*map(str, words)]) == 0
    assert (tmp_path / "rewards.jsonl").read_bytes() == whole.read_bytes()
