"""Collectives whose links slow down or die, and whose devices go away."""

import gc

import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp

import topologies as tp
from fedsim.devices import Intervals
from fedsim.errors import NetworkError
from fedsim.network import Failure
from fedsim.network.clock import At
from tests.fedsim.collective_worlds import (
    RATE,
    SIZE,
    asks,
    collective_world,
    expected,
    finished,
    run,
)
from tests.plain_grid import flower_identity

UNIT = SIZE * 8 / RATE  # seconds of the whole vector on one link
BCUBE = tp.bcube(3, 2, bandwidth=RATE)
BML = 8 / 9 * UNIT  # seconds of BML on it


@pytest.fixture(autouse=True)
def _identity():
    with flower_identity(0):
        yield


def failing(graph, *failures, **options):
    return collective_world(graph, network_options={"failures": list(failures)}, **options)


def change(world, time, *names, **state):
    """Change links at a time."""

    def now(_):
        for name in names:
            world.grid.network.set_link(name, **state)

    At(world.grid.env, time, now)


def links_of(graph):
    return [f"{min(a, b)}-{max(a, b)}" for a, b in graph.edges]


# --- links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("barrier", ["global", "local"])
@pytest.mark.parametrize("start", [0.0, 1.0 + 0.6 * BML])
def test_a_dead_port_is_an_error_that_names_link_step_and_ranks(start, barrier):
    world = failing(BCUBE, Failure(link="0-9", start=start))
    step = 0 if start == 0 else 2
    with pytest.raises(
        NetworkError,
        match=rf"link (0>9|9>0) .* down at .* s, in step {step} of bml\(3,2\): rank \d sends to "
        r"rank \d \(exchange.on_failure: 'reroute' or 'wait' goes on\)",
    ):
        run(world, collective="bml", barrier=barrier)


@pytest.mark.parametrize(("n", "k"), [(3, 2), (4, 2), (2, 3), (3, 3)])
@pytest.mark.parametrize("target", ["port", "switch"])
def test_rerouting_around_a_dead_port_takes_k_over_k_minus_1(n, k, target):
    graph = tp.bcube(n, k, bandwidth=RATE)
    dead = Failure(link=f"0-{n**k}") if target == "port" else Failure(node=n**k)
    world = failing(graph, dead)
    replies, (report,) = run(world, collective="bml", on_failure="reroute")
    assert report.sync == pytest.approx(k / (k - 1) * expected(graph, "bml", alpha=0), rel=1e-9)
    assert len(replies) == n**k


def test_a_port_that_dies_half_way_is_routed_around_by_what_is_left_of_its_messages():
    graph = tp.bcube(3, 2, bandwidth=RATE)
    when = BML / 4
    world = failing(graph, Failure(link="0-9", start=1 + when))
    _, (report,) = run(world, collective="bml", on_failure="reroute")
    dead = tp.LinkChange((0, 9), (when,), (0.0,))
    fluid = expected(graph, "bml", alpha=0, engine="fluid", changes=[dead], on_failure="reroute")
    assert BML < report.sync < 2 * BML
    assert report.sync == pytest.approx(fluid, rel=1e-9)


def test_waiting_goes_on_when_the_link_returns():
    world = failing(BCUBE, Failure(link="0-9", start=1 + 0.2 * UNIT, end=1 + 0.5 * UNIT))
    _, (report,) = run(world, collective="bml", on_failure="wait")
    assert report.sync == pytest.approx(1.1888888889 * UNIT, rel=1e-6)


def test_waiting_for_a_link_that_never_returns_is_an_error():
    world = failing(BCUBE, Failure(link="0-9", start=1 + 0.2 * UNIT))
    with pytest.raises(
        NetworkError, match=r"group 'all' is in step 0 of bml\(3,2\); .* waits for link (0>9|9>0)"
    ):
        run(world, collective="bml", on_failure="wait")


def test_without_another_path_rerouting_is_an_error():
    world = failing(tp.bcube(3, 1, bandwidth=RATE), Failure(link="0-3", start=1 + 0.1 * UNIT))
    with pytest.raises(
        NetworkError,
        match=r"no route from \d to \d: no path exists while 0-3 is down at .* s, in step 0 of "
        r"bml\(3,1\): rank \d sends to rank \d",
    ):
        run(world, collective="bml", on_failure="reroute")


