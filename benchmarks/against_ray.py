"""FedAvg of the quickstart: fedsim against Flower's own Ray simulation of the same work.

    pip install -e ".[ray]" && python benchmarks/against_ray.py [--rounds 10]

Both train the same devices on the same data with the same local work, from the same model, and
evaluate on the same test set after each round. Flower's has no network; fedsim's simulates links
and losses besides. Prints one JSON line: wall seconds per round of each (median, the first round
left out), start-up, and the ratio.
"""

import argparse
import json
import os
import statistics
import time
from functools import cache
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch
from flwr.app import ArrayRecord, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

import fedsim
from fedsim.executors.vectorised import train_or_evaluate
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.server import initial_arrays, score
from fedsim.learning.config import LocalConfig

SCENARIO = Path(__file__).parents[1] / "scenarios" / "quickstart.yaml"


@cache
def simulation():
    """Return the quickstart's FedAvg, built once per process."""
    torch.set_num_threads(1)
    scenario = fedsim.load_scenario(SCENARIO, ["network.message_loss=0"])
    return fedsim.build(scenario, "linear", device="cpu")


def plan():
    built = simulation()
    training = built.scenario.training.model_dump(exclude_none=True)
    return WorkPlan(LocalConfig(**training), built.trainer.data.size)


def make_client_app():
    app = ClientApp()

    @app.train()
    def train(message, context):
        device = int(context.node_config["partition-id"])
        (content,) = train_or_evaluate(simulation().trainer, plan(), [message], [device])
        state = content["arrays"].to_torch_state_dict()
        content["arrays"] = ArrayRecord(state)  # what an ordinary app replies
        return Message(content, reply_to=message)

    return app


def in_flower(rounds):
    """Return the wall time of the start and after each round of Flower's simulation."""
    stamps = [time.perf_counter()]
    server = ServerApp()

    @server.main()
    def main(grid, context):
        def evaluate(server_round, arrays):
            score(simulation().trainer, arrays)
            stamps.append(time.perf_counter())

        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=20, min_train_nodes=20)
        initial = initial_arrays(simulation().trainer)
        plain = ArrayRecord(initial.to_torch_state_dict())
        strategy.start(grid, plain, num_rounds=rounds, evaluate_fn=evaluate)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, make_client_app(), num_supernodes=20, backend_config=resources)
    return stamps


def in_fedsim(rounds):
    stamps = [time.perf_counter()]
    scenario = fedsim.load_scenario(SCENARIO, [f"rounds={rounds}"])
    built = fedsim.build(scenario, "linear", device="cpu")
    built.run(lambda row: stamps.append(time.perf_counter()))
    return stamps


def per_round(stamps):
    steps = [b - a for a, b in pairwise(stamps[1:])]
    return statistics.median(steps[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    ours = in_fedsim(rounds)
    theirs = in_flower(rounds)
    line = {
        "case": "quickstart FedAvg, 20 devices",
        "fedsim_seconds_per_round": round(per_round(ours), 4),
        "flower_ray_seconds_per_round": round(per_round(theirs), 4),
        "ratio": round(per_round(theirs) / per_round(ours), 1),
        "flower_ray_start_seconds": round(theirs[1] - theirs[0], 1),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    from against_ray import main as importable  # Ray's workers cannot import __main__

    importable()
