"""Compression round strategies that know nothing of it."""

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from torch import nn

from fedsim.learning.config import LocalConfig
from fedsim.learning.models import linear_regression
from strategies import linear
from strategies.choco import ChocoSGD
from strategies.compressed import Compressed
from strategies.compression import COMPRESSORS
from strategies.gossip import DPSGD
from strategies.mcm import CompressedSGD
from tests.strategies.least_squares_worlds import N, make_world

LOCAL = LocalConfig(local_epochs=2, batch_size=4, learning_rate=0.02)
SPECS = {name: {"kind": name} for name in COMPRESSORS}
SPECS |= {name: {"kind": name, "k": 3} for name in ("top_k", "random_k")}
DENSE = 6 * 8


def quiet(strategy):
    strategy.fraction_evaluate = 0.0
    return strategy


def fedavg(**options):
    return quiet(linear.FedAvg(min_available_nodes=N, **options))


def run(strategy, rounds=6, **world):
    made = make_world(strategy, local=LOCAL, **world)
    return made.run(rounds), made


def sent(world, way):
    return np.array([getattr(t, f"bytes_{way}") for t in world.trips()]).reshape(-1, N)


def test_identity_changes_nothing_bit_for_bit():
    plain, _ = run(fedavg())
    wrapped, world = run(Compressed(fedavg(), up="identity", down="identity"))
    assert np.array_equal(plain, wrapped)
    assert (sent(world, "up") == DENSE).all()


@pytest.mark.parametrize("name", sorted(SPECS))
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_grid_and_plain_app_give_the_same_models(name, fraction):
    def strategy():
        inner = fedavg(fraction_train=fraction)
        return Compressed(inner, up=SPECS[name], down=SPECS[name], seed=3)

    vectorised, _ = run(strategy())
    plain, _ = run(strategy(), executor="plain")
    assert np.abs(vectorised - plain).max() <= 1e-12 * np.abs(vectorised).max()
    if name != "identity":
        assert np.abs(vectorised - run(fedavg(fraction_train=fraction))[0]).max() > 1e-9


def test_messages_weigh_their_real_encoding_on_links_and_in_the_records():
    strategy = Compressed(fedavg(), up={"kind": "quantise", "levels": 2}, down="sign")
    made = make_world(strategy, local=LOCAL)
    up, down = [], []
    encoded, decoded = strategy._encoded, strategy._decoded

    def weigh(message):
        records = message.content.array_records.values()
        return sum(a.numpy().nbytes for record in records for a in record.values())

    def down_too(k, messages):
        found = encoded(k, messages)
        down.append([weigh(m) for m in found])
        return found

    def up_too(replies):
        replies = list(replies)
        up.append([weigh(m) for m in replies])
        return decoded(replies)

    strategy._encoded, strategy._decoded = down_too, up_too
    made.run(5)
    assert np.array_equal(sent(made, "up"), up)
    assert np.array_equal(sent(made, "down"), down)
    assert (np.array(down)[0] == DENSE).all()
    assert np.array(down)[1:].max() == 4 + 1  # the mean magnitude and six signs
    assert np.array(up).max() < DENSE
    traffic = made.grid.take_traffic()
    assert (traffic.bytes_up, traffic.bytes_down) == (np.sum(up), np.sum(down))


