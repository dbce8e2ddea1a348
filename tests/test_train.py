"""`mmrlhf train-dpo`: a config becomes a checkpoint that plain transformers loads; killed, the run continues."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mmrlhf import cli, jsonl
from mmrlhf.modules.backbone import Backbone
from mmrlhf.records import RankedQuery
from mmrlhf.score import score
from mmrlhf.world.policy import build_model, build_processor

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
STEPS, BATCH = 6, 4


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A world of forty queries with its shards, an untrained policy and what it says of every response."""
    home = tmp_path_factory.mktemp("home")
    assert cli.main(["world", "--out", f"{home}/w", "--queries", "40", "--no-policy", "--processes", "1"]) == 0
    packing = ["--ranked", f"{home}/w/ranked.jsonl", "--media", f"{home}/w/media", "--out", f"{home}/shards"]
    assert cli.main(["pack", *packing, "--val", "0.1", "--test", "0.1", "--processes", "1"]) == 0
    processor = build_processor(AutoTokenizer.from_pretrained(home / "w" / "tokenizer"))
    for seed, name in enumerate(("policy", "another")):
        model = build_model(processor.tokenizer, seed)
        model.config.text_config.attention_dropout = 0.1
        model.save_pretrained(home / name)
        processor.save_pretrained(home / name)
    score(home / "shards", home / "scores.jsonl", str(home / "policy"), workers=0)
    return home


def words(home, out, *more):
    """The command line of a training."""
    return [
        *("train-dpo", "--config", "configs/dpo/world.yaml", "--model.backbone.path", f"{home}/policy"),
        *("--data.shards", f"{home}/shards", "--data.scores", f"{home}/scores.jsonl", "--run.out", str(out)),
        *("--data.global_batch", str(BATCH), "--data.micro_batch", "2", "--trainer.max_steps", str(STEPS)),
        *("--run.save_every", "2", "--data.workers", "0", "--trainer.enable_progress_bar", "false"),
        *("--trainer.enable_model_summary", "false"),
        *("--run.tracking", "null", *more),
    ]


def train(home, out, *more):
    return cli.main(words(home, out, *more))


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    assert train(home, out, "--run.tracking", f"sqlite:///{out.parent}/mlflow.db") == 0
    return out


def test_the_saved_folder_is_loaded_by_plain_transformers_and_only_what_was_not_frozen_has_moved(home, trained):
    model = AutoModelForImageTextToText.from_pretrained(trained / "model", local_files_only=True)
    assert AutoProcessor.from_pretrained(trained / "model", local_files_only=True).chat_template
    before = AutoModelForImageTextToText.from_pretrained(home / "policy", local_files_only=True).state_dict()
    moved = {name: not torch.equal(value, before[name]) for name, value in model.state_dict().items()}
    assert not any(changed for name, changed in moved.items() if ".vision_tower." in name)
    assert all(changed for name, changed in moved.items() if "_proj.weight" in name and ".vision_tower." not in name)


def test_the_card_tells_data_margins_beta_seed_and_cost(trained):
    card = (trained / "model" / "README.md").read_text()
    for told in ("| margin | annotated |", "w=0.5, k=0.5", "| seed | 0 |", f"| steps | {STEPS} |", "device_seconds"):
        assert told in card
    queries = STEPS * BATCH
    assert f"| queries | {queries} |" in card


def test_mlflow_has_the_settings_the_metrics_and_the_figure(trained):
    mlflow.set_tracking_uri(f"sqlite:///{trained.parent}/mlflow.db")
    (row,) = mlflow.search_runs(search_all_experiments=True).to_dict("records")
    assert row["params.model.beta.init_args.w"] == "0.5"
    assert row["params.run.seed"] == "0"
    assert 0.1 <= row["metrics.train/beta/min"] <= row["metrics.train/beta/max"] <= 0.15
    assert row["metrics.ledger/queries"] == STEPS * BATCH
    assert row["metrics.val/pairs"] > 0
    assert row["run_id"] == json.loads((trained / "mlflow.json").read_text())["run"]
    kept = [item.path for item in mlflow.MlflowClient().list_artifacts(row["run_id"])]
    assert "config.yaml" in kept
    assert list((trained / "figures").glob("*.png"))


