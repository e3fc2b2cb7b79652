"""Hierarchical federated averaging: devices, edge servers, and a cloud over them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from strategies.common import check, mean_of, show_arguments, tensor_of
from strategies.linear import Aggregate, FedAvg, accepted, metrics_of, model_record

__all__ = ["HierarchicalFedAvg"]

Tensors = dict[str, Tensor]


class HierarchicalFedAvg(FedAvg):
    """HierFAVG: edge servers average their devices often, the cloud averages them now and then.

    A round is κ_1 local steps (or epochs) of the devices and an average at each edge server; every
    κ_2 rounds the cloud averages the edge servers' models and gives them the result. Both means
    weigh by examples. With κ_2 = 1, or one edge server, this is FedAvg.

    On a simulated network the edge server of a device is the first node on its way to the server
    (``topology: {kind: tree, …}``). Payloads travel between devices and edge servers in every
    round, and one for each edge server and direction between it and the cloud when the cloud
    averages: down before the round in which the edge servers begin with a new cloud model, up after
    the one that ends with it. In a plain Flower app, which has no edge servers, `edges` says how
    many to imagine. The models of the edge servers are kept here, wherever that is.

    Parameters
    ----------
    cloud_period : int
        κ_2, rounds between two averages of the cloud.
    edges : int, optional
        Edge servers where the network does not tell: devices in ascending order of node ids are
        spread evenly and in order, as in `topologies.tree`.
    **kwargs
        Flower's `FedAvg`. κ_1 is the local work of the train config.

    Attributes
    ----------
    edge_models : dict of (dict of Tensor)
        Edge server → its model.

    References
    ----------
    .. [1] Liu, Zhang, Song, Letaief, "Client-edge-cloud hierarchical federated learning", ICC
       2020, Algorithm 1.
    """

    needs_edges: ClassVar[bool] = True

    def __init__(self, *, cloud_period: int = 5, edges: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check(cloud_period >= 1, "cloud_period", cloud_period, "at least 1")
        check(edges is None or edges >= 1, "edges", edges, "at least 1")
        self.cloud_period = cloud_period
        self.edges = edges
        self._forget()

    def _forget(self) -> None:
        self.edge_models: dict[int, Tensors] = {}
        self._edge_of: dict[int, int] = {}  # node → edge server
        self._heard: dict[int, float] = {}  # node → examples, since the cloud last averaged
        self._cloud: Tensors = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each device the model of its edge server."""
        if server_round == 1:
            self._forget()
            self._cloud = {key: tensor_of(array) for key, array in arrays.items()}
            self._nodes = sorted(grid.get_node_ids())
        exchange = ConfigRecord({"kind": "server", "server": "edge"})
        exchange["backhaul"] = self._backhaul(server_round)
        asked = ConfigRecord({**config, "server-round": server_round})
        contents: dict[int | None, RecordDict] = {}
        for message in super().configure_train(server_round, arrays, asked, grid):
            edge = self._edge_of.get(message.metadata.dst_node_id)
            if edge not in contents:
                model = self._cloud if edge is None else self.edge_models.get(edge, self._cloud)
                records: dict[str, Any] = {
                    self.arrayrecord_key: model_record(model),
                    self.configrecord_key: asked,
                    "exchange": exchange,
                }
                contents[edge] = RecordDict(records)
            message.content = contents[edge]
            yield message

    def _backhaul(self, server_round: int) -> str:
        """Return what travels between cloud and edge servers in a round."""
        begins = (server_round - 1) % self.cloud_period == 0
        ends = server_round % self.cloud_period == 0
        return {(True, True): "both", (True, False): "down", (False, True): "up"}.get(
            (begins, ends), "none"
        )

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Average at the edge servers, and in the cloud if it is time; return the mean of all.

        Raises
        ------
        ValueError
            If neither the network nor `edges` says which edge server a device belongs to.
        """
        valid, shares = accepted(self, replies)
        if not valid:
            return None, None
        groups: dict[int, list[int]] = {}
        for i, message in enumerate(valid):
            groups.setdefault(self._edge(message), []).append(i)
        for edge, members in sorted(groups.items()):
            weights = shares[members]
            self.edge_models[edge] = mean_of([valid[i] for i in members], weights / weights.sum())
        for message in valid:
            metrics = next(r for r in message.content.values() if isinstance(r, MetricRecord))
            self._heard[message.metadata.src_node_id] = float(metrics[self.weighted_by_key])  # type: ignore[arg-type]
        mean = self._mean_of_edges()
        if server_round % self.cloud_period == 0:
            self._cloud, self._heard = mean, {}
            self.edge_models = dict.fromkeys(self.edge_models, mean)
        return model_record(mean), metrics_of(self, valid)

    def _edge(self, message: Message) -> int:
        """Return the edge server that served a device."""
        node = message.metadata.src_node_id
        delivery = message.content.get("delivery")
        if isinstance(delivery, ConfigRecord) and "server" in delivery:
            self._edge_of[node] = int(delivery["server"])  # type: ignore[arg-type]
        elif node not in self._edge_of:
            if self.edges is None:
                raise ValueError(
                    "edges: no network tells which edge server a device belongs to; say how many "
                    "there are"
                )
            rank = int(np.searchsorted(self._nodes, node))
            self._edge_of[node] = min(rank, len(self._nodes) - 1) * self.edges // len(self._nodes)
        return self._edge_of[node]

    def _mean_of_edges(self) -> Tensors:
        """Return the edge servers' models weighted by the examples they have heard of."""
        examples = dict.fromkeys(self.edge_models, 0.0)
        for node, count in self._heard.items():
            examples[self._edge_of[node]] += count
        models = [self.edge_models[edge] for edge, count in examples.items() if count > 0]
        weights = torch.tensor([x for x in examples.values() if x > 0], dtype=torch.float64)
        return _weighted(models, weights / weights.sum())


show_arguments(HierarchicalFedAvg)


def _weighted(models: Sequence[Mapping[str, Tensor]], weights: Tensor) -> Tensors:
    means = {}
    for key in models[0]:
        rows = torch.stack([model[key] for model in models])
        rows = rows if rows.is_floating_point() else rows.double()
        means[key] = torch.tensordot(weights.to(rows), rows, dims=1)
    return means
