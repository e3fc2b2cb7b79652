"""Devices that learn from each other: the base of all strategies without a server's model.

A `PeerStrategy` holds one row for each device, asks every device to work on its own row, and turns
the rows of a round into those of the next by a pure function, `step`. Who was linked with whom,
and what arrived, comes from the record ``delivery`` of the replies; where there is none (a plain
Flower app), everything arrived.

Decision: a device that did not reply keeps its whole row, memories included, and nobody mixes with
it in that round. Invariants of a method (mean of the trackers, mass) therefore hold under any
failure.
"""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from logging import INFO, WARNING
from typing import Any, ClassVar, Literal

import networkx as nx
import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from strategies.arrivals import Arrivals, rows_in
from strategies.common import mean_metrics, row_records, stack_of
from strategies.compat import log, sample_nodes
from strategies.layout import Layout, tensors_of
from topologies.attributes import Graph

__all__ = ["PeerGraph", "PeerStrategy", "State", "row_bytes"]

State = dict[str, Tensor]
"""Everything a method remembers: each tensor ``(n_devices, ...)``, row i is device i's."""
PeerGraph = Graph | Callable[[int], Graph]
"""A graph on the devices 0..n-1, or a function of the round (0, 1, ...)."""


# --- models as rows -------------------------------------------------------------------------------


def row_bytes(rows: Tensor) -> int:
    """Return the bytes of one row."""
    return rows[0].numel() * rows.element_size()


# --- the base -------------------------------------------------------------------------------------


