"""Devices that do harm, who bears them, and what is told of numbers that are not finite."""

import logging

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import fedsim
from fedsim.errors import ScenarioError
from fedsim.flower.records import FiniteCheck, stacked_record
from fedsim.learning.attacks import Attack, Attacks, choose_attackers
from fedsim.scenario import Scenario
from fedsim.simulation import build
from tests.fedsim.lethal import app as users_app

WORLD = {
    "seed": 4,
    "rounds": 2,
    "data": {"dataset": "digits", "devices": 10},
    "training": {"learning_rate": 0.3, "batch_size": 16},
    "strategies": {"mean": "fedavg"},
}


def scenario(*attacks, **keys):
    return Scenario.from_mapping(WORLD | {"attacks": list(attacks)} | keys)


@pytest.mark.parametrize(
    ("kind", "gradient", "model"),
    [
        ("sign_flip", [-4.0, -6.0], [1 - 2 * 1, 1 - 2 * 2]),
        ("free_rider", [0.0, 0.0], [1.0, 1.0]),
        ("nan", [np.nan, np.nan], [np.nan, np.nan]),
        ("label_flip", [2.0, 3.0], [2.0, 3.0]),
    ],
)
def test_attacks_by_hand(kind, gradient, model):
    attacks = Attacks({3: Attack(kind, 2.0 if kind == "sign_flip" else 1.0)})
    base = torch.ones(2, 2)
    for is_gradient, wanted in ((True, gradient), (False, model)):
        work = torch.tensor([[2.0, 3.0], [2.0, 3.0]])
        attacks.apply(base, work, [1, 3], [1, 1], is_gradient=is_gradient)
        assert work[0].tolist() == [2.0, 3.0]
        np.testing.assert_array_equal(work[1].numpy(), wanted)


def test_noise_is_keyed_by_device_and_round():
    attacks = Attacks(dict.fromkeys(range(3), Attack("noise", 0.5)), seed=1)

    def noise(devices, rounds):
        work = torch.zeros(len(devices), 20_000)
        attacks.apply(work.clone(), work, devices, rounds)
        return work

    together = noise([0, 1, 2], [1, 1, 2])
    assert torch.equal(together[1], noise([1], [1])[0])
    assert not torch.equal(together[1], noise([1], [2])[0])
    assert together.std().item() == pytest.approx(0.5, rel=0.02)
    assert abs(np.corrcoef(together.numpy())[0, 1]) < 0.03


def test_attackers_are_named_or_drawn_and_never_twice():
    entries = [(Attack("nan"), 0.3, None), (Attack("noise"), None, [2, 5])]
    chosen = choose_attackers(entries, 10, seed=1).by_device
    assert [d for d, a in chosen.items() if a.kind == "noise"] == [2, 5]
    assert len(chosen) == 5
    assert choose_attackers(entries, 10, seed=1).by_device == chosen
    assert len({tuple(choose_attackers(entries, 10, seed=i).by_device) for i in range(9)}) > 3


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([{"kind": "nan"}], "give share or devices"),
        ([{"kind": "nan", "share": 0.1, "devices": [1]}], "give share or devices"),
        ([{"kind": "nan", "share": 0.1, "scale": 2.0}], "scale has no meaning for nan"),
        ([{"kind": "nap", "share": 0.1}], "attacks.0.kind"),
        ([{"kind": "nan", "devices": [10]}], "there is no device 10; they are 0 to 9"),
        ([{"kind": "nan", "devices": [1]}] * 2, "attacks.1.devices: device 1 attacks already"),
        ([{"kind": "nan", "share": 0.6}, {"kind": "noise", "share": 0.6}], "only 4 are no attack"),
    ],
)
def test_attacks_that_cannot_be_are_refused(entries, why):
    with pytest.raises(ScenarioError, match=why):
        build(scenario(*entries))


def arrays_of(made, name="mean"):
    return build(made, name).run().arrays


