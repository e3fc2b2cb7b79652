"""Payloads over links that vary: integrals, outages, failures, repeatability."""

import hashlib
import math
import os
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from fedsim.errors import NetworkError
from fedsim.network import (
    Correlated,
    Failure,
    GilbertElliott,
    Mobility,
    OnOff,
    Redraw,
    Scheduled,
    Sinusoid,
    Trace,
    graph_network,
    read_trace,
    star_network,
)
from fedsim.network.links import LinkState

MBIT = 125_000  # bytes that take a second at 1 Mbit/s
DATA = Path(os.environ.get("FEDSIM_DATA", Path(__file__).parents[2] / "../shared/data"))
TRACES = sorted(DATA.glob("traces/*/*.csv"))


@pytest.fixture
def env():
    return simpy.Environment()


def line(env, n_links=1, **options):
    """Return a network 0 - 1 - … of 1 Mbit/s links without latency."""
    graph = nx.path_graph(n_links + 1)
    nx.set_edge_attributes(graph, 1e6, "bandwidth")
    return graph_network(env, graph, **options)


def outage(start, end, **what):
    return Failure(**(what or {"link": "0-1"}), start=start, end=end)


def sent_at(env, network, time, source, destination, size_bytes):
    """Send a payload later; return a list that will hold its delivery."""
    box = []

    def send():
        yield env.timeout(time)
        box.append((yield network.transfer(source, destination, size_bytes)))

    env.process(send())
    return box


# A change on a link, by hand-computed times: (options, failures, outcome, time, reason)
TABLE = {
    "stall": ({}, [outage(0.5, 3.0)], "delivered", 4.5, ""),
    "stall twice": ({}, [outage(0.5, 1.0), outage(1.25, 9.0)], "delivered", 10.25, ""),
    "down before it starts": ({}, [outage(0.0, 2.0)], "delivered", 4.0, ""),
    "down at its completion": ({}, [outage(2.0, 5.0)], "delivered", 2.0, ""),
    "up again at once": ({}, [outage(0.5, 1.0), outage(1.0, 1.5)], "delivered", 3.0, ""),
    "stall timeout": ({"stall_timeout": 2.0}, [outage(0.5, 9.0)], "failed", 2.5, "stalled"),
    "stall below timeout": ({"stall_timeout": 2.0}, [outage(0.5, 2.0)], "delivered", 3.5, ""),
    "interrupted stalls": (
        {"stall_timeout": 2.0},
        [outage(0.5, 2.0), outage(2.1, 3.6)],
        "delivered",
        5.0,
        "",
    ),
    "fail": ({"link_down": "fail"}, [outage(0.5, 3.0)], "failed", 0.5, "link 0>1 went down"),
    "fail at start": ({"link_down": "fail"}, [outage(0.0, 3.0)], "failed", 0.0, "link 0>1 is down"),
    "fail and retry": (
        {"link_down": "fail", "retries": 1, "backoff": 4.0},
        [outage(0.5, 3.0)],
        "delivered",
        6.5,
        "",
    ),
    "retries end": (
        {"link_down": "fail", "retries": 2, "backoff": 1.0},
        [outage(0.5, 99.0)],
        "failed",
        3.5,
        "link 0>1 is down",
    ),
    "timeout while stalled": ({"timeout": 1.5}, [outage(0.5, 3.0)], "failed", 1.5, "timeout"),
    "completion at the timeout": ({"timeout": 2.0}, [], "delivered", 2.0, ""),
    "node dies": ({}, [outage(0.5, 3.0, node=1)], "failed", 0.5, "node 1 is down"),
    "node dies and returns": (
        {"retries": 3, "backoff": 1.0},
        [outage(0.5, 3.0, node=1)],
        "delivered",
        5.5,
        "",
    ),
    "relay dies": ({}, [outage(0.5, 3.0, node=2)], "delivered", 2.0, ""),
    "partition heals": ({}, [outage(0.5, 3.0, parts=[[0], [1, 2]])], "delivered", 4.5, ""),
    "no part of a partition": ({}, [outage(0.5, 3.0, parts=[[0], [2]])], "delivered", 2.0, ""),
}


