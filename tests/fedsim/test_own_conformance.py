"""Our strategies with a server: what `test_conformance.py` asks of those that Flower ships."""

import logging
from functools import partial

import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedsim.executors.build import halves_of
from fedsim.executors.clientapp import device_app
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.session import start
from fedsim.streams import digest
from strategies import linear
from strategies.asynchronous import DeadlineFedAvg, FedAsync, FedBuff
from strategies.compressed import Compressed
from strategies.drift import SCAFFOLD, FedDyn, FedNova
from strategies.hierarchical import HierarchicalFedAvg
from strategies.mcm import CompressedSGD
from strategies.screening import DropNonFinite
from strategies.selection import Oort, TiFL
from tests.fedsim.worlds import LOCAL, digits_trainer, heterogeneous, make_world
from tests.plain_grid import PlainGrid, flower_identity
from topologies import tree

N = 20
QUIET = {"fraction_evaluate": 0.0}
MAKE = {
    "compressed": lambda: Compressed(
        linear.FedAvg(**QUIET), up={"kind": "natural"}, down={"kind": "cast"}
    ),
    "compressed_sgd": partial(CompressedSGD, algorithm="artemis", learning_rate=1.0),
    "deadline": partial(DeadlineFedAvg, deadline=20.0),
    "drop_non_finite": lambda: DropNonFinite(linear.FedAvg(**QUIET)),
    "fedasync": FedAsync,
    "fedbuff": partial(FedBuff, buffer_size=5),
    "feddyn": partial(FedDyn, **QUIET),
    "fednova": partial(FedNova, **QUIET),
    "hierarchical": partial(HierarchicalFedAvg, cloud_period=2, edges=4, **QUIET),
    "oort": partial(Oort, **QUIET),
    "scaffold": partial(SCAFFOLD, **QUIET),
    "tifl": partial(TiFL, **QUIET),
}
ROUNDS = {"compressed_sgd": 20, "fedasync": 200, "fedbuff": 30}  # of a step, of a few replies


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("flwr").setLevel(logging.ERROR)


def world_for(name, strategy, **options):
    """Return a world whose devices have the strategy's halves; a tree where it wants one."""
    if name == "hierarchical":
        options |= {"graph": tree((4, 5), bandwidth=(256e3, 64e3), latency=0.01)}
    world = make_world(N, halves=halves_of(strategy), **options)
    if name == "hierarchical":
        world.grid.network.server = N
    return world


@pytest.mark.parametrize("name", MAKE)
def test_any_of_ours_runs_under_loss(name):
    """20 digit devices, 5 % loss, links and devices unequal: nothing raised, learnt."""
    strategy = MAKE[name]()
    world = world_for(name, strategy, loss=0.05, **heterogeneous())
    rounds = ROUNDS.get(name, 10)
    rows = []
    outcome = start(
        strategy,
        world.grid,
        world.initial(),
        rounds=rounds,
        seed=3,
        timeout=60.0,
        train_config=ConfigRecord({"learning-rate": 0.3}),
        evaluate=world.evaluate,
        evaluate_every=rounds,
        record=rows.append,
    )
    assert [row.round for row in rows] == list(range(1, rounds + 1))
    assert not [trip for trip in world.grid.trips if trip.outcome == "error"]
    assert any(trip.is_lost for trip in world.grid.trips)
    assert all(np.isfinite(array.numpy()).all() for array in outcome.arrays.values())
    assert rows[-1].eval_accuracy > (0.3 if name == "compressed_sgd" else 0.8)


@pytest.mark.parametrize("name", MAKE)
def test_a_perfect_network_changes_nothing_of_ours(name):
    """Without loss and latency: the arrays of a plain grid that calls the same app.

    All devices are done at the same time, as they are on a grid that has none.
    """
    seed, rounds, trainer = 5, 3, digits_trainer(N)
    strategy, other = MAKE[name](), MAKE[name]()
    config = ConfigRecord({"learning-rate": 0.3})
    world = world_for(name, strategy, speed=trainer.data.size)
    ours = start(
        strategy, world.grid, world.initial(), rounds=rounds, seed=seed, train_config=config
    )
    app = device_app(trainer, WorkPlan(LOCAL, trainer.data.size), halves=halves_of(other))
    with flower_identity(
        digest(f"{seed}/node-sampling"), digest(f"{seed}/numpy-global") & 0xFFFFFFFF
    ):
        theirs = other.start(
            PlainGrid(app, N), world.initial(), num_rounds=rounds, train_config=config
        )
    assert list(ours.arrays) == list(theirs.arrays)
    for key, array in theirs.arrays.items():
        assert np.allclose(ours.arrays[key].numpy(), array.numpy(), rtol=0, atol=1e-6)