def test_a_star_has_no_other_path():
    world = collective_world(tp.star(4, bandwidth=RATE))
    star = type(world)(world.grid, world.trainer)
    change(star, 1 + 0.1 * UNIT, "0-4", up=False)
    with pytest.raises(NetworkError, match="no route from"):
        run(star, collective="ring", on_failure="reroute")


@pytest.mark.parametrize("barrier", ["global", "local"])
def test_bar_7_changing_rates_are_integrated_exactly(barrier):
    everything = links_of(BCUBE)
    slower = collective_world(BCUBE)
    change(slower, 1 + 0.4 * UNIT, *everything, bandwidth_bps=RATE / 4)
    alternating = collective_world(BCUBE)
    for turn in range(20):
        rate = RATE / 2 if turn % 2 else RATE
        change(alternating, 1 + turn * 0.1 * UNIT, *everything, bandwidth_bps=rate)
    half = collective_world(BCUBE)
    change(half, 1 + BML / 2, "0-9", bandwidth_bps=RATE / 2)
    times = [
        run(world, collective="bml", barrier=barrier)[1][0].sync / UNIT
        for world in (slower, alternating, half)
    ]
    assert times == pytest.approx([2.3555555556, 1.1777777778, 4 / 3], rel=1e-6)


def test_a_port_at_half_rate_from_the_middle_of_a_run():
    # Iterations of 1 s and BML; from the middle of the third on one port has half its rate, and
    # every port is used all the time: half of the third's bytes, and all later ones, take twice.
    world = collective_world(BCUBE)
    change(world, 2 * (1 + BML) + 1 + BML / 2, "4-10", bandwidth_bps=RATE / 2)
    times = [run(world, collective="bml", number=n)[1][0].seconds - 1 for n in range(1, 6)]
    assert times == pytest.approx([BML, BML, 1.5 * BML, 2 * BML, 2 * BML], rel=1e-9)


def test_a_lost_message_is_an_error_unless_it_is_sent_again():
    world = collective_world(tp.star(4, bandwidth=RATE), loss=0.5)
    with pytest.raises(NetworkError, match=r"message loss at .*network.retries sends a lost"):
        run(world, collective="ring")
    options = {"retries": 50, "backoff": 1e-3}
    world = collective_world(tp.star(4, bandwidth=RATE), loss=0.5, network_options=options)
    replies, (report,) = run(world, collective="ring")
    assert len(replies) == 4
    assert report.sync > expected(tp.star(4, bandwidth=RATE), "ring", alpha=0)


# --- devices --------------------------------------------------------------------------------------


def away(n_devices, device, start):
    """Return a timetable by which one device goes away for good."""
    return Intervals(devices={device: [(0.0, start)]}, others="always").start(n_devices, 0)


def test_a_device_that_dies_is_an_error_unless_the_others_go_on():
    world = failing(tp.star(4, bandwidth=RATE), Failure(node=2, start=1 + 0.6 * UNIT))
    with pytest.raises(
        NetworkError,
        match=r"device 2 is gone at .* s, while group 'all' is in step 2 of ring "
        r"\(exchange.on_device_failure: 'shrink' goes on without it\)",
    ):
        run(world, collective="ring")


@pytest.mark.parametrize("barrier", ["global", "local"])
@pytest.mark.parametrize("on_failure", ["error", "reroute", "wait"])
def test_survivors_begin_again_without_the_one_that_died(barrier, on_failure):
    graph = tp.star(4, bandwidth=RATE)
    world = failing(graph, Failure(node=2, start=1 + 0.6 * UNIT))
    replies, (report,) = run(
        world,
        collective="ring",
        barrier=barrier,
        on_failure=on_failure,
        on_device_failure="shrink",
    )
    # 0.6 of the first try are lost; then a ring of three.
    assert finished(replies) == pytest.approx([1 + (0.6 + 4 / 3) * UNIT] * 3)
    assert report.sync == pytest.approx((0.6 + 4 / 3) * UNIT)
    assert [reply.metadata.src_node_id for reply in replies] == [1000, 1001, 1003]
    assert replies[2].content["delivery"]["received_from"] == [1000, 1001]
    # In the next round the device is dead from the start.
    replies, (report,) = run(
        world, number=2, collective="ring", barrier=barrier, on_device_failure="shrink"
    )
    assert (len(replies), report.sync) == (3, pytest.approx(4 / 3 * UNIT))


