"""Hierarchical averaging over a tree: models, times and bytes on its links."""

import logging

import numpy as np
import pytest
import simpy

import fedsim
from fedsim.devices import DeviceFleet
from fedsim.errors import NetworkError, PayloadError, ScenarioError
from fedsim.executors.vectorised import VectorisedExecutor
from fedsim.flower.grid import NODE_BASE, NetworkGrid
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.records import array_bytes, stacked_record
from fedsim.flower.server import initial_arrays
from fedsim.flower.session import start
from fedsim.learning.config import LocalConfig
from fedsim.network import graph_network
from fedsim.simulation import build
from strategies import linear
from strategies.hierarchical import HierarchicalFedAvg
from tests.fedsim.q8_world import q8_star, q8_trainer
from tests.strategies.peer_worlds import D, N
from tests.strategies.server_worlds import local, run_plain
from topologies import tree

QUIET = {"fraction_evaluate": 0.0}
PAYLOAD = 8 * D  # bytes


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("flwr").setLevel(logging.ERROR)


def tree_grid(fanouts=(2, 4), bandwidth=(800.0, 80.0), latency=(0.5, 0.1), speed=5.0, **options):
    """Return a grid on a tree (bit/s, s): cloud cables first; 5 steps of a sample take 1 s."""
    trainer = q8_trainer()
    plan = WorkPlan(LocalConfig(local_steps=5, batch_size=0, learning_rate=0.05), trainer.data.size)
    env = simpy.Environment()
    graph = tree(fanouts, bandwidth=bandwidth, latency=latency)
    executor = VectorisedExecutor(trainer, plan, node_base=NODE_BASE)
    network = graph_network(env, graph, seed=1, **options)
    network.server = N  # the root
    grid = NetworkGrid(
        env, network, DeviceFleet(np.full(N, 1.0) * speed, None), executor, plan, keep_trips=True
    )
    return grid, stacked_record(trainer.layout.views(trainer.initial()[None]), 0)


def run(strategy, rounds, grid_and_model):
    grid, initial = grid_and_model
    rows = []
    outcome = start(strategy, grid, initial, rounds=rounds, seed=1, record=rows.append)
    (array,) = outcome.arrays.values()
    return array.numpy().ravel(), rows


def loop(rounds, edges, period):
    """HierFAVG as a plain loop: 8 devices in order, evenly over the edge servers."""
    of = np.arange(N) * edges // N
    models = np.zeros((edges, D))
    for number in range(1, rounds + 1):
        work = np.array([local(i, models[of[i]]) for i in range(N)])
        models = np.array([work[of == e].mean(0) for e in range(edges)])
        mean = sum(models[e] * (of == e).sum() for e in range(edges)) / N
        if number % period == 0:
            models = np.tile(mean, (edges, 1))
    return mean


@pytest.mark.parametrize(("edges", "period"), [(2, 3), (4, 2), (3, 4)])
def test_it_equals_a_plain_loop_in_a_plain_app(edges, period):
    strategy = HierarchicalFedAvg(edges=edges, cloud_period=period, **QUIET)
    ours = run_plain(strategy, 7).arrays["w"].numpy()
    np.testing.assert_allclose(ours, loop(7, edges, period), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("fanouts", "period"), [((2, 4), 3), ((4, 2), 2)])
def test_it_equals_a_plain_loop_on_a_tree(fanouts, period):
    ours, _ = run(HierarchicalFedAvg(cloud_period=period, **QUIET), 7, tree_grid(fanouts))
    np.testing.assert_allclose(ours, loop(7, fanouts[0], period), rtol=0, atol=1e-12)


def test_with_a_cloud_in_every_round_it_is_fedavg():
    ours, _ = run(HierarchicalFedAvg(cloud_period=1, **QUIET), 6, tree_grid())
    theirs, _ = run(linear.FedAvg(**QUIET), 6, q8_star())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_times_and_bytes_are_those_of_the_links():
    """80 bytes: 8.1 s on a device's cable, 1.3 s on an edge server's; work takes 1 s."""
    near = 8 * PAYLOAD / 80.0 + 0.1
    far = 8 * PAYLOAD / 800.0 + 0.5
    _, rows = run(HierarchicalFedAvg(cloud_period=3, **QUIET), 4, tree_grid())
    spent = np.diff([0.0, *(row.virtual_time for row in rows)])
    edge_round = 2 * near + 1.0
    expected = [far + edge_round, edge_round, edge_round + far, far + edge_round]
    np.testing.assert_allclose(spent, expected, rtol=1e-9)
    devices, edges = N * PAYLOAD, 2 * PAYLOAD
    assert [row.bytes_down for row in rows] == [devices + edges, devices, devices, devices + edges]
    assert [row.bytes_up for row in rows] == [devices, devices, devices + edges, devices]
    assert [row.messages_sent for row in rows] == [2 * N + 2, 2 * N, 2 * N + 2, 2 * N + 2]


