import numpy as np
import pytest
import torch

from fedsim.data.federated import federate
from fedsim.data.partition import partition_natural
from fedsim.data.synthetic import (
    StreamedData,
    SyntheticSpec,
    load_least_squares,
    load_logistic,
    load_quadratic,
    load_synthetic,
)
from fedsim.errors import ScenarioError
from fedsim.learning.config import LocalConfig
from fedsim.learning.models import (
    build_model,
    linear_regression,
    logistic_regression,
    quadratic,
    softmax,
)
from fedsim.learning.trainer import Trainer
from fedsim.streams import stream

torch.set_num_threads(1)


def by_nature(dataset):
    n = len(np.unique(dataset.device_train))
    parts = partition_natural(
        dataset.y_train, n, rng=stream(0, "x"), device_ids=dataset.device_train
    )
    return federate(dataset, parts)


def test_q8_is_the_reference_problem():
    data = by_nature(load_quadratic())
    x = data.x.numpy()
    h, b = x[:, :, :-1], x[:, :, -1]
    optimum = np.linalg.solve(h.sum(0), b.sum(0))
    assert np.linalg.norm(optimum) == pytest.approx(2.397050, abs=1e-6)
    assert optimum[:3] == pytest.approx([-0.773570, -1.116798, -0.041805], abs=1e-6)
    eigenvalues = np.linalg.eigvalsh(h)
    assert eigenvalues.max() == pytest.approx(5.305954, abs=1e-6)
    assert eigenvalues.min() == pytest.approx(0.500043, abs=1e-6)
    trainer = Trainer(build_model(quadratic, (10, 11), 0, seed=1), data, seed=1)
    at = torch.from_numpy(np.tile(optimum, (8, 1)))
    where = np.arange(8), np.arange(8), np.ones(8, int)
    config = LocalConfig(mode="gradient", batch_size=0)
    gradient = trainer.train(at, *where, config).params.numpy()
    assert np.allclose(gradient, np.einsum("ijk,k->ij", h, optimum) - b, atol=1e-12)
    assert np.abs(gradient.mean(0)).max() < 1e-12
    loss, accuracy = trainer.evaluate(at[:1], data.x_test, data.y_test)
    expected = np.mean([optimum @ h[i] @ optimum / 2 - b[i] @ optimum for i in range(8)])
    assert loss[0] == pytest.approx(expected)
    assert np.isnan(accuracy[0])


@pytest.mark.parametrize("heterogeneous", [False, True])
def test_least_squares_is_solved_by_its_normal_equations(heterogeneous):
    dataset = load_least_squares(heterogeneous=heterogeneous, seed=3)
    data = by_nature(dataset)
    assert data.size.tolist() == [200] * 20
    solution, *_ = np.linalg.lstsq(dataset.x_train, dataset.y_train, rcond=None)
    true = [2, np.exp(-0.1), -np.exp(-0.2)]
    assert solution[:3] == pytest.approx(true, abs=0.1 if heterogeneous else 0.05)
    residual = (dataset.y_train - dataset.x_train @ solution).reshape(20, 200)
    within = residual.std(axis=1).mean()
    assert within < 0.03 if heterogeneous else within == pytest.approx(0.4, abs=0.02)
    trainer = Trainer(linear_regression((20,), 0, bias=False), data, seed=1)
    base = torch.from_numpy(np.tile(solution, (20, 1)))
    config = LocalConfig(mode="gradient", batch_size=0)
    where = np.arange(20), np.arange(20), np.ones(20, int)
    assert trainer.train(base, *where, config).params.mean(0).abs().max() < 1e-12
    loss, _ = trainer.evaluate(base[:1], data.x_test, data.y_test)
    assert loss[0] == pytest.approx((residual**2).mean())


