"""FedAsync, FedBuff and rounds with a deadline: equations, and the loop on a plain grid."""

import copy

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy

from strategies import linear
from strategies.asynchronous import DeadlineFedAvg, FedAsync, FedBuff, Update
from strategies.compat import instructions
from tests.plain_grid import PlainGrid, flower_identity
from tests.strategies.peer_worlds import D, N
from tests.strategies.server_worlds import error, local, run_plain, server_app


def round_robin(strategy, replies):
    """Drive the server alone: reply t is of device t mod 8, min(t mod 8, t) versions old."""
    strategy.begin(ArrayRecord({"w": Array(np.zeros(D))}))
    versions = [strategy.model["w"].numpy()]
    for t in range(replies):
        stale = min(t % N, t)
        base = versions[max(0, len(versions) - 1 - stale)]
        work = {"w": Array(local(t % N, base))}
        if strategy.absorb(Update(work, {"w": torch.from_numpy(base)}, stale)):
            versions.append(strategy.model["w"].numpy())
    return error(versions[-1])


@pytest.mark.parametrize(
    ("rate", "replies", "expected"),
    [(0.6, 80, 2.895981e-1), (0.6, 400, 3.838809e-1), (0.6, 2000, 3.838860e-1),
     (0.1, 4000, 7.167676e-2)],
)  # fmt: skip
def test_fedasync_has_the_stated_errors(rate, replies, expected):
    found = round_robin(FedAsync(mixing_rate=rate), replies)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({"buffer_size": 4}, 1.109987e-1), ({"buffer_size": 8}, 1.394779e-1),
     ({"buffer_size": 8, "staleness": "constant"}, 2.629751e-2)],
)  # fmt: skip
def test_fedbuff_has_the_stated_errors(arguments, expected):
    assert round_robin(FedBuff(**arguments), 3000) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("versions", "expected"), [(80, 2.895981e-1), (400, 3.838809e-1)])
def test_fedasync_through_its_own_loop_is_the_round_robin(versions, expected):
    """All are asked at once and answer in order: staleness 0 to 7 in turn."""
    strategy = FedAsync()
    result = run_plain(strategy, versions)
    assert error(result.arrays["w"].numpy()) == pytest.approx(expected, rel=1e-6)
    stale = [result.train_metrics_clientapp[v]["mean_staleness"] for v in range(1, versions + 1)]
    assert stale == [i % N for i in range(versions)]


def fedbuff_loop(buffer, versions, *, rate=1.0, momentum=0.0):
    """All are asked at once and answer in order, as a plain loop."""
    x, velocity, version, total, count = np.zeros(D), np.zeros(D), 0, 0.0, 0
    while True:
        base, began = x, version
        for i in range(N):
            total = total + (1 + version - began) ** -0.5 * (local(i, base) - base)
            count += 1
            if count == buffer:
                velocity = momentum * velocity + total / buffer
                x, version, total, count = x + rate * velocity, version + 1, 0.0, 0
                if version == versions:
                    return x


@pytest.mark.parametrize(
    ("buffer", "rate", "momentum"), [(8, 1.0, 0.0), (3, 1.0, 0.0), (5, 0.7, 0.9), (20, 0.7, 0.5)]
)
def test_fedbuff_through_its_own_loop_equals_a_plain_loop(buffer, rate, momentum):
    strategy = FedBuff(buffer_size=buffer, server_learning_rate=rate, server_momentum=momentum)
    result = run_plain(strategy, 12)
    expected = fedbuff_loop(buffer, 12, rate=rate, momentum=momentum)
    np.testing.assert_allclose(result.arrays["w"].numpy(), expected, rtol=0, atol=1e-12)


