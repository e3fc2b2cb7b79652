import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.network.engine import Flow, FluidNetwork
from fedsim.network.fluid import check_rates, max_min_rates


def problem(flows, capacity, unshared=None):
    """Return the arguments of `max_min_rates` for engine flows."""
    uses = [
        (k, link, consumption)
        for k, flow in enumerate(flows)
        for link, consumption in flow.uses
        if unshared is None or not unshared[link]
    ]
    caps = [
        min(
            [flow.cap]
            + [
                capacity[link] / consumption
                for link, consumption in flow.uses
                if unshared is not None and unshared[link]
            ]
        )
        for flow in flows
    ]
    columns = np.array(uses, dtype=float).reshape(-1, 3)
    return (
        np.asarray(capacity, dtype=float),
        columns[:, 0].astype(np.int64),
        columns[:, 1].astype(np.int64),
        columns[:, 2],
        np.array([flow.weight for flow in flows]),
        np.array(caps),
    )


def drain(network, now=0.0):
    """Run until nothing completes any more; return [(time, owner), …]."""
    log = []
    network.solve(now)
    while (now := network.next_completion()) < np.inf:
        log += [(now, flow.owner) for flow in network.finished(now)]
        network.solve(now)
    return log


@pytest.mark.parametrize("n_flows", [1, 2, 7])
def test_equal_flows_share_one_link_equally(n_flows):
    network = FluidNetwork(np.array([8e6]))
    for k in range(n_flows):
        network.add(Flow([(0, 1.0)], 8e6, owner=k), 0.0)
    times, owners = zip(*drain(network), strict=True)
    assert owners == tuple(range(n_flows))
    assert times == pytest.approx([n_flows] * n_flows)


def test_parking_lot_gives_the_long_flow_what_its_tightest_link_leaves():
    network = FluidNetwork(np.array([10.0, 4.0]))
    long, first, second = Flow([(0, 1.0), (1, 1.0)], 1), Flow([(0, 1.0)], 1), Flow([(1, 1.0)], 1)
    for flow in (long, first, second):
        network.add(flow, 0.0)
    network.solve(0.0)
    assert [network.rate(flow) for flow in (long, first, second)] == [2.0, 8.0, 2.0]
    assert [network.bottleneck(flow) for flow in (long, first, second)] == [1, 0, 1]


def test_weights_caps_and_unshared_links_bound_rates():
    network = FluidNetwork(np.array([12.0, 3.0]), np.array([False, True]))
    heavy, light = Flow([(0, 1.0)], 1, weight=3.0), Flow([(0, 1.0)], 1)
    capped, thin = Flow([(0, 1.0)], 1, cap=1.0), Flow([(0, 1.0), (1, 1.0)], 1, weight=9.0)
    for flow in (heavy, light, capped, thin):
        network.add(flow, 0.0)
    network.solve(0.0)
    assert [network.rate(flow) for flow in (heavy, light, capped, thin)] == [6.0, 2.0, 1.0, 3.0]


def test_a_link_without_capacity_stalls_its_flows_only():
    network = FluidNetwork(np.array([8.0, 8.0]))
    network.add(Flow([(0, 1.0)], 8, owner="stalls"), 0.0)
    network.add(Flow([(0, 1.0), (1, 1.0)], 8, owner="stalls too"), 0.0)
    network.add(Flow([(1, 1.0)], 8, owner="goes on"), 0.0)
    network.set_capacity(0, 0.0, 0.0)
    assert drain(network) == [(1.0, "goes on")]


def test_bits_moved_before_a_change_of_capacity_count():
    network = FluidNetwork(np.array([10.0]))
    network.add(Flow([(0, 1.0)], 100, owner="a"), 0.0)
    network.set_capacity(0, 5.0, 4.0)
    assert drain(network, 4.0) == [(16.0, "a")]


