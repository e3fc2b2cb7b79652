"""Parameters and operations against closed forms and an independent counter."""

import math

import pytest
import torch
from torch import nn

from fedsim.errors import ScenarioError
from fedsim.learning import models as m
from fedsim.learning.cost import model_cost
from fedsim.learning.models import build_model

torch.set_num_threads(1)
MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


def counted_flops(module, x):
    """Count by shapes of layers: an oracle that shares nothing with torch's dispatch counter."""
    total = [0]

    def count(layer, inputs, output):
        if isinstance(layer, nn.Linear):
            total[0] += 2 * layer.in_features * output.numel()
        elif isinstance(layer, nn.Conv2d):
            k = layer.kernel_size[0] * layer.kernel_size[1]
            total[0] += 2 * k * layer.in_channels // layer.groups * output.numel()
        elif isinstance(layer, nn.LSTM):
            for i in range(layer.num_layers):
                n_in = layer.input_size if i == 0 else layer.hidden_size
                total[0] += 2 * 4 * layer.hidden_size * (n_in + layer.hidden_size) * x.shape[1]
        elif isinstance(layer, m._Attention):
            total[0] += 2 * 2 * x.shape[1] ** 2 * output.shape[-1]

    hooks = [layer.register_forward_hook(count) for layer in module.modules()]
    with torch.no_grad():
        module.eval()(x)
    for hook in hooks:
        hook.remove()
    return total[0]


CASES = [
    # factory, arguments, input shape, classes, parameters, forward operations
    (m.softmax, {}, (64,), 10, 650, 2 * 640),
    (m.mlp, {"hidden": (200,)}, (784,), 10, 159_010, 2 * (784 * 200 + 2000)),
    (m.mlp, {"hidden": (128,)}, (64,), 10, 9_610, 2 * (64 * 128 + 1280)),
    (m.lenet5, {}, MNIST, 10, 61_706, 2 * (117_600 + 240_000 + 48_000 + 10_080 + 840)),
    (m.lenet5, {"variant": "caffe"}, MNIST, 10, 431_080, 2 * (288_000 + 1_600_000 + 405_000)),
    (
        m.lenet5,
        {"variant": "tensorflow"},
        MNIST,
        10,
        3_274_634,
        2 * (627_200 + 10_035_200 + 3_221_504),
    ),
    (m.cnn, {}, MNIST, 10, 28_938, 2 * (313_600 + 2_508_800 + 15_680)),
    (m.mnist_cnn, {}, MNIST, 10, 21_840, 2 * (144_000 + 320_000 + 16_000 + 500)),
    (m.fashion_cnn, {}, MNIST, 10, 421_642, 2 * (225_792 + 3_612_672 + 401_408 + 1280)),
    (m.cifar_lenet, {}, CIFAR, 10, 62_006, 2 * (352_800 + 240_000 + 48_000 + 10_080 + 840)),
    (m.resnet20, {}, CIFAR, 10, 269_722, 2 * 40_551_040),
    (m.resnet8, {}, CIFAR, 10, 75_290, 2 * 12_239_488),
    (m.char_lstm, {}, (80,), 65, 815_945, None),
    (m.char_transformer, {}, (80,), 65, 113_601, None),
    (m.linear_regression, {}, (19,), 0, 20, 38),
    (m.logistic_regression, {}, (123,), 2, 124, 246),
    (m.quadratic, {}, (10, 11), 0, 10, None),
]


@pytest.mark.parametrize(
    ("factory", "arguments", "shape", "n_classes", "parameters", "flops"),
    CASES,
    ids=[f"{c[0].__name__}-{'-'.join(map(str, c[1].values()))}" for c in CASES],
)
def test_parameters_and_operations_are_exact(
    factory, arguments, shape, n_classes, parameters, flops
):
    module = build_model(factory, shape, n_classes, seed=1, **arguments)
    tokens = factory in (m.char_lstm, m.char_transformer)
    cost = model_cost(module, shape, tokens=tokens)
    itemsize = next(module.parameters()).element_size()
    assert cost.parameters == parameters == sum(p.numel() for p in module.parameters())
    assert cost.size_bytes == parameters * itemsize
    assert cost.training_flops == 3 * cost.forward_flops
    if flops is not None:
        assert cost.forward_flops == flops
    if factory is not m.quadratic:
        dtype = torch.int64 if tokens else next(module.parameters()).dtype
        assert counted_flops(module, torch.zeros((1, *shape), dtype=dtype)) == cost.forward_flops


