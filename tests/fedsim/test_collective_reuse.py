"""Iterations that repeat an earlier one are recognised, and only those."""

import numpy as np
import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp

import topologies as tp
from fedsim.devices import EnergyCosts, Intervals
from fedsim.network import Failure, Network, OnOff
from fedsim.network.clock import At
from tests.fedsim.collective_worlds import RATE, SIZE, asks, collective_world, pull_all, run
from tests.plain_grid import flower_identity

UNIT = SIZE * 8 / RATE
BCUBE = tp.bcube(3, 2, bandwidth=RATE)
SPEED = [4.0, 3.0, 2.0, 5.0, 4.0, 7.0, 4.0, 1.3, 4.0]


@pytest.fixture(autouse=True)
def _identity():
    with flower_identity(0):
        yield


@pytest.fixture
def sent(monkeypatch):
    """Return a list that grows by one entry for each simulated transfer."""
    found, transfer = [], Network.transfer

    def noted(self, *arguments, **options):
        found.append(arguments)
        return transfer(self, *arguments, **options)

    monkeypatch.setattr(Network, "transfer", noted)
    return found


def simulated(world, sent, n_iterations, **options):
    """Return how many messages each iteration had simulated."""
    counts = []
    for number in range(1, n_iterations + 1):
        before = len(sent)
        run(world, number=number, **options)
        counts.append(len(sent) - before)
    return counts


def figures(world, number, ask, is_waiting):
    """Run an iteration; return all that it tells. Replies that are pulled are never repeated."""
    pushed = asks(world, number=number, **ask)
    if is_waiting:
        replies = world.grid.send_and_receive(pushed)
    else:
        ids = world.grid.push_messages(pushed)
        found = pull_all(world, ids)
        replies = [found[device][1] for device in sorted(found)]
    traffic = world.grid.take_traffic()
    (report,) = traffic.collectives
    spans = [(s.bucket, s.step, s.started, s.finished) for s in report.spans]
    delivery = [sorted(reply.content["delivery"].items()) for reply in replies]
    uses = [(u.name, u.carried_bytes, u.busy_time) for u in world.grid.network.link_uses()]
    counts = traffic.bytes_peer, traffic.bytes_up, traffic.bytes_down, traffic.messages_sent
    parts = report.compute, report.sync, report.exposed, world.grid.now
    return spans, delivery, uses, counts, parts


def flat(value):
    """Return all numbers in nested lists and tuples, names left out."""
    if isinstance(value, str):
        return []
    if isinstance(value, list | tuple):
        return [number for each in value for number in flat(each)]
    return [value]


@pytest.mark.parametrize("barrier", ["global", "local"])
@pytest.mark.parametrize(
    "ask",
    [
        {"collective": "bml"},
        {"collective": "ps_dedicated"},
        {"collective": "ring", "fusion_bytes": 20_000, "profile": "lenet5", "size": None},
        {"collective": "bml", "fusion_bytes": 0, "profile": "lenet5", "when": "with"},
    ],
    ids=lambda ask: "-".join(map(str, ask.values())),
)
def test_repeated_iterations_tell_what_simulated_ones_do(barrier, ask, sent):
    graph = BCUBE
    if ask["collective"] == "ps_dedicated":
        graph = tp.fat_tree(4, devices=9, bandwidth=RATE)
    ask = ask | {"barrier": barrier, "step_latency": 1e-5}
    repeated, full = (collective_world(graph, speed=SPEED) for _ in range(2))
    for number in range(1, 5):
        before = len(sent)
        told = figures(repeated, number, ask, is_waiting=True)
        assert (len(sent) > before) == (number == 1)
        before = len(sent)
        known = figures(full, number, ask, is_waiting=False)
        assert len(sent) > before
        assert np.allclose(flat(told), flat(known), rtol=1e-12, atol=1e-12)
        assert told[3] == known[3]


def test_a_hundred_iterations_are_simulated_once(sent):
    assert simulated(collective_world(BCUBE), sent, 100, collective="bml") == [144] + 99 * [0]


def test_energy_of_messages_is_counted():
    costs = EnergyCosts(per_sample=0.0, per_byte_sent=1.0, per_byte_received=0.5)
    worlds = [collective_world(BCUBE, energy=costs) for _ in range(2)]
    for world, is_waiting in zip(worlds, (True, False), strict=True):
        for number in (1, 2, 3):
            figures(world, number, {"collective": "bml"}, is_waiting)
    energy = [world.grid.fleet.energy(world.grid.now) for world in worlds]
    assert energy[0] == pytest.approx(energy[1])
    assert energy[0].sum() == 3 * 1.5 * 16 * SIZE


