"""That a GPU is never waited for inside local training, and gives the processor's results.

Tensors on torch's abstract device ``meta`` have no values: whoever reads one, or mixes one with a
tensor on the processor, raises. Training that runs on it therefore neither synchronises nor leaves
anything behind on the processor. The tests marked `gpu` need a CUDA device.
"""

import numpy as np
import pytest
import torch

from fedsim.errors import ScenarioError
from fedsim.learning import memory
from fedsim.learning import trainer as trainer_module
from fedsim.learning.config import LocalConfig, LocalTerms
from fedsim.learning.models import build_model, mlp
from fedsim.learning.shares import SharedTrainer, trainer_on
from fedsim.learning.trainer import Trainer
from tests.fedsim.test_engines import FAMILIES, IMAGE, LINEAR, OPTIMISERS, make_data, train_all

torch.set_num_threads(1)
SIZES = [12, 3, 9, 20, 5, 7]


def a_trainer(family, sizes=SIZES, **options):
    factory, more, shape, n_classes = FAMILIES[family]
    module = build_model(factory, shape, n_classes, seed=1, **more)
    return Trainer(module, make_data(shape, n_classes, sizes), seed=5, **options)


def move_to_meta(trainer):
    """Let a trainer compute on the abstract device."""
    stack = trainer.stack
    stack.device = torch.device("meta")
    stack.module = stack.module.to("meta")
    stack.slots = dict(stack.module.named_parameters()) | dict(stack.module.named_buffers())
    stack.initial = stack.initial.to("meta")
    for name in ("_scale", "_shift"):
        value = getattr(stack, name)
        setattr(stack, name, None if value is None else value.to("meta"))
    return trainer


@pytest.fixture
def read(monkeypatch):
    """Note how often results are read; the values of abstract ones are zeros."""
    times = []

    def numbers(values):
        times.append(values.device.type)
        return np.zeros(len(values))

    monkeypatch.setattr(trainer_module, "_numbers", numbers)
    return times


CASES = [(family, "vmap") for family in FAMILIES] + [(family, "linear") for family in LINEAR]


# torch's abstract LSTM cannot be mapped (on a GPU it is looped); resnet has the cnn's layers.
# What torch needs for abstract tensors takes seconds to import.
ABSTRACT = [
    case
    for case in [*CASES, ("softmax", "loop"), ("cnn", "loop")]
    if case[0] not in ("lstm", "resnet")
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "engine"), ABSTRACT)
def test_local_training_reads_no_tensor_and_stays_on_its_device(family, engine, read):
    trainer = move_to_meta(a_trainer(family, [5, 3], engine=engine))
    k = 2
    for optimiser in ("clip", "adamw"):
        config = LocalConfig(
            **{"learning_rate": 0.1, **OPTIMISERS[optimiser]}, proximal_mu=0.1, batch_size=3
        )
        terms = LocalTerms(control=torch.zeros(k, trainer.layout.size))
        result = train_all(trainer, config, terms=terms)
        assert result.params.device.type == "meta"
        assert result.params.shape == (k, trainer.layout.size)
    train_all(trainer, LocalConfig(batch_size=3, mode="gradient"))
    assert read == ["meta"] * 3  # once a chunk


@pytest.mark.slow
def test_dropout_and_reduced_precision_read_no_tensor(read):
    data = make_data(IMAGE, 4, [12, 6, 9])
    for options in ({"engine": "linear"}, {"engine": "vmap", "precision": "bfloat16"}):
        module = build_model(mlp, IMAGE, 4, seed=1, hidden=(7,), dropout=0.5)
        train_all(move_to_meta(Trainer(module, data, seed=5, **options)), LocalConfig(batch_size=4))
    assert read == ["meta"] * 2


