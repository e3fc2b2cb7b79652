"""The reference problem Q8, an app that solves it, and ten-line numpy loops as oracles."""

import logging

import networkx as nx
import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from tests.plain_grid import PlainGrid, flower_identity

N, D = 8, 10


def _q8():
    rng = np.random.default_rng(20240501)
    h, b = np.empty((N, D, D)), np.empty((N, D))
    for i in range(N):
        m = rng.standard_normal((D, D))
        h[i] = m @ m.T / D + 0.5 * np.eye(D)
        b[i] = 3 * rng.standard_normal(D)
    return h, b


H, B = _q8()
OPTIMUM = np.linalg.solve(H.sum(0), B.sum(0))
SMOOTHNESS = max(np.linalg.eigvalsh(h).max() for h in H)
CONVEXITY = min(np.linalg.eigvalsh(h).min() for h in H)


def gradients(x):
    return np.einsum("nij,nj->ni", H, x) - B


def error(x):
    return ((np.asarray(x) - OPTIMUM) ** 2).sum(1).mean() / (OPTIMUM**2).sum()


def consensus(x):
    return ((x - x.mean(0)) ** 2).sum(1).mean()


def conjugate(dual):
    """Return the gradients of the conjugates, H⁻¹ (z + b)."""
    return torch.linalg.solve(torch.from_numpy(H), dual + torch.from_numpy(B))


# --- graphs ---------------------------------------------------------------------------------------

RING = nx.cycle_graph(N)
D8 = nx.DiGraph([(i, (i + 1) % N) for i in range(N)] + [(3, 0), (5, 0), (6, 2)])


def tv8(step):
    order = np.random.default_rng(1000 + step).permutation(N)
    graph = nx.Graph()
    graph.add_nodes_from(range(N))
    graph.add_edges_from((int(order[k]), int(order[(k + 1) % N])) for k in range(N))
    return graph


def one_peer(step):
    graph = nx.DiGraph()
    graph.add_nodes_from(range(N))
    graph.add_edges_from((j, (j + 2 ** (step % 3)) % N) for j in range(N))
    return graph


def at(graph, step):
    return graph(step) if callable(graph) else graph


def metropolis(graph):
    w = np.zeros((len(graph), len(graph)))
    for i, j in graph.edges:
        w[i, j] = w[j, i] = 1 / (1 + max(graph.degree[i], graph.degree[j]))
    return w + np.diag(1 - w.sum(1))


def push(graph):
    p = np.eye(len(graph))
    for j, i in graph.edges:
        p[i, j] = 1
    return p / p.sum(0)


def laplacian(graph):
    return nx.laplacian_matrix(graph, nodelist=range(len(graph))).toarray().astype(float)


# --- the methods as plain loops; each yields the models after every step --------------------------


def dpsgd(eta, graph, order="combine_then_adapt"):
    x, step = np.zeros((N, D)), 0
    while True:
        w = metropolis(at(graph, step))
        x = w @ x - eta * gradients(x) if order[0] == "c" else w @ (x - eta * gradients(x))
        yield x
        step += 1


def dsgt(eta, graph, order="combine_then_adapt"):
    x, step = np.zeros((N, D)), 0
    y = g = gradients(x)
    while True:
        w = metropolis(at(graph, step))
        x = w @ x - eta * y if order[0] == "c" else w @ (x - eta * y)
        yield x
        new, step = gradients(x), step + 1
        w = w if order[0] == "c" else metropolis(at(graph, step))
        y, g = (w @ y + new - g if order[0] == "c" else w @ (y + new - g)), new


def extra(eta, graph):
    before, step = np.zeros((N, D)), 1
    g = gradients(before)
    x = metropolis(at(graph, 0)) @ before - eta * g
    while True:
        yield x
        w, new = metropolis(at(graph, step)), gradients(x)
        half = (np.eye(N) + metropolis(at(graph, step - 1))) / 2
        x, before = x + w @ x - half @ before - eta * (new - g), x
        g, step = new, step + 1


def d2(eta, graph):
    before, step = np.zeros((N, D)), 1
    g = gradients(before)
    x = (np.eye(N) + metropolis(at(graph, 0))) / 2 @ (before - eta * g)
    while True:
        yield x
        half, new = (np.eye(N) + metropolis(at(graph, step))) / 2, gradients(x)
        x, before = half @ (2 * x - before - eta * (new - g)), x
        g, step = new, step + 1


def chebyshev(w, x, steps):
    second = np.sort(np.linalg.eigvalsh(w))[-2]
    root = np.sqrt(1 - second**2)
    omega = (1 - root) / (1 + root)
    z = before = x
    for _ in range(steps):
        z, before = (1 + omega) * w @ z - omega * before, z
    return z


def mudag(steps, graph):
    w, eta = metropolis(graph), 1 / SMOOTHNESS
    alpha = np.sqrt(CONVEXITY / SMOOTHNESS)
    beta = (1 - alpha) / (1 + alpha)
    x = y = np.zeros((N, D))
    g = gradients(y)
    new = chebyshev(w, y - eta * g, steps)
    while True:
        ahead = new + beta * (new - x)
        x = new
        yield x
        g_new = gradients(ahead)
        new = chebyshev(w, ahead + x - y - eta * (g_new - g), steps)
        y, g = ahead, g_new


