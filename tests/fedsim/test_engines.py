"""Every engine against a plain loop with torch's own optimisers, and against one another.

The plain loop shares the order of samples with the trainer (`make_batches`), and nothing else.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsim.data.datasets import Dataset
from fedsim.data.federated import federate
from fedsim.errors import ScenarioError
from fedsim.learning import models as m
from fedsim.learning import schedules
from fedsim.learning.batches import make_batches
from fedsim.learning.config import LocalConfig, LocalTerms
from fedsim.learning.draws import keyed_mask
from fedsim.learning.models import build_model
from fedsim.learning.trainer import Trainer
from fedsim.streams import stream

torch.set_num_threads(1)


class NormNet(nn.Module):
    """BatchNorm over features and over images, dropout of numbers and of channels."""

    def __init__(self, input_shape, n_classes, p=0.0):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.drop1 = nn.Dropout2d(p)
        self.fc1 = nn.Linear(4 * 36, 8)
        self.norm2 = nn.BatchNorm1d(8)
        self.drop2 = nn.Dropout(p)
        self.fc2 = nn.Linear(8, n_classes)

    def forward(self, x):
        h = self.drop1(torch.relu(self.norm1(self.conv(x)))).flatten(1)
        return self.fc2(self.drop2(torch.relu(self.norm2(self.fc1(h)))))


IMAGE, TEXT = (1, 6, 6), (7,)
FAMILIES = {
    # name: (factory, arguments, input shape, classes)
    "softmax": (m.softmax, {}, IMAGE, 4),
    "mlp": (m.mlp, {"hidden": (7, 5)}, IMAGE, 4),
    "tanh": (
        lambda s, c: nn.Sequential(
            nn.Flatten(),
            nn.Linear(36, 6),
            nn.Tanh(),
            nn.Linear(6, 5, bias=False),
            nn.Sigmoid(),
            nn.Linear(5, c),
        ),
        {},
        IMAGE,
        4,
    ),
    "cnn": (m.cnn, {"channels": (3, 4), "kernel_size": 3}, IMAGE, 4),
    "batch norm": (NormNet, {}, IMAGE, 4),
    "resnet": (m.resnet8, {}, IMAGE, 4),
    "lstm": (m.char_lstm, {"embedding": 3, "hidden": 5, "layers": 2}, TEXT, 6),
    "transformer": (m.char_transformer, {"width": 8, "layers": 1}, TEXT, 6),
    "regression": (m.linear_regression, {}, (5,), 0),
    "logistic": (m.logistic_regression, {"bias": False}, (5,), 2),
}
OPTIMISERS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
    "prox": {"proximal_mu": 0.3},
    "clip": {"clip_norm": 0.2, "momentum": 0.5},
    # A bias before a BatchNorm has a gradient of rounding errors, which Adam divides by epsilon.
    "adam": {"optimizer": "adam", "learning_rate": 0.01, "epsilon": 1e-4, "weight_decay": 0.1},
    "adamw": {
        "optimizer": "adamw",
        "learning_rate": 0.01,
        "epsilon": 1e-4,
        "betas": (0.8, 0.9),
        "weight_decay": 0.1,
    },
}


def make_data(shape, n_classes, sizes, seed=0):
    rng = stream(seed, "engine-data")
    n = sum(sizes)
    if shape == TEXT:
        x, y = (rng.integers(n_classes, size=(n, *shape)) for _ in range(2))
    else:
        x = rng.standard_normal((n, *shape))
        y = rng.integers(n_classes, size=n) if n_classes else rng.standard_normal(n)
    parts = np.split(np.arange(n), np.cumsum(sizes)[:-1])
    return federate(Dataset("random", x, y, x[:5], y[:5], n_classes), parts)


def make_trainer(family, data, *, dtype=torch.float64, **arguments):
    factory, more, shape, n_classes = FAMILIES[family]
    module = build_model(factory, shape, n_classes, seed=1, dtype=dtype, **more)
    return module, Trainer(module, data, seed=5, **arguments)


def train_all(trainer, config, **more):
    k = trainer.data.n_devices
    base = trainer.initial()[None]
    return trainer.train(base, np.zeros(k, int), np.arange(k), np.full(k, 3), config, **more)


def plain_loop(trainer, module, device, config, control=None):
    """Train one device as anybody would with torch alone."""
    data, module = trainer.data, copy.deepcopy(module).train()
    params = list(module.parameters())
    dtype, start = params[0].dtype, [p.detach().clone() for p in params]
    sgd = {"momentum": config.momentum, "nesterov": config.nesterov}
    make, more = {
        "sgd": (torch.optim.SGD, sgd),
        "adam": (torch.optim.Adam, {"betas": config.betas, "eps": config.epsilon}),
        "adamw": (
            torch.optim.AdamW,
            {"betas": config.betas, "eps": config.epsilon, "weight_decay": config.weight_decay},
        ),
    }[config.optimizer]
    optimizer = make(params, lr=config.learning_rate, **more)
    one, size = np.array([device]), data.size[[device]]
    steps = config.steps_of(size, seed=5, rounds=np.array([3]), devices=one)
    where = data.start[one], size, config.batch_of(size), steps
    made = make_batches(5, np.array([3]), one, *where, drop_last=config.drop_last)
    per_sample, losses = trainer.stack.loss.per_sample, []
    for t, count in enumerate(made.count):
        rows = torch.from_numpy(made.index[t * made.width : t * made.width + count])
        x = data.x[rows]
        loss = per_sample(module(x.to(dtype) if x.is_floating_point() else x), data.y[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p, p0 in zip(params, start, strict=True):
                if config.optimizer != "adamw":
                    p.grad += config.weight_decay * p
                p.grad += config.proximal_mu * (p - p0)
        if control is not None:
            for name, p in module.named_parameters():
                p.grad += control[trainer.layout.columns(name)].view(p.shape)
        if config.clip_norm:
            nn.utils.clip_grad_norm_(params, config.clip_norm)
        optimizer.step()
    flat = torch.cat([t.reshape(-1).to(dtype) for t in module.state_dict().values()])
    return flat, float(np.mean(losses))


def assert_equal_to_plain_loop(family, config, sizes, engines, chunks, control_seed=None):
    shape, n_classes = FAMILIES[family][2:]
    data = make_data(shape, n_classes, sizes)
    expected = None
    for engine in engines:
        for chunk in chunks:
            module, trainer = make_trainer(family, data, engine=engine, chunk=chunk)
            control = None
            if control_seed is not None:
                drawn = stream(control_seed, "control").standard_normal(
                    (len(sizes), trainer.layout.size)
                )
                control = torch.from_numpy(0.1 * drawn)
            result = train_all(trainer, config, terms=LocalTerms(control=control))
            if expected is None:
                expected = [
                    plain_loop(trainer, module, i, config, None if control is None else control[i])
                    for i in range(len(sizes))
                ]
            for i, (flat, loss) in enumerate(expected):
                limit = 1e-8 if family == "batch norm" else 1e-10
                assert (result.params[i] - flat).abs().max() < limit, (engine, chunk, i)
                assert abs(result.loss[i] - loss) < limit


LINEAR = ("softmax", "mlp", "tanh", "regression", "logistic")


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    optimiser=st.sampled_from(sorted(OPTIMISERS)),
    sizes=st.lists(st.integers(1, 13), min_size=1, max_size=6),
    batch_size=st.sampled_from([0, 1, 3, 5]),
    drop_last=st.booleans(),
    epochs=st.integers(1, 2),
    steps=st.sampled_from([None, 4]),
    chunk=st.sampled_from([1, 3, 10]),
    control=st.booleans(),
)
def test_batched_training_equals_the_plain_loop(
    family, optimiser, sizes, batch_size, drop_last, epochs, steps, chunk, control
):
    if family == "batch norm":
        # Of two samples that nearly coincide in a feature, the normalised values are ±1 and their
        # derivative is a difference of rounding errors times 1 / sqrt(epsilon): three or more.
        batch_size, sizes = 5, [n + 3 for n in sizes]
        sizes = [n + 2 * (n % 5 in (1, 2) and not drop_last) for n in sizes]
    config = LocalConfig(
        **{"learning_rate": 0.1, **OPTIMISERS[optimiser]},
        batch_size=batch_size,
        drop_last=drop_last,
        local_epochs=epochs,
        local_steps=steps,
    )
    engine = "linear" if family in LINEAR else "vmap"
    assert_equal_to_plain_loop(family, config, sizes, [engine], [chunk], 4 if control else None)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_every_engine_optimiser_and_family_equals_the_plain_loop(family, optimiser):
    config = LocalConfig(
        **{"learning_rate": 0.1, **OPTIMISERS[optimiser]}, batch_size=5, local_epochs=2
    )
    engines = ["vmap", "loop"] + ["linear"] * (family in LINEAR)
    sizes = [12, 3, 9, 20, 5, 7, 14, 2, 8, 10]
    assert_equal_to_plain_loop(family, config, sizes, engines, [1, 7, None], control_seed=4)


@pytest.mark.parametrize("family", ["softmax", "cnn", "batch norm", "lstm"])
def test_the_loop_engine_is_the_plain_loop(family):
    config = LocalConfig(batch_size=5, momentum=0.9, local_epochs=2)
    assert_equal_to_plain_loop(family, config, [12, 3, 9], ["loop"], [None])


class DropNet(NormNet):
    def __init__(self, input_shape, n_classes):
        super().__init__(input_shape, n_classes, p=0.4)


DROPOUT = {
    "linear": lambda: build_model(m.mlp, IMAGE, 4, seed=1, hidden=(9, 7), dropout=0.5),
    "channels": lambda: build_model(DropNet, IMAGE, 4, seed=1),
}


@pytest.mark.parametrize("kind", DROPOUT)
def test_dropout_does_not_depend_on_chunk_engine_or_company(kind):
    data = make_data(IMAGE, 4, [12, 3, 9, 20, 5, 7])
    module = DROPOUT[kind]().double()
    config = LocalConfig(batch_size=5, local_epochs=2)
    reference = train_all(Trainer(module, data, seed=5, engine="loop"), config)
    engines = ["vmap", *["linear"] * (kind == "linear")]
    for engine in engines:
        for chunk in (1, 4, 6):
            trainer = Trainer(module, data, seed=5, engine=engine, chunk=chunk)
            result = train_all(trainer, config)
            assert (result.params - reference.params).abs().max() < 1e-10
    alone = trainer.train(
        trainer.initial()[None], np.zeros(1, int), np.array([3]), np.array([3]), config
    )
    assert (alone.params[0] - reference.params[3]).abs().max() < 1e-10
    for layer in module.modules():
        if hasattr(layer, "p"):
            layer.p = 0.0
    still = Trainer(module, data, seed=5)
    assert (train_all(still, config).params - reference.params).abs().max() > 1e-3


def test_dropout_keeps_the_right_share_and_draws_anew():
    key = torch.tensor([3, 4])
    kept = keyed_mask(key, 1, (200, 500), 0.3)
    assert kept.shape == (2, 200, 500)
    assert abs(kept.double().mean().item() - 0.7) < 0.005
    assert 0.55 < (kept[0] == kept[1]).double().mean().item() < 0.61
    other = keyed_mask(key, 2, (200, 500), 0.3)
    assert 0.55 < (kept == other).double().mean().item() < 0.61
    assert torch.equal(keyed_mask(key[1], 1, (100, 500), 0.3), kept[1, :100])


def test_batch_norm_moves_its_buffers_and_evaluation_uses_them():
    data = make_data(IMAGE, 4, [12, 6, 9])
    _, trainer = make_trainer("batch norm", data)
    result = train_all(trainer, LocalConfig(batch_size=6, local_epochs=2))
    views = trainer.layout.views(result.params)
    assert views["norm1.num_batches_tracked"].tolist() == [4, 2, 4]
    assert views["norm1.num_batches_tracked"].dtype == torch.int64
    assert (views["norm1.running_mean"].abs().amax(1) > 0).all()
    assert list(views) == list(FAMILIES["batch norm"][0](IMAGE, 4).state_dict())
    loss, _ = trainer.evaluate(result.params, data.x_test, data.y_test)
    changed = result.params.clone()
    changed[:, trainer.layout.columns("norm1.running_var")] *= 4
    other, _ = trainer.evaluate(changed, data.x_test, data.y_test)
    assert np.abs(loss - other).min() > 1e-4
    gradient = train_all(trainer, LocalConfig(batch_size=6, mode="gradient"))
    assert not gradient.params[:, trainer.layout.columns("norm1.running_mean")].any()


def test_a_batch_of_one_sample_with_batch_norm_is_refused():
    data = make_data(IMAGE, 4, [12, 7])
    _, trainer = make_trainer("batch norm", data)
    with pytest.raises(ScenarioError, match="whose variance BatchNorm1d cannot take"):
        train_all(trainer, LocalConfig(batch_size=6))
    result = train_all(trainer, LocalConfig(batch_size=6, drop_last=True))
    assert result.steps.tolist() == [2, 1]


def test_learning_rate_follows_the_round_of_each_device():
    data = make_data(IMAGE, 4, [12, 12, 12])
    step = schedules.StepDecay(every=2, factor=0.5)
    for family in ("softmax", "cnn"):
        for optimiser in ({}, {"momentum": 0.5}, {"optimizer": "adamw", "weight_decay": 0.1}):
            _, trainer = make_trainer(family, data)
            config = LocalConfig(batch_size=5, learning_rate=0.2, schedule=step, **optimiser)
            base, rows = trainer.initial()[None], np.zeros(3, int)
            mixed = trainer.train(base, rows, np.arange(3), np.array([1, 3, 5]), config)
            for i, rate in enumerate([0.2, 0.1, 0.05]):
                fixed = LocalConfig(batch_size=5, learning_rate=rate, **optimiser)
                alone = trainer.train(base, rows[:1], np.array([i]), np.array([1 + 2 * i]), fixed)
                assert (mixed.params[i] - alone.params[0]).abs().max() < 1e-12


def test_schedules_are_their_formulas():
    rounds = np.arange(1, 7)
    assert schedules.StepDecay(2, 0.1)(rounds).tolist() == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert schedules.Exponential(0.5)(rounds).tolist() == [2.0**-i for i in range(6)]
    assert schedules.InverseSqrt()(np.array([1, 4, 9])).tolist() == pytest.approx([1, 0.5, 1 / 3])
    cosine = schedules.Cosine(rounds=6, floor=0.1, warmup=1)(rounds)
    assert cosine[[0, 1]].tolist() == [1, 1]
    assert cosine[-1] == pytest.approx(0.1)
    assert schedules.Cosine(rounds=6)(np.array([9])) == pytest.approx(0)
    assert schedules.Cosine(rounds=10, warmup=4)(rounds)[:4].tolist() == [0.25, 0.5, 0.75, 1]
    for wrong in (lambda: schedules.StepDecay(0), lambda: schedules.Cosine(3, warmup=3)):
        with pytest.raises(ScenarioError, match="not above 0"):
            wrong()


def test_local_steps_can_be_drawn_for_each_device_and_round():
    data = make_data(IMAGE, 4, [9] * 40)
    _, trainer = make_trainer("softmax", data)
    config = LocalConfig(batch_size=4, local_steps=(2, 5))
    result = train_all(trainer, config)
    assert set(result.steps.tolist()) == {2, 3, 4, 5}
    steps, samples = trainer.workload(np.arange(40), np.full(40, 3), config)
    assert np.array_equal(steps, result.steps)
    assert samples.tolist() == [{2: 8, 3: 9, 4: 13, 5: 17}[s] for s in steps]
    again, _ = trainer.workload(np.array([7]), np.array([3]), config)
    assert again == steps[7]
    later, _ = trainer.workload(np.arange(40), np.full(40, 4), config)
    assert not np.array_equal(later, steps)


def test_workload_counts_the_samples_gone_through():
    data = make_data(IMAGE, 4, [9, 12, 3])
    _, trainer = make_trainer("softmax", data)
    where = np.arange(3), np.ones(3, int)
    for config, steps, samples in [
        (LocalConfig(batch_size=5, local_epochs=2), [4, 6, 2], [18, 24, 6]),
        (LocalConfig(batch_size=5, drop_last=True), [1, 2, 1], [5, 10, 3]),
        (LocalConfig(batch_size=0, local_epochs=3), [3, 3, 3], [27, 36, 9]),
        (LocalConfig(batch_size=5, mode="gradient"), [1, 1, 1], [5, 5, 3]),
    ]:
        found = trainer.workload(*where, config)
        assert [f.tolist() for f in found] == [steps, samples]
        assert train_all(trainer, config).steps.tolist() == steps


def distil(outputs, x, y, rows):
    """Mean squared difference to a linear peer's logits."""
    peer = x.flatten(1) @ rows["weight"].T
    return rows["penalty"] * (outputs - peer).square().mean(-1)


