"""Compression: rows of many devices a second, and rounds of MCM through the network grid.

``python benchmarks/compression.py [cpu|cuda] [rounds]`` prints one JSON line per case. A ratio
compares figures of one run: a compressor with copying the same rows, and rounds with building the
`Message` objects of as many rounds alone. CPU seconds, since machines are shared.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import simpy
import torch
from flwr.app import Message, RecordDict

from fedsim.data.federated import FederatedData
from fedsim.devices import DeviceFleet
from fedsim.executors.vectorised import VectorisedExecutor
from fedsim.flower.compat import identity, quiet_flower
from fedsim.flower.grid import NODE_BASE, NetworkGrid
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.server import initial_arrays
from fedsim.flower.session import session
from fedsim.learning.config import LocalConfig
from fedsim.learning.models import linear_regression
from fedsim.learning.trainer import Trainer
from fedsim.network import star_network
from strategies.compression import COMPRESSORS, compressor, pack
from strategies.halves import KeyedDraws
from strategies.mcm import CompressedSGD

DEVICES, WIDTH = 20, 1_000_000
ARGUMENTS: dict[str, dict[str, object]] = {
    "cast": {"dtype": "bfloat16"},
    "random_k": {"fraction": 0.01},
    "top_k": {"fraction": 0.01},
}


def seconds_of(work: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Return the least CPU time (on a GPU: wall time) of one call."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    work()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return min(times)


def compressors(device: str) -> Iterator[dict[str, object]]:
    """Yield how fast each compressor compresses and weighs 20 devices × 1 M parameters."""
    rows = torch.randn(DEVICES, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)
    copy = seconds_of(rows.clone, device)
    for name in sorted(COMPRESSORS):
        used = compressor({"kind": name} | ARGUMENTS.get(name, {}))

        def work() -> object:
            draws = KeyedDraws(0, "benchmark", 1, np.arange(DEVICES), device=device)
            return pack(used, rows, draws).sizes  # noqa: B023

        seconds = seconds_of(work, device)
        yield {
            "case": f"compress {name}",
            "devices": DEVICES,
            "parameters": WIDTH,
            "device": device,
            "seconds": round(seconds, 4),
            "rows_of_a_million_per_second": round(DEVICES / seconds, 1),
            "times_a_copy": round(seconds / copy, 1),
        }


def rounds(algorithm: str, n_rounds: int, d: int = 20, samples: int = 200) -> dict[str, object]:
    """Return the CPU time of rounds of one algorithm through the grid, 20 devices, batch 1."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((DEVICES * samples, d)))
    y = x @ torch.arange(d, dtype=torch.float64) / d
    size = np.full(DEVICES, samples)
    data = FederatedData("least squares", x, y, np.cumsum(size) - size, size, x[:1], y[:1], 0)
    strategy = CompressedSGD(algorithm=algorithm, learning_rate=0.01)
    trainer = Trainer(linear_regression((d,), 0, bias=False), data, seed=0)
    plan = WorkPlan(LocalConfig(batch_size=1), size)
    executor = VectorisedExecutor(trainer, plan, node_base=NODE_BASE, halves=strategy.device_halves)
    env, fast = simpy.Environment(), np.full(DEVICES, np.inf)
    network = star_network(env, uplink_bps=fast, downlink_bps=fast, latency=np.full(DEVICES, 0.01))
    fleet = DeviceFleet(np.full(DEVICES, 1e3), None)
    grid = NetworkGrid(env, network, fleet, executor, plan)
    start = time.process_time()
    with session(grid, 0):
        strategy.start(grid, initial_arrays(trainer), num_rounds=n_rounds, timeout=None)
    seconds = time.process_time() - start
    alone = messages(n_rounds)
    return {
        "case": f"rounds {algorithm}",
        "devices": DEVICES,
        "rounds": n_rounds,
        "cpu_ms_per_round": round(1e3 * seconds / n_rounds, 2),
        "cpu_seconds_of_10000_rounds": round(1e4 * seconds / n_rounds, 1),
        "times_messages_alone": round(seconds / alone, 1),
    }


def messages(n_rounds: int) -> float:
    """Return the CPU time of building the instructions and replies of so many rounds."""
    content = RecordDict()
    start = time.process_time()
    with identity():
        for _ in range(n_rounds * DEVICES):
            asked = Message(content, dst_node_id=NODE_BASE, message_type="train")
            Message(content, reply_to=asked)
    return time.process_time() - start


def main() -> None:
    """Print one line per case."""
    torch.set_num_threads(1)
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    n_rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 500
    for case in compressors(device):
        print(json.dumps(case), flush=True)
    if device == "cpu":
        with quiet_flower():
            rounds("mcm", 10)
            for algorithm in ("sgd", "diana", "artemis", "mcm", "rand_mcm"):
                print(json.dumps(rounds(algorithm, n_rounds)), flush=True)


if __name__ == "__main__":
    main()
