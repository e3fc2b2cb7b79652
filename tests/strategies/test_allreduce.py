import copy
import logging
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from strategies.allreduce import AllReduceSGD
from tests.plain_grid import PlainGrid, flower_identity
from tests.strategies.peer_worlds import OPTIMUM, B, D, H, N, error, gradients, q8_app
from topologies.collectives import bml
from topologies.placement import COLLECTIVES

LOCAL = {"mode": "local_sgd", "local-steps": 20, "learning-rate": 0.05}
ZERO = ArrayRecord({"w": Array(np.zeros(D))})


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("flwr").setLevel(logging.ERROR)


def make(**options):
    return AllReduceSGD(**{"fraction_evaluate": 0.0, **options})


class DirectGrid(PlainGrid):
    """Without copies: the apps here change nothing."""

    def send_and_receive(self, messages, *, timeout=None):
        at = self.contexts
        return [self.app(message=m, context=at[m.metadata.dst_node_id]) for m in messages]


def run(strategy, rounds=20, *, grid=None, initial=ZERO, config=None):
    with flower_identity(0):
        return strategy.start(
            grid or DirectGrid(q8_app(), N),
            initial,
            num_rounds=rounds,
            train_config=ConfigRecord(config or {}),
        )


def final(strategy, rounds=20, **options):
    return run(strategy, rounds, **options).arrays["w"].numpy()


def descent(rate, rounds=20):
    x = np.zeros(D)
    for _ in range(rounds):
        x = x - rate * gradients(np.tile(x, (N, 1))).mean(0)
    return x


# --- what all collectives have in common ----------------------------------------------------------


@pytest.mark.parametrize("collective", [*sorted(COLLECTIVES), None])
def test_every_collective_is_gradient_descent_on_all_data(collective):
    """None: one reduction, whatever the collective."""
    strategy = make(learning_rate=0.1)
    if collective is not None:
        strategy = make(collective=collective, arithmetic="schedule", learning_rate=0.1)
    np.testing.assert_allclose(final(strategy), descent(0.1), rtol=1e-12)
    if collective != "all_to_all":
        assert strategy.device_models == {}


def test_ranks_that_round_differently_are_shown():
    strategy = make(collective="all_to_all", arithmetic="schedule", learning_rate=0.1)
    result = run(strategy)
    models = strategy.device_models["w"]
    assert models.shape == (N, D)
    assert 0 < (models - models[0]).abs().max() < 1e-14
    assert 0 < result.train_metrics_clientapp[20]["consensus_distance"] < 1e-28


def test_a_schedule_of_ones_own_gives_the_order():
    given = make(schedule=bml(2, 3), arithmetic="schedule", learning_rate=0.1)
    named = make(collective="bml", arithmetic="schedule", learning_rate=0.1)
    np.testing.assert_array_equal(final(given), final(named))
    with pytest.raises(ValueError, match="levels = 4: 8 ranks are no"):
        run(make(collective="bml", levels=4, arithmetic="schedule", learning_rate=0.1))


def test_the_instructions_say_how_gradients_travel():
    strategy = make(
        collective="bml",
        learning_rate=0.1,
        barrier="local",
        overlap=True,
        fusion_bytes=100,
        on_failure="reroute",
        step_latency=2e-5,
        wire_dtype="float16",
    )
    grid = PlainGrid(q8_app(), N)
    with flower_identity(0):
        messages = list(strategy.configure_train(3, ZERO, ConfigRecord({"batch-size": 8}), grid))
    assert [m.metadata.dst_node_id for m in messages] == list(range(1000, 1000 + N))
    assert all(m.content is messages[0].content for m in messages)
    exchange = dict(messages[0].content["exchange"])
    assert exchange.pop("payload_bytes") == 2 * D
    assert exchange == {
        "kind": "collective",
        "collective": "bml",
        "when": "with",
        "barrier": "local",
        "fusion_bytes": 100,
        "on_failure": "reroute",
        "on_device_failure": "error",
        "step_latency": 2e-5,
    }
    assert dict(messages[0].content["config"]) == {
        "batch-size": 8, "server-round": 3, "mode": "gradient", "learning-rate": 0.1,
    }  # fmt: skip


