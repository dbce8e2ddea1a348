"""A file of critiques holds what the server says of each response, asked in the words of the reward model."""

from __future__ import annotations

import base64
import io
import logging
import shutil

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from mmrlhf import cli, jsonl
from mmrlhf import critique as door
from mmrlhf.critique import critique
from mmrlhf.datamodules.reader import Shards
from mmrlhf.datamodules.rows import Critiques
from mmrlhf.datamodules.written import WrittenCritiques
from mmrlhf.endpoint import Endpoint
from mmrlhf.fingerprint import Fingerprint, of_text
from mmrlhf.modules.rewardmodel import judging_of
from mmrlhf.provenance import model_digest

from .chatserver import Served, completion, said
from .killing import kill
from .test_endpoint import (
    CANARY,
    no_key,  # noqa: F401 - of this file too
    quick,  # noqa: F401 - a fixture
)
from .test_score import media, one_thread, queries  # noqa: F401 - fixtures
from .test_score_reward import JUDGING, TEMPLATE, reward, samples, shards  # noqa: F401 - fixtures

RESPONSES = sum(len(row.responses) for row in queries())


def of_text_asked(body):
    """A critique that says what it was asked."""
    return f"of {of_text(said(body))[:12]}"


@pytest.fixture(scope="module")
def server():
    with Served(of_text_asked) as served:
        yield served


@pytest.fixture
def served(server):
    server.answer = of_text_asked
    server.asked.clear()
    return server


def written(shards, reward, folder, served, **options):  # noqa: F811
    out = folder / "critiques.jsonl"
    endpoint = Endpoint(served.url, "judge", at_once=3, retries=0, films=options.pop("films", "film"))
    critique(shards, str(reward), endpoint, out, **options)
    return out


@pytest.fixture(scope="module")
def whole(shards, reward, server, tmp_path_factory):  # noqa: F811
    """The file of a run that was left alone."""
    server.answer = of_text_asked
    return written(shards, reward, tmp_path_factory.mktemp("whole"), server)


def words(query, response):
    """The request, by hand; the prompts of these queries have their media before them."""
    return f"Judge it. Q: {query.prompt}\nA: {response.text}\nEvaluation:"


def test_every_response_has_the_critique_that_was_written_about_it_in_the_order_of_the_samples(whole, shards):  # noqa: F811
    expected = [
        {
            "id": sample.ranked.query.id,
            "response": place,
            "digest": of_text(response.text),
            "critique": f"of {of_text(words(sample.ranked.query, response))[:12]}",
            "cut": False,
        }
        for sample in samples(shards)
        for place, response in enumerate(sample.ranked.responses)
        if all(medium.offset == 0 for medium in sample.ranked.query.media)
    ]
    found = [row for row in jsonl.read(whole) if row["id"] != "pictures"]
    assert found == expected
    assert len(list(jsonl.read(whole))) == RESPONSES


def test_a_reader_gives_them_back_with_their_responses(whole, shards):  # noqa: F811
    known = WrittenCritiques(whole)
    rows = {(row["id"], row["response"]): row["critique"] for row in jsonl.read(whole)}
    for sample in samples(shards):
        name = sample.ranked.query.id
        expected = [rows[name, place] for place in range(len(sample.ranked.responses))]
        assert known.of(sample.ranked) == expected


