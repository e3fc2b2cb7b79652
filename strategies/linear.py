"""Linear averaging and the methods around it: Flower's own classes on stacked rows.

Each class is Flower's, with one thing changed: where the replies of a round are rows of one
stacked tensor, the weighted mean is a single ``w @ X`` instead of a loop over devices and arrays.
`FedAvg` is placed under Flower's classes by method resolution order, so that their own
``super().aggregate_train`` reaches it. Results equal Flower's to rounding.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from strategies.common import mean_of, row_records, stack_of
from strategies.compat import aggregate_metricrecords, validate_message_reply_consistency

__all__ = [
    "Bulyan",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedMedian",
    "FedProx",
    "FedTrimmedAvg",
    "FedYogi",
    "Krum",
    "MultiKrum",
    "QFedAvg",
]

Aggregate = tuple[ArrayRecord | None, MetricRecord | None]


class FedAvg(flower.FedAvg):
    """Federated averaging: the mean of the devices' models weighted by their examples.

    References
    ----------
    .. [1] McMahan et al., "Communication-efficient learning of deep networks from decentralized
       data", AISTATS 2017, Algorithm 1.
    """

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Return the weighted mean of the models and of the metrics.

        Raises
        ------
        ZeroDivisionError
            If no reply has any examples (Flower's own behaviour).
        """
        return _aggregate(self, replies, mean_of)


class FedProx(flower.FedProx, FedAvg):
    """FedAvg whose devices are pulled towards the global model (``proximal_mu``)."""


class FedAvgM(flower.FedAvgM, FedAvg):
    """FedAvg with momentum at the server."""


class FedAdam(flower.FedAdam, FedAvg):
    """Adam at the server on the averaged update."""


class FedYogi(flower.FedYogi, FedAvg):
    """Yogi at the server on the averaged update."""


class FedAdagrad(flower.FedAdagrad, FedAvg):
    """Adagrad at the server on the averaged update."""


class FedMedian(flower.FedMedian, FedAvg):
    """Coordinate-wise median of the devices' models."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Return the median of the models and the weighted mean of the metrics."""
        return _aggregate(self, replies, lambda valid, _: _median(valid))


class FedTrimmedAvg(flower.FedTrimmedAvg, FedAvg):
    """Coordinate-wise mean without the share `beta` at either end."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Return the trimmed mean of the models and the weighted mean of the metrics."""
        return _aggregate(self, replies, lambda valid, _: _trimmed_mean(valid, self.beta))


class QFedAvg(flower.QFedAvg, FedAvg):
    """Fair averaging: devices with a higher loss weigh more (`q`)."""


class MultiKrum(flower.MultiKrum, FedAvg):
    """Mean of the models closest to their neighbours; tolerates `num_malicious_nodes`."""


class Krum(flower.Krum, MultiKrum):
    """The one model closest to its neighbours; tolerates `num_malicious_nodes`."""


class Bulyan(flower.Bulyan, FedAvg):
    """Krum selection, then the mean around the median; tolerates `num_malicious_nodes`."""


def _aggregate(
    strategy: flower.FedAvg,
    replies: Iterable[Message],
    combine: Callable[[Sequence[Message], torch.Tensor], dict[str, torch.Tensor]],
) -> Aggregate:
    """Combine the models with ``combine(replies, weights)``; average the metrics."""
    valid, weights = accepted(strategy, replies)
    if not valid:
        return None, None
    return model_record(combine(valid, weights)), metrics_of(strategy, valid)


def accepted(
    strategy: flower.FedAvg, replies: Iterable[Message]
) -> tuple[list[Message], torch.Tensor]:
    """Return the replies without errors, and their weights by examples, which sum to 1.

    Raises
    ------
    InconsistentMessageReplies
        As `FedAvg` does.
    ZeroDivisionError
        If no reply has any examples.
    """
    valid, _ = strategy._check_and_log_replies(replies, is_train=True, validate=False)
    if not valid:
        return [], torch.empty(0, dtype=torch.float64)
    contents = [message.content for message in valid]
    _validate(contents, strategy.weighted_by_key)
    metrics = [_metrics(content) for content in contents]
    examples = [float(record[strategy.weighted_by_key]) for record in metrics]  # type: ignore[arg-type]
    weights = torch.tensor(examples, dtype=torch.float64)
    if not weights.any():
        raise ZeroDivisionError(f"every reply's {strategy.weighted_by_key!r} is 0")
    return valid, weights / weights.sum()


def metrics_of(strategy: flower.FedAvg, valid: Sequence[Message]) -> MetricRecord:
    """Return the metrics of replies, aggregated as the strategy says."""
    contents = [message.content for message in valid]
    if strategy.train_metrics_aggr_fn is aggregate_metricrecords:
        return _mean_metrics([_metrics(content) for content in contents], strategy.weighted_by_key)
    return strategy.train_metrics_aggr_fn(contents, strategy.weighted_by_key)


def model_record(model: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Return a model as a record over its tensors, serialised only if bytes are read."""
    (record,) = row_records({key: value.unsqueeze(0) for key, value in model.items()}, [0])
    return record


def _mean_metrics(records: Sequence[MetricRecord], weighted_by_key: str) -> MetricRecord:
    """Return what Flower's default does, the weighted mean of each metric, in one product."""
    weights = np.array([record[weighted_by_key] for record in records], np.float64)
    weights /= weights.sum()
    means = MetricRecord()
    for key in records[0]:
        if key != weighted_by_key:
            mean = weights @ np.array([record[key] for record in records], np.float64)
            means[key] = mean.tolist()
    return means


def _validate(contents: Sequence[RecordDict], weighted_by_key: str) -> None:
    """Check the replies as Flower does, whose views of each reply are slow.

    Where all replies have the records and keys of the first, what holds for it holds for all.

    Raises
    ------
    InconsistentMessageReplies
        As `FedAvg` does.
    """
    first = _structure(contents[0])
    is_uniform = all(_structure(content) == first for content in contents[1:])
    validate_message_reply_consistency(
        list(contents[:1] if is_uniform else contents), weighted_by_key, check_arrayrecord=True
    )


def _structure(content: RecordDict) -> list[tuple[str, type, tuple[str, ...]]]:
    """Return the names, types and keys of the arrays and metrics in a reply."""
    records = content.items()
    return [(n, type(r), tuple(r.keys())) for n, r in records if not isinstance(r, ConfigRecord)]


def _metrics(content: RecordDict) -> MetricRecord:
    return next(r for r in content.values() if isinstance(r, MetricRecord))


def _trimmed_mean(replies: Sequence[Message], share: float) -> dict[str, torch.Tensor]:
    """Return the mean of each coordinate without `share` of the values at either end."""
    means = {}
    for key, rows in stack_of(replies).items():
        cut = int(share * len(rows))
        kept = rows.sort(dim=0).values[cut : len(rows) - cut]
        means[key] = kept.mean(dim=0, dtype=_mean_dtype(rows))
    return means


def _median(replies: Sequence[Message]) -> dict[str, torch.Tensor]:
    """Return the median of each coordinate; of an even number the mean of the middle two."""
    medians = {}
    for key, rows in stack_of(replies).items():
        middle = rows.sort(dim=0).values[(len(rows) - 1) // 2 : len(rows) // 2 + 1]
        medians[key] = middle.mean(dim=0, dtype=_mean_dtype(rows))
    return medians


def _mean_dtype(rows: torch.Tensor) -> torch.dtype:
    return rows.dtype if rows.is_floating_point() else torch.float64
