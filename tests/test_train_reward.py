"""`mmrlhf train-reward`: a config becomes a reward model that scores as in training; killed, the run continues."""

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from matplotlib.image import imread
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mmrlhf import cli, jsonl, train
from mmrlhf.datamodules.module import RankedDataModule
from mmrlhf.modules.reward import RewardHead
from mmrlhf.modules.rewardmodel import RewardModel
from mmrlhf.prompts import load_template
from mmrlhf.records import DIMENSIONS, RankedQuery
from mmrlhf.world.policy import build_model, build_processor

from .test_train import equal, weights
from .threads import one_thread  # noqa: F401 - of itself, for the whole module

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
STEPS, BATCH = 4, 4


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A world of forty queries with its shards, and an untrained policy."""
    home = tmp_path_factory.mktemp("home")
    assert cli.main(["world", "--out", f"{home}/w", "--queries", "40", "--no-policy", "--processes", "1"]) == 0
    packed(home, home / "w" / "ranked.jsonl", home / "shards")
    processor = build_processor(AutoTokenizer.from_pretrained(home / "w" / "tokenizer"))
    model = build_model(processor.tokenizer, 0)
    model.config.text_config.attention_dropout = 0.1
    model.save_pretrained(home / "policy")
    processor.save_pretrained(home / "policy")
    return home


def packed(home, ranked, out):
    packing = ["--ranked", str(ranked), "--media", f"{home}/w/media", "--out", str(out)]
    assert cli.main(["pack", *packing, "--val", "0.1", "--test", "0.1", "--processes", "1"]) == 0


def words(home, out, *more):
    """The command line of a training."""
    return [
        *("train-reward", "--config", "configs/reward/world.yaml", "--model.backbone.path", f"{home}/policy"),
        *("--data.shards", f"{home}/shards", "--run.out", str(out), "--run.tracking", "null"),
        *("--data.global_batch", str(BATCH), "--data.micro_batch", "2", "--trainer.max_steps", str(STEPS)),
        *("--run.save_every", "2", "--data.workers", "0", "--trainer.enable_progress_bar", "false"),
        *("--trainer.enable_model_summary", "false", *more),
    ]


def trains(home, out, *more):
    return cli.main(words(home, out, *more))


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    """A finished run, and what its module said of the validation queries when the training had ended."""
    out, held = tmp_path_factory.mktemp("runs") / "first", {}

    def saved(reader, *more):
        data = RankedDataModule(home / "shards", home / "policy", task="critiques", critique="critique", workers=0)
        for batch in data.val_dataloader():
            with torch.inference_mode():
                held[batch.ids[0]] = reader.eval()(batch.rows)
        save(reader, *more)

    def expected(module, plan):
        held["plan"] = plan
        expect(module, plan)

    save, expect = train.save_reward_model, train.CritiqueRewardModule.expect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_reward_model", saved)
        patch.setattr(train.CritiqueRewardModule, "expect", expected)
        assert trains(home, out, "--run.tracking", f"sqlite:///{out.parent}/mlflow.db") == 0
    return out, held


def ranked_queries(home):
    return {row.query.id: row for row in jsonl.read(home / "w" / "ranked.jsonl", RankedQuery.from_json)}


def test_the_saved_model_gives_the_rewards_that_the_module_gave(home, trained):
    out, held = trained
    model, every = RewardModel.from_pretrained(out / "model"), ranked_queries(home)
    named = held.keys() - {"plan"}
    assert len(named) >= 2
    for name in named:
        ranked = every[name]
        texts, critiques = zip(*((said.text, said.critique) for said in ranked.responses), strict=True)
        assert all(critiques)
        found = model.score_given(ranked.query, texts, critiques, home / "w" / "media")
        torch.testing.assert_close(found, held[name].rewards, rtol=1e-4, atol=1e-4)
        none = model.score_given(ranked.query, texts, media=home / "w" / "media")
        assert (none - found).abs().max() > 1e-3, "what is said does not matter"


def test_the_saved_folder_tells_how_it_is_asked_and_plain_transformers_loads_its_body(home, trained):
    out, _ = trained
    model = RewardModel.from_pretrained(out / "model")
    assert model.judging.template == load_template("critique")
    assert (
        model.judging.frames
        == RankedDataModule(home / "shards", home / "policy", task="critiques").rows("train").encode.frames
    )
    assert model.judging.dimensions == ()
    body = AutoModelForImageTextToText.from_pretrained(out / "model", local_files_only=True).state_dict()
    before = AutoModelForImageTextToText.from_pretrained(home / "policy", local_files_only=True).state_dict()
    moved = {name for name, value in body.items() if not torch.equal(value, before[name])}
    assert moved
    assert not any(".vision_tower." in name for name in moved)
    card = (out / "model" / "README.md").read_text()
    for told in ("writes critiques", "| critiques | critique |", "centre=0.01", f"| steps | {STEPS} |", "| seed | 0 |"):
        assert told in card
    assert f"| queries | {STEPS * BATCH} |" in card


def test_the_plan_tells_means_over_what_is_trained_on(home, trained):
    plan = trained[1]["plan"]
    data = RankedDataModule(home / "shards", home / "policy", task="critiques", critique="critique", workers=0)
    rows = data.rows("train")
    ranked = [rows[number].row.ranked for number in range(len(rows))]
    said = [response for each in ranked for response in each.responses]
    assert plan.steps == STEPS
    assert plan.mean_pairs == pytest.approx(sum(len(each.pairs("all")) for each in ranked) / len(ranked))
    assert plan.mean_ties == pytest.approx(sum(len(each.ties()) for each in ranked) / len(ranked))
    assert plan.mean_critiques == pytest.approx(sum(bool(each.critique) for each in said) / len(ranked))
    assert plan.mean_ties > 0
    for name in DIMENSIONS:
        counted = sum(each.scores.get(name) is not None for each in said)
        assert data.mean_scores[name] == pytest.approx(counted / len(ranked))
        assert data.mean_scores[name] > 0
    loader = iter(data.train_dataloader())
    batch = next(loader)
    own = [response for name in batch.ids for response in ranked_queries(home)[name].responses]
    wanted = [[float(math.nan if (x := each.scores.get(n)) is None else x) for n in DIMENSIONS] for each in own]
    torch.testing.assert_close(batch.scores, torch.tensor(wanted), equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(batch.scores.nanmean(1), batch.annotated, equal_nan=True)


def test_the_heads_of_dimensions_are_planned_by_their_own_scores_and_saved(home, tmp_path, monkeypatch):
    plans, expect = [], train.CritiqueRewardModule.expect
    monkeypatch.setattr(
        train.CritiqueRewardModule, "expect", lambda module, plan: plans.append(plan) or expect(module, plan)
    )
    wanted = ["ethics", "helpfulness"]
    assert trains(home, tmp_path / "out", "--model.dimensions", json.dumps(wanted)) == 0
    model = RewardModel.from_pretrained(tmp_path / "out" / "model")
    assert list(model.judging.dimensions) == wanted
    ranked = next(iter(ranked_queries(home).values()))
    scored = model.score(ranked.query, [said.text for said in ranked.responses], media=home / "w" / "media")
    assert list(scored[0].dimensions) == wanted
    data = RankedDataModule(home / "shards", home / "policy", task="critiques", workers=0)
    assert [plan.mean_scores for plan in plans] == [sum(data.mean_scores[name] for name in wanted)]


def test_mlflow_has_the_settings_the_metrics_and_the_figure(trained):
    out, _ = trained
    mlflow.set_tracking_uri(f"sqlite:///{out.parent}/mlflow.db")
    (row,) = mlflow.search_runs(search_all_experiments=True).to_dict("records")
    assert row["params.data.critique"] == "critique"
    assert row["metrics.ledger/queries"] == STEPS * BATCH
    for name in ("accuracy", "accuracy_plus", "margin/std", "loss/ranking", "loss/tie", "critique/perplexity"):
        assert row[f"metrics.train/{name}"] >= 0
        assert row[f"metrics.val/{name}"] >= 0
    assert row["metrics.train/critique/perplexity"] == pytest.approx(math.exp(row["metrics.train/critique/nll"]))
    assert row["run_id"] == json.loads((out / "mlflow.json").read_text())["run"]
    assert imread(out / "figures" / f"reward-{STEPS:08d}.png")[..., :3].std() > 0.05


def test_a_finished_run_is_left_alone_and_another_in_its_folder_is_refused(home, trained, capsys):
    out, _ = trained
    tracked = ("--run.tracking", f"sqlite:///{out.parent}/mlflow.db")
    before = (out / "model" / "model.safetensors").stat().st_mtime_ns
    assert trains(home, out, *tracked) == 0
    for other in (("--data.critique", "reason"), ("--model.weights.tie", "2.0"), ("--run.seed", "1")):
        assert trains(home, out, *other, *tracked) == 2
        assert "holds a training with" in capsys.readouterr().err
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_the_written_config_makes_the_same_run(trained, tmp_path):
    out, _ = trained
    again = ["train-reward", "--config", str(out / "config.yaml"), "--run.out", str(tmp_path / "again")]
    assert cli.main([*again, "--run.tracking", "null"]) == 0
    assert equal(weights(out), weights(tmp_path / "again"))


def test_a_training_killed_at_a_step_goes_on_and_ends_with_the_same_weights(home, trained, tmp_path, monkeypatch):
    out = tmp_path / "killed"
    dies = ["--trainer.callbacks", "tests.datamodules.training_script.Dies", "--trainer.callbacks.step", "3"]
    command = [sys.executable, "-m", "mmrlhf", *words(home, out, *dies)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    assert subprocess.run(command, **quiet, check=False).returncode == -signal.SIGKILL
    assert (out / "checkpoints" / "step-00000002").exists()
    assert not (out / "model").exists()
    done, step = [], train.CritiqueRewardModule.training_step
    monkeypatch.setattr(
        train.CritiqueRewardModule, "training_step", lambda *given: done.append(given[2]) or step(*given)
    )
    assert trains(home, out) == 0
    assert len(done) == 2 * (STEPS - 2), "a checkpoint of step 2 leaves so many micro-batches"
    assert equal(weights(trained[0]), weights(out))


def test_each_source_of_critiques_makes_another_model_and_without_any_none_is_learned(home, trained, tmp_path):
    found = {"critique": weights(trained[0])}
    for source in ("reason", "none"):
        uri = f"sqlite:///{tmp_path}/{source}.db"
        assert trains(home, tmp_path / source, "--data.critique", source, "--run.tracking", uri) == 0
        found[source] = weights(tmp_path / source)
        mlflow.set_tracking_uri(uri)
        (row,) = mlflow.search_runs(search_all_experiments=True).to_dict("records")
        assert ("metrics.train/critique/nll" in row) == (source == "reason")
        assert row["metrics.train/loss/ranking"] > 0
    for one, other in (("critique", "reason"), ("critique", "none"), ("reason", "none")):
        assert not equal(found[one], found[other])


def test_adapters_are_merged_and_the_head_is_trained_beside_them(home, trained, tmp_path):
    assert trains(home, tmp_path / "lora", "--model.backbone.lora.rank", "4") == 0
    merged = weights(tmp_path / "lora")
    assert merged.keys() == weights(trained[0]).keys()
    moved = {
        name
        for name, value in load_file(home / "policy" / "model.safetensors").items()
        if (merged[name] != value).any()
    }
    assert moved
    assert all("language_model." in name and name.endswith("_proj.weight") for name in moved)
    head = RewardModel.from_pretrained(tmp_path / "lora" / "model").reader.head
    assert not torch.equal(head.dense.weight, RewardHead(head.width).dense.weight)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model.weights.tie", "-1"), "weights: expected numbers of 0 or more"),
        (("--model.wheights.tie", "1"), "unknown option '--model.wheights.tie'"),
        (("--model.dimensions", '["truth"]'), "dimensions: expected some of helpfulness, faithfulness, ethics"),
        (("--data.task", "answers"), "data.task"),
        (("--data.needs", "[reward]"), "data.needs"),
        (("--data.scores", "scores.jsonl"), "data.scores: expected none"),
        (("--data.critique", "enhanced"), "enhanced"),
        (("--data.micro_batch", "3"), "expected a multiple of micro_batch x ranks = 3 x 1, got 4"),
        (("--trainer.precision", "bf16-true"), "expected null, 32 or bf16-mixed, got bf16-true"),
        (("--model.backbone.dtype", "bfloat16"), "expected float32 for weights that are trained"),
        (("--model.backbone.path", "no/where/at/all"), "expected a folder or the name of a repository"),
        (("--trainer.max_time", "00:00:00:00"), "the same command continues"),
    ],
)
def test_what_cannot_be_is_refused_on_one_line(home, tmp_path, capsys, more, message):
    assert trains(home, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mmrlhf train-reward:")
    assert message in error


def test_what_is_to_be_learned_and_not_in_the_data_is_refused(home, tmp_path, capsys):
    rows = list(jsonl.read(home / "w" / "ranked.jsonl"))
    for row in rows:
        for said in row["responses"]:
            said.pop("critique", None)
            said.pop("ethics", None)
    jsonl.write(tmp_path / "ranked.jsonl", rows)
    packed(home, tmp_path / "ranked.jsonl", tmp_path / "shards")
    bare = ("--data.shards", f"{tmp_path}/shards")
    assert trains(home, tmp_path / "a", *bare) == 2
    assert "data.critique: expected critiques in the training data (critique), got none" in capsys.readouterr().err
    asked = ("--data.critique", "reason", "--model.dimensions", '["helpfulness", "ethics"]')
    assert trains(home, tmp_path / "b", *bare, *asked) == 2
    assert "model.dimensions: expected annotated scores of ethics in the training data" in capsys.readouterr().err
    assert trains(home, tmp_path / "b", *bare, *asked, "--dry-run") == 2
    assert "model.dimensions: expected annotated scores of ethics in the training data" in capsys.readouterr().err
    assert trains(home, tmp_path / "c", *bare, "--data.critique", "none") == 0


def test_a_dry_run_of_folds_is_one_of_the_first_without_its_queries(home, tmp_path, capsys):
    folds = ("--folds", "4", "--trainer.max_steps", "-1", "--trainer.max_epochs", "1")
    assert trains(home, tmp_path / "out", *folds, "--dry-run=true") == 0
    found = " ".join(capsys.readouterr().out.split())
    queries = int(re.search(r"train-reward, (\d+) queries, the first of 4 trainings", found)[1])
    assert 20 < queries < 28, "about three quarters of 32"
    assert f"steps {queries // BATCH} of" in found
    assert trains(home, tmp_path / "out", "--folds", "0", "--dry-run") == 2
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_not_taken_for_one_on_other_data(home, trained, tmp_path, capsys):
    rows = list(jsonl.read(home / "w" / "ranked.jsonl"))
    rows[0]["responses"][0]["critique"] += " Indeed."
    jsonl.write(tmp_path / "ranked.jsonl", rows)
    packed(home, tmp_path / "ranked.jsonl", tmp_path / "shards")
    assert trains(home, trained[0], "--data.shards", f"{tmp_path}/shards") == 2
    assert "expected the data that the run began with" in capsys.readouterr().err


def test_every_config_parses_and_says_the_papers_numbers():
    for name in ("llava_ov_7b", "qwen2_5_vl_7b", "world"):
        made = train.RewardCLI(["--config", f"configs/reward/{name}.yaml"])
        module, freeze = made.model, made.model.config.freeze
        assert (module.weights.critique, module.weights.rewards, module.weights.centre) == (1.0, 1.0, 0.01)
        assert (freeze.vision, freeze.projector, freeze.language) == (True, False, False)
        assert (made.datamodule.terms.ties_suffice, made.datamodule.needs) == (True, ())
        assert made.config_init["trainer"]["max_epochs"] in ((4,) if name == "world" else (None, 1))
        assert module.optimiser.warmup == 0.1
        if name != "world":
            assert (module.optimiser.learning_rate, module.optimiser.weight_decay) == (1e-6, 0.0)
            assert made.datamodule.terms.max_tokens == 32768
        written = yaml.safe_load(Path(f"configs/reward/{name}.yaml").read_text())
        assert str(made.config_init["run"].out) == written["run"]["out"]
        assert written["data"]["critique"] == "critique"
