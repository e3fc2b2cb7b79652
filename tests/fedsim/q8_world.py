"""The reference problem Q8 as data and model of a scenario, on a star without latency."""

from functools import cache

import numpy as np
import simpy
import torch
from flwr.app import ArrayRecord

from fedsim.data.federated import federate
from fedsim.data.synthetic import load_quadratic
from fedsim.devices import DeviceFleet
from fedsim.executors.vectorised import VectorisedExecutor
from fedsim.flower.grid import NODE_BASE, NetworkGrid
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.records import stacked_record
from fedsim.learning.config import LocalConfig
from fedsim.learning.models import build_model, quadratic
from fedsim.learning.trainer import Trainer
from fedsim.network import star_network
from tests.strategies.peer_worlds import OPTIMUM, N


@cache
def q8_trainer() -> Trainer:
    torch.set_num_threads(1)
    data = federate(dataset := load_quadratic(), [np.array([i]) for i in dataset.device_train])
    model = build_model(quadratic, data.input_shape, 0, seed=0)
    return Trainer(model, data, loss="output", seed=0)


def q8_star(steps=5, rate=0.05, *, speed=1e3, halves=(), loss=0.0, momentum=0.0, counter=None):
    """Return a grid whose devices take full gradient steps, and the model 0.

    `speed` (samples/s) may be one value for each device; `counter` gets the size of each batch
    that is computed.
    """
    trainer = q8_trainer()
    local = LocalConfig(local_steps=steps, batch_size=0, learning_rate=rate, momentum=momentum)
    plan = WorkPlan(local, trainer.data.size)
    env = simpy.Environment()
    unlimited = np.full(N, np.inf)
    network = star_network(
        env, uplink_bps=unlimited, downlink_bps=unlimited, latency=np.zeros(N), seed=3,
        message_loss=loss,
    )  # fmt: skip
    executor = VectorisedExecutor(trainer, plan, node_base=NODE_BASE, halves=halves)
    if counter is not None:
        executor = Counted(executor, counter)
    fleet = DeviceFleet(np.broadcast_to(np.asarray(speed, float), N).copy(), None)
    grid = NetworkGrid(env, network, fleet, executor, plan, keep_trips=True)
    return grid, stacked_record(trainer.layout.views(trainer.initial()[None]), 0)


class Counted:
    """An executor that notes the sizes of its batches."""

    def __init__(self, executor, sizes):
        self.executor, self.sizes = executor, sizes
        self.is_stateful = executor.is_stateful
        self.reply_bytes = executor.reply_bytes

    def __call__(self, messages):
        self.sizes.append(len(messages))
        return self.executor(messages)


def error_of(arrays: ArrayRecord) -> float:
    """Return the squared relative error of a model."""
    x = np.concatenate([array.numpy().ravel() for array in arrays.values()])
    return float(((x - OPTIMUM) ** 2).sum() / (OPTIMUM**2).sum())
