"""Asynchronous strategies in virtual time: who is at work, what is stale, what is lost."""

import json
import logging

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord

from fedsim import runner
from fedsim.errors import NetworkError
from fedsim.flower.compat import identity
from fedsim.flower.records import stack_records
from fedsim.flower.session import start
from fedsim.learning.config import LocalConfig
from fedsim.scenario import load_scenario
from strategies.asynchronous import DeadlineFedAvg, FedAsync, FedBuff
from tests.fedsim.q8_world import error_of, q8_star
from tests.fedsim.worlds import heterogeneous, make_world
from tests.strategies.peer_worlds import N
from tests.strategies.test_asynchronous import fedbuff_loop


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("flwr").setLevel(logging.ERROR)


def run(strategy, versions, **world):
    """Run on the reference problem; return the model's error and the lines."""
    grid, initial = q8_star(**world)
    rows = []
    outcome = start(strategy, grid, initial, rounds=versions, seed=1, record=rows.append)
    return outcome.arrays, rows, grid


@pytest.mark.parametrize(("versions", "expected"), [(80, 2.895981e-1)])
def test_fedasync_has_the_stated_errors_through_the_network(versions, expected):
    arrays, rows, _ = run(FedAsync(), versions)
    assert error_of(arrays) == pytest.approx(expected, rel=1e-6)
    assert [row.mean_staleness for row in rows] == [i % N for i in range(versions)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "versions", "expected"),
    [(0.6, 400, 3.838809e-1), (0.6, 2000, 3.838860e-1), (0.1, 4000, 7.167676e-2)],
)
def test_fedasync_settles_where_stated(rate, versions, expected):
    arrays, _, _ = run(FedAsync(mixing_rate=rate), versions)
    assert error_of(arrays) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("buffer", [3, 8])
def test_fedbuff_through_the_network_equals_a_plain_loop(buffer):
    arrays, _, _ = run(FedBuff(buffer_size=buffer), 30)
    expected = fedbuff_loop(buffer, 30)
    (array,) = arrays.values()
    np.testing.assert_allclose(array.numpy().ravel(), expected, rtol=0, atol=1e-12)


def test_fedbuff_settles_at_the_fixed_point_of_fedavg():
    arrays, _, _ = run(FedBuff(buffer_size=8, staleness="constant"), 40)
    assert error_of(arrays) == pytest.approx(2.629751e-2, rel=1e-3)


def test_versions_staleness_and_seconds_are_those_of_the_speeds():
    """One device is four times as fast: 1 sample takes 5 steps, at 1 and 4 samples/s."""
    speed = np.full(N, 1.0)
    speed[3] = 4.0
    _, rows, _ = run(FedAsync(), 11, speed=speed)
    # Device 3 replies at 1.25, 2.5, 3.75 and 5, the other seven at 5 as well, first come first:
    # their instructions are older than the one that device 3 got at 3.75.
    assert [row.virtual_time for row in rows] == [1.25, 2.5, 3.75] + [5.0] * 8
    assert [row.mean_staleness for row in rows] == [0, 0, 0, 3, 4, 5, 6, 7, 8, 9, 7]
    seconds = [row.extra["staleness_seconds"] for row in rows]
    assert seconds == [1.25] * 3 + [5.0] * 7 + [1.25]


def test_all_devices_at_work_are_trained_together_whatever_their_versions():
    sizes = []
    speed = np.random.default_rng(1).lognormal(0, 0.1, N)
    _, rows, _ = run(FedAsync(), 80, speed=speed, counter=sizes)
    assert len(rows) == 80
    assert max(row.mean_staleness for row in rows) > 5
    assert sizes[0] == N
    assert len(sizes) < 80 / 4


def test_only_as_many_are_at_work_as_asked():
    grid, initial = q8_star(speed=np.arange(1.0, N + 1))
    strategy = FedBuff(buffer_size=2, concurrency=3, seed=5)
    start(strategy, grid, initial, rounds=20, seed=1)
    at_work = [
        sum(a.pushed <= trip.pushed and not a.finished <= trip.pushed for a in grid.trips)
        for trip in grid.trips
    ]
    assert max(at_work) == 3
    assert len({trip.device for trip in grid.trips}) == N


def test_lost_messages_free_their_slots():
    grid, initial = q8_star(loss=0.3)
    strategy = FedAsync(concurrency=4)
    start(strategy, grid, initial, rounds=60, seed=1)
    lost = [trip for trip in grid.trips if trip.is_lost]
    assert len(lost) > 30
    assert grid.lost_messages == {trip.message_id for trip in lost}
    flights = strategy._flights
    assert flights is not None
    assert len(flights) <= 4
    assert len(grid.trips) == 60 + len(lost) + sum(not trip.finished >= 0 for trip in grid.trips)


