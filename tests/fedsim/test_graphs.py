"""Scenarios on graphs: any topology, peers of each round, what is recorded of them."""

import json

import networkx as nx
import numpy as np
import pytest
import torch

import fedsim
from fedsim import runner
from fedsim.errors import ScenarioError
from fedsim.flower.session import consensus_distance
from fedsim.graphs import peer_graphs
from fedsim.scenario import Scenario
from fedsim.simulation import check

MIXING = "tests.fedsim.test_neighbours:Mixing"
SMALL = {
    "name": "gossip",
    "seed": 5,
    "rounds": 2,
    "data": {"devices": 6},
    "training": {"learning_rate": 0.3},
    "topology": {"kind": "ring", "bandwidth": "64 kbit/s", "latency": "10 ms"},
    "strategies": {"gossip": {"kind": MIXING}},
}
SIXTEEN = {
    "bcube": {"n": 4, "k": 2},
    "complete": {},
    "dragonfly": {"routers": 4, "hosts_per_router": 2, "global_links": 1},
    "erdos_renyi": {"density": 0.5, "connected": True},
    "expander": {"degree": 4},
    "exponential": {},
    "fat_tree": {"ports": 4},
    "grid": {"dims": [4, 4]},
    "hypercube": {"dimension": 4},
    "line": {},
    "random_geometric": {"radius": 0.6},
    "ring": {},
    "star": {},
    "torus": {"dims": [2, 8]},
    "tree": {"fanouts": [4, 4]},
    "watts_strogatz": {"neighbours": 4, "rewiring": 0.2},
}


def scenario(*overrides, **changes):
    return Scenario.from_mapping(SMALL | changes, overrides)


def gossip(*overrides, **changes):
    """Return the rounds of a run."""
    return fedsim.run(scenario(*overrides, **changes)).strategies["gossip"].rounds


@pytest.mark.parametrize("kind", SIXTEEN)
def test_any_topology_carries_an_exchange_over_its_routes(kind):
    topology = {"kind": kind, "bandwidth": "64 kbit/s", "latency": "10 ms"} | SIXTEEN[kind]
    rows = gossip("rounds=1", topology=topology, data={"devices": 16}, peers={"kind": "ring"})
    assert rows[0].bytes_peer == 32 * 2600
    assert rows[0].virtual_time > 2 * 0.01 + 8 * 2600 / 64e3


def test_without_peers_devices_exchange_with_those_the_topology_links():
    rows = gossip()
    assert [row.bytes_peer for row in rows] == [12 * 2600] * 2
    assert [row.messages_sent for row in rows] == [12] * 2
    with pytest.raises(runner.RunError, match="links no two devices directly"):
        gossip(topology={"kind": "star"})
    with pytest.raises(runner.RunError, match="links no two devices directly"):
        gossip(topology={"kind": "tree", "fanouts": [2, 3]})


def test_a_strategy_of_a_server_needs_one_and_a_trees_root_is_one():
    strategies = {"gossip": {"kind": "fedavg"}}
    with pytest.raises(runner.RunError, match="topology: it has no server"):
        gossip(strategies=strategies)
    tree = {"kind": "tree", "fanouts": [2, 3], "bandwidth": "64 kbit/s", "latency": "10 ms"}
    (row, _) = gossip(strategies=strategies, topology=tree)
    assert row.bytes_down == row.bytes_up == 6 * 2600
    # Three devices share the link of their edge server to the root, both ways.
    work = max(fedsim.build(scenario()).trainer.data.size) / 500
    assert row.virtual_time >= 2 * (2 * 0.01 + 3 * 8 * 2600 / 64e3) + work


def test_a_graph_of_other_devices_is_an_error_that_names_both_numbers():
    with pytest.raises(ScenarioError, match=r"has 9 devices, but data\.devices is 6"):
        scenario(topology={"kind": "bcube", "n": 3, "k": 2})
    with pytest.raises(ScenarioError, match=r"has 8 devices, but data\.devices is 6"):
        scenario(peers={"kind": "hypercube", "dimension": 3})


def test_rates_of_a_graph_are_drawn_for_each_link_by_its_name():
    def rates(**topology):
        spread = {"kind": "lognormal", "median": "1 Mbit/s", "sigma": 0.5}
        built = fedsim.build(scenario(topology={"bandwidth": spread} | topology))
        return {use: built.network.timeline(use, 0.0, 1.0)[0][1] for use in ("0-1", "2-3")}

    on_a_ring = rates(kind="ring")
    assert on_a_ring["0-1"] != on_a_ring["2-3"]
    assert rates(kind="complete") == on_a_ring


def test_a_redrawn_graph_depends_on_seed_and_round_alone():
    spec = {"kind": "erdos_renyi", "density": 0.5}
    one, two = (peer_graphs(spec, 9, 4, redraw=True) for _ in range(2))
    forwards = [sorted(one(r).edges) for r in range(1, 6)]
    assert [sorted(two(r).edges) for r in range(5, 0, -1)][::-1] == forwards
    assert len(set(map(str, forwards))) == 5
    fixed = peer_graphs(spec, 9, 4, redraw=False)
    assert sorted(fixed(1).edges) == sorted(fixed(2).edges)
    assert sorted(peer_graphs(spec, 9, 5, redraw=True)(1).edges) != forwards[0]


