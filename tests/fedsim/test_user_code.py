"""What users bring along, through scenarios: privacy wrappers, Flower apps, models."""

import logging

import numpy as np
import pytest
import torch

import fedsim
from fedsim import runner
from fedsim.scenario import Scenario

torch.set_num_threads(1)

WORLD = {
    "seed": 3,
    "rounds": 2,
    "data": {"dataset": "digits", "devices": 6},
    "training": {"learning_rate": 0.3, "batch_size": 16},
}


def scenario(**keys):
    return Scenario.from_mapping(WORLD | keys)


def private(kind, clipping, **arguments):
    """Return a scenario with one privacy wrapper round FedAvg, without noise."""
    arguments |= {"noise_multiplier": 0.0, "num_sampled_clients": 6}
    entry = {"kind": kind, "strategy": "fedavg", **clipping, **arguments}
    return {"private": entry}


def distance_moved(made):
    simulation = runner.build(made)
    before = simulation.trainer.initial().numpy()
    arrays = simulation.run().arrays
    after = np.concatenate(
        [arrays[name].numpy().ravel() for name in simulation.trainer.layout.names]
    )
    return np.linalg.norm(after - before)


@pytest.mark.parametrize("executor", ["vectorised", "client_app"])
@pytest.mark.parametrize("kind", ["dp_client_fixed", "dp_server_fixed"])
def test_clipping_to_almost_nothing_hardly_moves_the_model(kind, executor):
    entries = private(kind, {"clipping_norm": 1e-6})
    moved = distance_moved(scenario(strategies=entries, executor=executor))
    assert 0 < moved < 1e-5


def test_adaptive_clipping_on_devices_runs_and_a_warning_names_its_executor(caplog):
    entries = private("dp_client_adaptive", {"initial_clipping_norm": 0.1})
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        result = fedsim.run(scenario(rounds=3, strategies=entries))
    rows = result.strategies["private"].rounds
    assert [row.devices_replied for row in rows] == [6, 6, 6]
    assert rows[-1].eval_accuracy > rows[0].eval_accuracy - 0.05
    assert [r.message for r in caplog.records if "client_app" in r.message] == [
        "private: clipping happens in a mod on the devices, so they run one at a time "
        "(executor client_app) instead of vectorised"
    ]
