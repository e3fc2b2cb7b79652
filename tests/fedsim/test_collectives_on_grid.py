"""Collectives on the grid: times of the what-if studies, barriers, failures, wrong input."""

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from hypothesis import example, given, settings
from hypothesis import strategies as st

import topologies as tp
from fedsim.errors import PayloadError
from fedsim.flower.session import start
from fedsim.recorder import Recorder
from fedsim.whatif import time_schedule
from tests.fedsim.collective_worlds import (
    ALPHA,
    RATE,
    SIZE,
    asks,
    collective_world,
    expected,
    finished,
    pull_all,
    run,
)
from tests.plain_grid import flower_identity
from topologies.placement import COLLECTIVES

GRAPHS = [
    tp.bcube(3, 2, bandwidth=RATE),
    tp.bcube(2, 3, bandwidth=RATE),
    tp.fat_tree(4, bandwidth=RATE),
    tp.fat_tree(4, devices=9, oversubscription=4, bandwidth=RATE),
    tp.torus((3, 3), bandwidth=RATE),
    tp.star(9, bandwidth=RATE),
]


@pytest.fixture(autouse=True)
def _identity():
    with flower_identity(0):
        yield


@pytest.mark.parametrize(
    ("graph", "barrier"),
    [*((graph, "global") for graph in GRAPHS), *((graph, "local") for graph in GRAPHS[1::3])],
    ids=str,
)
def test_times_are_those_of_whatif(graph, barrier):
    for name in COLLECTIVES:
        try:
            seconds = expected(graph, name, engine="fluid", barrier=barrier)
        except ValueError:
            continue
        world = collective_world(graph)
        replies, (report,) = run(world, collective=name, step_latency=ALPHA, barrier=barrier)
        assert report.sync == pytest.approx(seconds, rel=1e-9), name
        assert world.grid.now == pytest.approx(1 + seconds, rel=1e-9)
        assert (report.compute, report.exposed) == (1.0, pytest.approx(seconds, rel=1e-9))
        assert len(replies) == len(world.grid.fleet)


@settings(max_examples=20)
@example(5, 7, "halving_doubling", "local")  # the last rank to end has no part in the last step
@given(
    st.integers(2, 6),
    st.integers(0, 100),
    st.sampled_from(["ring", "ps_colocated", "halving_doubling", "binomial_tree"]),
    st.sampled_from(["global", "local"]),
)
def test_times_are_those_of_whatif_with_unequal_links_and_devices(devices, seed, name, barrier):
    graph = tp.random_geometric(devices, 0.8, connected=True, seed=seed, bandwidth=RATE)
    rng = np.random.default_rng(seed)
    for _, _, data in graph.edges(data=True):
        data["bandwidth"] = float(rng.uniform(0.1, 1.0) * RATE)
    work = 1 + 5e-3 * rng.random(devices)
    with flower_identity(0):
        world = collective_world(graph, speed=4 / work)
        _, (report,) = run(world, collective=name, step_latency=ALPHA, barrier=barrier)
    seconds = expected(graph, name, engine="fluid", barrier=barrier, start=work)
    assert report.finished == pytest.approx(work.min() + seconds, rel=1e-9)
    assert report.compute == pytest.approx(work.max())


def test_replies_of_a_global_barrier_come_together_and_say_who_is_in_the_sum():
    world = collective_world(tp.star(4, bandwidth=RATE), speed=[4.0, 2.0, 1.0, 4.0])
    replies, (report,) = run(world, collective="ring")
    sync = 2 * 3 / 4 * SIZE * 8 / RATE
    assert finished(replies) == pytest.approx([4 + sync] * 4)
    assert (report.compute, report.sync) == (4.0, pytest.approx(sync))
    for device, reply in enumerate(replies):
        delivery = reply.content["delivery"]
        assert delivery["computed"] == [1.0, 2.0, 4.0, 1.0][device]
        assert delivery["received_from"] == [1000 + j for j in range(4) if j != device]
        assert delivery["sent_bytes"] == delivery["received_bytes"] == 2 * 3 * SIZE // 4


def test_with_a_local_barrier_ranks_go_on_and_reply_by_themselves():
    # Rank 1 of three adds its vector to 0's; 0 and 2 exchange halves; 0 sends the sum to 1. What 2
    # sends at once shares the way to 0 with 1's vector, so going on by oneself does not always pay.
    unit = SIZE * 8 / RATE
    for barrier, ends in (("local", {2: 2.5, 0: 3.5, 1: 3.5}), ("global", {0: 3, 1: 3, 2: 3})):
        world = collective_world(tp.star(3, bandwidth=RATE))
        ids = world.grid.push_messages(asks(world, collective="halving_doubling", barrier=barrier))
        found = pull_all(world, ids)
        assert {device: (now - 1) / unit for device, (now, _) in found.items()} == pytest.approx(
            ends
        )
        assert list(found) == list(ends)