def test_small_flows_stay_exact_after_a_long_busy_time():
    network = FluidNetwork(np.array([1e9]))
    network.add(Flow([(0, 1.0)], 1e18, owner="long"), 0.0)
    network.add(Flow([(0, 1.0)], 1e18, owner="long"), 0.0)
    network.solve(0.0)
    network.add(Flow([(0, 1.0)], 1e3, owner="small"), 1e6)
    network.solve(1e6)
    assert network.next_completion() - 1e6 == pytest.approx(3e-6, rel=1e-4)  # the clock's own ulp
    flow = network.finished(network.next_completion())[0]
    assert flow.owner == "small"


@st.composite
def histories(draw):
    """A random network and what happens to it: (capacity, unshared, [(wait, action), …])."""
    n_links = draw(st.integers(1, 8))
    ties = draw(st.booleans())
    amount = st.sampled_from([0.0, 1.0, 2.0, 5.0]) if ties else st.floats(0.1, 10)
    capacity = draw(st.lists(amount, min_size=n_links, max_size=n_links))
    unshared = draw(st.lists(st.integers(0, 9), min_size=n_links, max_size=n_links))
    links = st.lists(st.integers(0, n_links - 1), min_size=1, max_size=4, unique=True)
    positive = st.sampled_from([0.5, 1.0, 2.0]) if ties else st.floats(0.2, 5)
    cap = st.one_of(st.just(np.inf), positive)
    add = st.tuples(st.just("add"), links, positive, st.floats(0.01, 20), positive, cap)
    change = st.tuples(st.just("capacity"), st.integers(0, n_links - 1), amount)
    cancel = st.tuples(st.just("cancel"), st.integers(0, 99))
    recap = st.tuples(st.just("cap"), st.integers(0, 99), positive)
    wait = st.one_of(st.just(0.0), st.floats(0, 2))
    steps = st.lists(
        st.tuples(wait, st.one_of(add, add, add, change, cancel, recap)), min_size=1, max_size=40
    )
    return np.array(capacity), np.array(unshared) == 0, draw(steps)


def play(history, inspect):
    """Run a history on the engine; call `inspect(network, alive, now)` after every event."""
    capacity, unshared, steps = history
    network = FluidNetwork(capacity.copy(), unshared)
    alive: list[Flow] = []
    now = 0.0

    def advance(until):
        nonlocal now
        while (when := network.next_completion()) <= until and when < np.inf:
            now = when
            for flow in network.finished(now):
                alive.remove(flow)
            network.solve(now)
            inspect(network, alive, now)

    for wait, (kind, *rest) in steps:
        advance(now + wait)
        now += max(0.0, wait)
        if kind == "add":
            links, consumption, size, weight, cap = rest
            flow = Flow([(link, consumption) for link in links], size, weight, cap, (now, size))
            network.add(flow, now)
            alive.append(flow)
        elif kind == "capacity":
            network.set_capacity(rest[0], rest[1], now)
        elif alive:
            flow = alive[rest[0] % len(alive)]
            if kind == "cap":
                network.set_cap(flow, rest[1], now)
            else:
                network.remove(flow, now)
                alive.remove(flow)
        network.solve(now)
        inspect(network, alive, now)
    advance(np.inf)


@settings(max_examples=60, deadline=None)
@given(histories())
def test_rates_are_max_min_fair_after_every_event(history):
    def inspect(network, alive, now):
        arguments = problem(alive, network.capacity, history[1])
        rates = np.array([network.rate(flow) for flow in alive])
        if alive:
            assert check_rates(rates, *arguments) is None
            assert rates == pytest.approx(max_min_rates(*arguments), rel=1e-9)

    play(history, inspect)


def test_the_certificate_rejects_wrong_rates():
    arguments = problem([Flow([(0, 1.0)], 1), Flow([(0, 1.0)], 1)], [2.0])
    assert check_rates(np.array([1.0, 1.0]), *arguments) is None
    assert "overloaded" in check_rates(np.array([1.0, 1.1]), *arguments)
    assert "bottleneck" in check_rates(np.array([0.5, 1.5]), *arguments)
    assert "cap" in check_rates(np.array([-1.0, 1.0]), *arguments)
