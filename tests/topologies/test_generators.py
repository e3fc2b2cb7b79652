import math

import networkx as nx
import pytest

import topologies as tp

SAME_FAMILY = (
    [(tp.star(n), nx.star_graph(n)) for n in (1, 4, 9)]
    + [(tp.ring(n), nx.cycle_graph(n)) for n in (3, 4, 9)]
    + [(tp.line(n), nx.path_graph(n)) for n in (2, 5, 8)]
    + [(tp.complete(n), nx.complete_graph(n)) for n in (2, 5, 8)]
    + [(tp.grid(d), nx.grid_graph(d)) for d in ((4,), (3, 4), (2, 3, 4))]
    + [(tp.torus(d), nx.grid_graph(d, periodic=True)) for d in ((5,), (3, 4), (3, 4, 5))]
    + [(tp.hypercube(d), nx.hypercube_graph(d)) for d in (1, 3, 5)]
    + [(tp.tree((r,) * h), nx.balanced_tree(r, h)) for r, h in ((2, 2), (3, 2), (2, 4))]
    + [
        (tp.exponential(n), nx.circulant_graph(n, hops))
        for n, hops in ((4, [1, 2]), (8, [1, 2, 4]), (11, [1, 2, 4, 8]))
    ]
)


@pytest.mark.parametrize(
    ("ours", "theirs"), SAME_FAMILY, ids=[ours.graph["name"] for ours, _ in SAME_FAMILY]
)
def test_family_is_isomorphic_to_that_of_networkx(ours, theirs):
    assert nx.is_isomorphic(ours, theirs)
    assert sorted(ours) == list(range(len(theirs)))


def test_every_node_and_edge_carries_the_attributes():
    graph = tp.tree((3, 4), bandwidth=(1e9, 2e7), latency=(0.01, 0.02))
    assert tp.devices_of(graph) == list(range(12))
    assert tp.servers_of(graph) == [12, 13, 14, 15]
    assert all(graph.edges[d, 13 + d // 4]["bandwidth"] == 2e7 for d in range(12))
    assert {graph.edges[12, e]["latency"] for e in (13, 14, 15)} == {0.01}


def test_tree_spreads_fewer_devices_evenly():
    graph = tp.tree((3, 4), devices=8)
    assert sorted(graph.degree(e) - 1 for e in (9, 10, 11)) == [2, 3, 3]
    with pytest.raises(ValueError, match=r"devices = 13.*3 to 12"):
        tp.tree((3, 4), devices=13)


def test_star_with_servers_has_a_switch_as_hub():
    graph = tp.star(4, servers=2)
    assert graph.nodes[4]["role"] == "switch"
    assert tp.hosts_of(graph) == [0, 1, 2, 3, 5, 6]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tp.ring(1), "devices = 1: must be at least 2"),
        (lambda: tp.torus((3, 1)), "dims = 1: must be at least 2"),
        (lambda: tp.star(4, bandwidth=0), "bandwidth = 0"),
        (lambda: tp.star(4, latency=-1), "latency = -1"),
        (lambda: tp.tree((2, 2), bandwidth=(1.0, 2.0, 3.0)), "each of the 2 tiers"),
        (lambda: tp.tree(()), "at least one tier"),
    ],
)
def test_wrong_sizes_name_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_names_are_spelled_as_tables_print_them():
    assert tp.torus((4, 4)).graph["name"] == "torus(dims=4x4)"
    assert tp.star(9, bandwidth=math.inf).graph["name"] == "star(devices=9)"
