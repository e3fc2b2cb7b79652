"""Convex problems: minima, gradients, and the batches that a trainer takes."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fedsim
from fedsim.data.federated import FederatedData
from fedsim.errors import ScenarioError
from fedsim.learning.batches import first_batches, make_batches
from fedsim.learning.config import LocalConfig
from fedsim.learning.convex import ConvexProblem, problem_of
from fedsim.learning.models import linear_regression, logistic_regression, softmax
from fedsim.learning.trainer import Trainer
from fedsim.scenario import Scenario, load_scenario
from fedsim.simulation import build

REFERENCE = Path(__file__).parents[2] / "fedsim" / "reference"
SIZES = np.array([12, 7, 7, 30])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def data(loss, d=5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((SIZES.sum() + 3, d))
    y = x @ rng.standard_normal(d) + rng.standard_normal(len(x))
    if loss == "logistic":
        y = (y > 0).astype(int)
    start = 3 + np.cumsum(SIZES) - SIZES  # the first three rows belong to nobody
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    return FederatedData("made", x, y, start, SIZES, x[:1], y[:1], 2 if loss == "logistic" else 0)


def modules(loss, d=5):
    make = logistic_regression if loss == "logistic" else linear_regression
    return make((d,), 2 if loss == "logistic" else 0)


@pytest.mark.parametrize("loss", ["squared_error", "logistic"])
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_gradients_are_those_of_a_trainer(loss, batch):
    held, module = data(loss), modules(loss)
    seeds = [3, 11]
    problem = problem_of(module, held, loss)
    models = torch.from_numpy(np.random.default_rng(1).standard_normal((8, 6)))
    for k in (1, 2, 500):
        found = problem.gradients(batch, seeds)(models, k)
        for r, seed in enumerate(seeds):
            trainer = Trainer(module, held, seed=seed)
            config = LocalConfig(mode="gradient", batch_size=batch)
            rows, rounds = models[4 * r : 4 * r + 4], np.full(4, k)
            asked = trainer.train(rows, np.arange(4), np.arange(4), rounds, config)
            torch.testing.assert_close(found[4 * r : 4 * r + 4], asked.params, rtol=0, atol=1e-13)


@pytest.mark.parametrize("loss", ["squared_error", "logistic"])
def test_the_minimum_is_where_the_gradient_vanishes(loss):
    problem = ConvexProblem(data(loss), loss)
    least = problem.minimum
    mean = problem.gradients()(least.w.expand(4, -1), 1).mean(0)
    assert mean.abs().max() < 1e-9
    nearby = least.w + 1e-3 * torch.from_numpy(np.random.default_rng(2).standard_normal((50, 5)))
    assert (problem.value(nearby) > least.value).all()
    assert float(problem.value(least.w[None])[0]) == pytest.approx(least.value, abs=1e-14)
    direct = problem.value(nearby) - least.value
    torch.testing.assert_close(problem.excess(nearby), direct, rtol=1e-6, atol=1e-14)


def test_all_devices_weigh_the_same_whatever_they_hold():
    held = data("squared_error")
    w = torch.from_numpy(np.random.default_rng(3).standard_normal((2, 5)))
    parts = [
        (held.x[a : a + n] @ w.T - held.y[a : a + n, None]).square().mean(0)
        for a, n in zip(held.start, held.size, strict=True)
    ]
    torch.testing.assert_close(
        ConvexProblem(held, "squared_error").value(w), torch.stack(parts).mean(0)
    )


def test_the_minimum_is_found_where_columns_depend_on_one_another():
    held = data("logistic")
    held.x[:, 4] = held.x[:, 0] + held.x[:, 1]
    free = FederatedData("less", held.x[:, :4], held.y, held.start, SIZES, held.x, held.y, 2)
    doubled, least = (ConvexProblem(each, "logistic").minimum.value for each in (held, free))
    assert doubled == pytest.approx(least, abs=1e-12)


def test_an_infimum_that_is_never_reached_is_found_as_well():
    held = data("logistic")
    held.x[:, 0] = torch.where(held.y > 0, 1.0, -1.0)  # separates the classes
    assert ConvexProblem(held, "logistic").minimum.value == pytest.approx(0.0, abs=1e-12)


def test_first_batches_are_the_first_of_all_batches():
    seed, devices = 9, np.array([4, 7, 8])
    found = first_batches(np.array(seed), np.array(6), devices, 40, 8)
    size, one = np.full(3, 40), np.ones(3, int)
    all_of_them = make_batches(seed, 6 * one, devices, 0 * one, size, 8 * one, one)
    assert np.array_equal(found, all_of_them.index.reshape(3, 8))
    assert all(len(set(row)) == 8 for row in found.tolist())


def test_published_constants_of_the_reference_problems():
    expected = {"lsrA": (19.373586618240243, 2.9315148579943795), "lsrB": (13.1771, 0.129682008587)}
    for name, (smoothness, least) in expected.items():
        with np.load(REFERENCE / f"{name}_data.npz") as file:
            x, y = torch.from_numpy(file["X"]), torch.from_numpy(file["Y"])
            w_star = torch.from_numpy(file["w_star"])
        size = np.full(len(x), x.shape[1])
        start = np.cumsum(size) - size
        held = FederatedData(name, x.flatten(0, 1), y.flatten(), start, size, x[0], y[0], 0)
        problem = ConvexProblem(held, "squared_error")
        assert problem.smoothness == pytest.approx(smoothness, rel=1e-5)
        assert problem.minimum.value == pytest.approx(least, abs=1e-12)
        torch.testing.assert_close(problem.minimum.w, w_star, rtol=0, atol=1e-12)


def test_what_is_no_convex_problem_is_refused():
    held = data("logistic")
    with pytest.raises(ScenarioError, match="with one output, not Sequential"):
        problem_of(softmax((5,), 2), held, "cross_entropy")
    with pytest.raises(ScenarioError, match="not 'cross_entropy'"):
        problem_of(modules("logistic"), held, "cross_entropy")
    with pytest.raises(ScenarioError, match="8 is more than the 7 samples of device 1"):
        problem_of(modules("logistic"), held, "logistic").gradients(8)


# --- in a scenario --------------------------------------------------------------------------------

WORLD = {
    "name": "excess",
    "seed": 1,
    "rounds": 3,
    "data": {
        "dataset": {"kind": "least_squares", "problem": "lsrA"},
        "devices": 10,
        "partition": {"kind": "natural"},
    },
    "model": {"kind": "linear_regression", "bias": False},
    "training": {"batch_size": 0, "learning_rate": 0.02},
    "evaluation": {"excess_loss": True},
    "strategies": {
        "sgd": {"kind": "compressed_sgd", "algorithm": "sgd"},
        "gossip": {"kind": "gossip", "peers": {"kind": "ring"}},
    },
}


def test_a_run_records_the_excess_loss():
    result = fedsim.run(Scenario.from_mapping(WORLD))
    rows = result.strategies["sgd"].rounds
    found = [row.extra["excess_loss"] for row in rows]
    # The test set of this problem is all samples: the evaluation's loss is F itself.
    assert found == pytest.approx([row.eval_loss - 2.9315148579943795 for row in rows], abs=1e-12)
    assert found[0] > found[1] > found[2] > 0
    assert "excess_loss" in result.strategies["gossip"].rounds[0].extra  # of the mean model


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"kind": "mlp"}}, "evaluation.excess_loss: needs a model whose least loss"),
        ({"evaluation": {"excess_loss": True, "on": "devices"}}, "excess_loss needs evaluation on"),
        ({"data": WORLD["data"] | {"devices": 9}}, "lsrA is held by 10 devices"),
        (
            {"data": WORLD["data"] | {"dataset": {"kind": "least_squares", "problem": "lsrC"}}},
            "data.dataset.problem: 'lsrC' should be 'drawn', 'lsrA' or 'lsrB'",
        ),
    ],
)
def test_where_there_is_no_known_minimum_the_scenario_is_refused(changes, said):
    with pytest.raises(ScenarioError, match=said):
        build(Scenario.from_mapping(WORLD | changes), "sgd")


@pytest.mark.parametrize("letter", ["a", "b"])
def test_the_scenarios_step_is_the_published_one(letter):
    path = Path(__file__).parents[2] / f"scenarios/paper/mcm_least_squares_{letter}.yaml"
    sim = build(load_scenario(path), "mcm")
    share = {"a": 1 / 4, "b": 1.0}[letter]
    assert sim.scenario.training.learning_rate * sim.problem.smoothness == pytest.approx(
        share, rel=1e-5
    )
