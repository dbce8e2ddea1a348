"""`mmrlhf export`: any checkpoint of a training as the folder that the training itself writes at its end."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mmrlhf import cli, jsonl
from mmrlhf.callbacks import resuming
from mmrlhf.export import export
from mmrlhf.modules import restoring
from mmrlhf.modules.critic import CritiqueRewardModule
from mmrlhf.modules.loading import BackboneConfig, Lora, load_backbone
from mmrlhf.modules.rewardmodel import RewardModel
from mmrlhf.modules.saving import Form, save_folder
from mmrlhf.options import read_options
from mmrlhf.queries import Query
from mmrlhf.score import score
from mmrlhf.world.policy import build_model, build_processor

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
VERBS = cli.VERBS | {"export": "mmrlhf.export:export"}
EARLY, STEPS = 2, 4
SHARDED = ("--trainer.strategy", "{class_path: mmrlhf.callbacks.sharding.Sharded}")
RUNS = {
    "plain": ("train-dpo",),
    "lora": ("train-dpo", "--model.backbone.lora.rank", "4"),
    "reward": ("train-reward", "--model.dimensions", "[helpfulness]", "--data.frames", "3"),
    "sharded": ("train-dpo", *SHARDED, "--trainer.devices", "1"),
}
# Rounding of sums in another order, over what a training moves.
CLOSE = 1e-3


class Witness(lightning.Callback):
    """Writes down the weights after a step, and the logits that they give."""

    def __init__(self, out: str, step: int):
        self.out, self.step = Path(out), step

    def on_train_batch_end(self, trainer, pl_module, *_):
        """Once."""
        if trainer.global_step == self.step and not self.out.exists():
            reader = getattr(pl_module, "scorer", None) or pl_module.reader
            model = reader.backbone.whole
            with torch.no_grad():
                logits = model(**shown(model.config.name_or_path)).logits
            state = {name: value.clone() for name, value in pl_module.state_dict().items()}
            torch.save({"logits": logits, "state": state}, self.out)


def shown(folder):
    """A question about a picture, as a model reads it."""
    asked = [{"type": "image", "image": Image.new("RGB", (40, 28), (200, 30, 90))}, {"type": "text", "text": "What?"}]
    return AutoProcessor.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": asked}], tokenize=True, return_dict=True, return_tensors="pt"
    )


def words(home, out, verb, *more):
    """The command line of a training."""
    config = {"train-dpo": "configs/dpo/world.yaml", "train-reward": "configs/reward/world.yaml"}[verb]
    scores = ["--data.scores", f"{home}/scores.jsonl"] if verb == "train-dpo" else ["--trainer.max_epochs", "null"]
    return [
        *(verb, "--config", config, "--model.backbone.path", f"{home}/policy", "--data.shards", f"{home}/shards"),
        *("--run.out", str(out), "--run.save_every", str(EARLY), "--run.tracking", "null", *scores),
        *("--data.global_batch", "4", "--data.micro_batch", "2", "--trainer.max_steps", str(STEPS)),
        *("--data.workers", "0", "--trainer.enable_progress_bar", "false", *more),
        *("--trainer.enable_model_summary", "false"),
    ]


def weights(folder):
    return load_file(folder / "model.safetensors")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def apart(one, other, start):
    """How far two trainings ended from each other, over how far the second has moved."""
    squares = [((one[name] - other[name]).square().sum(), (other[name] - start[name]).square().sum()) for name in one]
    return float((sum(each for each, _ in squares) / sum(each for _, each in squares)).sqrt())


def logits_of(model):
    with torch.no_grad():
        return model.eval()(**shown(model.config.name_or_path)).logits


def loaded(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An untrained policy and the data of trainings."""
    home = tmp_path_factory.mktemp("home")
    assert cli.main(["world", "--out", f"{home}/w", "--queries", "24", "--no-policy", "--processes", "1"]) == 0
    packing = ["--ranked", f"{home}/w/ranked.jsonl", "--media", f"{home}/w/media", "--out", f"{home}/shards"]
    assert cli.main(["pack", *packing, "--val", "0", "--test", "0", "--processes", "1"]) == 0
    processor = build_processor(AutoTokenizer.from_pretrained(home / "w" / "tokenizer"))
    for seed, name in enumerate(("policy", "another")):
        build_model(processor.tokenizer, seed).save_pretrained(home / name)
        processor.save_pretrained(home / name)
    score(home / "shards", home / "scores.jsonl", str(home / "policy"), workers=0)
    return home


