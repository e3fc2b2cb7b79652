import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fedsim import units

FLOAT_KINDS = [
    (units.parse_time, units.format_time),
    (units.parse_bandwidth, units.format_bandwidth),
    (units.parse_speed, units.format_speed),
    (units.parse_flop_rate, units.format_flop_rate),
    (units.parse_energy, units.format_energy),
]


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.parse_bandwidth, "20 Mbit/s", 20e6),
        (units.parse_bandwidth, "2.5 MB/s", 20e6),
        (units.parse_bandwidth, "20 MB/s", 160e6),
        (units.parse_bandwidth, "1 MiB/s", 8 * 2**20),
        (units.parse_bandwidth, "1Gbit/s", 1e9),
        (units.parse_bandwidth, "unlimited", math.inf),
        (units.parse_time, "5 ms", 0.005),
        (units.parse_time, "0.1 ms", 1e-4),
        (units.parse_time, "20 us", 2e-5),
        (units.parse_time, "20 µs", 2e-5),
        (units.parse_time, "2 h", 7200.0),
        (units.parse_time, "1.5 min", 90.0),
        (units.parse_time, "1e-3 s", 1e-3),
        (units.parse_size, "1 GiB", 2**30),
        (units.parse_size, "1 GB", 10**9),
        (units.parse_size, "1.5 kB", 1500),
        (units.parse_speed, "500 samples/s", 500.0),
        (units.parse_speed, "2 ksamples/s", 2000.0),
        (units.parse_flop_rate, "1 GFLOP/s", 1e9),
        (units.parse_energy, "20 mJ", 0.02),
        (units.parse_energy, "3 µJ", 3e-6),
        (units.parse_energy, "1 Wh", 3600.0),
        (units.parse_time, 0, 0.0),
        (units.parse_size, "0", 0),
    ],
)
def test_quantities_are_read_exactly(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "value", "said"),
    [
        (units.parse_bandwidth, 20, "20 has no unit; write for example '20 Mbit/s'"),
        (units.parse_bandwidth, "20", "'20' has no unit"),
        (units.parse_bandwidth, "20 Mb/s", "'20 Mbit/s' for bits or '20 MB/s' for bytes"),
        (units.parse_bandwidth, "20 Mbps", "'20 Mbit/s' for bits or '20 MB/s' for bytes"),
        (units.parse_bandwidth, "20 mbit/s", "write '20 Mbit/s'"),
        (units.parse_bandwidth, "20 MB", "write '20 MB/s'"),
        (units.parse_bandwidth, "20 ms", "'ms' belongs to a time"),
        (units.parse_bandwidth, "-3 Mbit/s", "negative"),
        (units.parse_bandwidth, "fast", "'fast' is not a bandwidth; write '20 Mbit/s'"),
        (units.parse_bandwidth, True, "True is not a bandwidth"),
        (units.parse_bandwidth, None, "None is not a bandwidth"),
        (units.parse_bandwidth, math.inf, "has no unit"),
        (units.parse_time, 5, "write for example '5 s'"),
        (units.parse_time, "5 sec", "unknown unit 'sec'; use one of ns, us"),
        (units.parse_time, "5 Mbit/s", "belongs to a bandwidth"),
        (units.parse_time, "unlimited", "not a time"),
        (units.parse_size, "1.5 B", "whole number of bytes"),
        (units.parse_size, "1 Mbit", "unknown unit 'Mbit'"),
        (units.parse_speed, "1 GFLOP/s", "'GFLOP/s' belongs to"),
        (units.parse_speed, 500, "'500 samples/s'"),
        (units.parse_time, "1e400 s", "larger than anything"),
        (units.parse_time, "1e999999 s", "not a time"),
    ],
)
def test_wrong_quantities_say_what_to_write(parse, value, said):
    with pytest.raises(ValueError, match=said):
        parse(value)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (units.format_bandwidth(160e6), "160 Mbit/s"),
        (units.format_bandwidth(1.5e6), "1.5 Mbit/s"),
        (units.format_bandwidth(math.inf), "unlimited"),
        (units.format_bandwidth(1e9), "1 Gbit/s"),
        (units.format_time(0.005), "5 ms"),
        (units.format_time(2e-5), "20 us"),
        (units.format_time(0.0), "0 s"),
        (units.format_time(0.1), "100 ms"),
        (units.format_time(1.5), "1.5 s"),
        (units.format_time(100.0), "100 s"),
        (units.format_size(2**30), "1 GiB"),
        (units.format_size(650), "650 B"),
        (units.format_speed(500.0), "500 samples/s"),
    ],
)
def test_quantities_are_shown_in_readable_units(shown, text):
    assert shown == text