@pytest.mark.parametrize("kind", ["sign_flip", "noise", "free_rider", "label_flip"])
def test_an_attack_is_the_same_for_every_executor(kind):
    attack = {"kind": kind, "share": 0.3}
    here, app, honest = (
        np.concatenate([a.numpy().ravel() for a in arrays_of(made).values()])
        for made in (
            scenario(attack, rounds=1),
            scenario(attack, rounds=1, executor="client_app"),
            scenario(rounds=1),
        )
    )
    assert np.allclose(here, app, rtol=0, atol=1e-6)
    assert not np.allclose(here, honest, atol=1e-3)


def test_only_the_labels_of_attackers_are_flipped():
    made = {name: build(scenario(*attacks)).trainer.data for name, attacks in {
        "honest": (), "attacked": ({"kind": "label_flip", "devices": [3]},),
    }.items()}  # fmt: skip
    honest, attacked = made["honest"], made["attacked"]
    changed = torch.nonzero(honest.y != attacked.y).flatten()
    mine = torch.arange(honest.start[3], honest.start[3] + honest.size[3])
    assert torch.equal(changed, mine)
    assert torch.equal(attacked.y[mine], 9 - honest.y[mine])
    assert torch.equal(honest.y_test, attacked.y_test)


def test_a_free_rider_takes_no_time_and_learns_nothing():
    everybody = scenario({"kind": "free_rider", "share": 1.0}, rounds=1)
    simulation = build(everybody)
    simulation.run()
    assert simulation.env.now == 0
    half = build(scenario({"kind": "free_rider", "devices": [0]}, rounds=1))
    half.run()
    assert half.env.now > 0


def test_attackers_in_a_users_app():
    executor = {
        "kind": "client_app",
        "app": "tests.fedsim.lethal:app",
        "run_config": {"local-epochs": 1},
        "train_config": {"lr": 0.05},
    }
    assert isinstance(users_app, ClientApp)
    keys = {"executor": executor, "model": "tests.fedsim.tutorial_app:Net", "rounds": 1}
    keys["data"] = {"dataset": "digits", "devices": 2}
    rider = {"kind": "free_rider", "share": 1.0}
    simulation = build(scenario(rider, **keys))
    before = simulation.trainer.initial().numpy()
    after = np.concatenate([a.numpy().ravel() for a in simulation.run().arrays.values()])
    assert np.allclose(before, after, rtol=0, atol=1e-7)
    with pytest.raises(ScenarioError, match="label_flip changes the scenario's data"):
        build(scenario({"kind": "label_flip", "share": 0.1}, **keys))


def test_a_nan_is_reported_with_round_and_device_and_ends_the_mean():
    result = fedsim.run(scenario({"kind": "nan", "devices": [6]}))
    summary = result.strategies["mean"].summary
    assert summary["diverged"]
    assert summary["diverged_at"]["round"] == 1
    assert summary["diverged_at"]["device"] == 6
    assert result.strategies["mean"].rounds[0].extra["not_finite_replies"] == 1


def test_a_nan_is_reported_where_a_strategy_bears_it_and_dropped_where_it_says_so(caplog):
    entries = {
        "median": {"kind": "fedmedian"},
        "krum": {"kind": "krum", "num_malicious_nodes": 2},
        "dropped": {"kind": "drop_non_finite", "strategy": "fedavg"},
    }
    bombs = {"kind": "nan", "devices": [3, 6]}
    with caplog.at_level(logging.WARNING):
        result = fedsim.run(scenario(bombs, strategies=entries, rounds=3))
    for name in entries:
        strategy = result.strategies[name]
        assert not strategy.summary["diverged"], name
        assert strategy.summary["final_accuracy"] > 0.5, name
        assert [row.extra["not_finite_replies"] for row in strategy.rounds] == [2] * 3
        assert strategy.rounds[0].extra["first_not_finite_device"] == 3
    said = [record.message for record in caplog.records]
    assert said.count("round 1: device 6 replied with numbers that are not finite") == 3
    assert "round 1: nodes [1003, 1006] reply what is not finite: dropped" in said
    without = arrays_of(scenario(strategies={"mean": "fedavg"}, rounds=1))
    assert all(np.isfinite(array.numpy()).all() for array in without.values())