def test_a_network_that_loses_everything_ends_with_an_error():
    grid, initial = q8_star(loss=0.999999)
    with pytest.raises(RuntimeError, match=r"in a row have come to nothing; the last: lost"):
        start(FedAsync(), grid, initial, rounds=3, seed=1)


def test_a_deadline_counts_who_is_late_in_the_round_in_which_they_arrive():
    """Work takes 5 s / speed: seven devices need 1 s, one 2.5 s; rounds end at 2 s."""
    speed = np.full(N, 5.0)
    speed[6] = 2.0
    strategy = DeadlineFedAvg(deadline=2.0)
    _, rows, _ = run(strategy, 4, speed=speed)
    # Round 1 ends at its deadline with seven; in round 2 the late one comes at 2.5, the others at
    # 3, so it ends before its deadline; from then on the same again.
    assert [row.virtual_time for row in rows] == [2.0, 3.0, 5.0, 6.0]
    assert [row.extra["updates"] for row in rows] == [7, 8, 7, 8]
    assert [row.extra["max_staleness"] for row in rows] == [0, 1, 0, 1]
    assert [row.mean_staleness for row in rows] == [0, 1 / 8, 0, 1 / 8]


def test_a_round_waits_past_its_deadline_for_the_first_reply():
    _, rows, _ = run(DeadlineFedAvg(deadline=0.25), 2, speed=5.0)
    assert [row.virtual_time for row in rows] == [1.0, 2.0]


def test_late_updates_can_be_dropped():
    speed = np.full(N, 5.0)
    speed[6] = 2.0
    _, rows, _ = run(DeadlineFedAvg(deadline=2.0, max_staleness=0), 4, speed=speed)
    assert [row.extra["updates"] for row in rows] == [7, 7, 7, 7]
    assert [row.extra["updates_dropped"] for row in rows] == [0, 1, 0, 1]


def test_unequal_devices_on_links_that_lose_messages_learn():
    world = make_world(**heterogeneous(), loss=0.1)
    rows = []
    start(
        FedBuff(buffer_size=5, concurrency=10),
        world.grid,
        world.initial(),
        rounds=60,
        seed=1,
        evaluate=world.evaluate,
        record=rows.append,
    )
    assert rows[-1].eval_accuracy > 0.85


def test_pull_hands_over_all_that_arrives_at_one_moment():
    grid, initial = q8_star(speed=[1, 1, 2, 2, 2, 4, 4, 4])
    strategy = FedAsync()
    strategy.begin(initial)
    ids = grid.push_messages(_instructions(strategy, grid))
    arrived = [len(grid.pull_messages(set(ids))) for _ in range(3)]
    assert arrived == [3, 3, 2]
    assert grid.pull_messages(ids) == []
    with pytest.raises(NetworkError, match="no reply can ever come"):
        grid.pull_messages(ids)


def _instructions(strategy, grid):
    with identity():
        return list(strategy.configure_train(1, strategy.arrays, ConfigRecord(), grid))


def test_a_device_that_trains_a_version_again_draws_other_batches():
    world = make_world(4, local=LocalConfig(local_steps=1, batch_size=4, schedule=Halved()))
    strategy = FedBuff(buffer_size=100)
    strategy.begin(world.initial())
    with identity():
        models = []
        for _ in range(2):
            asked = strategy.configure_train(1, strategy.arrays, ConfigRecord(), world.grid)
            replies = world.grid.send_and_receive(asked)
            models.append([stack_records([reply.content["arrays"]]) for reply in replies])
            strategy.aggregate_train(1, replies)
    for first, second in zip(*models, strict=True):
        assert not all(torch.equal(first[key], second[key]) for key in first)
    assert {trip.round for trip in world.grid.trips} == {1}


class Halved:
    def __call__(self, rounds):
        assert set(rounds.tolist()) == {1}
        return np.full(len(rounds), 0.5)


@pytest.mark.slow
def test_bar_10_fedbuff_reaches_its_target_in_far_less_time_than_fedavg(tmp_path):
    """flower.md bar 10: less than 60 % of the virtual time on lognormal speeds."""
    scenario = load_scenario(
        "scenarios/stragglers.yaml", ["stop={accuracy: 0.9}", "record.transfers=false"]
    )
    keep = {name: scenario.strategies[name] for name in ("fedavg", "fedbuff")}
    scenario = scenario.model_copy(update={"strategies": keep})
    result = runner.run(scenario, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["strategies"]
    assert result is not None
    ratio = summary["fedbuff"]["time_to_target"] / summary["fedavg"]["time_to_target"]
    assert ratio < 0.6
    lines = (tmp_path / "out" / "fedbuff" / "rounds.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["round"] for record in records] == list(range(1, len(records) + 1))
    assert all(record["mean_staleness"] is not None for record in records)
    assert all(record["strategy.updates"] == 5 for record in records)
