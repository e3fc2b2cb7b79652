"""Quantities with units: "20 Mbit/s", "5 ms", "1 GiB", "500 samples/s".

Parsing is exact (rational arithmetic, rounded once), and bits and bytes are never mixed up: every
unit says which of the two it means. `B` is a byte and `bit` is a bit; `20 MB/s` given for a
bandwidth is the same as `160 Mbit/s` and is shown as such, while `Mb` and `Mbps`, which people read
in two ways, are refused.

Decision: a number without a unit is an error wherever a unit is needed, except 0. No unit is ever
assumed, because a factor of eight or of a million changes an answer without a trace.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AllowInfNan, BeforeValidator, PlainSerializer, WithJsonSchema

__all__ = [
    "Bandwidth",
    "ComputeRate",
    "ComputeSpeed",
    "Duration",
    "Energy",
    "FlopRate",
    "Size",
    "Speed",
    "format_bandwidth",
    "format_compute_speed",
    "format_energy",
    "format_flop_rate",
    "format_size",
    "format_speed",
    "format_time",
    "parse_bandwidth",
    "parse_compute_speed",
    "parse_energy",
    "parse_flop_rate",
    "parse_size",
    "parse_speed",
    "parse_time",
]

_DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_QUANTITY = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*(.*?)\s*")


def _scaled(prefixes: Mapping[str, int], unit: str, factor: int = 1) -> dict[str, Fraction]:
    return {f"{prefix}{unit}": Fraction(size * factor) for prefix, size in prefixes.items()}


@dataclass(frozen=True, slots=True)
class _Kind:
    """One physical quantity: the units a user may write, and those an answer is shown in."""

    noun: str
    examples: tuple[str, ...]
    units: Mapping[str, Fraction]
    shown: tuple[str, ...]
    base: str
    usual: str
    unlimited: bool = False


_TIME = _Kind(
    "a time",
    ("5 ms", "30 s", "2 h"),
    MappingProxyType(
        {
            "ns": Fraction(1, 10**9),
            "us": Fraction(1, 10**6),
            "µs": Fraction(1, 10**6),
            "μs": Fraction(1, 10**6),
            "ms": Fraction(1, 10**3),
            "s": Fraction(1),
            "min": Fraction(60),
            "h": Fraction(3600),
            "d": Fraction(86400),
        }
    ),
    ("d", "h", "min", "s", "ms", "us", "ns"),
    "s",
    "s",
)
_SIZE = _Kind(
    "a number of bytes",
    ("100 MB", "1 GiB"),
    MappingProxyType(_scaled(_DECIMAL, "B") | _scaled(_BINARY, "B")),
    ("TB", "TiB", "GB", "GiB", "MB", "MiB", "kB", "KiB", "B"),
    "B",
    "MB",
)
_BANDWIDTH = _Kind(
    "a bandwidth",
    ("20 Mbit/s", "2.5 MB/s", "unlimited"),
    MappingProxyType(
        _scaled(_DECIMAL | _BINARY, "bit/s") | _scaled(_DECIMAL | _BINARY, "B/s", factor=8)
    ),
    ("Tbit/s", "Gbit/s", "Mbit/s", "kbit/s", "bit/s"),
    "bit/s",
    "Mbit/s",
    unlimited=True,
)
_SPEED = _Kind(
    "a speed",
    ("500 samples/s", "20 ksamples/s"),
    MappingProxyType(_scaled(_DECIMAL, "samples/s") | {"sample/s": Fraction(1)}),
    ("samples/s",),
    "samples/s",
    "samples/s",
)
_FLOP_RATE = _Kind(
    "a rate of floating-point operations",
    ("1 GFLOP/s",),
    MappingProxyType(_scaled(_DECIMAL, "FLOP/s")),
    ("TFLOP/s", "GFLOP/s", "MFLOP/s", "kFLOP/s", "FLOP/s"),
    "FLOP/s",
    "GFLOP/s",
)
_ENERGY = _Kind(
    "an energy",
    ("20 mJ", "1 nJ"),
    MappingProxyType(
        {
            "pJ": Fraction(1, 10**12),
            "nJ": Fraction(1, 10**9),
            "uJ": Fraction(1, 10**6),
            "µJ": Fraction(1, 10**6),
            "μJ": Fraction(1, 10**6),
            "mJ": Fraction(1, 10**3),
            "J": Fraction(1),
            "kJ": Fraction(10**3),
            "Wh": Fraction(3600),
        }
    ),
    ("kJ", "J", "mJ", "uJ", "nJ", "pJ"),
    "J",
    "J",
)
_AMBIGUOUS = re.compile(r"([kKMGT]?)(b|b/s|bps|Bps)", re.ASCII)


def _hint(number: str, unit: str, kind: _Kind) -> str:
    """Say what to write instead of a unit that is unknown or means something else."""
    if kind is _BANDWIDTH and (match := _AMBIGUOUS.fullmatch(unit)):
        prefix = match[1].replace("K", "k")
        return (
            f"write '{number} {prefix}bit/s' for bits or '{number} {prefix}B/s' for bytes; "
            f"'{unit}' is read both ways"
        )
    if f"{unit}/s" in kind.units:
        return f"write '{number} {unit}/s'"
    for other in kind.units:
        if unit.casefold() == other.casefold():
            return f"write '{number} {other}' (upper and lower case differ in units)"
    for other_kind in (_TIME, _SIZE, _BANDWIDTH, _SPEED, _FLOP_RATE, _ENERGY):
        if unit in other_kind.units:
            return f"'{unit}' belongs to {other_kind.noun}; write {_examples(kind)}"
    return f"unknown unit '{unit}'; use one of {', '.join(kind.units)}"


def _examples(kind: _Kind) -> str:
    return " or ".join(f"'{example}'" for example in kind.examples)


def _parse(value: object, kind: _Kind) -> Fraction | float:
    """Return the exact quantity in base units; `inf` for "unlimited"."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{value!r} is not {kind.noun}; write {_examples(kind)}")
    if not isinstance(value, str):
        if value == 0:
            return Fraction(0)
        raise ValueError(f"{value!r} has no unit; write for example '{value} {kind.usual}'")
    if kind.unlimited and value.strip() == "unlimited":
        return math.inf
    match = _QUANTITY.fullmatch(value)
    if match is None:
        raise ValueError(f"'{value}' is not {kind.noun}; write {_examples(kind)}")
    number, unit = match[1], match[2]
    exact = Fraction(number)
    if not unit:
        if exact == 0:
            return exact
        raise ValueError(f"'{value}' has no unit; write for example '{number} {kind.usual}'")
    if unit not in kind.units:
        raise ValueError(f"'{value}' is not {kind.noun}: {_hint(number, unit, kind)}")
    if exact < 0:
        raise ValueError(f"'{value}' is negative; write {kind.noun} of 0 or more")
    if exact > 10**30:
        raise ValueError(f"'{value}' is larger than anything that can be simulated")
    return exact * kind.units[unit]