@pytest.mark.parametrize("name", TABLE)
def test_what_happens_to_a_payload_of_two_seconds(env, name):
    options, failures, outcome, time, reason = TABLE[name]
    network = line(env, 2, failures=failures, **options)
    transfer = network.transfer(0, 1, 2 * MBIT)
    env.run()
    delivery = transfer.value
    assert (delivery.outcome, delivery.finished, delivery.reason) == (
        outcome,
        pytest.approx(time, rel=1e-12),
        reason,
    )
    assert network.why_stalled() is None


def test_a_dead_relay_stalls_what_crosses_it(env):
    network = line(env, 2, failures=[outage(0.5, 3.0, node=1)])
    transfer = network.transfer(0, 2, 2 * MBIT)
    env.run()
    assert transfer.value.finished == pytest.approx(4.5)


def test_a_link_down_during_the_latency_phase_fails_a_payload_there(env):
    network = star_network(
        env,
        uplink_bps=[1e6],
        downlink_bps=[1e6],
        latency=2.0,
        link_down="fail",
        failures=[Failure(link="access-0", start=1.0, end=9.0)],
    )
    transfer = network.transfer(1, 0, MBIT)
    env.run()
    assert (transfer.value.finished, transfer.value.reason) == (1.0, "link down-0 went down")


def test_rerouting_waits_where_there_is_no_other_route(env):
    network = line(env, link_down="reroute", failures=[outage(0.5, 3.0)])
    transfer = network.transfer(0, 1, 2 * MBIT)
    env.run()
    assert transfer.value.finished == pytest.approx(4.5)


def test_a_payload_released_on_a_broken_route_takes_another_one(env):
    graph = nx.cycle_graph(4)
    nx.set_edge_attributes(graph, 1e6, "bandwidth")
    network = graph_network(env, graph, link_down="reroute", failures=[outage(0.0, 9.0)])
    transfer = network.transfer(0, 1, MBIT)
    env.run()
    assert [network.link_name(k) for k in transfer.value.route] == ["0>3", "3>2", "2>1"]


def test_scheduled_failures_can_be_the_link_model(env):
    network = line(env, link_model=Scheduled(failures=[outage(0.5, 3.0)]))
    transfer = network.transfer(0, 1, 2 * MBIT)
    env.run()
    assert transfer.value.finished == pytest.approx(4.5)


def test_failures_of_what_does_not_exist_are_refused(env):
    with pytest.raises(NetworkError, match="no link is called '5-6'"):
        line(env, failures=[outage(0.0, 1.0, link="5-6")])
    with pytest.raises(NetworkError, match="node 7 cannot fail"):
        line(env, failures=[outage(0.0, 1.0, node=7)])


def test_a_blackout_for_good_is_explained(env):
    network = line(env, failures=[Failure(link="0-1", start=1.0)])
    network.transfer(0, 1, 2 * MBIT)
    env.run()
    assert env.now == pytest.approx(1.0)
    assert "waits for link 0>1" in network.why_stalled()


def test_a_model_that_stands_still_is_caught(env):
    class Stuck:
        def bind(self, seed, link):
            return self

        def state_at(self, time):
            return LinkState()

        def next_change(self, time):
            return time

    network = line(env, link_model=Stuck())
    with pytest.raises(NetworkError, match="its model says at 0 s that it changes next at 0 s"):
        network.transfer(0, 1, MBIT)


def test_events_without_progress_of_time_are_caught(env):
    network = line(env)

    def spin():
        while True:
            yield network.transfer(0, 1, 0)

    env.process(spin())
    with pytest.raises(NetworkError, match="time does not go on"):
        env.run(until=0.5)


def finish_of(trace, offset, size_bits, end="loop"):
    """Return when the integral of a trace from an offset on reaches a size."""
    spans = [
        (b - a, rate) for (a, b), rate in zip(pairwise(trace.times), trace.rates_bps, strict=True)
    ]
    now, left, position = 0.0, size_bits, 0.0
    while True:
        for length, rate in spans:
            skip = min(max(offset - position, 0.0), length)
            position += length
            length -= skip
            if rate * length >= left:
                return now + left / rate
            left -= rate * length
            now += length
        if end == "hold":
            return now + left / trace.rates_bps[-1]


