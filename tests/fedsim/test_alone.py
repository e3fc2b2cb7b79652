"""Rounds that meet nothing are served by arithmetic: the same as simulating every payload."""

from dataclasses import asdict

import numpy as np
import pytest
import simpy
import torch
from flwr.app import Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.devices import DeviceFleet
from fedsim.devices.energy import EnergyCosts
from fedsim.flower import grid as grid_module
from fedsim.flower.grid import NODE_BASE, NetworkGrid
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.records import payload_bytes, stacked_record
from fedsim.flower.session import session
from fedsim.learning.config import LocalConfig
from fedsim.network import star_network
from fedsim.network.alone import serve_alone
from fedsim.network.failures import Failure
from fedsim.network.links import OnOff

N = 6


class Answers:
    """An executor whose odd replies are longer, which is known before or not."""

    is_stateful = False

    def __init__(self, knows):
        self.knows = knows

    def reply_bytes(self, message):
        return payload_bytes(answer(message.metadata.dst_node_id)) if self.knows else None

    def __call__(self, messages):
        return [Message(answer(m.metadata.dst_node_id), reply_to=m) for m in messages]


def answer(node):
    arrays = stacked_record({"w": torch.zeros(1, 10 + 5 * (node % 2))}, 0)
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 3})})


class Rows:
    """Keeps what a recorder is given, in its order."""

    def __init__(self):
        self.rows = []
        self.transfer = self.compute = self.rows.append


class Gone:
    """Device 1 is not there from 0.1 s on, until some time."""

    def __init__(self, until):
        self.until = until

    def is_on(self, devices, time):
        return (np.asarray(devices) != 1) | (time < 0.1) | (time >= self.until)

    def next_change(self, devices, time):
        later = [change for change in (0.1, self.until) if change > time]
        return np.where(np.asarray(devices) == 1, min(later, default=np.inf), np.inf)


def play(rounds, *, knows, timeout, timetable=None, network=None, **world):
    """Return all that a few rounds leave behind."""
    env = simpy.Environment()
    links = star_network(
        env, uplink_bps=np.array(world["up"]), downlink_bps=np.array(world["down"]),
        latency=np.array(world["latency"]), server_up_bps=world["server"],
        server_down_bps=world["server"], header_bytes=world["header"], **(network or {}),
    )  # fmt: skip
    fleet = DeviceFleet(
        np.array(world["speed"]), timetable, energy=EnergyCosts(per_sample=1.0, per_byte_sent=0.1)
    )
    plan = WorkPlan(LocalConfig(batch_size=4), np.array([8, 8, 4, 0, 16, 8]))
    grid = NetworkGrid(env, links, fleet, Answers(knows), plan, keep_trips=True)
    grid.recorder = Rows()
    came, traffic = [], []
    with session(grid, seed=1):
        for devices in rounds:
            content = answer(0)
            messages = [Message(content, NODE_BASE + device, "train") for device in devices]
            replies = grid.send_and_receive(messages, timeout=timeout)
            came.append([(r.metadata.src_node_id, dict(r.content["delivery"])) for r in replies])
            traffic.append(asdict(grid.take_traffic()))
            energy = fleet.energy(env.now)
    trips = [(t.received, t.started, t.computed, t.finished, t.outcome) for t in grid.trips]
    usage = [array.tolist() for array in links.usage()]
    return came, traffic, trips, grid.recorder.rows, usage, energy.tolist(), env.now


def rates():
    return st.lists(st.sampled_from([1e3, 2e3, 3e5, np.inf]), min_size=N, max_size=N)


@settings(max_examples=80, deadline=None)
@given(
    up=rates(),
    down=rates(),
    latency=st.lists(st.sampled_from([0.0, 0.02, 0.1]), min_size=N, max_size=N),
    speed=st.lists(st.sampled_from([1.0, 3.0, 1e3]), min_size=N, max_size=N),
    server=st.sampled_from([np.inf, np.inf, np.inf, 4e3]),
    header=st.sampled_from([0, 40]),
    knows=st.booleans(),
    timetable=st.sampled_from([None, None, Gone(0.2), Gone(2.0), Gone(np.inf)]),
    timeout=st.sampled_from([None, None, 1.0, 20.0, 1e4]),
    rounds=st.lists(
        st.lists(st.integers(0, N - 1), min_size=1, unique=True), min_size=1, max_size=3
    ),
)
def test_arithmetic_and_events_leave_the_same_behind(rounds, **world):
    with pytest.MonkeyPatch.context() as patch:
        by_arithmetic = play(rounds, **world)
        patch.setattr(grid_module, "serve_alone", lambda *args, **options: False)
        by_events = play(rounds, **world)
    assert by_arithmetic == by_events


PLAIN = {
    "up": [1e3] * N, "down": [1e3] * N, "latency": [0.1] * N, "speed": [3.0] * N,
    "server": np.inf, "header": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [True, True]),
        ({"timeout": 1e4}, [True, True]),
        ({"timeout": 1.0}, [False]),  # too early; then late replies are under way
        ({"timeout": 1e4, "knows": False}, [False, False]),  # who can say?
        ({"server": 4e3}, [False, False]),
        ({"server": 4e3, "rounds": [[0], [0, 1]]}, [True, False]),
        ({"network": {"message_loss": 0.5}}, [False, False]),
        ({"network": {"startup": "slow_start"}}, [False, False]),
        ({"network": {"timeout": 60.0}}, [False, False]),
        ({"network": {"failures": [Failure(link="up-3", start=5.0)]}}, [False, False]),
        ({"network": {"link_model": OnOff(mean_up=30.0, mean_down=1.0)}}, [False, False]),
        ({"timetable": Gone(until=0.2)}, [True, True]),  # 1 was at its place in time
        ({"timetable": Gone(until=2.0)}, [False, True]),
    ],
)
def test_only_what_meets_nothing_is_served_by_arithmetic(monkeypatch, change, expected):
    found = []

    def spy(*arguments, **options):
        found.append(serve_alone(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(grid_module, "serve_alone", spy)
    play(**({"rounds": [[0, 1], [2, 1]], "knows": True, "timeout": None} | PLAIN | change))
    assert found == expected
