"""FedAvg, FedProx, FedNova, SCAFFOLD and FedDyn on the reference problem, in a plain app."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.clientapp import ClientApp

from strategies import linear
from strategies.drift import SCAFFOLD, FedDyn, FedDynHalf, FedNova, ScaffoldHalf
from tests.strategies.peer_worlds import OPTIMUM, B, D, H, N
from tests.strategies.server_worlds import error, local, run_plain, server_app

QUIET = {"fraction_evaluate": 0.0}


def half_app(half, steps=20, rate=0.05):
    """Return an app that calls a half in a training loop of its own."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        i = context.node_config["partition-id"]
        work = half.work(message, context)
        y = x = work.arrays["w"].numpy()
        control = work.terms.control["w"][0].numpy()
        for _ in range(steps):
            g = H[i] @ y - B[i] + control + (work.terms.proximal_mu or 0.0) * (y - x)
            y = y - rate * g
        metrics = MetricRecord({"num-examples": 1, "train_loss": 0.0})
        return work.reply({"w": torch.from_numpy(y)}, metrics, steps=steps, rate=rate)

    return app


def unequal(cls):
    """Let device i make i + 1 local steps."""

    class Unequal(cls):
        def configure_train(self, server_round, arrays, config, grid):
            for message in super().configure_train(server_round, arrays, config, grid):
                content = message.content.copy()
                content["config"] = content["config"].copy()
                content["config"]["local-steps"] = message.metadata.dst_node_id - 999
                message.content = content
                yield message

    return Unequal


def sampled(cls):
    """Ask two devices a round, those that numpy's generator draws."""

    class Sampled(cls):
        def configure_train(self, server_round, arrays, config, grid):
            if server_round == 1:
                self.rng = np.random.default_rng(0)
            chosen = self.rng.choice(N, 2, replace=False) + 1000
            asked = super().configure_train(server_round, arrays, config, grid)
            return [m for m in asked if m.metadata.dst_node_id in chosen]

    return Sampled


# --- the stated numbers: strategy, rounds, local steps, error -------------------------------------

PLAIN = {
    "fedavg, K = 5": (lambda: linear.FedAvg(**QUIET), 60, 5, 2.629751e-2),
    "fedavg, K = 20": (lambda: linear.FedAvg(**QUIET), 30, 20, 3.066117e-1),
    "fedavg, K = 1..8": (lambda: unequal(linear.FedAvg)(**QUIET), 60, 5, 3.401131e-1),
    "fedprox, 0": (lambda: linear.FedProx(proximal_mu=0.0, **QUIET), 30, 20, 3.0661e-1),
    "fedprox, 1": (lambda: linear.FedProx(proximal_mu=1.0, **QUIET), 40, 20, 2.0874e-1),
    "fedprox, 10": (lambda: linear.FedProx(proximal_mu=10.0, **QUIET), 160, 20, 1.7553e-2),
    "fednova, K = 1..8": (lambda: unequal(FedNova)(**QUIET), 60, 5, 3.939167e-2),
}
HALVES = {
    "scaffold": (lambda: SCAFFOLD(**QUIET), {10: 2.5375e-4, 20: 3.4727e-7, 50: 1e-12}),
    "scaffold, 2 of 8": (lambda: sampled(SCAFFOLD)(**QUIET), {50: 3.2288e-4}),
}


def check_errors(found, expected):
    for number, value in expected.items():
        if value == 1e-12:
            assert found[number] < value
        else:
            assert found[number] == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("name", PLAIN)
