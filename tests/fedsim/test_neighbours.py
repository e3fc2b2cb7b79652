"""Exchange between neighbours on the grid: times by hand, losses, fan-outs, barriers."""

import math

import networkx as nx
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st

from fedsim.errors import NetworkError, PayloadError, ScenarioError
from fedsim.flower.records import stacked_record
from fedsim.flower.session import start
from fedsim.network import OnOff
from fedsim.streams import uniform
from tests.fedsim.worlds import make_world
from tests.plain_grid import flower_identity
from topologies.generators import complete, line, ring, star
from topologies.random_graphs import erdos_renyi

SIZE = 1000  # bytes: one second on the links below
RING = {"graph": ring(4, bandwidth=8e3, latency=0.5), "speed": [4.0, 2.0, 1.0, 4 / 3]}
# Four samples of work take 1, 2, 4 and 3 s; a payload takes 1.5 s.


@pytest.fixture(autouse=True)
def _identity():
    with flower_identity(0):
        yield


def around(graph):
    return lambda number: graph


def neighbour_world(n=4, graph=None, peers=None, **options):
    peers = peers or (None if graph is None else around(graph))
    return make_world(n, graph=graph, peers=peers, **options)


def messages(world, devices, number=1, among=None, config=None, rows=None, **exchange):
    """Return one instruction a device: 4 samples of work, then the exchange."""
    sent = []
    for i in devices:
        record = ConfigRecord({"kind": "neighbours", "payload_bytes": SIZE} | exchange)
        if among is not None:
            record["peers"] = [1000 + j for j in among[i]]
        work = {"server-round": number, "local-steps": 1, "batch-size": 4} | (config or {})
        arrays = world.initial() if rows is None else stacked_record(rows, i)
        content = {"arrays": arrays, "config": ConfigRecord(work), "exchange": record}
        sent.append(Message(RecordDict(content), dst_node_id=1000 + i, message_type="train"))
    return sent


def pull_all(world, ids):
    """Return device → (time at which its reply is available, reply)."""
    found = {}
    ids = list(ids)
    while ids:
        for reply in world.grid.pull_messages(ids):
            found[reply.metadata.src_node_id - 1000] = (world.grid.now, reply)
            ids.remove(reply.metadata.reply_to_message_id)
        ids = [i for i in ids if not world.grid.is_lost(i)]
    return found


def run_exchange(world, devices=range(4), **options):
    return pull_all(world, world.grid.push_messages(messages(world, devices, **options)))


def delivery(reply):
    return reply.content["delivery"]


def listed(reply, key):
    return [node - 1000 for node in delivery(reply).get(key, [])]


def times(found):
    return [found[i][0] for i in sorted(found)]


def received(found):
    return [listed(found[i][1], "received_from") for i in sorted(found)]


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("after", [4.5, 5.5, 4.5, 5.5]),  # the slower neighbour's work, and 1.5 s
        ("with", [1.5, 2.0, 4.0, 3.0]),  # the longer of work and exchange
        ("before", [2.5, 3.5, 5.5, 4.5]),  # the sum of both
    ],
)
def test_each_device_of_a_ring_ends_when_its_neighbours_are_in(when, expected):
    world = neighbour_world(**RING)
    found = run_exchange(world, when=when, barrier="local")
    assert times(found) == pytest.approx(expected)
    assert received(found) == [[1, 3], [0, 2], [1, 3], [0, 2]]
    for now, reply in found.values():
        assert delivery(reply)["finished"] == now
        assert delivery(reply)["sent_bytes"] == delivery(reply)["received_bytes"] == 2 * SIZE
        assert listed(reply, "neighbours") == listed(reply, "received_from")


def test_a_global_barrier_makes_all_replies_available_with_the_last():
    world = neighbour_world(**RING)
    replies = world.grid.send_and_receive(messages(world, [2, 0, 3, 1]))
    assert [reply.metadata.src_node_id - 1000 for reply in replies] == [2, 0, 3, 1]
    assert world.grid.now == pytest.approx(5.5)
    assert [delivery(r)["finished"] for r in replies] == pytest.approx([4.5, 4.5, 5.5, 5.5])
    assert times(run_exchange(world, number=2)) == pytest.approx([11.0] * 4)