def adom(graph):
    largest, smallest = 4.0, 2 - np.sqrt(2)  # of the Laplacians of rings of eight
    root = np.sqrt(CONVEXITY * SMOOTHNESS)
    eta, tau = 2 * smallest * root / (7 * largest), smallest / (7 * largest) * root / SMOOTHNESS
    z = z_f = m = np.zeros((N, D))
    step = 0
    while True:
        z_g = tau * z + (1 - tau) * z_f
        g = np.linalg.solve(H, (z_g + B)[..., None])[..., 0]
        w = laplacian(at(graph, step)) / largest
        delta = w @ (m - eta * g)
        m, z = m - eta * g - delta, z + eta / (2 * SMOOTHNESS) * (z_g - z) + delta
        z_f = z_g - CONVEXITY * w @ g
        yield np.linalg.solve(H, (z_f + B)[..., None])[..., 0]
        step += 1


def sgp(eta, graph):
    x, w, step = np.zeros((N, D)), np.ones((N, 1)), 0
    while True:
        p = push(at(graph, step))
        x, w = p @ (x - eta * gradients(x / w)), p @ w
        yield x / w
        step += 1


def push_diging(eta, graph):
    u, v, x, step = np.zeros((N, D)), np.ones((N, 1)), np.zeros((N, D)), 0
    y = g = gradients(x)
    while True:
        p = push(at(graph, step))
        u, v = p @ (u - eta * y), p @ v
        x = u / v
        yield x
        new = gradients(x)
        y, g, step = p @ y + new - g, new, step + 1


def keep_largest(x, k):
    kept = np.zeros_like(x)
    for row, out in zip(x, kept, strict=True):
        best = np.argsort(-np.abs(row), kind="stable")[:k]
        out[best] = row[best]
    return kept


def choco(eta, gamma, k, graph, start=None):
    x = np.zeros((N, D)) if start is None else start
    public, w = np.zeros((N, D)), metropolis(graph)
    while True:
        x = x - eta * gradients(x) if eta else x
        public = public + keep_largest(x - public, k)
        x = x + gamma * (w - np.eye(N)) @ public
        yield x


def after(loop, *marks):
    """Return the models after some numbers of steps."""
    steps = dict(zip(range(1, max(marks) + 1), loop, strict=False))
    return [steps[mark] for mark in marks]


# --- the same through Flower ----------------------------------------------------------------------


def q8_app():
    app = ClientApp()

    @app.train()
    def train(message, context):
        i = context.node_config["partition-id"]
        config = message.content["config"]
        w = message.content["arrays"]["w"].numpy()
        loss = float(w @ H[i] @ w / 2 - B[i] @ w)
        metrics = MetricRecord({"num-examples": 1, "train_loss": loss})
        if config["mode"] == "gradient":
            content = {"gradients": ArrayRecord({"w": Array(H[i] @ w - B[i])})}
        else:
            for _ in range(config.get("local-steps", 1)):
                w = w - config["learning-rate"] * (H[i] @ w - B[i])
            content = {"arrays": ArrayRecord({"w": Array(w)})}
        return Message(RecordDict(content | {"metrics": metrics}), reply_to=message)

    return app


def start(strategy, rounds, *, grid=None, initial=None, config=None, evaluate=None):
    """Run a strategy on a plain grid; return its models as an array."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    arrays = initial or ArrayRecord({"w": Array(np.zeros(D))})
    with flower_identity(0):
        result = strategy.start(
            grid or PlainGrid(q8_app(), N),
            arrays,
            num_rounds=rounds,
            train_config=ConfigRecord(config or {}),
            evaluate_fn=evaluate,
        )
    models = strategy.device_models["w"].numpy()
    return models, result


def models_after(strategy, marks):
    """Run a strategy once; return its models after some numbers of rounds."""
    seen = {}

    def note(number, arrays):
        if number in marks:
            seen[number] = strategy.device_models["w"].numpy().copy()

    start(strategy, max(marks), evaluate=note)
    return [seen[mark] for mark in marks]


class DeliveringGrid(PlainGrid):
    """A plain grid that says, as a network would, who was linked and what arrived.

    `lost(round, sender, receiver)` tells which payloads are lost, `silent(round, device)` which
    devices do not reply.
    """

    def __init__(self, graph, lost, silent=lambda number, device: False):
        super().__init__(q8_app(), N)
        self.graph, self.lost, self.silent = graph, lost, silent
        self.exchanges = []

    def push_messages(self, messages):
        messages = list(messages)
        asked = [m for m in messages if m.metadata.message_type == "train"]
        ids = super().push_messages(messages)
        by_device = {m.metadata.dst_node_id - 1000: i for m, i in zip(messages, ids, strict=True)}
        for message in asked:
            self.exchanges.append(message.content["exchange"])
            number = message.content["config"]["server-round"]
            i = message.metadata.dst_node_id - 1000
            graph = at(self.graph, number - 1)
            reply = self.replies[by_device[i]]
            senders = graph.predecessors(i) if graph.is_directed() else graph.adj[i]
            arrived = [1000 + j for j in senders if not self.lost(number, j, i)]
            record = ConfigRecord({"sent_bytes": 0, "started": 0.0, "finished": 0.0})
            if linked := [1000 + j for j in graph.adj[i]]:
                record["neighbours"] = linked
            if arrived:
                record["received_from"] = arrived
            reply.content["delivery"] = record
        for i, message_id in by_device.items():
            if asked and self.silent(asked[0].content["config"]["server-round"], i):
                del self.replies[message_id]
        return ids