def test_the_loss_of_who_replied_with_nan_does_not_end_a_run_that_drops_it():
    """The control variate of such a device is NaN, and so is all that it trains afterwards."""
    entries = {"dropped": {"kind": "drop_non_finite", "strategy": "scaffold"}}
    made = scenario({"kind": "nan", "devices": [6]}, strategies=entries, rounds=4)
    result = fedsim.run(made).strategies["dropped"]
    assert not result.summary["diverged"]
    assert len(result.rounds) == 4
    assert all(np.isfinite(row.train_loss) for row in result.rounds)


@pytest.mark.parametrize("kind", ["fedasync", "fedbuff", "deadline_fedavg"])
def test_a_server_that_does_not_wait_drops_nan_by_itself(kind):
    own = {"deadline": "2 s"} if kind == "deadline_fedavg" else {}
    entries = {"plain": {"kind": kind} | own}
    entries["dropping"] = {"kind": kind, "drop_non_finite": True} | own
    made = scenario({"kind": "nan", "devices": [6]}, strategies=entries, rounds=12)
    result = fedsim.run(made).strategies
    assert result["plain"].summary["diverged"]
    assert not result["dropping"].summary["diverged"]
    rows = result["dropping"].rounds
    assert len(rows) == 12
    assert sum(row.extra["updates_dropped"] for row in rows) >= 1


def test_dropping_is_the_mean_of_the_others():
    from fedsim.flower.compat import identity
    from strategies.linear import FedAvg
    from strategies.screening import DropNonFinite

    def reply(value, node):
        arrays = ArrayRecord({"w": Array(np.array([value, 1.0])), "n": Array(np.array([2]))})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=Message(RecordDict(), node, "train"))

    with identity():
        strategy = DropNonFinite(FedAvg())
        arrays, metrics = strategy.aggregate_train(
            1, [reply(1.0, 5), reply(np.inf, 6), reply(3.0, 7)]
        )
        assert arrays["w"].numpy().tolist() == [2.0, 1.0]
        assert metrics["dropped_replies"] == 1
        assert strategy.aggregate_train(1, [reply(np.nan, 5)])[0] is None


def test_the_finite_check_finds_exactly_the_bad_rows():
    rows = torch.randn(6, 3, 4)
    rows[2, 1, 1], rows[4, 0, 0] = torch.inf, torch.nan
    rows[5] = 3e38  # its sum overflows, its numbers are finite
    stacks = {"w": rows, "n": torch.ones(6, dtype=torch.int64), "s": torch.arange(6.0)}
    check = FiniteCheck()
    assert [check(stacked_record(stacks, i)) for i in range(6)] == [
        True, True, False, True, False, True,
    ]  # fmt: skip
    assert not check(ArrayRecord({"w": Array(np.array([1.0, np.nan], np.float32))}))


def test_robust_rules_bear_what_the_mean_does_not_under_loss_and_stragglers():
    entries = {
        "mean": {"kind": "fedavg"},
        "krum": {"kind": "multikrum", "num_malicious_nodes": 2, "num_nodes_to_select": 5},
        "median": {"kind": "fedmedian"},
        "trimmed": {"kind": "fedtrimmedavg", "beta": 0.25},
        "bulyan": {"kind": "bulyan", "num_malicious_nodes": 1},
    }
    result = fedsim.run(
        scenario(
            {"kind": "sign_flip", "share": 0.2, "scale": 5.0},
            strategies=entries,
            rounds=6,
            network={"message_loss": 0.03},
            devices={"speed": {"kind": "lognormal", "median": "500 samples/s", "sigma": 0.8}},
            round_timeout="1 s",
        )
    )
    final = {name: s.summary["final_accuracy"] for name, s in result.strategies.items()}
    assert sum(row.messages_lost for row in result.strategies["mean"].rounds) > 0
    assert min(row.devices_replied for row in result.strategies["mean"].rounds) < 9
    assert final["mean"] < 0.5
    assert min(final[name] for name in ("krum", "median", "trimmed")) > 0.7, final
