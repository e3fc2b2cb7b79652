import gc
import math
import time

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedProx,
    QFedAvg,
)
from hypothesis import given
from hypothesis import strategies as st

from fedsim.devices import OnOffAvailability
from fedsim.errors import NetworkError, NoNodesError, PayloadError
from fedsim.flower.session import session, start
from tests.fedsim.worlds import LOCAL, heterogeneous, make_world

MODEL_BYTES = 650 * 4  # softmax regression on 64 pixels, float32


@pytest.fixture(autouse=True)
def _identity():
    from tests.plain_grid import flower_identity

    with flower_identity(0):
        yield


def messages(world, nodes, type_="train", ttl=None, config=None, **exchange):
    """Return one instruction per node, all with the same content, as Flower builds them."""
    records = {"arrays": world.initial(), "config": ConfigRecord({"server-round": 1})}
    if config:
        records["config"].update(config)
    if exchange:
        records["exchange"] = ConfigRecord(exchange)
    content = RecordDict(records)
    return [Message(content, dst_node_id=1000 + i, message_type=type_, ttl=ttl) for i in nodes]


def sources(replies):
    return [reply.metadata.src_node_id - 1000 for reply in replies]


def echo_app(log=None):
    """An app that replies what it was sent, and notes it."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        seen = context.state.setdefault("seen", ConfigRecord({"n": 0}))
        seen["n"] += 1
        if log is not None:
            config = message.content["config"]
            log.append((context.node_id - 1000, config["server-round"], seen["n"]))
        metrics = MetricRecord({"num-examples": 1, "train_loss": 0.0})
        content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
        return Message(content, reply_to=message)

    return app


# --- time -----------------------------------------------------------------------------------------


def test_bar_3_time_is_right_without_contention():
    options = heterogeneous()
    world = make_world(**options)
    world.grid.send_and_receive(messages(world, range(20)))
    size = world.trainer.data.size
    bits = 8 * MODEL_BYTES
    expected = (
        bits / options["down"]
        + 2 * options["latency"]
        + LOCAL.local_epochs * size / options["speed"]
        + bits / options["up"]
    )
    measured = np.array([trip.finished for trip in world.grid.trips])
    assert np.allclose(measured, expected, rtol=1e-9, atol=0)
    assert world.grid.now == pytest.approx(expected.max(), rel=1e-9)
    assert {(t.bytes_down, t.bytes_up) for t in world.grid.trips} == {(MODEL_BYTES, MODEL_BYTES)}


def test_bar_3_a_shared_server_link_is_shared_max_min():
    """Links of 1, 2 and 8 Mbit/s behind 6 Mbit/s: shares 1, 2, 3; then 1, 5; then 1."""
    bits = 8 * MODEL_BYTES
    world = make_world(3, down=[1e6, 2e6, 8e6], up=math.inf, speed=1e12, server=6e6, latency=0.0)
    world.grid.send_and_receive(messages(world, range(3), payload_bytes=0))
    received = [trip.received for trip in world.grid.trips]
    assert received[2] == pytest.approx(bits / 3e6, rel=1e-9)
    assert received[1] == pytest.approx(bits / 2e6, rel=1e-9)
    assert received[0] == pytest.approx(bits / 1e6, rel=1e-9)
    world = make_world(4, down=math.inf, up=math.inf, speed=1e12, server=6e6)
    world.grid.send_and_receive(messages(world, range(4), payload_bytes=0))
    assert [t.received for t in world.grid.trips] == pytest.approx([bits / 1.5e6] * 4, rel=1e-9)


def test_bar_3_flower_accounting_counts_what_flower_counts():
    world = make_world(2, accounting="flower", header_bytes=7)
    sent = messages(world, [0])
    plain = RecordDict(
        {
            "arrays": ArrayRecord({k: Array(a.numpy()) for k, a in world.initial().items()}),
            "config": ConfigRecord({"server-round": 1}),
        }
    )
    reply = world.grid.send_and_receive(sent)[0]
    trip = world.grid.trips[0]
    assert trip.bytes_down == 7 + sum(record.count_bytes() for record in plain.values())
    body = {k: v for k, v in reply.content.items() if k != "delivery"}
    assert trip.bytes_up == 7 + sum(record.count_bytes() for record in body.values())


def test_a_device_does_one_job_at_a_time_in_the_order_of_arrival():
    world = make_world(2, speed=100.0)
    size = int(world.trainer.data.size[0])
    ids = world.grid.push_messages(messages(world, [0]) + messages(world, [0]))
    assert len(world.grid.pull_messages(ids)) == 1
    work = LOCAL.local_epochs * size / 100
    assert world.grid.now == pytest.approx(work)
    assert len(world.grid.pull_messages(ids)) == 1
    assert world.grid.now == pytest.approx(2 * work)


def test_steps_gradients_and_evaluation_are_charged_their_samples():
    world = make_world(1, speed=10.0)
    size = int(world.trainer.data.size[0])
    cases = [
        ("train", {"local-steps": 3, "batch-size": 8}, 24),
        ("train", {"local-epochs": 5}, 5 * size),
        ("train", {"mode": "gradient", "batch-size": 0}, size),
        ("evaluate", {}, size / 3),
    ]
    for kind, config, samples in cases:
        before = world.grid.now
        assert world.grid.send_and_receive(messages(world, [0], kind, config=config))
        assert world.grid.now - before == pytest.approx(samples / 10)


def test_a_reply_tells_how_it_travelled():
    world = make_world(2, latency=0.25)
    reply = world.grid.send_and_receive(messages(world, [1]))[0]
    delivery = reply.content["delivery"]
    assert delivery["started"] == 0
    assert delivery["finished"] == world.grid.now
    assert delivery["sent_bytes"] == delivery["received_bytes"] == MODEL_BYTES


def test_free_evaluation_takes_no_time_and_no_bytes():
    world = make_world(3, latency=1.0, free_evaluation=True)
    replies = world.grid.send_and_receive(messages(world, range(3), "evaluate"))
    assert len(replies) == 3
    assert world.grid.now == 0
    assert world.grid.take_traffic().bytes_down == 0


# --- deadlines and loss ---------------------------------------------------------------------------


def test_bar_4_a_timeout_shows_exactly_who_is_in_time_and_stragglers_stay_busy():
    patient, hasty = (make_world(20, **heterogeneous()) for _ in range(2))
    patient.grid.send_and_receive(messages(patient, range(20)))
    finished = np.array([trip.finished for trip in patient.grid.trips])
    deadline = float(np.sort(finished)[12])
    replies = hasty.grid.send_and_receive(messages(hasty, range(20)), timeout=deadline)
    assert sources(replies) == np.flatnonzero(finished <= deadline).tolist()
    assert len(replies) == 13
    assert hasty.grid.now == deadline

    world = make_world(2, speed=[1e12, 10.0])
    work = LOCAL.local_epochs * int(world.trainer.data.size[1]) / 10
    world.grid.send_and_receive(messages(world, range(2)), timeout=1.0)
    world.grid.send_and_receive(messages(world, [1]))
    assert world.grid.now == pytest.approx(2 * work)


def test_bar_4_a_late_reply_stays_pullable_while_its_sender_keeps_the_message():
    world = make_world(2, latency=[0.0, 5.0], speed=1e6)
    sent = messages(world, range(2))
    assert sources(world.grid.send_and_receive(sent, timeout=1.0)) == [0]
    late = world.grid.pull_messages([sent[1].metadata.message_id])
    assert sources(late) == [1]
    assert world.grid.now >= 10
    assert world.grid.pull_messages([sent[1].metadata.message_id]) == []


def test_late_messages_nobody_keeps_are_forgotten_but_still_travel():
    world = make_world(2, latency=[0.0, 5.0], speed=1e6)
    world.grid.send_and_receive(messages(world, range(2)), timeout=1.0)
    gc.collect()
    assert not world.grid._flights
    world.grid.advance(20)
    assert world.grid.trips[1].outcome == "ok"
    assert world.grid.take_traffic().bytes_up == 2 * MODEL_BYTES


def test_bar_4_lost_messages_are_missing_by_default():
    world = make_world(20, loss=0.3)
    sent = messages(world, range(20))
    replies = world.grid.send_and_receive(sent)
    lost = [trip.device for trip in world.grid.trips if trip.is_lost]
    assert 0 < len(lost) < 20
    assert sorted(sources(replies) + lost) == list(range(20))
    assert all(world.grid.is_lost(sent[i].metadata.message_id) for i in lost)
    assert not world.grid.is_lost(replies[0].metadata.reply_to_message_id)


def test_bar_4_lost_messages_are_error_replies_on_request():
    world = make_world(20, loss=0.3, loss_reply="error")
    replies = world.grid.send_and_receive(messages(world, range(20)))
    assert sources(replies) == list(range(20))
    failed = [reply for reply in replies if reply.has_error()]
    assert sources(failed) == [trip.device for trip in world.grid.trips if trip.is_lost]
    assert failed[0].error.code == 3
    assert failed[0].error.reason.startswith("lost-")


def test_bar_4_the_privacy_wrapper_still_aggregates_under_loss():
    world = make_world(20, loss=0.1)
    strategy = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1e-6, 10.0, 20)
    before = world.evaluate(world.initial()).accuracy
    outcome = start(strategy, world.grid, world.initial(), rounds=3, seed=1)
    assert any(trip.is_lost for trip in world.grid.trips)
    assert world.evaluate(outcome.arrays).accuracy > before + 0.3


def test_bar_4_a_straggler_sees_the_round_number_of_its_own_round():
    log = []
    world = make_world(3, latency=[0, 0, 2.5], speed=1e12, executor="client_app", app=echo_app(log))
    strategy = FedProx(fraction_evaluate=0.0, proximal_mu=0.1)
    start(strategy, world.grid, world.initial(), rounds=4, seed=1, timeout=1.0)
    world.grid.advance(10)
    assert [(r, n) for device, r, n in log if device == 2] == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_time_to_live_other_than_flowers_default_counts():
    world = make_world(2, latency=1.0, speed=1e12)
    sent = messages(world, [0], ttl=1.5) + messages(world, [1], ttl=3.0)
    assert sources(world.grid.send_and_receive(sent)) == [1]
    assert world.grid.is_lost(sent[0].metadata.message_id)
    assert [trip.outcome for trip in world.grid.trips] == ["expired", "ok"]


# --- executors and state --------------------------------------------------------------------------


def test_replies_come_in_send_order_whatever_the_order_of_arrival():
    world = make_world(5, latency=[0.5, 0.1, 0.9, 0.0, 0.3])
    assert sources(world.grid.send_and_receive(messages(world, [4, 2, 0, 3, 1]))) == [4, 2, 0, 3, 1]


def test_all_instructions_under_way_are_computed_in_one_call():
    world = make_world(6, latency=np.arange(6.0))
    calls = []
    inner = world.grid._executor

    class Counting:
        is_stateful = False
        reply_bytes = staticmethod(inner.reply_bytes)

        def __call__(self, batch):
            calls.append(len(batch))
            return inner(batch)

    world.grid._executor = Counting()
    ids = world.grid.push_messages(messages(world, range(6)))
    while ids:
        for reply in world.grid.pull_messages(ids):
            ids.remove(reply.metadata.reply_to_message_id)
    assert calls == [6]


def test_a_lost_instruction_is_never_computed():
    log = []
    world = make_world(20, loss=0.3, executor="client_app", app=echo_app(log))
    world.grid.send_and_receive(messages(world, range(20)))
    lost_down = {t.device for t in world.grid.trips if t.outcome == "lost-down"}
    lost_up = {t.device for t in world.grid.trips if t.outcome == "lost-up"}
    assert lost_down
    assert lost_up
    assert {device for device, _, _ in log} == set(range(20)) - lost_down


def test_an_app_that_raises_gives_an_error_reply():
    app = ClientApp()

    @app.train()
    def train(message, context):
        raise RuntimeError("out of memory")

    world = make_world(2, executor="client_app", app=app)
    reply = world.grid.send_and_receive(messages(world, [0]))[0]
    assert reply.has_error()
    assert "out of memory" in reply.error.reason
    assert world.grid.trips[0].outcome == "error"
    assert world.grid.take_traffic().error_replies == 1


def test_an_app_may_change_what_it_was_sent():
    app = ClientApp()

    @app.train()
    def train(message, context):
        assert message.content["config"]["server-round"] == 1
        message.content["config"]["server-round"] = 99
        message.content["arrays"].clear()
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    world = make_world(3, executor="client_app", app=app)
    replies = world.grid.send_and_receive(messages(world, range(3)))
    assert not any(reply.has_error() for reply in replies)


def test_both_executors_give_the_same_models_times_and_bytes():
    results = []
    for executor in ("vectorised", "client_app"):
        world = make_world(loss=0.05, executor=executor, **heterogeneous())
        replies = world.grid.send_and_receive(messages(world, range(20)), timeout=60.0)
        results.append((world, replies))
    (one, ours), (two, theirs) = results
    assert sources(ours) == sources(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for key in a.content["arrays"]:
            left, right = a.content["arrays"][key].numpy(), b.content["arrays"][key].numpy()
            assert np.allclose(left, right, rtol=0, atol=1e-5)
        assert a.content["delivery"] == b.content["delivery"]
    assert [t.finished for t in one.grid.trips] == [t.finished for t in two.grid.trips]


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [FedAdam(), QFedAvg(client_learning_rate=0.3)])
def test_bar_8_downloads_keep_the_dtype_and_size_of_round_1(strategy):
    world = make_world()
    start(strategy, world.grid, world.initial(), rounds=3, seed=1)
    assert {t.bytes_down for t in world.grid.trips if t.kind == "train"} == {MODEL_BYTES}


def test_bar_8_without_keeping_dtypes_flowers_drift_shows():
    world = make_world(keep_dtypes=False)
    start(FedAdam(fraction_evaluate=0.0), world.grid, world.initial(), rounds=2, seed=1)
    sizes = [t.bytes_down for t in world.grid.trips]
    assert sizes[0] == MODEL_BYTES
    assert sizes[-1] == 2 * MODEL_BYTES


# --- what is refused, and what must not hang ------------------------------------------------------


@pytest.mark.parametrize(
    ("exchange", "words"),
    [
        ({"kind": "neighbours"}, "neighbours"),
        ({"kind": "collective"}, "collective"),
        ({"kind": "server", "fanout": "all"}, "fanout"),
        ({"when": "before"}, "before"),
        ({"payload_bytes": -1}, "-1"),
    ],
)
def test_an_exchange_the_grid_does_not_carry_is_refused(exchange, words):
    world = make_world(2)
    with pytest.raises(PayloadError, match=words):
        world.grid.push_messages(messages(world, [0], **exchange))


@pytest.mark.parametrize("value", [-1, [2]])
def test_a_config_out_of_range_is_refused(value):
    world = make_world(2)
    world.grid.push_messages(messages(world, [0], config={"local-epochs": 2}))
    with pytest.raises(PayloadError, match="local-epochs"):
        world.grid.push_messages(messages(world, [1], config={"local-epochs": value}))


def test_a_node_that_does_not_exist_is_refused():
    world = make_world(2)
    with pytest.raises(NetworkError, match="nodes are 1000 to 1001"):
        world.grid.push_messages(messages(world, [2]))


def test_bar_9_more_nodes_than_there_are_is_an_error():
    world = make_world(3)
    strategy = FedAvg(min_available_nodes=4)
    with pytest.raises(NoNodesError, match="min_available_nodes is 4"):
        start(strategy, world.grid, world.initial(), rounds=1, seed=1)


class Nobody:
    """A timetable of devices that never come."""

    def is_on(self, device, time):
        return False

    def next_change(self, device, time):
        return math.inf


def test_bar_9_devices_that_never_come_are_an_error():
    world = make_world(3, timetable=Nobody())
    began = time.perf_counter()
    with pytest.raises(NoNodesError, match="none will ever come"):
        start(FedAvg(), world.grid, world.initial(), rounds=1, seed=1)
    assert time.perf_counter() - began < 2


def test_bar_9_a_minimum_that_is_never_met_at_one_time_is_an_error():
    timetable = OnOffAvailability(1.0, 300.0).start(4, 1)  # all at once: hardly in 2e7 changes
    world = make_world(4, timetable=timetable)
    with session(world.grid, 1), pytest.raises(NoNodesError, match="never met"):
        FedAvg(min_available_nodes=4).configure_train(
            1, world.initial(), ConfigRecord(), world.grid
        )


def test_bar_9_polling_for_a_lost_message_is_an_error():
    world = make_world(1, loss=0.999999)
    ids = world.grid.push_messages(messages(world, [0]))
    assert world.grid.pull_messages(ids) == []  # the moment at which it is lost
    assert world.grid.pull_messages(ids) == []
    with pytest.raises(NetworkError, match="is_lost"):
        world.grid.pull_messages(ids)


def test_waiting_for_devices_takes_virtual_time():
    timetable = OnOffAvailability(50.0, 50.0).start(20, 1)
    world = make_world(20, timetable=timetable)
    start(
        FedAvg(min_available_nodes=14, fraction_evaluate=0.0),
        world.grid,
        world.initial(),
        rounds=3,
        seed=1,
        timeout=30.0,
    )
    assert world.grid.now > 0
    assert all(timetable.is_on(t.device, t.pushed) for t in world.grid.trips)


def test_pulling_advances_virtual_time_to_the_next_reply():
    world = make_world(3, latency=[3.0, 1.0, 2.0], speed=1e12)
    ids = world.grid.push_messages(messages(world, range(3)))
    seen = []
    while len(seen) < 3:
        seen += [(s, world.grid.now) for s in sources(world.grid.pull_messages(ids))]
    assert [s for s, _ in seen] == [1, 2, 0]
    assert [t for _, t in seen] == pytest.approx([2.0, 4.0, 6.0])


def test_bytes_are_conserved():
    """Released payloads are those that arrived plus those that were lost, each way."""
    world = make_world(loss=0.2, **heterogeneous())
    world.grid.send_and_receive(messages(world, range(20)))
    world.grid.send_and_receive(messages(world, range(20)))
    traffic = world.grid.take_traffic()
    trips = world.grid.trips
    down = [t for t in trips if not math.isnan(t.received) or t.outcome == "lost-down"]
    up = [t for t in trips if t.outcome in ("ok", "lost-up")]
    assert traffic.bytes_down == sum(t.bytes_down for t in down) == 40 * MODEL_BYTES
    assert traffic.bytes_up == sum(t.bytes_up for t in up)
    assert traffic.messages_sent == len(trips) + len(up)
    assert traffic.messages_lost == sum(t.is_lost for t in trips)


def test_bar_4_a_time_to_live_ends_the_wait_at_its_own_moment():
    world = make_world(2, latency=[0.0, 1e5], speed=1e9)
    sent = messages(world, range(2), ttl=10.0)
    assert sources(world.grid.send_and_receive(sent)) == [0]
    assert world.grid.now == 10.0
    assert world.grid.is_lost(sent[1].metadata.message_id)
    world = make_world(1, latency=30_000.0, speed=1e9)  # beyond Flower's default of 43,200 s
    assert sources(world.grid.send_and_receive(messages(world, [0]))) == [0]


def test_a_time_to_live_can_end_in_an_error_reply():
    world = make_world(1, latency=50.0, loss_reply="error")
    reply = world.grid.send_and_receive(messages(world, [0], ttl=10.0))[0]
    assert reply.has_error()
    assert reply.error.reason == "expired"
    world.grid.advance(200)
    assert world.grid.trips[0].outcome == "expired"


@pytest.mark.parametrize("options", [{"executor": "client_app"}, {"accounting": "flower"}])
def test_late_replies_are_forgotten_whatever_the_executor(options):
    world = make_world(2, latency=[0.0, 5.0], speed=1e9, **options)
    for _ in range(6):
        world.grid.send_and_receive(messages(world, range(2)), timeout=1.0)
    gc.collect()
    assert not world.grid._flights
    world.grid.advance(60)
    assert not world.grid._given_up
    assert not world.grid._uncomputed
    assert {trip.outcome for trip in world.grid.trips} == {"ok"}


def test_one_message_twice_in_a_push_is_refused():
    world = make_world(2)
    (message,) = messages(world, [0])
    with pytest.raises(PayloadError, match="twice"):
        world.grid.push_messages([message, message])


def test_a_device_with_state_works_in_the_order_of_arrival():
    """The small instruction overtakes the large one on the shared link."""
    log = []
    world = make_world(1, down=64e3, executor="client_app", app=echo_app(log))
    (large,) = messages(world, [0], config={"server-round": 1})
    (small,) = messages(world, [0], config={"server-round": 2})
    small.content["arrays"] = ArrayRecord()
    world.grid.send_and_receive([large, small])
    assert [(server_round, n) for _, server_round, n in log] == [(2, 1), (1, 2)]


@given(
    seed=st.integers(0, 10_000),
    loss=st.floats(0, 0.5),
    latency=st.floats(0, 3),
    rate=st.floats(1e3, 1e8),
    server=st.floats(1e4, 1e9),
)
def test_nothing_arrives_before_it_can_and_no_byte_is_lost_sight_of(
    seed, loss, latency, rate, server
):
    world = make_world(4, up=rate, down=rate, latency=latency, server=server, loss=loss, seed=seed)
    world.grid.send_and_receive(messages(world, range(4)))
    world.grid.send_and_receive(messages(world, range(4)))
    traffic, least = world.grid.take_traffic(), 8 * MODEL_BYTES / min(rate, server) + latency
    sent_up = 0
    for trip in world.grid.trips:
        if not math.isnan(trip.received):
            assert trip.received - trip.pushed >= least * (1 - 1e-9)
        if trip.outcome == "ok":
            assert trip.finished - trip.computed >= least * (1 - 1e-9)
        sent_up += trip.outcome in ("ok", "lost-up")
    assert traffic.bytes_down == 8 * MODEL_BYTES
    assert traffic.bytes_up == sent_up * MODEL_BYTES
    assert traffic.messages_lost == sum(trip.is_lost for trip in world.grid.trips)


def test_late_messages_can_be_taken_off_the_network():
    """Device 0 is in time, 1 still receives, 2 still works, 3 is on its way back."""
    work = LOCAL.local_epochs * make_world(4).trainer.data.size
    world = make_world(
        4,
        down=[1e9, 1e3, 1e9, 1e9],
        up=[1e9, 1e9, 1e9, 1e3],
        speed=[1e9, 1e9, float(work[2]) / 5, 1e9],
        cancel_late=True,
    )
    assert sources(world.grid.send_and_receive(messages(world, range(4)), timeout=1.0)) == [0]
    world.grid.advance(60)
    outcomes = [trip.outcome for trip in world.grid.trips]
    assert outcomes == ["ok", "cancelled-down", "cancelled", "cancelled-up"]
    assert [trip.finished for trip in world.grid.trips[1:]] == [
        1.0,
        pytest.approx(5.0, abs=1e-3),
        1.0,
    ]
    traffic = world.grid.take_traffic()
    assert traffic.messages_sent == 6
    assert traffic.messages_lost == 2
