import networkx as nx
import numpy as np
import pytest
import simpy

from fedsim import streams
from fedsim.errors import NetworkError
from fedsim.network import Failure, OnOff, graph_network, star_network
from fedsim.network.fates import keyed_uniform
from fedsim.network.payloads import Spread

MBIT = 125_000  # bytes that take a second at 1 Mbit/s


@pytest.fixture
def env():
    return simpy.Environment()


def star(env, n=4, **options):
    given = {"uplink_bps": [1e6] * n, "downlink_bps": [1e6] * n, "latency": 0.5} | options
    return star_network(env, **given)


def test_a_lone_payload_takes_latency_plus_size_over_rate(env):
    network = star(env)
    transfer = network.transfer(1, network.server, MBIT)
    env.run()
    delivery = transfer.value
    assert (delivery.started, delivery.first_byte, delivery.finished) == (0.0, 0.5, 1.5)
    assert delivery.outcome == "delivered"
    assert [network.link_name(link) for link in delivery.route] == ["up-1", "server-up"]


def test_the_server_link_is_shared_and_directions_are_independent(env):
    network = star(env, latency=0.0, server_up_bps=1e6)
    ups = [network.transfer(i, 4, MBIT) for i in range(4)]
    down = network.transfer(4, 0, MBIT)
    env.run()
    assert [t.value.finished for t in ups] == [4.0] * 4
    assert down.value.finished == 1.0


def test_copies_of_a_broadcast_cross_a_shared_link_as_one(env):
    network = star(env, server_down_bps=1e6, downlink_bps=[1e6, 1e6, 1e6, 5e5])
    copies = {link: 0 for i in range(4) for link in network.route(4, i)}
    for i in range(4):
        for link in network.route(4, i):
            copies[link] += 1
    sent = [network.transfer(4, i, MBIT, copies=copies) for i in range(4)]
    env.run()
    assert [t.value.finished for t in sent] == [1.5, 1.5, 1.5, 2.5]  # the latency in full
    carried = {use.name: use.carried_bytes for use in network.link_uses()}
    assert carried == {"server-down": MBIT} | {f"down-{i}": MBIT for i in range(4)}


def test_a_copy_of_a_broadcast_that_is_sent_again_travels_by_itself(env):
    network = star(env, latency=0.0, server_down_bps=1e6, message_loss=0.9, retries=99, seed=3)
    copies = {network.route(4, 0)[0]: 4} | {network.route(4, i)[1]: 1 for i in range(4)}
    sent = [network.transfer(4, i, MBIT, copies=copies) for i in range(4)]
    env.run()
    assert {t.value.outcome for t in sent} == {"delivered"}
    repeated = sum(t.value.attempts for t in sent) - 4
    assert repeated
    carried = {use.name: use.carried_bytes for use in network.link_uses()}
    assert carried["server-down"] == pytest.approx((1 + repeated) * MBIT)


def test_devices_of_a_star_reach_each_other_over_the_server(env):
    network = star(env, uplink_bps=[1e6] * 4, downlink_bps=[5e5] * 4)
    transfer = network.transfer(0, 3, MBIT)
    env.run()
    assert transfer.value.finished == 1.0 + 2.0
    assert [network.link_name(k) for k in transfer.value.route][::3] == ["up-0", "down-3"]


def test_a_payload_to_oneself_or_of_no_bytes_takes_no_bandwidth(env):
    network = star(env)
    own, empty = network.transfer(2, 2, 10**9), network.transfer(2, 4, 0)
    env.run()
    assert (own.value.finished, empty.value.finished) == (0.0, 0.5)


def test_a_lost_message_occupies_the_network_and_is_reported_when_it_would_arrive(env):
    network = star(env, message_loss=0.5, seed=3)
    transfers = [network.transfer(1, 4, MBIT) for _ in range(40)]
    env.run()
    assert {t.value.finished for t in transfers} == {40.5}
    lost = [t.value.outcome == "lost" for t in transfers]
    assert lost == (streams.uniform(3, "message-loss", 1, 4, np.arange(40)) < 0.5).tolist()


def test_scalar_keyed_draws_equal_the_vectorised_ones():
    key = int(streams.bits(9, "message-loss"))
    words = [(0, 0, 0), (3, 2**40, 5), (17, 4, 2**63 + 1)]
    assert [keyed_uniform(key, w) for w in words] == [
        float(streams.uniform(9, "message-loss", *(np.uint64(x) for x in w))) for w in words
    ]


def test_a_lost_message_is_sent_again_after_the_back_off(env):
    network = star(env, message_loss=0.999999, retries=2, backoff=10.0)
    transfer = network.transfer(1, 4, MBIT)
    env.run()
    assert transfer.value.attempts == 3
    assert transfer.value.finished == 3 * 1.5 + 10 + 20
    assert transfer.value.outcome == "lost"