def test_a_payload_on_a_star_goes_up_and_down_through_the_servers_links():
    world = neighbour_world(3, peers=around(complete(3)), up=8e3, down=4e3, latency=0.25, speed=4.0)
    found = run_exchange(world, range(3), barrier="local")
    # Each sends two payloads over its uplink, and two come down at half of that rate.
    assert times(found) == pytest.approx([1 + 0.5 + 2 * 2] * 3)
    assert world.grid.take_traffic().bytes_peer == 6 * SIZE


def test_a_deadline_mixes_what_has_arrived():
    world = neighbour_world(**RING)
    found = run_exchange(world, barrier="deadline", deadline=4.0)
    assert times(found) == pytest.approx([4.0] * 4)
    assert received(found) == [[1], [0], [1], [0]]
    assert listed(found[0][1], "neighbours") == [1, 3]
    world.grid.advance(5)
    traffic = world.grid.take_traffic()
    assert (traffic.bytes_peer, traffic.messages_sent, traffic.messages_lost) == (8 * SIZE, 8, 0)


def test_a_device_that_is_slower_than_the_deadline_ends_with_its_work():
    world = neighbour_world(**RING)
    found = run_exchange(world, barrier="deadline", deadline=2.6)
    assert times(found) == pytest.approx([2.6, 2.6, 4.0, 3.0])
    assert received(found) == [[], [0], [], [0]]
    assert "received_from" not in delivery(found[0][1])


def test_a_deadline_that_is_not_needed_is_not_waited_for():
    world = neighbour_world(**RING)
    found = run_exchange(world, barrier="deadline", deadline=100.0)
    assert times(found) == pytest.approx([4.5, 5.5, 4.5, 5.5])


# --- what fails -----------------------------------------------------------------------------------


def test_a_link_that_is_down_makes_no_neighbours():
    world = neighbour_world(**RING)
    world.grid.network.set_link("0-1", up=False)
    found = run_exchange(world, barrier="local")
    assert received(found) == [[3], [2], [1, 3], [0, 2]]
    assert times(found) == pytest.approx([4.5, 5.5, 4.5, 5.5])
    assert world.grid.take_traffic().messages_sent == 6


def test_a_link_that_goes_down_between_two_pushes_of_payloads_hangs_nobody():
    """Device 0 sends at 1 s over 0-1, which is down when device 1 sends at 2 s."""
    world = neighbour_world(**RING, network_options={"link_down": "fail"})
    at = world.grid.env.timeout(1.5)
    at.callbacks.append(lambda _: world.grid.network.set_link("0-1", up=False))
    found = run_exchange(world)
    assert received(found) == [[3], [2], [1, 3], [0, 2]]
    assert listed(found[0][1], "neighbours") == [1, 3]
    assert listed(found[1][1], "neighbours") == [2]
    traffic = world.grid.take_traffic()
    assert (traffic.messages_sent, traffic.messages_lost) == (7, 1)


@pytest.mark.parametrize("barrier", ["global", "local"])
def test_a_payload_that_stalls_for_good_is_given_up(barrier):
    world = neighbour_world(**RING)
    at = world.grid.env.timeout(1.5)
    at.callbacks.append(lambda _: world.grid.network.set_link("0-1", up=False))
    found = run_exchange(world, barrier=barrier)
    assert received(found) == [[3], [2], [1, 3], [0, 2]]
    assert world.grid.now == pytest.approx(5.5)


def one_loss(graph, share=0.1):
    """Return a seed with which exactly one payload of the first exchange is lost, and which."""
    pairs = [pair for a, b in graph.edges for pair in ((a, b), (b, a))]
    for seed in range(1000):
        lost = [p for p in pairs if uniform(seed, "message-loss", *p, 0) < share]
        if len(lost) == 1:
            return seed, lost[0]
    raise AssertionError


