"""What the trainer promises its callers; its arithmetic is checked in `test_engines`."""

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.data.datasets import load_digits
from fedsim.data.federated import federate
from fedsim.data.partition import partition_dirichlet
from fedsim.errors import ScenarioError
from fedsim.learning.batches import make_batches
from fedsim.learning.config import LocalConfig
from fedsim.learning.models import build_model, mlp, softmax
from fedsim.learning.trainer import Trainer
from fedsim.streams import stream

torch.set_num_threads(1)
N = 20


@pytest.fixture(scope="module")
def data():
    digits = load_digits(seed=1)
    parts = partition_dirichlet(digits.y_train, N, rng=stream(1, "partition"), alpha=0.3)
    parts[3] = parts[3][:2]  # smaller than a batch
    return federate(digits, [part[:40] for part in parts])


def everyone(trainer, config, devices=None, round_=1, **more):
    devices = np.arange(N) if devices is None else np.asarray(devices)
    base = trainer.initial()[None]
    rounds = np.full(len(devices), round_)
    return trainer.train(base, np.zeros(len(devices), int), devices, rounds, config, **more)


def test_results_do_not_depend_on_company_or_chunk(data):
    module = build_model(mlp, (64,), 10, seed=1)
    config = LocalConfig(batch_size=10, momentum=0.9)
    trainer = Trainer(module, data, seed=5)
    together = everyone(trainer, config)
    again = everyone(trainer, config)
    assert torch.equal(together.params, again.params)
    for chunk in (1, 7, N):
        other = everyone(Trainer(module, data, seed=5, chunk=chunk), config)
        assert (other.params - together.params).abs().max() < 1e-6
    some = everyone(trainer, config, devices=[11, 3])
    assert (some.params - together.params[[11, 3]]).abs().max() < 1e-6
    assert np.array_equal(some.samples, data.size[[11, 3]])
    later = everyone(trainer, config, round_=2)
    assert not torch.equal(later.params, together.params)


def test_rounds_and_versions_may_differ_within_one_call(data):
    trainer = Trainer(build_model(softmax, (64,), 10, seed=1), data, seed=5)
    config = LocalConfig(batch_size=10)
    base = torch.stack([trainer.initial(), trainer.initial() + 0.1])
    mixed = trainer.train(
        base, np.array([1, 0, 1]), np.array([4, 4, 6]), np.array([1, 2, 3]), config
    )
    for row, (version, device, round_) in enumerate([(1, 4, 1), (0, 4, 2), (1, 6, 3)]):
        alone = trainer.train(
            base, np.array([version]), np.array([device]), np.array([round_]), config
        )
        assert (mixed.params[row] - alone.params[0]).abs().max() < 1e-6


@pytest.mark.parametrize("batch_size", [10, 0])
@pytest.mark.parametrize("engine", ["linear", "vmap", "loop"])
def test_gradient_mode_is_the_first_step_of_training(data, engine, batch_size):
    module = build_model(mlp, (64,), 10, seed=1, dtype=torch.float64)
    trainer = Trainer(module, data, seed=5, engine=engine)
    gradient = everyone(trainer, LocalConfig(batch_size=batch_size, mode="gradient"))
    step = everyone(trainer, LocalConfig(batch_size=batch_size, local_steps=1, learning_rate=0.25))
    expected = (trainer.initial() - step.params) / 0.25
    assert (gradient.params - expected).abs().max() < 1e-12
    assert np.allclose(gradient.loss, step.loss)
    own = torch.stack([trainer.initial(), trainer.initial() * 1.5])
    rows = np.arange(N) % 2
    mixed = trainer.train(
        own, rows, np.arange(N), np.full(N, 1), LocalConfig(batch_size=batch_size, mode="gradient")
    )
    assert (mixed.params[::2] - gradient.params[::2]).abs().max() < 1e-12
    assert (mixed.params[1::2] - gradient.params[1::2]).abs().max() > 1e-3


