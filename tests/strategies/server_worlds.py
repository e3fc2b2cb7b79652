"""Strategies with a server on the reference problem Q8: a plain app, and plain loops as oracles."""

import logging

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from tests.plain_grid import PlainGrid, flower_identity
from tests.strategies.peer_worlds import OPTIMUM, B, D, H, N


def error(x):
    return float(((np.asarray(x) - OPTIMUM) ** 2).sum() / (OPTIMUM**2).sum())


def local(i, x, *, steps=5, rate=0.05, proximal=0.0, momentum=0.0, control=0.0):
    """Return the model of device i after full gradient steps from x."""
    y, v = x.copy(), np.zeros(D)
    for _ in range(steps):
        v = momentum * v + H[i] @ y - B[i] + proximal * (y - x) + control
        y = y - rate * v
    return y


def server_app(steps=5, rate=0.05, momentum=0.0):
    """Return an app whose devices train as the config says, else with these arguments."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        i = context.node_config["partition-id"]
        config = message.content["config"]
        asked = {
            "steps": config.get("local-steps", steps),
            "rate": config.get("learning-rate", rate),
            "proximal": config.get("proximal-mu", 0.0),
            "momentum": config.get("momentum", momentum),
        }
        w = local(i, message.content["arrays"]["w"].numpy(), **asked)
        metrics = {"num-examples": 1, "train_loss": float(w @ H[i] @ w / 2 - B[i] @ w)}
        if config.get("report") == "steps":
            metrics["local_steps"] = asked["steps"]
        content = {"arrays": ArrayRecord({"w": Array(w)}), "metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=message)

    return app


def run_plain(strategy, rounds, *, app=None, grid=None, config=None, evaluate_fn=None):
    """Run a strategy from 0 in a plain app; return Flower's result."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with flower_identity(0):
        return strategy.start(
            grid or PlainGrid(app or server_app(), N),
            ArrayRecord({"w": Array(np.zeros(D))}),
            num_rounds=rounds,
            train_config=ConfigRecord(config or {}),
            evaluate_fn=evaluate_fn,
        )