def opened(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


def as_the_server_reads(processor, body):
    """What a server makes of a request: its chat template, rendered and tokenised with the media."""
    talk = []
    for message in body["messages"]:
        content = message["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts, films = [], False
        for part in content:
            if part["type"] == "image_url":
                parts.append({"type": "image", "image": opened(part["image_url"]["url"])})
            elif part["type"] == "video_url":
                films, (_, *frames) = True, part["video_url"]["url"].split(",")
                film = np.stack([np.asarray(opened(f"x,{frame}")) for frame in frames])
                parts.append({"type": "video", "video": film})
            else:
                parts.append(part)
        talk.append({"role": message["role"], "content": parts})
    told = {"do_sample_frames": False} if films else {}
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": told}
    return dict(processor.apply_chat_template([talk], add_generation_prompt=True, **options))


def test_the_server_reads_what_the_reward_model_reads(shards, reward, served, tmp_path):  # noqa: F811
    """Word by word and picture by picture; tokens may be cut otherwise where question and response meet."""
    written(shards, reward, tmp_path, served)
    processor = AutoProcessor.from_pretrained(reward)
    asked = [as_the_server_reads(processor, body) for body in served.asked]
    theirs = {processor.tokenizer.decode(one["input_ids"][0]): one for one in asked}
    encode = Critiques(processor, JUDGING.frames, TEMPLATE, "none")
    ours = {}
    for sample in samples(shards):
        row = encode(sample)
        for given, _ in row.continuations:
            ids = [*row.prefix.tolist(), *given.tolist()]
            ours[processor.tokenizer.decode(ids)] = row.features
    assert theirs.keys() == ours.keys()
    for text, features in ours.items():
        if pixels := [name for name in features if name.startswith("pixel_values")]:
            close = 0.01 if "videos" in pixels[0] else 1e-6  # frames go as JPEG
            assert (theirs[text][pixels[0]] - features[pixels[0]]).abs().mean() < close


def test_the_fingerprint_names_everything_that_the_critiques_depend_on(whole, shards, reward, server):  # noqa: F811
    assert Fingerprint.read(whole).parts == {
        "values": "critique",
        "model": model_digest(reward),
        "template": judging_of(reward).template.digest,
        "frames": str(JUDGING.frames),
        "max_new_tokens": "512",
        "endpoint.model": "judge",
        "endpoint.temperature": "0.0",
        "endpoint.films": "film",
        **{f"data.{split}": Shards(shards, split).digest for split in ("train", "val", "test")},
    }


def test_no_weights_are_loaded(shards, reward, served, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("weights"))
    written(shards, reward, tmp_path, served, splits=["val"])
    assert {said(body) for body in served.asked} == {
        words(sample.ranked.query, response) for sample in Shards(shards, "val") for response in sample.ranked.responses
    }


def test_cut_and_missing_critiques_are_told(shards, reward, served, tmp_path, caplog):  # noqa: F811
    answers = {
        "It is red.": completion("half a", "length"),
        "Blue": completion("", "content_filter"),
        "yes": completion(None, refusal="I will not."),
        "no": "",
    }
    served.answer = lambda body: next((found for text, found in answers.items() if f"A: {text}\n" in said(body)), "ok")
    with caplog.at_level(logging.INFO, "mmrlhf"):
        out = written(shards, reward, tmp_path, served)
    found = {row["digest"]: (row["critique"], row["cut"]) for row in jsonl.read(out)}
    assert [found[of_text(text)] for text in answers] == [("half a", True), ("", False), ("", False), ("", False)]
    assert "fixed no_critique 3, critique_cut 1" in caplog.text
    assert f"{RESPONSES} critiques, {11 * RESPONSES} tokens read, {7 * RESPONSES} written" in caplog.text


@pytest.mark.parametrize(
    ("target", "name", "call", "after"),
    [
        (door, "claim", 1, True),
        (jsonl.Journal, "append", 9, True),
        (Fingerprint, "write", 1, True),
        (door.jsonl, "write", 1, True),
    ],
)
def test_killed_anywhere_and_continued_the_file_has_the_same_bytes(
    target,
    name,
    call,
    after,
    whole,
    shards,  # noqa: F811
    reward,  # noqa: F811
    served,
    tmp_path,
):
    arguments = (shards, reward, tmp_path, served)
    kill(lambda: written(*arguments), target, name, call, after)
    journal = tmp_path / "critiques.jsonl.unfinished/journal.jsonl"
    kept = len(list(jsonl.read(journal))) if journal.exists() else 0
    served.asked.clear()
    out = written(*arguments)
    assert out.read_bytes() == whole.read_bytes()
    assert len(served.asked) == (0 if name == "write" else RESPONSES - kept)
    assert {path.name for path in tmp_path.iterdir()} == {"critiques.jsonl", "critiques.jsonl.fingerprint.json"}


def test_a_full_disk_leaves_no_connection_behind(shards, reward, served, tmp_path, monkeypatch):  # noqa: F811
    begun = []

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Endpoint, "ask", lambda *args, ask=Endpoint.ask: begun.append(ask(*args)) or begun[0])
    monkeypatch.setattr(jsonl.Journal, "append", full)
    with pytest.raises(OSError, match="no space left"):
        written(shards, reward, tmp_path, served)
    assert begun[0].gi_frame is None, "it was closed, and not left to the end of the process"


def test_a_finished_file_is_left_alone_and_one_of_something_else_is_refused(shards, reward, served, tmp_path):  # noqa: F811
    out = written(shards, reward, tmp_path, served)
    before, number = out.stat(), len(served.asked)
    written(shards, reward, tmp_path, served)
    assert (out.stat(), len(served.asked)) == (before, number)
    for options, named in (({"max_new_tokens": 9}, "max_new_tokens"), ({"films": "pictures"}, "endpoint.films")):
        with pytest.raises(ValueError, match=rf"was made with another {named}.*give another --out"):
            written(shards, reward, tmp_path, served, **options)


def test_a_query_that_cannot_be_read_is_left_out_with_its_reason(shards, reward, served, tmp_path, caplog, monkeypatch):  # noqa: F811
    parts = Shards.parts
    damage = {"train/1": {"png": b"no picture"}}

    def damaged(self, index):
        return parts(self, index) | damage.get(f"{self.split}/{index}", {})

    monkeypatch.setattr(Shards, "parts", damaged)
    with pytest.raises(ValueError, match=r"critique: expected at most 1.00% skipped, got .*train/1"):
        written(shards, reward, tmp_path, served)
    assert not (tmp_path / "critiques.jsonl").exists()
    number = len(served.asked)
    with caplog.at_level(logging.INFO, "mmrlhf"):
        out = written(shards, reward, tmp_path, served, max_skipped=0.2)
    assert len(served.asked) == number, "what is known is not asked again"
    (lost,) = jsonl.read(tmp_path / "critiques.jsonl.rejects.jsonl")
    assert lost["sample"] == "train/1"
    assert f"9 in = 8 out + 1 skipped ({lost['reason']} 1)" in caplog.text
    assert {row["id"] for row in jsonl.read(out)} == {row.query.id for row in queries()} - {"picture"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected 1 or more, got 0"),
        ({"splits": []}, "splits: expected one or more of"),
    ],
)
def test_options_that_cannot_work_are_refused(options, told, shards, reward, served, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=told):
        written(shards, reward, tmp_path, served, **options)
    assert served.asked == []


