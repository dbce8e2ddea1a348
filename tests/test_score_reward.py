"""A file of rewards holds what the reward model says of each query by itself, whatever interrupts."""

import dataclasses
import json
import logging
import shutil

import pytest
import torch

from mmrlhf import cli, jsonl
from mmrlhf import score as door
from mmrlhf.datamodules import scoring
from mmrlhf.datamodules.module import RankedDataModule
from mmrlhf.datamodules.reader import Shards
from mmrlhf.datamodules.reading import Reading
from mmrlhf.datamodules.scoring import otherwise, planned, readable
from mmrlhf.fingerprint import Fingerprint, of_text
from mmrlhf.images import decode
from mmrlhf.modules import opinions
from mmrlhf.modules.opinions import Judge, require_alike
from mmrlhf.modules.reward import RewardReader
from mmrlhf.modules.rewardmodel import Judging, RewardModel, save_reward_model
from mmrlhf.modules.speaking import Saying
from mmrlhf.prompts import Template
from mmrlhf.provenance import model_digest, processor_digest
from mmrlhf.score import score
from mmrlhf.videos import spread

from .datamodules.made import packed_set
from .killing import kill
from .modules.families import saved
from .modules.test_reward import lively_head
from .modules.test_scorer import made, ours
from .test_score import (
    FRAMES,
    media,  # noqa: F401 - a fixture
    one_thread,  # noqa: F401 - of this file too
    queries,
)

FAMILY = "llava_onevision"
TEMPLATE = Template("judge", "Judge it. Q: {question}\nA: {response}\nEvaluation:")
JUDGING = Judging(TEMPLATE, FRAMES, ("helpfulness", "ethics"))
SHORT = Saying(max_new_tokens=6)
TEXTS = ("critique", "reason")


def criticised():
    """Queries some of whose responses have a critique, a reason, both, or neither."""
    kinds = (("It is right.", "fine"), ("", "wrong"), ("No.", ""), ("", ""))
    rows = []
    for number, row in enumerate(queries()):
        responses = [
            dataclasses.replace(response, **dict(zip(TEXTS, kinds[(number + place) % 4], strict=True)))
            for place, response in enumerate(row.responses)
        ]
        rows.append(dataclasses.replace(row, responses=tuple(responses)))
    return rows


@pytest.fixture(scope="module")
def shards(media, tmp_path_factory):  # noqa: F811
    return packed_set(tmp_path_factory.mktemp("set"), criticised(), media)


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "judge"
    save_reward_model(RewardReader(ours(FAMILY), lively_head()), made(FAMILY)[1], JUDGING, folder, "# A judge")
    return folder


@pytest.fixture(scope="module")
def whole(shards, reward, tmp_path_factory):
    """The file of a run that was left alone, with a batch per query."""
    return written(shards, tmp_path_factory.mktemp("whole"), reward, batch_tokens=1)


@pytest.fixture(scope="module")
def spoken(shards, reward, tmp_path_factory):
    """The same with critiques that the model wrote."""
    folder = tmp_path_factory.mktemp("spoken")
    return written(shards, folder, reward, critique="generated", saying=SHORT, batch_tokens=1)


def written(shards, folder, reward, critique="given", **options):
    """Score, without workers, and return the file."""
    out = folder / "rewards.jsonl"
    options = {"workers": 0, "cache": folder / "cache"} | options
    score(shards, out, reward=str(reward), critique=critique, **options)
    return out


def values(out):
    return {(row["id"], row["response"]): row["reward"] for row in jsonl.read(out)}


def texts(out):
    return {(row["id"], row["response"]): row.get("critique", "") for row in jsonl.read(out)}


def samples(shards):
    return [sample for split in ("train", "val", "test") for sample in Shards(shards, split)]


def shown(sample):
    """How the media of a sample are loaded."""
    stored = dict(zip(sample.ranked.query.media, sample.media, strict=True))

    def load(medium, frames):
        data = stored[medium]
        return (
            decode(data[0]).image
            if medium.kind == "image"
            else [decode(data[at]).image for at in spread(len(data), frames)]
        )

    return load


