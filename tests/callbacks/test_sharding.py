"""How ranks are arranged and what is asked of torch; what comes of it on ranks is in tests/parallel."""

from __future__ import annotations

from datetime import timedelta

import lightning
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch.distributed.fsdp import CPUOffloadPolicy

from mmrlhf.callbacks import gradients, sharding
from mmrlhf.callbacks.sharding import Shardable, Sharded
from mmrlhf.modules.critic import CritiqueRewardModule
from mmrlhf.modules.loading import BackboneConfig
from mmrlhf.modules.mmdpo import MMDPOModule

from ..modules.families import saved


@pytest.fixture
def asked(monkeypatch):
    """What `fully_shard` is called with."""
    calls = []
    monkeypatch.setattr(sharding, "fully_shard", lambda module, **options: calls.append((module, options)))
    return calls


def arranged(precision, **options):
    strategy = Sharded(**options)
    strategy.precision_plugin = precision
    return strategy


def shard(strategy, **options):
    part = torch.nn.Linear(2, 2)
    strategy._shard("mesh", strategy._precision, part, **options)
    return part


def test_mixed_precision_multiplies_in_bfloat16_and_sums_in_float32(asked):
    part = shard(arranged(MixedPrecision("bf16-mixed", "cpu")))
    ((module, options),) = asked
    assert module is part
    assert options["mesh"] == "mesh"
    assert "offload_policy" not in options
    policy = options["mp_policy"]
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert not policy.cast_forward_inputs
    assert policy.output_dtype is None


def test_a_fine_part_is_computed_with_what_is_kept(asked):
    shard(arranged(MixedPrecision("bf16-mixed", "cpu")), fine=True)
    assert asked[0][1]["mp_policy"].param_dtype is None


def test_full_precision_rounds_nothing(asked):
    shard(arranged(Precision()))
    assert asked[0][1]["mp_policy"].param_dtype is None


def test_offloading_leaves_weights_where_they_are_and_moves_buffers(asked):
    strategy = arranged(Precision(), cpu_offload=True)
    shard(strategy_on(strategy, 1))
    assert isinstance(asked[0][1]["offload_policy"], CPUOffloadPolicy)
    assert not asked[0][1]["offload_policy"].pin_memory
    moved = torch.nn.BatchNorm1d(2)
    strategy.model, strategy.parallel_devices = moved, [torch.device("meta")]
    strategy.cluster_environment = LightningEnvironment()
    strategy.model_to_device()
    assert {buffer.device.type for buffer in moved.buffers()} == {"meta"}
    assert {weight.device.type for weight in moved.parameters()} == {"cpu"}


def strategy_on(strategy, ranks, nodes=1):
    strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")] * ranks, nodes
    strategy.cluster_environment = LightningEnvironment()
    return strategy


@pytest.mark.parametrize(("replicas", "ranks", "nodes"), [(2, 3, 1), (3, 4, 1), (4, 2, 1), (5, 8, 4)])
def test_replicas_divide_the_ranks_of_all_nodes(replicas, ranks, nodes):
    with pytest.raises(ValueError, match=f"a divisor of {ranks * nodes} ranks, got {replicas}"):
        strategy_on(Sharded(replicas=replicas), ranks, nodes).setup_environment()


@pytest.mark.parametrize("options", [{"replicas": 0}, {"minutes": 0.0}])
def test_what_is_no_arrangement_is_refused(options):
    with pytest.raises(ValueError, match="replicas of 1 or more and minutes above 0"):
        Sharded(**options)


def test_options_reach_lightning():
    strategy = Sharded(whole_checkpoint=True, minutes=1.5)
    assert strategy._timeout == timedelta(seconds=90)
    assert not strategy._save_distributed_checkpoint
    assert Sharded()._save_distributed_checkpoint


@pytest.mark.parametrize("kind", [MMDPOModule, CritiqueRewardModule])
def test_modules_can_be_told_how_they_are_sharded(kind):
    assert isinstance(kind(BackboneConfig("nowhere")), Shardable)
    assert not isinstance(lightning.LightningModule(), Shardable)


def test_layers_are_filled_and_sharded_one_by_one_and_then_the_rest(tmp_path):
    module, told = CritiqueRewardModule(BackboneConfig(str(saved("llava_next", tmp_path / "llava_next")))), []

    def shard(part, fine=False):
        told.append((part, fine))
        assert not any(weight.is_meta for weight in part.parameters())
        if len(told) == 1:  # the others are not there yet
            assert module.reader is None
            assert all(weight.is_meta for weight in backbones[0].decoder.layers[-1].parameters())

    backbones, over = [], module._over
    module._over = lambda body: backbones.append(body) or over(body)
    module.shard = shard
    module.configure_model()
    body = module.reader.backbone
    tower, decoder = body.layers(body.tower), body.layers(body.decoder)
    expected = [*((layer, False) for layer in [*tower[:-1], *decoder]), (module.reader.head, True)]
    assert told == [*expected, (module.reader, False)]
    assert body.apart == tuple(tower[:-1])  # of the last, this family reads nothing


def test_rows_that_are_computed_in_turn_are_refused_with_shards(tmp_path):
    module = MMDPOModule(BackboneConfig(str(saved("gemma3", tmp_path / "gemma3"))), rows_at_once=2)
    module.shard = lambda module, fine=False: None
    with pytest.raises(ValueError, match="rows_at_once: expected null with sharded weights, got 2"):
        module.configure_model()


class Parts:
    """A module whose projector has weights with these gradients."""

    def __init__(self, *found):
        self.weights = [torch.nn.Parameter(torch.ones(len(values))) for values in found]
        for weight, values in zip(self.weights, found, strict=True):
            weight.grad = torch.tensor(values)

    def parts(self):
        """As a module tells them."""
        return {"projector": self.weights}


def test_a_rank_without_any_row_of_a_part_does_not_ask_for_its_gradient():
    gradients._require_learning(Parts([], []))
    gradients._require_learning(Parts([], [0.0, 1.0]))
    with pytest.raises(ValueError, match="not zero somewhere in the projector"):
        gradients._require_learning(Parts([], [0.0, 0.0]))