# --- optimisers -----------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"weight_decay": 0.1}, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.8, "weight_decay": 0.1}, {"momentum": 0.8}),
    "nesterov": (
        torch.optim.SGD,
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.8},
    ),
    "adam": (torch.optim.Adam, {"betas": (0.8, 0.9), "weight_decay": 0.1}, {"betas": (0.8, 0.9)}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers_are_those_of_torch(name):
    of_torch, theirs, ours = OPTIMIZERS[name]
    w = torch.zeros(D, dtype=torch.float64, requires_grad=True)
    optimizer = of_torch([w], lr=0.05, **theirs)
    for _ in range(20):
        w.grad = torch.from_numpy(gradients(np.tile(w.detach().numpy(), (N, 1))).mean(0))
        optimizer.step()
    strategy = make(optimizer=name, weight_decay=0.1, learning_rate=0.05, **ours)
    np.testing.assert_allclose(final(strategy), w.detach().numpy(), rtol=1e-12)
    np.testing.assert_array_equal(final(strategy), final(strategy))  # a new start forgets


def test_the_rate_follows_a_schedule():
    x = np.zeros(D)
    for number in range(1, 6):
        x = x - 0.1 / number * gradients(np.tile(x, (N, 1))).mean(0)
    strategy = make(learning_rate=0.1, rate_schedule=lambda number: 1 / number)
    np.testing.assert_allclose(final(strategy, 5), x, rtol=1e-12)
    from_config = make(rate_schedule=lambda number: 1 / number)
    np.testing.assert_allclose(final(from_config, 5, config={"learning-rate": 0.1}), x, rtol=1e-12)
    with pytest.raises(ValueError, match="learning_rate: give the strategy one"):
        final(make(), 1)


# --- local steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"arithmetic": "schedule"},
        {"optimizer": "nesterov", "momentum": 0.0, "server_learning_rate": 1.0},
    ],
    ids=["periodic averaging", "DiLoCo without momentum at rate 1"],
)
def test_averages_of_local_work_are_federated_averaging(options):
    ours = make(exchange_period=20, learning_rate=0.05, **options)
    expected = final(FedAvg(fraction_evaluate=0), 10, config=LOCAL)
    np.testing.assert_allclose(final(ours, 10), expected, rtol=1e-12)


@pytest.mark.parametrize(("period", "rounds", "bar"), [(5, 60, 2.629751e-2), (20, 30, 3.066117e-1)])
def test_local_steps_have_the_fixed_point_of_federated_averaging(period, rounds, bar):
    """Biased; one step has none, see below."""
    strategy = make(exchange_period=period, learning_rate=0.05)
    found = error(final(strategy, rounds)[None])
    assert found == pytest.approx(bar, rel=1e-3)


def test_diloco_reaches_the_fixed_point_by_round_50():
    strategy = make(
        exchange_period=20, learning_rate=0.05, optimizer="nesterov", server_learning_rate=0.7,
        momentum=0.9, collective="ps_colocated",
    )  # fmt: skip
    assert error(final(strategy, 50)[None]) == pytest.approx(3.0661e-1, rel=1e-3)
    x, v = np.zeros(D), np.zeros(D)
    for _ in range(7):
        y = np.tile(x, (N, 1))
        for _ in range(20):
            y = y - 0.05 * gradients(y)
        delta = x - y.mean(0)
        v = 0.9 * v + delta
        x = x - 0.7 * (delta + 0.9 * v)
    np.testing.assert_allclose(final(strategy, 7), x, rtol=1e-12)


