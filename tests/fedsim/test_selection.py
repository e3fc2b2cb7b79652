"""Selection by tiers and by utility, on devices whose response times are known."""

import logging

import numpy as np
import pytest

from fedsim.executors.clientapp import device_app
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.session import start
from strategies.linear import FedAvg
from strategies.selection import Oort, TiFL
from tests.fedsim.worlds import LOCAL, digits_trainer, make_world
from tests.plain_grid import PlainGrid, flower_identity

N = 20
SPEED = np.geomspace(10.0, 1000.0, N)[::-1].copy()  # device 0 is the fastest
QUIET = {"fraction_evaluate": 0.0, "fraction_train": 0.2}


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("flwr").setLevel(logging.ERROR)


def run(strategy, rounds, **options):
    world = make_world(N, speed=SPEED, **options)
    rows = []
    outcome = start(
        strategy, world.grid, world.initial(), rounds=rounds, seed=1, evaluate=world.evaluate,
        record=rows.append,
    )  # fmt: skip
    asked = [
        sorted(trip.device for trip in world.grid.trips if trip.round == number)
        for number in range(1, rounds + 1)
    ]
    return asked, rows, outcome, world


def test_tiers_are_of_equal_speed_and_a_round_asks_one():
    strategy = TiFL(tiers=5, **QUIET)
    asked, rows, _, world = run(strategy, 30)
    assert asked[0] == list(range(N))
    seconds = {trip.device: trip.finished for trip in world.grid.trips[:N]}
    order = sorted(seconds, key=seconds.__getitem__)
    for tier in range(5):
        members = {node - 1000 for node, found in strategy.tier_of.items() if found == tier}
        assert members == set(order[4 * tier : 4 * tier + 4])
    for row, devices in zip(rows[1:], asked[1:], strict=True):
        assert {strategy.tier_of[1000 + i] for i in devices} == {row.extra["tier"]}
    assert len({row.extra["tier"] for row in rows[1:]}) == 5


def test_credits_bound_how_often_a_tier_is_drawn():
    asked, rows, _, _ = run(TiFL(tiers=5, credits=3, interval=0, **QUIET), 16)
    drawn = [row.extra["tier"] for row in rows[1:]]
    assert sorted(drawn) == sorted([0, 1, 2, 3, 4] * 3)
    assert len(asked) == 16


def test_tiers_with_higher_losses_become_likelier():
    strategy = TiFL(tiers=2, interval=1, **QUIET)
    strategy.tier_of = {1000: 0, 1001: 1}
    strategy._odds = [0.5, 0.5]
    strategy.losses = {1000: (10.0, 1.0), 1001: (30.0, 3.0)}
    strategy.observe(5, set())
    assert strategy._odds == pytest.approx([0.25, 0.75])


def test_guided_selection_explores_everybody_then_prefers_the_fast_and_useful():
    share = {}
    for penalty in (0.0, 2.0):
        strategy = Oort(seed=3, speed_penalty=penalty, **QUIET)
        asked, rows, _, _ = run(strategy, 50)
        assert {device for devices in asked for device in devices} == set(range(N))
        assert all(len(set(devices)) == 4 for devices in asked)
        assert rows[-1].eval_accuracy > 0.8
        seconds = [strategy.seconds[1000 + device] for device in range(N)]
        late = [device for devices in asked[25:] for device in devices]
        share[penalty] = np.mean([seconds[device] <= np.median(seconds) for device in late])
    assert share[2.0] > 0.6
    assert share[2.0] > share[0.0]


def test_utility_is_loss_times_examples_less_for_the_slow():
    strategy = Oort(speed_penalty=2.0, preferred_quantile=0.5, **QUIET)
    strategy.losses = {1: (10.0, 1.0), 2: (10.0, 2.0), 3: (20.0, 2.0)}
    strategy.seconds = {1: 1.0, 2: 2.0, 3: 4.0}
    strategy._last = {1: 1, 2: 1, 3: 1}
    utility = strategy.utilities(1, [1, 2, 3])
    bonus = np.sqrt(0.1 * np.log(2))
    gains = np.minimum([10.0, 20.0, 40.0], np.quantile([10.0, 20.0, 40.0], 0.95))
    expected = (gains - 10) / (gains[2] - 10) + bonus
    np.testing.assert_allclose(utility, expected * [1, 1, (2 / 4) ** 2])


@pytest.mark.parametrize("make", [TiFL, Oort])
def test_both_need_less_virtual_time_a_round_than_a_random_choice(make):
    _, chosen, _, _ = run(make(**QUIET), 40)
    _, random, _, _ = run(FedAvg(**QUIET), 40)
    spent = chosen[-1].virtual_time - chosen[0].virtual_time
    assert spent < 0.8 * (random[-1].virtual_time - random[0].virtual_time)


@pytest.mark.parametrize("make", [TiFL, Oort])
def test_same_seed_same_choice_and_losses_do_no_harm(make):
    first = run(make(seed=5, **QUIET), 12, loss=0.2)
    again = run(make(seed=5, **QUIET), 12, loss=0.2)
    assert first[0] == again[0]
    assert [row.virtual_time for row in first[1]] == [row.virtual_time for row in again[1]]
    assert np.isfinite(first[1][-1].eval_loss)


@pytest.mark.parametrize("make", [TiFL, Oort])
def test_they_run_in_a_plain_app(make):
    trainer = digits_trainer(N)
    world = make_world(N)
    with flower_identity(1):
        grid = PlainGrid(device_app(trainer, WorkPlan(LOCAL, trainer.data.size)), N)
        result = make(**QUIET).start(grid, world.initial(), num_rounds=4)
    assert len(result.train_metrics_clientapp) == 4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TiFL(tiers=0), "tiers = 0: must be at least 1"),
        (lambda: Oort(exploration=2.0), "exploration = 2.0: must be from 0 to 1"),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
