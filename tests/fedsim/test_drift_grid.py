"""FedAvg and the methods against client drift through the vectorised executor and the network."""

import logging

import numpy as np
import pytest

from fedsim.flower.session import Evaluation, start
from strategies import linear
from strategies.drift import SCAFFOLD, FedDyn, FedNova
from tests.fedsim.q8_world import error_of, q8_star
from tests.strategies.peer_worlds import D, N
from tests.strategies.server_worlds import local
from tests.strategies.test_drift import (
    HALVES,
    PLAIN,
    QUIET,
    accumulated,
    check_errors,
    sampled,
    unequal,
)


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("flwr").setLevel(logging.ERROR)


def run(strategy, rounds, **world):
    """Return the error after every round, the last model and the grid."""
    halves = getattr(strategy, "device_halves", ())
    grid, initial = q8_star(halves=halves, **world)
    found = {}

    def evaluate(arrays):
        found[len(found)] = error_of(arrays)
        return Evaluation()

    outcome = start(strategy, grid, initial, rounds=rounds, seed=1, evaluate=evaluate)
    (array,) = outcome.arrays.values()
    return found, array.numpy().ravel(), grid


def marked(names, fast):
    """Leave all but some to the study; a plain app gives their numbers by default."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.study) for name in names]


@pytest.mark.parametrize("name", marked(PLAIN, {"fedavg, K = 5", "fedprox, 1"}))
def test_the_stated_fixed_points_through_the_network(name):
    make, rounds, steps, expected = PLAIN[name]
    found, _, _ = run(make(), rounds, steps=steps)
    assert found[rounds] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", marked(HALVES, {"scaffold"}))
def test_the_stated_errors_of_scaffold_through_the_network(name):
    make, expected = HALVES[name]
    found, _, _ = run(make(), max(expected), steps=20)
    check_errors(found, expected)


@pytest.mark.study
def test_scaffold_with_two_devices_a_round_finds_the_optimum():
    found, _, _ = run(sampled(SCAFFOLD)(**QUIET), 200, steps=20)
    check_errors(found, {50: 3.2288e-4, 200: 1e-12})


@pytest.mark.study
def test_one_step_of_fedavg_finds_the_optimum():
    found, _, _ = run(linear.FedAvg(**QUIET), 500, steps=1)
    assert found[500] < 1e-12


def test_scaffold_and_its_bytes_are_two_payloads_each_way():
    strategy = SCAFFOLD(**QUIET)
    _, _, grid = run(strategy, 2, steps=3)
    assert {(trip.bytes_down, trip.bytes_up) for trip in grid.trips} == {(2 * 8 * D, 2 * 8 * D)}
    _, _, grid = run(FedDyn(**QUIET), 2, steps=3)
    assert {(trip.bytes_down, trip.bytes_up) for trip in grid.trips} == {(8 * D, 8 * D)}


def test_a_device_whose_reply_is_lost_keeps_its_control_variate():
    """c stays the mean of all c_i, which only devices whose reply arrived have changed."""
    strategy = SCAFFOLD(**QUIET)
    _, _, grid = run(strategy, 12, steps=3, loss=0.3)
    assert any(trip.outcome == "lost-up" for trip in grid.trips)
    halves = grid._executor._halves
    own = [halves.state_of(1000 + i)["scaffold"] for i in range(N)]
    for key, common in strategy._control.items():
        mean = sum(state[f"own/{key}"] for state in own if state) / N
        np.testing.assert_allclose(common.numpy(), mean.numpy(), rtol=0, atol=1e-12)


def test_feddyn_through_the_network_equals_a_plain_loop():
    alpha, x, h, g = 0.5, np.zeros(D), np.zeros(D), np.zeros((N, D))
    _, ours, _ = run(sampled(FedDyn)(alpha=alpha, **QUIET), 12, steps=5)
    rng = np.random.default_rng(0)
    for _ in range(12):
        chosen = rng.choice(N, 2, replace=False)
        moves = [local(i, x, proximal=alpha, control=-g[i]) - x for i in chosen]
        for i, move in zip(chosen, moves, strict=True):
            g[i] -= alpha * move
        h = h - alpha / N * sum(moves)
        x = x + np.mean(moves, axis=0) - h / alpha
    np.testing.assert_allclose(ours, x, rtol=0, atol=1e-12)


def test_fednova_counts_the_steps_made_and_devices_use_the_momentum_it_asks_for():
    strategy = unequal(FedNova)(momentum=0.5, **QUIET)
    _, ours, _ = run(strategy, 3)
    x, k = np.zeros(D), np.arange(1, N + 1)
    a = np.array([accumulated(i, momentum=0.5) for i in k])
    for _ in range(3):
        x = x - a.mean() * np.mean(
            [(x - local(i, x, steps=k[i], momentum=0.5)) / a[i] for i in range(N)], axis=0
        )
    np.testing.assert_allclose(ours, x, rtol=0, atol=1e-12)
    found, _, _ = run(FedNova(**QUIET), 60, steps=(1, 9))
    fedavg, _, _ = run(linear.FedAvg(**QUIET), 60, steps=(1, 9))
    assert np.mean([found[r] for r in range(40, 61)]) < np.mean([fedavg[r] for r in range(40, 61)])
