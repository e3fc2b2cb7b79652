"""Small models: factories `(input_shape, n_classes, **arguments) -> nn.Module`.

A factory may set the attribute `task_loss` on its module: the name of the loss it is made for
(default: cross-entropy, or the squared error if there are no classes).
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import Parameter, signature
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name)
from torch import Tensor, nn

from fedsim.errors import ScenarioError
from fedsim.streams import stream

__all__ = [
    "build_model",
    "char_lstm",
    "char_transformer",
    "cifar_lenet",
    "cnn",
    "fashion_cnn",
    "lenet5",
    "linear_regression",
    "logistic_regression",
    "mlp",
    "mnist_cnn",
    "quadratic",
    "resnet8",
    "resnet20",
    "softmax",
]

Shape = tuple[int, ...]
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_Module = TypeVar("_Module", bound=nn.Module)


def build_model(
    factory: Callable[..., nn.Module],
    input_shape: Shape,
    n_classes: int,
    *,
    seed: int,
    dtype: torch.dtype | str | None = None,
    **arguments: Any,
) -> nn.Module:
    """Return the factory's module with initial weights that depend on the seed alone.

    Parameters
    ----------
    factory : callable
        One of this module's functions, or any `nn.Module` class or function that makes one. It
        gets `input_shape` and `n_classes` if it has parameters of these names, or (by position)
        if its first two parameters have neither a default nor a value in `arguments`.
    input_shape : tuple of int
        Shape of one sample.
    n_classes : int
    seed : int
    dtype : torch.dtype or str, optional
        Given to a factory that has a parameter of this name; else the type that the module is
        converted to. Default: what the factory made.

    Returns
    -------
    nn.Module
        Torch's global generator is left as it was.

    Raises
    ------
    ScenarioError
        If the factory makes something else, or raises a `TypeError` or `ValueError`.
    """
    name = getattr(factory, "__qualname__", repr(factory))
    offered = {"input_shape": input_shape, "n_classes": n_classes}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(stream(seed, "model").integers(2**62)))
        try:
            if dtype is not None and "dtype" in signature(factory).parameters:
                arguments["dtype"], dtype = dtype, None
            positional, named = _wanted(factory, offered, arguments)
            module: object = factory(*positional, **named, **arguments)
        except (TypeError, ValueError) as error:
            raise ScenarioError(f"model.kind: {name} raised {error!r}") from error
    if not isinstance(module, nn.Module):
        raise ScenarioError(f"model.kind: {name} makes a {type(module).__name__}, no nn.Module")
    return module if dtype is None else module.to(_dtype(dtype))


def _wanted(
    factory: Callable[..., object], offered: Mapping[str, Any], given: Collection[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return which of the offered values a factory takes: by position, and by name."""
    takes = signature(factory).parameters
    named = {key: value for key, value in offered.items() if key in takes}
    if named:
        return (), named
    first = [each for each in takes.values() if each.kind in _POSITIONAL][: len(offered)]
    is_open = [each.default is each.empty and each.name not in given for each in first]
    return (tuple(offered.values()), {}) if sum(is_open) == len(offered) else ((), {})


def softmax(input_shape: Shape, n_classes: int) -> nn.Sequential:
    """Return softmax regression: one linear layer, `(features + 1) * n_classes` parameters."""
    return mlp(input_shape, n_classes, hidden=())


def mlp(
    input_shape: Shape, n_classes: int, *, hidden: Sequence[int] = (128,), dropout: float = 0.0
) -> nn.Sequential:
    """Return a multilayer perceptron with ReLU between its layers.

    Parameters
    ----------
    hidden : sequence of int
        Widths of the hidden layers.
    dropout : float
        Share of each hidden layer's outputs that is dropped in training.
    """
    sizes = [math.prod(input_shape), *hidden, max(n_classes, 1)]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (n_in, n_out) in enumerate(pairwise(sizes), 1):
        if i > 1:
            layers[f"relu{i - 1}"] = nn.ReLU()
            if dropout:
                layers[f"dropout{i - 1}"] = nn.Dropout(dropout)
        layers[f"fc{i}"] = nn.Linear(n_in, n_out)
    return nn.Sequential(layers)