def test_a_lost_payload_is_not_received_and_nothing_else_changes():
    seed, (source, destination) = one_loss(RING["graph"])
    world = neighbour_world(**RING, loss=0.1, seed=seed)
    found = run_exchange(world, barrier="local")
    expected = [[1, 3], [0, 2], [1, 3], [0, 2]]
    expected[destination].remove(source)
    assert received(found) == expected
    assert times(found) == pytest.approx([4.5, 5.5, 4.5, 5.5])
    assert delivery(found[destination][1])["received_bytes"] == SIZE
    traffic = world.grid.take_traffic()
    assert (traffic.bytes_peer, traffic.messages_sent, traffic.messages_lost) == (8 * SIZE, 8, 1)


class Absent:
    """A timetable in which some devices are never there, or go at a time."""

    def __init__(self, leaves):
        self.leaves = leaves

    def is_on(self, device, time):
        return time < self.leaves.get(device, math.inf)

    def next_change(self, device, time):
        leaves = self.leaves.get(device, math.inf)
        return leaves if time < leaves else math.inf


@pytest.mark.parametrize("barrier", ["global", "local"])
@pytest.mark.parametrize(("leaves", "outcome"), [(0.0, "offline"), (1.9, "failed-device")])
def test_a_device_that_is_offline_gives_no_reply_and_is_not_received(barrier, leaves, outcome):
    world = neighbour_world(**RING, timetable=Absent({1: leaves}))
    found = run_exchange(world, barrier=barrier)
    assert sorted(found) == [0, 2, 3]
    assert received(found) == [[3], [3], [0, 2]]
    assert listed(found[0][1], "neighbours") == [1, 3]
    traffic = world.grid.take_traffic()
    assert (traffic.messages_sent, traffic.messages_lost) == (6, 2)
    assert world.grid.trips[1].outcome == outcome


@pytest.mark.parametrize(("when", "heard"), [("after", [[3], [3]]), ("with", [[1, 3], [1, 3]])])
def test_a_device_that_drops_its_work_is_waited_for_until_then(when, heard):
    world = neighbour_world(**RING, timetable=Absent({1: 1.9}), on_leave="drop")
    found = run_exchange(world, when=when)
    assert sorted(found) == [0, 2, 3]
    assert received(found)[:2] == heard
    assert world.grid.trips[1].outcome == "failed-device"
    assert world.grid.trips[1].finished == pytest.approx(1.9)


def test_nobody_linked_means_everybody_alone():
    graph = nx.empty_graph(3)
    world = neighbour_world(3, graph=graph, speed=4.0)
    found = run_exchange(world, range(3))
    assert times(found) == pytest.approx([1.0] * 3)
    assert received(found) == [[], [], []]
    assert world.grid.take_traffic().messages_sent == 0


def test_an_app_that_raises_sends_nothing_and_is_waited_for_by_nobody():
    app = ClientApp()

    @app.train()
    def train(message, context):
        if context.node_config["partition-id"] == 1:
            raise RuntimeError("out of memory")
        metrics = MetricRecord({"num-examples": 1})
        return Message(
            RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message
        )

    for size in ({}, {"payload_bytes": SIZE}):
        world = neighbour_world(**RING, executor="client_app", app=app)
        sent = messages(world, range(4), barrier="local")
        for message in sent:
            if not size:
                del message.content["exchange"]["payload_bytes"]
        found = pull_all(world, world.grid.push_messages(sent))
        assert found[1][1].has_error()
        assert [listed(found[i][1], "received_from") for i in (0, 2, 3)] == [[3], [3], [0, 2]]


# --- fan-outs -------------------------------------------------------------------------------------


def targets(found):
    return {i: listed(reply, "neighbours") for i, (_, reply) in sorted(found.items())}