def trace_finish(path, size_bytes, **options):
    env = simpy.Environment()
    network = line(env, link_model=Trace(path=str(path), **options))
    transfer = network.transfer(0, 1, size_bytes)
    env.run()
    return transfer.value.finished


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), min_size=1, max_size=12),
    st.integers(1, 5000),
    st.integers(0, 30),
)
def test_a_payload_ends_when_the_integral_of_the_trace_reaches_it(tmp_path_factory, spans, n, at):
    if not any(rate for _, rate in spans):
        spans.append((3, 1))
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    times = np.cumsum([0, *(length / 8 for length, _ in spans)])
    rates = [rate * 800 for _, rate in spans] + [0]
    rows = "".join(f"{t},{r}\n" for t, r in zip(times, rates, strict=True))
    path.write_text("time_s,bandwidth_bps\n" + rows)
    trace = read_trace(path)
    offset = (at / 8) % trace.duration
    expected = finish_of(trace, offset, 8 * n)
    assert trace_finish(path, n, offset=offset) == pytest.approx(expected, rel=1e-9)


@pytest.mark.skipif(not TRACES, reason="the recorded traces are not there (FEDSIM_DATA)")
@pytest.mark.parametrize("part", range(4))
def test_recorded_traces_are_integrated_exactly(part):
    for path in TRACES[part::4]:
        trace = read_trace(path)
        size = int(trace.mean_bps * trace.duration * 1.6 / 8)
        for offset in (0.0, 0.37 * trace.duration):
            expected = finish_of(trace, offset, 8 * size)
            assert trace_finish(path, size, offset=offset) == pytest.approx(expected, rel=1e-9)


def events_of(network, env, seed):
    """Send many payloads at random times; return what happened to each, hashed."""
    rng = random.Random(seed)
    log = []

    def note(delivery):
        route = [network.link_name(link) for link in delivery.route]
        log.append((replace(delivery, route=()), route))

    network.on_close = note
    for _ in range(40):
        source, destination = rng.sample(range(6), 2)
        sent_at(env, network, rng.uniform(0, 20), source, destination, rng.randint(1, 3 * MBIT))
    env.run()
    return hashlib.sha256(repr(log).encode()).hexdigest()


@pytest.mark.parametrize("policy", ["stall", "fail", "reroute"])
def test_runs_repeat_bit_for_bit_whatever_the_order_of_links(policy):
    edges = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (0, 3), (1, 4)]

    def run(edges, seed=3):
        env = simpy.Environment()
        graph = nx.Graph()
        for a, b in edges:
            graph.add_edge(a, b, bandwidth=1e6 * (1 + (a * b) % 3), latency=0.01)
        network = graph_network(
            env,
            graph,
            link_model=OnOff(mean_up=5.0, mean_down=1.0),
            link_down=policy,
            message_loss=0.1,
            retries=1,
            seed=seed,
        )
        return events_of(network, env, 1)

    first = run(edges)
    assert run(edges) == first
    assert run([(b, a) for a, b in reversed(edges)]) == first
    assert run([*edges, (0, 6), (6, 7)]) == first
    assert run(edges, seed=4) != first


