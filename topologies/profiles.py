"""Model profiles: the tensors of well-known networks, their exact bytes, their share of the work.

Numbers follow from layer shapes. FLOPs are those of a forward pass for one sample, two for each
multiply-add, of convolutions and matrix products; the backward pass takes twice as many.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["PROFILES", "Profile", "Tensor", "custom_profile", "profile"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One parameter tensor: its shape, and the forward FLOPs per sample that it takes part in."""

    name: str
    shape: tuple[int, ...]
    flops: float = 0.0

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Profile:
    """A model as its tensors, first layer first.

    Attributes
    ----------
    name : str
    tensors : tuple of Tensor
    itemsize : int
        Bytes of an element.
    """

    name: str
    tensors: tuple[Tensor, ...]
    itemsize: int = 4

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole model."""
        return self.parameters * self.itemsize

    @property
    def flops(self) -> float:
        """Forward FLOPs of one sample."""
        return sum(tensor.flops for tensor in self.tensors)


def custom_profile(n_bytes: int, *, name: str = "", itemsize: int = 1) -> Profile:
    """Return a model that is one tensor of so many bytes."""
    if n_bytes <= 0 or n_bytes % itemsize:
        raise ValueError(f"n_bytes = {n_bytes}: must be a positive multiple of {itemsize}")
    shown = name or f"{n_bytes} B"
    return Profile(shown, (Tensor("all", (n_bytes // itemsize,), 1.0),), itemsize)


def _conv(
    name: str, channels_in: int, channels_out: int, kernel: int, size: int, *, bias: bool = True
) -> list[Tensor]:
    """Return a square convolution's tensors; `size` is the side of what it puts out."""
    shape = (channels_out, channels_in, kernel, kernel)
    tensors = [Tensor(f"{name}.weight", shape, 2.0 * math.prod(shape) * size * size)]
    return [*tensors, Tensor(f"{name}.bias", (channels_out,))] if bias else tensors


def _linear(name: str, inputs: int, outputs: int, *, tokens: int = 1) -> list[Tensor]:
    weight = Tensor(f"{name}.weight", (outputs, inputs), 2.0 * inputs * outputs * tokens)
    return [weight, Tensor(f"{name}.bias", (outputs,))]


def _norm(name: str, size: int) -> list[Tensor]:
    return [Tensor(f"{name}.weight", (size,)), Tensor(f"{name}.bias", (size,))]


def _lenet5() -> list[Tensor]:
    return [
        *_conv("conv1", 1, 6, 5, 28),
        *_conv("conv2", 6, 16, 5, 10),
        *_linear("fc1", 16 * 5 * 5, 120),
        *_linear("fc2", 120, 84),
        *_linear("fc3", 84, 10),
    ]


def _lenet5_caffe() -> list[Tensor]:
    return [
        *_conv("conv1", 1, 20, 5, 24),
        *_conv("conv2", 20, 50, 5, 8),
        *_linear("ip1", 50 * 4 * 4, 500),
        *_linear("ip2", 500, 10),
    ]


def _lenet5_tensorflow() -> list[Tensor]:
    return [
        *_conv("conv1", 1, 32, 5, 28),
        *_conv("conv2", 32, 64, 5, 14),
        *_linear("fc1", 64 * 7 * 7, 1024),
        *_linear("fc2", 1024, 10),
    ]


def _vgg19() -> list[Tensor]:
    tensors: list[Tensor] = []
    channels, size = 3, 224
    for block, (width, depth) in enumerate(((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))):
        for layer in range(depth):
            tensors += _conv(f"conv{block + 1}_{layer + 1}", channels, width, 3, size)
            channels = width
        size //= 2
    tensors += _linear("fc6", 512 * 7 * 7, 4096)
    tensors += _linear("fc7", 4096, 4096)
    return tensors + _linear("fc8", 4096, 1000)


