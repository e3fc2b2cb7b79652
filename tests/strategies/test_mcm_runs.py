"""The driver without messages: the same models and bytes as the strategy on a network grid.

A trainer in gradient mode takes the first batch of the keyed permutation (seed, round, device) of
a device's samples; `ConvexProblem.gradients` computes that batch alone, in the same order. Rounding
and participation are keyed in both as well. What remains is the rounding of sums.
"""

import json

import numpy as np
import pytest
import torch

from fedsim.flower.server import initial_arrays
from fedsim.flower.session import session
from fedsim.learning.convex import problem_of
from fedsim.scenario import load_scenario
from fedsim.simulation import build
from strategies.bidirectional import SCHEMES, scheme_of
from strategies.compression import compressor
from strategies.mcm_runs import simulate

ROUNDS, BATCH, SEED, STEP = 50, 4, 5, 0.02
WORLD = """
name: driver
seed: 5
rounds: 50
data: {dataset: {kind: least_squares, samples: 20, n_features: 6, heterogeneous: true},
       devices: 4, partition: natural}
model: {kind: linear_regression, bias: false}
training: {batch_size: 4}
strategies: {tried: {kind: compressed_sgd}}
"""
LOGISTIC = (
    "data.dataset={kind: logistic, samples: 20, heterogeneous: true}",
    "model={kind: logistic_regression, bias: false}",
)


@pytest.fixture
def check(tmp_path):
    """Return what compares the driver with the strategy of these arguments, to 1e-12."""
    file = tmp_path / "world.yaml"
    file.write_text(WORLD)

    def compare(scheme, arguments, world=(), **driver):
        entry = {"kind": "compressed_sgd", "learning_rate": STEP, **arguments}
        scenario = load_scenario(file, [*world, f"strategies.tried={json.dumps(entry)}"])
        sim = build(scenario, device="cpu")
        models, traffic = on_the_grid(sim)
        assert models.shape[0] == ROUNDS
        assert np.isfinite(models).all()
        iterates, run = without_messages(sim, scheme, **driver)
        scale = max(1.0, float(np.abs(models).max()))
        assert np.abs(models - iterates).max() <= 1e-12 * scale
        assert np.array_equal(run.bytes_up[:, 0].sum(1), traffic[:, 0])
        assert np.array_equal(run.bytes_down[:, 0].sum(1), traffic[:, 1])

    return compare


def on_the_grid(sim):
    """Return the iterates (rounds, P), and the bytes up and down of each round."""
    models, traffic = [], []

    def note(server_round, arrays):
        if server_round:
            models.append(next(iter(arrays.values())).numpy().reshape(-1))
            seen = sim.grid.take_traffic()
            traffic.append((seen.bytes_up, seen.bytes_down))

    with session(sim.grid, SEED):
        sim.strategy.start(
            sim.grid, initial_arrays(sim.trainer), num_rounds=ROUNDS, evaluate_fn=note
        )
    return np.array(models), np.array(traffic)


def without_messages(sim, scheme, **driver):
    """Return the iterates of the first of two runs, and what `simulate` gives."""
    trainer = sim.trainer
    problem = problem_of(trainer.stack.module, trainer.data, trainer.stack.loss.name)
    iterates = []
    run = simulate(
        scheme,
        problem.gradients(BATCH, [SEED, SEED + 1]),
        torch.zeros(problem.width, dtype=torch.float64),
        n_devices=problem.n_devices,
        rounds=ROUNDS,
        step=sim.strategy.step,
        seeds=[SEED, SEED + 1],
        observe=lambda k, server: iterates.append(server.model[0].numpy()),
        count_bytes=True,
        **driver,
    )
    assert not torch.equal(run.model[0], run.model[1])
    return np.array(iterates), run


@pytest.mark.parametrize("algorithm", SCHEMES)
def test_the_driver_is_the_strategy_on_a_network_grid(check, algorithm):
    check(SCHEMES[algorithm], {"algorithm": algorithm})


def test_so_it_is_with_the_logistic_loss(check):
    check(SCHEMES["mcm"], {"algorithm": "mcm", "learning_rate": 0.5}, LOGISTIC)


@pytest.mark.parametrize(
    ("algorithm", "correction"),
    [
        ("double_squeeze", "pp1"),
        ("mcm", "pp1"),
        ("artemis", "pp2"),
    ],
)
def test_so_it_is_with_partial_participation(check, algorithm, correction):
    given = {"participation": 0.5, "correction": correction}
    check(SCHEMES[algorithm], {"algorithm": algorithm, **given}, **given)


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("artemis", {"momentum": 0.5}),
        ("mcm", {"momentum": 0.5, "schedule": "inverse_sqrt"}),
        ("mcm", {"groups": 2, "up_rate": 0.05}),
        ("mcm", {"up": ["quantise", {"kind": "random_k", "k": 3}], "down": {"kind": "natural"}}),
        ("double_squeeze", {"up": {"kind": "top_k", "k": 2}, "feedback": "rescaled"}),
    ],
    ids=str,
)
def test_so_it_is_with_other_settings(check, algorithm, settings):
    changes = {k: v for k, v in settings.items() if k not in ("up", "down", "schedule")}
    up = settings.get("up")
    ups = None if up is None else [compressor(u) for u in (up if isinstance(up, list) else [up])]
    down = compressor(settings["down"]) if "down" in settings else None
    scheme = scheme_of(algorithm, ups, down, **changes)
    check(scheme, {"algorithm": algorithm, **settings})


def test_observe_ends_a_run():
    seen = []
    run = simulate(
        SCHEMES["mcm"],
        lambda x, k: x - 1,
        torch.zeros(3, dtype=torch.float64),
        n_devices=2,
        rounds=100,
        step=lambda k: 0.1,
        observe=lambda k, server: seen.append(k) or k == 3,
    )
    assert seen == [1, 2, 3]
    assert run.bytes_up.shape == (0, 1, 2)
