"""A reward model comes back from its folder as it was saved, and is asked as it was in training."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from mmrlhf.datamodules.rows import Critiques
from mmrlhf.images import decode
from mmrlhf.modules.loading import Lora
from mmrlhf.modules.reward import RewardReader
from mmrlhf.modules.rewardmodel import Judging, RewardModel, Scored, save_reward_model
from mmrlhf.modules.speaking import Saying
from mmrlhf.prompts import Template
from mmrlhf.provenance import model_digest, processor_digest
from mmrlhf.queries import Media, Query
from mmrlhf.videos import spread

from ..datamodules.made import picture
from .queries import FRAMES
from .test_lora import with_adapters
from .test_reward import (
    DIMENSIONS,
    TEMPLATE,
    judged_rows,
    judged_samples,
    laid_out,
    lively_head,
    one_thread,  # noqa: F401 - of this file too
)
from .test_scorer import KINDS, fresh, made, ours

NAMED = ("helpfulness", "ethics")
JUDGING = Judging(TEMPLATE, FRAMES, NAMED)
QUERY = Query("q", "What is it?")
SAID = ("A ring.", "Nothing")


def kept(family, folder, judging=JUDGING, dimensions=DIMENSIONS):
    """A reward model of this family as a training leaves it: its reader, and its folder."""
    reader = RewardReader(ours(family), lively_head(dimensions=dimensions))
    save_reward_model(reader, made(family)[1], judging, folder, "# A judge")
    return reader, folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One that no test may change."""
    return kept("llava", tmp_path_factory.mktemp("judge") / "llava")[1]


@pytest.fixture(scope="module")
def model(folder):
    return RewardModel.from_pretrained(folder)


