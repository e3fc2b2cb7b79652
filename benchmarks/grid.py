"""What a round costs beside training: the grid, the network and the aggregation.

    python benchmarks/grid.py [--repeats 5]

Prints one JSON line per case: wall seconds per round, minimum and median over the repeats. The
executor is free of charge (it hands out rows of one stack that exists already), so what is left is
the grid, SimPy, Flower's messages and the strategy's aggregation.
"""

import argparse
import json
import statistics
import time

import numpy as np
import simpy
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from fedsim.devices import DeviceFleet
from fedsim.flower import compat
from fedsim.flower.grid import NetworkGrid
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.records import payload_bytes, stacked_record
from fedsim.flower.session import start
from fedsim.learning.config import LocalConfig
from fedsim.network import star_network
from strategies import linear

METRICS = {"num-examples": 10, "train_loss": 1.0}


class FreeExecutor:
    """Replies at once with rows of a stack made beforehand."""

    is_stateful = False

    def __init__(self, stacks):
        self.stacks = stacks

    def reply_bytes(self, message):
        return payload_bytes(message.content)

    def __call__(self, messages):
        return [
            Message(
                compat.fill(
                    RecordDict(),
                    {
                        "arrays": stacked_record(self.stacks, i),
                        "metrics": compat.fill(MetricRecord(), METRICS),
                    },
                ),
                reply_to=message,
            )
            for i, message in enumerate(messages)
        ]


def measure(n_devices, n_parameters, strategy, repeats, n_arrays=10):
    """Return wall seconds per round."""
    torch.set_num_threads(1)
    shape = (n_devices, n_parameters // n_arrays)
    stacks = {f"layer{i}": torch.randn(shape) for i in range(n_arrays)}
    env = simpy.Environment()
    rng = np.random.default_rng(1)
    rate = rng.lognormal(np.log(20e6), 0.5, n_devices)
    network = star_network(
        env, uplink_bps=rate, downlink_bps=4 * rate, latency=0.02, server_up_bps=1e9,
        server_down_bps=1e9, seed=1, message_loss=0.02,
    )  # fmt: skip
    fleet = DeviceFleet(rng.lognormal(5, 0.5, n_devices))
    plan = WorkPlan(LocalConfig(), np.full(n_devices, 50))
    grid = NetworkGrid(env, network, fleet, FreeExecutor(stacks), plan)
    stamps = [time.perf_counter()]
    start(
        strategy, grid, stacked_record(stacks, 0), rounds=repeats, seed=1,
        record=lambda row: stamps.append(time.perf_counter()),
    )  # fmt: skip
    return np.diff(stamps)[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=6)
    repeats = parser.parse_args().repeats + 1
    cases = [
        ("100 devices x 1M parameters, Flower's FedAvg", 100, 1_000_000, flower.FedAvg, 0.25),
        ("100 devices x 1M parameters, stacked FedAvg", 100, 1_000_000, linear.FedAvg, 0.12),
        ("1,000 devices x 1,000 parameters, stacked FedAvg", 1000, 1_000, linear.FedAvg, 1.0),
        ("100 devices x 650 parameters, stacked FedAvg", 100, 650, linear.FedAvg, None),
    ]
    for name, n_devices, n_parameters, strategy, bar in cases:
        seconds = measure(n_devices, n_parameters, strategy(fraction_evaluate=0.0), repeats)
        line = {
            "case": name,
            "seconds_min": round(min(seconds), 4),
            "seconds_median": round(statistics.median(seconds), 4),
            "bar_seconds": bar,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
