import gc
import logging
import random

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Bulyan, FedAvg, QFedAvg, strategy_utils
from flwr.supercore.task_identity import TaskIdentity

from fedsim.flower.session import Evaluation, StopRule, session, start
from tests.fedsim.worlds import heterogeneous, make_world


def global_state():
    return (
        random.getstate(),
        str(np.random.get_state()),  # noqa: NPY002
        vars(strategy_utils)["sleep"],
        TaskIdentity._run_id,
        TaskIdentity._node_id,
        TaskIdentity._task_id,
        logging.getLogger("flwr").level,
        gc.get_freeze_count() > 0,
    )


def run(rounds=5, seed=9, strategy=None, rows=None, **options):
    world = make_world(loss=0.05, **(heterogeneous() | options))
    outcome = start(
        strategy or FedAvg(fraction_train=0.5, fraction_evaluate=0.0),
        world.grid,
        world.initial(),
        rounds=rounds,
        seed=seed,
        timeout=60.0,
        evaluate=world.evaluate,
        record=(lambda row: None) if rows is None else rows.append,
    )
    return world, outcome


def test_bar_2_two_runs_with_one_seed_are_identical():
    (first, one), (second, two) = run(), run()
    for key in one.arrays:
        assert np.array_equal(one.arrays[key].numpy(), two.arrays[key].numpy())
    fields = list(type(first.grid.trips[0]).__slots__)
    trips = [[[getattr(t, f) for f in fields] for t in w.grid.trips] for w in (first, second)]
    assert repr(trips[0]) == repr(trips[1])
    other, _ = run(seed=10)
    assert [t.device for t in other.grid.trips] != [t.device for t in first.grid.trips]


class Broken(FedAvg):
    def aggregate_train(self, server_round, replies):
        raise RuntimeError("broken strategy")


def test_bar_2_everything_global_is_put_back_also_after_an_error():
    before = global_state()
    run(rounds=1)
    assert global_state() == before
    with pytest.raises(RuntimeError, match="broken strategy"):
        run(strategy=Broken())
    assert global_state() == before


def test_an_identity_that_is_set_is_left_alone():
    world = make_world(2)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 8, 9
    try:
        with session(world.grid, 1):
            assert Message(RecordDict(), 1000, "train").metadata.run_id == 7
        assert TaskIdentity.run_id == 7
    finally:
        TaskIdentity._run_id = TaskIdentity._node_id = TaskIdentity._task_id = None


@pytest.mark.parametrize(
    "strategy", [QFedAvg(client_learning_rate=0.1), Bulyan(num_malicious_nodes=1)]
)
def test_bar_5_no_full_collection_per_reply(strategy):
    """50 rounds of 20 replies: one collection a round at most, and over next to nothing."""
    world = make_world()
    collected = []

    def note(phase, info):
        if phase == "stop" and info["generation"] == 2:
            collected.append(len(gc.get_objects(2)))

    gc.unfreeze()
    gc.callbacks.append(note)
    try:
        start(strategy, world.grid, world.initial(), rounds=50, seed=1)
    finally:
        gc.callbacks.remove(note)
        gc.freeze()
    assert len(collected) <= 50 + 2
    assert max(collected[1:], default=0) < collected[0] / 10  # the first is ours, before the freeze


def test_lines_follow_the_rounds():
    rows = []
    world, outcome = run(rounds=4, rows=rows)
    assert [row.round for row in rows] == [1, 2, 3, 4]
    assert outcome.rounds == 4
    times = [row.virtual_time for row in rows]
    assert times == sorted(times)
    assert times[-1] == world.grid.now
    assert all(row.devices_selected == 10 for row in rows)
    assert all(row.devices_replied <= 10 for row in rows)
    assert sum(row.messages_sent for row in rows) == sum(
        2 if t.outcome in ("ok", "lost-up") else 1 for t in world.grid.trips if t.pushed < times[-1]
    )
    assert rows[-1].train_loss < rows[0].train_loss
    assert rows[-1].accuracy_std is None


def test_evaluation_on_devices_is_taken_from_their_replies():
    rows = []
    world = make_world(latency=0.1)
    start(FedAvg(), world.grid, world.initial(), rounds=2, seed=1, record=rows.append)
    assert 0.5 < rows[-1].eval_accuracy <= 1
    assert rows[-1].accuracy_std > 0
    assert rows[-1].eval_loss < rows[0].eval_loss
    assert rows[0].messages_sent == 80