def test_running_statistics_are_payload_but_no_parameters():
    module = build_model(m.resnet8, CIFAR, 10, seed=1, norm="batch")
    cost = model_cost(module, CIFAR)
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    channels = sum(norm.num_features for norm in norms)
    assert cost.parameters == 75_290
    assert cost.size_bytes == 4 * 75_290 + 2 * 4 * channels + 8 * len(norms)


def test_initial_weights_are_the_seeds_and_types_can_be_chosen():
    first, again, other = (build_model(m.mlp, (8,), 3, seed=s).fc1.weight for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    half = build_model(m.mlp, (8,), 3, seed=1, dtype=torch.bfloat16)
    assert half.fc1.weight.dtype == torch.bfloat16


def test_convex_models_start_at_zero():
    for module in (m.linear_regression((5,), 0), m.logistic_regression((5,)), m.quadratic((4, 5))):
        assert all(p.dtype == torch.float64 and not p.any() for p in module.parameters())


def test_quadratic_is_the_value_of_its_formula():
    module = m.quadratic((3, 4))
    x = torch.arange(24.0, dtype=torch.float64).view(2, 3, 4)
    module.w.data = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    w = module.w
    expected = [w @ x[i, :, :3] @ w / 2 - x[i, :, 3] @ w for i in range(2)]
    assert torch.allclose(module(x), torch.stack(expected))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: m.lenet5((784,), 10), r"needs images \(channels, height, width\), not \(784,\)"),
        (lambda: m.lenet5(MNIST, 10, variant="modern"), "'modern' is not one of classic, caffe"),
        (lambda: m.lenet5((1, 8, 8), 10), "too small"),
        (lambda: m.char_lstm(MNIST, 10), "needs sequences"),
        (lambda: m.char_transformer((8,), 10, width=10, heads=3), "does not divide width"),
        (lambda: m.resnet8(CIFAR, 10, norm="layer"), "'layer' is not one of group, batch"),
        (lambda: m.resnet8(CIFAR, 10, groups=5), "5 does not divide 16"),
        (lambda: m.logistic_regression((4,), 3), "needs 2 classes, not 3"),
        (lambda: m.linear_regression((4,), 0, dtype="int64"), "'int64' is not a floating type"),
        (lambda: m.quadratic((4, 4)), "needs samples"),
    ],
)
def test_a_model_that_cannot_be_built_says_why(make, message):
    with pytest.raises(ScenarioError, match=message):
        make()


def test_transformer_sees_no_future():
    module = build_model(m.char_transformer, (12,), 20, seed=1).eval()
    x = torch.arange(12)[None] % 20
    changed = x.clone()
    changed[0, 8:] = 3
    with torch.no_grad():
        same, different = (module(x) - module(changed)).abs().amax(-1)[0].split([8, 4])
    assert same.max() == 0
    assert different.min() > 0


def test_resnet_shortcut_keeps_the_mean_signal():
    block = m._Block(16, 32, lambda width: nn.GroupNorm(8, width))
    x = torch.rand(2, 16, 8, 8)
    nn.init.zeros_(block.norm2.weight)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert math.isclose(out[:, :8].abs().sum().item(), 0)


class Tutorial(nn.Module):
    """Takes nothing but what a scenario says."""

    def __init__(self, hidden: int = 3, *, classes: int = 2) -> None:
        super().__init__()
        self.fc = nn.Linear(hidden, classes)


def test_a_factory_gets_shape_and_classes_only_if_it_takes_them():
    assert build_model(Tutorial, (8,), 4, seed=1).fc.weight.shape == (2, 3)
    assert build_model(Tutorial, (8,), 4, seed=1, hidden=5).fc.weight.shape == (2, 5)
    by_name = build_model(lambda *, n_classes: nn.Linear(3, n_classes), (8,), 4, seed=1)
    assert by_name.weight.shape == (4, 3)
    by_place = build_model(lambda shape, n, bias=True: nn.Linear(*shape, n, bias), (8,), 4, seed=1)
    assert by_place.weight.shape == (4, 8)
    given = build_model(lambda a, b: nn.Linear(a, b), (8,), 4, seed=1, a=6, b=7)
    assert given.weight.shape == (7, 6)


@pytest.mark.parametrize("factory", [lambda: "net", dict, lambda: nn.Linear("8", 2)])
def test_a_factory_that_makes_no_module_is_an_error_at_model_kind(factory):
    with pytest.raises(ScenarioError, match=r"^model\.kind: "):
        build_model(factory, (8,), 4, seed=1)