@pytest.mark.parametrize(("parse", "form"), FLOAT_KINDS)
def test_every_float_survives_the_way_to_text_and_back(parse, form):
    @given(st.floats(min_value=0, max_value=1e24, allow_subnormal=False))
    def check(value):
        assert parse(form(value)) == value

    check()


@given(st.integers(min_value=0, max_value=2**80))
def test_every_size_survives_the_way_to_text_and_back(size):
    assert units.parse_size(units.format_size(size)) == size


@given(st.integers(1, 10**6), st.sampled_from(["", "k", "M", "G", "Ki", "Mi"]))
def test_a_byte_is_always_eight_bits(number, prefix):
    in_bytes = units.parse_bandwidth(f"{number} {prefix}B/s")
    assert in_bytes == 8 * units.parse_bandwidth(f"{number} {prefix}bit/s")


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_time_that_cannot_be_written_is_refused(value):
    with pytest.raises(ValueError, match="not a time"):
        units.format_time(value)


def test_pydantic_types_parse_and_show_units():
    adapter = TypeAdapter(units.Bandwidth)
    assert adapter.validate_python("20 MB/s") == 160e6
    assert adapter.dump_json(160e6) == b'"160 Mbit/s"'
    with pytest.raises(ValidationError, match="has no unit"):
        adapter.validate_json("20")


@pytest.mark.parametrize(
    ("quantity", "good", "bad"),
    [
        (units.Bandwidth, ["20 Mbit/s", "2.5 MB/s", "0"], ["20", "20 Mb/s"]),
        (units.Duration, ["5 ms", "20 µs", "20 μs", "1e-3 s"], ["5", "5 sec"]),
        (units.Size, ["1 GiB", "10 B"], ["1 Gib"]),
        (units.Speed, ["500 samples/s"], ["500", "1 GFLOP/s"]),
        (units.ComputeSpeed, ["500 samples/s"], ["500"]),
        (units.Energy, ["20 mJ", "1 uJ", "0"], ["20", "1 MJ"]),
    ],
)
def test_json_schema_accepts_what_the_parser_accepts(quantity, good, bad):
    schema = TypeAdapter(quantity).json_schema()
    json.dumps(schema)
    pattern = schema["anyOf"][0]["pattern"]
    assert all(re.search(pattern, text) for text in good)
    assert not any(re.search(pattern, text) for text in bad)


@pytest.mark.parametrize("text", ["500 samples/s", "1.5 GFLOP/s"])
def test_a_computing_speed_keeps_its_unit(text):
    rate = units.parse_compute_speed(text)
    assert text.endswith(rate.unit[-6:])
    assert units.format_compute_speed(rate) == text
    adapter = TypeAdapter(units.ComputeSpeed)
    assert adapter.validate_json(json.dumps(text)) == rate
    assert adapter.dump_python(rate, mode="json") == text


@pytest.mark.parametrize("text", ["0 samples/s", "0", "-1 samples/s", "5", "5 s", "0 FLOP/s"])
def test_a_computing_speed_of_nothing_is_refused(text):
    with pytest.raises(ValueError, match=r"above 0|negative|no unit|belongs to"):
        units.parse_compute_speed(text)
