"""A file of scores holds what the model's own forward says of each response, whatever interrupts."""

import json
import logging
import shutil
import time
from contextlib import suppress

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mmrlhf import cli, jsonl, settings
from mmrlhf import score as door
from mmrlhf.datamodules import scoring
from mmrlhf.datamodules.collate import packed
from mmrlhf.datamodules.module import RankedDataModule
from mmrlhf.datamodules.reader import Shards
from mmrlhf.datamodules.reading import Reading
from mmrlhf.datamodules.rows import Answers
from mmrlhf.datamodules.scoring import planned, readable
from mmrlhf.fingerprint import Fingerprint, of_text
from mmrlhf.modules import opinions
from mmrlhf.modules.loading import load_backbone
from mmrlhf.modules.scorer import ResponseScorer
from mmrlhf.provenance import model_digest, processor_digest
from mmrlhf.queries import Media
from mmrlhf.score import score

from .datamodules.made import packed_set, picture, ranked
from .killing import FORKED, kill
from .modules.families import saved
from .threads import one_thread  # noqa: F401 - of itself, for the whole module

FRAMES = 4
LONG = "I think that there is a green ring on the left and a blue circle on the right, and that neither moves. " * 3
PICTURE, PICTURES = [Media("image", "0.png")], [Media("image", "1.png"), Media("image", "2.png", 5)]
FILM = [Media("video", "film")]


def queries(films=True):
    """Queries with media of every kind: two to five responses, of no word, equal ones, ties, none to be compared."""
    rows = [
        ranked("text", ("It is red.", "Blue", LONG), ranks=(2, 1, 2)),
        ranked("picture", ("A ring", "", "a red square", LONG), media=PICTURE),
        ranked("pictures", ("left", "the right one", "both", "none of them", "one"), media=PICTURES, prompt="Both of?"),
        ranked("ties", ("f", "g"), ranks=(1, 1), media=PICTURE),
        ranked("same", ("h", "h")),
        ranked("long", (LONG, "It is " + LONG), prompt=LONG),
        ranked("other", ("yes", "no"), media=[Media("image", "3.png")], split="val"),
        ranked("last", ("up", "It does not move."), split="test"),
    ]
    film = ranked("film", ("up", LONG, "it rests", "left, then down"), media=FILM, prompt="Does it move?")
    return [*rows[:3], film, *rows[3:]] if films else rows


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    (folder / "film").mkdir()
    for number in range(7):
        (folder / "film" / f"{number}.png").write_bytes(picture(10 + number))
    for number, size in enumerate([(60, 40), (80, 30), (30, 70), (50, 50)]):
        (folder / f"{number}.png").write_bytes(picture(number, size))
    return folder


