"""What an iteration of synchronous training costs beside the training itself.

    python benchmarks/collectives.py [--repeats 3]

Prints one JSON line per case: CPU seconds of an iteration whose messages are all simulated, of one
that repeats it, and of 100 iterations in a row, with the virtual seconds of synchronisation. The
executor is free of charge; the gradients are those of ResNet-50 (102 MB), the links 10 Gbit/s.
"""

import argparse
import json
import time

import numpy as np
import simpy
import torch
from flwr.app import ConfigRecord, Message, RecordDict

import topologies as tp
from benchmarks.grid import FreeExecutor
from fedsim.devices import DeviceFleet
from fedsim.flower import compat
from fedsim.flower.grid import NetworkGrid
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.records import stacked_record
from fedsim.learning.config import LocalConfig
from fedsim.network import graph_network
from topologies.closed_forms import closed_form
from topologies.profiles import profile
from topologies.timing import CostModel

ALPHA = 20e-6
RATE = 10e9
ASK = {"kind": "collective", "profile": "resnet50", "step_latency": ALPHA}


def make_grid(graph, n_devices):
    """Return a grid whose devices work 0.1 s an iteration."""
    env = simpy.Environment()
    stacks = {"layer": torch.zeros(n_devices, 1)}
    plan = WorkPlan(LocalConfig(local_steps=1, batch_size=100), np.full(n_devices, 100))
    fleet = DeviceFleet(np.full(n_devices, 1e3))
    return NetworkGrid(env, graph_network(env, graph), fleet, FreeExecutor(stacks), plan), stacks


def iterate(grid, stacks, number, ask):
    """Run one iteration; return its CPU seconds and virtual seconds of synchronisation."""
    start = time.process_time()
    config = ConfigRecord({"server-round": number, "mode": "gradient"})
    arrays = stacked_record(stacks, 0)
    content = RecordDict({"arrays": arrays, "config": config, "exchange": ask})
    messages = [
        Message(content, dst_node_id=node, message_type="train") for node in grid.get_node_ids()
    ]
    replies = grid.send_and_receive(messages)
    assert len(replies) == len(messages)
    (report,) = grid.take_traffic().collectives
    return time.process_time() - start, report.sync


def measure(graph, name, repeats, **ask):
    """Return the figures of one case."""
    torch.set_num_threads(1)
    n_devices = len(tp.devices_of(graph))
    record = ConfigRecord(ASK | {"collective": name} | ask)
    simulated, repeated = [], []
    for _ in range(repeats):
        grid, stacks = make_grid(graph, n_devices)
        times = [iterate(grid, stacks, number, record) for number in range(1, 101)]
        simulated.append(times[0][0])
        repeated.append(min(seconds for seconds, _ in times[1:]))
        total = sum(seconds for seconds, _ in times)
    form = closed_form(name, graph)
    size = profile("resnet50").n_bytes
    expected = None if form is None else form.seconds(size, RATE, CostModel(step_latency=ALPHA))
    if expected is not None:
        assert abs(times[0][1] / expected - 1) < 1e-9
    return {
        "simulated_cpu_seconds": round(min(simulated), 3),
        "repeated_cpu_seconds": round(min(repeated), 4),
        "hundred_cpu_seconds": round(total, 2),
        "sync_virtual_seconds": times[0][1],
        "closed_form_seconds": expected,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    cases = [
        ("BCube(3,2), 9 ranks, bml", tp.bcube(3, 2, bandwidth=RATE), "bml", {}),
        ("Fat-Tree(4), 16 ranks, ps_colocated", tp.fat_tree(4, bandwidth=RATE), "ps_colocated", {}),
        ("BCube(8,2), 64 ranks, bml", tp.bcube(8, 2, bandwidth=RATE), "bml", {}),
        ("BCube(8,2), 64 ranks, ring", tp.bcube(8, 2, bandwidth=RATE), "ring", {}),
        ("BCube(8,3), 512 ranks, bml", tp.bcube(8, 3, bandwidth=RATE), "bml", {}),
        (
            "BCube(8,3), 512 ranks, bml, local barrier",
            tp.bcube(8, 3, bandwidth=RATE),
            "bml",
            {"barrier": "local"},
        ),
    ]
    with compat.identity():
        for case, graph, name, ask in cases:
            figures = measure(graph, name, repeats if len(graph) < 200 else 1, **ask)
            print(json.dumps({"case": case} | figures), flush=True)


if __name__ == "__main__":
    main()