MODELS = [
    OnOff(mean_up=3.0, mean_down=1.0),
    GilbertElliott(mean_good=2.0, mean_bad=1.0, loss_bad=0.2, scale_bad=0.3),
    Sinusoid(period=20.0, amplitude=1.0, steps=16),
    Correlated(mean_up=4.0, mean_down=1.0, cells=2),
    Redraw(density=0.6, period=1.5),
    Mobility(range=500.0, speed_min=50.0, speed_max=90.0, rate="path_loss"),
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("loss", ["none", "goodput", "tcp", "drop"])
def test_bytes_in_are_bytes_delivered_plus_bytes_lost(model, loss):
    env = simpy.Environment()
    network = star_network(
        env,
        uplink_bps=np.full(5, 2e6),
        downlink_bps=np.full(5, 3e6),
        latency=0.05,
        server_up_bps=4e6,
        link_model=model,
        message_loss=0.2,
        loss=loss,
        seed=2,
    )
    rng = random.Random(0)
    boxes = [
        sent_at(env, network, rng.uniform(0, 10), *rng.choice([(i, 5), (5, i)]), 50_000 * (1 + i))
        for i in range(5)
        for _ in range(6)
    ]
    env.run()
    deliveries = [box[0] for box in boxes]
    assert all(d.outcome in ("delivered", "lost") for d in deliveries)
    fastest = 2 * 3e6  # a sinusoid may double the bandwidth
    assert all(d.finished - d.started >= 8 * d.size_bytes / fastest + 0.0499 for d in deliveries)
    uses = {use.name: use for use in network.link_uses()}
    for i in range(5):
        sent = sum(d.size_bytes for d in deliveries if d.source == i)
        if not sent:
            continue
        carried = uses[f"up-{i}"].carried_bytes
        if loss in ("none", "drop"):
            assert carried == pytest.approx(sent, rel=1e-9)
        else:
            assert sent * (1 - 1e-9) <= carried <= 1.25 * sent * (1 + 1e-9)
        assert uses[f"up-{i}"].busy_time <= env.now


def test_links_of_a_round_exist_or_not_and_payloads_under_way_finish(env):
    network = line(env, 2)
    first = network.transfer(0, 1, 2 * MBIT)
    env.run(until=1.0)
    network.start_round(1, edges=[(1, 2)])
    other = network.transfer(2, 1, MBIT)
    env.run()
    assert (first.value.finished, other.value.finished) == (2.0, 2.0)
    gone = network.transfer(0, 1, MBIT)
    env.run()
    assert not gone.triggered
    assert "0>1" in network.why_stalled()
    gone.cancel()
    network.start_round(2)
    back = network.transfer(0, 1, MBIT)
    env.run()
    assert back.value.finished == 3.0


def test_round_links_follow_the_seed_and_the_round(env):
    graph = nx.complete_graph(8)
    nx.set_edge_attributes(graph, 1e6, "bandwidth")

    def exists(network, number):
        network.start_round(number)
        return [network.timeline(f"{a}-{b}", 0.0, 1.0)[0][1] > 0 for a, b in graph.edges]

    networks = [
        graph_network(env, graph, link_model=Redraw(density=0.5), seed=s) for s in (1, 1, 2)
    ]
    rounds = [[exists(network, r) for r in (3, 4)] for network in networks]
    assert rounds[0] == rounds[1] != rounds[2]
    assert rounds[0][0] != rounds[0][1]


def test_the_timeline_of_a_link_shows_model_and_failures(env):
    network = line(env, failures=[outage(2.0, 3.0), outage(2.5, 4.0)])
    assert network.timeline("0-1", 0.0, 9.0) == [(0.0, 1e6), (2.0, 0.0), (4.0, 1e6)]
    assert network.timeline("1>2" if network.n_nodes > 2 else "1>0", 3.0, 9.0)[0] == (3.0, 0.0)


def test_contacts_of_moving_nodes_carry_payloads(env):
    graph = nx.complete_graph(3)
    nx.set_edge_attributes(graph, 1e6, "bandwidth")
    model = Mobility(range=300.0, speed_min=20.0, speed_max=60.0)
    network = graph_network(env, graph, link_model=model, seed=1)
    transfer = network.transfer(0, 1, 20 * MBIT)
    env.run()
    steps = [*network.timeline("0-1", 0.0, transfer.value.finished), (transfer.value.finished, 0)]
    carried = sum(rate * (b - a) for (a, rate), (b, _) in pairwise(steps))
    assert carried == pytest.approx(20 * 8 * MBIT, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ({}, 0.01 + 1.0),
        ({"header_bytes": MBIT}, 0.01 + 2.0),
        ({"packet_bytes": 1000, "packet_header_bytes": 40}, 0.01 + 1.04),
        ({"header_efficiency": 0.8}, 0.01 + 1.25),
        ({"handshake_rtts": 1.5}, 0.04 + 1.0),
        ({"window_bytes": 1250}, 0.01 + 2.0),
        # 1000, 2000, … bytes a round trip of 20 ms: 100 kbit/s doubles until it passes 1 Mbit/s
        ({"startup": "slow_start", "packet_bytes": 25}, 0.01 + 0.08 + (1 - 0.02 * 1.5)),
    ],
)
def test_protocol_options_take_the_time_worked_out_by_hand(env, options, seconds):
    graph = nx.path_graph(2)
    graph.edges[0, 1].update(bandwidth=1e6, latency=0.01)
    network = graph_network(env, graph, **options)
    transfer = network.transfer(0, 1, MBIT)
    env.run()
    assert transfer.value.finished == pytest.approx(seconds, rel=1e-12)


