import gzip
import json
from importlib import resources

import pytest

from fedsim.errors import ScenarioError
from fedsim.network import replay
from fedsim.network.replay import deliveries_of

CASES = json.loads(
    gzip.decompress(resources.files("fedsim").joinpath("reference/network.json.gz").read_bytes())
)


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
