import gzip
import json
from importlib import resources

import pytest

from fedsim.errors import ScenarioError
from fedsim.network import replay
from fedsim.network.replay import deliveries_of
from fedsim.verify import network_error, verify

CASES = json.loads(
    gzip.decompress(resources.files("fedsim").joinpath("reference/network.json.gz").read_bytes())
)


def test_every_reference_case_is_reproduced():
    results = verify()
    assert sum(result.n_cases for result in results) == len(CASES) == 56
    assert sum(result.n_flows for result in results) == 1489
    assert len(results) == 13
    for result in results:
        assert result.is_passed, result
        assert result.worst < 1e-9


def test_flows_fail_when_the_reference_says():
    n_failed = 0
    for case in CASES:
        expected = case.get("failed_s") or {}
        deliveries = deliveries_of(case)
        for flow, delivery in zip(case["flows"], deliveries, strict=True):
            if flow["id"] in expected:
                n_failed += 1
                assert delivery.outcome == "failed"
                assert delivery.finished == pytest.approx(expected[flow["id"]], rel=1e-9)
    assert n_failed > 10


def minimal(**extra):
    case = {
        "links": [{"id": "a", "bandwidth_bps": 8.0, "latency_s": 1.0}],
        "flows": [{"id": "f", "route": ["a"], "bytes": 10, "start_s": 2.0}],
        "finish_s": {"f": 13.0},
    }
    return case | extra


def test_a_case_needs_no_more_than_links_and_flows():
    assert replay(minimal()) == [13.0]
    assert network_error(minimal()) == 0.0
    assert network_error(minimal(finish_s={"f": None})) == float("inf")


def test_airtime_is_derived_from_the_stations_where_it_is_not_given():
    cell = {"id": "a", "bandwidth_bps": 1.0, "sharing": "airtime"}
    case = minimal(
        links=[cell | {"station_rate_bps": {"x": 8.0, "y": 4.0}}],
        flows=[
            {"id": "f", "route": ["a"], "bytes": 1, "start_s": 0, "src": "x", "dst": "y"},
            {"id": "g", "route": ["a"], "bytes": 1, "start_s": 50, "src": "ap", "dst": "y"},
        ],
    )
    assert replay(case) == [3.0, 52.0]


def test_null_fields_are_absent_ones():
    flow = {"id": "f", "route": ["a"], "bytes": 10, "start_s": 2.0, "cap_bps": None, "weight": None}
    link = {"id": "a", "bandwidth_bps": 8.0, "latency_s": None, "profile": None, "sharing": None}
    assert replay(minimal(flows=[flow], links=[link])) == [12.0]


def test_a_link_may_begin_without_bandwidth_and_a_flow_never_end():
    link = {"id": "a", "bandwidth_bps": 0.0, "latency_s": 0.0, "profile": [[5.0, 80.0]]}
    assert replay(minimal(links=[link])) == [6.0]
    assert replay(minimal(links=[link | {"profile": []}])) == [None]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"flows": [{"id": "f", "route": ["b"], "bytes": 1, "start_s": 0}]}, "'b'"),
        ({"flows": [{"id": "f", "route": ["a"], "start_s": 0}]}, "bytes"),
        ({"links": [{"id": "a", "bandwidth_bps": 1.0}] * 2}, "named twice"),
    ],
)
def test_unreadable_cases_are_refused(change, reason):
    with pytest.raises(ScenarioError, match=reason):
        replay(minimal(**change))


def test_cases_of_a_directory_are_replayed(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(minimal(family="mine", name="one")))
    packed = [minimal(family="mine", name="two", finish_s={"f": 13.1}), minimal(family="other")]
    (tmp_path / "more.json.gz").write_bytes(gzip.compress(json.dumps(packed).encode()))
    mine, other = verify(tmp_path)
    assert (mine.family, mine.n_cases, mine.worst_case, mine.is_passed) == ("mine", 2, "two", False)
    assert mine.worst == pytest.approx(0.1 / 11.1)
    assert other.is_passed


def test_directories_without_cases_are_refused(tmp_path):
    with pytest.raises(ScenarioError, match="no reference cases"):
        verify(tmp_path)
    with pytest.raises(ScenarioError, match="no such file"):
        verify(tmp_path / "nowhere")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ScenarioError, match=r"a\.json: not JSON"):
        verify(tmp_path)
    (tmp_path / "a.json").write_text('{"links": []}')
    with pytest.raises(ScenarioError, match="entry 0 is no network case"):
        verify(tmp_path)
