"""Gossip in pairs: SwarmSGD in rounds, AD-PSGD without any."""

import time
from collections.abc import Callable, Sequence
from logging import INFO
from typing import Any

import networkx as nx
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import Tensor

from strategies.arrivals import Arrivals, mix, pair_weights, rows_in
from strategies.common import row_records
from strategies.compat import log, sample_nodes
from strategies.peers import PeerStrategy, State
from topologies.attributes import DiGraph, Graph
from topologies.dynamics import random_matching

__all__ = ["ADPSGD", "SwarmSGD"]

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class SwarmSGD(PeerStrategy):
    """SwarmSGD: after some local steps, random pairs of neighbours average their models.

    A round pairs as many devices as it can, each with one other: x_i, x_j ← (y_i + y_j)/2 after
    local work X → Y; devices without a partner keep theirs. One model each way a pair.

    Parameters
    ----------
    seed : int
        Of the pairs, where the network does not draw them.
    **kwargs
        See `strategies.peers.PeerStrategy`; of a `graph`, pairs of neighbours are drawn.

    References
    ----------
    .. [1] Nadiradze, Sabour, Davies, Li, Alistarh, "Asynchronous decentralized SGD with quantized
       and local updates", NeurIPS 2021, Algorithm 1 (one pair at a time).
    """

    def __init__(self, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed

    def exchange(self) -> dict[str, Any]:
        """Let the network draw the pairs where no graph is given."""
        return {} if self.graph is not None else {"fanout": "pairwise"}

    def peers(self, n_devices: int) -> Graph | None:
        """Return this round's pairs of the graph."""
        graph = super().peers(n_devices)
        return None if graph is None else self._pairs(graph)

    def without_network(self, n_devices: int) -> Graph:
        """Return pairs of all devices."""
        return self._pairs(nx.complete_graph(n_devices))

    def _pairs(self, graph: Graph) -> Graph:
        return random_matching(graph, seed=self.seed)(self.round - 1)

    def step(self, state: State, work: Tensor, arrivals: Arrivals) -> State:
        """Average the pairs."""
        return {"models": mix(pair_weights(arrivals), work)}


class ADPSGD(PeerStrategy):
    """AD-PSGD: nobody waits; a device that has a gradient averages with one neighbour, then steps.

    When device i finishes a gradient taken at its model of then, it picks a neighbour j; both take
    (x_i + x_j)/2; then x_i ← x_i - η g, and i begins anew. A round (of records and evaluations) is
    as many gradients as there are devices, whoever made them. One model each way a pair.

    Parameters
    ----------
    seed : int
        Of the neighbours picked, where the network does not pick them.
    **kwargs
        See `strategies.peers.PeerStrategy`; devices do not evaluate.

    References
    ----------
    .. [1] Lian, Zhang, Zhang, Liu, "Asynchronous decentralized parallel stochastic gradient
       descent", ICML 2018, Algorithm 1.
    """

    mode = "gradient"

    def __init__(self, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed

    def _forget(self) -> None:
        super()._forget()
        self._counts: dict[int, int] = {}  # row → its instructions so far

    def exchange(self) -> dict[str, Any]:
        """Let the pair exchange at once, whatever the other devices do."""
        return {"fanout": "pairwise", "barrier": "local"}

    def step(self, state: State, work: Tensor, arrivals: Arrivals) -> State:
        """Average pairs, then step by the gradients."""
        return {"models": mix(pair_weights(arrivals), state["models"]) - self.rate * work}

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float | None = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run until there were `num_rounds` gradients for each device; see Flower's `Strategy`.

        `timeout` and `evaluate_config` have no meaning here: there is nothing to wait for, and
        only `evaluate_fn` evaluates.
        """
        log(INFO, "Starting %s strategy:", type(self).__name__)
        self.summary()
        self._forget()
        config = ConfigRecord() if train_config is None else train_config
        result = Result()
        if evaluate_fn and (scores := evaluate_fn(0, initial_arrays)) is not None:
            result.evaluate_metrics_serverapp[0] = scores
        self._read_rate(config)
        asked: dict[str, int] = {}  # message id → node
        done: list[Message] = []
        while self.round < num_rounds:
            _, online = sample_nodes(grid, 1 if self.nodes else self.min_available_nodes, 0)
            self._enrol(online, initial_arrays)
            for node in sorted(set(online) - set(asked.values())):
                # One push each: pairs are independent of what others happen to do at this moment.
                message_ids = grid.push_messages([self._instruction(node, config)])
                asked |= dict.fromkeys(message_ids, node)
            replies = list(grid.pull_messages(list(asked)))
            for reply in replies:
                del asked[reply.metadata.reply_to_message_id]
            gone = getattr(grid, "is_lost", lambda _: False)
            asked = {i: node for i, node in asked.items() if not gone(i)}
            if not replies and not hasattr(grid, "now"):
                time.sleep(0.1)  # a real grid answers at once, with nothing
            for reply in self._valid(replies):
                self._finish(reply)
                done.append(reply)
                if len(done) >= len(self.nodes):
                    self._close(done, result, evaluate_fn)
                    done = []
                if self.round == num_rounds:
                    break
        return result

    def _instruction(self, node: int, config: ConfigRecord) -> Message:
        row = self.nodes.index(node)
        self._counts[row] = self._counts.get(row, 0) + 1
        self._graph = None if self.graph is None else self._picked(row)
        content = RecordDict(
            {
                "arrays": row_records(self._stacks(self.query(self.state)), [row])[0],
                "config": self._config(config, self._counts[row]),
                "exchange": self._exchange(row),
            }
        )
        return Message(content, dst_node_id=node, message_type="train")

    def _picked(self, row: int) -> DiGraph:
        """Return the graph in which a device sends to the one neighbour it picks this time."""
        n = len(self.nodes)
        graph = self.graph_at(self.round)
        neighbours = sorted((graph or nx.complete_graph(n)).adj[row])
        picked: DiGraph = nx.DiGraph()
        picked.add_nodes_from(range(n))
        if neighbours:
            keys = np.random.SeedSequence(self.seed, spawn_key=(row, self._counts[row]))
            picked.add_edge(row, neighbours[np.random.default_rng(keys).integers(len(neighbours))])
        return picked

    def _finish(self, reply: Message) -> None:
        """Average with the neighbour whose model came, and step."""
        row = self.nodes.index(reply.metadata.src_node_id)
        delivery = reply.content.get("delivery")
        if isinstance(delivery, ConfigRecord):
            partners = rows_in(delivery, "received_from", self.nodes)
        else:
            partners = list(self._picked(row).adj[row])
        met = np.zeros((len(self.nodes),) * 2, np.bool_)
        met[partners, row] = met[row, partners] = True
        self.state = self.step(self.state, self._work([reply], [row]), Arrivals(met, met))

    def _close(
        self, done: Sequence[Message], result: Result, evaluate_fn: EvaluateFn | None
    ) -> None:
        """End a round: metrics, the mean model, an evaluation."""
        self.round += 1
        result.arrays = self._mean()
        result.train_metrics_clientapp[self.round] = self._metrics(done)
        if evaluate_fn and (scores := evaluate_fn(self.round, result.arrays)) is not None:
            result.evaluate_metrics_serverapp[self.round] = scores
