"""Every strategy that Flower ships runs on the network grid (flower.md bar 1 is checked here)."""

import logging
import random

import numpy as np
import pytest
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import strategy as flower

from fedsim.executors.clientapp import device_app
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.session import start
from fedsim.streams import digest
from strategies import linear
from tests.fedsim.worlds import LOCAL, digits_trainer, heterogeneous, make_world
from tests.plain_grid import PlainGrid, flower_identity

AVERAGING = {
    "FedAvg", "FedProx", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "FedMedian",
    "FedTrimmedAvg", "QFedAvg",
}  # fmt: skip
ROBUST = {"Krum", "MultiKrum", "Bulyan"}
PRIVATE = {name for name in flower.__all__ if name.startswith("DifferentialPrivacy")}
NO_MODEL = {"FedXgbBagging", "FedXgbCyclic", "Result", "Strategy"}
ARGUMENTS = {
    "FedProx": {"proximal_mu": 0.1},
    "FedAvgM": {"server_momentum": 0.5},
    "QFedAvg": {"client_learning_rate": 0.3},
    # Its first steps multiply rounding by eta / tau: with Flower's tau by hundreds.
    "FedAdagrad": {"eta": 0.3, "tau": 0.02},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 5},
    "Bulyan": {"num_malicious_nodes": 1},
}


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("flwr").setLevel(logging.ERROR)


def make(name, module=flower):
    """Return a strategy; the privacy wrappers go round FedAvg, with hardly any noise."""
    if name not in PRIVATE:
        return getattr(module, name)(**ARGUMENTS.get(name, {}))
    arguments = {"noise_multiplier": 1e-3, "num_sampled_clients": 20}
    arguments["initial_clipping_norm" if "Adaptive" in name else "clipping_norm"] = 10.0
    return getattr(flower, name)(module.FedAvg(), **arguments)


def client_app(name):
    """Return fedsim's app, with Flower's privacy mod where the strategy needs one."""
    trainer = digits_trainer(20)
    plain = device_app(trainer, WorkPlan(LOCAL, trainer.data.size))
    if "ClientSide" not in name:
        return plain
    mod = adaptiveclipping_mod if "Adaptive" in name else fixedclipping_mod
    app = ClientApp()
    app.train(mods=[mod])(plain)
    app.evaluate()(plain)
    return app


def world_for(name, **options):
    if "ClientSide" in name:  # only an app can hold a mod
        options |= {"executor": "client_app", "app": client_app(name)}
    return make_world(**options)


def test_no_strategy_of_flower_is_forgotten():
    assert set(flower.__all__) == AVERAGING | ROBUST | PRIVATE | NO_MODEL


# Devices with a mod run one by one, and their replies are no rows of a stack: once is enough.
UNDER_LOSS = [
    pytest.param(name, module, id=f"{name}-{module.__name__.partition('.')[0]}")
    for name in sorted(AVERAGING | ROBUST | PRIVATE)
    for module in (flower, linear)
    if module is flower or "ClientSide" not in name
]


@pytest.mark.parametrize(("name", "module"), UNDER_LOSS)
def test_bar_1_any_strategy_runs_unmodified_under_loss(name, module):
    """20 digit devices, 5 % loss, 10 rounds: no exception, no error reply, finite, learnt."""
    world = world_for(name, loss=0.05, **heterogeneous())
    rows = []
    outcome = start(
        make(name, module),
        world.grid,
        world.initial(),
        rounds=10,
        seed=3,
        timeout=60.0,
        evaluate=world.evaluate,
        record=rows.append,
    )
    assert [row.round for row in rows] == list(range(1, 11))
    assert not [trip for trip in world.grid.trips if trip.outcome == "error"]
    assert any(trip.is_lost for trip in world.grid.trips)
    assert all(np.isfinite(array.numpy()).all() for array in outcome.arrays.values())
    assert rows[-1].eval_accuracy > (0.85 if name in AVERAGING else 0.6)


@pytest.mark.parametrize("module", [flower, linear], ids=["bare", "stacked"])
@pytest.mark.parametrize("name", sorted(AVERAGING | ROBUST | PRIVATE))
def test_bar_1_a_perfect_network_changes_nothing(name, module):
    """Without loss and latency: the arrays of a plain grid that calls the same app.

    The stacked mean adds in an order of its own, which the processor decides. Where updates are
    small, an adaptive optimiser multiplies that rounding by eta / tau in its first steps.
    """
    seed, rounds = 5, 3
    world = world_for(name)
    strategy = make(name, module)
    slope = strategy.eta / strategy.tau if hasattr(strategy, "tau") and module is linear else 0.0
    tolerance = max(1e-6, slope * float(np.finfo(np.float32).eps))
    ours = start(strategy, world.grid, world.initial(), rounds=rounds, seed=seed)
    state = random.getstate()
    with flower_identity(
        digest(f"{seed}/node-sampling"), digest(f"{seed}/numpy-global") & 0xFFFFFFFF
    ):
        grid = PlainGrid(client_app(name), 20)
        theirs = make(name).start(grid, world.initial(), num_rounds=rounds)
    random.setstate(state)
    assert list(ours.arrays) == list(theirs.arrays)
    for key, array in theirs.arrays.items():
        assert np.allclose(ours.arrays[key].numpy(), array.numpy(), rtol=0, atol=tolerance)