# --- what travels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_wire_format_rounds_and_weighs(dtype):
    strategy = make(collective="bml", wire_dtype=dtype, learning_rate=0.1)
    exact = final(make(learning_rate=0.1), 1)
    found = final(strategy, 1)
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert 0 < np.abs(found - exact).max() <= 2 * eps * 0.1 * np.abs(B / N).sum(0).max()
    assert strategy.payload_bytes() == D * (4 if dtype == "float32" else 2)
    summed = make(collective="bml", wire_dtype=dtype, learning_rate=0.1, arithmetic="schedule")
    shares = torch.from_numpy(-B / N).to(getattr(torch, dtype))
    assert np.abs(final(summed, 1) - exact).max() <= 8 * eps * 0.1 * shares.abs().max().item() * N
    # Every rank's mean is a number of the wire's type.
    mean = torch.from_numpy(final(summed, 1) / -0.1)
    torch.testing.assert_close(mean.to(getattr(torch, dtype)).double(), mean, rtol=1e-15, atol=0.0)


def test_the_largest_entries_travel_with_their_places():
    strategy = make(collective="all_to_all", top_k=0.3, learning_rate=0.1)
    found = final(strategy, 1)
    expected = np.zeros((N, D))
    for row, out in zip(-B, expected, strict=True):
        best = np.argsort(-np.abs(row))[:3]
        out[best] = row[best]
    np.testing.assert_allclose(found, -0.1 * expected.mean(0), rtol=1e-12)
    assert strategy.payload_bytes() == 3 * (8 + 4)
    short = make(collective="all_to_all", top_k=0.3, wire_dtype="bfloat16", learning_rate=0.1)
    final(short, 1)
    assert short.payload_bytes() == 3 * (2 + 4)


def test_what_is_left_out_is_sent_later():
    """With error feedback the sum of all that was sent is the sum of all gradients but a rest."""
    options = {"collective": "all_to_all", "top_k": 0.2, "learning_rate": 0.1}
    with_feedback = error(final(make(**options), 80)[None])
    without = error(final(make(**options, error_feedback=False), 80)[None])
    assert with_feedback < 0.1 < 0.4 < without


def test_a_large_models_bytes_can_be_charged():
    assert make(profile="vgg19").payload_bytes() == 574_668_960
    assert make(profile="vgg19", wire_dtype="float16").payload_bytes() == 287_334_480
    assert make(payload=10).payload_bytes() == 10
    assert make().payload_bytes() is None


def test_bad_chunks_show_in_the_models():
    options = {"collective": "bml", "arithmetic": "schedule", "learning_rate": 0.1}
    lossy = make(**options, chunk_loss=0.01, seed=1)
    result = run(lossy, 10)
    assert lossy.device_models["w"].shape == (N, D)
    assert result.train_metrics_clientapp[10]["consensus_distance"] > 1e-6
    np.testing.assert_array_equal(
        result.arrays["w"].numpy(), lossy.device_models["w"].mean(0).numpy()
    )
    again = make(**options, chunk_loss=0.01, seed=1)
    np.testing.assert_array_equal(final(again, 10), result.arrays["w"].numpy())
    other = make(**options, chunk_loss=0.01, seed=2)
    assert not np.array_equal(final(other, 10), result.arrays["w"].numpy())


# --- weights, devices that come and go, strange models --------------------------------------------


