"""Parts of the model that stay on their devices, against the same thing done by hand."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import fedsim
from fedsim.errors import ScenarioError
from fedsim.flower.records import LazyArrayRecord
from fedsim.learning.config import LocalConfig
from fedsim.scenario import Scenario
from strategies.personal import local_names

ROUNDS, DEVICES = 3, 6
NORM = ("1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked")
NORM_BYTES = 4 * 8 * 4 + 8  # four vectors of float32 and a counter of int64
MODEL_BYTES = 4 * (64 * 8 + 8) + NORM_BYTES + 4 * (8 * 10 + 10)


def net(input_shape, n_classes):
    return nn.Sequential(
        nn.Linear(input_shape[0], 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, n_classes)
    )


def build(keep_local="batch_norm", strategy="fedavg", **changes):
    world = {
        "name": "keep local",
        "seed": 1,
        "rounds": ROUNDS,
        "data": {
            "dataset": "digits",
            "devices": DEVICES,
            "partition": {"kind": "dirichlet", "alpha": 0.5},
            "test_fraction": 0.8,
        },
        "model": {"kind": "tests.fedsim.test_keep_local:net"},
        "training": {"batch_size": 4, "drop_last": True, "keep_local": keep_local},
        "topology": {"kind": "star", "bandwidth": "1 Mbit/s"},
        "strategies": {"mine": {"kind": strategy}},
    }
    return fedsim.build(Scenario.from_mapping(world | changes), device="cpu")


def by_hand(trainer, rounds=ROUNDS):
    """Return the shared model, and each device's own, after FedBN (Li et al., Algorithm 1)."""
    layout, everybody = trainer.layout, np.arange(DEVICES)
    own = np.concatenate([np.arange(trainer.layout.size)[layout.columns(n)] for n in NORM])
    rows = trainer.initial().expand(DEVICES, -1).clone()
    weights = torch.from_numpy(trainer.data.size / trainer.data.size.sum()).float()
    for number in range(1, rounds + 1):
        config = LocalConfig(batch_size=4, drop_last=True, learning_rate=0.1)
        which = np.full(DEVICES, number)
        done = trainer.train(rows, everybody, everybody, which, config).params
        mean = weights @ done
        rows = mean.expand(DEVICES, -1).clone()
        rows[:, own] = done[:, own]
    return mean, rows


def run(**changes):
    lines = []
    built = build(**changes)
    return built, built.run(lines.append), lines


@pytest.mark.parametrize("executor", ["vectorised", "client_app"])
def test_batch_norm_stays_where_it_is_and_the_rest_is_averaged(executor):
    built, outcome, lines = run(executor={"kind": executor})
    mean, rows = by_hand(built.trainer)
    model = built.trainer.layout.views(rows)
    final = LazyArrayRecord(outcome.arrays).to_torch_state_dict()
    kept = built.executor.kept("local")
    assert set(kept) == set(NORM)
    for name, expected in built.trainer.layout.views(mean[None]).items():
        if name in NORM:
            assert torch.allclose(kept[name], model[name], atol=1e-5)
            middle = model[name].double().mean(0)
            assert torch.allclose(final[name].double(), middle, atol=0.5 if "num" in name else 1e-5)
        else:
            assert torch.allclose(final[name], expected[0], atol=1e-5)
    for line in lines:
        assert line.bytes_down == line.bytes_up == DEVICES * (MODEL_BYTES - NORM_BYTES)


@pytest.mark.parametrize("executor", ["vectorised", "client_app"])
def test_devices_evaluate_their_own_models(executor):
    evaluation = {"on": "devices", "cost": "free"}
    built, _, lines = run(executor={"kind": executor}, evaluation=evaluation)
    _, rows = by_hand(built.trainer)
    everybody = np.arange(DEVICES)
    _, accuracy, samples = built.trainer.evaluate_devices(rows, everybody, everybody)
    expected = (accuracy * samples).sum() / samples.sum()
    assert lines[-1].eval_accuracy == pytest.approx(expected, abs=2 / samples.sum())


def test_only_devices_that_have_trained_keep_anything():
    strategies = {"mine": {"kind": "fedavg", "fraction_train": 0.34}}
    built, _, _ = run(strategies=strategies, rounds=1)
    assert len(built.executor.kept("local")["1.weight"]) == 2


def test_it_goes_with_compression_and_other_halves():
    for strategy in ("scaffold", "fedadam"):
        up = {"kind": "top_k", "fraction": 0.5}
        built, outcome, lines = run(strategy=strategy, compression={"up": up}, rounds=2)
        assert lines[-1].devices_replied == DEVICES
        assert outcome.diverged is None
        assert set(built.executor.kept("local")) == set(NORM)


def test_names_and_patterns():
    names = ["0.weight", "0.bias", *NORM, "3.weight", "3.bias"]
    assert local_names(names, ["batch_norm"]) == NORM
    assert local_names(names, ["batch_norm_statistics"]) == NORM[2:]
    assert local_names(names, ["3.*", "0.bias"]) == ("0.bias", "3.weight", "3.bias")
    with pytest.raises(ValueError, match="'head\\.\\*' means no tensor of this model"):
        local_names(names, ["head.*"])
    with pytest.raises(ValueError, match="nothing is left to share"):
        local_names(names, ["*"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep_local": "fc.*"}, "training.keep_local: 'fc.*' means no tensor"),
        ({"model": "softmax"}, "training.keep_local: 'batch_norm' means no tensor"),
        (
            {"strategy": "gossip", "peers": {"kind": "ring"}},
            "training.keep_local: DPSGD does not send",
        ),
        ({"strategy": "fedbuff"}, "training.keep_local: FedBuff does not send"),
        (
            {"executor": {"kind": "client_app", "app": "tests.fedsim.tutorial_app:app"}},
            "training.keep_local: an app of one's own",
        ),
    ],
)
def test_what_cannot_keep_anything_is_refused_before_it_runs(changes, said):
    with pytest.raises(ScenarioError, match=re.escape(said)):
        build(**changes)