def test_one_peer_exponential_goes_round_the_powers_of_two():
    world = neighbour_world(8, graph=complete(8))
    for number, hop in [(1, 1), (2, 2), (3, 4), (4, 1)]:
        found = run_exchange(world, range(8), number=number, fanout="one-peer")
        assert targets(found) == {i: [(i + hop) % 8] for i in range(8)}
        assert received(found) == [[(i - hop) % 8] for i in range(8)]


def test_one_peer_random_draws_one_of_those_it_is_linked_with():
    world = neighbour_world(8, graph=complete(8))
    seen = []
    for number in range(1, 6):
        options = {"number": number, "fanout": "one-peer", "order": "random"}
        found = run_exchange(world, range(8), **options)
        assert all(len(who) == 1 and who != [i] for i, who in targets(found).items())
        sent = sorted((j, i) for i, (j,) in targets(found).items())
        got = [(i, j) for i, who in enumerate(received(found)) for j in who]
        assert got == sent
        seen.append(tuple(targets(found).values()))
    assert len(set(map(str, seen))) == 5
    world.grid.network.set_node(3, up=False)
    found = run_exchange(world, range(8), number=6, fanout="one-peer", order="random")
    assert [3] not in targets(found).values()
    assert targets(found)[3] == []


def test_random_pairs_exchange_both_ways():
    world = neighbour_world(9, graph=complete(9))
    found = run_exchange(world, range(9), fanout="pairwise")
    pairs = targets(found)
    assert sorted(map(len, pairs.values())) == [0] + [1] * 8
    assert all(pairs[j] == [i] for i, who in pairs.items() for j in who)
    assert received(found) == list(pairs.values())
    assert world.grid.take_traffic().bytes_peer == 8 * SIZE
    assert targets(run_exchange(world, range(9), number=2, fanout="pairwise")) != pairs


def test_a_device_alone_is_matched_with_one_that_answers_at_once():
    world = neighbour_world(**RING)
    found = run_exchange(world, [0], fanout="pairwise", barrier="local")
    (partner,) = listed(found[0][1], "neighbours")
    assert partner in (1, 3)
    assert received(found) == [[partner]]
    assert world.grid.now == pytest.approx(2.5)
    assert delivery(found[0][1])["received_bytes"] == SIZE
    assert world.grid.take_traffic().bytes_peer == 2 * SIZE


@given(
    seed=st.integers(0, 10_000),
    fanout=st.sampled_from(["all", "exponential", "random", "pairwise"]),
    barrier=st.sampled_from(["global", "local", "deadline"]),
    when=st.sampled_from(["before", "with", "after"]),
)
def test_what_is_sent_is_received_lost_or_late(seed, fanout, barrier, when):
    graph = erdos_renyi(7, 0.5, seed=seed, bandwidth=8e3, latency=0.1)
    world = neighbour_world(
        7, graph=graph, loss=0.2, seed=seed, link_model=OnOff(3.0, 2.0), speed=np.arange(1.0, 8.0),
        network_options={"link_down": "fail"},
    )  # fmt: skip
    exchange = {"fanout": fanout, "barrier": barrier, "when": when}
    if fanout in ("exponential", "random"):
        exchange |= {"fanout": "one-peer", "order": fanout}
    if barrier == "deadline":
        exchange["deadline"] = 4.0
    found = run_exchange(world, range(7), **exchange)
    world.grid.advance(60)
    traffic = world.grid.take_traffic()
    assert sorted(found) == list(range(7))
    sent = {(i, j) for i, who in targets(found).items() for j in who}
    got = {(j, i) for i, who in enumerate(received(found)) for j in who}
    assert got <= sent
    assert all(graph.has_edge(i, j) for i, j in sent)
    assert traffic.messages_sent == len(sent)
    assert traffic.bytes_peer == SIZE * len(sent)
    assert sum(delivery(reply)["sent_bytes"] for _, reply in found.values()) == traffic.bytes_peer
    assert sum(delivery(r)["received_bytes"] for _, r in found.values()) == SIZE * len(got)
    late = len(sent) - len(got) - traffic.messages_lost
    assert late >= 0
    if barrier == "global" and when != "before":
        assert late == 0


