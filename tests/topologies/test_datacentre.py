import gzip
import json
from pathlib import Path

import networkx as nx
import pytest

import topologies as tp

REFERENCE = Path(__file__).parents[2] / "fedsim/reference/collectives.json.gz"
COUNTS = json.loads(gzip.decompress(REFERENCE.read_bytes()))["counts"]


def degrees(graph, role):
    return {graph.degree(v) for v, r in graph.nodes(data="role") if r == role}


def full_rate(graph, half):
    """Return the most that flows from the first `half` hosts to the others, in cables."""
    capacity = nx.DiGraph()
    for u, v, rate in graph.edges(data="bandwidth"):
        capacity.add_edge(u, v, capacity=rate)
        capacity.add_edge(v, u, capacity=rate)
    for host in tp.hosts_of(graph):
        capacity.add_edge(*(("from", host) if host in half else (host, "to")))
    return nx.maximum_flow_value(capacity, "from", "to")


@pytest.mark.parametrize("row", COUNTS["bcube"], ids=lambda r: f"bcube({r['n']},{r['k']})")
def test_bar_5_bcube_counts(row):
    n, k = row["n"], row["k"]
    hardware = tp.bcube_counts(n, k)
    assert hardware.devices == row["servers"]
    assert hardware.switches == row["bcube_switches"]
    assert hardware.nic_ports == row["bcube_nic_ports"]
    assert hardware.cables == row["bcube_cables"]
    assert str(tp.pro_rated_ratio(k)) == row["ratio"]
    ports = tp.smallest_fat_tree(n**k)
    assert ports == row["smallest_full_fattree_ports"]
    full = tp.fat_tree_counts(ports)
    assert full.devices == row["smallest_full_fattree_servers"]
    assert full.switches == row["smallest_full_fattree_switches"]
    assert full.cables == row["smallest_full_fattree_cables"]


@pytest.mark.parametrize("row", COUNTS["fattree"], ids=lambda r: f"fat_tree({r['p']})")
def test_bar_5_fat_tree_counts(row):
    counts = tp.fat_tree_counts(row["p"])
    assert (counts.devices, counts.switches, counts.cables) == (
        row["servers"],
        row["switches"],
        row["cables"],
    )
    assert row["edge"] + row["agg"] + row["core"] == counts.switches


@pytest.mark.parametrize(("n", "k"), [(2, 2), (3, 2), (2, 3), (4, 2), (5, 1), (2, 4), (3, 3)])
def test_bar_5_built_bcube_agrees(n, k):
    graph = tp.bcube(n, k)
    assert tp.hardware(graph) == tp.bcube_counts(n, k)
    assert degrees(graph, "device") == {k}
    assert degrees(graph, "switch") == {n}
    assert graph.number_of_edges() == k * n**k
    between_servers = nx.bipartite.projected_graph(graph, range(n**k))
    assert nx.diameter(between_servers) == k
    for other in range(1, n**k):
        hamming = sum(digit > 0 for digit in tp.bcube_digits(other, n, k))
        assert nx.shortest_path_length(between_servers, 0, other) == hamming


@pytest.mark.parametrize("ports", [2, 4, 6, 8])
def test_bar_5_built_fat_tree_agrees(ports):
    graph = tp.fat_tree(ports)
    assert tp.hardware(graph) == tp.fat_tree_counts(ports)
    assert degrees(graph, "device") == {1}
    assert degrees(graph, "switch") <= {ports}
    assert nx.diameter(graph) == 6


@pytest.mark.parametrize("ports", [4, 8])
def test_bar_5_fat_tree_has_full_bisection(ports):
    graph = tp.fat_tree(ports, bandwidth=1.0)
    hosts = ports**3 // 4
    assert full_rate(graph, set(range(hosts // 2))) == hosts // 2
    assert full_rate(graph, set(range(0, hosts, 2))) == hosts // 2
    assert full_rate(tp.fat_tree(4, bandwidth=1.0, oversubscription=2), set(range(8))) == 4


def test_fat_tree_refuses_odd_ports():
    with pytest.raises(ValueError, match="ports = 5: a Fat-Tree needs an even number"):
        tp.fat_tree(5)


def test_fewer_devices_are_the_first_hosts():
    graph = tp.fat_tree(4, devices=9)
    assert tp.devices_of(graph) == list(range(9))
    assert tp.servers_of(graph) == list(range(9, 16))
    with pytest.raises(ValueError, match="devices = 17: this network holds 16"):
        tp.fat_tree(4, devices=17)


def test_planes_are_parallel_fat_trees():
    graph = tp.fat_tree(4, planes=2)
    assert degrees(graph, "device") == {2}
    assert len(tp.switches_of(graph)) == 40


@pytest.mark.parametrize(("leaves", "spines", "below"), [(2, 2, 2), (4, 2, 6), (8, 4, 4)])
def test_leaf_spine_is_complete_bipartite_above_the_hosts(leaves, spines, below):
    graph = tp.leaf_spine(leaves, spines, below, oversubscription=2, bandwidth=8.0)
    core = graph.subgraph(tp.switches_of(graph))
    assert nx.is_isomorphic(core, nx.complete_bipartite_graph(leaves, spines))
    assert len(tp.devices_of(graph)) == leaves * below
    up = sum(d["bandwidth"] for *_, d in graph.edges(leaves * below, data=True)) - 8.0 * below
    assert up == pytest.approx(8.0 * below / 2)


@pytest.mark.parametrize(("n", "k", "servers"), [(4, 0, 4), (4, 1, 20), (3, 2, 156), (2, 2, 42)])
def test_dcell_has_the_published_sizes_and_degrees(n, k, servers):
    graph = tp.dcell(n, k)
    assert len(tp.devices_of(graph)) == servers
    assert len(tp.switches_of(graph)) == servers // n
    assert degrees(graph, "device") == {k + 1}
    assert nx.is_connected(graph)


@pytest.mark.parametrize(("a", "p", "h"), [(2, 1, 1), (4, 2, 2), (3, 1, 2)])
def test_dragonfly_joins_every_pair_of_groups_once(a, p, h):
    graph = tp.dragonfly(a, p, h)
    groups = a * h + 1
    switches = tp.switches_of(graph)
    assert len(switches) == groups * a
    assert degrees(graph, "switch") == {p + a - 1 + h}
    assert nx.diameter(graph) <= 5
