"""Strategies in a plain Flower app: bar 6, and bar 1's last clause on Flower's Ray simulation."""

import os
import subprocess
import sys

import numpy as np
import pytest

from fedsim.registry import TABLES
from tests.fedsim import ray_app
from tests.fedsim.flower_runs import ROOT, remaining
from tests.plain_grid import PlainGrid, flower_identity

STRATEGIES = sorted(TABLES["strategy"])
PROGRAM = """
import os, sys, time, traceback
import numpy as np
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from tests.fedsim import ray_app

server = ServerApp()

@server.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < ray_app.N:
        time.sleep(0.1)
    for kind in sys.argv[2:]:
        try:
            arrays = ray_app.run(kind, grid)
        except Exception:
            traceback.print_exc()
        else:
            np.savez(os.path.join(sys.argv[1], kind), **arrays)

one_actor = {
    "init_args": {"num_cpus": 1},
    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
}
run_simulation(server, ray_app.app, num_supernodes=ray_app.N, backend_config=one_actor)
"""


def assert_learnt(kind, arrays):
    first = {key: array.numpy() for key, array in ray_app.start().items()}
    assert set(arrays) == set(first)
    assert all(np.isfinite(value).all() for value in arrays.values()), kind
    assert any(not np.array_equal(value, first[key]) for key, value in arrays.items()), kind


# On a grid without virtual time AD-PSGD really waits.
PATIENT = [pytest.param(k, marks=pytest.mark.slow) if k == "ad_psgd" else k for k in STRATEGIES]


@pytest.mark.parametrize("kind", PATIENT)
def test_every_strategy_runs_in_a_plain_app(kind):
    with flower_identity(1):
        arrays = ray_app.run(kind, PlainGrid(ray_app.app, ray_app.N))
    assert_learnt(kind, arrays)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Return the final arrays of every strategy, run in turn in one Ray simulation."""
    pytest.importorskip("ray", reason='needs Ray: pip install "fedsim[ray]"')
    home, out = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("out")
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_ADDRESS": "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(out), *STRATEGIES],
        env=os.environ | quiet, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    left = remaining(home)
    found = {}
    for path in out.glob("*.npz"):
        with np.load(path) as arrays:
            found[path.stem] = dict(arrays)
    return found, left, done.stderr


@pytest.mark.flower
def test_bar_6_every_strategy_runs_in_flowers_simulation(simulated):
    found, left, said = simulated
    assert sorted(found) == STRATEGIES, said[-5000:]
    for kind, arrays in found.items():
        assert_learnt(kind, arrays)
    assert left == []


@pytest.mark.flower
def test_bar_1_fedavg_equals_flowers_ray_simulation(simulated):
    from flwr.serverapp.strategy import FedAvg

    from fedsim.flower.session import start
    from tests.fedsim.worlds import make_world

    world = make_world(ray_app.N)
    ours = start(FedAvg(fraction_evaluate=0.0), world.grid, world.initial(), rounds=2, seed=1)
    for key, value in simulated[0]["fedavg"].items():
        assert np.allclose(ours.arrays[key].numpy(), value, rtol=0, atol=1e-5)