def test_edge_servers_wait_for_their_devices_only_where_they_send_on():
    """Device 0 is five times slower than the others."""
    replies = []

    class Watching(HierarchicalFedAvg):
        def aggregate_train(self, server_round, received):
            received = list(received)
            replies.append({m.metadata.src_node_id: m.content["delivery"] for m in received})
            return super().aggregate_train(server_round, received)

    run(Watching(cloud_period=2, **QUIET), 2, tree_grid(speed=[1.0] + [5.0] * 7))
    first, second = ([record[1000 + i] for i in range(N)] for record in replies)
    assert [record["server"] for record in first] == [9] * 4 + [10] * 4
    finished = [record["finished"] - first[0]["started"] for record in first]
    np.testing.assert_allclose(finished, [22.5] + [18.5] * 7)
    finished = [record["finished"] - second[0]["started"] for record in second]
    np.testing.assert_allclose(finished, [22.5] * 4 + [18.5] * 4)


def test_losses_on_either_kind_of_link_do_no_harm():
    strategy = HierarchicalFedAvg(cloud_period=2, **QUIET)
    grid, initial = tree_grid(message_loss=0.2)
    ours, rows = run(strategy, 12, (grid, initial))
    assert np.isfinite(ours).all()
    assert sum(row.messages_lost for row in rows) > 10
    assert {trip.outcome for trip in grid.trips} == {"ok", "lost-down", "lost-up"}
    together = [{t.outcome for t in grid.trips if t.round == 1 and t.server == e} for e in (9, 10)]
    assert all(together)


def test_a_star_has_no_edge_servers():
    with pytest.raises(NetworkError, match="needs a topology that has some"):
        run(HierarchicalFedAvg(**QUIET), 1, q8_star())


def test_a_plain_app_has_to_say_how_many():
    with pytest.raises(ValueError, match="edges: no network tells"):
        run_plain(HierarchicalFedAvg(**QUIET), 1)


def test_a_backhaul_without_an_edge_server_is_refused():
    class Wrong(HierarchicalFedAvg):
        def configure_train(self, *args):
            for message in super().configure_train(*args):
                message.content["exchange"]["server"] = "root"
                yield message

    with pytest.raises(PayloadError, match=r"goes with exchange\.server 'edge'"):
        run(Wrong(**QUIET), 1, tree_grid())


def test_the_scenario_sends_one_model_a_site_where_fedavg_sends_all():
    scenario = fedsim.load_scenario(
        "scenarios/edge_cloud.yaml", ["rounds=5", "stop=null", "record.transfers=false"]
    )
    crossed = {}
    for name in scenario.strategies:
        simulation = build(scenario, name)
        weight = sum(map(array_bytes, initial_arrays(simulation.trainer).values()))
        simulation.run()
        uses = {use.name: use for use in simulation.network.link_uses()}
        ways = [f"{a}>{b}" for site in range(41, 45) for a, b in ((40, site), (site, 40))]
        assert {(uses[way].bandwidth_bps, uses[way].latency) for way in ways if way in uses} == {
            (1e6, 0.03)
        }
        assert (uses["0>41"].bandwidth_bps, uses["0>41"].latency) == (20e6, 0.002)
        crossed[name] = [uses[way].carried_bytes / weight if way in uses else 0 for way in ways]
    assert crossed["fedavg"] == pytest.approx([5 * 10] * 8)
    assert crossed["every-5th-round"] == pytest.approx([1] * 8)
    assert crossed["every-20th-round"] == pytest.approx([1, 0] * 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("topology.bandwidth=[1 Mbit/s]", "topology"),
        ("topology.bandwidth=[1 Mbit/s, much]", r"topology.bandwidth\.?\[?1"),
        ("topology={kind: star, latency: [1 ms, 2 ms]}", "topology.latency: a list is a value"),
        ("topology={kind: ring, bandwidth: [1 Mbit/s]}", "topology.bandwidth: a list is a value"),
    ],
)
def test_values_for_tiers_that_are_not_there_are_refused(override, message):
    with pytest.raises(ScenarioError, match=message):
        fedsim.load_scenario("scenarios/edge_cloud.yaml", [override])


def test_a_scenario_whose_topology_is_a_star_is_refused_before_it_runs():
    scenario = fedsim.load_scenario("scenarios/edge_cloud.yaml", ["topology={kind: star}"])
    with pytest.raises(ScenarioError, match="topology: device 0 is linked to the server itself"):
        build(scenario, "every-5th-round")
