import networkx as nx
import numpy as np
import pytest

import topologies as tp


@pytest.mark.parametrize("devices", [10, 30, 100])
def test_degree_histograms_are_those_of_the_family(devices):
    regular = tp.random_regular(devices, 4, seed=2)
    assert nx.degree_histogram(regular) == nx.degree_histogram(nx.random_regular_graph(4, devices))
    small_world = tp.watts_strogatz(devices, 4, 0.0)
    assert nx.is_isomorphic(small_world, nx.watts_strogatz_graph(devices, 4, 0))
    assert tp.watts_strogatz(devices, 4, 0.3, seed=1).number_of_edges() == 2 * devices
    scale_free = tp.barabasi_albert(devices, 3, seed=1)
    assert scale_free.number_of_edges() == 3 * (devices - 3)
    assert min(d for _, d in scale_free.degree) >= 1
    assert set(dict(tp.expander(devices, 4, seed=1).degree).values()) == {4}


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_erdos_renyi_has_the_density(density):
    links = [tp.erdos_renyi(40, density, seed=s).number_of_edges() for s in range(40)]
    possible = 40 * 39 / 2
    error = np.sqrt(density * (1 - density) / possible / len(links))
    assert np.mean(links) / possible == pytest.approx(density, abs=4 * error)
    ours = np.sum([nx.degree_histogram(tp.erdos_renyi(40, 1.0))], axis=0)
    assert ours.tolist() == nx.degree_histogram(nx.complete_graph(40))


def test_geometric_links_are_those_within_the_radius():
    graph = tp.random_geometric(30, 0.3, seed=4)
    place = nx.get_node_attributes(graph, "position")
    theirs = nx.random_geometric_graph(30, 0.3, pos=place)
    assert set(graph.edges) == {tuple(sorted(e)) for e in theirs.edges}


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: tp.erdos_renyi(12, 0.4, connected=True, seed=seed),
        lambda seed: tp.watts_strogatz(12, 4, 0.5, seed=seed),
        lambda seed: tp.barabasi_albert(12, 2, seed=seed),
        lambda seed: tp.random_regular(12, 3, seed=seed),
        lambda seed: tp.random_geometric(12, 0.5, connected=True, seed=seed),
        lambda seed: tp.expander(12, 3, seed=seed),
    ],
)
def test_a_seed_means_one_connected_graph(make):
    assert sorted(make(3).edges) == sorted(make(3).edges)
    assert sorted(make(3).edges) != sorted(make(4).edges)
    assert all(nx.is_connected(make(seed)) for seed in range(5))
    assert sorted(make(3)) == list(make(3)) == list(range(12))


def test_matching_is_the_regular_graph_of_degree_one():
    assert tp.random_regular(10, 1, seed=1).number_of_edges() == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tp.erdos_renyi(5, 1.5), r"density = 1.5"),
        (lambda: tp.erdos_renyi(50, 0.001, connected=True), "no connected graph"),
        (lambda: tp.watts_strogatz(10, 3, 0.1), "neighbours = 3: must be even"),
        (lambda: tp.watts_strogatz(10, 4, 2), "rewiring = 2"),
        (lambda: tp.barabasi_albert(5, 5), "attachments = 5"),
        (lambda: tp.random_regular(5, 3), "degree = 3"),
        (lambda: tp.random_geometric(5, 0), "radius = 0"),
        (lambda: tp.expander(10, 2), "degree = 2"),
        (lambda: tp.erdos_renyi(1, 0.5), "devices = 1"),
    ],
)
def test_wrong_sizes_name_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()
