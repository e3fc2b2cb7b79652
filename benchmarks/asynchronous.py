"""What a reply costs an asynchronous server beside training, and whether memory stays flat.

    python benchmarks/asynchronous.py [--replies 10000] [--profile]

1,000 devices of lognormal speeds are always at work. Prints one JSON line per case: milliseconds of
processor time a reply (the executor's own left out), minimum and median over stretches of 500
replies, and resident memory after a fifth of the replies and at the end. What grows with the
number of devices under way shows in the ratio to the same strategy with 100 devices; the cost of a
message in a synchronous round of 1,000 devices, first line, tells how busy the machine is.
`--profile` prints where the time goes.
"""

import argparse
import cProfile
import json
import logging
import math
import pstats
import resource
import sys
import time
from pathlib import Path

import grid as grid_benchmark
import numpy as np
import simpy
import torch
from flwr.app import Message, MetricRecord, RecordDict

from fedsim.devices import DeviceFleet
from fedsim.flower import compat
from fedsim.flower.grid import NetworkGrid
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.records import stacked_record
from fedsim.flower.session import start
from fedsim.learning.config import LocalConfig
from fedsim.network import star_network
from strategies import linear
from strategies.asynchronous import FedAsync, FedBuff

METRICS = {"num-examples": 10, "train_loss": 1.0}


class FreeExecutor:
    """Replies with rows of a new stack a batch, as training does, and counts its own time."""

    is_stateful = False

    def __init__(self, shapes):
        self.shapes, self.seconds, self.batches = shapes, 0.0, []
        self.size = 4 * sum(math.prod(shape) for shape in shapes.values())

    def reply_bytes(self, message):
        return self.size

    def __call__(self, messages):
        began = time.process_time()
        stacks = {key: torch.randn(len(messages), *shape) for key, shape in self.shapes.items()}
        replies = []
        for i, message in enumerate(messages):
            metrics = compat.fill(MetricRecord(), METRICS)
            records = {"arrays": stacked_record(stacks, i), "metrics": metrics}
            replies.append(Message(compat.fill(RecordDict(), records), reply_to=message))
        self.batches.append(len(messages))
        self.seconds += time.process_time() - began
        return replies


def make_grid(n_devices, executor):
    """Return a grid of devices of lognormal speeds on lognormal links."""
    env, rng = simpy.Environment(), np.random.default_rng(1)
    rate = rng.lognormal(np.log(20e6), 0.5, n_devices)
    network = star_network(
        env, uplink_bps=rate, downlink_bps=4 * rate, latency=0.02, server_up_bps=1e9,
        server_down_bps=1e9, seed=1, message_loss=0.02,
    )  # fmt: skip
    fleet = DeviceFleet(rng.lognormal(3, 1.0, n_devices))
    return NetworkGrid(
        env, network, fleet, executor, WorkPlan(LocalConfig(), np.full(n_devices, 50))
    )


def resident_mb():
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(n_devices, n_parameters, strategy, replies, profile=None):
    """Return milliseconds a reply in each stretch, memory (MiB) and the mean batch."""
    shapes = {f"layer{i}": (n_parameters // 4,) for i in range(4)}
    executor = FreeExecutor(shapes)
    grid = make_grid(n_devices, executor)
    per_version = getattr(strategy, "buffer_size", 1)
    versions, stretch = replies // per_version, 500 // per_version
    memory, stamps = [], []

    def record(row):
        if row.round in (versions // 5, versions):
            memory.append(resident_mb())
        if row.round % stretch == 0:
            stamps.append(time.process_time() - executor.seconds)

    initial = stacked_record({k: torch.zeros(1, *s) for k, s in shapes.items()}, 0)
    if profile is not None:
        profile.enable()
    start(strategy, grid, initial, rounds=versions, seed=1, record=record)
    if profile is not None:
        profile.disable()
    return 1e3 * np.diff(stamps) / 500, memory, float(np.mean(executor.batches))


def synchronous(n_devices, n_parameters, rounds=5):
    """Return milliseconds of processor time a message in rounds of FedAvg."""
    stamps = [time.process_time()]
    shape = (n_devices, n_parameters // 4)
    stacks = {f"layer{i}": torch.randn(shape) for i in range(4)}
    grid = make_grid(n_devices, grid_benchmark.FreeExecutor(stacks))
    start(
        linear.FedAvg(fraction_evaluate=0.0), grid, stacked_record(stacks, 0), rounds=rounds,
        seed=1, record=lambda row: stamps.append(time.process_time()),
    )  # fmt: skip
    return 1e3 * min(np.diff(stamps)[1:]) / n_devices


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replies", type=int, default=10_000)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    cases = [
        ("FedAsync, 1,000 parameters", 1_000, FedAsync),
        ("FedBuff of 10, 1,000 parameters", 1_000, FedBuff),
        ("FedBuff of 10, 100,000 parameters", 100_000, FedBuff),
    ]
    line = {"case": "1,000 devices, synchronous FedAvg, 1,000 parameters"}
    print(json.dumps(line | {"ms_per_message": round(synchronous(1_000, 1_000), 4)}), flush=True)
    for name, n_parameters, strategy in cases:
        profile = cProfile.Profile() if arguments.profile else None
        few, _, _ = measure(100, n_parameters, strategy(), arguments.replies // 4)
        many, memory, batch = measure(1_000, n_parameters, strategy(), arguments.replies, profile)
        line = {
            "case": f"1,000 devices, {name}",
            "replies": arguments.replies,
            "ms_per_reply_min": round(min(many), 4),
            "ms_per_reply_median": round(float(np.median(many)), 4),
            "bar_ms": 0.5,
            "ratio_to_100_devices": round(min(many) / min(few), 2),
            "mean_batch": round(batch, 1),
            "resident_mb_after_a_fifth": round(memory[0], 1),
            "resident_mb_at_the_end": round(memory[1], 1),
        }
        print(json.dumps(line), flush=True)
        if profile is not None:
            pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
