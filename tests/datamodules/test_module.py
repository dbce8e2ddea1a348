"""The data module hands a trainer every admitted sample, as often as it should and in the order that was decided."""

import gc
import json
import re
import shutil
import tracemalloc
import types
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from mmrlhf import jsonl
from mmrlhf.batches import IGNORED, PADDING
from mmrlhf.callbacks.consumption import ConsumptionGuard
from mmrlhf.datamodules.folds import folds_of
from mmrlhf.datamodules.module import RankedDataModule
from mmrlhf.datamodules.order import Order
from mmrlhf.datamodules.reader import Shards
from mmrlhf.fingerprint import Fingerprint, of_text
from mmrlhf.folds import Fold
from mmrlhf.provenance import processor_digest
from mmrlhf.queries import Media

from .made import packed_set, picture, ranked, scores_file

GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Thirteen short training queries and five others, some with a picture; their names tell their numbers."""
    folder = tmp_path_factory.mktemp("small")
    rows = []
    for number in range(23):
        split = "train" if number < 13 else "val" if number < 18 else "test"
        media = [Media("image", f"{number}.png")] if number % 3 == 0 else []
        if media:
            (folder / f"{number}.png").write_bytes(picture(number))
        texts = ("yes", "no", "perhaps " * (number % 5))
        rows.append(ranked(f"q{number}", texts[: 2 + number % 2], prompt=f"Is it {number}?", media=media, split=split))
    return packed_set(folder, rows)


@pytest.fixture
def make(small, processor_folder, tmp_path):
    """Make a data module of the small set, with a cache of its own."""

    def module(shards=small, **options):
        sizes = {"global_batch": GLOBAL_BATCH, "micro_batch": 2, "cache": tmp_path / "cache", "workers": 0}
        return RankedDataModule(shards, processor_folder, **sizes | options)

    return module


def placed(module, rank, ranks):
    """The same module as one rank of several has it."""
    module.trainer = types.SimpleNamespace(global_rank=rank, world_size=ranks)
    return module


def ids_of(loader):
    return [name for batch in loader for name in batch.ids]


def names(number, split="train"):
    first = {"train": 0, "val": 13, "test": 18}[split]
    return [f"q{first + place}" for place in range(number)]


# What is decided before a training --------------------------------------------------------------------------


def test_preparing_decides_what_the_training_needs_and_nothing_else(make, tmp_path):
    module = make()
    module.prepare_data()
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()) == ["train", "val"]


@pytest.mark.parametrize(
    ("stage", "expected"), [("fit", "train val"), ("validate", "val"), ("test", "test"), ("predict", "test")]
)
def test_every_stage_has_its_splits(make, tmp_path, stage, expected):
    make().setup(stage)
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()) == expected.split()


def test_a_stage_that_does_not_exist_is_no_test(make):
    with pytest.raises(KeyError):
        make().setup("train")


def decided(tmp_path):
    return {path.name for path in (tmp_path / "cache").iterdir()}


def test_the_same_settings_find_what_was_decided(make, tmp_path):
    first = make().rows("train").admission
    again = make(global_batch=4, layout="rows", bucket=3, seed=7, workers=1).rows("train").admission
    assert again.folder == first.folder
    assert len(decided(tmp_path)) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"frames": 5}),
        ({}, {"task": "critiques"}),
        ({}, {"pairs": "adjacent"}),
        ({}, {"max_tokens": 4000}),
        ({}, {"too_long": "drop_query"}),
        ({"task": "critiques"}, {"task": "critiques", "critique": "reason"}),
        ({"task": "critiques"}, {"task": "critiques", "template": "other.txt"}),
        ({"scores": "scores.jsonl", "needs": ("reward",)}, {}),
        ({"scores": "scores.jsonl", "needs": ("reward",)}, {"scores": "other.jsonl", "needs": ("reward",)}),
        (
            {"scores": "scores.jsonl", "needs": ("reward",)},
            {"scores": "scores.jsonl", "needs": ("reward", "reference_logp")},
        ),
    ],
)
def test_what_rows_depend_on_decides_anew(make, small, tmp_path, one, other):
    (tmp_path / "other.txt").write_text("{question} {response}")
    write_scores(small, tmp_path / "scores.jsonl", reference_logp=-1.5)
    write_scores(small, tmp_path / "other.jsonl", shift=1)

    def options(given):
        return {name: tmp_path / value if name in {"scores", "template"} else value for name, value in given.items()}

    digests = {make(**options(given)).rows("train").admission.digest for given in (one, other)}
    assert len(digests) == len(decided(tmp_path)) == 2


def write_scores(shards, path, shift=0, without=(), **more):
    """A reward for every training response that tells which it is: a thousand times its query, and its place."""
    rows = []
    for sample in Shards(shards, "train"):
        name = sample.ranked.query.id
        for place, response in enumerate(sample.ranked.responses):
            reward = 1000 * int(name[1:]) + place + shift
            rows.append({"id": name, "response": place, "digest": of_text(response.text), "reward": reward} | more)
    return scores_file(path, [row for row in rows if row["id"] not in without])


def test_needs_that_an_earlier_run_had_not_are_asked_for(make, small, tmp_path):
    scores = write_scores(small, tmp_path / "scores.jsonl", without=["q5"])
    assert len(make().rows("train")) == 13
    with pytest.raises(ValueError, match="no reward for 1 of 13 queries"):
        make(scores=scores, needs=("reward",)).rows("train")


def test_several_files_of_scores_add_up_and_each_of_them_counts(make, small, tmp_path):
    rewards = write_scores(small, tmp_path / "rewards.jsonl")
    logps = [row | {"reference_logp": -row["reward"] - 0.5} for row in jsonl.read(rewards)]
    logps = scores_file(tmp_path / "l.jsonl", [{k: v for k, v in row.items() if k != "reward"} for row in logps])
    options = {"needs": ("reward", "reference_logp")}
    both = make(scores=(rewards, logps), **options).rows("train")
    for item in map(both.__getitem__, range(13)):
        assert item.reference_logps.tolist() == [-reward - 0.5 for reward in item.rewards.tolist()]
    assert make(scores=[logps, rewards], **options).rows("train").admission.folder == both.admission.folder
    with pytest.raises(ValueError, match=r"rewards\.jsonl: no reward and reference_logp for 13 of 13 queries"):
        make(scores=rewards, **options).rows("train")


def test_scores_are_checked_against_data_processor_and_frames_before_anything_is_admitted(
    make, small, processor_folder, tmp_path
):
    path = write_scores(small, tmp_path / "scores.jsonl", reference_logp=-1.5)
    options = {"scores": path, "needs": ("reference_logp",)}
    processor, data = processor_digest(processor_folder), Shards(small, "train").digest
    right = {"values": "reference_logp", "model": "m", "template": "chat", "frames": "8", "dtype": "float32"}
    right |= {"processor": processor, "data.train": data}
    assert make(**options).reference_fingerprint is None
    for part in ("processor", "frames", "data.train", "template"):
        Fingerprint(right | {part: "other"}).write(path)
        with pytest.raises(ValueError, match=rf"scores\.jsonl was made with another {part} \(other\.\. instead of"):
            make(**options).rows("train")
    assert not (tmp_path / "cache").exists()
    Fingerprint(right).write(path)
    assert len(make(**options).rows("train")) == 13
    assert make(**options).reference_fingerprint == "m"
    with pytest.raises(ValueError, match=r"another frames \(8\.\. instead of 5\.\.\); run `mmrlhf score`"):
        make(frames=5, **options).rows("train")


def test_scores_of_people_that_are_needed_are_asked_of_every_response(make):
    assert len(make().rows("train")) == 13
    with pytest.raises(ValueError, match=r"expected at most 7.69% skipped, got 100.00% .* no_annotation 13"):
        make(needs=("annotated",)).rows("train")


def test_a_processor_may_be_on_the_hub(make, small, processor_folder, tmp_path, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append(name)
        return str(processor_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    options = {"global_batch": 8, "cache": tmp_path / "cache"}
    found = RankedDataModule(small, "somebody/model", **options).rows("train")
    assert asked == ["somebody/model"]
    assert found.admission.digest == make().rows("train").admission.digest


def test_a_checkpoint_of_text_alone_is_no_processor(processor, small, tmp_path):
    processor.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["processor_class"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ValueError, match=r"processor: expected one with a tokenizer, got a \w+ from .*; give the folder"
    ):
        RankedDataModule(small, tmp_path).setup("fit")


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_changed_processor_decides_anew(make, processor_folder, small, tmp_path, name):
    first = make().rows("train").admission
    changed = shutil.copytree(processor_folder, tmp_path / "processor")
    (changed / "weights.safetensors").write_bytes(b"0")
    options = {"global_batch": 8, "cache": tmp_path / "cache"}
    assert RankedDataModule(small, changed, **options).rows("train").admission.digest == first.digest
    with (changed / name).open("a") as file:
        file.write("\n")
    assert RankedDataModule(small, changed, **options).rows("train").admission.digest != first.digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "answer"}, "task: expected one of answers, critiques, got 'answer'"),
        ({"layout": "row"}, "layout: expected one of packed, rows"),
        ({"too_long": "cut"}, "too_long: expected one of drop_responses"),
        ({"pairs": "every"}, "pairs: expected one of all, adjacent"),
        ({"critique": "reasons"}, "critique: expected one of critique_or_reason"),
        (
            {"needs": ("rewards",), "scores": "x"},
            "needs: expected one of reward, reference_logp, annotated, got 'rewards'",
        ),
        ({"needs": ("reward",)}, "scores: expected a file with reward, got none; run `mmrlhf score`"),
        ({"needs": ("reward", "annotated")}, "scores: expected a file with reward, got none; run `mmrlhf score`"),
        ({"needs": ("annotated",), "scores": "x"}, "needs: expected reward, reference_logp or both, since scores are"),
        ({"frames": 0}, "frames: expected 1 or more, got 0"),
        ({"max_tokens": 0}, "max_tokens: expected 1 or more"),
        ({"bucket": -1}, "bucket: expected 0 or more"),
        ({"workers": -1}, "workers: expected 0 or more"),
        ({"max_skipped": 1.5}, "max_skipped: expected 0 to 1, got 1.5"),
        ({"max_skipped": -0.1}, "max_skipped: expected 0 to 1, got -0.1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_at_once(make, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make(**options)


def test_a_processor_that_is_not_there_is_named(small, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint: expected a folder or the name of a repository .*, got '.*none'"):
        RankedDataModule(small, tmp_path / "none").setup("fit")


def test_a_processor_without_padding_is_named(make):
    module = make()
    module._reading.processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="processor: expected a tokenizer with a padding token"):
        module.train_dataloader()


def test_a_processor_without_films_has_the_frames_of_the_config_or_the_default(make):
    for frames, expected in ((None, 8), (3, 3)):
        module = make(frames=frames)
        del module._reading.processor.video_processor
        assert module._reading.encoder().frames == expected


# What comes out ---------------------------------------------------------------------------------------------


def steps(module_of, ranks, number):
    """The sets of samples of the first optimizer steps, from the loaders of all ranks."""
    loaders = [placed(module_of(), rank, ranks).train_dataloader() for rank in range(ranks)]
    streams = []
    for loader in loaders:
        found = []
        while len(found) < number * loader.accumulation:
            found += [batch.ids for batch in loader]
        streams.append(found)
    return [
        Counter(
            name for stream in streams for ids in stream[at * (4 // ranks) : (at + 1) * (4 // ranks)] for name in ids
        )
        for at in range(number)
    ]


@pytest.mark.parametrize("bucket", [0, 2])
def test_a_step_has_the_same_samples_for_any_number_of_ranks_and_workers(make, bucket):
    expected = steps(lambda: make(bucket=bucket), 1, 5)
    assert {sum(step.values()) for step in expected} == {GLOBAL_BATCH}
    assert steps(lambda: make(bucket=bucket), 2, 5) == expected
    assert steps(lambda: make(bucket=bucket), 4, 5) == expected
    for workers in (1, 2):
        assert steps(lambda: make(bucket=bucket, workers=workers), 1, 5) == expected  # noqa: B023


@pytest.mark.parametrize("bucket", [0, 2])
def test_every_admitted_sample_comes_once_in_every_pass(make, bucket):
    loader = make(bucket=bucket, micro_batch=1, global_batch=1).train_dataloader()
    for _ in range(3):
        assert sorted(ids_of(loader)) == sorted(names(13))


def test_the_order_is_that_of_the_seed(make):
    for seed in (0, 3):
        found = ids_of(make(micro_batch=1, global_batch=1, seed=seed).train_dataloader())
        assert found == [f"q{number}" for number in Order(13, seed).samples(np.arange(13))]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("split", ["val", "test"])
def test_every_query_is_evaluated_once_over_all_ranks(make, split, ranks):
    per_rank = []
    for rank in range(ranks):
        module = placed(make(), rank, ranks)
        module.setup("fit")
        per_rank.append(list(module.val_dataloader() if split == "val" else module.test_dataloader()))
    assert len({len(batches) for batches in per_rank}) == 1
    found = [name for batches in per_rank for batch in batches for name in batch.ids]
    assert sorted(filter(None, found)) == sorted(names(5, split))
    assert found.count("") == len(found) - 5 == -5 % (2 * ranks)
    for batch in (batch for batches in per_rank for batch in batches):
        counted = [bool(name) for name in batch.ids]
        told = (batch.rows.labels != IGNORED).any(1).tolist()
        assert told == counted


def test_a_set_without_validation_has_none(make, tmp_path):
    shards = packed_set(tmp_path, [ranked("a"), ranked("b")])
    module = make(shards, global_batch=2)
    module.setup("fit")
    assert module.val_dataloader() == []


def test_the_mean_of_pairs_and_the_steps_of_a_pass_are_those_of_what_is_admitted(make):
    module = make()
    # Two responses make one pair, three make three; q5, q15, ... have two equal ones, which make none.
    assert module.mean_pairs == sum(3 if number % 2 else 1 for number in range(13)) / 13
    assert module.steps_per_pass == 13 / 8


def test_a_fold_is_held_out_of_the_training_and_of_nothing_else(make, small):
    shards = Shards(small, "train")
    folds = folds_of(shards, 3)
    for out in range(3):
        module = make(fold=Fold(3, out), global_batch=1, micro_batch=1)
        left = [sample.ranked for sample, fold in zip(shards, folds, strict=True) if fold != out]
        assert 0 < len(left) < len(shards)
        assert sorted(ids_of(module.train_dataloader())) == sorted(row.query.id for row in left)
        assert module.mean_pairs == sum(len(row.pairs()) for row in left) / len(left)
        assert module.steps_per_pass == len(left)
        assert module.rows("train").admission.ledger.skipped == {"held_out": len(shards) - len(left)}
        assert sorted(ids_of(module.val_dataloader())) == names(5, "val")
        assert sorted(ids_of(module.test_dataloader())) == names(5, "test")
    digests = {make(fold=fold).rows("train").admission.digest for fold in (None, Fold(3, 0), Fold(3, 1), Fold(2, 0))}
    assert len(digests) == 4


def test_more_folds_than_groups_are_refused_before_the_processor_is_read(small, tmp_path):
    module = RankedDataModule(small, tmp_path / "no processor", cache=tmp_path, fold=Fold(99, 0))
    with pytest.raises(ValueError, match=r"fold.of: expected queries in each of 99 folds of .*: there are 13 groups"):
        module.rows("train")


def test_rewards_stand_beside_the_responses_that_are_left(make, small, tmp_path):
    options = {"scores": write_scores(small, tmp_path / "scores.jsonl"), "needs": ("reward",), "max_skipped": 1.0}
    whole = make(**options).rows("train")
    (limit,) = [item.row.longest - 1 for item in map(whole.__getitem__, range(13)) if item.row.ranked.query.id == "q7"]
    cut = make(**options, max_tokens=limit, micro_batch=1, global_batch=1)
    kept = {}
    for rows in (whole, cut.rows("train")):
        for number in range(len(rows)):
            item = rows[number]
            name = int(item.row.ranked.query.id[1:])
            assert item.rewards.tolist() == [1000 * name + place for place in item.row.places]
            assert item.reference_logps.isnan().all()
            kept[name] = (*kept.get(name, ()), len(item.row.places))
    assert kept[7] == (3, 2)
    for batch in cut.train_dataloader():
        assert batch.rewards[0] == 1000 * int(batch.ids[0][1:])
        assert len(batch.rewards) == batch.responses.sum()


def test_layout_and_pairs_are_those_asked_for(make):
    def first(**options):
        return next(iter(make(micro_batch=8, **options).train_dataloader()))

    assert len(first().rows.input_ids) == 8
    assert len(first(layout="rows").rows.input_ids) == first().responses.sum() > 8
    (whole, some) = (first(pairs=strategy) for strategy in ("all", "best_worst"))
    assert whole.ids == some.ids
    assert some.pairs.tolist() == [pair for pair in whole.pairs.tolist() if pair in some.pairs.tolist()]
    assert len(some.pairs) == 8 < len(whole.pairs)


def test_a_query_of_ties_alone_serves_the_critiques_and_not_the_answers(make, tmp_path):
    shards = packed_set(tmp_path, [ranked("a"), ranked("b", ranks=(1, 1))])
    assert [len(make(shards, task=task, max_skipped=1.0).rows("train")) for task in ("answers", "critiques")] == [1, 2]


def test_more_left_out_than_allowed_is_refused(make, tmp_path):
    shards = packed_set(tmp_path, [ranked("a"), *(ranked(name, ranks=(1, 1)) for name in "bc")])
    with pytest.raises(ValueError, match=r"expected at most 33.33% skipped, got 66.67%"):
        make(shards).setup("fit")


def test_one_query_of_a_small_split_may_be_left_out_but_not_where_none_may(make, tmp_path):
    shards = packed_set(tmp_path, [ranked("a"), ranked("b", ranks=(1, 1))])
    assert len(make(shards).rows("train")) == 1
    with pytest.raises(ValueError, match=r"expected at most 0.00% skipped, got 50.00%"):
        make(shards, max_skipped=0.0).rows("train")


def test_damage_after_the_decision_is_an_error(small, make, tmp_path):
    shards = shutil.copytree(small, tmp_path / "shards")
    module = make(shards)
    assert len(module.rows("train")) == 13
    data = (shards / "train-00000.tar").read_bytes()
    place = data.index(b"Is it 7?")
    (shards / "train-00000.tar").write_bytes(data[:place] + b"i" + data[place + 1 :])
    again = make(shards)
    with pytest.raises(ValueError, match=r"train-00000.tar: sample \d+ at byte \d+: expected a sample of .* CRC"):
        ids_of(again.train_dataloader())


def test_rows_that_come_out_otherwise_than_admitted_are_an_error(make):
    module = make()
    rows = module.rows("train")
    rows.encode.processor.chat_template = rows.encode.processor.chat_template.replace("assistant\n", "assistant \n")
    with pytest.raises(ValueError, match=r"query 'q\d+': expected tokens and responses as admitted, \(\d+, \d\), got"):
        rows[0]


# The world --------------------------------------------------------------------------------------------------


def padding(loader, passes):
    cells = filled = 0
    for _ in range(passes):
        for batch in loader:
            cells += batch.rows.segment_ids.numel()
            filled += int((batch.rows.segment_ids == PADDING).sum())
    return filled / cells


def test_buckets_save_padding_and_lose_no_sample(world_shards, processor_folder, tmp_path):
    def module(bucket, batch):
        options = {"global_batch": batch, "micro_batch": batch, "bucket": bucket, "cache": tmp_path}
        return RankedDataModule(world_shards, processor_folder, **options)

    plain, sorted_ = (padding(module(bucket, 8).train_dataloader(), 1) for bucket in (0, 8))
    assert sorted_ < 0.6 * plain
    loader = module(32, 1).train_dataloader()
    every = {sample.ranked.query.id for sample in Shards(world_shards, "train")}
    assert sorted(ids_of(loader)) == sorted(every)


def test_the_whole_world_is_read_for_both_tasks(world_shards, processor_folder, tmp_path):
    for task in ("answers", "critiques"):
        module = RankedDataModule(
            world_shards, processor_folder, task=task, global_batch=4, micro_batch=4, cache=tmp_path
        )
        module.setup("fit")
        skipped = set(module.rows("train").admission.ledger.skipped)
        assert skipped <= {"no_pairs"}
        (batch, *_) = module.train_dataloader()
        assert len(batch.pairs) > 0


def test_reading_again_and_again_holds_no_more_memory(make):
    rows = make().rows("train")
    tracemalloc.start()
    try:
        held = []
        for _ in range(4):
            for number in range(len(rows)):
                rows[number]
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[-1] - held[1] < 30_000, held


# A trainer --------------------------------------------------------------------------------------------------


class Sums(LightningModule):
    """A number per token, summed up; keeps what it has seen."""

    def __init__(self):
        super().__init__()
        self.numbers = torch.nn.Embedding(2000, 1)
        self.seen = {"train": [], "val": [], "test": []}

    def training_step(self, batch, batch_idx):
        """Sum."""
        self.seen["train"].append(batch.ids)
        return self.numbers(batch.rows.input_ids).mean()

    def validation_step(self, batch, batch_idx):
        """Look."""
        self.seen["val"].append(batch.ids)

    def test_step(self, batch, batch_idx):
        """Look."""
        self.seen["test"].append(batch.ids)

    def predict_step(self, batch, batch_idx):
        """Say what was seen."""
        return batch.ids

    def configure_optimizers(self):
        """Descend."""
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(**options):
    warnings.simplefilter("ignore")
    silent = {
        "logger": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    return Trainer(accelerator="cpu", devices=1, callbacks=[ConsumptionGuard()], **silent | options)


def test_a_trainer_trains_on_the_planned_steps_and_validates_and_tests_every_query_once(make):
    model, module = Sums(), make()
    trainer(max_steps=3, max_epochs=-1, accumulate_grad_batches=4, num_sanity_val_steps=0).fit(model, module)
    flat = [name for ids in model.seen["train"] for name in ids]
    assert flat == [f"q{number}" for number in Order(13, 0).samples(np.arange(3 * GLOBAL_BATCH))]
    evaluated = [name for ids in model.seen["val"] for name in ids if name]
    assert evaluated == names(5, "val") * (len(evaluated) // 5) != []
    trainer().test(model, module)
    assert [name for ids in model.seen["test"] for name in ids if name] == names(5, "test")
    assert [name for ids in trainer().predict(model, module) for name in ids if name] == names(5, "test")


def test_a_trainer_trains_where_there_is_nothing_to_validate_or_test(make, tmp_path):
    shards = packed_set(tmp_path, [ranked(f"q{number}") for number in range(8)])
    model = Sums()
    trainer(max_steps=2, max_epochs=-1, accumulate_grad_batches=4).fit(model, make(shards))
    assert Counter(name for ids in model.seen["train"] for name in ids) == Counter(names(8) * 2)
    assert {path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()} == {"train"}


@pytest.mark.parametrize(("stage", "split"), [("validate", "val"), ("test", "test")])
def test_a_trainer_that_does_not_train_decides_what_it_needs_alone(make, tmp_path, stage, split):
    getattr(trainer(), stage)(Sums(), make(), verbose=False)
    assert {path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()} == {split}


def test_a_trainer_resumes_where_its_checkpoint_was_saved(make, tmp_path):
    whole, first, second = Sums(), Sums(), Sums()
    options = {"max_epochs": -1, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    trainer(max_steps=7, **options).fit(whole, make(bucket=2, global_batch=4))
    begun = trainer(max_steps=4, **options)
    begun.fit(first, make(bucket=2, global_batch=4))
    begun.save_checkpoint(tmp_path / "last.ckpt")
    resumed = trainer(max_steps=7, **options)
    module = make(bucket=2, global_batch=4, workers=1)
    resumed.fit(second, module, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert first.seen["train"] + second.seen["train"] == whole.seen["train"]


def test_a_checkpoint_of_other_terms_is_refused(make, tmp_path):
    options = {"max_epochs": -1, "accumulate_grad_batches": 4, "limit_val_batches": 0}
    begun = trainer(max_steps=1, **options)
    begun.fit(Sums(), make())
    begun.save_checkpoint(tmp_path / "last.ckpt")
    resumed = trainer(max_steps=2, **options)
    with pytest.raises(ValueError, match="cannot resume exactly: data was"):
        resumed.fit(Sums(), make(pairs="adjacent"), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_code_in_a_checkpoint_is_not_run_even_if_somebody_says_yes(
    make, small, processor_folder, tmp_path, monkeypatch
):
    hostile = shutil.copytree(processor_folder, tmp_path / "processor")
    ran = tmp_path / "ran"
    (hostile / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    settings = json.loads((hostile / "processor_config.json").read_text())
    settings |= {"processor_class": "Evil", "auto_map": {"AutoProcessor": "evil.Evil"}}
    (hostile / "processor_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="trust_remote_code"):
        RankedDataModule(small, hostile, cache=tmp_path / "cache").rows("train")
    assert not ran.exists()