@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
def test_an_extra_loss_sees_each_devices_own_rows(engine):
    data = make_data(IMAGE, 4, [12, 7, 9])
    _, trainer = make_trainer("softmax", data, engine=engine)
    config = LocalConfig(batch_size=5, learning_rate=0.1, local_steps=300)
    peers = torch.from_numpy(stream(1, "peer").standard_normal((3, 4, 36)))
    penalty = torch.tensor([100.0, 100.0, 0.0], dtype=torch.float64) / 100
    terms = LocalTerms(extra_loss=distil, rows={"weight": peers, "penalty": penalty})
    result = train_all(trainer, config, terms=terms)
    plain = train_all(trainer, config)
    assert (result.params[2] - plain.params[2]).abs().max() < 1e-10
    weights = trainer.layout.views(result.params)["fc1.weight"]
    before = trainer.layout.views(trainer.initial()[None])["fc1.weight"]
    far, near = ((w[:2] - peers[:2]).norm(dim=(1, 2)) for w in (before.expand(3, -1, -1), weights))
    assert (near < 0.97 * far).all()
    _, loop = make_trainer("softmax", data, engine="loop")
    assert (result.params - train_all(loop, config, terms=terms).params).abs().max() < 1e-8


@pytest.mark.parametrize("family", ["mlp", "cnn"])
def test_a_proximal_term_can_pull_to_another_center(family):
    data = make_data(IMAGE, 4, [12, 7, 9])
    config = LocalConfig(batch_size=5, learning_rate=0.1, proximal_mu=2.0, local_steps=100)
    results = []
    for engine in ("auto", "loop"):
        _, trainer = make_trainer(family, data, engine=engine)
        center = torch.full((3, trainer.layout.size), 0.5, dtype=torch.float64)
        results.append(train_all(trainer, config, terms=LocalTerms(center=center)).params)
    assert (results[0] - results[1]).abs().max() < 1e-10
    assert (results[0] - 0.5).abs().mean() < 0.2


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_reduced_precision_is_near_and_weights_keep_their_type(engine):
    data = make_data(IMAGE, 4, [12, 7, 9])
    for family in ("mlp", "cnn", "batch norm"):
        config = LocalConfig(batch_size=6 if family == "batch norm" else 5, drop_last=True)
        exact = train_all(make_trainer(family, data, dtype=torch.float32)[1], config)
        _, trainer = make_trainer(
            family, data, dtype=torch.float32, engine=engine, precision="bfloat16"
        )
        rough = train_all(trainer, config)
        assert rough.params.dtype == torch.float32
        error = (rough.params - exact.params).abs().max().item()
        assert 1e-6 < error < 0.02


