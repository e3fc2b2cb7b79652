"""The bars of local training that a test can hold; for speed see benchmarks/learning.py."""

import functools
import gc
import operator
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.data.datasets import Dataset
from fedsim.data.federated import federate
from fedsim.learning import trainer as trainer_module
from fedsim.learning.batches import make_batches
from fedsim.learning.config import LocalConfig, LocalTerms
from fedsim.learning.models import build_model, lenet5, mlp, softmax
from fedsim.learning.shares import RunningMean, train_shares
from fedsim.learning.trainer import Trainer
from fedsim.streams import stream

torch.set_num_threads(1)
MODELS = {
    "softmax": (softmax, {}, (64,)),
    "mlp": (mlp, {"hidden": (40,)}, (64,)),
    "lenet": (lenet5, {}, (1, 28, 28)),
}


def uneven_data(shape, n_devices, mean=30):
    """Log-normal sizes, at least one device smaller than a batch, labels that can be learned."""
    rng = stream(0, "bars")
    drawn = rng.lognormal(0, 0.8, n_devices)
    size = np.maximum(4, (drawn / drawn.mean() * mean).astype(int))
    size[0] = 4
    x = rng.standard_normal((size.sum(), *shape)).astype(np.float32)
    y = np.argmax(x.reshape(len(x), -1)[:, :10] + rng.standard_normal((len(x), 10)), axis=1)
    parts = np.split(np.arange(len(x)), np.cumsum(size)[:-1])
    return federate(Dataset("uneven", x, y, x[:5], y[:5], 10), parts)


def run(model, data, config, *, dtype=torch.float32, terms=None, **arguments):
    factory, more, shape = MODELS[model]
    module = build_model(factory, shape, 10, seed=1, dtype=dtype, **more)
    trainer = Trainer(module, data, seed=3, **arguments)
    k = data.n_devices
    one = np.ones(k, int)
    terms = terms(trainer) if terms else LocalTerms()
    return trainer.train(trainer.initial()[None], 0 * one, np.arange(k), one, config, terms=terms)


CHANGES = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "weight decay": {"weight_decay": 0.01},
    "prox": {"proximal_mu": 0.1},
    "control": {},
    "clip": {"clip_norm": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("change", CHANGES)
def test_bar_1_equal_in_float64(model, change):
    data = uneven_data(MODELS[model][2], 20)
    config = LocalConfig(batch_size=10, learning_rate=0.05, local_epochs=2, **CHANGES[change])

    def control(trainer):
        drawn = stream(1, "control").standard_normal((20, trainer.layout.size))
        return LocalTerms(control=torch.from_numpy(0.01 * drawn))

    terms = control if change == "control" else None
    double = {"dtype": torch.float64, "terms": terms}
    loop = run(model, data, config, engine="loop", **double)
    for engine in ("vmap", *["linear"] * (model != "lenet")):
        for chunk in (1, 7, None):
            ours = run(model, data, config, engine=engine, chunk=chunk, **double)
            assert (ours.params - loop.params).abs().max() <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_bar_2_equal_in_float32(model):
    data = uneven_data(MODELS[model][2], 100)
    config = LocalConfig(batch_size=10, learning_rate=0.05)
    loop = run(model, data, config, engine="loop")
    for engine in ("vmap", *["linear"] * (model != "lenet")):
        ours = run(model, data, config, engine=engine)
        apart = (ours.params - loop.params).abs().amax(1)
        if model == "lenet":  # max-pooling breaks near-ties by rounding
            assert (apart <= 1e-5).sum() >= 97
            assert apart.max() <= 1e-2
        else:
            assert apart.max() <= 1e-5


@pytest.mark.parametrize("epochs", [1, 3])
def test_bar_6_no_device_step_is_wasted(epochs, monkeypatch):
    data = uneven_data((64,), 50)
    made = []

    def count(*arguments, **more):
        made.append(make_batches(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(trainer_module, "make_batches", count)
    config = LocalConfig(batch_size=10, local_epochs=epochs)
    for chunk in (7, None):
        made.clear()
        result = run("softmax", data, config, chunk=chunk)
        needed = -(-data.size // 10) * epochs
        assert sum(int(b.active.sum()) for b in made) == needed.sum() == result.steps.sum()


def test_bar_7_the_same_batches_in_any_company():
    data = uneven_data((64,), 30)
    config = LocalConfig(batch_size=10, local_epochs=2)

    def batches(devices, order):
        size, one = data.size[devices], np.ones(len(devices), int)
        steps = config.steps_of(size, seed=3, rounds=one, devices=devices)
        by = np.argsort(-steps, kind="stable")
        made = make_batches(
            3,
            one,
            devices[by],
            data.start[devices][by],
            size[by],
            np.minimum(size, 10)[by],
            steps[by],
        )
        row = int(np.flatnonzero(devices[by] == order)[0])
        blocks = made.offset // made.width + row
        blocks = blocks[made.active > row]
        return [
            made.index[b * made.width : b * made.width + made.count[b]].tolist() for b in blocks
        ]

    everyone = np.arange(30)
    for device in (0, 7, 29):
        alone = batches(np.array([device]), device)
        assert alone == batches(everyone, device) == batches(everyone[::-1].copy(), device)
        assert sorted(functools.reduce(operator.iadd, alone, [])) == sorted(
            2 * list(range(data.start[device], data.start[device] + data.size[device]))
        )


def test_bar_7_repeated_and_shared_runs_agree():
    data = uneven_data((64,), 30)
    config = LocalConfig(batch_size=10, momentum=0.9)
    first, again = (run("mlp", data, config).params for _ in range(2))
    assert torch.equal(first, again)
    module = build_model(mlp, (64,), 10, seed=1, hidden=(40,))
    trainers = [Trainer(module, data, seed=3) for _ in range(2)]
    one = np.ones(30, int)
    shared = train_shares(
        trainers, trainers[0].initial()[None], 0 * one, np.arange(30), one, config
    )
    assert (shared.params - first).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_bar_8_memory_grows_with_the_chunk_alone():
    data = uneven_data((784,), 1000, mean=20)
    module = build_model(mlp, (784,), 10, seed=1, hidden=(200,))
    trainer = Trainer(module, data, seed=3)
    one = np.ones(1000, int)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")

    def peak_mb():
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 1024

    before = peak_mb()
    mean = RunningMean(np.ones(1000))
    trainer.train(
        trainer.initial()[None],
        0 * one,
        np.arange(1000),
        one,
        LocalConfig(batch_size=10),
        collect=mean,
    )
    assert peak_mb() - before <= 250
    assert mean.value.shape == (159_010,)