# --- rounds that overlap --------------------------------------------------------------------------


def test_with_a_local_barrier_each_device_goes_on_by_itself():
    """A line 0 - 1 - 2 in which the last is slow: the first is at most two rounds ahead."""
    graph = line(3, bandwidth=8e3)
    world = neighbour_world(3, graph=graph, speed=[4.0, 4.0, 0.4])
    rounds, trace = dict.fromkeys(range(3), 1), []
    ids = world.grid.push_messages(messages(world, range(3), barrier="local"))
    while ids:
        replies = world.grid.pull_messages(ids)
        for reply in replies:
            device = reply.metadata.src_node_id - 1000
            ids.remove(reply.metadata.reply_to_message_id)
            heard = listed(reply, "received_from")
            trace.append((round(world.grid.now, 6), device, rounds[device], heard))
            if rounds[device] < 3:
                rounds[device] += 1
                sent = messages(world, [device], number=rounds[device], barrier="local")
                ids += world.grid.push_messages(sent)
    assert trace == [
        (2.0, 0, 1, [1]),
        (10.0, 2, 1, [1]),
        (11.0, 1, 1, [0, 2]),
        (13.0, 0, 2, [1]),
        (20.0, 2, 2, [1]),
        (21.0, 1, 2, [0, 2]),
        (23.0, 0, 3, [1]),
        (30.0, 2, 3, [1]),
        (31.0, 1, 3, [0, 2]),
    ]


def test_a_device_that_stops_is_not_waited_for():
    world = neighbour_world(3, graph=line(3, bandwidth=8e3), speed=4.0)
    first = run_exchange(world, range(3), barrier="local")
    assert received(first) == [[1], [0, 2], [1]]
    second = run_exchange(world, [0, 1], number=2, barrier="local")
    assert received(second) == [[1], [0]]
    assert listed(second[1][1], "neighbours") == [0, 2]
    assert world.grid.now == pytest.approx(4.0)


def test_a_reply_carries_what_its_neighbours_sent():
    world = neighbour_world(**RING)
    found = run_exchange(world, barrier="local")
    for _, reply in found.values():
        carried = reply.content["received"]
        assert isinstance(carried, ArrayRecord)
        keys = list(found[0][1].content["arrays"])
        who = listed(reply, "received_from")
        assert list(carried) == [f"{1000 + j}/{key}" for j in who for key in keys]
        for j in who:
            for key in keys:
                mine = carried[f"{1000 + j}/{key}"].numpy()
                assert np.array_equal(mine, found[j][1].content["arrays"][key].numpy())
    assert "received" not in run_exchange(world, number=2)[0][1].content


@pytest.mark.parametrize("when", ["with", "before"])
def test_what_is_sent_before_the_work_is_what_the_device_was_given(when):
    world = neighbour_world(**RING)
    rows = {k: torch.randn(4, *a.shape) for k, a in world.initial().items()}
    found = run_exchange(world, rows=rows, barrier="local", when=when)
    for _, reply in found.values():
        for name, array in reply.content["received"].items():
            node, _, key = name.partition("/")
            assert np.array_equal(array.numpy(), rows[key][int(node) - 1000].numpy())


# --- graphs ---------------------------------------------------------------------------------------


def test_an_instruction_may_name_the_peers():
    world = neighbour_world(4, up=math.inf, speed=4.0)
    found = run_exchange(world, among={0: [1, 2], 1: [0], 2: [], 3: [0]})
    assert targets(found) == {0: [1, 2], 1: [0], 2: [], 3: [0]}
    assert received(found) == [[1, 3], [0], [0], []]


def test_the_graph_of_a_round_says_who_the_neighbours_are():
    graphs = {1: ring(4), 2: line(4)}
    world = neighbour_world(4, peers=graphs.__getitem__, speed=4.0)
    assert targets(run_exchange(world))[0] == [1, 3]
    assert targets(run_exchange(world, number=2))[0] == [1]


