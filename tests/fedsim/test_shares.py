import numpy as np
import pytest
import torch

from fedsim.data.datasets import Dataset
from fedsim.data.federated import federate
from fedsim.errors import ScenarioError
from fedsim.learning.config import LocalConfig, LocalTerms
from fedsim.learning.models import build_model, mlp
from fedsim.learning.shares import RunningMean, train_shares
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