def test_evaluation_every_third_round_and_at_the_last():
    world = make_world()
    rows = []
    start(
        FedAvg(fraction_evaluate=0.0), world.grid, world.initial(), rounds=7, seed=1,
        evaluate=world.evaluate, evaluate_every=3, record=rows.append,
    )  # fmt: skip
    assert [row.round for row in rows if row.eval_accuracy is not None] == [3, 6, 7]


@pytest.mark.parametrize(
    ("stop", "reason", "rounds"),
    [
        (StopRule(accuracy=0.5), "accuracy", None),
        (StopRule(time=3.5), "time", 4),
        (StopRule(traffic=100_000), "traffic", 1),
        (StopRule(accuracy=2.0), None, 6),
    ],
)
def test_a_run_stops_at_the_first_rule_that_holds(stop, reason, rounds):
    world = make_world(latency=0.5, speed=1e12)
    rows = []
    outcome = start(
        FedAvg(fraction_evaluate=0.0), world.grid, world.initial(), rounds=6, seed=1,
        evaluate=world.evaluate, stop=stop, record=rows.append,
    )  # fmt: skip
    assert outcome.stopped_by == reason
    assert outcome.rounds == len(rows) == (rounds or len(rows))
    assert world.evaluate(outcome.arrays).accuracy == rows[-1].eval_accuracy


def test_divergence_ends_the_run_and_names_round_and_device():
    world = make_world()
    world.evaluate(world.initial())
    rows = []
    outcome = start(
        FedAvg(fraction_evaluate=0.0), world.grid, world.initial(), rounds=5, seed=1,
        evaluate=lambda arrays: Evaluation(float("nan"), 0.1), record=rows.append,
    )  # fmt: skip
    assert outcome.diverged
    assert len(rows) == 1
    assert rows[0].eval_loss is None


def test_a_huge_learning_rate_is_divergence():
    world = make_world()
    strategy = FedAvg(fraction_evaluate=0.0)
    outcome = start(
        strategy, world.grid, world.initial(), rounds=5, seed=1,
        evaluate=world.evaluate, train_config=ConfigRecord({"learning-rate": 1e6}),
    )  # fmt: skip
    assert outcome.diverged
    assert outcome.diverged_device is not None
    assert outcome.rounds == 1


class NeverEvaluates(FedAvg):
    """A strategy with a `start` of its own, in which `evaluate_fn` does not occur."""

    def start(self, grid, initial_arrays, num_rounds=3, timeout=None, **kwargs):
        arrays = initial_arrays
        for server_round in range(1, num_rounds + 1):
            sent = self.configure_train(server_round, arrays, ConfigRecord(), grid)
            arrays, _ = self.aggregate_train(server_round, grid.send_and_receive(sent))
        from flwr.serverapp.strategy import Result

        return Result(arrays=arrays)


def test_a_start_that_never_evaluates_gets_a_line_per_batch():
    world = make_world(latency=0.5, speed=1e12)
    rows = []
    outcome = start(
        NeverEvaluates(), world.grid, world.initial(), rounds=3, seed=1,
        evaluate=world.evaluate, record=rows.append,
    )  # fmt: skip
    assert [row.round for row in rows] == [1, 2, 3]
    assert [row.virtual_time for row in rows] == pytest.approx([1, 2, 3])
    assert [row.devices_replied for row in rows] == [20, 20, 20]
    assert world.evaluate(outcome.arrays).accuracy > 0.5


def test_metrics_given_to_the_strategy_are_plain():
    world = make_world()
    seen = []

    class Watching(FedAvg):
        def start(self, *args, **kwargs):
            result = super().start(*args, **kwargs)
            seen.append(result.evaluate_metrics_serverapp)
            return result

    start(
        Watching(fraction_evaluate=0.0), world.grid, world.initial(), rounds=1, seed=1,
        evaluate=world.evaluate,
    )  # fmt: skip
    assert set(seen[0]) == {0, 1}
    assert isinstance(seen[0][1], MetricRecord)
    assert seen[0][1]["eval_accuracy"] > 0.3
