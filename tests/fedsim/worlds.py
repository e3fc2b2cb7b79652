"""Small worlds for tests: digits on a star, built by hand, without a scenario."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import simpy
import torch

from fedsim.data.datasets import load_digits
from fedsim.data.federated import FederatedData, federate
from fedsim.data.partition import partition_dirichlet
from fedsim.devices import DeviceFleet
from fedsim.executors.clientapp import ClientAppExecutor, device_app
from fedsim.executors.vectorised import VectorisedExecutor
from fedsim.flower.grid import NODE_BASE, NetworkGrid
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.records import stack_records, stacked_record
from fedsim.flower.session import Evaluation
from fedsim.learning.config import LocalConfig
from fedsim.learning.models import build_model, softmax
from fedsim.learning.trainer import Trainer
from fedsim.network import graph_network, star_network

LOCAL = LocalConfig(local_epochs=2, batch_size=16, learning_rate=0.3)


@cache
def digits(n_devices: int) -> FederatedData:
    dataset = load_digits(test_fraction=0.25, seed=1, data_dir=None)
    parts = partition_dirichlet(
        dataset.y_train, n_devices, rng=np.random.default_rng(1), alpha=0.5, min_samples=4
    )
    return federate(dataset, parts)


@cache
def digits_trainer(n_devices: int, chunk: int | None = None) -> Trainer:
    torch.set_num_threads(1)
    data = digits(n_devices)
    model = build_model(softmax, data.input_shape, data.n_classes, seed=1)
    return Trainer(model, data, seed=1, chunk=chunk)


@dataclass
class World:
    grid: NetworkGrid
    trainer: Trainer

    def initial(self):
        return stacked_record(self.trainer.layout.views(self.trainer.initial()[None]), 0)

    def evaluate(self, arrays) -> Evaluation:
        model = self.trainer.layout.flatten(stack_records([arrays]))
        data = self.trainer.data
        loss, accuracy = self.trainer.evaluate(model, data.x_test, data.y_test)
        return Evaluation(float(loss[0]), float(accuracy[0]))


def make_world(
    n_devices=20,
    *,
    speed=None,
    up=np.inf,
    down=np.inf,
    latency=0.0,
    server=np.inf,
    loss=0.0,
    seed=1,
    link_model=None,
    timetable=None,
    on_leave="pause",
    energy=None,
    executor="vectorised",
    app=None,
    chunk=None,
    local=LOCAL,
    network_options=None,
    graph=None,
    halves=(),
    **grid_options,
) -> World:
    """Connect a grid; quantities are scalars or one value per device (bit/s, s, samples/s).

    With `graph` its links carry the messages instead of a star.
    """

    def each(value):
        return np.broadcast_to(np.asarray(value, float), n_devices).copy()

    trainer = digits_trainer(n_devices, chunk)
    env = simpy.Environment()
    speed = each(1e3 if speed is None else speed)
    fleet = DeviceFleet(speed, timetable, on_leave=on_leave, energy=energy)
    options = {"link_model": link_model, "seed": seed, "message_loss": loss}
    options |= network_options or {}
    if graph is not None:
        network = graph_network(env, graph, **options)
    else:
        network = star_network(
            env,
            uplink_bps=each(up),
            downlink_bps=each(down),
            latency=each(latency),
            server_up_bps=server,
            server_down_bps=server,
            **options,
        )
    plan = WorkPlan(local, trainer.data.size)
    if executor == "vectorised":
        made = VectorisedExecutor(trainer, plan, node_base=NODE_BASE, halves=halves)
    else:
        made = ClientAppExecutor(app or device_app(trainer, plan), n_devices, node_base=NODE_BASE)
    grid = NetworkGrid(env, network, fleet, made, plan, keep_trips=True, **grid_options)
    return World(grid, trainer)


def heterogeneous(n_devices=20, seed=3):
    """Return options of unequal links and devices for `make_world`."""
    rng = np.random.default_rng(seed)
    rate = rng.lognormal(np.log(64e3), 0.7, n_devices)
    return {
        "up": rate,
        "down": 4 * rate,
        "latency": rng.uniform(0.01, 0.2, n_devices),
        "speed": rng.lognormal(np.log(200), 0.8, n_devices),
    }