def linear_regression(
    input_shape: Shape, n_classes: int, *, bias: bool = True, dtype: str = "float64"
) -> nn.Linear:
    """Return linear regression from zero, for the squared error.

    Parameters
    ----------
    bias : bool
        False if the data carry a column of ones.
    dtype : str
        Name of a torch type.
    """
    module = nn.Linear(math.prod(input_shape), max(n_classes, 1), bias, dtype=_dtype(dtype))
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return _made_for(module, "squared_error")


def logistic_regression(
    input_shape: Shape, n_classes: int = 2, *, bias: bool = True, dtype: str = "float64"
) -> nn.Linear:
    """Return logistic regression with one output, from zero, for two classes.

    Parameters
    ----------
    bias, dtype
        See `linear_regression`.

    Raises
    ------
    ScenarioError
        If there are not two classes.
    """
    if n_classes != 2:
        raise ScenarioError(f"model: logistic_regression needs 2 classes, not {n_classes}")
    return _made_for(linear_regression(input_shape, 1, bias=bias, dtype=dtype), "logistic")


class _Quadratic(nn.Module):
    """Value of w·H w / 2 - b·w for each sample (H, b)."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(dimension, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return the values, shape (n,), for x of shape (n, d, d + 1): H and b side by side."""
        return x[..., :-1] @ self.w @ self.w / 2 - x[..., -1] @ self.w


def quadratic(input_shape: Shape, n_classes: int = 0) -> nn.Module:
    """Return the model of the quadratic problems (`synthetic.load_quadratic`), in float64 from 0.

    Raises
    ------
    ScenarioError
        If a sample is not a matrix of shape (d, d + 1).
    """
    if len(input_shape) != 2 or input_shape[1] != input_shape[0] + 1:
        raise ScenarioError(f"model: quadratic needs samples (d, d + 1), not {input_shape}")
    return _made_for(_Quadratic(input_shape[0]), "output")


_LENET5 = {
    # channels, padding of each convolution, hidden widths
    "classic": ((6, 16), (2, 0), (120, 84)),
    "caffe": ((20, 50), (0, 0), (500,)),
    "tensorflow": ((32, 64), (2, 2), (1024,)),
}


def lenet5(
    input_shape: Shape,
    n_classes: int,
    *,
    variant: Literal["classic", "caffe", "tensorflow"] = "classic",
) -> nn.Sequential:
    """Return LeNet-5, with ReLU and max-pooling, in one of three variants that bear its name.

    Parameters
    ----------
    variant : {"classic", "caffe", "tensorflow"}
        61,706, 431,080 and 3,274,634 parameters for 28x28 images and 10 classes.

    References
    ----------
    .. [1] LeCun et al., "Gradient-based learning applied to document recognition", 1998.
    """
    if variant not in _LENET5:
        raise ScenarioError(f"model.variant: {variant!r} is not one of {', '.join(_LENET5)}")
    channels, padding, hidden = _LENET5[variant]
    return _convolutional(input_shape, n_classes, channels, 5, padding, hidden, nn.ReLU)