def test_the_stated_fixed_points_in_a_plain_app(name):
    make, rounds, steps, expected = PLAIN[name]
    result = run_plain(make(), rounds, app=server_app(steps=steps))
    assert error(result.arrays["w"].numpy()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", HALVES)
def test_the_stated_errors_of_scaffold_in_a_plain_app(name):
    make, expected = HALVES[name]
    found = {}
    run_plain(
        make(),
        max(expected),
        app=half_app(ScaffoldHalf()),
        evaluate_fn=lambda number, arrays: found.update({number: error(arrays["w"].numpy())}),
    )
    check_errors(found, expected)


def test_the_fixed_point_of_fedavg_is_its_closed_form():
    def spread(i):
        return np.eye(D) - np.linalg.matrix_power(np.eye(D) - 0.05 * H[i], 20)

    left = sum(spread(i) for i in range(N))
    right = sum(spread(i) @ np.linalg.solve(H[i], B[i]) for i in range(N))
    result = run_plain(linear.FedAvg(**QUIET), 60, app=server_app(steps=20))
    np.testing.assert_allclose(result.arrays["w"].numpy(), np.linalg.solve(left, right), atol=1e-9)


def test_one_step_of_fedavg_finds_the_optimum():
    x = np.zeros(D)
    for _ in range(500):
        x = np.mean([local(i, x, steps=1) for i in range(N)], axis=0)
    assert error(x) < 1e-12
    ours = run_plain(linear.FedAvg(**QUIET), 40, app=server_app(steps=1)).arrays["w"].numpy()
    x = np.zeros(D)
    for _ in range(40):
        x = np.mean([local(i, x, steps=1) for i in range(N)], axis=0)
    np.testing.assert_allclose(ours, x, rtol=0, atol=1e-12)


# --- FedNova --------------------------------------------------------------------------------------


def test_fednova_with_equal_steps_is_fedavg():
    ours = run_plain(FedNova(**QUIET), 10).arrays["w"].numpy()
    theirs = run_plain(linear.FedAvg(**QUIET), 10).arrays["w"].numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def accumulated(steps, *, momentum=0.0, shrink=0.0):
    """Return the weight of the gradients in `steps` local steps: each is 1 as it enters."""
    y = v = total = 0.0
    for _ in range(steps):
        v = momentum * v + 1.0 - shrink * total
        total = total + v
    return total if y == 0.0 else y


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_accumulated_gradients_are_those_of_a_loop(steps):
    k = torch.tensor([float(steps)], dtype=torch.float64)
    with_momentum = FedNova(momentum=0.9, **QUIET).accumulated(k)
    assert float(with_momentum) == pytest.approx(accumulated(steps, momentum=0.9), rel=1e-12)
    proximal = FedNova(proximal_mu=2.0, learning_rate=0.05, **QUIET).accumulated(k)
    assert float(proximal) == pytest.approx(accumulated(steps, shrink=0.1), rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [({"momentum": 0.5}, {"momentum": 0.5}),
     ({"proximal_mu": 1.0, "learning_rate": 0.05}, {"proximal": 1.0})],
    ids=["momentum", "proximal"],
)  # fmt: skip
def test_fednova_equals_a_plain_loop_with_momentum_and_with_a_proximal_term(arguments, asked):
    ours = run_plain(unequal(FedNova)(**arguments, **QUIET), 8).arrays["w"].numpy()
    x, k = np.zeros(D), np.arange(1, N + 1)
    shrink = 0.05 * arguments.get("proximal_mu", 0.0)
    a = np.array([accumulated(i, momentum=asked.get("momentum", 0.0), shrink=shrink) for i in k])
    effective = k.mean() if shrink else a.mean()
    for _ in range(8):
        d = [(x - local(i, x, steps=k[i], **asked)) / a[i] for i in range(N)]
        x = x - effective * np.mean(d, axis=0)
    np.testing.assert_allclose(ours, x, rtol=0, atol=1e-12)


def test_fednova_knows_the_steps_of_apps_that_do_not_tell():
    class Silent(FedNova):
        def asked(self):
            return {}

    ours = run_plain(Silent(**QUIET), 3, config={"local-epochs": 5, "batch-size": 0})
    theirs = run_plain(linear.FedAvg(**QUIET), 3)
    np.testing.assert_allclose(
        ours.arrays["w"].numpy(), theirs.arrays["w"].numpy(), rtol=0, atol=1e-12
    )
    with pytest.raises(ValueError, match=r"node 10\d\d does not say how many steps it made"):
        run_plain(Silent(**QUIET), 1)


# --- SCAFFOLD and FedDyn --------------------------------------------------------------------------


def test_feddyn_finds_the_optimum_that_fedavg_misses():
    result = run_plain(FedDyn(alpha=3.0, **QUIET), 40, app=half_app(FedDynHalf(alpha=3.0), 40))
    assert error(result.arrays["w"].numpy()) < 1e-4


def test_feddyn_equals_a_plain_loop():
    alpha, x, h, g = 0.5, np.zeros(D), np.zeros(D), np.zeros((N, D))
    strategy = sampled(FedDyn)(alpha=alpha, **QUIET)
    ours = run_plain(strategy, 12, app=half_app(FedDynHalf(alpha=alpha), 5)).arrays["w"].numpy()
    rng = np.random.default_rng(0)
    for _ in range(12):
        chosen = sorted(rng.choice(N, 2, replace=False))
        y = [local(i, x, steps=5, proximal=alpha, control=-g[i]) for i in chosen]
        # The proximal term of `local` pulls towards where it begins, which is x.
        moves = [each - x for each in y]
        for i, move in zip(chosen, moves, strict=True):
            g[i] -= alpha * move
        h = h - alpha / N * sum(moves)
        x = np.mean(y, axis=0) - h / alpha
    np.testing.assert_allclose(ours, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strategy", [SCAFFOLD(**QUIET), FedDyn(**QUIET)])
def test_an_app_without_the_half_is_told_so(strategy):
    with pytest.raises(ValueError, match=r"does not apply the device half .*work\(message"):
        run_plain(strategy, 1)


def test_scaffold_sends_two_payloads_each_way():
    strategy = SCAFFOLD(**QUIET)
    strategy._model = {"w": torch.zeros(D, dtype=torch.float64)}
    strategy.forget()
    sent = strategy.sent(ArrayRecord({"w": Array(np.zeros(D))}))
    assert {key: array.shape for key, array in sent.items()} == {"w": (D,), "control/w": (D,)}
    assert OPTIMUM.shape == (D,)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FedNova(momentum=1.0), "momentum = 1.0: must be in"),
        (lambda: FedNova(momentum=0.5, proximal_mu=1.0), "proximal_mu = 1.0: must be 0"),
        (lambda: SCAFFOLD(server_learning_rate=0), "server_learning_rate = 0"),
        (lambda: FedDyn(alpha=0), "alpha = 0: must be above 0"),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