def _resnet50() -> list[Tensor]:
    tensors = [*_conv("conv1", 3, 64, 7, 112, bias=False), *_norm("bn1", 64)]
    channels, size = 64, 56
    for stage, (width, depth) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(depth):
            name = f"layer{stage + 1}.{block}"
            # The 3x3 convolution of the first block of a later stage halves the image.
            after = size // 2 if stage and not block else size
            tensors += _conv(f"{name}.conv1", channels, width, 1, size, bias=False)
            tensors += _norm(f"{name}.bn1", width)
            tensors += _conv(f"{name}.conv2", width, width, 3, after, bias=False)
            tensors += _norm(f"{name}.bn2", width)
            tensors += _conv(f"{name}.conv3", width, 4 * width, 1, after, bias=False)
            tensors += _norm(f"{name}.bn3", 4 * width)
            if not block:
                tensors += _conv(f"{name}.downsample", channels, 4 * width, 1, after, bias=False)
                tensors += _norm(f"{name}.downsample.bn", 4 * width)
            channels, size = 4 * width, after
    return tensors + _linear("fc", 2048, 1000)


def _transformer_layer(name: str, width: int, tokens: int, *, fused: bool) -> list[Tensor]:
    """Return self-attention and a four times wider feed-forward net, each with its norm.

    `fused` keeps query, key and value in one matrix.
    """
    inputs = {"qkv": 3} if fused else {"query": 1, "key": 1, "value": 1}
    attention = []
    for part, times in inputs.items():
        attention += _linear(f"{name}.{part}", width, times * width, tokens=tokens)
    # The scores and their use have no tensors: counted where the values are made.
    value = attention[-2]
    scores = 4.0 * tokens * tokens * width
    attention[-2] = Tensor(value.name, value.shape, value.flops + scores)
    return [
        *attention,
        *_linear(f"{name}.output", width, width, tokens=tokens),
        *_norm(f"{name}.norm1", width),
        *_linear(f"{name}.up", width, 4 * width, tokens=tokens),
        *_linear(f"{name}.down", 4 * width, width, tokens=tokens),
        *_norm(f"{name}.norm2", width),
    ]


def _bert_large() -> list[Tensor]:
    width, tokens = 1024, 512
    tensors = [
        Tensor("embedding.word", (30522, width)),
        Tensor("embedding.position", (tokens, width)),
        Tensor("embedding.type", (2, width)),
        *_norm("embedding.norm", width),
    ]
    for layer in range(24):
        tensors += _transformer_layer(f"layer{layer}", width, tokens, fused=False)
    return tensors + _linear("pooler", width, width)


def _gpt2() -> list[Tensor]:
    width, tokens = 768, 1024
    # The output layer shares the word embedding, so its product is counted there.
    tensors = [
        Tensor("embedding.word", (50257, width), 2.0 * 50257 * width * tokens),
        Tensor("embedding.position", (tokens, width)),
    ]
    for layer in range(12):
        tensors += _transformer_layer(f"layer{layer}", width, tokens, fused=True)
    return tensors + _norm("norm", width)


PROFILES: dict[str, Callable[[], list[Tensor]]] = {
    "bert_large": _bert_large,
    "gpt2": _gpt2,
    "lenet5": _lenet5,
    "lenet5_caffe": _lenet5_caffe,
    "lenet5_tensorflow": _lenet5_tensorflow,
    "resnet50": _resnet50,
    "vgg19": _vgg19,
}


def profile(name: str, *, itemsize: int = 4) -> Profile:
    """Return a model profile by name.

    ``lenet5`` is the classic one (6 and 16 convolution channels; 120, 84, 10), ``lenet5_caffe``
    has 20 and 50 channels and 500, 10, ``lenet5_tensorflow`` 32 and 64 and 1024, 10.

    Parameters
    ----------
    name : str
        A key of `PROFILES`.
    itemsize : int
        Bytes of an element; 4 is float32.

    Examples
    --------
    >>> profile("vgg19").n_bytes, len(profile("vgg19").tensors)
    (574668960, 38)
    """
    if name not in PROFILES:
        raise ValueError(f"model {name!r}: must be one of {', '.join(PROFILES)}")
    return Profile(name, tuple(PROFILES[name]()), itemsize)