def test_rerouting_keeps_neighbours_whose_own_link_is_down():
    world = neighbour_world(**RING, network_options={"link_down": "reroute"})
    world.grid.network.set_link("0-1", up=False)
    assert received(run_exchange(world))[0] == [1, 3]


# --- executors, determinism, records --------------------------------------------------------------


def outcome(executor, seed=1, **options):
    graph = erdos_renyi(8, 0.5, connected=True, seed=3, bandwidth=8e3, latency=0.1)
    world = neighbour_world(
        8, graph=graph, executor=executor, loss=0.1, seed=seed,
        link_model=OnOff(5.0, 2.0), speed=np.arange(2.0, 10.0),
    )  # fmt: skip
    replies = world.grid.send_and_receive(messages(world, range(8), **options))
    return world, replies


@pytest.mark.parametrize("options", [{}, {"barrier": "local"}, {"when": "before"}])
def test_both_executors_give_the_same(options):
    (one, ours), (two, theirs) = (outcome(e, **options) for e in ("vectorised", "client_app"))
    assert [t.finished for t in one.grid.trips] == [t.finished for t in two.grid.trips]
    for a, b in zip(ours, theirs, strict=True):
        assert a.content["delivery"] == b.content["delivery"]
        for name in ("arrays", "received"):
            for key, array in a.content.get(name, {}).items():
                other = b.content[name][key].numpy()
                assert np.allclose(array.numpy(), other, rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_deliveries_whatever_the_order_of_the_push():
    runs = []
    for devices in (range(8), reversed(range(8))):
        world, _ = outcome("vectorised")
        sent = messages(world, devices, number=2)
        replies = world.grid.send_and_receive(sent)
        runs.append({r.metadata.src_node_id: dict(delivery(r)) for r in replies})
    assert runs[0] == runs[1]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exchange", "words"),
    [
        ({"fanout": "some"}, "exchange.fanout is 'some'"),
        ({"barrier": "none"}, "exchange.barrier is 'none'"),
        ({"when": "later"}, "exchange.when is 'later'"),
        ({"order": "random"}, "one-peer"),
        ({"fanout": "one-peer", "order": "ring"}, "exchange.order is 'ring'"),
        ({"barrier": "deadline"}, "needs a deadline"),
        ({"deadline": 1.0}, "exchange.deadline is 1.0"),
        ({"barrier": "deadline", "deadline": -1.0}, "-1.0"),
        ({"barrier": "deadline", "deadline": True}, "True"),
        ({"peers": "all"}, "exchange.peers is 'all'"),
        ({"peers": [1001, 1001]}, "different node ids"),
        ({"peers": [1000]}, "names itself"),
        ({"payload_bytes": 1.5}, "1.5"),
        ({"collective": "ring"}, "collective"),
    ],
)
def test_an_exchange_that_makes_no_sense_is_refused(exchange, words):
    world = neighbour_world(**RING)
    with pytest.raises(PayloadError, match=words):
        world.grid.push_messages(messages(world, [0], **exchange))
    assert not world.grid.trips


def test_a_peer_that_does_not_exist_is_refused():
    world = neighbour_world(**RING)
    with pytest.raises(NetworkError, match="no node 1009"):
        world.grid.push_messages(messages(world, [0], among={0: [9]}))


def test_neighbours_without_a_graph_are_refused():
    world = neighbour_world(3)
    with pytest.raises(PayloadError, match=r"peers: \{kind: ring\}"):
        world.grid.push_messages(messages(world, range(3)))


def test_a_push_in_which_devices_disagree_is_refused():
    world = neighbour_world(**RING)
    sent = messages(world, [0, 1]) + messages(world, [2, 3], barrier="local")
    with pytest.raises(PayloadError, match="differ"):
        world.grid.push_messages(sent)


def test_an_exchange_without_a_round_is_refused():
    world = neighbour_world(**RING)
    sent = messages(world, [0])
    del sent[0].content["config"]["server-round"]
    with pytest.raises(PayloadError, match="server-round"):
        world.grid.push_messages(sent)