def test_what_is_no_reward_model_and_no_endpoint_is_refused(shards, reward, served, tmp_path):  # noqa: F811
    plain = shutil.copytree(reward, tmp_path / "plain")
    config = jsonl.loads((plain / "config.json").read_bytes())
    del config["reward_model"]
    (plain / "config.json").write_text(jsonl.dumps(config))
    with pytest.raises(ValueError, match="expected reward_model, which says how a reward model is asked"):
        written(shards, plain, tmp_path, served)
    with pytest.raises(ValueError, match=r"endpoint\.url: expected an address like"):
        critique(shards, str(reward), Endpoint("here", "judge"), tmp_path / "x.jsonl")
    assert served.asked == []


def test_the_command_line_writes_the_same_and_no_key(whole, shards, reward, served, tmp_path, monkeypatch, capfd):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    out = tmp_path / "critiques.jsonl"
    arguments = ["critique", shards, "--reward", reward, "--out", out, "--endpoint.url", served.url]
    arguments += ["--endpoint.model", "judge", "--endpoint.films", "film"]
    assert cli.main(list(map(str, arguments))) == 0
    assert out.read_bytes() == whole.read_bytes()
    told = [path.read_text() for path in tmp_path.iterdir()] + list(capfd.readouterr())
    assert not [text for text in told if CANARY in text]
    assert served.headers[-1]["authorization"] == f"Bearer {CANARY}"