def test_a_finished_run_is_left_alone_and_another_in_its_folder_is_refused(home, trained, capsys):
    before = (trained / "model" / "model.safetensors").stat().st_mtime_ns
    tracked = ("--run.tracking", f"sqlite:///{trained.parent}/mlflow.db")
    assert train(home, trained, *tracked) == 0
    assert (trained / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert train(home, trained, "--model.beta.w", "0.25", *tracked) == 2
    assert "run.json" not in capsys.readouterr().out
    assert (trained / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_the_written_config_makes_the_same_run(home, trained, tmp_path):
    again = ["train-dpo", "--config", str(trained / "config.yaml"), "--run.out", str(tmp_path / "again")]
    assert cli.main([*again, "--run.tracking", "null"]) == 0
    assert equal(weights(trained), weights(tmp_path / "again"))


def test_a_training_killed_at_any_step_ends_with_the_same_weights(home, trained, tmp_path):
    out, kills = tmp_path / "killed", 0
    for step in (1, 4):
        dies = ["--trainer.callbacks", "tests.datamodules.training_script.Dies", "--trainer.callbacks.step", str(step)]
        command = [sys.executable, "-m", "mmrlhf", *words(home, out, "--run.save_every", "1", *dies)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        kills += subprocess.run(command, **quiet, check=False).returncode == -signal.SIGKILL
        assert not (out / "model").exists()
    assert kills == 2
    assert train(home, out, "--run.save_every", "1") == 0
    assert equal(weights(trained), weights(out))


def test_w_changes_the_weights_and_without_it_beta_is_plain(home, trained, tmp_path):
    fixed = ["--model.beta", "mmrlhf.modules.betas.FixedBeta"]
    assert train(home, tmp_path / "plain", *fixed) == 0
    assert train(home, tmp_path / "zero", "--model.beta.w", "0.0") == 0
    assert equal(weights(tmp_path / "plain"), weights(tmp_path / "zero"))
    assert not equal(weights(tmp_path / "plain"), weights(trained))


def test_the_shuffled_control_trains_on_margins_of_the_data(home, trained, tmp_path):
    assert train(home, tmp_path / "s", "--model.beta", "mmrlhf.modules.betas.ShuffledMarginBeta") == 0
    assert not equal(weights(tmp_path / "s"), weights(trained))


def test_adapters_are_saved_apart_and_merged(home, tmp_path):
    assert train(home, tmp_path / "lora", "--model.backbone.lora.rank", "4") == 0
    merged, before = weights(tmp_path / "lora"), load_file(home / "policy" / "model.safetensors")
    assert merged.keys() == before.keys()
    moved = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert moved
    assert all("language_model." in name and ".layers." in name and name.endswith("_proj.weight") for name in moved)
    kept = load_file(tmp_path / "lora" / "model" / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in kept)
    assert len(kept) == 2 * len(moved)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model.beta.ww", "0.5"), "ww"),
        (("--modell.margin", "rank"), "unknown option '--modell.margin'"),
        (("--model.margin", "reward"), "no reference_logp and reward for"),
        (("--data.micro_batch", "3"), "expected a multiple of micro_batch x ranks = 3 x 1, got 4"),
        (("--model.beta.k", "0"), "k: expected a number above 0"),
        (("--model.backbone.freeze.language", "true", "--model.backbone.freeze.projector", "true"), "left to train"),
        (("--model.backbone.path", "no/where/at/all"), "expected a folder or the name of a repository"),
        (("--trainer.max_steps", "-1", "--trainer.max_epochs", "0"), "a training that ends after one step or more"),
        (("--trainer.precision", "bf16-true"), "expected null, 32 or bf16-mixed, got bf16-true"),
        (("--model.backbone.dtype", "bfloat16"), "expected float32 for weights that are trained"),
        (("--trainer.max_time", "00:00:00:00"), "the same command continues"),
    ],
)
def test_what_cannot_be_is_refused_on_one_line(home, tmp_path, capsys, more, message):
    assert train(home, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mmrlhf train-dpo:")
    assert message in error


def test_a_run_is_as_long_as_its_limits_say_and_validates_at_its_end(home, tmp_path):
    limits = {
        "12 steps of epochs of 8": (("--trainer.max_steps", "12"), 12),
        "half an epoch": (("--trainer.max_steps", "-1", "--trainer.limit_train_batches", "8"), 4),
        "an epoch": (("--trainer.max_steps", "-1"), 8),
    }
    for name, (more, steps) in limits.items():
        assert train(home, tmp_path / name, *more) == 0
        assert f"| steps | {steps} |" in (tmp_path / name / "model" / "README.md").read_text()
        assert (tmp_path / name / "figures" / f"beta-{steps:08d}.png").exists()


def test_a_set_without_validation_queries_trains_to_its_end(home, tmp_path):
    rows = [row | {"split": "train"} for row in jsonl.read(home / "w" / "ranked.jsonl")]
    jsonl.write(tmp_path / "ranked.jsonl", rows)
    packing = ["--ranked", f"{tmp_path}/ranked.jsonl", "--media", f"{home}/w/media", "--out", f"{tmp_path}/shards"]
    assert cli.main(["pack", *packing, "--val", "0", "--test", "0", "--processes", "1"]) == 0
    score(tmp_path / "shards", tmp_path / "scores.jsonl", str(home / "policy"), workers=0)
    more = ("--data.shards", f"{tmp_path}/shards", "--data.scores", f"{tmp_path}/scores.jsonl")
    assert train(home, tmp_path / "out", *more) == 0
    assert (tmp_path / "out" / "model").exists()


def test_a_finished_run_is_not_taken_for_one_on_other_scores(home, trained, tmp_path, capsys):
    rows = [row | {"reference_logp": row["reference_logp"] - 1} for row in jsonl.read(home / "scores.jsonl")]
    jsonl.write(tmp_path / "scores.jsonl", rows)
    other = ("--data.scores", f"{tmp_path}/scores.jsonl", "--run.tracking", f"sqlite:///{trained.parent}/mlflow.db")
    assert train(home, trained, *other) == 2
    assert "expected the data that the run began with" in capsys.readouterr().err
    assert train(home, trained, "--trainer.precision", "bf16-mixed") == 2
    assert "precision" in capsys.readouterr().err


def test_the_schedule_of_beta0_ends_where_the_run_ends_and_is_validated_there(home, tmp_path):
    schedule = ("--beta_schedule.kind", "linear", "--beta_schedule.end", "0.4", "--model.beta.w", "0.0")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert train(home, tmp_path / "out", *schedule, "--run.tracking", uri, "--trainer.log_every_n_steps", "1") == 0
    mlflow.set_tracking_uri(uri)
    (row,) = mlflow.search_runs(search_all_experiments=True).to_dict("records")
    assert row["metrics.val/beta/mean"] == pytest.approx(0.4)
    run = json.loads((tmp_path / "out" / "mlflow.json").read_text())["run"]
    history = {each.step: each.value for each in mlflow.MlflowClient().get_metric_history(run, "beta/beta0")}
    assert min(history.values()) >= 0.1
    assert max(history.values()) < 0.4


def test_a_projector_that_is_cut_off_is_found_at_the_first_step_with_media(home, tmp_path, capsys, monkeypatch):
    encoded = Backbone.encoded
    monkeypatch.setattr(Backbone, "encoded", lambda *given: encoded(*given).detach())
    assert train(home, tmp_path / "out") == 2
    assert "expected a gradient that is not zero somewhere in the projector" in capsys.readouterr().err


def test_log_probs_of_another_reference_are_refused_unless_they_are_wanted(home, tmp_path, capsys):
    other = ("--model.backbone.path", f"{home}/another")
    assert train(home, tmp_path / "a", *other) == 2
    assert "got those of another" in capsys.readouterr().err
    assert train(home, tmp_path / "b", *other, "--run.any_reference", "true") == 0


def test_every_config_of_a_trainer_parses_and_says_the_papers_numbers():
    from mmrlhf.train import AlignCLI

    for name in ("llava_ov_7b", "llava_ov_0_5b", "qwen2_5_vl_7b", "internvl2_1b", "world"):
        made = AlignCLI(["--config", f"configs/dpo/{name}.yaml"])
        beta, freeze = made.model.beta, made.model.config.freeze
        assert (beta.beta0, beta.w, beta.k) == (0.1, 0.5, 0.5)
        assert (freeze.vision, freeze.projector, freeze.language) == (True, False, False)
        assert made.model.sft_weight == (0.0 if name == "internvl2_1b" else 0.25)
        assert made.datamodule.needs[0] == "reference_logp"
        written = yaml.safe_load(Path(f"configs/dpo/{name}.yaml").read_text())
        assert str(made.config_init["run"].out) == written["run"]["out"]


def test_known_margins_are_those_of_the_batches(home):
    from mmrlhf.datamodules.compared import pair_margins
    from mmrlhf.datamodules.module import RankedDataModule

    data = RankedDataModule(home / "shards", home / "policy", workers=0)
    found = list(pair_margins(data.rows("train"), "rank"))
    ranked = list(jsonl.read(home / "w" / "ranked.jsonl", RankedQuery.from_json))
    admitted = {data.rows("train")[number].row.ranked.query.id for number in range(len(data.rows("train")))}
    expected = [
        row.ranks[pair.loser] - row.ranks[pair.winner]
        for row in ranked
        if row.query.id in admitted
        for pair in row.pairs("all")
    ]
    assert sorted(found) == sorted(expected)
    annotated = list(pair_margins(data.rows("train"), "annotated"))
    assert len(annotated) == len(found)
    assert sum(annotated) / len(annotated) > 0.5


def dry(home, capsys, *more):
    """What a dry run tells, in one line."""
    assert train(home, home / "never", "--dry-run", *more) == 0
    assert not (home / "never").exists()
    return " ".join(capsys.readouterr().out.split())


def test_a_dry_run_needs_no_weights_and_tells_what_the_training_then_does(home, trained, capsys, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(home / "policy", bare, ignore=shutil.ignore_patterns("*.safetensors"))
    found = dry(home, capsys, "--model.backbone.path", str(bare), "--trainer.max_steps", str(STEPS))
    assert f"steps {STEPS} of 2 micro-batches per rank" in found
    before = AutoModelForImageTextToText.from_pretrained(home / "policy", local_files_only=True)
    frozen = sum(value.numel() for name, value in before.named_parameters() if "vision_tower" in name)
    every = sum(value.numel() for value in before.parameters())
    assert f"parameters {every:,}, of which {every - frozen:,} are trained" in found
    card = (trained / "model" / "README.md").read_text()
    spent = float(re.search(r"\| flops \| ([\d.e+]+)", card)[1])
    each = float(re.search(r"operations per step ([\d.e+]+)", found)[1])
    assert STEPS * each == pytest.approx(spent, rel=0.2)


def test_a_dry_run_plans_for_machines_that_are_not_here(home, capsys):
    sharded = ("--config", "configs/trainer/fsdp_multinode.yaml", "--trainer.devices", "2")
    found = dry(home, capsys, *sharded, "--data.micro_batch", "1")
    assert "ranks 4, sharded" in found
    assert "of 1 micro-batches per rank" in found
    assert "seconds per step" not in found
    slow, fast = (
        dry(home, capsys, *sharded, "--run.gpu", gpu, "--data.micro_batch", "1") for gpu in ("A100-80", "H100")
    )
    slow, fast = (float(re.search(r"seconds per step ([\d.e-]+) on paper", each)[1]) for each in (slow, fast))
    assert fast < slow


SHARDED = ("--config", "configs/trainer/fsdp.yaml", "--trainer.devices", "2")


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        (("--trainer.devices", "3"), "expected a multiple of micro_batch x ranks = 2 x 3, got 4"),
        (
            ("--config", "configs/trainer/fsdp_multinode.yaml", "--trainer.devices", "1", "--trainer.num_nodes", "3"),
            "3",
        ),
        (("--run.device_memory", "0.01"), "memory: expected at most 9.4 MiB per device, this needs about"),
        (("--run.device_memory", "0"), "run.device_memory: expected more than 0 GiB, got 0"),
        (
            ("--model.step", "separate", "--model.rows_at_once", "4", *SHARDED),
            "rows_at_once: expected null with sharded",
        ),
        (("--trainer.strategy", "fsdp"), "expected auto, ddp or mmrlhf.callbacks.sharding.Sharded"),
    ],
)
def test_a_dry_run_refuses_what_cannot_work(home, capsys, more, refused):
    assert train(home, home / "never", "--dry-run", *more) == 2
    assert refused in capsys.readouterr().err
    assert not (home / "never").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_training_on_a_gpu_that_is_not_there_is_refused_before_anything_is_read(home, capsys):
    cache = ("--data.cache", f"{home}/fresh-cache")
    assert train(home, home / "never", *cache, "--config", "configs/trainer/gpu.yaml") == 2
    assert "trainer.accelerator: expected a GPU" in capsys.readouterr().err
    assert not (home / "fresh-cache").exists()
    assert not (home / "never").exists()


def test_options_that_lightning_refuses_are_told_in_a_line(home, capsys, tmp_path):
    assert train(home, tmp_path / "out", "--trainer.devices", "0") == 2
    assert "mmrlhf train-dpo: trainer: `Trainer(devices='0')` value is not a valid input" in capsys.readouterr().err