def test_a_timeout_fails_a_payload_whatever_its_state(env):
    network = star(env, timeout=1.0)
    transfer, small = network.transfer(1, 4, MBIT), network.transfer(2, 4, MBIT // 10)
    env.run()
    assert (transfer.value.outcome, transfer.value.reason) == ("failed", "timeout")
    assert transfer.value.finished == 1.0
    assert small.value.outcome == "delivered"


def test_a_cancelled_payload_frees_its_share(env):
    network = star(env, latency=0.0)
    first, second = network.transfer(1, 4, MBIT), network.transfer(1, 4, MBIT)

    def give_up():
        yield env.timeout(1.0)
        second.cancel()
        second.cancel()

    env.process(give_up())
    env.run()
    assert (second.value.outcome, second.value.finished) == ("failed", 1.0)
    assert first.value.finished == 1.5


def test_a_completion_is_not_lost_to_a_cancellation_at_the_same_instant(env):
    network = star(env, latency=0.0)
    transfer = network.transfer(1, 4, MBIT)

    def give_up():
        yield env.timeout(1.0)
        transfer.cancel()

    env.process(give_up())
    env.run()
    assert transfer.value.outcome == "delivered"


@pytest.mark.parametrize(
    ("policy", "outcome", "finished"),
    [("stall", "delivered", 3.5), ("fail", "failed", 1.0), ("reroute", "delivered", 3.5)],
)
def test_link_down_policy(env, policy, outcome, finished):
    network = star(env, link_down=policy)
    transfer = network.transfer(1, 4, MBIT)

    def outage():
        yield env.timeout(1.0)
        network.set_link("up-1", up=False)
        yield env.timeout(2.0)
        network.set_link("up-1", up=True)

    env.process(outage())
    env.run()
    assert (transfer.value.outcome, transfer.value.finished) == (outcome, finished)


def test_reroute_keeps_the_bytes_and_pays_the_new_route_latency(env):
    graph = nx.Graph()
    graph.add_edge(0, 1, bandwidth=1e6, latency=0.0)
    graph.add_edge(0, 2, bandwidth=1e6, latency=1.0)
    graph.add_edge(2, 1, bandwidth=2e6, latency=1.0)
    network = graph_network(env, graph, link_down="reroute")
    transfer = network.transfer(0, 1, 2 * MBIT)

    def outage():
        yield env.timeout(0.5)
        network.set_link("0-1", up=False)

    env.process(outage())
    env.run()
    assert transfer.value.finished == 0.5 + 2.0 + 1.5
    assert [network.link_name(k) for k in transfer.value.route] == ["0>2", "2>1"]


def test_a_node_that_dies_fails_what_starts_or_ends_there(env):
    network = star(env)
    to_dead, other = network.transfer(4, 1, MBIT), network.transfer(4, 2, MBIT)

    def die():
        yield env.timeout(1.0)
        network.set_node(1, up=False)

    env.process(die())
    env.run()
    assert (to_dead.value.outcome, to_dead.value.reason) == ("failed", "node 1 is down")
    assert other.value.finished == 1.5
    assert network.transfer(1, 4, 1).callbacks is not None


def test_a_change_of_bandwidth_is_integrated_exactly(env):
    network = star(env, latency=0.0)
    transfer = network.transfer(1, 4, 2 * MBIT)

    def slow_down():
        yield env.timeout(0.5)
        network.set_link("up-1", bandwidth_bps=1e5)

    env.process(slow_down())
    env.run()
    assert transfer.value.finished == pytest.approx(0.5 + 15)


def test_an_idle_network_schedules_nothing(env):
    network = star(env, link_model=OnOff(mean_up=1.0, mean_down=1.0))
    assert env.peek() == np.inf
    transfer = network.transfer(1, 4, 10 * MBIT)
    env.run()
    assert transfer.value.outcome == "delivered"
    assert transfer.value.finished > 10.5
    assert env.peek() == np.inf


def test_a_network_that_can_never_deliver_says_why(env):
    network = star(env)
    assert network.why_stalled() is None
    network.set_link("up-1", up=False)
    network.transfer(1, 4, MBIT)
    env.run()
    assert "up-1" in network.why_stalled()


def test_histories_do_not_depend_on_other_links(env):
    def finished(n):
        env = simpy.Environment()
        network = star(env, n, link_model=OnOff(mean_up=2.0, mean_down=1.0), seed=5)
        transfers = [network.transfer(i, n, 5 * MBIT) for i in range(3)]
        env.run()
        return [t.value.finished for t in transfers]

    assert finished(3) == finished(50)


def test_half_duplex_edges_share_one_link_between_directions(env):
    graph = nx.path_graph(2)
    graph.edges[0, 1].update(bandwidth=1e6)
    network = graph_network(env, graph, duplex="half")
    both = [network.transfer(0, 1, MBIT), network.transfer(1, 0, MBIT)]
    env.run()
    assert [t.value.finished for t in both] == [2.0, 2.0]


def test_routes_take_the_least_latency_then_hops_then_the_smaller_nodes():
    graph = nx.Graph()
    for a, b, latency in [(0, 3, 3.0), (0, 2, 1.0), (2, 3, 1.0), (0, 1, 1.0), (1, 3, 1.0)]:
        graph.add_edge(a, b, bandwidth=1e6, latency=latency)

    def route(routing):
        env = simpy.Environment()
        network = graph_network(env, graph, routing=routing)
        transfer = network.transfer(0, 3, 1)
        env.run()
        return [network.link_name(k) for k in transfer.value.route]

    assert route("latency") == ["0>1", "1>3"]
    assert route("hops") == ["0>3"]


def test_impossible_networks_are_refused(env):
    with pytest.raises(NetworkError, match="link up-2: bandwidth must be positive"):
        star(env, uplink_bps=[1e6, 1e6, -5.0, 1e6])
    with pytest.raises(NetworkError, match="latency"):
        star(env, latency=-1.0)
    with pytest.raises(NetworkError, match="4 uplinks but 3"):
        star(env, downlink_bps=[1e6] * 3)
    graph = nx.Graph([(0, 1)])
    graph.add_node(2)
    network = graph_network(env, graph)
    with pytest.raises(NetworkError, match="no route from 0 to 2"):
        network.transfer(0, 2, 1)
    with pytest.raises(NetworkError, match="nodes are 0"):
        network.transfer(0, 9, 1)
    with pytest.raises(NetworkError, match="named twice"):
        graph_network(env, nx.MultiGraph([(0, 1), (0, 1)]))
    with pytest.raises(NetworkError, match="no link is called"):
        network.set_link("0-7", up=False)


def test_a_thousand_simultaneous_payloads_cost_a_few_events(env):
    network = star(env, 1000, latency=0.0, server_down_bps=1e7)
    for i in range(1000):
        network.transfer(1000, i, MBIT)
    n_events = 0
    while env.peek() < np.inf:
        env.step()
        n_events += 1
    assert env.now == pytest.approx(100.0)
    assert n_events < 1000 + 10


def spread_over(network, *names, **options):
    """Return half of a payload over each link."""
    ends = {network.link_name(link): link for link in range(len(network.link_ends()))}
    return Spread({ends[name]: 0.5 for name in names}, **options)


def test_a_payload_on_two_routes_has_both_their_rates_and_their_mean_latency(env):
    graph = nx.cycle_graph(4)
    nx.set_edge_attributes(graph, 8e3, "bandwidth")
    nx.set_edge_attributes(graph, {(0, 1): 0.1, (1, 2): 0.1, (2, 3): 0.2, (0, 3): 0.2}, "latency")
    network = graph_network(env, graph)
    both = spread_over(network, "0>1", "1>2", "0>3", "3>2", link_down="stall")
    sent = network.transfer(0, 2, 4000, spread=both)
    env.run(until=sent)
    assert env.now == pytest.approx(0.3 + 2.0)
    carried = {use.name: use.carried_bytes for use in network.link_uses()}
    assert carried == pytest.approx(dict.fromkeys(("0>1", "1>2", "0>3", "3>2"), 2000))


@pytest.mark.parametrize(
    ("policy", "outcome", "finished"),
    [("fail", "failed", 1.0), ("stall", "delivered", 5.0), ("reroute", "delivered", 3.0)],
)
def test_a_payload_on_two_routes_has_a_policy_of_its_own(env, policy, outcome, finished):
    graph = nx.cycle_graph(4)
    nx.set_edge_attributes(graph, 8e3, "bandwidth")
    cut = Failure(link="1-2", start=1.0, end=4.0)
    network = graph_network(env, graph, failures=[cut], link_down="fail")
    ids = {network.link_name(link): link for link in range(8)}

    def around():
        assert network.down_now() == {(1, 2)}
        return {ids["0>3"]: 1.0, ids["3>2"]: 1.0}

    both = spread_over(network, "0>1", "1>2", "0>3", "3>2", link_down=policy, detour=around)
    delivery = env.run(until=network.transfer(0, 2, 4000, spread=both))
    assert (delivery.outcome, delivery.finished) == (outcome, pytest.approx(finished))


def test_a_piece_that_is_no_whole_bytes_takes_its_exact_time(env):
    network = star_network(env, uplink_bps=[8.0], downlink_bps=[8.0])
    route = dict.fromkeys(network.route(0, 1), 1.0)
    sent = network.transfer(0, 1, 3, spread=Spread(route, "stall", exact_bytes=10 / 3))
    assert env.run(until=sent).size_bytes == 3
    assert env.now == pytest.approx(10 / 3)