def cnn(
    input_shape: Shape,
    n_classes: int,
    *,
    channels: Sequence[int] = (16, 32),
    kernel_size: int = 5,
    hidden: Sequence[int] = (),
) -> nn.Sequential:
    """Return a small convolutional net: convolution, ReLU, halving max-pool; then linear layers.

    Parameters
    ----------
    channels : sequence of int
        Of each convolution, which keeps the image's size.
    kernel_size : int
        Odd.
    hidden : sequence of int
        Widths of the linear layers before the last.
    """
    padding = [kernel_size // 2] * len(channels)
    return _convolutional(input_shape, n_classes, channels, kernel_size, padding, hidden, nn.ReLU)


def cifar_lenet(input_shape: Shape, n_classes: int) -> nn.Sequential:
    """Return LeNet with tanh: 62,006 parameters for 32x32 colour images and 10 classes.

    References
    ----------
    .. [1] Philippenko, Dieuleveut, "Preserved central model for faster bidirectional compression
       in distributed settings", NeurIPS 2021 (CIFAR-10 experiment).
    """
    return _convolutional(input_shape, n_classes, (6, 16), 5, (0, 0), (120, 84), nn.Tanh)


def _convolutional(
    input_shape: Shape,
    n_classes: int,
    channels: Sequence[int],
    kernel_size: int,
    padding: Sequence[int],
    hidden: Sequence[int],
    activation: type[nn.Module],
) -> nn.Sequential:
    n_in, height, width = _image(input_shape)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (n_out, pad) in enumerate(zip(channels, padding, strict=True), 1):
        layers[f"conv{i}"] = nn.Conv2d(n_in, n_out, kernel_size, padding=pad)
        layers[f"conv{i}_activation"] = activation()
        layers[f"pool{i}"] = nn.MaxPool2d(2)
        n_in = n_out
        height, width = ((s + 2 * pad - kernel_size + 1) // 2 for s in (height, width))
    if min(height, width) < 1:
        raise ScenarioError(f"model: images of shape {input_shape} are too small for this net")
    layers["flatten"] = nn.Flatten()
    sizes = [n_in * height * width, *hidden, n_classes]
    for i, (size, following) in enumerate(pairwise(sizes), 1):
        if i > 1:
            layers[f"fc{i - 1}_activation"] = activation()
        layers[f"fc{i}"] = nn.Linear(size, following)
    return nn.Sequential(layers)


def mnist_cnn(input_shape: Shape, n_classes: int) -> nn.Sequential:
    """Return the net of the MNIST and FEMNIST compression experiments: 21,840 parameters.

    References
    ----------
    .. [1] Philippenko, Dieuleveut, NeurIPS 2021 (see `cifar_lenet`).
    """
    n_in, height, width = _image(input_shape)
    height, width = (((s - 4) // 2 - 4) // 2 for s in (height, width))
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(n_in, 10, 5),
            pool1=nn.MaxPool2d(2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(10, 20, 5),
            dropout2=nn.Dropout2d(),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(20 * height * width, 50),
            relu3=nn.ReLU(),
            dropout3=nn.Dropout(),
            fc2=nn.Linear(50, n_classes),
        )
    )


def fashion_cnn(input_shape: Shape, n_classes: int) -> nn.Sequential:
    """Return the net of the Fashion-MNIST compression experiment: 421,642 parameters.

    References
    ----------
    .. [1] Philippenko, Dieuleveut, NeurIPS 2021 (see `cifar_lenet`).
    """
    n_in, height, width = _image(input_shape)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(n_in, 32, 3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            dropout=nn.Dropout(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * (height // 4) * (width // 4), 128),
            relu3=nn.ReLU(),
            fc2=nn.Linear(128, n_classes),
        )
    )


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters."""

    def __init__(self, n_in: int, n_out: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stride, self.extra = (2 if n_out != n_in else 1), n_out - n_in
        self.conv1 = nn.Conv2d(n_in, n_out, 3, self.stride, 1, bias=False)
        self.norm1 = norm(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.norm2 = norm(n_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.extra:
            before = self.extra // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.extra - before))
        return F.relu(h + x)


class _ResNet(nn.Module):
    def __init__(
        self, input_shape: Shape, n_classes: int, per_stage: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(_image(input_shape)[0], 16, 3, 1, 1, bias=False)
        self.norm = norm(16)
        widths = [16] + [width for width in (16, 32, 64) for _ in range(per_stage)]
        self.blocks = nn.Sequential(*(_Block(a, b, norm) for a, b in pairwise(widths)))
        self.fc = nn.Linear(64, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        h = self.blocks(F.relu(self.norm(self.conv(x))))
        logits: Tensor = self.fc(h.mean((2, 3)))
        return logits


def resnet8(
    input_shape: Shape,
    n_classes: int,
    *,
    norm: Literal["group", "batch"] = "group",
    groups: int = 8,
) -> nn.Module:
    """Return ResNet-8: three stages of one block, 16 to 64 channels, shortcuts of type A.

    Parameters
    ----------
    norm : {"group", "batch"}
        GroupNorm has no running statistics, which is what non-IID devices need.
    groups : int
        Of GroupNorm; divides 16.

    References
    ----------
    .. [1] He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2.
    .. [2] Hsieh et al., "The non-IID data quagmire of decentralized machine learning", ICML 2020
       (GroupNorm instead of BatchNorm).
    """
    return _ResNet(input_shape, n_classes, 1, _norm(norm, groups))


def resnet20(
    input_shape: Shape,
    n_classes: int,
    *,
    norm: Literal["group", "batch"] = "group",
    groups: int = 8,
) -> nn.Module:
    """Return ResNet-20: as `resnet8` with three blocks a stage, 269,722 parameters (CIFAR-10)."""
    return _ResNet(input_shape, n_classes, 3, _norm(norm, groups))


def _norm(kind: str, groups: int) -> Callable[[int], nn.Module]:
    if kind not in ("group", "batch"):
        raise ScenarioError(f"model.norm: {kind!r} is not one of group, batch")
    if kind == "group" and (groups < 1 or 16 % groups):
        raise ScenarioError(f"model.groups: {groups} does not divide 16")
    return nn.BatchNorm2d if kind == "batch" else lambda width: nn.GroupNorm(groups, width)


class _CharLSTM(nn.Module):
    def __init__(self, n_symbols: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_symbols, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.fc = nn.Linear(hidden, n_symbols)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next symbol's logits, (n, length, n_symbols), for symbols (n, length)."""
        logits: Tensor = self.fc(self.lstm(self.embedding(x))[0])
        return logits


def char_lstm(
    input_shape: Shape, n_classes: int, *, embedding: int = 8, hidden: int = 256, layers: int = 2
) -> nn.Module:
    """Return an LSTM that predicts the next character at every position.

    References
    ----------
    .. [1] McMahan et al., "Communication-efficient learning of deep networks from decentralized
       data", AISTATS 2017, section 3 (8, 256, 2).
    """
    _sequence(input_shape)
    return _CharLSTM(n_classes, embedding, hidden, layers)


class _Attention(nn.Module):
    """Causal self-attention, written out so that it can be mapped over devices."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended values, shape of x: (n, length, width)."""
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        attended = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        mixed: Tensor = self.out(attended.transpose(1, 2).reshape(n, length, width))
        return mixed


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, shape of x."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        h: Tensor = self.contract(F.gelu(self.expand(self.norm2(x))))
        out: Tensor = x + self.dropout(h)
        return out


class _CharTransformer(nn.Module):
    def __init__(
        self, length: int, n_symbols: int, width: int, heads: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.symbols = nn.Embedding(n_symbols, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.Sequential(
            *(_TransformerBlock(width, heads, dropout) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, n_symbols)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next symbol's logits, (n, length, n_symbols), for symbols (n, length)."""
        h = self.symbols(x) + self.positions[: x.shape[1]]
        logits: Tensor = self.fc(self.norm(self.blocks(h)))
        return logits


def char_transformer(
    input_shape: Shape,
    n_classes: int,
    *,
    width: int = 64,
    heads: int = 2,
    layers: int = 2,
    dropout: float = 0.0,
) -> nn.Module:
    """Return a small causal transformer that predicts the next character at every position.

    Raises
    ------
    ScenarioError
        If `heads` does not divide `width`.
    """
    if heads < 1 or width % heads:
        raise ScenarioError(f"model.heads: {heads} does not divide width: {width}")
    return _CharTransformer(_sequence(input_shape), n_classes, width, heads, layers, dropout)


def _image(input_shape: Shape) -> tuple[int, int, int]:
    if len(input_shape) != 3:
        raise ScenarioError(f"model: needs images (channels, height, width), not {input_shape}")
    channels, height, width = input_shape
    return channels, height, width


def _sequence(input_shape: Shape) -> int:
    if len(input_shape) != 1:
        raise ScenarioError(f"model: needs sequences of symbols (length,), not {input_shape}")
    return input_shape[0]


def _dtype(name: torch.dtype | str) -> torch.dtype:
    found = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ScenarioError(f"model.dtype: {name!r} is not a floating type such as float64")
    return found


def _made_for(module: _Module, loss: str) -> _Module:
    module.task_loss = loss  # type: ignore[assignment]
    return module
