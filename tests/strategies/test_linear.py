import logging

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from strategies import linear
from strategies.common import stack_of

ARGUMENTS = {"QFedAvg": {"client_learning_rate": 0.1}, "Bulyan": {"num_malicious_nodes": 1}}


@pytest.fixture(autouse=True)
def _identity():
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    logging.getLogger("flwr").setLevel(logging.ERROR)
    yield
    TaskIdentity._run_id = TaskIdentity._node_id = TaskIdentity._task_id = None


class Row(Array):
    """What a simulated grid hands over: an array that says which row of which stack it is."""

    def __init__(self, stack, row):
        super().__init__(stack[row].numpy())
        self.__dict__.update(stack=stack, row=row)


def replies(models, examples=None, losses=None, make=None):
    """Return one train reply per model (a dict of arrays)."""
    messages = []
    for i, model in enumerate(models):
        question = Message(RecordDict(), dst_node_id=1000 + i, message_type="train")
        record = ArrayRecord()
        for key, value in model.items():
            record[key] = make(key, i) if make else Array(np.asarray(value))
        metrics = {
            "num-examples": 1 if examples is None else examples[i],
            "train_loss": 1.0 if losses is None else losses[i],
        }
        content = RecordDict({"arrays": record, "metrics": MetricRecord(metrics)})
        messages.append(Message(content, reply_to=question))
    return messages


def random_models(n=9, seed=0, counters=True):
    rng = np.random.default_rng(seed)
    models = []
    for _ in range(n):
        model = {
            "w": rng.standard_normal((3, 2)).astype(np.float32),
            "scale": np.float32(rng.standard_normal()),
        }
        seen = np.asarray(rng.integers(0, 100))
        models.append(model | ({"seen": seen} if counters else {}))
    return models


def test_fedavg_weighs_by_examples():
    models = [{"w": np.array([1.0, 5.0])}, {"w": np.array([4.0, -1.0])}]
    arrays, metrics = linear.FedAvg().aggregate_train(1, replies(models, [1, 3], [0.4, 0.8]))
    assert arrays["w"].numpy().tolist() == [3.25, 0.5]
    assert metrics["train_loss"] == pytest.approx(0.7)


@pytest.mark.parametrize("n", [1, 4, 9])
def test_median_and_trimmed_mean_equal_hand_sorting(n):
    models = random_models(n)
    sorted_rows = np.sort(np.stack([m["w"] for m in models]), axis=0)
    median, _ = linear.FedMedian().aggregate_train(1, replies(models))
    assert np.allclose(median["w"].numpy(), np.median(sorted_rows, axis=0), atol=1e-7)
    trimmed, _ = linear.FedTrimmedAvg(beta=0.3).aggregate_train(1, replies(models))
    cut = int(0.3 * n)
    assert np.allclose(trimmed["w"].numpy(), sorted_rows[cut : n - cut].mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("name", linear.__all__)
@pytest.mark.parametrize("rows", [None, "stack", "some rows of a stack"])
def test_every_class_equals_flowers_own(name, rows):
    """Same replies, same result to 1e-6, also for 0-d arrays and integer counters."""
    results = []
    for module in (flower, linear):
        strategy = getattr(module, name)(**ARGUMENTS.get(name, {}))
        counters = name != "QFedAvg"  # Flower's own scales in place, which integers refuse
        source = models = random_models(9, counters=counters)
        start = ArrayRecord({k: Array(np.zeros_like(v)) for k, v in models[0].items()})
        strategy.current_arrays = start.copy()
        if name in ("FedAdam", "FedYogi", "FedAdagrad"):
            strategy.current_arrays = {k: a.numpy() for k, a in start.items()}
        make = None
        if rows is not None:
            if rows == "some rows of a stack":
                models = [models[i] for i in (4, 0, 7, 1, 2, 8, 3)]
            order = list(range(len(models))) if rows == "stack" else [4, 0, 7, 1, 2, 8, 3]
            stacks = {k: torch.from_numpy(np.stack([m[k] for m in source])) for k in source[0]}
            make = lambda key, i, s=stacks, o=order: Row(s[key], o[i])  # noqa: E731
        sent = replies(
            models, range(1, len(models) + 1), np.linspace(0.5, 2, len(models)).tolist(), make
        )
        results.append(strategy.aggregate_train(1, sent))
    (theirs, their_metrics), (ours, our_metrics) = results
    assert list(ours) == list(theirs)
    for key in theirs:
        assert ours[key].shape == theirs[key].shape
        assert np.allclose(ours[key].numpy(), theirs[key].numpy(), rtol=1e-6, atol=1e-6)
    assert dict(our_metrics) == pytest.approx(dict(their_metrics))


def test_rows_of_a_stack_are_not_copied_and_replies_not_changed():
    stack = torch.arange(6.0).reshape(3, 2)
    messages = replies([{"w": None}] * 3, make=lambda key, i: Row(stack, i))
    assert stack_of(messages)["w"].data_ptr() == stack.data_ptr()
    linear.FedMedian().aggregate_train(1, messages)
    assert [list(m.content["arrays"]) for m in messages] == [["w"]] * 3
    assert torch.equal(stack, torch.arange(6.0).reshape(3, 2))


def test_rows_that_did_not_reply_do_not_count_even_if_they_are_nan():
    stack = torch.tensor([[1.0], [float("nan")], [3.0]])
    messages = replies([{"w": None}] * 2, make=lambda key, i: Row(stack, 2 * i))
    arrays, _ = linear.FedAvg().aggregate_train(1, messages)
    assert arrays["w"].numpy().tolist() == [2.0]


def test_no_replies_keep_the_model_and_no_examples_are_an_error():
    assert linear.FedAvg().aggregate_train(1, []) == (None, None)
    with pytest.raises(ZeroDivisionError, match="num-examples"):
        linear.FedAvg().aggregate_train(1, replies(random_models(2), [0, 0]))
