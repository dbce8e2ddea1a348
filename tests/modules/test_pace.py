"""The time of a step against arithmetic by hand, and at its limits."""

from __future__ import annotations

import dataclasses

import pytest

from mmrlhf.modules.backbone import backbone_of
from mmrlhf.modules.memory import estimate
from mmrlhf.modules.pace import A100_80, H100, H200, MACHINES, Assumed, Feed, Machine, Query, pace, strains
from mmrlhf.ranks import Layout

from .test_memory import BATCHES, body

QUERY = Query((300, (60, 60, 60, 60)), supervised=240, patches=0)
ASSUMED = Assumed(utilisation=0.5, links=0.5, hidden=1.0, hop_inside=0.0, hop_between=0.0)
PLAIN = Machine("plain", peak_flops=1e12, memory=2**30, inside_bandwidth=8e9, between_bandwidth=1e9, gpus_per_node=4)


def told(layout, batches=BATCHES, machine=PLAIN, assumed=ASSUMED, query=QUERY):
    return pace(backbone(), layout, batches, query, machine, assumed)


def backbone():
    return backbone_of(body()[0])


def learned(model):
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def test_arithmetic_takes_its_operations_over_the_part_of_the_peak():
    # 6 layers of 8 heads of 16, 2 of keys; matrices of queries and outputs, of keys and values, of the network.
    per_token = 2 * 6 * (2 * 128 * 128 + 2 * 128 * 32 + 3 * 128 * 680)
    looks = 300 * 301 // 2 + 4 * (60 * 300 + 60 * 61 // 2)
    of_layers = 3 * (540 * per_token + 4 * 128 * 6 * looks)
    of_logits = 3 * 240 * 2 * 128 * 500
    found = told(Layout())
    assert found.decoder == pytest.approx(16 * of_layers / 0.5e12)
    assert found.logits == pytest.approx(16 * of_logits / 0.5e12)
    assert found.tower == found.network == 0
    assert found.seconds == found.arithmetic
    assert found.bound == "decoder"
    assert found.utilisation(PLAIN, 1) == pytest.approx(0.5)


def test_a_frozen_tower_costs_its_forward_alone_and_recomputation_a_forward_more():
    frozen = told(Layout(), query=QUERY._replace(patches=100))
    tower = 2 * (2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 3 * 49 + 16 * 32)  # layers, patches, and their places
    assert frozen.tower == pytest.approx(16 * 100 * tower / 0.5e12)
    again = told(Layout(), dataclasses.replace(BATCHES, again=True))
    assert again.decoder == pytest.approx(4 / 3 * told(Layout()).decoder)
    assert again.logits == told(Layout()).logits


def test_copies_send_their_gradients_twice_once_a_step():
    count = learned(backbone())
    within = told(Layout(4, "ddp"))
    assert within.copying == pytest.approx(2 * 3 / 4 * 4 * count / (0.5 * 8e9))
    across = told(Layout(8, "ddp"), dataclasses.replace(BATCHES, global_batch=32))
    slower = max(7 / 8 * 4 * count / 8e9, 1 / 2 * 4 * count / (4 * 1e9))
    assert across.copying == pytest.approx(2 * slower / 0.5)
    assert (within.gathering, within.scattering) == (0, 0)
    assert told(Layout(1, "ddp")).network == 0


def test_shards_are_gathered_twice_and_gradients_scattered_in_float32_for_every_micro_batch():
    model = backbone()
    of_layers = sum(weight.numel() for layer in model.layers(model.decoder) for weight in layer.parameters())
    every = sum(weight.numel() for weight in model.parameters())
    found = told(Layout(4, "sharded", mixed=True))
    # The frozen tower is not gathered again, and neither is what is in no layer.
    assert found.gathering == pytest.approx(4 * 2 * (every + of_layers) * 3 / 4 / (0.5 * 8e9))
    assert found.scattering == pytest.approx(4 * 4 * learned(model) * 3 / 4 / (0.5 * 8e9))
    assert found.copying == 0
    fine = told(Layout(4, "sharded"))
    assert fine.gathering == pytest.approx(2 * found.gathering)
    assert fine.scattering == found.scattering


def test_replicas_send_only_sums_of_shards_between_nodes():
    batches = dataclasses.replace(BATCHES, global_batch=8)
    found = told(Layout(8, "sharded", replicas=2, mixed=True), batches)
    assert found.copying == pytest.approx(2 * 1 / 2 * 4 * learned(backbone()) / 4 / (0.5 * 1e9))
    alone = told(Layout(4, "sharded", mixed=True), dataclasses.replace(BATCHES, global_batch=4))
    assert found.gathering == pytest.approx(alone.gathering)
    over_all = told(Layout(8, "sharded", mixed=True), batches)
    assert over_all.gathering > found.gathering