def test_instructions_by_way_of_a_server_that_is_not_there_are_refused():
    world = neighbour_world(**RING)
    sent = messages(world, [0])
    del sent[0].content["exchange"]
    with pytest.raises(ScenarioError, match="no server"):
        world.grid.push_messages(sent)


def test_a_graph_with_a_server_serves_both_kinds():
    world = neighbour_world(3, graph=star(3, bandwidth=8e3), peers=around(ring(3)), speed=4.0)
    sent = messages(world, [0]) + messages(world, [1, 2])
    del sent[0].content["exchange"]
    replies = world.grid.send_and_receive(sent)
    assert len(replies) == 3
    traffic = world.grid.take_traffic()
    assert traffic.bytes_down == traffic.bytes_up == 2600
    assert traffic.bytes_peer == 4 * SIZE


# --- a strategy -----------------------------------------------------------------------------------


class Mixing(FedAvg):
    """Each device takes the mean of its own model and those it received."""

    def __init__(self, **exchange):
        super().__init__(fraction_evaluate=0.0)
        self.exchange = exchange
        self.device_models = {}

    def configure_train(self, server_round, arrays, config, grid):
        nodes = list(grid.get_node_ids())
        if not self.device_models:
            stacked = {k: torch.from_numpy(a.numpy()) for k, a in arrays.items()}
            self.device_models = {k: a.expand(len(nodes), *a.shape) for k, a in stacked.items()}
        config["server-round"] = server_round
        exchange = ConfigRecord({"kind": "neighbours"} | self.exchange)
        return [
            Message(
                RecordDict(
                    {
                        "arrays": stacked_record(self.device_models, node - 1000),
                        "config": config,
                        "exchange": exchange,
                    }
                ),
                dst_node_id=node,
                message_type="train",
            )
            for node in nodes
        ]

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        rows = {r.metadata.src_node_id: r.content["arrays"] for r in replies}
        for key, old in self.device_models.items():
            new = old.clone()
            for reply in replies:
                node = reply.metadata.src_node_id
                heard = [n for n in delivery(reply).get("received_from", []) if n in rows]
                values = [torch.from_numpy(rows[n][key].numpy()) for n in (node, *heard)]
                new[node - 1000] = torch.stack(values).double().mean(0)
            self.device_models[key] = new
        mean = {key: value.mean(0, keepdim=True) for key, value in self.device_models.items()}
        return stacked_record(mean, 0), MetricRecord({"n": len(replies)})


def run_mixing(graph, rounds=3, loss=0.0, rows=None, **exchange):
    world = neighbour_world(6, graph=graph, loss=loss, speed=100.0)
    strategy = Mixing(**exchange)
    rows = [] if rows is None else rows
    result = start(
        strategy, world.grid, world.initial(), rounds=rounds, seed=1, evaluate=world.evaluate,
        record=rows.append,
    )  # fmt: skip
    return world, strategy, result, rows


def test_uniform_mixing_on_a_complete_graph_gives_the_mean():
    _, strategy, _, rows = run_mixing(complete(6), rounds=1)
    for value in strategy.device_models.values():
        assert (value - value.mean(0)).abs().max() < 1e-6
    assert rows[0].bytes_peer == 30 * 2600
    assert rows[0].messages_sent == 30
    assert rows[0].bytes_down == rows[0].bytes_up == 0
    assert rows[0].devices_selected == rows[0].devices_replied == 6
    _, sparse, _, _ = run_mixing(ring(6), rounds=1, loss=0.3)
    assert max((v - v.mean(0)).abs().max() for v in sparse.device_models.values()) > 1e-3


def test_received_models_equal_the_strategys_rows_with_a_local_barrier():
    """`start` of Flower waits for all replies, whatever the barrier."""
    _, one, _, _ = run_mixing(ring(6))
    _, two, _, _ = run_mixing(ring(6), barrier="deadline", deadline=1e6)
    for key in one.device_models:
        assert torch.equal(one.device_models[key], two.device_models[key])
