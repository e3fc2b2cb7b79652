import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.network.engine import Flow, FluidNetwork
from fedsim.network.fluid import check_rates, max_min_rates


def problem(flows, capacity, unshared=None):
    """Return the arguments of `max_min_rates` for engine flows."""
    capacity = np.asarray(capacity, dtype=float)
    uses = np.array([use for flow in flows for use in flow.uses], dtype=float).reshape(-1, 2)
    flow = np.repeat(np.arange(len(flows)), [len(flow.uses) for flow in flows])
    link, consumption = uses[:, 0].astype(np.int64), uses[:, 1]
    cap = np.array([flow.cap for flow in flows], dtype=float)
    if unshared is not None:
        own = unshared[link]  # a link of a flow's own is a cap of that flow
        np.minimum.at(cap, flow[own], capacity[link[own]] / consumption[own])
        flow, link, consumption = flow[~own], link[~own], consumption[~own]
    return capacity, flow, link, consumption, np.array([flow.weight for flow in flows]), cap


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


def play(history, inspect=None):
    """Run a history on the engine, looking after every event; return [(completion, owner), …]."""
    capacity, unshared, steps = history
    network = FluidNetwork(capacity.copy(), unshared)
    added: list[Flow] = []
    alive: list[Flow] = []
    done = []
    now = 0.0

    def settle():
        network.solve(now)
        if inspect is not None and alive:
            inspect(network, alive, now)

    def advance(until):
        nonlocal now
        while (when := network.next_completion()) <= until and when < np.inf:
            now = when
            for flow in network.finished(now):
                alive.remove(flow)
                done.append((now, flow.owner))
            settle()

    for wait, (kind, *rest) in steps:
        until = now + wait
        advance(until)
        now = until
        if kind == "add":
            links, consumption, size, weight, cap = rest
            flow = Flow([(link, consumption) for link in links], size, weight, cap, len(added))
            network.add(flow, now)
            added.append(flow)
            alive.append(flow)
        elif kind == "capacity":
            network.set_capacity(rest[0], rest[1], now)
        elif added and (flow := added[rest[0] % len(added)]) in alive:
            if kind == "cap":
                network.set_cap(flow, rest[1], now)
            else:
                network.remove(flow, now)
                alive.remove(flow)
        settle()
    advance(np.inf)
    return done


@settings(max_examples=60, deadline=None)
@given(histories())
def test_rates_are_max_min_fair_after_every_event(history):
    def inspect(network, alive, now):
        arguments = problem(alive, network.capacity, history[1])
        rates = np.array([network.rate(flow) for flow in alive])
        assert check_rates(rates, *arguments) is None
        assert rates == pytest.approx(max_min_rates(*arguments), rel=1e-9)

    play(history, inspect)


def test_the_certificate_rejects_wrong_rates():
    arguments = problem([Flow([(0, 1.0)], 1), Flow([(0, 1.0)], 1)], [2.0])
    assert check_rates(np.array([1.0, 1.0]), *arguments) is None
    assert "overloaded" in check_rates(np.array([1.0, 1.1]), *arguments)
    assert "bottleneck" in check_rates(np.array([0.5, 1.5]), *arguments)
    assert "cap" in check_rates(np.array([-1.0, 1.0]), *arguments)


def random_history(seed, max_links=40, max_flows=200):
    """Return a larger history than `histories` draws, with ties or without, on a star or not."""
    rng = np.random.default_rng(seed)
    n_links = int(max_links ** rng.random())
    n_flows = int(max_flows ** rng.random())
    has_ties, is_star = rng.random(2) < 0.5

    def amount():
        return float(rng.choice([0, 1, 2, 5]) if has_ties else 10 * rng.random())

    def positive():
        return float(rng.choice([0.5, 1, 2]) if has_ties else rng.uniform(0.2, 5))

    def links():
        if is_star and n_links > 2:
            return [0, int(rng.integers(1, n_links))]
        return rng.permutation(n_links)[: rng.integers(1, 7)].tolist()

    steps = []
    for _ in range(n_flows):
        cap = np.inf if rng.random() < 0.5 else positive()
        consumption = 1.0 if rng.random() < 0.7 else positive()
        weight = 1.0 if rng.random() < 0.5 else positive()
        wait = float(rng.exponential(0.1)) * (rng.random() < 0.7)
        size = float(rng.uniform(0.01, 4))
        steps.append((wait, ("add", links(), consumption, size, weight, cap)))
        other = rng.random()
        if other < 0.2:
            steps.append((0.0, ("capacity", int(rng.integers(n_links)), amount())))
        elif other < 0.3:
            steps.append((0.01, ("cancel", int(rng.integers(100)))))
        elif other < 0.4:
            steps.append((0.0, ("cap", int(rng.integers(100)), positive())))
    capacity = np.array([amount() for _ in range(n_links)])
    return capacity, rng.random(n_links) < 0.1, steps


def certify(seeds):
    for seed in seeds:
        history = random_history(seed)

        def inspect(network, alive, now, unshared=history[1], seed=seed):
            rates = np.array([network.rate(flow) for flow in alive])
            found = check_rates(rates, *problem(alive, network.capacity, unshared))
            assert found is None, (seed, now, found)

        play(history, inspect)


def test_rates_of_larger_networks_are_max_min_fair_after_every_event():
    certify(range(40))


@pytest.mark.slow
@pytest.mark.parametrize("first", [1000, 1500, 2000, 2500])
def test_rates_of_two_thousand_networks_are_max_min_fair_after_every_event(first):
    certify(range(first, first + 500))


def full_resolve(history):
    """Play a history with a full solve after every event; return [(completion, owner), …]."""
    capacity, unshared, steps = history
    capacity = capacity.copy()
    added: list[Flow] = []
    alive: list[Flow] = []
    done = []
    now = 0.0

    def advance(until):
        nonlocal now
        while alive and now < until:
            rate = max_min_rates(*problem(alive, capacity, unshared))
            left = np.array([flow.bits for flow in alive])
            eta = np.full(len(alive), np.inf)
            np.divide(left, rate, out=eta, where=rate > 0)
            step = min(eta.min(), until - now)
            if step == np.inf:
                return
            now += step
            for flow, moved, wait in zip(list(alive), rate * step, eta, strict=True):
                flow.bits = max(flow.bits - moved, 0.0)
                if wait <= step * (1 + 1e-12):
                    alive.remove(flow)
                    done.append((now, flow.owner))

    for wait, (kind, *rest) in steps:
        until = now + wait
        advance(until)
        now = until
        if kind == "add":
            links, consumption, size, weight, cap = rest
            uses = [(link, consumption) for link in links]
            added.append(Flow(uses, size, weight, cap, len(added)))
            alive.append(added[-1])
        elif kind == "capacity":
            capacity[rest[0]] = rest[1]
        elif added and (flow := added[rest[0] % len(added)]) in alive:
            if kind == "cap":
                flow.cap = rest[1]
            else:
                alive.remove(flow)
    advance(np.inf)
    return done


def compare_with_full_resolve(seeds):
    for seed in seeds:
        history = random_history(seed, max_links=15, max_flows=60)
        expected = {owner: time for time, owner in full_resolve(history)}
        found = {owner: time for time, owner in play(history)}
        assert found == pytest.approx(expected, rel=1e-9), seed


def test_local_solving_in_virtual_time_equals_a_full_solve_at_every_event():
    compare_with_full_resolve(range(40))


@pytest.mark.slow
def test_five_hundred_runs_equal_a_full_solve_at_every_event():
    compare_with_full_resolve(range(1000, 1500))