def test_samples_of_an_epoch_come_once_each_and_steps_are_no_more_than_needed(data):
    size, batch = data.size, np.minimum(data.size, 10)
    steps = -(-size // 10) * 2
    order = np.argsort(-steps, kind="stable")
    made = make_batches(
        1, np.ones(N, int), order, data.start[order], size[order], batch[order], steps[order]
    )
    assert made.active.sum() == steps.sum()
    used = made.index[made.weight > 0]
    assert np.array_equal(np.bincount(used, minlength=len(data.x))[: size[0]], [2] * size[0])
    assert len(used) == 2 * size.sum()
    sums = np.add.reduceat(made.weight, np.arange(0, len(made.weight), made.width))
    assert np.allclose(sums, 1)


def test_sample_order_is_a_uniform_shuffle():
    k = 4000
    one = np.ones(k, int)
    made = make_batches(3, one, np.arange(k), 0 * one, 5 * one, 5 * one, one)
    first = np.bincount(made.index.reshape(k, 5)[:, 0], minlength=5)
    assert abs(first - k / 5).max() < 4 * np.sqrt(k * 0.16)


def test_drop_last_leaves_out_short_batches(data):
    trainer = Trainer(build_model(softmax, (64,), 10, seed=1), data, seed=5)
    result = everyone(trainer, LocalConfig(batch_size=10, drop_last=True))
    # A device with less than a batch keeps it: it would never train otherwise.
    assert result.steps.tolist() == np.maximum(data.size // 10, data.size < 10).tolist()


def test_weights_are_collected_chunk_by_chunk(data):
    trainer = Trainer(build_model(softmax, (64,), 10, seed=1), data, seed=5, chunk=6)
    seen = {}
    config = LocalConfig(batch_size=10)
    result = everyone(trainer, config, collect=lambda r, m: seen.update(zip(r, m, strict=True)))
    assert result.params is None
    assert torch.equal(torch.stack([seen[i] for i in range(N)]), everyone(trainer, config).params)


def test_initial_weights_depend_on_the_seed_alone(data):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = Trainer(build_model(mlp, (64,), 10, seed=1), data, seed=1).initial()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, Trainer(build_model(mlp, (64,), 10, seed=1), data, seed=1).initial())
    other = Trainer(build_model(mlp, (64,), 10, seed=2), data, seed=1).initial()
    assert not torch.equal(first, other)


def test_evaluation_of_many_models_equals_one_by_one(data):
    for engine in ("linear", "loop"):
        module = build_model(mlp, (64,), 10, seed=1, dtype=torch.float64)
        trainer = Trainer(module, data, seed=5, engine=engine)
        params = everyone(trainer, LocalConfig()).params
        loss, accuracy = trainer.evaluate(params, data.x_test, data.y_test)
        own_loss, own_accuracy, samples = trainer.evaluate_devices(
            params, np.arange(N), np.arange(N)
        )
        for i in range(N):
            state = {k: v[0] for k, v in trainer.layout.views(params[i : i + 1]).items()}
            module.load_state_dict(state)
            with torch.no_grad():
                logits = module(data.x_test.double())
                rows = slice(data.start[i], data.start[i] + data.size[i])
                own = module(data.x[rows].double())
            expected = nn.functional.cross_entropy(logits, data.y_test).item()
            assert abs(loss[i] - expected) < 1e-12
            assert accuracy[i] == (logits.argmax(1) == data.y_test).double().mean().item()
            assert abs(own_loss[i] - nn.functional.cross_entropy(own, data.y[rows])) < 1e-12
            assert own_accuracy[i] == (own.argmax(1) == data.y[rows]).double().mean().item()
        assert np.array_equal(samples, data.size)


def test_one_model_is_scored_on_all_devices_at_once(data):
    trainer = Trainer(build_model(softmax, (64,), 10, seed=1), data, seed=5)
    loss, accuracy, samples = trainer.evaluate_devices(
        trainer.initial()[None], np.zeros(N, int), np.arange(N)
    )
    whole, hits = trainer.evaluate(trainer.initial()[None], data.x, data.y)
    assert abs((loss * samples).sum() / samples.sum() - whole[0]) < 1e-6
    assert abs((accuracy * samples).sum() / samples.sum() - hits[0]) < 1e-12


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        h = self.layer(x)
        return h if h.sum().item() > 0 else h * 1.0


def test_a_module_that_cannot_be_mapped_is_looped_with_one_warning(data):
    module = build_model(lambda shape, n: Branching(), (64,), 10, seed=1)
    trainer = Trainer(module, data, seed=5, chunk=5)
    with pytest.warns(RuntimeWarning, match=r"Branching cannot be mapped.*item") as caught:
        result = everyone(trainer, LocalConfig())
    assert len(caught) == 1
    everyone(trainer, LocalConfig())
    linear = Trainer(build_model(lambda s, n: nn.Linear(64, 10), (64,), 10, seed=1), data, seed=5)
    assert (result.params - everyone(linear, LocalConfig()).params).abs().max() < 1e-6
    with pytest.raises(ScenarioError, match=r"engine: vmap: Branching cannot be mapped"):
        everyone(Trainer(module, data, seed=5, engine="vmap"), LocalConfig())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.last = nn.Linear(64, 10)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def test_shared_weights_stay_shared(data):
    module = build_model(lambda shape, n: Tied(), (64,), 10, seed=1, dtype=torch.float64)
    results = [
        everyone(Trainer(module, data, seed=5, engine=e), LocalConfig()).params
        for e in ("vmap", "loop")
    ]
    assert (results[0] - results[1]).abs().max() < 1e-10
    views = Trainer(module, data, seed=5).layout.views(results[0])
    assert list(views) == list(module.state_dict())
    assert torch.equal(views["first.weight"], views["second.weight"])


def test_a_model_that_does_not_fit_is_refused(data):
    with pytest.raises(ScenarioError, match=r"cannot take inputs of shape \(64,\)"):
        Trainer(nn.Linear(63, 10), data, seed=1)
    with pytest.raises(ScenarioError, match=r"has 9 outputs, the data have labels 0\.\.9"):
        Trainer(nn.Linear(64, 9), data, seed=1)
    with pytest.raises(ScenarioError, match="does not fit the loss"):
        Trainer(nn.Sequential(nn.Linear(64, 20), nn.Unflatten(1, (2, 10))), data, seed=1)
    with pytest.raises(ScenarioError, match="no parameters to train"):
        Trainer(nn.Flatten(), data, seed=1)
    with pytest.raises(ScenarioError, match=r"mixed types \(torch.float32, torch.float64\)"):
        Trainer(nn.Sequential(nn.Linear(64, 10), nn.Linear(10, 10).double()), data, seed=1)
    with pytest.raises(ScenarioError, match="linear needs a stack of linear layers"):
        Trainer(Branching(), data, seed=1, engine="linear")
    with pytest.raises(ScenarioError, match="not cpu, cuda"):
        Trainer(nn.Linear(64, 10), data, seed=1, device="tpu9")
    with pytest.raises(ScenarioError, match=r"training\.loss: 'hinge' is not one of cross_entropy"):
        Trainer(nn.Linear(64, 10), data, seed=1, loss="hinge")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1.0}, "training.learning_rate: -1.0 is not at least 0"),
        ({"momentum": 1.0}, r"training.momentum: 1.0 is not in \[0, 1\)"),
        ({"nesterov": True}, "nesterov"),
        ({"local_epochs": 0}, "local_epochs: 0"),
        ({"local_steps": 0}, "local_steps: 0"),
        ({"mode": "gradients"}, "training.mode: 'gradients' is not one of local_sgd, gradient"),
        ({"clip_norm": 0.0}, "clip_norm"),
    ],
)
def test_wrong_local_work_is_refused(arguments, message):
    with pytest.raises(ScenarioError, match=message):
        LocalConfig(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_but_absent_is_refused(data):
    with pytest.raises(ScenarioError, match="torch finds no CUDA device"):
        Trainer(nn.Linear(64, 10), data, seed=1, device="cuda")


@pytest.mark.parametrize("engine", ["linear", "vmap", "loop"])
def test_divergence_is_a_number_not_an_accident(data, engine):
    trainer = Trainer(build_model(mlp, (64,), 10, seed=1), data, seed=5, engine=engine)
    config = LocalConfig(batch_size=10, learning_rate=1e30, momentum=0.9, local_epochs=3)
    result = everyone(trainer, config)
    assert not np.isfinite(result.loss).any()
    loss, accuracy = trainer.evaluate(result.params, data.x_test, data.y_test)
    assert not np.isfinite(loss).any()
    assert np.isfinite(accuracy).all()