def test_what_changes_is_simulated_anew(sent):
    world = collective_world(BCUBE)
    assert simulated(world, sent, 2, collective="bml") == [144, 0]
    assert simulated(world, sent, 2, collective="ring") == [144, 0]
    assert simulated(world, sent, 2, collective="bml", size=SIZE + 1) == [144, 0]
    assert simulated(world, sent, 2, collective="bml", step_latency=1e-5) == [144, 0]
    for rate, first in ((RATE / 2, 144), (RATE / 4, 144), (RATE / 2, 0)):
        world.grid.network.set_link("0-9", bandwidth_bps=rate)
        assert simulated(world, sent, 2, collective="bml") == [first, 0]


def test_a_failure_on_the_timetable_is_not_overlooked(sent):
    begins = 3 * (1 + 8 / 9 * UNIT) + 1 + 0.1 * UNIT  # in the fourth iteration
    ends = begins + 2.5
    failure = Failure(link="0-9", start=begins, end=ends)
    world = collective_world(BCUBE, network_options={"failures": [failure]})
    ask = {"collective": "bml", "on_failure": "reroute"}
    # Whole, then the failure begins, then two with it and a last one after it.
    assert simulated(world, sent, 7, **ask) == [144, 0, 0, 144, 144, 0, 0]
    again = collective_world(BCUBE, network_options={"failures": [failure]})
    for number in range(1, 8):
        figures(again, number, ask, is_waiting=False)
    assert world.grid.now == pytest.approx(again.grid.now, rel=1e-13)


def test_a_change_by_hand_in_the_middle_is_not_overlooked(sent):
    world = collective_world(BCUBE)
    run(world, collective="bml")
    begin = world.grid.now + 1

    def change(_):
        world.grid.network.set_link("0-9", bandwidth_bps=RATE / 2)

    At(world.grid.env, begin + 4 / 9 * UNIT, change)
    _, (report,) = run(world, number=2, collective="bml")
    assert report.sync == pytest.approx(4 / 3 * UNIT)
    assert simulated(world, sent, 2, collective="bml") == [144, 0]


def test_links_that_vary_at_random_are_simulated():
    model = OnOff(mean_up=2.0, mean_down=1.0)
    ask = {"collective": "bml", "on_failure": "wait"}
    worlds = [collective_world(BCUBE, link_model=model) for _ in range(2)]
    for number in range(1, 6):
        waited, pulled = (
            figures(world, number, ask, is_waiting)
            for world, is_waiting in zip(worlds, (True, False), strict=True)
        )
        assert flat(waited) == pytest.approx(flat(pulled))


def test_a_device_that_goes_away_is_not_overlooked(sent):
    timetable = Intervals(devices={3: [(0.0, 3.9)]}, others="always").start(9, 0)
    world = collective_world(BCUBE, timetable=timetable, on_leave="drop")
    ask = {"collective": "ring", "on_device_failure": "shrink"}
    counts = simulated(world, sent, 6, **ask)
    assert counts[1:3] == [0, 0]
    assert counts[3:] == [112, 0, 0]  # a ring of eight
    assert world.grid.now == pytest.approx(3 * (1 + 16 / 9 * UNIT) + 3 * (1 + 14 / 8 * UNIT), abs=1)


def test_other_traffic_and_other_groups_are_simulated(sent):
    world = collective_world(tp.star(4, bandwidth=RATE))
    assert simulated(world, sent, 2, collective="ring") == [24, 0]
    world.grid.network.transfer(0, 1, 10**9)
    assert simulated(world, sent, 2, collective="ring") == [24, 24]
    pushed = asks(world, [0, 1], collective="ring", group="a")
    pushed += asks(world, [2, 3], collective="ring", group="b")
    before = len(sent)
    world.grid.send_and_receive(pushed)
    assert len(sent) == before + 8


def test_with_a_timeout_before_the_end_all_is_simulated(sent):
    world = collective_world(tp.star(4, bandwidth=RATE))
    run(world, collective="ring")
    before = len(sent)
    assert not world.grid.send_and_receive(asks(world, number=2, collective="ring"), timeout=1.001)
    world.grid.network.transfer(0, 1, SIZE)
    world.grid.advance(1.0)
    assert len(sent) == before + 25


@pytest.mark.parametrize("barrier", ["global", "local"])
def test_what_an_app_replies_is_not_known_before_it_has_worked(barrier, sent):
    app = ClientApp()

    @app.train()
    def train(message, context):
        number = message.content["config"]["server-round"]
        if number == 3 and context.node_config["partition-id"] == 2:
            raise RuntimeError("out of memory")
        return Message(message.content, reply_to=message)

    graph = tp.star(3, bandwidth=RATE)
    world = collective_world(graph, speed=[4.0, 4.0, 2.0], executor="app", app=app)
    ask = {"collective": "ring", "barrier": barrier, "size": None, "on_device_failure": "shrink"}
    # Steps of the first two devices come before the third one fails, with a local barrier.
    counts = simulated(world, sent, 3, **ask)
    assert counts[:2] == ([12, 0] if barrier == "global" else [12, 12])
    assert counts[2] == (4 if barrier == "global" else 7)