@pytest.fixture(scope="module")
def shards(media, tmp_path_factory):
    return packed_set(tmp_path_factory.mktemp("set"), queries(), media)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return saved("llava_onevision", tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def whole(shards, reference, tmp_path_factory):
    """The file of a run that was left alone, with a batch per query."""
    return written(shards, tmp_path_factory.mktemp("whole"), reference, batch_tokens=1)


def written(shards, folder, reference, **options):
    """Score, without workers, and return the file."""
    out = folder / "scores.jsonl"
    score(shards, out, str(reference), **{"frames": FRAMES, "workers": 0, "cache": folder / "cache"} | options)
    return out


def values(out):
    return {(row["id"], row["response"]): row["reference_logp"] for row in jsonl.read(out)}


def apart(one, other):
    """The largest difference of two files, relative to the numbers where these are large."""
    one, other = values(one), values(other)
    assert one.keys() == other.keys()
    return max(abs(one[place] - other[place]) / max(1, abs(one[place])) for place in one)


def samples(shards):
    return [sample for split in ("train", "val", "test") for sample in Shards(shards, split)]


# What is in the file ------------------------------------------------------------------------------------------


def alone(folder, samples):
    """Each response by the family's own forward in double precision, in a row of its own, from all of its logits."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    encode = Answers(Reading(folder).processor, FRAMES)
    found = {}
    for sample in samples:
        row = encode(sample)
        features = {k: v.double() if v.is_floating_point() else v for k, v in row.features.items()}
        for place, (_, said) in enumerate(row.continuations):
            ids = torch.cat([row.prefix, said])[None]
            types = {k: torch.cat([v, torch.zeros(len(said), dtype=v.dtype)])[None] for k, v in row.per_token.items()}
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **features, **types).logits[0]
            logps = logits.log_softmax(-1)[len(row.prefix) - 1 : -1]
            found[sample.ranked.query.id, place] = float(logps.gather(-1, said[:, None]).sum())
    return found


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llava_onevision", {"step": "shared_prefix"}),
        ("llava_onevision", {"step": "separate", "batch_tokens": 2000, "chunk": 7}),
        ("qwen2_5_vl", {}),
        ("gemma3", {}),
    ],
)
def test_scores_are_those_of_the_familys_own_forward_of_each_response_alone(family, options, media, tmp_path):
    shards = packed_set(tmp_path, queries(films=family != "gemma3"), media)
    folder = saved(family, tmp_path / "reference")
    expected, found = alone(folder, samples(shards)), values(written(shards, tmp_path, folder, **options))
    assert found == pytest.approx(expected, rel=2e-5, abs=2e-5)
    assert len({round(value, 3) for value in expected.values()}) >= len(expected) - 1  # two responses are equal


def test_every_response_is_there_in_the_order_of_the_samples_with_the_digest_of_its_text(whole, shards):
    expected = [
        (sample.ranked.query.id, place, of_text(response.text))
        for sample in samples(shards)
        for place, response in enumerate(sample.ranked.responses)
    ]
    found = [(row["id"], row["response"], row["digest"]) for row in jsonl.read(whole)]
    assert found == expected
    assert len(expected) == sum(len(row.responses) for row in queries())


def test_the_fingerprint_names_everything_that_the_numbers_depend_on(whole, shards, reference):
    assert Fingerprint.read(whole).parts == {
        "values": "reference_logp",
        "model": model_digest(reference),
        "processor": processor_digest(reference),
        "template": "chat",
        "frames": "4",
        "dtype": "float32",
        "data.train": Shards(shards, "train").digest,
        "data.val": Shards(shards, "val").digest,
        "data.test": Shards(shards, "test").digest,
    }


def test_a_training_forward_gives_the_same_numbers_to_the_bit(whole, shards, reference, tmp_path):
    options = {"global_batch": 1, "cache": tmp_path, "frames": FRAMES, "workers": 0, "max_skipped": 1.0}
    module = RankedDataModule(shards, reference, scores=whole, needs=("reference_logp",), **options)
    scorer = ResponseScorer(load_backbone(str(reference))).train()
    module.setup("fit")
    batches = list(module.train_dataloader())
    assert {batch.ids[0] for batch in batches} == {"text", "picture", "pictures", "film", "long"}
    for batch in batches:
        sums = scorer(batch.rows).sums
        assert sums.requires_grad
        assert sums.tolist() == batch.reference_logps.tolist()


@pytest.mark.parametrize("options", [{"batch_tokens": 300}, {"chunk": 5}, {"step": "separate"}, {"workers": 1}])
def test_other_batches_and_ways_give_the_same(whole, shards, reference, tmp_path, options):
    assert apart(whole, written(shards, tmp_path, reference, **options)) < 1e-5


def test_bfloat16_is_near_and_another_file(whole, shards, reference, tmp_path):
    out = written(shards, tmp_path, reference, dtype="bfloat16")
    assert 1e-5 < apart(whole, out) < 0.05


def test_dropout_in_the_configuration_does_not_reach_the_scores(whole, shards, reference, tmp_path):
    changed = shutil.copytree(reference, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    config["text_config"]["attention_dropout"] = config["vision_config"]["attention_dropout"] = 0.5
    (changed / "config.json").write_text(json.dumps(config))
    out = written(shards, tmp_path, changed, batch_tokens=1)
    assert out.read_bytes() == whole.read_bytes()
    model, encode = load_backbone(str(changed)), Answers(Reading(changed).processor, FRAMES)
    rows = packed([encode(sample) for sample in samples(shards)[:3]], Reading(changed).padding)
    with torch.no_grad():
        quiet, noisy = (ResponseScorer(model).train(mode)(rows).sums for mode in (False, True))
    assert (quiet - noisy).abs().max() > 1e-3, "the control: the dropout is one"


# In batches ---------------------------------------------------------------------------------------------------


def test_batches_hold_every_query_once_within_their_budget_the_longest_first(shards, reference, tmp_path):
    sets = [readable(Shards(shards, split), Reading(reference), tmp_path, 0, 0.0) for split in ("train", "val")]
    for most, separate in ((1, False), (500, False), (10**6, False), (2000, True)):
        batches = planned(sets, most, separate)
        names = [name for batch in batches for name in batch.names]
        assert sorted(names) == sorted([*(f"train/{number}" for number in range(7)), "val/0"])
        for batch in batches:
            sizes = [
                batch.rows.admission[at].tokens * (len(batch.rows.admission[at].scores) if separate else 1)
                for at in batch.numbers
            ]
            assert batch.tokens == sum(sizes)
            assert batch.tokens <= most or len(sizes) == 1
            assert sizes == sorted(sizes, reverse=True)
    (first, *_) = planned(sets, 1, separate=False)
    assert first.tokens == max(int(rows.admission.costs(slice(None)).max()) for rows in sets)
    assert len(planned(sets, 10**6, separate=False)) == 2
    assert len(planned(sets, 1, separate=False)) == 8


def test_no_memory_names_the_batch_and_the_cure(shards, reference, tmp_path, monkeypatch):
    def full(scorer, step, rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(ResponseScorer, "by", full)
        with pytest.raises(ValueError, match=r"batch_tokens: no memory for a batch of \d"):
            written(shards, tmp_path, reference)
    assert written(shards, tmp_path, reference, batch_tokens=200).exists(), "continued with smaller batches"


# Kills --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "name", "call", "after"),
    [
        (door, "readable", 2, True),
        (door, "claim", 1, False),
        (door, "claim", 1, True),
        (opinions, "load_backbone", 1, True),
        (jsonl.Journal, "append", 1, False),
        (jsonl.Journal, "append", 5, True),
        (jsonl.Journal, "append", 9, True),
        (Fingerprint, "write", 1, True),
        (scoring, "scored", 1, False),
        (door.jsonl, "write", 4, True),
        (door.shutil, "rmtree", 4, False),
    ],
)
def test_killed_anywhere_and_continued_the_file_has_the_same_bytes(
    target, name, call, after, whole, shards, reference, tmp_path, monkeypatch
):
    kill(lambda: written(shards, tmp_path, reference, batch_tokens=1), target, name, call, after)
    done = tmp_path / "scores.jsonl.unfinished/journal.jsonl"
    kept = list(jsonl.read(done)) if done.exists() else []
    computed = []
    monkeypatch.setattr(scoring, "by_query", lambda *args, found=scoring.by_query: computed.append(1) or found(*args))
    out = written(shards, tmp_path, reference, batch_tokens=1)
    assert out.read_bytes() == whole.read_bytes()
    assert Fingerprint.read(out) == Fingerprint.read(whole)
    finished = name == "rmtree" or (name == "write" and target is door.jsonl)
    assert len(computed) == (0 if finished else 9 - len(kept))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"cache", "scores.jsonl", "scores.jsonl.fingerprint.json"}


def test_a_batch_that_was_half_written_is_computed_whole_again(shards, reference, tmp_path, monkeypatch):
    """A query alone would come out with other last digits than in its batch."""
    options = {"batch_tokens": 10**6}
    (tmp_path / "whole").mkdir()
    whole = written(shards, tmp_path / "whole", reference, **options)
    kept = []

    def interrupt(journal, row, append=jsonl.Journal.append):
        if len(kept) == 3:
            raise KeyboardInterrupt
        append(journal, row)
        kept.append(row)

    with monkeypatch.context() as patch:
        patch.setattr(jsonl.Journal, "append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            written(shards, tmp_path, reference, **options)
    assert written(shards, tmp_path, reference, **options).read_bytes() == whole.read_bytes()


def test_a_run_with_workers_that_is_killed_alone_goes_on_soon(whole, shards, reference, tmp_path):
    """Its workers hold its locks as long as they live: five seconds, if they did not follow it."""
    journal = tmp_path / "scores.jsonl.unfinished/journal.jsonl"
    options = {"batch_tokens": 1, "workers": 2}
    process = FORKED.Process(target=written, args=(shards, tmp_path, reference), kwargs=options)
    process.start()
    while not journal.exists() or not journal.stat().st_size:
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert not (tmp_path / "scores.jsonl").exists()
    for _ in range(30):
        with suppress(ValueError), settings.alone(journal.parent):
            break
        time.sleep(0.1)
    assert written(shards, tmp_path, reference, batch_tokens=1).read_bytes() == whole.read_bytes()


def test_the_command_does_the_same(whole, shards, reference, tmp_path, capfd):
    words = ["score", shards, "--reference", reference, "--out", tmp_path / "scores.jsonl", "--cache", tmp_path]
    assert cli.main([*map(str, words), *["--frames", "4", "--batch-tokens", "1", "--workers", "0"]]) == 0
    assert (tmp_path / "scores.jsonl").read_bytes() == whole.read_bytes()
    assert cli.main(["score", str(shards), "--out", str(tmp_path / "other.jsonl")]) == 2
    assert "mmrlhf score: reference: expected the checkpoint that is to score, got none" in capfd.readouterr().err


# What is there already ----------------------------------------------------------------------------------------


def finished(whole, folder):
    for path in whole.parent.glob("scores.jsonl*"):
        shutil.copy(path, folder)
    return folder / whole.name


def other_weights(reference, folder):
    """The same checkpoint with one weight changed."""
    changed = shutil.copytree(reference, folder / "changed")
    data = bytearray((changed / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (changed / "model.safetensors").write_bytes(data)
    return changed


def test_a_finished_file_is_left_alone_and_no_weights_are_loaded(whole, shards, reference, tmp_path, monkeypatch):
    out = finished(whole, tmp_path)
    before = out.stat().st_mtime_ns
    monkeypatch.setattr(opinions, "load_backbone", lambda *_, **__: pytest.fail("nothing is left to compute"))
    written(shards, tmp_path, reference)
    assert out.stat().st_mtime_ns == before
    assert {path.name for path in tmp_path.iterdir()} == {"scores.jsonl", "scores.jsonl.fingerprint.json"}


def other_data(shards, media, folder):
    return packed_set(folder / "other", [ranked("text", ("It is red.", "Green")), *queries()[1:]], media)


def test_a_file_of_another_model_or_of_other_data_or_settings_is_refused_with_what_differs(
    whole, shards, media, reference, tmp_path
):
    out = finished(whole, tmp_path)
    cases = [
        (shards, other_weights(reference, tmp_path), {}, "model"),
        (other_data(shards, media, tmp_path), reference, {}, "data.train"),
        (shards, reference, {"frames": 3}, "frames"),
        (shards, reference, {"dtype": "bfloat16"}, "dtype"),
        (shards, reference, {"splits": ["train", "val"]}, "data.test"),
    ]
    for data, model, options, part in cases:
        with pytest.raises(
            ValueError, match=rf"scores.jsonl was made with another {part} \(\S+ instead of \S+\); give"
        ):
            written(data, tmp_path, model, **options)
    assert out.read_bytes() == whole.read_bytes()


def test_an_unfinished_file_of_something_else_is_refused_with_what_differs(shards, reference, tmp_path):
    kill(lambda: written(shards, tmp_path, reference, batch_tokens=1), jsonl.Journal, "append", 3, after=True)
    with pytest.raises(ValueError, match=r"holds scores with model '\w+' instead of '\w+'; give another --out"):
        written(shards, tmp_path, other_weights(reference, tmp_path))
    with pytest.raises(ValueError, match=r"holds scores with frames '4' instead of '2'"):
        written(shards, tmp_path, reference, frames=2)


def test_a_file_of_another_tool_is_not_overwritten(shards, reference, tmp_path):
    (tmp_path / "scores.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match=r"no scores.jsonl.fingerprint.json beside it .* give another --out"):
        written(shards, tmp_path, reference)
    assert (tmp_path / "scores.jsonl").read_text() == "mine\n"


def test_only_the_splits_that_are_asked_for_are_scored(whole, shards, reference, tmp_path):
    out = written(shards, tmp_path, reference, splits=["val", "test"], batch_tokens=1)
    assert whole.read_bytes().endswith(out.read_bytes())
    assert {name for name, _ in values(out)} == {"other", "last"}
    (tmp_path / "one").mkdir()
    with pytest.raises(ValueError, match=r"expected a split among .*, got 'dev'; choose one"):
        written(shards, tmp_path / "one", reference, splits=["dev"])


# What cannot be done ------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_before_weights_are_read(shards, reference, tmp_path, monkeypatch):
    for room, name in ((opinions, "load_backbone"), (door, "model_digest")):
        monkeypatch.setattr(room, name, lambda *_, **__: pytest.fail("no weights are to be read"))
    unknown, bare, unpadded = (shutil.copytree(reference, tmp_path / name) for name in ("unknown", "bare", "unpadded"))
    (unknown / "config.json").write_text('{"model_type": "bert"}')
    for path in bare.glob("*processor*"):
        path.unlink()
    settings = json.loads((unpadded / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (unpadded / "tokenizer_config.json").write_text(json.dumps(settings))
    gemma = saved("gemma3", tmp_path / "gemma")
    cases = [
        (None, {}, "reference: expected the checkpoint that is to score, got none; give --reference"),
        (tmp_path / "none", {}, "checkpoint: expected a folder or the name of a repository"),
        (tmp_path / "cache", {}, "expected a checkpoint, found no config.json"),
        (unknown, {}, "unknown backbone family 'bert'; known: gemma3, idefics3"),
        (bare, {}, "Can't load image processor for '.*bare'"),
        (unpadded, {}, "processor: expected a tokenizer with a padding token"),
        (gemma, {"step": "shared_prefix"}, "step: gemma3 cannot share a prefix: in gemma3 tokens of a picture see"),
        (reference, {"batch_tokens": 0}, "batch_tokens: expected 1 or more, got 0"),
        (reference, {"chunk": 0}, "chunk: expected 1 or more"),
        (reference, {"frames": 0}, "frames: expected 1 or more"),
        (reference, {"workers": -1}, "workers: expected 0 or more, got -1"),
        (reference, {"device": "gpu"}, "device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (reference, {"device": "cuda:99"}, "device: expected auto, cpu, cuda or cuda:N, got 'cuda:99'"),
        (reference, {"splits": []}, "splits: expected one or more of train, val, test"),
    ]
    (tmp_path / "cache").mkdir()
    for model, options, message in cases:
        with pytest.raises((ValueError, OSError), match=message):
            score(shards, tmp_path / "out.jsonl", None if model is None else str(model), **options)
    assert not list(tmp_path.glob("out.jsonl*"))


def test_a_checkpoint_without_weights_is_refused(shards, reference, tmp_path):
    empty = shutil.copytree(reference, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match=r"empty: expected config.json and weights \(\*.safetensors\), found none"):
        written(shards, tmp_path, empty)


def test_log_probs_that_are_no_numbers_are_refused(shards, reference, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(reference)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    broken = shutil.copytree(reference, tmp_path / "broken")
    model.save_pretrained(broken)
    with pytest.raises(ValueError, match="expected finite log-probs, got"):
        written(shards, tmp_path, broken)


def test_a_damaged_sample_is_left_out_with_its_reason_or_an_error(whole, shards, reference, tmp_path, caplog):
    damaged = shutil.copytree(shards, tmp_path / "shards")
    data = (damaged / "train-00000.tar").read_bytes()
    (damaged / "train-00000.tar").write_bytes(data.replace(b"Does it move?", b"Does it m0ve?"))
    with pytest.raises(ValueError, match=r"admission: expected at most 0.00% skipped, got 14.29% .*crc_mismatch"):
        written(damaged, tmp_path, reference, max_skipped=0.0)
    with caplog.at_level(logging.INFO, "mmrlhf"):
        out = written(damaged, tmp_path, reference, batch_tokens=1)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert out.read_bytes() == b"".join(line for line in lines if b'"film"' not in line)
    assert "score: 9 in = 8 out + 1 skipped (crc_mismatch 1)" in caplog.text
    (reject,) = jsonl.read(tmp_path / "scores.jsonl.rejects.jsonl")
    assert (reject["split"], reject["reason"]) == ("train", "crc_mismatch")


def test_media_that_do_not_belong_to_the_model_are_an_error(shards, reference, tmp_path):
    """A processor that makes another number of tokens of a picture than the model has features for it."""
    other = shutil.copytree(reference, tmp_path / "other")
    config = json.loads((other / "processor_config.json").read_text())
    config["num_image_tokens"] += 2
    (other / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"expected features for \d+ tokens of media, got \d+; the processor and"):
        written(shards, tmp_path, other)


def test_what_stands_for_a_checkpoint_is_its_model_and_its_processor_each_for_itself(reference, tmp_path):
    def digests(folder):
        return model_digest(folder), processor_digest(folder)

    before = digests(reference)
    for name, model, processor in [
        ("model.safetensors", True, False),
        ("config.json", True, False),
        ("tokenizer.json", False, True),
        ("tokenizer_config.json", False, True),
        ("processor_config.json", False, True),
        ("chat_template.jinja", False, True),
        ("generation_config.json", False, False),
        ("README.md", False, False),
        ("checkpoint-5/tokenizer.json", False, False),
        ("additional_chat_templates/other.jinja", False, True),
    ]:
        changed = shutil.copytree(reference, tmp_path / name.replace("/", "-"))
        (changed / name).parent.mkdir(exist_ok=True)
        with (changed / name).open("ab") as file:
            file.write(b" ")
        assert [one != other for one, other in zip(digests(changed), before, strict=True)] == [model, processor], name
