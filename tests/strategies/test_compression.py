"""Compressors: unbiased, within their variance, encoded byte for byte (bars 1 and 2)."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies import encodings
from strategies.compression import (
    COMPRESSORS,
    Cast,
    Identity,
    Natural,
    Quantise,
    RandomK,
    Sign,
    Sparsify,
    TopK,
    compressor,
    pack,
    unpack,
)
from strategies.encodings import BitReader, join_bits, omega_codes, omega_lengths
from strategies.halves import DeviceHalf, KeyedDraws, RoundDraws

VECTORS = json.loads(
    (Path(__file__).parents[2] / "fedsim/reference/encoding_vectors.json").read_text()
)
ALL = [
    Identity(),
    Cast("float32"),
    Cast("float16"),
    Cast("bfloat16"),
    Quantise(levels=1),
    Quantise(levels=3, encoding="dense"),
    Quantise(levels=200, precision="float64"),
    Quantise(levels=2, block=4),
    Sparsify(probability=0.3),
    Sparsify(probability=0.3, scaled=False, precision="float64"),
    TopK(k=3),
    RandomK(fraction=0.5),
    Sign(),
    Sign(block=5, precision="float64"),
    Natural(),
]
UNBIASED = [c for c in ALL if c.is_unbiased]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def half(shape, dtype=None):
    return 0.5


def keyed(n, seed=0):
    return KeyedDraws(seed, "test", np.arange(n))


def normal(n, d, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d))).to(dtype)


@pytest.mark.parametrize("s", [1, 2, 4])
@pytest.mark.parametrize("d", [20, 40, 124])
def test_bar_1_quantisation_is_unbiased_with_its_exact_variance(d, s):
    n = 20_000
    v = normal(1, d, seed=d + s)
    quantised = pack(Quantise(levels=s, precision="float64"), v.expand(n, d), keyed(n)).values
    norm = v.norm()
    f = torch.frac(s * v.abs() / norm)
    exact = float(norm**2 / s**2 * (f * (1 - f)).sum())
    error = quantised - v
    standard_error = (norm / s * (f * (1 - f)).sqrt() / n**0.5)[0]
    assert (error.mean(0).abs() <= 5 * standard_error).all()
    measured = float(error.square().sum(1).mean())
    assert measured == pytest.approx(exact, rel=0.03)
    assert exact <= Quantise(levels=s).variance_bound(d) * float(norm**2)
    if s == 1:
        assert exact == pytest.approx(float(norm * v.abs().sum() - norm**2))


def test_bar_1_zero_stays_zero_and_identity_changes_nothing():
    zero = torch.zeros(2, 5, dtype=torch.float64)
    packed = pack(Quantise(), zero, keyed(2))
    assert (packed.values == 0).all()
    assert packed.encode(0) == bytes(4)
    v = normal(2, 5)
    assert pack(Identity(), v, keyed(2)).values is v


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"d={v['d']} s={v['s']}")
def test_bar_2_messages_are_the_reference_byte_for_byte(vector):
    v = torch.tensor([vector["v"]], dtype=torch.float64)
    u = torch.tensor([vector["u"]], dtype=torch.float64)
    for encoding in ("dense", "sparse"):
        used = Quantise(levels=vector["s"], encoding=encoding)
        packed = pack(used, v, lambda shape, dtype: u)
        message = packed.encode(0)
        assert message.hex() == vector[f"{encoding}_hex"]
        assert len(message) == packed.sizes[0] == -(-vector[f"{encoding}_bits"] // 8)
        decoded = unpack(used, message, [vector["d"]], torch.float64)
        assert torch.equal(decoded, packed.values[0])
        norm = vector["norm_float32"]
        assert torch.equal(decoded, torch.tensor(vector["levels"]).double() / vector["s"] * norm)


@given(
    used=st.sampled_from(ALL),
    n=st.integers(1, 4),
    d=st.integers(3, 60),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e6]),
)
def test_sizes_are_the_lengths_and_bytes_decode_to_the_values(used, n, d, seed, dtype, scale):
    scale = 1.0 if isinstance(used, Cast) else scale
    rows = normal(n, d, seed, dtype) * scale
    rows[:, 0] = 0
    tensors = (d - 2, 2) if not isinstance(used, TopK) else (d,)
    packed = pack(used, rows, keyed(n, seed), tensors)
    assert packed.values.dtype == dtype
    for row in range(n):
        message = packed.encode(row)
        assert len(message) == packed.sizes[row]
        assert torch.equal(unpack(used, message, tensors, dtype), packed.values[row])


@pytest.mark.parametrize("used", UNBIASED, ids=str)
def test_unbiased_compressors_are_unbiased_within_their_bound(used):
    n, d = 20_000, 12
    v = normal(1, d, seed=4)
    values = pack(used, v.expand(n, d), keyed(n)).values
    error = values - v
    standard_error = error.std(0) / n**0.5
    assert (error.mean(0).abs() <= 5 * standard_error + 1e-7).all()
    bound = used.variance_bound(used.block or d) * float(v.square().sum())
    assert float(error.square().sum(1).mean()) <= 1.03 * bound + 1e-12


@given(seed=st.integers(0, 10**6), used=st.sampled_from([TopK(k=3), Sign(), Cast("bfloat16")]))
def test_biased_compressors_contract(seed, used):
    v = normal(3, 20, seed)
    error = (pack(used, v, half).values - v).square().sum(1)
    assert (error <= used.variance_bound(20) * v.square().sum(1) * (1 + 1e-6)).all()


def test_each_tensor_and_each_block_has_its_own_scale():
    v = normal(2, 10)
    both = pack(Quantise(), v, half, (4, 6)).values
    apart = [pack(Quantise(), part, half).values for part in v.split((4, 6), 1)]
    assert torch.equal(both, torch.cat(apart, 1))
    blocks = pack(Quantise(block=4), v, half).values
    apart = [pack(Quantise(), part, half).values for part in v.split((4, 4, 2), 1)]
    assert torch.equal(blocks, torch.cat(apart, 1))


@given(st.lists(st.integers(1, 2**31), min_size=1, max_size=30))
def test_omega_numbers_are_read_back(numbers):
    codes, lengths = omega_codes(np.array(numbers))
    assert omega_lengths(torch.tensor(numbers), 2**31).tolist() == lengths.tolist()
    reader = BitReader(join_bits(codes, lengths))
    assert [reader.omega() for _ in numbers] == numbers


def test_omega_codes_are_the_published_ones():
    codes, lengths = omega_codes(np.array([1, 2, 3, 4, 8, 16, 100]))
    written = [format(int(c), f"0{n}b") for c, n in zip(codes, lengths, strict=True)]
    assert written == ["0", "100", "110", "101000", "1110000", "10100100000", "1011011001000"]


def test_an_encoded_array_weighs_its_bytes_and_becomes_a_plain_one_when_copied():
    packed = pack(Quantise(), normal(2, 30), keyed(2))
    array = packed.array(1)
    assert (array.dtype, array.shape) == ("uint8", (len(packed.encode(1)),))
    assert torch.equal(array.decoded, packed.values[1])
    for copied in (copy.deepcopy(array), pickle.loads(pickle.dumps(array))):
        assert copied.numpy().tobytes() == packed.encode(1)
        assert copied.data == array.data


def test_a_message_cut_short_or_too_long_is_refused():
    used = Quantise()
    message = pack(used, normal(1, 50), keyed(1)).encode(0)
    with pytest.raises(ValueError, match="needs"):
        unpack(used, message + b"\0", [50])
    with pytest.raises(ValueError, match="too early"):
        unpack(used, message[:5], [50])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gzip", "'gzip' is not one of cast, identity"),
        ({"kind": "quantise", "levels": 0}, "levels is 0; it must be at least 1"),
        ({"kind": "quantise", "level": 2}, "no parameter 'level'; valid: block, levels"),
        ({"kind": "quantise", "encoding": "zip"}, "'zip'.*sparse, dense"),
        ({"kind": "quantise", "levels": "many"}, "levels of quantise is 'many'.* a whole"),
        (
            {"kind": "quantise", "levels": 1.5},
            "levels of quantise is 1.5; it must",
        ),
        ({"kind": "quantise", "levels": True}, "True; it must be a whole number"),
        ({"kind": "sparsify", "probability": "half"}, "'half'; it must be a number"),
        ({"kind": "sparsify", "scaled": "no"}, "'no'; it must be true or false"),
        ({"kind": "quantize"}, "'quantize' is not one of .*; did you mean 'quantise'"),
        ({"levels": 2}, "a compressor needs a kind, one of cast"),
        ({"kind": "sparsify", "probability": 0.0}, "probability is 0.0"),
        ({"kind": "top_k"}, "give k or fraction"),
        ({"kind": "top_k", "k": 0}, "k is 0"),
        ({"kind": "random_k", "fraction": 1.5}, "fraction is 1.5"),
        ({"kind": "cast", "dtype": "int8"}, "'int8'.*float16"),
        ({"kind": "sign", "precision": "half"}, "'half'.*float32, float64"),
        ({"kind": "identity", "block": -1}, "block is -1"),
    ],
)
def test_wrong_compressors_are_refused_with_what_is_valid(spec, said):
    with pytest.raises(ValueError, match=said):
        compressor(spec)


def test_more_coordinates_than_there_are_cannot_be_kept():
    with pytest.raises(ValueError, match="k is 6, more than the 5"):
        pack(TopK(k=6), normal(1, 5), half)


def test_every_compressor_can_be_named():
    for name, kind in COMPRESSORS.items():
        spec = {"kind": name} | ({"fraction": 0.5} if "_k" in name else {})
        assert isinstance(compressor(spec), kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("used", ALL, ids=str)
def test_few_numbers_are_compressed_and_weighed_as_many_are(used, dtype, monkeypatch):
    v = torch.cat([normal(5, 41, dtype=dtype), torch.zeros(2, 41, dtype=dtype)])
    v[0] *= 1e3
    v[1, 7], v[2, 3] = 0.0, -0.0
    found = []
    for small in (1 << 16, 0):
        monkeypatch.setattr(encodings, "_SMALL", small)
        packed = pack(used, v, keyed(7), (41,))
        found.append((packed.values, packed.sizes.tolist(), packed.encode(2)))
    few, many = found
    assert few[0].dtype == many[0].dtype == dtype
    assert torch.equal(few[0], many[0])
    assert few[1:] == many[1:]


@pytest.mark.filterwarnings("error")
def test_numbers_that_are_not_finite_are_compressed_without_a_word():
    v = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0]])
    for levels in (1, 3):
        packed = pack(Quantise(levels=levels), v, keyed(2))
        assert not packed.values.isfinite().all(1).any()
        assert (packed.sizes > 0).all()


def test_draws_ahead_are_the_draws_of_each_round():
    half, device = DeviceHalf(seed=5), np.array([3, 1, 7])
    rounds = RoundDraws(np.full(3, 5), "half", device)
    for k in (1, 2, 3, 4, 8, 9, 20_000, 20_001, 20_002, 20_003):
        if k == 9:
            device = np.array([1, 3, 7])  # others take part
        each = [KeyedDraws(5, "half", np.full(3, k), device), half.draws(np.full(3, k), device)]
        if k < 9:
            each.append(rounds.at(k))
        for shape, dtype in (((4,), torch.float64), ((k % 3, 2), torch.float32), ((), None)):
            kind = {} if dtype is None else {"dtype": dtype}
            expected, *others = [draws(shape, **kind) for draws in each]
            assert all(torch.equal(expected, other) for other in others)
            assert all(other.dtype == expected.dtype for other in others)
    assert half == DeviceHalf(seed=5) == pickle.loads(pickle.dumps(half))


def test_keyed_draws_are_named_and_uniform():
    draws = keyed(3)
    first, second = draws((40_000,)), draws((40_000,))
    assert torch.equal(first, keyed(3)((40_000,)))
    assert torch.equal(first[1:2], KeyedDraws(0, "test", [1])((40_000,)))
    assert not torch.equal(first, second)
    assert first.mean() == pytest.approx(0.5, abs=0.005)
    assert float(first.var()) == pytest.approx(1 / 12, rel=0.02)
    assert abs(float(torch.corrcoef(torch.cat([first, second]))[0, 1:].abs().max())) < 0.02
    assert torch.equal(
        keyed(1)((5,), torch.float32), (keyed(1)((5,)) * 2**24).floor().float() / 2**24
    )