@pytest.mark.parametrize(
    ("up", "down"),
    [
        ({"kind": "quantise", "levels": 8}, {"kind": "quantise", "levels": 8}),
        (SPECS["top_k"], SPECS["top_k"]),
        ("sign", None),
        (None, "natural"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_compressed_averaging_learns_what_averaging_learns(up, down):
    plain, _ = run(fedavg(), 40)
    found, _ = run(Compressed(fedavg(), up=up, down=down), 40)
    before = np.abs(found[0] - plain[-1]).max()
    assert np.abs(found[-5:].mean(0) - plain[-1]).max() < 0.25 * before


def test_a_cast_halves_the_bytes_and_hardly_moves_the_model():
    plain, _ = run(fedavg())
    half, world = run(Compressed(fedavg(), up={"kind": "cast", "dtype": "bfloat16"}))
    assert (sent(world, "up") == 6 * 2).all()
    assert (sent(world, "down") == DENSE).all()
    assert np.abs(half - plain).max() < 0.02


@pytest.mark.parametrize("name", ["FedAdam", "FedMedian", "QFedAvg", "Krum", "FedProx", "FedAvgM"])
def test_any_of_flowers_strategies_may_be_wrapped(name):
    arguments = {
        "Krum": {"num_malicious_nodes": 1},
        "QFedAvg": {"client_learning_rate": 0.02},
        "FedProx": {"proximal_mu": 0.1},
    }
    inner = quiet(getattr(linear, name)(min_available_nodes=N, **arguments.get(name, {})))
    found, world = run(Compressed(inner, up="quantise", down={"kind": "cast", "dtype": "float32"}))
    assert np.isfinite(found).all()
    assert (sent(world, "down") == 6 * 4).all()
    assert np.abs(np.diff(found, axis=0)).max() > 0


def test_privacy_wrappers_see_decoded_models():
    inner = DifferentialPrivacyServerSideFixedClipping(
        fedavg(), noise_multiplier=1e-9, clipping_norm=100.0, num_sampled_clients=N
    )
    found, _ = run(Compressed(inner, up="natural", seed=1))
    assert np.abs(found - run(Compressed(fedavg(), up="natural", seed=1))[0]).max() < 1e-6


def test_gossip_sends_compressed_models_and_keeps_its_mean_model():
    spec = {"kind": "cast", "dtype": "bfloat16"}
    inner = DPSGD(order="adapt_then_combine", fraction_evaluate=0.0)
    found, _ = run(Compressed(inner, up=spec), executor="plain")
    plain, _ = run(DPSGD(order="adapt_then_combine", fraction_evaluate=0.0), executor="plain")
    assert 0 < np.abs(found - plain).max() < 0.05


@pytest.mark.parametrize("executor", ["vectorised", "client_app"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_references_and_errors_stay_equal_under_loss_and_delay(executor, seed):
    """Whatever a device is told to refer to, it has, and it is what the server has."""
    rng = np.random.default_rng(seed)
    up = {"kind": "top_k", "k": 2}
    strategy = Compressed(fedavg(min_train_nodes=1), up=up, down="quantise", seed=seed)
    world = make_world(
        strategy,
        local=LOCAL,
        executor=executor,
        up=rng.uniform(2e3, 5e4, N),
        down=rng.uniform(2e3, 5e4, N),
        latency=rng.uniform(0, 0.02, N),
        loss=0.3,
        seed=seed,
    )
    n_compared = 0

    def check(k):
        nonlocal n_compared
        for node, number in strategy._held.items():
            state = world.state(node - 1000, "compression")
            which = state["reference_number"].flatten().tolist().index(number)
            mine = state[["reference", "reference_before"][which]].flatten()
            assert torch.equal(mine, strategy._references[number][0])
            assert strategy._versions[node] in state["error_number"]
            n_compared += 1

    world.run(15, timeout=0.08, observe=check)
    assert n_compared > 15
    assert len(strategy._references) <= N
    assert np.isfinite(world.models[-1]).all()


def test_a_device_that_was_away_gets_one_message_against_its_own_reference():
    strategy = Compressed(fedavg(fraction_train=0.5, min_train_nodes=2), down="sign")
    world = make_world(strategy, local=LOCAL)
    world.run(20)
    seen, expected = set(), []
    for trip in world.trips():
        expected.append(DENSE if trip.device not in seen else 5)
        seen.add(trip.device)
    assert [trip.bytes_down for trip in world.trips()] == expected


def test_counters_and_several_tensors_pass_through():
    def model():
        return nn.Sequential(nn.BatchNorm1d(6), linear_regression((6,), 0)).double()

    def strategy():
        spec = {"kind": "quantise", "levels": 4, "block": 5}
        return Compressed(fedavg(), up=spec, down=spec)

    found, world = run(strategy(), 3, model=model())
    assert np.allclose(found, run(strategy(), 3, model=model(), executor="plain")[0], atol=1e-12)
    counters = [i for i, name in enumerate(world.trainer.layout.names) if "tracked" in name]
    assert counters
    assert found[-1][24] > found[0][24] > 0


@pytest.mark.parametrize(
    ("inner", "options", "said"),
    [
        (fedavg, {}, "give up, down or both"),
        (fedavg, {"up": "zip"}, "'zip' is not one of"),
        (fedavg, {"up": {"kind": "quantise", "levels": 0}}, "levels is 0"),
        (fedavg, {"down": "sign", "down_rate": 2.0}, "down_rate is 2.0"),
        (CompressedSGD, {"up": "sign"}, "CompressedSGD compresses its messages itself"),
        (ChocoSGD, {"up": "sign"}, "ChocoSGD compresses its messages itself"),
        (DPSGD, {"up": "natural"}, "adapt_then_combine"),
        (DPSGD, {"up": "sign"}, "errors cannot be fed back"),
        (DPSGD, {"down": "natural"}, "give up alone"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_cannot_be_wrapped_is_refused_with_what_can(inner, options, said):
    with pytest.raises(ValueError, match=said):
        Compressed(inner(), **options)


def test_a_device_without_the_mod_is_told_which_one_to_add():
    strategy = Compressed(fedavg(), up="quantise")
    halves, strategy.device_halves = strategy.device_halves, ()
    world = make_world(strategy, local=LOCAL)
    strategy.device_halves = halves
    with pytest.raises(ValueError, match=r"did not apply the half 'compression': ClientApp\(mods"):
        world.run(1)
