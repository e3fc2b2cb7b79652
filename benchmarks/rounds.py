"""A whole FedAvg round of 100 devices: fedsim against what else could do the same work.

    python benchmarks/rounds.py [--against loop pfl ray] [--models softmax mlp cnn] [--rounds 22]

`fedsim` is the whole of it: messages through the `NetworkGrid` in virtual time,
training, aggregation. `loop` is the loop that anybody would write: one module, one
torch.optim.SGD, device after device, then the weighted mean; no network. `pfl` is pfl-research's
SimulatedBackend (`pip install -e ".[bench]"`), `ray` Flower's own simulation (`".[ray]"`) with that
plain loop as its client app. All train the same devices (log-normal sizes, mean 14, as digits over
a hundred devices) for one epoch of batches of 10, from the same model.

One JSON line for each case: milliseconds a round, the best of the rounds after the first two of
three passes, in which all take turns (`ray` has one).
Processor time of one thread; of `ray` that of all its processes, and the wall time of both sides as
well: on a busy machine many processes get a larger share of it than one.
"""

import argparse
import json
import logging
import os
import sys
import time
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

import fedsim
from fedsim.data.datasets import Dataset
from fedsim.data.federated import federate
from fedsim.flower.records import LazyArrayRecord
from fedsim.learning import models
from fedsim.learning.batches import make_batches
from fedsim.streams import stream

RATE, BATCH = 0.05, 10
MODELS = {
    "softmax": ("softmax 64-10", models.softmax, {}, (64,)),
    "mlp": ("mlp 64-128-10", models.mlp, {"hidden": [128]}, (64,)),
    "cnn": ("cnn 28x28", models.cnn, {}, (1, 28, 28)),
}


def small_devices(*, shape, n_devices, **_):
    """Return devices of 4 to some 150 samples, mean 14; the data set of the scenario below."""
    rng = stream(0, "sizes")
    drawn = rng.lognormal(0, 0.8, n_devices)
    size = np.maximum(4, (drawn / drawn.mean() * 14).astype(int))
    x = rng.standard_normal((size.sum(), *shape)).astype(np.float32)
    flat = x.reshape(len(x), -1)
    y = (flat[:, :10] + 0.5 * rng.standard_normal((len(x), 10))).argmax(1)
    parts = np.split(np.arange(len(x)), np.cumsum(size)[:-1])
    return federate(Dataset("small devices", x, y, x[:20], y[:20], 10), parts)


@cache
def simulation(model, registered, rounds):
    """Return FedAvg with a hundred devices a round, built once per process."""
    torch.set_num_threads(1)
    _, _, arguments, shape = MODELS[model]
    entries = {
        "rounds": rounds,
        "data.devices": registered,
        "data.dataset.shape": list(shape),
        "model": {"kind": model} | arguments,
        "strategies.linear.fraction_train": 100 / registered,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in entries.items()]
    scenario = fedsim.load_scenario(Path(__file__).with_suffix(".yaml"), overrides)
    return fedsim.build(scenario, "linear", device="cpu")


def stamp():
    return time.process_time(), time.perf_counter()


def stamp_of_all():
    """Return the processor time of this process and all below it (Linux), and the wall time."""
    parents, times = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
            times[int(entry.name)] = int(fields[11]) + int(fields[12])
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return sum(times.get(pid, 0) for pid in mine) / os.sysconf("SC_CLK_TCK"), time.perf_counter()


def best(stamps):
    """Return the shortest round in ms, processor time and wall time."""
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(stamps)][2:]
    return min(s[0] for s in steps) * 1e3, min(s[1] for s in steps) * 1e3


def in_fedsim(model, registered, rounds):
    """Return stamps, who was sampled in each round, and the last model."""
    built = simulation(model, registered, rounds)
    built.grid.trips = []
    stamps = [stamp()]
    outcome = built.run(lambda row: stamps.append(stamp()))
    sampled = [[] for _ in range(rounds)]
    for trip in built.grid.trips:
        assert trip.kind == "train"
        sampled[trip.round - 1].append(trip.device)
    return stamps, sampled, LazyArrayRecord(outcome.arrays).to_torch_state_dict()


