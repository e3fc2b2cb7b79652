"""A plain Flower app that does the work of the test world `digits_trainer(N)`, for any strategy.

The train config names the strategy, so that devices apply its halves and mods.
"""

from functools import cache

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord
from flwr.clientapp import ClientApp

from fedsim import registry
from fedsim.executors.build import halves_of
from fedsim.executors.clientapp import device_app, mods_needed_by
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.server import initial_arrays
from tests.fedsim.worlds import LOCAL, digits_trainer

N = 6
QUICK = {"fraction_evaluate": 0.0, "learning_rate": 0.3, "client_learning_rate": 0.3}
PRIVATE = {
    "strategy": {"kind": "fedavg", "fraction_evaluate": 0.0},
    "noise_multiplier": 1e-3,
    "num_sampled_clients": N,
}
ARGUMENTS = {
    "deadline_fedavg": {"deadline": "20 s"},
    "hierarchical_fedavg": {"edges": 2},
    "bulyan": {"num_malicious_nodes": 0},
    "dp_client_adaptive": PRIVATE | {"initial_clipping_norm": 10.0},
    "dp_client_fixed": PRIVATE | {"clipping_norm": 10.0},
    "dp_server_adaptive": PRIVATE | {"initial_clipping_norm": 10.0},
    "dp_server_fixed": PRIVATE | {"clipping_norm": 10.0},
    "drop_non_finite": {"strategy": {"kind": "fedavg", "fraction_evaluate": 0.0}},
    "fedprox": {"proximal_mu": 0.1},
    "krum": {"num_malicious_nodes": 1},
    "mudag": {"mixing_steps": 2},
    "multikrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
}

app = ClientApp()


def make(kind):
    """Return a strategy with arguments for a few quick rounds."""
    takes = {parameter.name for parameter in registry.parameters("strategy", kind)}
    arguments = {key: value for key, value in QUICK.items() if key in takes}
    return registry.build("strategy", {"kind": kind} | arguments | ARGUMENTS.get(kind, {}))


@cache
def devices_of(kind):
    """Return the app of a strategy's devices."""
    strategy, trainer = make(kind), digits_trainer(N)
    plan = WorkPlan(LOCAL, trainer.data.size)
    return device_app(trainer, plan, mods_needed_by(strategy), halves_of(strategy))


@app.train()
def train(message, context):
    """Train as the strategy's devices do; reply with plain arrays."""
    configs = message.content.config_records.values()
    kind = next(config["strategy"] for config in configs if "strategy" in config)
    if context.state.get("told", {}).get("strategy") != kind:  # the next strategy begins anew
        context.state.clear()
        context.state["told"] = ConfigRecord({"strategy": kind})
    reply = devices_of(kind)(message=message, context=context)
    for name, record in list(reply.content.array_records.items()):
        plain = ArrayRecord()
        for key, array in record.items():
            plain[key] = array
        del reply.content[name]
        reply.content[name] = plain
    return reply


def start():
    """Return the first model."""
    return ArrayRecord(initial_arrays(digits_trainer(N)).to_torch_state_dict())


def run(kind, grid):
    """Run two rounds of a strategy; return the final arrays."""
    config = ConfigRecord({"strategy": kind, "learning-rate": 0.3})
    result = make(kind).start(grid, start(), num_rounds=2, train_config=config)
    return {key: np.array(array.numpy()) for key, array in result.arrays.items()}