def test_without_a_network_to_wait_for_arithmetic_is_all():
    endless = dataclasses.replace(PLAIN, inside_bandwidth=1e30, between_bandwidth=1e30)
    found = told(Layout(16, "sharded"), machine=endless)
    assert found.seconds == pytest.approx(found.arithmetic, rel=1e-9)
    busy = told(Layout(16, "sharded"), machine=dataclasses.replace(PLAIN, between_bandwidth=1e3))
    assert busy.seconds == pytest.approx(busy.network, rel=1e-3)
    assert busy.bound in ("gathering", "scattering")


def test_what_does_not_hide_adds_up():
    both, half = (told(Layout(4, "ddp"), assumed=dataclasses.replace(ASSUMED, hidden=part)) for part in (0.0, 0.5))
    assert both.seconds == pytest.approx(both.arithmetic + both.network)
    assert half.seconds == pytest.approx(max(half.arithmetic, half.network) + min(half.arithmetic, half.network) / 2)


def test_with_endlessly_many_ranks_the_delay_of_hops_is_what_grows():
    delays = dataclasses.replace(ASSUMED, hop_inside=1e-6, hop_between=1e-5)
    times = []
    for ranks in (512, 1024, 2048):
        batches = dataclasses.replace(BATCHES, global_batch=ranks)
        slow, without = (told(Layout(ranks, "sharded"), batches, assumed=each) for each in (delays, ASSUMED))
        times.append(slow.network - without.network)
        assert slow.arithmetic == pytest.approx(told(Layout(), batches).arithmetic / ranks)
    assert times[1] == pytest.approx(2 * times[0], rel=0.01)
    assert times[2] == pytest.approx(4 * times[0], rel=0.01)


def test_queries_per_second_do_not_depend_on_how_a_step_is_divided_while_arithmetic_is_all():
    endless = dataclasses.replace(PLAIN, inside_bandwidth=1e30, between_bandwidth=1e30)
    one, four = (told(Layout(ranks, "ddp"), machine=endless) for ranks in (1, 4))
    assert four.queries_per_second == pytest.approx(4 * one.queries_per_second)


def test_what_is_not_modelled_and_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="offload, whose transfers to the host are not modelled"):
        told(Layout(2, "sharded", offload=True))
    with pytest.raises(ValueError, match="a multiple of micro_batch x ranks = 1 x 32, got 16"):
        told(Layout(32, "ddp"))


def test_what_breaks_first_has_the_highest_strain():
    model, batches = backbone(), dataclasses.replace(BATCHES, global_batch=8)
    layout = Layout(8, "ddp")
    found, speed = estimate(model, layout, batches), pace(model, layout, batches, QUERY, PLAIN, ASSUMED)
    feed = Feed(cores=2, queries_per_core=10.0, bytes_per_query=1e6, disk=1e9)
    used = strains(found, speed, PLAIN, feed)
    per_node = speed.queries_per_second / 2
    assert used["memory"] == pytest.approx(found.device / (0.92 * 2**30))
    assert used["network"] == pytest.approx(speed.network / speed.arithmetic)
    assert used["global batch"] == 1.0
    assert used["processors"] == pytest.approx(per_node / 20)
    assert used["disk"] == pytest.approx(per_node / 1000)
    small = strains(found, speed, dataclasses.replace(PLAIN, memory=1), feed)
    assert max(small, key=small.get) == "memory"


@pytest.mark.parametrize(
    ("machine", "teraflops", "nvlink", "card", "memory"),
    [(A100_80, 312, 600, 200, 80), (H100, 989, 900, 400, 80), (H200, 989, 900, 400, 141)],
)
def test_machines_are_what_their_makers_say(machine, teraflops, nvlink, card, memory):
    # Data sheets of the SXM modules: dense bf16 TFLOPS, NVLink in GB/s of both directions, memory in GB, which are
    # GiB; of DGX machines the network card in Gbit/s per GPU and direction.
    assert machine.peak_flops == teraflops * 1e12
    assert 2 * machine.inside_bandwidth == nvlink * 1e9
    assert 8 * machine.between_bandwidth == card * 1e9
    assert 0.98 < machine.memory / (memory * 2**30) < 1, "torch sees a little less than there is"


def test_machines_are_known_by_their_names():
    assert MACHINES == {"A100-80": A100_80, "H100": H100, "H200": H200}


def test_a_tower_whose_states_are_kept_takes_no_time_and_is_not_gathered():
    model, query = backbone(), QUERY._replace(patches=100)
    layout = Layout(4, "sharded", mixed=True)
    live = pace(model, layout, BATCHES, query, PLAIN, ASSUMED)
    model.tower_kept = True
    kept = pace(model, layout, BATCHES, query, PLAIN, ASSUMED)
    of_layers = sum(weight.numel() for layer in model.layers(model.tower) for weight in layer.parameters())
    assert live.tower > kept.tower == 0
    assert live.gathering - kept.gathering == pytest.approx(4 * 2 * of_layers * 3 / 4 / (0.5 * 8e9))
    assert (kept.decoder, kept.scattering) == pytest.approx((live.decoder, live.scattering))