def sized_app(sizes):
    """Return an app in which device i has so many samples, and gradient i + 1 everywhere."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        i = context.node_config["partition-id"]
        gradient = {
            key: Array(np.full_like(array.numpy(), i + 1))
            for key, array in message.content["arrays"].items()
        }
        metrics = MetricRecord({"num-examples": sizes[i], "train_loss": float(i)})
        content = {"gradients": ArrayRecord(gradient), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    return app


def test_gradients_can_weigh_by_samples():
    grid = PlainGrid(sized_app([1, 2, 5]), 3)
    strategy = make(learning_rate=1.0, weighted_by_key="num-examples")
    assert final(strategy, 1, grid=grid)[0] == pytest.approx(-(1 * 1 + 2 * 2 + 5 * 3) / 8)
    plain = make(learning_rate=1.0)
    assert final(plain, 1, grid=PlainGrid(sized_app([1, 2, 5]), 3))[0] == pytest.approx(-2.0)
    empty = make(learning_rate=1.0, weighted_by_key="num-examples")
    with pytest.raises(ValueError, match="'samples': node 1000 replied the metrics num-examples"):
        run(
            make(learning_rate=1.0, weighted_by_key="samples"), grid=PlainGrid(sized_app([1, 1]), 2)
        )
    with pytest.raises(ValueError, match="every reply's 'num-examples' is 0"):
        run(empty, 1, grid=PlainGrid(sized_app([0, 0, 0]), 3))


def test_scalars_and_counters_pass_through():
    initial = ArrayRecord(
        {
            "count": Array(np.array(7, np.int64)),
            "scale": Array(np.array(1.5, np.float32)),
            "w": Array(np.zeros((2, 2))),
        }
    )
    for options in ({}, {"arithmetic": "schedule", "collective": "ps_colocated"}):
        strategy = make(learning_rate=1.0, **options)
        found = run(strategy, 2, grid=PlainGrid(sized_app([1, 1, 1]), 3), initial=initial).arrays
        assert list(found) == ["count", "scale", "w"]
        assert found["count"].numpy() == 7
        assert found["count"].numpy().dtype == np.int64
        assert found["scale"].numpy().dtype == np.float32
        assert found["scale"].numpy() == pytest.approx(-2.5)
        assert found["w"].numpy().tolist() == [[-4.0, -4.0], [-4.0, -4.0]]


def local_app():
    """Return an app whose device i replies i everywhere, its counter moved by i."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        i = context.node_config["partition-id"]
        arrays = {}
        for key, array in message.content["arrays"].items():
            value = array.numpy()
            arrays[key] = Array(
                np.asarray(value + i) if value.dtype.kind == "i" else np.full(value.shape, float(i))
            )
        content = {
            "arrays": ArrayRecord(arrays),
            "metrics": MetricRecord({"num-examples": 1, "train_loss": 0.0}),
        }
        return Message(RecordDict(content), reply_to=message)

    return app


def test_statistics_of_batches_are_averaged_and_not_stepped():
    initial = ArrayRecord(
        {
            "w": Array(np.full(2, 5.0)),
            "norm.running_var": Array(np.full(2, 5.0)),
            "norm.num_batches_tracked": Array(np.array(10, np.int64)),
        }
    )
    strategy = make(
        exchange_period=2, learning_rate=1.0, optimizer="nesterov", server_learning_rate=0.7
    )
    found = run(strategy, 1, grid=PlainGrid(local_app(), 3), initial=initial).arrays
    assert found["norm.running_var"].numpy().tolist() == [1.0, 1.0]
    assert found["norm.num_batches_tracked"].numpy() == 11
    assert found["w"].numpy() == pytest.approx(5 - 0.7 * (4 + 0.9 * 4))
    strategy = make(learning_rate=1.0, weight_decay=0.1)
    found = run(strategy, 1, grid=PlainGrid(sized_app([1, 1, 1]), 3), initial=initial).arrays
    assert found["norm.running_var"].numpy().tolist() == [5.0, 5.0]
    assert found["w"].numpy() == pytest.approx(5 - 2 - 0.5)


class UnreliableGrid(DirectGrid):
    """Some devices fail in some rounds, and every reply comes twice."""

    def __init__(self, fails, app=None):
        super().__init__(app or q8_app(), N)
        self.fails = fails

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = super().send_and_receive(messages, timeout=timeout)
        out = []
        for message, reply in zip(messages, replies, strict=True):
            number = message.content["config"]["server-round"]
            if self.fails(number, message.metadata.dst_node_id - 1000):
                out.append(Message(Error(3, "gone"), reply_to=message))
            else:
                out += [reply, reply]
        return out[::-1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"arithmetic": "schedule", "collective": "bml", "on_device_failure": "shrink"},
        {"arithmetic": "schedule", "collective": "all_to_all", "optimizer": "adam"},
        {"collective": "all_to_all", "top_k": 0.5},
    ],
    ids=["mean", "bml", "own rows", "sparse"],
)
def test_devices_that_fail_stop_nobody(options):
    def fails(number, device):
        return number == 3 or (number == 2 and device < 3) or (number == 5 and device == 0)

    strategy = make(learning_rate=0.1, **options)
    result = run(strategy, 30, grid=UnreliableGrid(fails))
    assert 3 not in result.train_metrics_clientapp
    assert error(result.arrays["w"].numpy()[None]) < (0.5 if "top_k" in options else 0.1)
    assert strategy.nodes == list(range(1000, 1000 + N))