def batches_of(trainer, number, device):
    """Return the rows of a device's batches, in fedsim's order of samples."""
    size, one = trainer.data.size[[device]], np.array([device])
    made = make_batches(
        trainer.seed,
        np.array([number]),
        one,
        trainer.data.start[one],
        size,
        np.minimum(size, BATCH),
        -(-size // BATCH),
    )
    return [
        torch.from_numpy(made.index[t * made.width : t * made.width + n])
        for t, n in enumerate(made.count)
    ]


def train(module, state, data, batches):
    """Train one device as anybody would."""
    module.load_state_dict(state)
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    for rows in batches:
        loss = nn.functional.cross_entropy(module(data.x[rows]), data.y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fresh(model):
    _, factory, arguments, shape = MODELS[model]
    return models.build_model(factory, shape, 10, seed=1, **arguments)


def in_loop(model, registered, rounds, sampled):
    trainer = simulation(model, registered, rounds).trainer
    module = fresh(model).train()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    size = trainer.data.size
    stamps = [stamp()]
    for number, devices in enumerate(sampled, 1):
        chosen = [batches_of(trainer, number, device) for device in devices]
        stamps[-1] = stamp()  # the order of samples is a gift
        total = {key: torch.zeros_like(value) for key, value in state.items()}
        for device, batches in zip(devices, chosen, strict=True):
            train(module, state, trainer.data, batches)
            weight = float(size[device] / size[devices].sum())
            for key, value in module.state_dict().items():
                total[key].add_(value, alpha=weight)
        state = total
        stamps.append(stamp())
    return stamps, state


def in_pfl(model, registered, rounds):
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset as Users
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = fresh(model)

        def loss(self, x, y):
            return nn.functional.cross_entropy(self.inner(x), y)

        def metrics(self, x, y):
            return {"loss": Weighted(self.loss(x, y).item(), len(y))}

    class Stamps(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            stamps.append(stamp())
            return False, Metrics()

    data = simulation(model, registered, rounds).trainer.data
    users = [
        Users([data.x[a : a + n], data.y[a : a + n]], user_id=str(i))
        for i, (a, n) in enumerate(zip(data.start, data.size, strict=True))
    ]
    sampler = get_user_sampler("minimize_reuse", list(range(registered)))
    federated = FederatedDataset(users.__getitem__, sampler)
    backend = SimulatedBackend(federated, None, [WeightByDatapoints()])
    module = WithLoss()
    learner = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    parameters = NNAlgorithmParams(
        central_num_iterations=rounds,
        evaluation_frequency=10**6,
        train_cohort_size=100,
        val_cohort_size=0,
    )
    local = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=RATE, local_batch_size=BATCH)
    stamps = [stamp()]
    FederatedAveraging().run(
        parameters, backend, learner, local, callbacks=[Stamps()], send_metrics_to_platform=False
    )
    return stamps


def make_client_app(model, registered):
    app = ClientApp()

    @app.train()
    def answer(message, context):
        torch.set_num_threads(1)
        data, module = local_data(model, registered), fresh(model)
        device = int(context.node_config["partition-id"])
        n = int(data.size[device])
        order = data.start[device] + torch.randperm(n)
        state = message.content["arrays"].to_torch_state_dict()
        train(module, state, data, order.split(BATCH))
        metrics = MetricRecord({"num-examples": n})
        record = RecordDict({"arrays": ArrayRecord(module.state_dict()), "metrics": metrics})
        return Message(record, reply_to=message)

    return app


@cache
def local_data(model, registered):
    return small_devices(shape=MODELS[model][3], n_devices=registered)


def in_ray(model, registered, rounds):
    from flwr.simulation import run_simulation

    stamps, server = [], ServerApp()

    @server.main()
    def main(grid, context):
        strategy = FedAvg(
            fraction_train=100 / registered, fraction_evaluate=0.0, min_available_nodes=registered
        )
        strategy.start(
            grid,
            ArrayRecord(fresh(model).state_dict()),
            num_rounds=rounds,
            evaluate_fn=lambda number, arrays: stamps.append(stamp_of_all()),
        )

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    app = make_client_app(model, registered)
    run_simulation(server, app, num_supernodes=registered, backend_config=resources)
    return stamps


def compare(model, registered, rounds, against, passes):
    times = {"fedsim": [], "loop": [], "pfl": []}
    found = {}
    for _ in range(passes):  # in turn: the speed of a busy machine changes from minute to minute
        simulation.cache_clear()
        stamps, sampled, state = in_fedsim(model, registered, rounds)
        times["fedsim"].append(best(stamps))
        if "loop" in against:
            stamps, plain = in_loop(model, registered, rounds, sampled)
            times["loop"].append(best(stamps))
            apart = [(plain[key] - value).abs().max().item() for key, value in state.items()]
            found["largest_difference"] = max(apart)
        if "pfl" in against:
            times["pfl"].append(best(in_pfl(model, registered, rounds)))
    if "ray" in against:
        times["ray"] = [best(in_ray(model, registered, 6))]
    for name, pairs in times.items():
        if pairs:
            found[f"{name}_ms"], wall = (min(column) for column in zip(*pairs, strict=True))
            if name in ("fedsim", "ray"):
                found[f"{name}_wall_ms"] = wall
    for name in against:
        found[f"times_{name}"] = found[f"{name}_ms"] / found["fedsim_ms"]
    if "ray" in against:
        found["times_ray_wall"] = found["ray_wall_ms"] / found["fedsim_wall_ms"]
    rounded = {k: float(f"{v:.3g}") for k, v in found.items()}
    case = {"model": MODELS[model][0], "registered": registered, "sampled": 100}
    print(json.dumps({"benchmark": "round", **case, **rounded}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", nargs="*", default=["loop", "pfl", "ray"])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--registered", nargs="*", type=int, default=[100, 1000])
    parser.add_argument("--rounds", type=int, default=22)
    parser.add_argument("--passes", type=int, default=3)
    arguments = parser.parse_args()
    against = []
    for name, module in (("loop", "torch"), ("pfl", "pfl"), ("ray", "ray")):
        if name in arguments.against and find_spec(module) is None:
            print(f"{name}: left out, {module} is not installed", file=sys.stderr)
        elif name in arguments.against:
            against.append(name)
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    for model in arguments.models:
        for registered in arguments.registered:
            compare(model, registered, arguments.rounds, against, arguments.passes)


if __name__ == "__main__":
    from rounds import main as importable  # Ray's workers cannot import __main__

    importable()