def lossy(env, loss, p=0.2, latency=0.01, **options):
    graph = nx.path_graph(2)
    graph.edges[0, 1].update(bandwidth=1e6, latency=latency, loss=p)
    return graph_network(env, graph, loss=loss, **options)


def test_repeated_packets_take_capacity_in_goodput_mode(env):
    network = lossy(env, "goodput")
    transfer = network.transfer(0, 1, MBIT)
    env.run()
    assert transfer.value.finished == pytest.approx(0.01 + 1 / 0.8)
    assert network.link_uses()[0].carried_bytes == pytest.approx(MBIT / 0.8)


def test_loss_caps_the_rate_of_tcp_where_ten_losses_are_expected(env):
    network = lossy(env, "tcp", p=0.02, latency=0.1)
    long, short = network.transfer(0, 1, 8 * MBIT), network.transfer(1, 0, 1448)
    env.run()
    rate = 1448 * 8 / 0.2 * math.sqrt(3 / (4 * 0.02))
    assert long.value.finished == pytest.approx(0.1 + 64 * MBIT / rate)
    assert short.value.finished == pytest.approx(0.1 + 1448 * 8 / 1e6 / 0.98)


def test_dropped_messages_are_as_many_as_packets_survive(env):
    network = lossy(env, "drop", p=0.02, packet_bytes=1000)
    transfers = [network.transfer(0, 1, 20_000) for _ in range(3000)]
    env.run()
    delivered = np.mean([t.value.outcome == "delivered" for t in transfers])
    expected = 0.98**20
    assert delivered == pytest.approx(expected, abs=3 * math.sqrt(expected * (1 - expected) / 3000))


def test_drops_follow_a_loss_that_changes_during_the_message(env):
    # Half of the packets pass in the good state, half in the bad one, if it changes at half time.
    graph = nx.path_graph(2)
    graph.edges[0, 1].update(bandwidth=1e6)

    class HalfTime:
        def bind(self, seed, link):
            return self

        def state_at(self, time):
            return LinkState(loss=0.05 if time >= 0.5 else 0.0)

        def next_change(self, time):
            return 0.5 if time < 0.5 else math.inf

    def survives(seed):
        env = simpy.Environment()
        network = graph_network(
            env, graph, loss="drop", link_model=HalfTime(), packet_bytes=6250, seed=seed
        )
        transfer = network.transfer(0, 1, MBIT)
        env.run()
        assert transfer.value.finished == pytest.approx(1.0)
        return transfer.value.outcome == "delivered"

    expected = 0.95**10
    share = np.mean([survives(seed) for seed in range(600)])
    assert share == pytest.approx(expected, abs=3 * math.sqrt(expected * (1 - expected) / 600))


def test_bursts_let_more_messages_pass_than_independent_losses(env):
    model = GilbertElliott(to_bad=0.002, to_good=0.1, loss_bad=0.5)
    graph = nx.path_graph(2)
    network = graph_network(env, graph, loss="drop", link_model=model, packet_bytes=1000)
    transfers = [network.transfer(0, 1, 100_000) for _ in range(2000)]
    env.run()
    delivered = np.mean([t.value.outcome == "delivered" for t in transfers])
    survival = network._states.figures(0, 0.0)[3].survival(100)
    assert survival > (1 - 0.5 * 0.002 / 0.102) ** 100
    error = 3 * math.sqrt(survival * (1 - survival) / 2000)
    assert delivered == pytest.approx(survival, abs=error)