def test_a_full_round_of_fedbuff_is_fedavg():
    ours = run_plain(FedBuff(buffer_size=N), 8).arrays["w"].numpy()
    theirs = run_plain(linear.FedAvg(fraction_evaluate=0.0), 8).arrays["w"].numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_rounds_with_a_deadline_are_fedavg_where_nobody_is_late():
    ours = run_plain(DeadlineFedAvg(deadline=60.0), 8).arrays["w"].numpy()
    theirs = run_plain(linear.FedAvg(fraction_evaluate=0.0), 8).arrays["w"].numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_staleness_weighs_as_the_papers_say():
    polynomial = FedAsync(staleness_exponent=0.5)
    assert [polynomial.weight(s) for s in (0, 3, 8)] == pytest.approx([1, 1 / 2, 1 / 3])
    hinge = FedAsync(staleness="hinge", hinge_slope=10, hinge_threshold=4)
    assert [hinge.weight(s) for s in (0, 4, 5, 6)] == pytest.approx([1, 1, 1 / 11, 1 / 21])
    assert FedBuff(staleness="constant").weight(100) == 1


def test_a_proximal_term_reaches_the_devices():
    found = run_plain(FedBuff(buffer_size=8, proximal_mu=10.0), 1).arrays["w"].numpy()
    expected = np.mean([local(i, np.zeros(D), proximal=10.0) for i in range(N)], axis=0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_too_stale_updates_are_dropped_and_counted():
    strategy = FedAsync(max_staleness=3)
    result = run_plain(strategy, 9)
    stale = [result.train_metrics_clientapp[v]["mean_staleness"] for v in range(1, 10)]
    dropped = [result.train_metrics_clientapp[v]["updates_dropped"] for v in range(1, 10)]
    assert stale == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert dropped == [0, 0, 0, 0, 4, 0, 0, 0, 4]


class Flaky(PlainGrid):
    """Answers some instructions with an error, some twice, and some only when asked again."""

    def __init__(self, app, n_nodes):
        super().__init__(app, n_nodes)
        self.asked = 0
        self.late = {}

    def push_messages(self, messages):
        messages = list(messages)
        ids = super().push_messages(messages)
        for message, message_id in zip(messages, ids, strict=True):
            if int(message_id) % 5 == 0:
                self.replies[message_id] = Message(Error(2, "broken"), reply_to=message)
            if int(message_id) % 3 == 0:
                self.late[message_id] = self.replies.pop(message_id)
        return ids

    def pull_messages(self, message_ids):
        found = super().pull_messages(message_ids)
        self.replies |= self.late
        self.late = {}
        return found + found[:1]


@pytest.mark.parametrize(
    "make",
    [FedAsync, lambda: FedBuff(buffer_size=3), lambda: DeadlineFedAvg(deadline=0.05),
     lambda: FedAsync(concurrency=2)],
    ids=["fedasync", "fedbuff", "deadline", "two at work"],
)  # fmt: skip
def test_errors_duplicates_and_late_replies_do_no_harm(make, monkeypatch):
    naps = []
    monkeypatch.setattr("strategies.inflight.time.sleep", naps.append)
    grid = Flaky(server_app(), N)
    strategy = make()
    result = run_plain(strategy, 40, grid=grid)
    assert strategy.version == 40
    assert np.isfinite(result.arrays["w"].numpy()).all()
    flights = strategy._flights
    assert len(flights) <= (strategy.concurrency or N)


def test_it_gives_up_where_nothing_but_errors_comes_back():
    app = ClientApp()

    @app.train()
    def train(message, context):
        return Message(Error(2, "out of memory"), reply_to=message)

    with pytest.raises(RuntimeError, match=r"20\d instructions in a row .* out of memory"):
        run_plain(FedAsync(), 3, app=app)


def test_replies_are_left_as_they_were_and_buffers_pass():
    app = ClientApp()
    seen = []

    @app.train()
    def train(message, context):
        arrays = {k: a.numpy() for k, a in message.content["arrays"].items()}
        assert {k: (v.dtype, v.shape) for k, v in arrays.items()} == shapes
        shift = context.node_config["partition-id"] + 1
        arrays = {k: np.asarray(v + shift).astype(v.dtype) for k, v in arrays.items()}
        record = ArrayRecord({k: Array(v) for k, v in arrays.items()})
        metrics = MetricRecord({"num-examples": 3})
        reply = Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)
        seen.append((reply, copy.deepcopy(reply.content)))
        return reply

    start = {
        "scale": np.asarray(np.float32(1.0)),
        "seen": np.array([3, 5], np.int64),
        "weight": np.zeros((2, 3), np.float16),
    }
    shapes = {k: (v.dtype, v.shape) for k, v in start.items()}
    for strategy in (FedAsync(), FedBuff(buffer_size=3), DeadlineFedAvg(deadline=1.0)):
        with flower_identity(0):
            result = strategy.start(
                PlainGrid(app, 4),
                ArrayRecord({k: Array(v) for k, v in start.items()}),
                num_rounds=6,
            )
        assert {k: (a.numpy().dtype, a.numpy().shape) for k, a in result.arrays.items()} == shapes
    assert seen
    for reply, before in seen:
        for key, array in before["arrays"].items():
            np.testing.assert_array_equal(array.numpy(), reply.content["arrays"][key].numpy())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FedAsync(mixing_rate=0), "mixing_rate = 0: must be above 0 and up to 1"),
        (lambda: FedAsync(staleness="linear"), "staleness = linear: must be one of constant"),
        (lambda: FedBuff(buffer_size=0), "buffer_size = 0: must be at least 1"),
        (lambda: FedBuff(server_momentum=1), "server_momentum = 1"),
        (lambda: FedBuff(concurrency=0), "concurrency = 0"),
        (lambda: DeadlineFedAvg(deadline=0), "deadline = 0: must be above 0"),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_an_instruction_like_earlier_ones_is_that_made_from_scratch():
    contents, like = [RecordDict(), RecordDict()], {}
    with flower_identity(0):
        [first] = instructions("train", contents[:1], [1001], like)
        first.metadata.__dict__.update(_message_id="17", _run_id=5)  # a grid has sent it
        [made] = instructions("train", contents[1:], [1002], like)
        alone = Message(contents[1], 1002, "train")
    assert made.content is contents[1]
    assert not made.has_error()
    assert vars(made).keys() == vars(alone).keys()
    assert made.metadata.created_at == pytest.approx(alone.metadata.created_at, abs=1.0)
    mine, other = (vars(m.metadata) | {"_created_at": 0} for m in (made, alone))
    assert mine == other


