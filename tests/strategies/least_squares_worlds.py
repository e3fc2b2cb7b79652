"""Least squares on devices behind a star, built by hand: for strategies that compress."""

from dataclasses import dataclass, field

import numpy as np
import simpy
import torch

from fedsim.data.federated import FederatedData
from fedsim.devices import DeviceFleet
from fedsim.executors.clientapp import ClientAppExecutor, device_app
from fedsim.executors.vectorised import VectorisedExecutor
from fedsim.flower.compat import quiet_flower
from fedsim.flower.grid import NODE_BASE, NetworkGrid
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.server import initial_arrays
from fedsim.flower.session import session
from fedsim.learning.config import LocalConfig
from fedsim.learning.models import linear_regression
from fedsim.learning.trainer import Trainer
from fedsim.network import star_network
from fedsim.streams import digest
from tests.plain_grid import PlainGrid, flower_identity

N, D = 4, 6


def least_squares(n_devices=N, d=D, samples=12, seed=0):
    """Return samples of devices whose true weights differ."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_devices, samples, d))
    y = np.einsum("inj,ij->in", x, 1 + rng.standard_normal((n_devices, d)))
    size = np.full(n_devices, samples)
    rows, labels = torch.from_numpy(x.reshape(-1, d)), torch.from_numpy(y.reshape(-1))
    return FederatedData(
        "least squares", rows, labels, np.cumsum(size) - size, size, rows[:1], labels[:1], 0
    )


def halves_of(strategy):
    found = []
    while strategy is not None:
        found += getattr(strategy, "device_halves", ())
        strategy = getattr(strategy, "strategy", None)
    return found


@dataclass
class World:
    strategy: object
    grid: object
    executor: object
    trainer: Trainer
    models: list = field(default_factory=list)
    rows: list = field(default_factory=list)

    def run(self, rounds, *, timeout=None, observe=lambda k: None):
        """Run the strategy; return the model after each round, ``(rounds, P)`` float64."""

        def note(k, arrays):
            if k:
                values = [a.numpy().reshape(-1).astype(float) for a in arrays.values()]
                self.models.append(np.concatenate(values))
                observe(k)

        sampling = digest("0/node-sampling")  # what a session seeds it with
        is_network = isinstance(self.grid, NetworkGrid)
        with session(self.grid, 0) if is_network else flower_identity(sampling), quiet_flower():
            self.strategy.start(
                self.grid,
                initial_arrays(self.trainer),
                num_rounds=rounds,
                timeout=timeout,
                evaluate_fn=note,
            )
        return np.array(self.models)

    def state(self, device, half):
        """Return what a device keeps for a half: name → Tensor."""
        if isinstance(self.executor, VectorisedExecutor):
            return self.executor._halves.state_of(NODE_BASE + device)[half]
        context = self.executor.context_of(NODE_BASE + device)
        record = context.state.array_records.get(half, {})
        return {key: torch.from_numpy(array.numpy()) for key, array in record.items()}

    def trips(self, kind="train"):
        return [trip for trip in self.grid.trips if trip.kind == kind]


def make_world(
    strategy,
    *,
    data=None,
    model=None,
    batch=4,
    local=None,
    executor="vectorised",
    up=np.inf,
    down=np.inf,
    latency=0.0,
    speed=1e3,
    timetable=None,
    loss=0.0,
    seed=1,
    **grid_options,
):
    """Connect a strategy with devices; quantities are scalars or one value a device."""
    torch.set_num_threads(1)
    data = data or least_squares()
    n, d = len(data.size), data.x.shape[1]
    trainer = Trainer(model or linear_regression((d,), 0, bias=False), data, seed=0)
    plan = WorkPlan(local or LocalConfig(batch_size=batch), data.size)
    halves = halves_of(strategy)
    app = device_app(trainer, plan, [half.as_mod() for half in halves])
    if executor == "plain":
        return World(strategy, PlainGrid(app, n), None, trainer)
    if executor == "client_app":
        made = ClientAppExecutor(app, n, node_base=NODE_BASE)
    else:
        made = VectorisedExecutor(trainer, plan, node_base=NODE_BASE, halves=halves)

    def each(value):
        return np.broadcast_to(np.asarray(value, float), n).copy()

    env = simpy.Environment()
    network = star_network(
        env,
        uplink_bps=each(up),
        downlink_bps=each(down),
        latency=each(latency),
        message_loss=loss,
        seed=seed,
    )
    fleet = DeviceFleet(each(speed), timetable)
    grid = NetworkGrid(env, network, fleet, made, plan, keep_trips=True, **grid_options)
    return World(strategy, grid, made, trainer)