def test_fairness_by_round_trip_time_and_without_contention():
    def finished(fairness):
        env = simpy.Environment()
        network = star_network(
            env,
            uplink_bps=[1e9, 1e9],
            downlink_bps=[1e9, 1e9],
            latency=[0.1, 0.3],
            server_up_bps=1e6,
            fairness=fairness,
        )
        transfers = [network.transfer(i, 2, MBIT) for i in range(2)]
        env.run()
        return [t.value.finished for t in transfers]

    # From 0.3 s on the nearer one has 3/4 of the link: 0.2 + 0.75 t = 1.
    assert finished("rtt") == pytest.approx([0.3 + 0.8 / 0.75, 2.1])
    assert finished("none") == pytest.approx([1.1, 1.3])


def test_a_network_explains_what_bounds_a_payload(env):
    network = star_network(
        env, uplink_bps=[1e6] * 2, downlink_bps=[1e6] * 2, latency=0.5, server_up_bps=1e6
    )
    transfers = [network.transfer(i, 2, MBIT) for i in range(2)]
    assert "first byte is not there yet" in network.explain(transfers[0])
    env.run(until=1.0)
    assert "at 500000 bit/s, bounded by link server-up" in network.explain(transfers[0])
    env.run()
    assert "delivered at 2.5 s" in network.explain(transfers[0])


def test_link_uses_count_bytes_and_busy_time_of_partial_payloads_too(env):
    network = line(env, 2)
    sent_at(env, network, 1.0, 0, 1, MBIT)
    cancelled = network.transfer(1, 2, 9 * MBIT)
    env.run(until=4.0)
    cancelled.cancel()
    env.run()
    uses = {use.name: use for use in network.link_uses()}
    assert uses.keys() == {"0>1", "1>2"}
    assert (uses["0>1"].carried_bytes, uses["0>1"].busy_time) == (MBIT, 1.0)
    assert uses["1>2"].carried_bytes == pytest.approx(4 * MBIT)
    assert uses["1>2"].busy_time == 4.0
    assert uses["0>1"].utilisation(4.0) == pytest.approx(0.25)


# Linux TCP between two network namespaces, 20 Mbit/s, 10 ms one way; seconds from connect to the
# last byte: sizes in MB, starts, measured durations (medians; cubic).
MEASURED = [
    ([1], [0.0], [0.476]),
    ([5], [0.0], [2.132]),
    ([20], [0.0], [8.348]),
    ([5, 5], [0.0] * 2, [4.19]),
    ([5, 5, 5], [0.0] * 3, [6.27]),
    ([5, 5, 5, 5], [0.0] * 4, [8.32]),
    ([20, 20, 20, 20], [0.0] * 4, [33.4]),
    ([10, 5, 2], [0.0, 1.0, 2.0], [7.14, 4.32, 2.92]),
    ([5, 5, 5, 5], [0.0, 0.5, 1.0, 1.5], [6.88, 5.70, 7.35, 6.80]),
]


def tcp_last(sizes, starts, startup="none"):
    env = simpy.Environment()
    graph = nx.path_graph(2)
    graph.edges[0, 1].update(bandwidth=20e6, latency=0.01)
    network = graph_network(
        env, graph, header_efficiency=1448 / 1500, handshake_rtts=1, startup=startup
    )
    for size, start in zip(sizes, starts, strict=True):
        sent_at(env, network, start, 0, 1, int(size * 1e6))
    env.run()
    return env.now


@pytest.mark.parametrize("startup", ["none", "slow_start"])
@pytest.mark.parametrize(("sizes", "starts", "measured"), MEASURED)
def test_the_last_completion_is_near_that_of_real_tcp(sizes, starts, measured, startup):
    real = max(start + each for start, each in zip(starts, measured, strict=False))
    assert real == pytest.approx(tcp_last(sizes, starts, startup), rel=0.08)


def test_slow_start_brings_small_transfers_near_real_tcp():
    assert tcp_last([1], [0.0], "slow_start") == pytest.approx(0.476, rel=0.05)
    assert tcp_last([0.1], [0.0], "slow_start") == pytest.approx(0.110, rel=0.25)