def test_logistic_devices_disagree_only_if_asked_to():
    for heterogeneous in (False, True):
        dataset = load_logistic(n_devices=4, samples=2000, heterogeneous=heterogeneous, seed=1)
        x, y = dataset.x_train.reshape(4, 2000, 2), dataset.y_train.reshape(4, 2000)
        slope = [np.cov(x[i, :, 1], y[i])[0, 1] for i in range(4)]
        assert (np.sign(slope) == ([1, -1, 1, -1] if heterogeneous else [1] * 4)).all()
    trainer = Trainer(logistic_regression((2,), 2), by_nature(dataset), seed=1)
    zero = trainer.initial()[None]
    loss, _ = trainer.evaluate(zero, trainer.data.x_test, trainer.data.y_test)
    assert loss[0] == pytest.approx(np.log(2))


def test_streamed_and_resident_synthetic_data_train_alike(monkeypatch):
    arguments = {"n_devices": 30, "log_mean": 2.0, "log_sigma": 1.0, "min_samples": 5, "seed": 4}
    resident = load_synthetic(**arguments)
    monkeypatch.setattr("fedsim.data.synthetic._RESIDENT_BYTES", 0)
    streamed = load_synthetic(**arguments)
    assert isinstance(streamed, StreamedData)
    devices = np.array([17, 3, 29, 3])
    results = []
    for data in (resident, streamed):
        trainer = Trainer(build_model(softmax, (60,), 10, seed=1), data, seed=1)
        base, rounds = trainer.initial()[None], np.array([1, 1, 1, 2])
        results.append(trainer.train(base, np.zeros(4, int), devices, rounds, LocalConfig()))
        assert np.array_equal(results[-1].samples, data.size[devices])
        scores = trainer.evaluate_devices(base, np.zeros(4, int), devices)
        assert scores[2].tolist() == data.size[devices].tolist()
    assert torch.equal(results[0].params, results[1].params)
    with pytest.raises(ScenarioError, match="no test samples of their own"):
        trainer.evaluate_devices(base, np.zeros(4, int), devices, split="test")
    assert resident.label_counts().sum() == resident.size.sum()
    assert streamed.label_counts().shape == (0, 10)


def test_a_million_devices_cost_an_array_until_they_take_part():
    data = load_synthetic(n_devices=1_000_000, log_mean=2.0, log_sigma=0.5, min_samples=5, seed=1)
    assert isinstance(data, StreamedData)
    assert data.size.nbytes == 8_000_000
    devices = stream(1, "sample").choice(1_000_000, 20, replace=False)
    x, y, start = data.pack(devices)
    assert len(x) == len(y) == data.size[devices].sum()
    alone, labels, _ = data.pack(devices[7:8])
    rows = slice(start[7], start[7] + data.size[devices[7]])
    assert torch.equal(x[rows], alone)
    assert torch.equal(y[rows], labels)


def test_heterogeneity_grows_with_alpha_and_beta():
    def spread(alpha, beta, iid=False):
        spec = SyntheticSpec(alpha, beta, iid)
        drawn = [spec.samples(1, d, 200, "synthetic-train") for d in range(30)]
        means = np.array([x.mean(0) for x, _ in drawn])
        return means.std(0).mean(), [np.bincount(y, minlength=10).max() / 200 for _, y in drawn]

    alike, _ = spread(0, 0, iid=True)
    some, _ = spread(0, 0)
    more, shares = spread(1, 9)
    assert alike < 0.1 < some < more
    assert np.mean(shares) > 0.4


def test_iid_devices_share_one_task():
    spec = SyntheticSpec(iid=True)
    x, y = spec.samples(1, 0, 500, "synthetic-train")
    w, b, v = spec.task(stream(1, "synthetic-task", 0))
    assert not v.any()
    other_x, other_y = spec.samples(1, 5, 500, "synthetic-train")
    assert np.array_equal(other_y, np.argmax(other_x @ w.T + b, 1))
    assert not np.array_equal(x, other_x)
    assert y.shape == (500,)


@pytest.mark.parametrize("wrong", [{"n_devices": 0}, {"alpha": -1.0}, {"max_samples": 3}])
def test_wrong_synthetic_arguments_are_refused(wrong):
    with pytest.raises(ScenarioError, match="out of range"):
        load_synthetic(**{"n_devices": 5, **wrong})