@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
def test_bfloat16_models_train(engine):
    data = make_data(IMAGE, 4, [12, 7, 9])
    _, trainer = make_trainer("mlp", data, dtype=torch.bfloat16, engine=engine)
    result = train_all(trainer, LocalConfig(batch_size=5, local_epochs=20))
    assert result.params.dtype == torch.bfloat16
    before, _ = trainer.evaluate(trainer.initial()[None], data.x, data.y)
    after, _, _ = trainer.evaluate_devices(result.params, np.arange(3), np.arange(3))
    assert (after < 0.8 * before).all()


def test_other_random_modules_are_looped_reproducibly():
    class Noisy(nn.Module):
        def __init__(self, input_shape, n_classes):
            super().__init__()
            self.fc = nn.Linear(36, n_classes)

        def forward(self, x):
            return self.fc(x.flatten(1) + torch.randn(1))

    data = make_data(IMAGE, 4, [12, 7, 9])
    module = build_model(Noisy, IMAGE, 4, seed=1).double()
    results = []
    for _ in range(2):
        torch.manual_seed(len(results))
        before = torch.random.get_rng_state()
        trainer = Trainer(module, data, seed=5)
        with pytest.warns(RuntimeWarning, match="Noisy cannot be mapped over devices"):
            results.append(train_all(trainer, LocalConfig(batch_size=5)).params)
        assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(*results)
    alone = trainer.train(
        trainer.initial()[None],
        np.zeros(1, int),
        np.array([1]),
        np.array([3]),
        LocalConfig(batch_size=5),
    )
    assert torch.equal(alone.params[0], results[0][1])


