import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import topologies as tp
from topologies.routing import link_table


def loads_by_paths(graph, pairs, sizes, paths_of):
    """Return the links' loads by walking every path: the slow oracle."""
    table = link_table(graph)
    load = np.zeros(len(table))
    for (source, destination), size in zip(pairs, sizes, strict=True):
        paths = paths_of(source, destination)
        for path in paths:
            ends = np.array(path)
            load[table.find(ends[:-1], ends[1:])] += size / len(paths)
    return load


@given(
    st.integers(3, 14), st.integers(0, 10_000), st.sampled_from(["hops", "latency", "bandwidth"])
)
def test_spray_is_the_even_split_over_all_shortest_paths(devices, seed, weight):
    graph = tp.random_geometric(devices, 0.6, connected=True, seed=seed, bandwidth=1.0)
    rng = np.random.default_rng(seed)
    for _, _, data in graph.edges(data=True):
        data.update(bandwidth=float(2 ** rng.integers(3)), latency=float(rng.integers(1, 3)))
    pairs = [
        (a, b) for a in range(devices) for b in range(devices) if a != b and rng.random() < 0.5
    ]
    if not pairs:
        return
    sizes = rng.random(len(pairs))
    source, destination = np.array(pairs).T
    router = tp.Router(graph, mode="spray", weight=weight)
    expected = loads_by_paths(
        graph, pairs, sizes, lambda a, b: tp.equal_cost_paths(graph, a, b, weight=weight)
    )
    np.testing.assert_allclose(router.loads(source, destination, sizes)[0], expected, atol=1e-9)
    routes = router.routes(source, destination)
    np.testing.assert_allclose(routes.loads(sizes, len(router.links)), expected, atol=1e-9)


@pytest.mark.parametrize(("n", "k"), [(2, 2), (3, 2), (2, 3), (3, 3)])
def test_bcube_mode_is_the_even_split_over_rotations(n, k):
    graph = tp.bcube(n, k)
    pairs = [(a, b) for a in range(n**k) for b in range(n**k) if a != b]
    source, destination = np.array(pairs).T
    sizes = np.random.default_rng(1).random(len(pairs))
    expected = loads_by_paths(graph, pairs, sizes, lambda a, b: tp.bcube_paths(a, b, n, k))
    found = tp.Router(graph).loads(source, destination, sizes)[0]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@given(st.integers(2, 4), st.integers(1, 4), st.data())
def test_bcube_has_k_disjoint_paths(n, k, data):
    a, b = data.draw(st.lists(st.integers(0, n**k - 1), min_size=2, max_size=2, unique=True))
    graph = tp.bcube(n, k)
    paths = tp.bcube_disjoint_paths(a, b, n, k)
    assert len(paths) == k
    inner = [node for path in paths for node in path[1:-1]]
    assert len(inner) == len(set(inner))
    for path in paths:
        assert (path[0], path[-1]) == (a, b)
        assert nx.is_path(graph, path)


@pytest.mark.parametrize("graph", [tp.fat_tree(4), tp.torus((3, 4)), tp.leaf_spine(3, 3, 2)])
def test_hash_takes_one_shortest_path_and_all_of_them_in_the_end(graph):
    source, destination = 0, tp.devices_of(graph)[-1]
    shortest = {tuple(p) for p in tp.equal_cost_paths(graph, source, destination)}
    seen = set()
    for flow in range(200):
        router = tp.Router(graph, mode="hash", seed=5)
        routes = router.routes(np.array([source]), np.array([destination]), np.array([flow]))
        nodes = [source, *router.links.target[routes.link].tolist()]
        assert (routes.share == 1).all()
        seen.add(tuple(nodes))
        assert tuple(tp.hashed_path(graph, source, destination, flow=flow)) in shortest
    assert seen == shortest


