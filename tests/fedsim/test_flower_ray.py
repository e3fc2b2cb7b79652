"""Bar 1's last clause: FedAvg on the grid equals Flower's own Ray simulation."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from tests.fedsim.ray_app import app
from tests.fedsim.worlds import digits_trainer
from fedsim.flower.server import initial_arrays

server = ServerApp()

@server.main()
def main(grid, context):
    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=20, min_train_nodes=20)
    start = ArrayRecord(initial_arrays(digits_trainer(20)).to_torch_state_dict())
    result = strategy.start(grid, start, num_rounds=2)
    np.savez(sys.argv[1], **{k: a.numpy() for k, a in result.arrays.items()})

resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
run_simulation(server, app, num_supernodes=20, backend_config=resources)
"""


@pytest.mark.flower
def test_bar_1_fedavg_equals_flowers_ray_simulation(tmp_path):
    pytest.importorskip("ray", reason='needs Ray: pip install "fedsim[ray]"')
    from flwr.serverapp.strategy import FedAvg

    from fedsim.flower.session import start
    from tests.fedsim.worlds import make_world

    world = make_world()
    ours = start(FedAvg(fraction_evaluate=0.0), world.grid, world.initial(), rounds=2, seed=1)
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_HOME": str(tmp_path / "flower"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "theirs.npz")],
        env=os.environ | quiet, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(tmp_path / "theirs.npz") as theirs:
        assert set(theirs.files) == set(ours.arrays)
        for key in theirs.files:
            assert np.allclose(ours.arrays[key].numpy(), theirs[key], rtol=0, atol=1e-5)
