import numpy as np
import pytest
import torch
from torch import nn

from fedsim.data.datasets import Dataset
from fedsim.data.federated import federate
from fedsim.errors import ScenarioError
from fedsim.learning import evaluation
from fedsim.learning.losses import LOSSES
from fedsim.learning.models import build_model, char_lstm, cnn, linear_regression, mlp
from fedsim.learning.trainer import Trainer
from fedsim.streams import stream

torch.set_num_threads(1)
SIZES = [12, 3, 9, 20, 5, 1]


def make_data(shape=(8,), n_classes=4, y_shape=(), **arguments):
    rng = stream(0, "evaluation")
    n = sum(SIZES)
    x = rng.standard_normal((n, *shape))
    y = rng.integers(n_classes, size=(n, *y_shape)) if n_classes else rng.standard_normal(n)
    parts = np.split(np.arange(n), np.cumsum(SIZES)[:-1])
    return federate(Dataset("random", x, y, x[::2], y[::2], n_classes), parts, **arguments)


def some_models(trainer, n=5):
    drawn = stream(1, "models").standard_normal((n, trainer.layout.size))
    return trainer.initial() + 0.3 * torch.from_numpy(drawn)


@pytest.mark.parametrize("factory", [mlp, cnn])
def test_confusion_counts_every_sample_of_every_model(factory):
    shape = (8,) if factory is mlp else (1, 8, 8)
    data = make_data(shape)
    module = build_model(factory, shape, 4, seed=1, dtype=torch.float64)
    trainer = Trainer(module, data, seed=1)
    models = some_models(trainer)
    counts = trainer.confusion(models, data.x_test, data.y_test)
    _, accuracy = trainer.evaluate(models, data.x_test, data.y_test)
    assert counts.shape == (5, 4, 4)
    assert (counts.sum(2) == np.bincount(data.y_test, minlength=4)).all()
    assert np.allclose(counts.trace(axis1=1, axis2=2) / len(data.y_test), accuracy)
    state = {k: v[2] for k, v in trainer.layout.views(models).items()}
    module.load_state_dict(state)
    predicted = module(data.x_test).argmax(1)
    assert counts[2, 1, 3] == ((data.y_test == 1) & (predicted == 3)).sum()


def test_blocks_do_not_change_the_scores(monkeypatch):
    data = make_data()
    trainer = Trainer(build_model(mlp, (8,), 4, seed=1, dtype=torch.float64), data, seed=1)
    models, rows = some_models(trainer), np.array([0, 1, 0, 2, 1, 1])
    whole = trainer.evaluate(models, data.x_test, data.y_test)
    own = trainer.evaluate_devices(models, rows, np.arange(6))
    monkeypatch.setattr(evaluation, "_BLOCK", 500)
    monkeypatch.setattr(evaluation, "_MODELS", 2)
    for a, b in zip(whole, trainer.evaluate(models, data.x_test, data.y_test), strict=True):
        assert np.allclose(a, b, atol=1e-12)
    for a, b in zip(own, trainer.evaluate_devices(models, rows, np.arange(6)), strict=True):
        assert np.allclose(a, b, atol=1e-12)


def test_devices_are_scored_on_samples_they_do_not_train_on():
    data = make_data(local_test_fraction=0.3, rng=stream(0, "local"))
    trainer = Trainer(build_model(mlp, (8,), 4, seed=1, dtype=torch.float64), data, seed=1)
    models, rows = some_models(trainer), np.array([0, 1, 0, 2, 1, 1])
    loss, accuracy, samples = trainer.evaluate_devices(models, rows, np.arange(6), split="test")
    assert samples.tolist() == [4, 1, 3, 6, 2, 0]
    assert np.isnan(loss[5])
    for i in range(5):
        begin = data.local_test_start[i]
        chosen = slice(begin, begin + samples[i])
        one = trainer.evaluate(models[rows[i] : rows[i] + 1], data.x[chosen], data.y[chosen])
        assert np.allclose([loss[i], accuracy[i]], [one[0][0], one[1][0]])
    with pytest.raises(ScenarioError, match="no test samples of their own"):
        Trainer(nn.Linear(8, 4), make_data(), seed=1).evaluate_devices(
            torch.zeros(1, 36), np.zeros(1, int), np.zeros(1, int), split="test"
        )


def test_sequences_are_scored_by_position():
    rng = stream(2, "text")
    x, y = (rng.integers(6, size=(20, 7)) for _ in range(2))
    data = federate(Dataset("text", x, y, x, y, 6), [np.arange(20)])
    trainer = Trainer(build_model(char_lstm, (7,), 6, seed=1, hidden=8), data, seed=1)
    base = trainer.initial()[None]
    loss, accuracy = trainer.evaluate(base, data.x_test, data.y_test)
    counts = trainer.confusion(base, data.x_test, data.y_test)[0]
    assert counts.sum() == 140
    assert accuracy[0] == pytest.approx(counts.trace() / 140)
    assert loss[0] == pytest.approx(np.log(6), abs=0.1)
    assert data.label_counts().sum() == 140


def test_a_regression_has_no_accuracy_and_no_confusion():
    data = make_data(n_classes=0)
    trainer = Trainer(linear_regression((8,), 0), data, seed=1)
    base = trainer.initial()[None]
    loss, accuracy = trainer.evaluate(base, data.x_test, data.y_test)
    assert loss[0] == pytest.approx(float(data.y_test.square().mean()))
    assert np.isnan(accuracy[0])
    with pytest.raises(ScenarioError, match="knows no classes"):
        trainer.confusion(base, data.x_test, data.y_test)
    assert data.label_counts().shape == (6, 0)


def test_spread_is_mean_deviation_and_the_worst_tenth():
    scores = np.concatenate([np.linspace(0, 1, 20), [np.nan]])
    found = evaluation.spread(scores)
    assert found["mean"] == pytest.approx(0.5)
    assert found["std"] == pytest.approx(np.linspace(0, 1, 20).std())
    assert found["worst_10_percent"] == pytest.approx(1 / 38)
    assert evaluation.spread(np.array([0.3]))["worst_10_percent"] == pytest.approx(0.3)
    assert np.isnan(evaluation.spread(np.array([np.nan]))["mean"])


@pytest.mark.parametrize("name", ["cross_entropy", "squared_error", "logistic"])
def test_hand_written_gradients_are_those_of_autograd(name):
    loss = LOSSES[name]
    rng = stream(3, "losses")
    c = 5 if name == "cross_entropy" else 1
    outputs = torch.from_numpy(3 * rng.standard_normal((3, 7, c))).requires_grad_()
    y = torch.from_numpy(rng.integers(min(c, 2) if c > 1 else 2, size=(3, 7)))
    if name == "squared_error":
        y = torch.from_numpy(rng.standard_normal((3, 7)))
    expected = torch.stack([loss.per_sample(outputs[i], y[i]) for i in range(3)])
    (slope,) = torch.autograd.grad(expected.sum(), outputs)
    with torch.no_grad():
        losses, found = loss.gradient(outputs.detach().clone(), y)
    assert torch.allclose(losses, expected)
    assert torch.allclose(found, slope)