def test_a_call_for_nobody_gives_no_models():
    _, trainer = make_trainer("cnn", make_data(IMAGE, 4, [5, 6]))
    none = np.zeros(0, int)
    result = trainer.train(trainer.initial()[None], none, none, none, LocalConfig())
    assert result.params.shape == (0, trainer.layout.size)
    assert result.loss.shape == result.steps.shape == (0,)


def test_large_models_are_looped_on_a_processor_and_small_ones_mapped(recwarn):
    data = make_data(IMAGE, 4, [5, 6])
    for family, is_mapped in (("cnn", True), ("lstm", False), ("mlp", None)):
        shape, n_classes = FAMILIES[family][2:]
        _, trainer = make_trainer(family, make_data(shape, n_classes, [5, 6]))
        used = engines_used(trainer)
        assert used == {True: {"VmapKernel"}, False: set(), None: {"LinearKernel"}}[is_mapped]
    wide = build_model(m.cnn, IMAGE, 4, seed=1, channels=(64, 64))
    assert engines_used(Trainer(wide, data, seed=5)) == set()
    assert engines_used(Trainer(wide, data, seed=5, engine="vmap")) == {"VmapKernel"}
    assert not recwarn.list


def engines_used(trainer):
    """Return the kernels that a call of training went through; none is the loop."""
    used, run = set(), trainer._run_stacked

    def note(kernel, *arguments):
        used.add(type(kernel).__name__)
        return run(kernel, *arguments)

    trainer._run_stacked = note
    train_all(trainer, LocalConfig(batch_size=3))
    return used


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_gives_the_processors_result(family):
    data = make_data(*FAMILIES[family][2:], [12, 3, 9, 20, 5, 7])
    config = LocalConfig(batch_size=5, momentum=0.9, drop_last=family == "batch norm")
    results = [
        train_all(make_trainer(family, data, dtype=torch.float32, device=device)[1], config)
        for device in ("cpu", "cuda")
    ]
    assert (results[0].params - results[1].params.cpu()).abs().max() < 1e-4
    assert np.abs(results[0].loss - results[1].loss).max() < 1e-4


@pytest.mark.gpu
def test_dropout_masks_are_the_same_on_a_gpu():
    key = torch.tensor([3, 4])
    there = keyed_mask(key.cuda(), 1, (20, 50), 0.3)
    assert torch.equal(there.cpu(), keyed_mask(key, 1, (20, 50), 0.3))