def by_query(folder, samples, critique):
    """The rewards by the reward model's own face, query by query, each behind the text that `critique` picks."""
    model, found = RewardModel.from_pretrained(folder), {}
    for sample in samples:
        query, responses = sample.ranked.query, sample.ranked.responses
        said = [each.text for each in responses]
        rewards = model.score_given(query, said, [critique(each) for each in responses], shown(sample))
        found |= {(query.id, place): reward for place, reward in enumerate(rewards.tolist())}
    return found


GIVEN = {
    "critique_or_reason": lambda response: response.critique or response.reason,
    "critique": lambda response: response.critique,
    "reason": lambda response: response.reason,
}


# What is in the file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", GIVEN)
def test_given_rewards_are_those_of_the_reward_model_asked_query_by_query(source, shards, reward, tmp_path):
    expected = by_query(reward, samples(shards), GIVEN[source])
    found = values(written(shards, tmp_path, reward, critique_from=source))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert len({round(value, 3) for value in expected.values()}) >= len(expected) - 2


@pytest.fixture(scope="module")
def reading_on(tmp_path_factory):
    """A reward model that was trained to read on behind a critique."""
    folder = tmp_path_factory.mktemp("on") / "judge"
    judging = dataclasses.replace(JUDGING, after_critique="\n")
    save_reward_model(RewardReader(ours(FAMILY), lively_head()), made(FAMILY)[1], judging, folder, "# A judge")
    return folder


def test_a_model_that_reads_on_behind_a_critique_does_so_here(whole, reading_on, shards, tmp_path):
    expected = by_query(reading_on, samples(shards), GIVEN["critique_or_reason"])
    found = values(written(shards, tmp_path, reading_on))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert found != pytest.approx(values(whole), abs=1e-3)


def test_also_behind_critiques_that_it_writes(reading_on, shards, tmp_path):
    out = written(shards, tmp_path, reading_on, critique="generated", saying=SHORT)
    said, found = texts(out), values(out)
    for sample in samples(shards)[:3]:
        for place, one in enumerate(own_words(reading_on, sample, SHORT)):
            at = sample.ranked.query.id, place
            assert said[at] == one.critique
            assert found[at] == pytest.approx(one.reward, rel=1e-4, abs=1e-4)


def side_file(path, sets, critique):
    """Critiques of all responses as another tool would hand them over."""
    rows = [
        {"id": one.ranked.query.id, "response": place, "digest": of_text(told.text), "critique": critique(told)}
        for one in sets
        for place, told in enumerate(one.ranked.responses)
    ]
    jsonl.write(path, rows)
    return path


def test_critiques_of_a_file_take_the_place_of_those_in_the_data(shards, reward, tmp_path, caplog):
    def said(response):
        return "" if response.text.startswith("It") else f"So {response.text[:9]}"

    caplog.set_level(logging.INFO)
    file = side_file(tmp_path / "critiques.jsonl", samples(shards), said)
    out = written(shards, tmp_path, reward, critique_from=file)
    assert values(out) == pytest.approx(by_query(reward, samples(shards), said), rel=1e-5, abs=1e-5)
    without = sum(not said(response) for one in samples(shards) for response in one.ranked.responses)
    assert f"no_critique: {without}" in caplog.text.replace(" (", ": ").replace("no_critique ", "no_critique: ")
    jsonl.write(file, [row | {"critique": "Other."} for row in jsonl.read(file)])
    with pytest.raises(ValueError, match="made with another critique"):
        written(shards, tmp_path, reward, critique_from=file)


def test_a_file_that_lacks_critiques_is_no_file_of_these_shards(shards, reward, tmp_path):
    file = side_file(tmp_path / "critiques.jsonl", samples(shards)[1:], lambda _: "Hm.")
    with pytest.raises(ValueError, match="expected at most"):
        written(shards, tmp_path, reward, critique_from=file, max_skipped=0.0)


def test_without_critiques_rewards_are_those_of_the_reward_model_and_other_ones(whole, shards, reward, tmp_path):
    expected = by_query(reward, samples(shards), lambda response: "")
    found = values(written(shards, tmp_path, reward, critique="none"))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    given = values(whole)
    for sample in samples(shards):
        for place, response in enumerate(sample.ranked.responses):
            at = sample.ranked.query.id, place
            differs = abs(found[at] - given[at]) > 1e-3
            assert differs == bool(response.critique or response.reason)