def test_hash_draws_paths_equally_often():
    graph = tp.fat_tree(4)
    flows = np.arange(20_000)
    router = tp.Router(graph, mode="hash")
    routes = router.routes(np.zeros_like(flows), np.full_like(flows, 15), flows)
    share = routes.loads(np.ones(len(flows)), len(router.links)) / len(flows)
    quarter = share[(share > 0) & (share < 0.4)]
    np.testing.assert_allclose(quarter, 0.25, atol=0.015)


def test_single_is_the_first_shortest_path():
    graph = tp.fat_tree(4)
    router = tp.Router(graph, mode="single")
    routes = router.routes(np.array([0]), np.array([15]))
    nodes = [0, *router.links.target[routes.link].tolist()]
    assert nodes == tp.shortest_path(graph, 0, 15)


def test_explicit_routes_are_followed():
    graph = tp.ring(4)
    router = tp.Router(graph, mode="explicit", explicit={(0, 1): [[0, 1], [0, 3, 2, 1]]})
    load = router.loads(np.array([0]), np.array([1]), np.ones(1))[0]
    assert sorted(load[load > 0].tolist()) == [0.5] * 4
    assert router.without([(0, 1)]).loads(np.array([0]), np.array([1]), np.ones(1))[0].sum() == 3
    with pytest.raises(ValueError, match="no route from 1 to 2"):
        router.loads(np.array([1]), np.array([2]), np.ones(1))


def test_detours_avoid_what_is_down():
    graph = tp.bcube(3, 2)
    router = tp.Router(graph).without([(0, 9)])
    routes = router.routes(np.array([0, 1, 4]), np.array([1, 0, 8]))
    used = set(zip(router.links.source[routes.link], router.links.target[routes.link], strict=True))
    assert not {(0, 9), (9, 0)} & used
    # Two relays with three switches each; the first and the last link are common.
    assert sorted(routes.share[routes.message == 0]) == [0.5] * 8 + [1.0] * 2
    dead_switch = tp.Router(graph).without([9])
    assert 9 not in dead_switch.links.target[dead_switch.routes(np.array([0]), np.array([1])).link]


@pytest.mark.parametrize("mode", ["spray", "hash", "single"])
def test_no_route_names_the_pair(mode):
    graph = tp.line(4)
    router = tp.Router(graph, mode=mode).without([(1, 2)])
    with pytest.raises(ValueError, match="no route from 0 to 3: no path exists while 1-2 is down"):
        router.loads(np.array([0, 0]), np.array([1, 3]), np.ones(2))
    with pytest.raises(ValueError, match="no route from 0 to 9"):
        tp.shortest_path(graph, 0, 9)


def test_a_message_to_oneself_crosses_no_link():
    router = tp.Router(tp.bcube(2, 2))
    assert router.loads(np.array([1]), np.array([1]), np.ones(1))[0].sum() == 0
    router = tp.Router(tp.ring(4))
    assert router.loads(np.array([1]), np.array([1]), np.ones(1))[0].sum() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tp.Router(tp.ring(4), mode="best"), "mode = 'best'"),
        (lambda: tp.Router(tp.ring(4), mode="bcube"), "mode = 'bcube' on ring"),
        (lambda: tp.Router(tp.ring(4), mode="explicit"), "go together"),
        (lambda: tp.Router(tp.ring(4), weight="luck"), "weight = 'luck'"),
        (lambda: tp.Router(tp.ring(4), down=[(0, 2)]), "no link between 0 and 2"),
        (lambda: tp.Router(nx.Graph([(1, 2)])), "must be 0..n-1"),
        (lambda: tp.Router(nx.empty_graph(3)), "has no edge"),
        (lambda: tp.bcube_disjoint_paths(1, 1, 2, 2), "source = destination = 1"),
    ],
)
def test_wrong_routing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_large_networks_are_routed_in_blocks():
    graph = tp.star(4000, bandwidth=8.0)
    router = tp.Router(graph)
    source = np.arange(4000)
    load = router.loads(source, np.roll(source, 1), np.ones(4000))[0]
    np.testing.assert_allclose(load, 1.0)