@pytest.fixture
def own(folder, tmp_path):
    """A copy that a test may damage."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def shown(case):
    """How the media of a sample are loaded."""
    stored = dict(zip(case.ranked.query.media, case.media, strict=True))

    def load(medium, frames):
        data = stored[medium]
        if medium.kind == "image":
            return decode(data[0]).image
        return [decode(data[at]).image for at in spread(len(data), frames)]

    return load


# The folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_body_and_head_come_back_as_they_were_saved(family, tmp_path):
    reader, folder = kept(family, tmp_path / "judge")
    again = RewardModel.from_pretrained(folder)
    rows = laid_out(family, judged_rows(family, ("text", "image")))
    with torch.no_grad():
        before = reader.eval()(rows)
    after = again.judged(rows)
    assert torch.equal(before.rewards, after.rewards)
    assert torch.equal(before.dimensions, after.dimensions)
    assert torch.equal(before.critiques.sums, after.critiques.sums)
    assert again.judging == JUDGING
    assert not any(weight.requires_grad for weight in again.reader.parameters())
    assert not any(part.training for part in again.reader.modules())


@pytest.mark.parametrize("family", KINDS)
def test_plain_transformers_loads_the_body_and_nothing_is_left_on_the_model_that_was_saved(family, tmp_path):
    reader, folder = kept(family, tmp_path / "judge")
    body, told = hf.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(body) is type(made(family)[0])
    assert not told["missing_keys"]
    assert {name.split(".")[0] for name in told["unexpected_keys"]} == {"reward_head"}
    weights = made(family)[0].state_dict()
    assert all(weight.equal(weights[name]) for name, weight in body.state_dict().items())
    assert reader.backbone.model.state_dict().keys() == weights.keys()
    assert not hasattr(reader.backbone.config, "reward_model")
    hf.AutoProcessor.from_pretrained(folder)


def test_adapters_are_merged_into_the_body_and_the_head_lies_beside_it(tmp_path):
    reader = RewardReader(with_adapters("llava_onevision", Lora(rank=3, alpha=6)), lively_head())
    rows = laid_out("llava_onevision", judged_rows("llava_onevision"))
    with torch.no_grad():
        before = reader.eval()(rows)
    save_reward_model(reader, made("llava_onevision")[1], JUDGING, tmp_path / "judge", "card")
    after = RewardModel.from_pretrained(tmp_path / "judge").judged(rows)
    torch.testing.assert_close(after.rewards, before.rewards, rtol=1e-4, atol=1e-4)
    adapter = load_file(tmp_path / "judge" / "adapter" / "adapter_model.safetensors")
    assert adapter
    assert all("lora_" in name for name in adapter)


def test_a_head_is_found_in_whatever_file_of_a_split_checkpoint_it_lies(own, model):
    tensors = load_file(own / "model.safetensors")
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("reward_head.out")}
    (own / "model.safetensors").unlink()
    names = {1: tensors, 2: head}
    files = {number: f"model-{number:05}-of-00002.safetensors" for number in names}
    for number, part in names.items():
        save_file(part, own / files[number], {"format": "pt"})
    where = {name: files[number] for number, part in names.items() for name in part}
    (own / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    rewards = RewardModel.from_pretrained(own).score_given(QUERY, SAID)
    assert torch.equal(rewards, model.score_given(QUERY, SAID))


def test_in_bfloat16_head_and_body_are_of_one_type(folder, model):
    small = RewardModel.from_pretrained(folder, dtype="bfloat16")
    assert {weight.dtype for weight in small.reader.parameters()} == {torch.bfloat16}
    rewards = small.score_given(QUERY, SAID)
    assert rewards.dtype == torch.float32
    torch.testing.assert_close(rewards, model.score_given(QUERY, SAID), rtol=0, atol=0.3)


def test_what_it_is_asked_is_part_of_the_model_and_not_of_the_processor(folder, tmp_path):
    other = Judging(Template("judge", f"{TEMPLATE.text} "), FRAMES, NAMED)
    _, changed = kept("llava", tmp_path / "other", other)
    assert model_digest(folder) != model_digest(changed)
    assert processor_digest(folder) == processor_digest(changed)


def test_a_folder_that_is_there_is_kept_and_the_model_left_as_it_was(tmp_path):
    (tmp_path / "judge").mkdir()
    reader = RewardReader(ours("llava"), lively_head())
    with pytest.raises(ValueError, match="expected nothing there"):
        save_reward_model(reader, made("llava")[1], JUDGING, tmp_path / "judge", "card")
    assert not hasattr(reader.backbone.model, "reward_head")
    assert not list((tmp_path / "judge").iterdir())


# What is refused ---------------------------------------------------------------------------------------------


def change_head(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def drop(*names):
    return lambda tensors: [tensors.pop(f"reward_head.{name}") for name in names]


def put(name, value):
    return lambda tensors: tensors.update({f"reward_head.{name}": value})


def narrow(tensors):
    wide = {"dense.weight": (32, 32), "dense.bias": (32,), "out.weight": (3, 32), "out.bias": (3,)}
    tensors.update({f"reward_head.{name}": torch.zeros(shape) for name, shape in wide.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("dense.weight", "dense.bias", "out.weight", "out.bias"), "expected a reward head .* got none; without"),
        (drop("out.bias"), "expected a reward head .*weight and bias"),
        (put("third.weight", torch.zeros(1)), "expected a reward head"),
        (put("out.weight", torch.zeros(3, 47)), "expected a reward head"),
        (put("dense.bias", torch.full((48,), torch.nan)), "expected a reward head of finite numbers"),
        (narrow, "expected one for states of width 48, got one of 32; head and body are of different checkpoints"),
    ],
)
def test_a_folder_without_a_head_that_fits_is_refused(own, change, message):
    change_head(own, change)
    with pytest.raises(ValueError, match=message):
        RewardModel.from_pretrained(own)


def change_config(change):
    def changed(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return changed


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_config(lambda config: config.pop("reward_model")), "is no reward model, or was saved by something"),
        (change_config(lambda config: config.update(auto_map={"AutoModel": "x.Y"})), "got code of its own"),
        (
            change_config(lambda config: config["reward_model"]["template"].update(text="{question}{response}")),
            "digest",
        ),
        (
            change_config(lambda config: config["reward_model"].update(template=None)),
            "expected a JSON object, got None",
        ),
        (change_config(lambda config: config["reward_model"].update(frames=0)), "frames: expected a whole number of 1"),
        (change_config(lambda config: config["reward_model"].update(dimensions=["truth", "ethics"])), "expected some"),
        (
            change_config(lambda config: config["reward_model"].update(dimensions=["ethics"])),
            "expected a score for each",
        ),
        (change_config(lambda config: config["reward_model"].update(pooling="mean")), "unknown fields"),
        (pickled, "expected weights as .*safetensors, found none"),
    ],
)
def test_a_folder_that_is_no_reward_model_of_ours_is_refused(own, change, message):
    change(own)
    with pytest.raises(ValueError, match=message):
        RewardModel.from_pretrained(own)


def test_an_ordinary_checkpoint_is_no_reward_model(tmp_path):
    fresh("llava").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected reward_model, which says how a reward model is asked, found none"):
        RewardModel.from_pretrained(tmp_path)


def test_nothing_is_saved_with_other_dimensions_than_the_head_has(tmp_path):
    reader = RewardReader(ours("llava"), lively_head(dimensions=1))
    with pytest.raises(ValueError, match=r"expected a score for each of \['helpfulness', 'ethics'\] .* got 1"):
        save_reward_model(reader, made("llava")[1], JUDGING, tmp_path / "judge", "card")
    assert not (tmp_path / "judge").exists()


# Scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_it_reads_the_same_tokens_and_pictures_as_in_training(family):
    processor = made(family)[1]
    judge = RewardModel(RewardReader(ours(family), lively_head()), processor, JUDGING)
    for case in judged_samples(KINDS[family]):
        query, responses = case.ranked.query, case.ranked.responses
        texts, critiques = [each.text for each in responses], [each.critique for each in responses]
        for given, source in ((critiques, "critique"), ((), "none")):
            rows = judge.rows(query, texts, given, shown(case))
            trained = laid_out(family, [Critiques(processor, FRAMES, TEMPLATE, source)(case)])
            for name in ("input_ids", "position_ids", "segment_ids", "labels", "previous"):
                assert torch.equal(getattr(rows, name), getattr(trained, name))
            for name in ("features", "per_token"):
                these, those = getattr(rows, name), getattr(trained, name)
                assert these.keys() == those.keys()
                assert all(torch.equal(these[key], those[key]) for key in those)


@pytest.mark.parametrize("after", ["\n", " the end"])
def test_it_reads_on_behind_a_critique_to_where_it_was_trained_to(after):
    processor = made("llava_onevision")[1]
    judging = Judging(TEMPLATE, FRAMES, after_critique=after)
    judge = RewardModel(RewardReader(ours("llava_onevision"), lively_head(dimensions=0)), processor, judging)
    for case in judged_samples(KINDS["llava_onevision"]):
        query, responses = case.ranked.query, case.ranked.responses
        rows = judge.rows(query, [each.text for each in responses], [each.critique for each in responses], shown(case))
        encode = Critiques(processor, FRAMES, TEMPLATE, "critique", after)
        trained = laid_out("llava_onevision", [encode(case)])
        assert torch.equal(rows.input_ids, trained.input_ids)
        said = processor.tokenizer.decode(rows.input_ids[0])
        assert said.count(f"<|im_end|>{after}") >= sum(bool(each.critique) for each in responses)


def test_scores_with_and_without_critiques(model):
    critiques = ["It is right.", ""]
    given = model.score(QUERY, SAID, critique="given", critiques=critiques)
    without = model.score(QUERY, SAID)
    assert [each.critique for each in given] == critiques
    assert [each.critique for each in without] == ["", ""]
    assert given[0].reward != without[0].reward
    assert given[1].reward == pytest.approx(without[1].reward, abs=1e-5)
    assert [each.reward for each in given] == model.score_given(QUERY, SAID, critiques).tolist()
    raw = model.judged(model.rows(QUERY, SAID)).dimensions
    for each, row in zip(without, raw.tolist(), strict=True):
        assert isinstance(each, Scored)
        assert each.dimensions == pytest.approx(dict(zip(NAMED, [3 + 2 * score for score in row], strict=True)))


def test_scores_do_not_depend_on_how_many_responses_are_judged_together_or_how(model, folder):
    together = model.score_given(QUERY, SAID, ["Good.", "No"])
    alone = [model.score_given(QUERY, [text], [said])[0] for text, said in zip(SAID, ["Good.", "No"], strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)
    separate = RewardModel.from_pretrained(folder, step="separate").score_given(QUERY, SAID, ["Good.", "No"])
    torch.testing.assert_close(separate, together, rtol=1e-4, atol=1e-5)


def test_critiques_that_somebody_else_generates_are_written_to_the_open_request_and_then_given(model):
    asked = []

    def speak(rows):
        asked.append(rows)
        return ["It is right.", ""]

    found = model.score(QUERY, SAID, critique="generated", speak=speak)
    assert found == model.score(QUERY, SAID, critique="given", critiques=["It is right.", ""])
    assert torch.equal(asked[0].input_ids, model.rows(QUERY, SAID).input_ids)
    assert (asked[0].labels == -100).all()
    with pytest.raises(ValueError, match=r"expected a critique per response .* got 1 for 2 responses"):
        model.score(QUERY, SAID, critique="generated", speak=lambda rows: ["one"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"critique": "generated", "critiques": ["a", "b"]},
        {"critique": "generated", "saying": Saying(4), "speak": lambda rows: ["a", "b"]},
        {"critique": "given"},
        {"critique": "given", "critiques": ["a", "b"], "saying": Saying(4)},
        {"critique": "none", "critiques": ["a", "b"]},
        {"critique": "given", "critiques": ["a", "b"], "speak": lambda rows: []},
        {"critique": "none", "saying": Saying(4)},
        {"critique": "none", "speak": lambda rows: ["a", "b"]},
        {"critique": "greedy"},
    ],
)
def test_a_mode_and_what_it_needs_come_together(model, wrong):
    with pytest.raises(ValueError, match="critique: expected generated, with at most one of `saying` and `speak`"):
        model.score(QUERY, SAID, **wrong)


def test_media_come_from_a_folder_or_a_function(model, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    query = Query("q", "What is it?", (Media("image", "a.png"),))
    from_folder = model.score_given(query, SAID, media=tmp_path)
    by_function = model.score_given(query, SAID, media=lambda medium, frames: decode(picture(1)).image)
    assert torch.equal(from_folder, by_function)
    other = model.score_given(query, SAID, media=lambda medium, frames: decode(picture(2)).image)
    assert not torch.equal(other, by_function)
    with pytest.raises(ValueError, match="query 'q': expected a folder with its media, or a function"):
        model.score_given(query, SAID)
    with pytest.raises(ValueError, match="expected one or more responses, got none"):
        model.score_given(QUERY, [])


def test_a_film_is_asked_for_in_the_frames_of_the_training():
    judge = RewardModel(RewardReader(ours("llava_onevision"), lively_head()), made("llava_onevision")[1], JUDGING)
    asked = []

    def load(medium, frames):
        asked.append(frames)
        return [decode(picture(at)).image for at in range(frames)]

    judge.score_given(Query("q", "Does it move?", (Media("video", "a.mp4"),)), SAID, media=load)
    assert set(asked) == {FRAMES}


def test_judging_survives_json():
    assert Judging.of(json.loads(json.dumps(JUDGING.as_dict()))) == JUDGING
    with pytest.raises(ValueError, match="question"):
        Judging(Template("bad", "{response}"), 4)
    assert copy.copy(JUDGING).template.digest == JUDGING.as_dict()["template"]["digest"]


def test_transformers_is_not_surprised_at_the_head_and_is_at_anything_else(own, caplog, monkeypatch):
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    kind = type(made("llava")[0])
    before = kind._keys_to_ignore_on_load_unexpected
    with caplog.at_level(logging.WARNING):
        RewardModel.from_pretrained(own)
    assert "reward_head" not in caplog.text
    assert kind._keys_to_ignore_on_load_unexpected == before
    change_head(own, lambda tensors: tensors.update({"another.weight": torch.zeros(1)}))
    with caplog.at_level(logging.WARNING):
        RewardModel.from_pretrained(own)
    assert "another.weight" in caplog.text
    assert "reward_head" not in caplog.text