def test_with_a_local_barrier_only_those_wait_who_need_the_straggler():
    graph = tp.star(8, bandwidth=RATE)
    unit = SIZE * 8 / RATE
    speed = [4.0] * 8
    speed[4] = 4 / (1 + unit)
    for barrier, units in (("local", 6), ("global", 7)):
        world = collective_world(graph, speed=speed)
        _, (report,) = run(world, collective="binomial_tree", barrier=barrier)
        assert report.seconds == pytest.approx(1 + units * unit)
        assert report.compute == pytest.approx(1 + unit)
        assert report.sync == pytest.approx(6 * unit)


def test_a_straggler_is_waited_for():
    graph = tp.bcube(3, 2, bandwidth=RATE)
    speed = [4.0] * 8 + [1.0]
    _, (report,) = run(collective_world(graph, speed=speed), collective="bml", step_latency=ALPHA)
    assert report.seconds == pytest.approx(4 + expected(graph, "bml"), rel=1e-9)
    assert report.exposed == pytest.approx(expected(graph, "bml"), rel=1e-9)


def test_other_traffic_shares_the_links():
    graph = tp.star(4, bandwidth=RATE)
    _, (quiet,) = run(collective_world(graph), collective="ring")
    world = collective_world(graph)
    ids = world.grid.push_messages(asks(world, collective="ring"))
    world.grid.advance(1.0)
    world.grid.network.transfer(0, 1, 10 * SIZE)  # halves the rate of what 0 sends to 1
    assert len(world.grid.pull_messages(ids)) == 4
    assert world.grid.take_traffic().collectives[0].sync == pytest.approx(2 * quiet.sync)


def test_groups_of_one_push_run_side_by_side():
    # Two rings under switches of their own do not meet; two on one star's links do not either.
    graph = tp.star(8, bandwidth=RATE)
    world = collective_world(graph)
    pushed = asks(world, range(4), collective="ring", group="a")
    pushed += asks(world, range(4, 8), collective="ring", group="b")
    replies = world.grid.send_and_receive(pushed)
    assert finished(replies) == pytest.approx([1 + 1.5 * SIZE * 8 / RATE] * 8)
    assert [r.group for r in world.grid.take_traffic().collectives] == ["a", "b"]
    assert replies[5].content["delivery"]["received_from"] == [1004, 1006, 1007]


def test_a_dedicated_server_counts_as_up_and_down():
    world = collective_world(tp.fat_tree(4, devices=9, bandwidth=RATE))
    _, (report,) = run(world, collective="ps_dedicated")
    assert report.sync == pytest.approx(2 * 9 * SIZE * 8 / RATE)
    world = collective_world(tp.fat_tree(4, devices=9, bandwidth=RATE))
    world.grid.send_and_receive(asks(world, collective="ps_dedicated"))
    traffic = world.grid.take_traffic()
    assert (traffic.bytes_up, traffic.bytes_down, traffic.bytes_peer) == (9 * SIZE, 9 * SIZE, 0)


def test_bytes_of_pieces_add_up_to_the_vector():
    world = collective_world(tp.bcube(3, 2, bandwidth=RATE))
    size = 1001  # 18 pieces
    replies, _ = run(world, collective="bml", size=size)
    sent = [reply.content["delivery"]["sent_bytes"] for reply in replies]
    assert sum(sent) == 2 * 8 * size


def test_the_root_of_a_tree_is_a_choice():
    graph = tp.line(3, bandwidth=RATE, latency=0.1)
    near = run(collective_world(graph), collective="binomial_tree", root=1001)[1][0]
    far = run(collective_world(graph), collective="binomial_tree")[1][0]
    unit = SIZE * 8 / RATE
    assert near.sync == pytest.approx(4 * (0.1 + unit))
    assert far.sync == pytest.approx(4 * unit + 0.1 + 0.2 + 0.2 + 0.1)


@pytest.mark.parametrize(
    ("graph", "devices", "exchange", "message"),
    [
        ("bcube", range(9), {"collective": "rnig"}, r"is 'rnig' \(did you mean 'ring'\?\); .*bml"),
        ("bcube", range(9), {}, r"exchange.collective is None; it must be one of all_to_all"),
        ("bcube", range(8), {"collective": "bml"}, r"8 devices cannot run 'bml': .* all 9 devices"),
        ("bcube", [4], {"collective": "ring"}, r"devices = 1: a collective needs at least 2"),
        ("ring", range(4), {"collective": "bml"}, r"bml needs a BCube, not ring\(devices=4"),
        ("ring", range(4), {"collective": "ring", "colour": 1}, r"unknown key 'colour'; valid"),
        ("ring", range(4), {"collective": "ring", "barrier": "both"}, r"barrier is 'both'"),
        ("ring", range(4), {"collective": "ring", "when": "before"}, r"when is 'before'"),
        ("ring", range(4), {"collective": "ring", "on_failure": "stall"}, r"'error', 'reroute'"),
        ("ring", range(4), {"collective": "ring", "step_latency": -1.0}, r"must be seconds"),
        ("ring", range(4), {"collective": "ring", "fusion_bytes": 1.5}, r"must be an int"),
        ("ring", range(4), {"collective": "ring", "root": 1000}, r"goes with .* 'binomial_tree'"),
        ("ring", range(4), {"collective": "binomial_tree", "root": 7}, r"node 7, is none of them"),
        ("ring", [0, 1, 2, 2], {"collective": "ring"}, r"two instructions for one device"),
        ("ring", range(4), {"collective": "ps_dedicated"}, r"0 machines that are no devices"),
    ],
)
def test_wrong_input_is_one_clear_error(graph, devices, exchange, message):
    world = collective_world(tp.bcube(3, 2) if graph == "bcube" else tp.ring(4))
    with pytest.raises(PayloadError, match=message):
        world.grid.push_messages(asks(world, devices, **exchange))
    assert not world.grid.trips