@pytest.fixture(scope="module")
def runs(home):
    """Finished trainings, whose data are gone."""
    before = dict(os.environ)
    data = shutil.copytree(home / "shards", home / "theirs")
    for name, (verb, *more) in RUNS.items():
        witness = [] if name == "sharded" else ["--trainer.callbacks", "tests.test_export.Witness"]
        if witness:
            witness += ["--trainer.callbacks.out", f"{home}/{name}.pt", "--trainer.callbacks.step", str(EARLY)]
        assert cli.main(words(home, home / "runs" / name, verb, *more, *witness, "--data.shards", str(data))) == 0
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
    shutil.rmtree(data)
    return home / "runs"


@pytest.fixture
def own(runs, tmp_path):
    """A copy of a run, which a test may damage."""

    def copied(name):
        return shutil.copytree(runs / name, tmp_path / "own" / name)

    return copied


def damage(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# The same as the training writes -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_the_last_checkpoint_becomes_the_files_that_the_training_wrote(runs, tmp_path, name):
    export(runs / name, tmp_path / "out")
    found, expected = (files(folder) for folder in (tmp_path / "out", runs / name / "model"))
    assert found.keys() - expected.keys() == {Path("export.json")}
    assert [str(path) for path in expected if found[path] != expected[path]] == ["README.md"]


@pytest.mark.parametrize("name", ["plain", "lora"])
def test_an_earlier_checkpoint_becomes_the_weights_of_its_step(home, runs, tmp_path, name):
    export(runs / name, tmp_path / "out", step=EARLY)
    witness = torch.load(home / f"{name}.pt", weights_only=True)
    torch.testing.assert_close(logits_of(loaded(tmp_path / "out")), witness["logits"], rtol=1e-5, atol=1e-5)
    assert not equal(weights(tmp_path / "out"), weights(runs / name / "model"))
    if name == "plain":
        named = {name.removeprefix("scorer.backbone.model."): value for name, value in witness["state"].items()}
        named.pop("usual_gap")
        assert equal(loaded(tmp_path / "out").state_dict(), named)
        last = logits_of(loaded(runs / name / "model"))
        assert (last - witness["logits"]).abs().max() > 1e-3, "a step changes nothing"


def test_adapters_alone_say_with_peft_what_merged_ones_say(home, runs, tmp_path):
    export(runs / "lora", tmp_path / "alone", step=EARLY, merge=False)
    assert not list((tmp_path / "alone").glob("model*.safetensors"))
    with_peft = PeftModel.from_pretrained(loaded(home / "policy"), tmp_path / "alone")
    witness = torch.load(home / "lora.pt", weights_only=True)
    torch.testing.assert_close(logits_of(with_peft), witness["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(loaded(tmp_path / "alone")), witness["logits"], rtol=1e-5, atol=1e-5)
    assert (logits_of(loaded(home / "policy")) - witness["logits"]).abs().max() > 1e-4
    adapter = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    kept = {name.replace(".default.", "."): value for name, value in witness["state"].items()}
    assert all(torch.equal(value, kept[f"scorer.backbone.model.{name}"]) for name, value in adapter.items())
    AutoProcessor.from_pretrained(tmp_path / "alone")


@pytest.mark.parametrize("named", [("owner/policy@v1",), ("owner/policy", "--model.backbone.revision", "v1")])
def test_adapters_tell_of_a_base_from_the_hub_its_name_and_not_where_it_is_kept(
    home, runs, tmp_path, monkeypatch, named
):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(home / "policy"))
    _, *lora = RUNS["lora"]
    told = words(home, tmp_path / "run", "train-dpo", *lora, "--model.backbone.path", *named)
    assert cli.main(told) == 0
    export(tmp_path / "run", tmp_path / "out")
    found, trained = (files(folder) for folder in (tmp_path / "out", tmp_path / "run" / "model"))
    assert [str(path) for path in trained if found[path] != trained[path]] == ["README.md"]
    assert [path for path, content in found.items() if str(home).encode() in content] == []
    told = jsonl.loads(trained[Path("adapter/adapter_config.json")])
    assert (told["base_model_name_or_path"], told["revision"]) == ("owner/policy", "v1")
    assert equal(weights(tmp_path / "out"), weights(runs / "lora" / "model"))


def test_what_only_computes_is_not_needed(own, tmp_path):
    run = own("plain")
    text = (run / "config.yaml").read_text()
    for there, other in (("features: null", "features: /gone"), ("attention: sdpa", "attention: flash_attention_2")):
        assert text.count(there) == 1
        text = text.replace(there, other)
    (run / "config.yaml").write_text(text)
    export(run, tmp_path / "out")
    assert equal(weights(tmp_path / "out"), weights(run / "model"))


def test_a_reward_model_scores_as_its_module_did(home, runs, tmp_path):
    export(runs / "reward", tmp_path / "out", step=EARLY)
    model = RewardModel.from_pretrained(tmp_path / "out")
    module = CritiqueRewardModule(BackboneConfig(f"{home}/policy"), dimensions=("helpfulness",))
    module.configure_model()
    module.load_state_dict(torch.load(home / "reward.pt", weights_only=True)["state"])
    query, said = Query("q", "What is it?"), ["A ring.", "Nothing at all."]
    with torch.no_grad():
        expected = module.reader.eval()(model.rows(query, said))
    found = model.score(query, said)
    assert [each.reward for each in found] == pytest.approx(expected.rewards.tolist(), abs=1e-6)
    assert expected.rewards[0] != expected.rewards[1]
    assert model.judging == RewardModel.from_pretrained(runs / "reward" / "model").judging
    assert model.judging.frames == 3
    last = RewardModel.from_pretrained(runs / "reward" / "model").score(query, said)
    assert last[0].reward != pytest.approx(found[0].reward, abs=1e-4)


def test_parts_become_what_a_single_file_becomes(home, runs, tmp_path):
    assert (runs / "sharded" / "checkpoints" / f"step-{EARLY:08d}" / "state").is_dir()
    for name in ("plain", "sharded"):
        export(runs / name, tmp_path / name, step=EARLY)
    start = weights(home / "policy")
    assert apart(weights(tmp_path / "sharded"), weights(tmp_path / "plain"), start) < CLOSE
    assert apart(weights(runs / "plain" / "model"), weights(tmp_path / "plain"), start) > 100 * CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--model.backbone.lora.rank", "4")])
def test_the_parts_of_two_ranks_become_one_model(home, tmp_path, more):
    for name, options in {"one": (), "two": (*SHARDED, "--trainer.devices", "2")}.items():
        command = words(home, tmp_path / name, "train-dpo", *more, *options, "--data.micro_batch", "1")
        subprocess.run(
            [sys.executable, "-m", "mmrlhf", *command], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        for step in (EARLY, STEPS):
            export(tmp_path / name, tmp_path / f"{name}-{step}", step=step)
    parts = tmp_path / "two" / "checkpoints" / f"step-{EARLY:08d}" / "state"
    assert len(list(parts.glob("*.distcp"))) == 2
    assert equal(weights(tmp_path / f"two-{STEPS}"), weights(tmp_path / "two" / "model"))
    for step in (EARLY, STEPS):
        one, two = (weights(tmp_path / f"{name}-{step}") for name in ("one", "two"))
        assert apart(two, one, weights(home / "policy")) < CLOSE


# Types -------------------------------------------------------------------------------------------------------


def test_weights_are_rounded_once_and_a_head_is_not(runs, tmp_path):
    export(runs / "reward", tmp_path / "out", dtype="bfloat16")
    fine, coarse = weights(runs / "reward" / "model"), weights(tmp_path / "out")
    for name, value in coarse.items():
        head = name.startswith("reward_head.")
        assert value.dtype == (torch.float32 if head else torch.bfloat16)
        assert torch.equal(value, fine[name] if head else fine[name].bfloat16())
    assert loaded(tmp_path / "out").dtype == torch.bfloat16
    RewardModel.from_pretrained(tmp_path / "out", dtype="bfloat16").score(Query("q", "What?"), ["A.", "B."])


@pytest.mark.parametrize(("kept", "written"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_adapters_are_merged_in_the_finer_type(home, tmp_path, kept, written):
    body = load_backbone(str(home / "policy"), dtype=kept, lora=Lora(rank=2, alpha=6))
    named = dict(body.model.named_parameters())
    for name, weight in named.items():
        if ".lora_B." in name:
            weight.data.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(len(name)))
    name = next(name for name in named if ".lora_B." in name)
    first, second = named[name.replace("lora_B", "lora_A")].detach().float(), named[name].detach().float()
    base = named[name.replace("lora_B.default", "base_layer")].detach().float()
    expected = (base + 3 * (second @ first)).to(getattr(torch, written))
    save_folder(body, AutoProcessor.from_pretrained(home / "policy"), tmp_path / "out", "", Form(dtype=written))
    found = loaded(tmp_path / "out").state_dict()[name.removeprefix("base_model.model.").replace("lora_B.default.", "")]
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


# Once, whole, and told ---------------------------------------------------------------------------------------


def test_the_same_export_is_left_alone_and_another_in_its_place_is_refused(runs, tmp_path, caplog):
    export(runs / "plain", tmp_path / "out", step=EARLY)
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    with caplog.at_level(logging.INFO, "mmrlhf"):
        export(runs / "plain", tmp_path / "out", step=EARLY)
    assert "exported already" in caplog.text
    for told, more in {
        "checkpoint 'step-00000002' instead of 'step-00000004'": {},
        "dtype None instead of 'bfloat16'": {"step": EARLY, "dtype": "bfloat16"},
    }.items():
        with pytest.raises(ValueError, match=told):
            export(runs / "plain", tmp_path / "out", **more)
    with pytest.raises(ValueError, match="holds an export with files"):
        export(runs / "sharded", tmp_path / "out", step=EARLY)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before


def test_an_export_that_fails_leaves_nothing_in_its_place_and_the_next_one_succeeds(runs, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.ProcessorMixin.save_pretrained", full)
        with pytest.raises(OSError, match="No space"):
            export(runs / "plain", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(runs / "plain", tmp_path / "out")
    assert equal(weights(tmp_path / "out"), weights(runs / "plain" / "model"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_card_tells_run_step_settings_and_cost_and_what_is_not_known(runs, tmp_path):
    export(runs / "plain", tmp_path / "out", step=EARLY)
    card, full = ((folder / "README.md").read_text() for folder in (tmp_path / "out", runs / "plain" / "model"))
    assert f"exported after step {EARLY}" in card
    for told in ("| run | plain |", "| checkpoint | step-00000002 |", f"| queries | {EARLY * 4} |", "| devices | 1 |"):
        assert told in card
    assert f"| queries | {STEPS * 4} |" in full
    assert "not known, as the data were not read" in card
    same = [
        line for line in full.splitlines() if line.startswith(("| model |", "| beta |", "| optimiser |", "| digest"))
    ]
    assert len(same) == 4
    assert all(line in card for line in same)


def test_a_checkpoint_that_keeps_no_cost_is_exported_without_it(own, tmp_path):
    state = own("plain") / "checkpoints" / "last.ckpt"
    (state.parent / f"step-{STEPS:08d}" / "state").rename(state)
    for folder in resuming.by_step(state.parent).values():
        shutil.rmtree(folder)
    kept = torch.load(state, weights_only=True)
    del kept["callbacks"]["ComputeLedger"]
    torch.save(kept, state)
    export(state.parents[1], tmp_path / "out")
    assert "| all else | not known |" in (tmp_path / "out" / "README.md").read_text()
    assert equal(weights(tmp_path / "out"), weights(state.parents[1] / "model"))


def test_the_command_line_says_how_much_was_written_and_faults_on_one_line(runs, tmp_path, caplog, capsys):
    with caplog.at_level(logging.INFO, "mmrlhf"):
        assert cli.main(["export", str(runs / "lora"), "--out", f"{tmp_path}/a", "--no-merge"], VERBS) == 0
    files = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    assert f"{len(files)} files, {size:,} bytes, from" in caplog.text
    assert cli.main(["export", str(runs / "plain"), "--out", f"{tmp_path}/b", "--step", "3"], VERBS) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("mmrlhf export: step: expected one of which")
    assert "(4, 2), got 3" in line
    told = read_options(export, "mmrlhf export", ["r", "--config", "configs/export.yaml", "--step", "2"])
    assert (told["run"], told["step"], told["merge"]) == (Path("runs/dpo"), 2, True)


# Refused -----------------------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_named_and_passed_over_unless_it_is_asked_for(own, tmp_path, caplog):
    run = own("plain")
    damage(run / "checkpoints" / f"step-{STEPS:08d}" / "state")
    with pytest.raises(
        ValueError, match=r"step-00000004: expected .* damaged: state has other contents .* leave the step"
    ):
        export(run, tmp_path / "out", step=STEPS)
    with caplog.at_level(logging.WARNING, "mmrlhf"):
        export(run, tmp_path / "out")
    assert "step-00000004: passed over, damaged: state has other contents" in caplog.text
    assert jsonl.loads((tmp_path / "out" / "export.json").read_bytes())["checkpoint"] == "step-00000002"
    (run / "checkpoints" / f"step-{EARLY:08d}" / "COMPLETE.json").unlink()
    with pytest.raises(ValueError, match=r"step-00000004 \(damaged.*step-00000002 \(incomplete.*continues it"):
        export(run, tmp_path / "other")


@pytest.fixture
def without_weights(monkeypatch):
    """What is refused is refused before a weight is read."""

    def read(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", read)
    monkeypatch.setattr(torch, "load", read)
    monkeypatch.setattr(restoring, "FileSystemReader", read)


@pytest.mark.usefixtures("without_weights")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("none", {}, "expected the folder of a training, in which there is config.yaml"),
        ("plain", {"step": 3}, r"step: expected one of which .* \(4, 2\), got 3"),
        ("plain", {"merge": False}, "merge: expected true, as the training moved the weights themselves"),
        ("reward", {"merge": False}, "merge: expected true"),
        ("lora", {"merge": False, "dtype": "bfloat16"}, "dtype: expected null for adapters alone"),
        ("plain", {"base": "/no/where"}, "say --base"),
        ("plain", {"out": "model"}, "out: expected a folder outside of what the training writes itself"),
        ("plain", {"out": "checkpoints/step-00000009"}, "out: expected a folder outside of what the training writes"),
        ("plain", {"out": "figures"}, "figures: expected nothing there, or an export, found something else"),
        ("plain", {"out": "run.json"}, "run.json: expected nothing there, or an export, found something else"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(runs, tmp_path, name, options, message):
    options = dict(options)
    out = runs / name / options.pop("out") if "out" in options else tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        export(runs / name, out, **options)


@pytest.mark.usefixtures("without_weights")
def test_the_parts_of_another_user_are_refused_before_they_are_read(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(ValueError, match="expected shards of this user"):
        export(runs / "sharded", tmp_path / "out")
    with pytest.raises(ValueError, match="expected shards of this user"):
        export(runs / "sharded", tmp_path / "out", step=EARLY)


@pytest.mark.usefixtures("without_weights")
@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("plain", "config.yaml", "[1]", "expected the settings of a training, found others"),
        ("plain", "config.yaml", "run: {out: ", "config.yaml: expected YAML, got while parsing"),
        ("plain", "config.yaml", "shards: a\n", "expected the settings of a training, found others"),
        ("plain", "checkpoints", None, "expected a checkpoint that is whole, found none; let the training write one"),
    ],
)
def test_a_run_that_lacks_something_is_refused(own, tmp_path, name, file, text, message):
    run = own(name)
    (run / file).rename(tmp_path / "away")
    if text is not None:
        (run / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        export(run, tmp_path / "out")


def test_a_reward_run_from_before_there_was_a_file_for_what_it_is_asked_tells_it_at_its_end(own, tmp_path):
    run = own("reward")
    (run / "judging.json").unlink()
    export(run, tmp_path / "out")
    found, expected = files(tmp_path / "out"), files(run / "model")
    assert [str(path) for path in expected if found[path] != expected[path]] == ["README.md"]
    (run / "model").rename(tmp_path / "away")
    with pytest.raises(
        ValueError, match=r"judging.json: expected what the reward model is asked, .* has not ended; go on with it"
    ):
        export(run, tmp_path / "other")


@pytest.mark.parametrize("path", ["policy", "there/is/policy", "is/policy"])
def test_a_run_whose_paths_are_relative_is_exported_from_where_it_was_started(home, own, tmp_path, monkeypatch, path):
    def offline(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    run = own("plain")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(f"path: {home}/policy", f"path: {path}"))
    shutil.copytree(home / "policy", tmp_path / "start" / path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"paths are relative to where it was started: export from there.* say --base"):
        export(run, tmp_path / "out")
    with pytest.raises(ValueError, match="say --base") as refused:
        export(run, tmp_path / "out", base="elsewhere/policy")
    assert "relative" not in str(refused.value), "what is said here is relative to here"
    export(run, tmp_path / "out", base=f"start/{path}")
    monkeypatch.chdir(tmp_path / "start")
    export(run, tmp_path / "from-there")
    assert equal(weights(tmp_path / "out"), weights(tmp_path / "from-there"))


def test_a_checkpoint_that_is_removed_before_its_seal_is_read_is_told(own, tmp_path, monkeypatch):
    run = own("plain")
    state = run / "checkpoints" / f"step-{STEPS:08d}" / "state"

    def late(*_):
        shutil.rmtree(state.parent)
        return state

    export(run, tmp_path / "out")  # which the same export would leave alone, and another is refused
    monkeypatch.setattr("mmrlhf.export.chosen", late)
    with pytest.raises(ValueError, match="step-00000004: expected to read it to its end, but it was removed"):
        export(run, tmp_path / "out")


def test_settings_that_no_module_has_are_refused_with_their_file(own, tmp_path):
    run = own("plain")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("sft_weight: 0.25", "sft_weight: -1.0"))
    with pytest.raises(ValueError, match=r"config.yaml: .*sft_weight: expected 0 or more"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize("name", ["plain", "sharded"])
def test_another_base_is_told_from_the_one_that_was_moved(home, runs, tmp_path, name):
    shutil.copytree(home / "policy", tmp_path / "moved")
    export(runs / name, tmp_path / "out", base=str(tmp_path / "moved"))
    assert equal(weights(tmp_path / "out"), weights(runs / name / "model"))
    with pytest.raises(ValueError, match=r"where nothing was trained, .* got others; give that one with --base"):
        export(runs / name, tmp_path / "other", base=str(home / "another"))
    smaller = loaded(home / "policy")
    smaller.resize_token_embeddings(len(AutoTokenizer.from_pretrained(home / "policy")) - 8)
    smaller.save_pretrained(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"2 others, such as scorer.*lm_head.weight \(\(689, 128\) of float32 inst"):
        export(runs / name, tmp_path / "other", base=str(tmp_path / "moved"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["plain", "sharded"])
def test_a_checkpoint_that_is_removed_while_it_is_read_is_told(own, tmp_path, monkeypatch, name):
    run = own(name)

    def removed(module):
        shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(restoring, "_digest_of_frozen", removed)
        with pytest.raises(ValueError, match="step-00000004: expected to read it to its end, but it was removed"):
            export(run, tmp_path / "out")
    load = restoring.load

    def late(*told, **options):
        shutil.rmtree(run / "checkpoints" / f"step-{EARLY:08d}")
        load(*told, **options)

    if name == "sharded":
        monkeypatch.setattr(restoring, "load", late)
        with pytest.raises(ValueError, match="step-00000002: expected to read it to its end, but it was removed"):
            export(run, tmp_path / "out")


def test_parts_that_cannot_be_read_are_told_on_one_line(own, tmp_path, monkeypatch):
    run = own("sharded")
    parts = run / "checkpoints" / f"step-{STEPS:08d}" / "state"

    def late(*told, **options):
        (parts / "__0_0.distcp").unlink()
        load(*told, **options)

    load = restoring.load
    monkeypatch.setattr(restoring, "load", late)
    with pytest.raises(OSError, match=r"state: could not be read \(.*__0_0.distcp"):
        export(run, tmp_path / "out")