ALL = [FedAsync, lambda: FedBuff(buffer_size=3), lambda: DeadlineFedAvg(deadline=0.05)]
WORK = np.ones(D, np.float32)


def app_that_replies(*records):
    """Return an app that replies with the same records to everybody."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        return Message(RecordDict(dict(zip("abc", records, strict=False))), reply_to=message)

    return app


@pytest.mark.parametrize("make", ALL, ids=["fedasync", "fedbuff", "deadline"])
@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([MetricRecord({"num-examples": 3})], "has no ArrayRecord"),
        ([ArrayRecord({"v": Array(WORK)})], "does not fit the model: 'w' is missing, not"),
        ([ArrayRecord({"w": Array(WORK[1:])})], r"does not fit the model: 'w' is \("),
        *(
            ([ArrayRecord({"w": Array(WORK)}), MetricRecord({"num-examples": n})], said)
            for n, said in [
                (-5, "num-examples -5; it must be a number, 0 or more"),
                (float("nan"), "num-examples nan; it must"),
                ([3, 4], r"num-examples \[3, 4\]; it must"),
            ]
        ),
    ],
)
def test_replies_that_are_no_update_are_refused(make, records, said, monkeypatch):
    monkeypatch.setattr("strategies.inflight.time.sleep", lambda seconds: None)
    with pytest.raises(ValueError, match=rf"the reply of node \d+ (has )?{said}"):
        run_plain(make(), 3, app=app_that_replies(*records))


@pytest.mark.parametrize("make", ALL, ids=["fedasync", "fedbuff", "deadline"])
@pytest.mark.parametrize(
    "metrics", [{}, {"num-examples": 0}, {"num-examples": 2.5, "loss": 1.0, "by_class": [0.5, 1.0]}]
)
def test_metrics_may_be_few_or_many(make, metrics, monkeypatch):
    monkeypatch.setattr("strategies.inflight.time.sleep", lambda seconds: None)
    records = [ArrayRecord({"w": Array(WORK)})] + ([MetricRecord(metrics)] if metrics else [])
    strategy = make()
    result = run_plain(strategy, 4, app=app_that_replies(*records))
    assert strategy.version == 4
    told = result.train_metrics_clientapp[4]
    assert {key: told[key] for key in metrics if key != "num-examples"} == {
        key: value for key, value in metrics.items() if key != "num-examples"
    }


DROPPING = [
    lambda: FedAsync(drop_non_finite=True),
    lambda: FedBuff(buffer_size=3, drop_non_finite=True),
    lambda: DeadlineFedAvg(deadline=0.05, drop_non_finite=True),
]


@pytest.mark.parametrize("make", DROPPING, ids=["fedasync", "fedbuff", "deadline"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_replies_that_are_not_finite_are_dropped_where_asked(make, bad, monkeypatch):
    monkeypatch.setattr("strategies.inflight.time.sleep", lambda seconds: None)
    app = ClientApp()

    @app.train()
    def train(message, context):
        work = WORK * (bad if context.node_config["partition-id"] == 1 else 1)
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"a": ArrayRecord({"w": Array(work)}), "m": metrics})
        return Message(content, reply_to=message)

    strategy = make()
    result = run_plain(strategy, 2 * N, app=app)
    assert np.isfinite(strategy.arrays["w"].numpy()).all()
    metrics = result.train_metrics_clientapp.values()
    assert sum(each["updates_dropped"] for each in metrics) >= 1


@pytest.mark.parametrize("make", DROPPING, ids=["fedasync", "fedbuff", "deadline"])
def test_where_nothing_is_finite_the_server_gives_up(make, monkeypatch):
    monkeypatch.setattr("strategies.inflight.time.sleep", lambda seconds: None)
    app = app_that_replies(ArrayRecord({"w": Array(WORK * np.float32(np.nan))}))
    with pytest.raises(
        RuntimeError, match=r"20\d .* the last: the reply of node \d+ is not finite"
    ):
        run_plain(make(), 2, app=app)


def test_a_metric_that_not_all_devices_have_is_left_out():
    app = ClientApp()

    @app.train()
    def train(message, context):
        device = context.node_config["partition-id"]
        metrics = MetricRecord({"num-examples": 1, "loss": float(device), f"of_{device}": 1.0})
        arrays = ArrayRecord({"w": Array(WORK)})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    told = run_plain(FedBuff(buffer_size=N), 1, app=app).train_metrics_clientapp[1]
    assert set(told) == {"loss", "mean_staleness", "updates_dropped"}
    assert told["loss"] == (N - 1) / 2


@pytest.mark.parametrize("make", ALL, ids=["fedasync", "fedbuff", "deadline"])
@pytest.mark.parametrize("sent", [np.float64, np.float16])
def test_a_model_keeps_its_type_whatever_type_devices_reply_in(make, sent):
    strategy = make()
    strategy.begin(ArrayRecord({"w": Array(np.zeros(D, np.float32))}))
    base = dict(strategy.model)
    for _ in range(3):
        strategy.absorb(Update({"w": Array(np.full(D, 0.25, sent))}, base, 0))
    strategy.end_of_replies()
    strategy._publish()
    found = strategy.arrays["w"].numpy()
    assert found.dtype == np.float32
    assert 0.2 < found[0] <= 0.25


def test_in_synchronous_rounds_of_a_wrapper_it_still_works():
    """What a wrapper with Flower's own `start` does: configure, send and receive, aggregate."""
    strategy = FedBuff(buffer_size=N)
    strategy.start, own = Strategy.start.__get__(strategy), strategy.start
    ours = run_plain(strategy, 10).arrays["w"].numpy()
    strategy.start = own
    np.testing.assert_allclose(ours, fedbuff_loop(N, 10), rtol=0, atol=1e-12)