def _decimal(value: Fraction) -> str | None:
    """Return `value` as a plain decimal number; None if its expansion does not end."""
    digits, rest = 0, value.denominator
    for prime in (2, 5):
        power = 0
        while rest % prime == 0:
            rest //= prime
            power += 1
        digits = max(digits, power)
    if rest != 1:
        return None
    whole = str(abs(value.numerator) * 10**digits // value.denominator).rjust(digits + 1, "0")
    return whole if digits == 0 else f"{whole[:-digits]}.{whole[-digits:]}"


def _format(value: float, kind: _Kind) -> str:
    """Return the shortest text that parses back to exactly `value`, from 1 upwards if possible."""
    if value == math.inf and kind.unlimited:
        return "unlimited"
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is not {kind.noun} that can be written with a unit")
    exact = Fraction(value if isinstance(value, int) else repr(float(value)))
    if exact == 0:
        return f"0 {kind.base}"
    texts = [
        (exact < kind.units[unit], len(number), f"{number} {unit}")
        for unit in kind.shown
        if (number := _decimal(exact / kind.units[unit])) is not None
    ]
    return min(texts, key=lambda text: text[:2])[-1]


def parse_time(value: object) -> float:
    """Return a time in seconds.

    Raises
    ------
    ValueError
        If `value` has no unit (0 needs none), is negative or is not a time.

    Examples
    --------
    >>> parse_time("5 ms"), parse_time("2 h")
    (0.005, 7200.0)
    """
    return float(_parse(value, _TIME))


def parse_size(value: object) -> int:
    """Return a size in bytes; `1 kB` is 1000 and `1 KiB` is 1024.

    Raises
    ------
    ValueError
        If `value` has no unit (0 needs none), or is not a whole number of bytes.

    Examples
    --------
    >>> parse_size("1 GiB"), parse_size("1.5 kB")
    (1073741824, 1500)
    """
    exact = Fraction(_parse(value, _SIZE))
    if exact.denominator != 1:
        raise ValueError(f"'{value}' is not a whole number of bytes")
    return int(exact)


def parse_bandwidth(value: object) -> float:
    """Return a bandwidth in bit/s; bytes are converted exactly, "unlimited" is infinite.

    Raises
    ------
    ValueError
        If `value` has no unit (0 needs none), or one that could mean bits and bytes.

    Examples
    --------
    >>> parse_bandwidth("20 Mbit/s"), parse_bandwidth("2.5 MB/s")
    (20000000.0, 20000000.0)
    """
    return float(_parse(value, _BANDWIDTH))


def parse_speed(value: object) -> float:
    """Return a computing speed in samples/s.

    Raises
    ------
    ValueError
        If `value` has no unit (0 needs none), or another one, FLOP/s included.
    """
    return float(_parse(value, _SPEED))


def parse_flop_rate(value: object) -> float:
    """Return a computing speed in FLOP/s ("1 GFLOP/s").

    Raises
    ------
    ValueError
        If `value` has no unit (0 needs none), or another one, samples/s included.
    """
    return float(_parse(value, _FLOP_RATE))


@dataclass(frozen=True, slots=True)
class ComputeRate:
    """A computing speed with its unit: how many samples/s a FLOP rate is depends on the model.

    Parameters
    ----------
    value : float
    unit : {"samples/s", "FLOP/s"}
    """

    value: float
    unit: Literal["samples/s", "FLOP/s"] = "samples/s"


def parse_compute_speed(value: object) -> ComputeRate:
    """Return a computing speed above 0, in samples/s or FLOP/s, as it was given.

    Raises
    ------
    ValueError
        If `value` has neither unit, or is 0 or negative.

    Examples
    --------
    >>> parse_compute_speed("2 GFLOP/s")
    ComputeRate(value=2000000000.0, unit='FLOP/s')
    """
    if isinstance(value, str) and value.strip().endswith("FLOP/s"):
        rate = ComputeRate(parse_flop_rate(value), "FLOP/s")
    else:
        rate = ComputeRate(parse_speed(value))
    if rate.value == 0:
        raise ValueError(f"{value!r} is no speed: it must be above 0")
    return rate


def parse_energy(value: object) -> float:
    """Return an energy in joules.

    Raises
    ------
    ValueError
        If `value` has no unit (0 needs none), is negative or is not an energy.

    Examples
    --------
    >>> parse_energy("20 mJ"), parse_energy("1 Wh")
    (0.02, 3600.0)
    """
    return float(_parse(value, _ENERGY))


def format_time(seconds: float) -> str:
    """Return a time as text that `parse_time` reads back exactly.

    Examples
    --------
    >>> format_time(0.005), format_time(7200.0), format_time(90.0)
    ('5 ms', '2 h', '90 s')
    """
    return _format(seconds, _TIME)


def format_size(size_bytes: int) -> str:
    """Return a size as text that `parse_size` reads back exactly.

    Examples
    --------
    >>> format_size(2**30), format_size(1500)
    ('1 GiB', '1.5 kB')
    """
    return _format(size_bytes, _SIZE)


def format_bandwidth(rate_bps: float) -> str:
    """Return a bandwidth in bits as text that `parse_bandwidth` reads back exactly.

    Examples
    --------
    >>> format_bandwidth(parse_bandwidth("20 MB/s"))
    '160 Mbit/s'
    """
    return _format(rate_bps, _BANDWIDTH)


def format_speed(samples_per_second: float) -> str:
    """Return a speed as text that `parse_speed` reads back exactly."""
    return _format(samples_per_second, _SPEED)


def format_flop_rate(flop_per_second: float) -> str:
    """Return a FLOP rate as text that `parse_flop_rate` reads back exactly."""
    return _format(flop_per_second, _FLOP_RATE)


def format_compute_speed(rate: ComputeRate) -> str:
    """Return a computing speed as text that `parse_compute_speed` reads back exactly."""
    return _format(rate.value, _SPEED if rate.unit == "samples/s" else _FLOP_RATE)


def format_energy(joules: float) -> str:
    """Return an energy as text that `parse_energy` reads back exactly."""
    return _format(joules, _ENERGY)


def _text_schema(kind: _Kind) -> dict[str, Any]:
    names = [re.escape(unit).replace("µ", "[µμ]") for unit in kind.units if "μ" not in unit]
    number = r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
    pattern = rf"^\s*({number}\s*({'|'.join(names)})|0)\s*$"
    return {"type": "string", "pattern": pattern, "examples": list(kind.examples)}


def _schema(kind: _Kind) -> WithJsonSchema:
    text = _text_schema(kind)
    choices: list[dict[str, Any]] = [text, {"const": 0}]
    if kind.unlimited:
        choices.append({"const": "unlimited"})
    return WithJsonSchema(
        {"anyOf": choices, "description": f"{kind.noun}, such as {_examples(kind)}"}
    )


Duration = Annotated[
    float, BeforeValidator(parse_time), PlainSerializer(format_time, str), _schema(_TIME)
]
Size = Annotated[
    int, BeforeValidator(parse_size), PlainSerializer(format_size, str), _schema(_SIZE)
]
Bandwidth = Annotated[
    float,
    AllowInfNan(True),  # "unlimited"
    BeforeValidator(parse_bandwidth),
    PlainSerializer(format_bandwidth, str),
    _schema(_BANDWIDTH),
]
Speed = Annotated[
    float, BeforeValidator(parse_speed), PlainSerializer(format_speed, str), _schema(_SPEED)
]
FlopRate = Annotated[
    float,
    BeforeValidator(parse_flop_rate),
    PlainSerializer(format_flop_rate, str),
    _schema(_FLOP_RATE),
]
ComputeSpeed = Annotated[
    ComputeRate,
    BeforeValidator(parse_compute_speed),
    PlainSerializer(format_compute_speed, str),
    WithJsonSchema(
        {
            "anyOf": [_text_schema(_SPEED), _text_schema(_FLOP_RATE)],
            "description": "a speed, such as '500 samples/s' or '1 GFLOP/s'",
        }
    ),
]
Energy = Annotated[
    float, BeforeValidator(parse_energy), PlainSerializer(format_energy, str), _schema(_ENERGY)
]
