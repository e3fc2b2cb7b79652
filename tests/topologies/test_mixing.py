import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import topologies as tp
from topologies import mixing

graphs = st.builds(
    lambda n, p, seed: tp.erdos_renyi(n, p, seed=seed),
    st.integers(2, 16),
    st.floats(0.1, 1.0),
    st.integers(0, 1000),
)


@given(graphs)
def test_symmetric_rules_are_doubly_stochastic_and_local(graph):
    linked = nx.to_numpy_array(graph) + np.eye(len(graph))
    for rule in (mixing.metropolis, mixing.max_degree):
        weights = rule(graph)
        assert mixing.is_symmetric(weights)
        assert mixing.is_doubly_stochastic(weights)
        assert (weights[linked == 0] == 0).all()
        assert mixing.is_doubly_stochastic(mixing.lazy(weights))
        assert np.linalg.eigvalsh(mixing.lazy(weights)).min() >= -1e-9


@given(graphs, st.integers(0, 100))
def test_uniform_rows_and_push_sum_columns_sum_to_one(graph, seed):
    rng = np.random.default_rng(seed)
    directed = nx.DiGraph(graph)
    directed.remove_edges_from([e for e in list(directed.edges) if rng.random() < 0.5])
    assert mixing.is_row_stochastic(mixing.uniform_neighbour(directed))
    weights = mixing.push_sum(directed)
    np.testing.assert_allclose(weights.sum(axis=0), 1)
    for sender in directed:
        assert set(np.flatnonzero(weights[:, sender])) == {sender, *directed.successors(sender)}


@given(st.integers(3, 16), st.integers(0, 500))
def test_metropolis_averages_on_connected_graphs(devices, seed):
    graph = tp.erdos_renyi(devices, 0.5, connected=True, seed=seed)
    weights = mixing.metropolis(graph)
    gap = mixing.spectral_gap(weights)
    assert gap > 0
    values = np.random.default_rng(seed).random(devices)
    off = values - values.mean()
    assert np.linalg.norm(weights @ off) <= (1 - gap) * np.linalg.norm(off) + 1e-12


def test_spectral_gaps_of_known_graphs():
    n = 8
    second = (1 + 2 * np.cos(2 * np.pi / n)) / 3
    assert mixing.spectral_gap(mixing.metropolis(tp.ring(n))) == pytest.approx(1 - second)
    assert mixing.spectral_gap(mixing.metropolis(tp.erdos_renyi(6, 0.0))) == 0
    star = nx.star_graph(4)
    best = mixing.spectral_gap(mixing.optimal_constant(star))
    laplacian = np.sort(nx.laplacian_spectrum(star))
    assert best == pytest.approx(2 * laplacian[1] / (laplacian[1] + laplacian[-1]))
    for weight in np.linspace(0.05, 0.5, 20):
        other = np.eye(5) - weight * nx.laplacian_matrix(star).toarray()
        assert mixing.spectral_gap(other) <= best + 1e-12


def test_wrong_graphs_are_refused():
    with pytest.raises(ValueError, match="push_sum takes a directed one"):
        mixing.metropolis(nx.DiGraph([(0, 1)]))
    with pytest.raises(ValueError, match="disconnected"):
        mixing.optimal_constant(nx.empty_graph(3))
    with pytest.raises(ValueError, match="no nodes"):
        mixing.metropolis(nx.Graph())
    with pytest.raises(ValueError, match="laziness = 1"):
        mixing.lazy(np.eye(2), 1)


def test_one_peer_exponential_averages_exactly_in_log_n_rounds():
    graph_at = tp.one_peer_exponential(16)
    product = np.eye(16)
    for number in range(5, 9):
        product = mixing.push_sum(graph_at(number)) @ product
    np.testing.assert_allclose(product, 1 / 16)


def test_changing_graphs_depend_on_the_round_alone():
    base = tp.torus((4, 4))
    sequences = [
        tp.redrawn(lambda rng: tp.erdos_renyi(16, 0.3, seed=rng), seed=3),
        tp.relabelled(base, seed=3),
        tp.dropped_links(base, 0.5, seed=3),
        tp.random_matching(base, seed=3),
    ]
    for graph_at in sequences:
        late = sorted(graph_at(9).edges)
        early = sorted(graph_at(2).edges)
        assert late == sorted(graph_at(9).edges)
        assert late != early
        assert list(graph_at(2)) == list(range(16))


def test_matchings_are_disjoint_and_relabelling_keeps_the_shape():
    base = tp.torus((4, 4))
    for number in range(5):
        assert max(d for _, d in tp.random_matching(base, seed=1)(number).degree) == 1
        assert nx.is_isomorphic(tp.relabelled(base, seed=1)(number), base)
        assert set(tp.dropped_links(base, 0.3)(number).edges) <= set(base.edges)


def test_timeline_yields_the_active_edges():
    steps = tp.timeline(lambda number: nx.path_graph(number + 1), 2.5)
    assert [next(steps) for _ in range(3)] == [
        (0.0, frozenset()),
        (2.5, frozenset({(0, 1)})),
        (5.0, frozenset({(0, 1), (1, 2)})),
    ]


def test_b_connectivity_is_the_smallest_window():
    halves = [nx.Graph([(0, 1), (2, 3)]), nx.Graph([(1, 2), (3, 0)])]
    for half in halves:
        half.add_nodes_from(range(4))
    report = tp.b_connectivity(lambda number: halves[number % 2], 10)
    assert (report.window, report.connected_share, report.mean_degree) == (2, 0.0, 1.0)
    assert tp.b_connectivity(lambda number: tp.ring(4), 3).window == 1
    never = tp.b_connectivity(lambda number: halves[0], 4)
    assert never.window is None
    assert never.mean_isolated == 0


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("density", [0.02, 0.06, 0.15])
def test_b_connectivity_agrees_with_the_unions_themselves(density, directed):
    graphs = [
        nx.gnp_random_graph(9, density, seed=number, directed=directed) for number in range(40)
    ]
    is_connected = nx.is_strongly_connected if directed else nx.is_connected

    def connects(width):
        unions = (nx.compose_all(graphs[i : i + width]) for i in range(len(graphs) - width + 1))
        return all(map(is_connected, unions))

    expected = next((width for width in range(1, 41) if connects(width)), None)
    assert tp.b_connectivity(lambda number: graphs[number], 40).window == expected