def test_redrawn_peers_are_the_same_for_all_strategies_and_change_with_the_round():
    spec = {"kind": "erdos_renyi", "density": 0.5, "redraw": True}
    strategies = {
        "gossip": {"kind": MIXING},
        "other": {"kind": MIXING, "topology": {"kind": "star", "bandwidth": "1 Mbit/s"}},
    }
    found = fedsim.run(scenario("rounds=6", peers=spec, strategies=strategies)).strategies
    one, two = ([row.messages_sent for row in found[name].rounds] for name in strategies)
    assert one == two
    assert len(set(one)) > 1


def test_cables_that_are_redrawn_make_the_neighbours_of_a_round():
    cables = {"kind": "redraw", "density": 0.5}
    rows = gossip("rounds=6", topology={"kind": "complete"}, links=cables)
    sent = [row.messages_sent for row in rows]
    assert len(set(sent)) > 1
    assert all(0 < n < 30 and n % 2 == 0 for n in sent)


@pytest.mark.parametrize(
    "links",
    [
        {"kind": "on_off", "mean_up": "2 s", "mean_down": "2 s"},
        {"kind": "mobility", "range": 300.0, "side": 1000.0},
    ],
)
def test_links_that_come_and_go_say_who_is_a_neighbour(links):
    fast = {"speed": {"kind": "constant", "value": "500 samples/s"}}
    rows = gossip("rounds=6", topology={"kind": "complete"}, links=links, devices=fast)
    assert 0 < min(row.messages_sent for row in rows) < 30


def test_the_devices_own_models_are_scored_and_compared():
    rows = gossip("topology.kind=complete")
    assert rows[-1].consensus_distance < 1e-6
    assert rows[-1].accuracy_std == pytest.approx(0, abs=1e-6)
    assert rows[-1].extra["mean_model_accuracy"] == pytest.approx(rows[-1].eval_accuracy)
    apart = gossip(
        data={"devices": 6, "partition": {"kind": "dirichlet", "alpha": 0.1}, "dataset": "digits"}
    )
    assert apart[-1].consensus_distance > 0.01
    assert apart[-1].accuracy_std > 0
    assert apart[-1].extra["mean_model_accuracy"] != apart[-1].eval_accuracy
    rare = gossip("rounds=3", "evaluation.every=3")
    assert [row.eval_accuracy is None for row in rare] == [True, True, False]
    assert ["mean_model_accuracy" in row.extra for row in rare] == [False, False, True]
    assert all(row.consensus_distance is not None for row in rare)


def test_consensus_distance_is_the_root_mean_square_distance_to_the_mean():
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((5, 7))
    models = {
        "a": torch.from_numpy(rows[:, :3].copy()).reshape(5, 3, 1),
        "b": torch.from_numpy(rows[:, 3:].copy()),
        "seen": torch.arange(5),
    }
    expected = np.sqrt(((rows - rows.mean(0)) ** 2).sum(1).mean())
    assert consensus_distance(models) == pytest.approx(expected, rel=1e-12)


def test_a_run_on_a_graph_writes_what_a_report_needs(tmp_path):
    peers = {"kind": "erdos_renyi", "density": 0.4, "redraw": True}
    fedsim.run(scenario("record.transfers=true", "rounds=4", peers=peers), tmp_path)
    assert (tmp_path / "report.html").exists()
    (network,) = json.loads((tmp_path / "world.json").read_text())["networks"]
    assert network["topology"] == "ring(devices=6)"
    assert network["links"] == 12
    assert set(network["link_bps"]) == {64e3}
    graphs = [peer_graphs(peers_of(peers), 6, 5, redraw=True)(r) for r in range(1, 5)]
    degree = np.mean([dict(g.degree()).get(i) for g in graphs for i in range(6)])
    assert network["measures"]["mean neighbours"] == pytest.approx(degree)
    connected = np.mean([nx.is_connected(g) for g in graphs])
    assert network["measures"]["share of rounds connected"] == connected
    found = fedsim.results.load_run(tmp_path).strategies["gossip"]
    transfers = found.table("transfers").to_pandas()
    assert set(transfers.kind) == {"peer"}
    assert len(transfers) == sum(row.messages_sent for row in found.rounds)
    edges = {(r, a, b) for r, g in enumerate(graphs, 1) for e in g.edges for a, b in (e, e[::-1])}
    assert (
        set(zip(transfers["round"], transfers.source, transfers.destination, strict=True)) == edges
    )
    assert len(found.table("compute")) == 4 * 6


def peers_of(peers):
    return {key: value for key, value in peers.items() if key != "redraw"}


def test_a_strategy_of_neighbours_needs_some_before_anything_runs():
    star = {"kind": "star", "bandwidth": "1 Mbit/s", "latency": "1 ms"}
    scenario = Scenario.from_mapping(
        SMALL | {"topology": star, "strategies": {"a": {"kind": "gossip"}}}
    )
    with pytest.raises(ScenarioError, match="peers: strategy 'a' exchanges with neighbours"):
        check(scenario)