def test_vectors_must_have_one_size():
    world = collective_world(tp.ring(3, bandwidth=RATE))
    with pytest.raises(PayloadError, match=r"device 0 has 100 bytes and device 2 101"):
        run(world, collective="ring", size=[100, 100, 101])


def test_instructions_of_a_group_must_agree():
    world = collective_world(tp.ring(3, bandwidth=RATE))
    pushed = asks(world, [0, 1], collective="ring") + asks(world, [2], collective="ps_colocated")
    with pytest.raises(PayloadError, match="group 'all' differ"):
        world.grid.push_messages(pushed)


def test_lines_of_the_record_have_the_parts_of_an_iteration():
    world = collective_world(tp.star(4, bandwidth=RATE), speed=[4.0, 4.0, 4.0, 2.0])

    class Twice(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            for _ in range(2):
                grid.send_and_receive(asks(world, collective="ring"))
            return asks(world, [0, 1], collective="ring", group="a") + asks(
                world, [2, 3], collective="ring", group="b"
            )

    rows = []
    start(Twice(), world.grid, world.initial(), rounds=1, seed=0, record=rows.append)
    unit = SIZE * 8 / RATE
    parts = {name: value for name, value in rows[0].extra.items() if name.endswith("_seconds")}
    assert parts == pytest.approx(
        {"compute_seconds": 6, "sync_seconds": 4 * unit, "exposed_seconds": 4 * unit}
    )


def test_steps_and_messages_are_recorded():
    world = collective_world(tp.bcube(3, 2, bandwidth=RATE))
    with Recorder(None, "bml", transfers=True) as recorder:
        world.grid.recorder = recorder
        for number in (1, 2):
            run(world, collective="bml", number=number, step_latency=ALPHA)
        tables = recorder.tables()
    steps = tables["steps"].to_pylist()
    assert [(s["round"], s["bucket"], s["step"]) for s in steps] == [
        (number, 0, step) for number in (1, 2) for step in range(4)
    ]
    assert {(s["group"], s["collective"]) for s in steps} == {("all", "bml(3,2)")}
    assert steps[0]["started"] == 1.0
    assert [s["started"] for s in steps[1:4]] == [s["finished"] for s in steps[:3]]
    messages = tables["transfers"].to_pylist()
    assert len(messages) == 2 * 144
    assert {(m["kind"], m["outcome"]) for m in messages} == {("collective", "delivered")}
    assert min(m["released"] for m in messages) == pytest.approx(1 + ALPHA)
    assert tables["compute"].num_rows == 18


@pytest.mark.parametrize("multipath", ["hash", "single"])
def test_hashed_and_single_routes_are_those_of_the_study(multipath):
    graph = tp.fat_tree(4, bandwidth=RATE)
    for seed in (1, 2):
        world = collective_world(graph, seed=seed, network_options={"multipath": multipath})
        _, (report,) = run(world, collective="ps_colocated")
        router = tp.Router(graph, mode=multipath, seed=seed)
        plan = tp.LoadPlan(tp.ps_colocated_schedule(graph), router)
        study = time_schedule(plan, SIZE, engine="fluid").seconds
        assert report.sync == pytest.approx(study, rel=1e-9)
        assert report.sync > 1.1 * 15 / 8 * SIZE * 8 / RATE


def test_bar_8_hashing_costs_a_parameter_server_a_third_and_a_ring_nothing():
    graph = tp.fat_tree(4, bandwidth=RATE)
    unit = SIZE * 8 / RATE
    means = {}
    for name, n_draws in (("ps_colocated", 12), ("ring", 2)):
        times = []
        for seed in range(n_draws):
            world = collective_world(graph, seed=seed, network_options={"multipath": "hash"})
            times.append(run(world, collective=name)[1][0].sync / unit)
        means[name] = np.mean(times)
    assert means["ps_colocated"] == pytest.approx(2.47, rel=0.05)
    assert means["ring"] == pytest.approx(1.875)