@pytest.mark.slow
def test_the_abstract_device_finds_a_read_and_a_stray_tensor(read):
    class Reads(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)) * (1.0 if x.sum().item() else 2.0)

    class Strays(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)) + torch.ones(4)

    for kind in (Reads, Strays):
        trainer = Trainer(kind(36, 4), make_data(IMAGE, 4, [5]), seed=1, engine="vmap")
        with pytest.raises(ScenarioError, match="cannot be mapped"):
            train_all(move_to_meta(trainer), LocalConfig())


def test_several_places_share_the_devices_of_a_call():
    factory, more, shape, n_classes = FAMILIES["mlp"]
    data = make_data(shape, n_classes, SIZES)
    module = build_model(factory, shape, n_classes, seed=1, dtype=torch.float64, **more)
    one = Trainer(module, data, seed=5)
    three = SharedTrainer(module, data, seed=5, places=["cpu"] * 3)
    config = LocalConfig(batch_size=5, momentum=0.9)
    expected, shared = train_all(one, config), train_all(three, config)
    assert (expected.params - shared.params).abs().max() < 1e-12
    assert np.allclose(expected.loss, shared.loss)
    seen = []
    train_all(three, config, collect=lambda rows, params: seen.extend(rows.tolist()))
    assert sorted(seen) == list(range(len(SIZES)))


def test_cuda_means_all_gpus_and_a_number_one(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        Trainer, "__init__", lambda self, module, data, *, device: made.append(device)
    )
    assert isinstance(trainer_on(None, None, device="cuda"), SharedTrainer)
    assert isinstance(trainer_on(None, None, device="auto"), SharedTrainer)
    assert not isinstance(trainer_on(None, None, device="cuda:1"), SharedTrainer)
    trainer_on(None, None, device="cpu")
    assert made == ["cuda:0", "cuda:1"] * 2 + ["cuda:1", "cpu"]


def test_results_that_cannot_fit_are_refused_before_the_start(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 8 * 10**10))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 10**8)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**8)
    gpu = torch.device("cuda:0")
    assert memory.free_bytes(gpu) == 1_200_000_000
    memory.check_room(gpu, 10**9, 5)
    with pytest.raises(ScenarioError, match=r"50 trained models need 2\.0 GB, cuda:0 has 1\.2 GB"):
        memory.check_room(gpu, 2 * 10**9, 50)
    memory.check_room(torch.device("cpu"), 10**15, 50)


def test_a_chunk_that_does_not_fit_is_halved(monkeypatch):
    trainer = a_trainer("mlp", chunk=6)
    expected = train_all(trainer, LocalConfig(batch_size=5))
    tried, run = [], trainer._run

    def crowded(kernel, work, rows):
        tried.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        return run(kernel, work, rows)

    monkeypatch.setattr(trainer, "_run", crowded)
    result = train_all(trainer, LocalConfig(batch_size=5))
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1]
    assert (result.params - expected.params).abs().max() < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize(("family", "engine"), CASES)
def test_a_gpu_gives_the_processors_models_and_scores(family, engine, optimiser):
    config = LocalConfig(
        **{"learning_rate": 0.1, **OPTIMISERS[optimiser]},
        batch_size=5,
        drop_last=family == "batch norm",
    )
    results, scores = [], []
    for device in ("cpu", "cuda"):
        trainer = a_trainer(family, engine=engine, device=device)
        results.append(train_all(trainer, config))
        data = trainer.data
        scores.append(trainer.evaluate(results[0].params, data.x_test, data.y_test))
    assert (results[0].params - results[1].params.cpu()).abs().max() < 1e-4
    assert np.abs(results[0].loss - results[1].loss).max() < 1e-4
    assert np.allclose(*[s[0] for s in scores], atol=1e-4)


@pytest.mark.gpu
def test_local_training_on_a_gpu_does_not_synchronise():
    trainer = a_trainer("mlp", engine="linear", device="cuda")
    config, seen = LocalConfig(batch_size=5, momentum=0.9), []
    train_all(trainer, config)

    def gradients(batch, plain=trainer._kernel.gradients):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return plain(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            seen.append(len(batch.x))

    trainer._kernel.gradients = gradients
    train_all(trainer, config)
    assert seen