def test_bml_goes_on_as_a_parameter_server_over_the_servers_that_are_left():
    world = failing(BCUBE, Failure(node=4, start=1 + 0.1 * UNIT))
    replies, (report,) = run(world, collective="bml", on_device_failure="shrink")
    assert (len(replies), report.collective) == (8, "ps_colocated")
    uses = {use.name: use.carried_bytes for use in world.grid.network.link_uses()}
    # What the dead server's links carried is from before it died: the others go around it.
    assert uses["4>10"] <= 0.1 * SIZE * (1 + 1e-9)
    left = collective_world(BCUBE)
    left.grid.network.set_node(4, up=False)
    survivors = [0, 1, 2, 3, 5, 6, 7, 8]
    _, (again,) = run(left, survivors, collective="ps_colocated", on_failure="reroute")
    assert report.sync == pytest.approx(0.1 * UNIT + again.sync, rel=1e-9)


def test_a_device_that_goes_offline_is_lost_to_the_collective():
    graph = tp.star(4, bandwidth=RATE)
    # Who goes away while it sends is missed when the next message for it comes: after a piece.
    for when, seconds in ((0.5, 1.0), (1 + 0.1 * UNIT, 1.0 + 0.25 * UNIT)):
        world = collective_world(graph, timetable=away(4, 3, when), on_leave="drop")
        replies, (report,) = run(world, collective="ring", on_device_failure="shrink")
        assert finished(replies) == pytest.approx([seconds + 4 / 3 * UNIT] * 3)
        assert report.compute == 1.0
        world = collective_world(graph, timetable=away(4, 3, when), on_leave="drop")
        with pytest.raises(NetworkError, match="device 3 is gone at"):
            run(world, collective="ring")


def test_one_survivor_has_its_own_vector_and_nobody_left_none():
    world = failing(tp.star(2, bandwidth=RATE), Failure(node=1, start=1 + 0.1 * UNIT))
    replies, (report,) = run(world, collective="ring", on_device_failure="shrink")
    assert len(replies) == 1
    assert "received_from" not in replies[0].content["delivery"]
    assert report.exposed == pytest.approx(0.1 * UNIT)
    world.grid.network.set_node(0, up=False)
    replies, reports = run(world, number=2, collective="ring", on_device_failure="shrink")
    assert (replies, reports) == ([], [])


def test_a_device_whose_app_fails_adds_nothing():
    app = ClientApp()

    @app.train()
    def train(message, context):
        if context.node_config["partition-id"] == 1:
            raise RuntimeError("out of memory")
        return Message(message.content, reply_to=message)

    graph = tp.star(3, bandwidth=RATE)
    made = {"executor": "app", "app": app}
    asked = {"collective": "ring", "size": None}
    with pytest.raises(NetworkError, match="device 1 is gone"):
        run(collective_world(graph, **made), **asked)
    world = collective_world(graph, **made)
    replies, _ = run(world, **asked, on_device_failure="shrink")
    assert [reply.metadata.src_node_id for reply in replies] == [1000, 1002]


def test_who_has_the_sum_cannot_begin_again():
    # Rank 2 of three is done before the last step of the others (see the test of local barriers).
    world = failing(tp.star(3, bandwidth=RATE), Failure(node=1, start=1 + 3 * UNIT))
    ask = {"collective": "halving_doubling", "on_device_failure": "shrink"}
    with pytest.raises(NetworkError, match="other devices already have the sum"):
        run(world, barrier="local", **ask)


def test_a_round_that_times_out_leaves_the_collective_or_takes_it_off_the_network():
    graph = tp.star(4, bandwidth=RATE)
    for is_cancelled in (False, True):
        world = collective_world(graph, cancel_late=is_cancelled)
        pushed = asks(world, collective="ring")
        assert not world.grid.send_and_receive(pushed, timeout=1 + 0.5 * UNIT)
        _, reports = run(world, number=2, collective="ring")
        assert len(reports) == (1 if is_cancelled else 2)
        assert world.grid.now == pytest.approx(2 + 2 * UNIT)


@pytest.mark.parametrize("barrier", ["global", "local"])
def test_a_round_that_is_given_up_and_forgotten_goes_on_by_itself(barrier):
    world = collective_world(tp.star(4, bandwidth=RATE))
    ask = {"collective": "ring", "barrier": barrier}
    assert not world.grid.send_and_receive(asks(world, **ask), timeout=0.5)
    gc.collect()  # nobody holds the instructions any more
    world.grid.advance(2.0)
    (report,) = world.grid.take_traffic().collectives
    assert report.finished == pytest.approx(1 + 1.5 * UNIT)
