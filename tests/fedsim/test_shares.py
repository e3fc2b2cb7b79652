import numpy as np
import pytest
import torch

from fedsim.data.datasets import Dataset
from fedsim.data.federated import federate
from fedsim.errors import ScenarioError
from fedsim.learning.config import LocalConfig, LocalTerms
from fedsim.learning.models import build_model, mlp, resnet8
from fedsim.learning.shares import RunningMean, local_columns, train_shares, with_own_columns
from fedsim.learning.trainer import Trainer
from fedsim.streams import stream

torch.set_num_threads(1)
SIZES = [12, 3, 9, 20, 5, 7]
K = len(SIZES)


def make_data(shape=(8,)):
    rng = stream(0, "shares")
    x = rng.standard_normal((sum(SIZES), *shape))
    y = rng.integers(3, size=len(x))
    parts = np.split(np.arange(len(x)), np.cumsum(SIZES)[:-1])
    return federate(Dataset("random", x, y, x[:4], y[:4], 3), parts)


def make_trainer(data):
    module = build_model(mlp, (8,), 3, seed=1, hidden=(5,), dtype=torch.float64)
    return Trainer(module, data, seed=2)


def call(trainer):
    return trainer.initial()[None], np.zeros(K, int), np.arange(K), np.ones(K, int)


@pytest.mark.parametrize("n_shares", [1, 2, 4, 9])
def test_shares_give_one_trainers_result(n_shares):
    data = make_data()
    trainers = [make_trainer(data) for _ in range(n_shares)]
    drawn = stream(1, "control").standard_normal((K, trainers[0].layout.size))
    terms = LocalTerms(control=torch.from_numpy(drawn))
    config = LocalConfig(batch_size=4, momentum=0.5)
    whole = trainers[0].train(*call(trainers[0]), config, terms=terms)
    shared = train_shares(trainers, *call(trainers[0]), config, terms=terms)
    assert (shared.params - whole.params).abs().max() < 1e-12
    assert np.allclose(shared.loss, whole.loss)
    assert shared.steps.tolist() == whole.steps.tolist()
    assert shared.samples.tolist() == SIZES


def test_a_running_mean_is_the_weighted_mean():
    trainer = make_trainer(make_data())
    config = LocalConfig(batch_size=4)
    result = trainer.train(*call(trainer), config)
    mean = RunningMean(np.array(SIZES, float))
    trainer.chunk = 4
    collected = trainer.train(*call(trainer), config, collect=mean)
    expected = torch.tensor(SIZES, dtype=torch.float64) / sum(SIZES) @ result.params
    assert collected.params is None
    assert (mean.value - expected).abs().max() < 1e-12
    with pytest.raises(ScenarioError, match="not above 0"):
        RunningMean(np.zeros(3))


def test_batch_norm_can_stay_at_home():
    data = make_data((3, 8, 8))
    module = build_model(resnet8, (3, 8, 8), 3, seed=1, norm="batch")
    trainer = Trainer(module, data, seed=2)
    statistics = local_columns(module, trainer.layout, "statistics")
    whole = local_columns(module, trainer.layout, "batch_norm")
    channels = 16 + 2 * (16 + 32 + 64)
    assert len(statistics) == 2 * channels + 7
    assert len(whole) == 4 * channels + 7
    config = LocalConfig(batch_size=4, drop_last=True)
    first = trainer.train(*call(trainer), config)
    average = first.params.mean(0, keepdim=True)
    own = first.params[:, whole]
    base = with_own_columns(average, np.zeros(K, int), whole, own)
    assert torch.equal(base[:, whole], own)
    others = np.setdiff1d(np.arange(trainer.layout.size), whole)
    assert torch.equal(base[:, others], average[:, others].expand(K, -1))
    second = trainer.train(base, np.arange(K), np.arange(K), np.full(K, 2), config)
    counts = trainer.layout.views(second.params)["norm.num_batches_tracked"]
    assert counts.tolist() == (2 * second.steps).tolist()
    plain = build_model(mlp, (8,), 3, seed=1)
    assert len(local_columns(plain, make_trainer(make_data()).layout, "statistics")) == 0