def test_replies_are_not_changed():
    grid = UnreliableGrid(lambda number, device: False)
    strategy = make(learning_rate=0.1, arithmetic="schedule", wire_dtype="float16")
    with flower_identity(0):
        messages = list(strategy.configure_train(1, ZERO, ConfigRecord(), grid))
        replies = grid.send_and_receive(messages)
        before = [copy.deepcopy(dict(reply.content)) for reply in replies]
        strategy.aggregate_train(1, replies)
    assert [dict(reply.content) for reply in replies] == before


def test_nobody_there_changes_nothing():
    strategy = make(learning_rate=0.1)
    result = run(strategy, 3, grid=UnreliableGrid(lambda number, device: True))
    assert len(result.arrays) == 0 or not result.arrays["w"].numpy().any()
    assert strategy.aggregate_train(1, []) == (None, None)
    assert strategy.aggregate_evaluate(1, []) is None


def test_an_app_that_ignores_the_mode_is_told():
    app = ClientApp()

    @app.train()
    def train(message, context):
        metrics = MetricRecord({"num-examples": 1})
        content = {"arrays": message.content["arrays"], "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    with pytest.raises(ValueError, match="node 1000 was asked for gradients and replied"):
        run(make(learning_rate=0.1), 1, grid=PlainGrid(app, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"collective": "bmi"}, "collective = 'bmi': must be one of all_to_all"),
        ({"exchange_period": 0}, "exchange_period = 0: must be at least 1"),
        ({"optimizer": "lion"}, "optimizer = 'lion': must be one of sgd"),
        ({"arithmetic": "exact"}, "arithmetic = 'exact': must be one of mean, schedule"),
        ({"wire_dtype": "int8"}, "wire_dtype = 'int8': must be one of float16"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0: must be at least 0"),
        ({"learning_rate": math.nan}, "learning_rate = nan: must be at least 0"),
        ({"server_learning_rate": 0.7}, "with exchange_period = 1 the one rate"),
        ({"momentum": 1.0}, "momentum = 1.0: must be at least 0 and less than 1"),
        ({"betas": (0.9, 1.0)}, "betas = 1.0"),
        ({"epsilon": 0.0}, "epsilon = 0.0: must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay = -1.0"),
        ({"top_k": 0.0, "collective": "all_to_all"}, "top_k = 0.0: must be above 0"),
        ({"top_k": 0.1}, "partial sums of sparse vectors fill up; use all_to_all"),
        ({"chunk_loss": 0.1}, "need arithmetic = 'schedule'"),
        ({"chunk_loss": 2.0, "arithmetic": "schedule"}, "chunk_loss = 2.0: must be from 0 to 1"),
        ({"profile": "vgg20"}, "profile = 'vgg20': must be one of bert_large"),
        ({"payload": 0}, "payload = 0: must be at least 1"),
        ({"barrier": "none"}, "barrier = 'none': must be one of global, local"),
        ({"on_failure": "retry"}, "on_failure = 'retry'"),
        ({"on_device_failure": "wait"}, "on_device_failure = 'wait'"),
        ({"step_latency": -1.0}, "step_latency = -1.0: must be at least 0"),
        ({"fusion_bytes": -1}, "fusion_bytes = -1: must be at least 0"),
        ({"fraction_evaluate": 2.0}, "fraction_evaluate = 2.0: must be from 0 to 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AllReduceSGD(**arguments)


def test_the_reference_problem_is_solved():
    assert error(final(make(learning_rate=0.5), 80)[None]) < 1e-12
    np.testing.assert_allclose(OPTIMUM, np.linalg.solve(H.mean(0), B.mean(0)), rtol=1e-12)