def own_words(folder, sample, saying):
    """What the reward model says of a query by itself, in one pass with the critiques that it writes."""
    query, responses = sample.ranked.query, [each.text for each in sample.ranked.responses]
    model = RewardModel.from_pretrained(folder)
    return model.score(query, responses, critique="generated", saying=saying, media=shown(sample))


def test_generated_critiques_and_rewards_are_those_of_the_reward_model_asked_query_by_query(spoken, shards, reward):
    said, found = texts(spoken), values(spoken)
    for sample in samples(shards):
        alone = own_words(reward, sample, SHORT)
        places = [(sample.ranked.query.id, place) for place in range(len(alone))]
        assert [said[place] for place in places] == [each.critique for each in alone]
        assert [found[at] for at in places] == pytest.approx([each.reward for each in alone], rel=1e-5, abs=1e-5)
    assert len({*said.values()}) > len(said) / 2, "the control"


def test_every_response_is_there_in_the_order_of_the_samples_with_the_digest_of_its_text(whole, shards):
    expected = [
        (sample.ranked.query.id, place, of_text(response.text))
        for sample in samples(shards)
        for place, response in enumerate(sample.ranked.responses)
    ]
    rows = list(jsonl.read(whole))
    assert [(row["id"], row["response"], row["digest"]) for row in rows] == expected
    assert {frozenset(row) for row in rows} == {frozenset({"id", "response", "digest", "reward"})}


def test_the_fingerprint_names_everything_that_the_numbers_depend_on(whole, spoken, shards, reward):
    parts = {
        "values": "reward",
        "model": model_digest(reward),
        "processor": processor_digest(reward),
        "template": TEMPLATE.digest,
        "frames": "4",
        "dtype": "float32",
        "critique": "critique_or_reason",
        **{f"data.{split}": Shards(shards, split).digest for split in ("train", "val", "test")},
    }
    assert Fingerprint.read(whole).parts == parts
    saying = {"max_new_tokens": "6", "temperature": "0.0", "samples": "1", "seed": "0"}
    own = {"critique": "generated"} | {f"saying.{name}": value for name, value in saying.items()}
    assert Fingerprint.read(spoken).parts == parts | own


# Batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"batch_tokens": 400}, {"step": "separate"}, {"workers": 1}, {"chunk": 5}])
def test_other_batches_and_ways_give_the_same_rewards(whole, shards, reward, tmp_path, options):
    assert values(written(shards, tmp_path, reward, **options)) == pytest.approx(values(whole), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("options", [{"batch_tokens": 10**6}, {"step": "separate"}])
def test_other_batches_and_ways_give_the_same_critiques(spoken, shards, reward, tmp_path, options):
    out = written(shards, tmp_path, reward, critique="generated", saying=SHORT, **options)
    assert texts(out) == texts(spoken)
    assert values(out) == pytest.approx(values(spoken), rel=1e-5, abs=1e-5)


def test_critiques_that_will_be_written_are_counted_in_the_budget(shards, reward, tmp_path):
    reading = Reading(reward, "critiques", FRAMES, critique="none", request=TEMPLATE)
    sets = [readable(Shards(shards, "train"), reading, tmp_path, 0, 0.0)]
    (bare,), (more,) = (planned(sets, 10**6, separate=False, written=most) for most in (0, 50))
    assert more.tokens - bare.tokens == 50 * sum(len(row.responses) for row in criticised()[:7])
    assert len(planned(sets, bare.tokens, separate=False, written=50)) > 1


def test_of_several_drawn_critiques_the_file_holds_what_the_reward_model_says(shards, reward, tmp_path, monkeypatch):
    saying, budgets = Saying(max_new_tokens=4, temperature=1.0, samples=3, seed=5), []
    monkeypatch.setattr(door, "planned", lambda *args, plan=planned: budgets.append(args[3]) or plan(*args))
    out = written(shards, tmp_path, reward, critique="generated", saying=saying, splits=["test"])
    assert budgets == [3 * 4]
    (sample,) = Shards(shards, "test")
    alone, first = own_words(reward, sample, saying), own_words(reward, sample, dataclasses.replace(saying, samples=1))
    assert list(texts(out).values()) == [each.critique for each in alone]
    assert list(values(out).values()) == pytest.approx([each.reward for each in alone], rel=1e-5, abs=1e-5)
    assert abs(alone[0].reward - first[0].reward) > 1e-3, "the control: one draw is another number"


# The check of the first batch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"critique": "given"}, {"critique": "generated", "saying": SHORT}])
def test_the_check_tells_how_far_apart_the_ways_are_and_changes_no_byte(
    options, whole, spoken, shards, reward, tmp_path, caplog
):
    with caplog.at_level(logging.INFO, "mmrlhf"):
        out = written(shards, tmp_path, reward, batch_tokens=1, self_check=True, **options)
    for how in ("one at a time", "in the opposite order"):
        assert f"responses {how} differ by at most " in caplog.text
    assert "(allowed 1e-03), and 0 critiques" in caplog.text
    assert out.read_bytes() == (whole if options["critique"] == "given" else spoken).read_bytes()


def first_batch(shards, reward, folder, separate):
    reading = Reading(reward, "critiques", FRAMES, critique="critique_or_reason", request=TEMPLATE)
    sets = [readable(Shards(shards, "train"), reading, folder, 0, 0.0)]
    (batch,) = planned(sets, 10**6, separate=False)
    alone, turned = otherwise(batch, reading.padding)
    judge = Judge(reward, "separate" if separate else "shared_prefix", 512, "float32", torch.device("cpu"))
    return judge, door.LaidOut([batch], reading.padding)[0], alone, turned


def test_in_the_check_each_response_by_itself_is_an_ordinary_row(shards, reward, tmp_path, monkeypatch):
    judge, rows, alone, turned = first_batch(shards, reward, tmp_path, separate=False)
    ways = []
    monkeypatch.setattr(
        RewardReader, "by", lambda self, way, rows, by=RewardReader.by: ways.append(way) or by(self, way, rows)
    )
    with torch.no_grad():
        require_alike(judge, rows, alone, turned)
    assert ways == ["shared_prefix"] * 2 + ["separate"] * len(alone)


def test_critiques_are_written_by_the_way_that_is_named(shards, reward, tmp_path, monkeypatch):
    judge, *_ = first_batch(shards, reward, tmp_path, separate=False)
    judge.saying, steps = SHORT, []
    monkeypatch.setattr(opinions, "spoken", lambda reader, *_: steps.append(reader.step) or [])
    judge.by("separate", None)
    judge.by("shared_prefix", None)
    assert [*steps, judge.reader.step] == ["separate", "shared_prefix", "shared_prefix"]


def test_the_check_compares_each_response_by_itself_and_the_opposite_order(shards, reward, tmp_path):
    judge, rows, alone, turned = first_batch(shards, reward, tmp_path, separate=False)
    assert len(alone) == sum(len(row.responses) for row in criticised()[:7])
    with torch.no_grad():
        require_alike(judge, rows, alone, turned)
        with pytest.raises(ValueError, match=r"one at a time differ by at most .*what else is in a batch must not"):
            require_alike(judge, rows, [alone[1], alone[0], *alone[2:]], turned)
        with pytest.raises(ValueError, match="in the opposite order differ by at most"):
            require_alike(judge, rows, alone, rows)


class Made:
    """An opinion that is told what to say, first of the batch, then of the opposite order, then of each alone."""

    def __init__(self, rewards, words, dtype):
        self.reader, self.told = torch.nn.Linear(1, 1, dtype=dtype), []
        self.reader.step = "separate"
        for numbers, texts in zip(rewards, words, strict=True):
            even = torch.tensor(numbers)
            self.told.append(opinions.Said(even, even, tuple(opinions.Written(text, 1, 0) for text in texts)))

    def by(self, way, rows):
        """The next of what it was told."""
        return self.told.pop(0)


def test_a_critique_that_rounding_makes_another_is_told_where_weights_are_coarse_and_refused_where_they_are_not(caplog):
    rewards, words = ([1.0, 2.0], [2.0, 1.0], [1.05], [9.0]), (["a", "b"], ["b", "a"], ["a"], ["other"])
    with pytest.raises(ValueError, match=r"allowed 1e-03\), and 1 critiques; what else is in a batch"):
        require_alike(Made([[1.0, 2.0], [2.0, 1.0], [1.0], [9.0]], words, torch.float32), None, [None, None], None)
    with caplog.at_level(logging.INFO, "mmrlhf"):
        require_alike(Made(rewards, words, torch.bfloat16), None, [None, None], None)
    assert "one at a time differ by at most 5.0e-02 (allowed 1e-01), and 1 critiques" in caplog.text
    far = ([1.0, 2.0], [2.0, 1.0], [1.2], [9.0])
    with pytest.raises(ValueError, match=r"differ by at most 2.0e-01 \(allowed 1e-01\)"):
        require_alike(Made(far, words, torch.bfloat16), None, [None, None], None)


def test_a_model_whose_rewards_follow_the_batch_is_refused_and_no_score_is_kept(shards, reward, tmp_path, monkeypatch):
    def leaning(judge, way, rows, by=Judge.by):
        said = by(judge, way, rows)
        return said._replace(even=said.even + 0.01 * torch.arange(len(said.even)))

    monkeypatch.setattr(Judge, "by", leaning)
    with pytest.raises(ValueError, match=r"self-check: \d+ responses one at a time differ by at most .*allowed 1e-03"):
        written(shards, tmp_path, reward, self_check=True)
    assert not (tmp_path / "rewards.jsonl").exists()
    assert not (tmp_path / "rewards.jsonl.unfinished/journal.jsonl").read_bytes()


def test_rewards_that_are_no_numbers_are_no_agreement(shards, reward, tmp_path, monkeypatch):
    judge, rows, alone, turned = first_batch(shards, reward, tmp_path, separate=True)
    judge.model.reader.head.out.bias.data.fill_(torch.nan)
    with torch.no_grad(), pytest.raises(ValueError, match="one at a time differ by at most nan"):
        require_alike(judge, rows, alone, turned)


# Kills --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "critique"), [(1, "given"), (8, "given"), (4, "generated")])
def test_killed_and_continued_the_file_has_the_same_bytes(
    call, critique, whole, spoken, shards, reward, tmp_path, monkeypatch
):
    options = {"critique": critique, "batch_tokens": 1} | ({"saying": SHORT} if critique == "generated" else {})
    kill(lambda: written(shards, tmp_path, reward, **options), jsonl.Journal, "append", call, after=True)
    assert len(list(jsonl.read(tmp_path / "rewards.jsonl.unfinished/journal.jsonl"))) == call
    computed = []
    monkeypatch.setattr(scoring, "by_query", lambda *args, found=scoring.by_query: computed.append(1) or found(*args))
    out = written(shards, tmp_path, reward, **options)
    assert out.read_bytes() == (whole if critique == "given" else spoken).read_bytes()
    assert Fingerprint.read(out) == Fingerprint.read(whole if critique == "given" else spoken)
    assert len(computed) == 9 - call
    assert not (tmp_path / "rewards.jsonl.unfinished").exists()


def test_a_file_of_another_mode_is_refused_with_what_differs(whole, shards, reward, tmp_path):
    for path in whole.parent.glob("rewards.jsonl*"):
        shutil.copy(path, tmp_path)
    for options in ({"critique": "none"}, {"critique_from": "reason"}, {"critique": "generated", "saying": SHORT}):
        with pytest.raises(ValueError, match=r"rewards.jsonl was made with another critique \(\S+ instead of \S+\)"):
            written(shards, tmp_path, reward, **options)
    changed = shutil.copytree(reward, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    config["reward_model"] = Judging(Template("judge", f"{TEMPLATE.text} Now:"), FRAMES, JUDGING.dimensions).as_dict()
    (changed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"another model .* and another template"):
        written(shards, tmp_path, changed)


# What the account tells ---------------------------------------------------------------------------------------


def test_the_account_tells_of_responses_without_a_critique_and_of_critiques_that_were_cut(
    shards, reward, tmp_path, caplog
):
    without = sum(not (each.critique or each.reason) for row in criticised() for each in row.responses)
    with caplog.at_level(logging.INFO, "mmrlhf"):
        written(shards, tmp_path, reward)
    assert f"score: 9 in = 9 out + 0 skipped; fixed no_critique {without};" in caplog.text
    caplog.clear()
    (tmp_path / "own").mkdir()
    with caplog.at_level(logging.INFO, "mmrlhf"):
        written(shards, tmp_path / "own", reward, critique="generated", saying=Saying(max_new_tokens=1))
    responses = sum(len(row.responses) for row in criticised())
    assert f"fixed critique_cut {responses};" in caplog.text
    assert f"{responses} responses, {responses} tokens of critiques" in caplog.text


# What cannot be done ------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_before_weights_are_read(shards, reward, tmp_path, monkeypatch):
    policy = saved(FAMILY, tmp_path / "policy")
    for room, name in ((opinions, "load_backbone"), (door, "model_digest")):
        monkeypatch.setattr(room, name, lambda *_, **__: pytest.fail("no weights are to be read"))
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda *_, **__: pytest.fail("no weights are to be read"))
    given = {"reward": str(reward), "critique": "given"}
    cases = [
        (
            {"reward": str(policy), "critique": "none"},
            "policy/config.json: expected reward_model, which says how a reward model is asked",
        ),
        ({"reward": str(reward)}, "critique: expected given, none, generated beside reward, got None; say which"),
        (given | {"critique": "greedy"}, "critique: expected given, none, generated .* got 'greedy'; say which"),
        (given | {"critique_from": "none"}, "critique_from: expected .*reason, or the path of a file, got 'none'"),
        (given | {"reference": str(policy)}, "reward: expected this or reference, got both"),
        ({}, "reference: expected the checkpoint that is to score, got none; give --reference FOLDER, or --reward"),
        ({"reference": str(policy), "critique": "none"}, "critique: expected none beside reference, which judges"),
        ({"reference": str(policy), "saying": SHORT}, "critique: expected none beside reference, .* got Saying"),
        (given | {"frames": 5}, "frames: expected 4, with which .*judge was trained, got 5"),
        (
            {"reward": str(reward), "critique": "generated", "critique_from": "reason"},
            "critique_from: expected it with critique given alone, got it with generated",
        ),
        ({"reference": str(policy), "critique_from": "reason"}, "critique_from: expected .* got it with None"),
        (given | {"saying": SHORT}, "saying: expected it with critique generated alone, got it with given"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            score(shards, tmp_path / "out.jsonl", **options)
    assert not list(tmp_path.glob("out.jsonl*"))


def test_the_command_does_the_same(spoken, shards, reward, tmp_path):
    words = ["score", shards, "--reward", reward, "--critique", "generated", "--saying.max_new_tokens", "6"]
    words += ["--out", tmp_path / "rewards.jsonl", "--cache", tmp_path, "--batch-tokens", "1", "--workers", "0"]
    assert cli.main([*map(str, words)]) == 0
    assert (tmp_path / "rewards.jsonl").read_bytes() == spoken.read_bytes()


# Where they are read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["given", "generated"])
def test_rewards_and_log_probs_of_a_reference_join_into_training_batches(kind, whole, spoken, shards, tmp_path):
    policy, rewards = saved(FAMILY, tmp_path / "policy"), whole if kind == "given" else spoken
    logps = tmp_path / "scores.jsonl"
    score(shards, logps, str(policy), frames=FRAMES, workers=0, cache=tmp_path)
    options = {"global_batch": 1, "cache": tmp_path, "frames": FRAMES, "workers": 0, "max_skipped": 1.0}
    needs = ("reward", "reference_logp")
    module = RankedDataModule(shards, policy, scores=(rewards, logps), needs=needs, **options)
    module.setup("fit")
    told = {(row["id"], row["response"]): row["reference_logp"] for row in jsonl.read(logps)}
    found = {}
    for batch in module.train_dataloader():
        for place, pair in enumerate(zip(batch.rewards.tolist(), batch.reference_logps.tolist(), strict=True)):
            found[batch.ids[0], place] = pair
        if len({name for name, _ in found}) == 5:
            break
    assert found == {at: pytest.approx((values(rewards)[at], told[at]), rel=1e-6) for at in found}
    assert module.reference_fingerprint == model_digest(policy)