class PeerStrategy(Strategy):
    """Base of strategies in which every device has a model of its own.

    A subclass says what it remembers (`initial`), where a device works (`query`), which rows are
    the models (`models`) and how a round changes them (`step`).

    Parameters
    ----------
    learning_rate : float, optional
        Default: the ``learning-rate`` of the train config.
    local_steps : int, optional
        Steps of local work between two exchanges; default: what the train config says.
    graph : networkx.Graph or callable, optional
        Who sends to whom, on nodes 0..n-1 (row i is the device with the i-th lowest node id), or a
        function of the round from 0. Default: the network's own links; in a plain Flower app, which
        has none, everybody.
    fraction_evaluate : float
        Share of the devices that evaluate their own model after a round.
    min_available_nodes : int
        Devices to wait for before the first round.

    Attributes
    ----------
    device_models : dict of Tensor, shape (n_devices, *shape)
        Every device's model.

    Raises
    ------
    ValueError
        If an argument is out of its range, or a graph has other nodes than the devices.
    """

    mode: ClassVar[Literal["local_sgd", "gradient"]] = "local_sgd"
    when: Literal["before", "with", "after"] = "after"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the arguments of this class in the signatures of subclasses that pass them on."""
        super().__init_subclass__(**kwargs)
        own = inspect.signature(cls.__init__).parameters.values()
        named = [each for each in own if each.kind is each.KEYWORD_ONLY]
        if any(each.kind is each.VAR_KEYWORD for each in own):
            names = {each.name for each in named}
            base = inspect.signature(PeerStrategy.__init__).parameters.values()
            named += [x for x in base if x.kind is x.KEYWORD_ONLY and x.name not in names]
        cls.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]

    def __init__(
        self,
        *,
        learning_rate: float | None = None,
        local_steps: int | None = None,
        graph: PeerGraph | None = None,
        fraction_evaluate: float = 1.0,
        min_available_nodes: int = 2,
    ) -> None:
        if learning_rate is not None and not learning_rate >= 0:
            raise ValueError(f"learning_rate = {learning_rate}: must be at least 0")
        if local_steps is not None and local_steps < 1:
            raise ValueError(f"local_steps = {local_steps}: must be at least 1")
        if not 0 <= fraction_evaluate <= 1:
            raise ValueError(f"fraction_evaluate = {fraction_evaluate}: must be from 0 to 1")
        if isinstance(graph, nx.Graph):
            _check_nodes(graph, len(graph))
        self.learning_rate = learning_rate
        self.local_steps = local_steps
        self.graph = graph
        self.fraction_evaluate = fraction_evaluate
        self.min_available_nodes = min_available_nodes
        self._forget()

    # --- what a method is ---------------------------------------------------------------------

    def check_models(self, names: Sequence[str], n_devices: int) -> None:
        """Refuse arguments that do not fit the models; for whoever knows them before the start.

        Parameters
        ----------
        names : sequence of str
            Of the arrays of a model, in order.
        n_devices : int

        Raises
        ------
        ValueError
        """

    def initial(self, models: Tensor, nodes: Sequence[int]) -> State:
        """Return what is remembered of devices that start with these models.

        Parameters
        ----------
        models : Tensor, shape (n, p)
        nodes : sequence of int
            Their node ids.
        """
        return {"models": models}

    def query(self, state: State) -> Tensor:
        """Return the rows at which the devices work, ``(n, p)``."""
        return state["models"]

    def models(self, state: State) -> Tensor:
        """Return the devices' models, ``(n, p)``."""
        return state["models"]

    @abstractmethod
    def step(self, state: State, work: Tensor, arrivals: Arrivals) -> State:
        """Return the state after a round; nothing given is changed.

        Parameters
        ----------
        state : State
        work : Tensor, shape (n, p)
            The models after local work, or the gradients at `query`, by `mode`. Rows of devices
            that did not reply hold the query, or 0; what becomes of them is undone afterwards.
        arrivals : Arrivals
        """

    def payload_bytes(self, state: State) -> int | None:
        """Return what a device sends to each neighbour; None: its model."""
        return None

    def exchange(self) -> dict[str, Any]:
        """Return more keys of the instructions' record ``exchange``."""
        return {}

    def peers(self, n_devices: int) -> Graph | None:
        """Return who sends to whom in this round, None where the network decides."""
        graph = self.graph_at(self.round - 1)
        if graph is not None:
            _check_nodes(graph, n_devices)
        return graph

    @property
    def needs_peers(self) -> bool:
        """Whether the network must say who a device's neighbours are."""
        return self.graph is None

    def graph_at(self, number: int) -> Graph | None:
        """Return the graph given, as it is in a round counted from 0."""
        if self.graph is None or isinstance(self.graph, nx.Graph):
            return self.graph
        return self.graph(number)

    def without_network(self, n_devices: int) -> Graph:
        """Return who sends to whom in a plain Flower app if `peers` does not say: everybody."""
        graph: Graph = nx.complete_graph(n_devices)
        return graph

    def metrics(self, state: State) -> dict[str, float]:
        """Return what a method reports of a round besides losses and distances."""
        return {}

    # --- what Flower asks for -----------------------------------------------------------------

    @property
    def device_models(self) -> dict[str, Tensor]:
        """Every device's model: name → Tensor ``(n_devices, *shape)``, empty before the start."""
        if self._layout is None:
            return {}
        return self._stacks(self.models(self.state))

    @property
    def columns(self) -> dict[str, slice]:
        """Which columns of a row hold which array; empty before the start."""
        return {} if self._layout is None else self._layout.columns()

    @property
    def rate(self) -> float:
        """The learning rate of this round.

        Raises
        ------
        ValueError
            If neither the strategy nor the train config has one.
        """
        if self._rate is None:
            raise ValueError(
                "learning_rate: give the strategy one, or a train config with 'learning-rate'"
            )
        return self._rate

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Result:
        """Start from `initial_arrays` on every device; see `flwr.serverapp.strategy.Strategy`."""
        self._forget()
        return super().start(grid, initial_arrays, *args, **kwargs)

    def _forget(self) -> None:
        self.round = 0
        self.nodes: list[int] = []
        self.state: State = {}
        self._keys: list[str] = []
        self._others: State = {}  # arrays that are not floating: counters
        self._layout: Layout | None = None
        self._rate = self.learning_rate
        self._graph: Graph | None = None

    def summary(self) -> None:
        """Log the configuration."""
        log(INFO, "\t├──> %s without a server's model", type(self).__name__)
        log(INFO, "\t└──> learning rate: %s", self.learning_rate or "of the train config")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every device that is there to work on its own row and to exchange it."""
        _, online = sample_nodes(grid, self.min_available_nodes, 0)
        self.round = server_round
        self._enrol(online, arrays)
        self._graph = self.peers(len(self.nodes))
        self._read_rate(config)
        rows = self.participants([self.nodes.index(node) for node in sorted(online)])
        records = row_records(self._stacks(self.query(self.state)), rows)
        asked = self._config(config, server_round)
        shared = self._exchange(None)
        exchanges = [shared if self._graph is None else self._exchange(row) for row in rows]
        return [
            Message(
                RecordDict({"arrays": record, "config": asked, "exchange": exchange}),
                dst_node_id=self.nodes[row],
                message_type="train",
            )
            for row, record, exchange in zip(rows, records, exchanges, strict=True)
        ]

    def _read_rate(self, config: ConfigRecord) -> None:
        if self.learning_rate is None:
            rate = config.get("learning-rate")
            self._rate = float(rate) if isinstance(rate, int | float) else None

    def participants(self, rows: list[int]) -> list[int]:
        """Return which of the devices that are there take part in this round."""
        return rows

    def _config(self, config: ConfigRecord, server_round: int) -> ConfigRecord:
        asked = ConfigRecord({**config, "server-round": server_round, "mode": self.mode})
        if self.learning_rate is not None:
            asked["learning-rate"] = float(self.learning_rate)
        if self.local_steps is not None:
            asked.pop("local-epochs", None)
            asked["local-steps"] = self.local_steps
        return asked

    def _exchange(self, row: int | None) -> ConfigRecord:
        record = ConfigRecord({"kind": "neighbours", "when": self.when, **self.exchange()})
        size = self.payload_bytes(self.state)
        if size is not None:
            record["payload_bytes"] = size
        if self._graph is not None and row is not None:
            record["peers"] = [self.nodes[peer] for peer in sorted(self._graph.adj[row])]
        return record

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Do one step of the method; return the mean model and the metrics.

        The metrics are the devices' own, weighted by examples, ``consensus_distance``, the mean of
        ‖x_i - x̄‖², and ``spread``, its root relative to ‖x̄‖.

        Raises
        ------
        ValueError
            If gradients were asked for and a reply has none.
        """
        valid = self._valid(replies)
        if not valid:
            return None, None
        rows = [self.nodes.index(message.metadata.src_node_id) for message in valid]
        work = self._work(valid, rows)
        is_absent = torch.ones(len(self.nodes), dtype=torch.bool, device=work.device)
        is_absent[rows] = False
        state = {key: value.to(work.device) for key, value in self.state.items()}
        stepped = self.step(state, work, self._arrivals(valid, rows))
        if is_absent.any():
            for key, value in stepped.items():
                stepped[key] = torch.where(
                    is_absent.reshape(-1, *[1] * (value.dim() - 1)), state[key], value
                )
        self.state = stepped
        return self._mean(), self._metrics(valid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask a share of the devices to evaluate their own models."""
        n_asked = round(self.fraction_evaluate * len(self.nodes))
        if n_asked == 0:
            return []
        chosen, _ = sample_nodes(grid, 0, min(n_asked, len(list(grid.get_node_ids()))))
        rows = [self.nodes.index(node) for node in sorted(chosen) if node in self.nodes]
        asked = ConfigRecord({**config, "server-round": server_round})
        records = row_records(self.device_models, rows)
        return [
            Message(
                RecordDict({"arrays": record, "config": asked}),
                dst_node_id=self.nodes[row],
                message_type="evaluate",
            )
            for row, record in zip(rows, records, strict=True)
        ]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the devices' metrics, weighted by their examples."""
        valid = self._valid(replies)
        return mean_metrics(valid) if valid else None

    # --- rows and records ---------------------------------------------------------------------

    def _enrol(self, online: Sequence[int], arrays: ArrayRecord) -> None:
        """Give rows to devices that are here for the first time, in ascending order of ids."""
        new = sorted(set(online) - set(self.nodes))
        if not new:
            return
        tensors = tensors_of(arrays)
        self._layout = self._layout or Layout.of(tensors)
        self._keys = self._keys or list(tensors)
        row = self._layout.flatten({key: value[None] for key, value in tensors.items()})
        others = {k: v[None].repeat(len(new), *[1] * v.dim()) for k, v in tensors.items()}
        others = {key: v for key, v in others.items() if not v.is_floating_point()}
        state = self.initial(row.repeat(len(new), 1), new)
        order = np.argsort([*self.nodes, *new]).tolist()
        if self.nodes:
            log(WARNING, "devices %s join with the mean model", new)
            state = {k: torch.cat([v, state[k].to(v.device)])[order] for k, v in self.state.items()}
            others = {k: torch.cat([v, others[k]])[order] for k, v in self._others.items()}
        self.nodes = sorted([*self.nodes, *new])
        self.state, self._others = state, others

    def _valid(self, replies: Iterable[Message]) -> list[Message]:
        """Return the replies with content, one a device."""
        found: dict[int, Message] = {}
        for message in replies:
            if message.has_error():
                log(WARNING, "node %d: %s", message.metadata.src_node_id, message.error.reason)
            elif message.metadata.src_node_id in self.nodes:
                found.setdefault(message.metadata.src_node_id, message)
        return [found[node] for node in sorted(found)]

    def _work(self, valid: Sequence[Message], rows: list[int]) -> Tensor:
        """Return what the devices computed as rows of all devices."""
        assert self._layout is not None
        if self.mode == "gradient":
            for message in valid:
                if "gradients" not in message.content:
                    raise ValueError(
                        f"node {message.metadata.src_node_id} was asked for gradients and replied "
                        f"{list(message.content)}: its app ignores 'mode' in the config"
                    )
        stacks = stack_of(valid)
        values = self._layout.flatten(stacks)
        if self.mode == "local_sgd":
            for key, value in self._others.items():
                if key in stacks:
                    self._others[key] = value.index_copy(
                        0, torch.tensor(rows), stacks[key].to("cpu", value.dtype)
                    )
        if rows == list(range(len(self.nodes))):
            return values
        query = self.query(self.state).to(values.device)
        work = torch.zeros_like(query) if self.mode == "gradient" else query.clone()
        work[rows] = values
        return work

    def _arrivals(self, valid: Sequence[Message], rows: list[int]) -> Arrivals:
        n = len(self.nodes)
        linked = np.zeros((n, n), np.bool_)
        received = np.zeros((n, n), np.bool_)
        plain: Graph | None = None
        for row, message in zip(rows, valid, strict=True):
            delivery = message.content.get("delivery")
            if isinstance(delivery, ConfigRecord):
                linked[rows_in(delivery, "neighbours", self.nodes), row] = True
                received[row, rows_in(delivery, "received_from", self.nodes)] = True
            else:
                plain = plain or self._graph or self.without_network(n)
                receivers = list(plain.adj[row])
                linked[receivers, row] = True
                received[receivers, row] = True
        is_present = np.zeros(n, np.bool_)
        is_present[rows] = True
        received &= is_present[:, None] & is_present[None]
        np.fill_diagonal(received, False)
        np.fill_diagonal(linked, False)
        return Arrivals(linked | received, received)

    def _stacks(self, rows: Tensor) -> dict[str, Tensor]:
        assert self._layout is not None
        stacks = self._layout.views(rows) | self._others
        return {key: stacks[key] for key in self._keys}

    def _mean(self) -> ArrayRecord:
        """Return the mean model, in the types of the devices' models."""
        assert self._layout is not None
        mean = self._layout.views(self.models(self.state).mean(0, keepdim=True))
        arrays = ArrayRecord()
        for key in self._keys:
            if key in mean:
                value = mean[key][0].cpu()
            else:
                counters = self._others[key]
                value = counters.double().mean(0).round().to(counters.dtype)
            arrays[key] = Array(np.asarray(value.numpy()))
        return arrays

    def _metrics(self, valid: Sequence[Message]) -> MetricRecord:
        metrics = mean_metrics(valid)
        models = self.models(self.state)
        mean = models.mean(0)
        distance = float((models - mean).square().sum(1, dtype=torch.float64).mean())
        norm = float(torch.linalg.vector_norm(mean, dtype=torch.float64))
        metrics["consensus_distance"] = distance
        metrics["spread"] = distance**0.5 / norm if norm > 0 else 0.0
        for key, value in self.metrics(self.state).items():
            metrics[key] = value
        return metrics


def _check_nodes(graph: Graph, n_devices: int) -> None:
    wrong = sorted(map(str, set(graph) ^ set(range(n_devices))))
    if wrong:
        raise ValueError(
            f"graph: its nodes must be the devices 0 to {n_devices - 1}; in one and not the other: "
            f"{', '.join(wrong[:5])}"
        )
