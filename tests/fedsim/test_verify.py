import json
from pathlib import Path

import pytest

from fedsim.errors import ScenarioError
from fedsim.verify import verify

CASE = {
    "name": "one flow",
    "family": "tiny",
    "links": [{"id": "l", "bandwidth_bps": 8e6, "latency_s": 0.5}],
    "flows": [{"id": "f", "route": ["l"], "bytes": 1e6, "start_s": 1.0}],
    "finish_s": {"f": 2.5},
}


def test_bar_n1_the_cases_that_ship_agree():
    results = verify()
    assert all(found.is_passed for found in results), results
    network = [found for found in results if found.family.startswith("network ")]
    assert sum(found.n_cases for found in network) == 56
    assert max(found.worst for found in network) < 1e-12
    assert {"collective times", "collective failures"} <= {found.family for found in results}


def test_a_wrong_answer_is_found_and_named(tmp_path):
    (tmp_path / "right.json").write_text(json.dumps(CASE))
    wrong = CASE | {"name": "wrong", "finish_s": {"f": 2.6}}
    (tmp_path / "wrong.json").write_text(json.dumps([CASE, wrong]))
    (found,) = verify(tmp_path)
    assert (found.n_cases, found.worst_case, found.is_passed) == (3, "wrong", False)
    assert found.worst == pytest.approx(0.1 / 1.6)


def test_a_flow_that_should_fail_and_does_not_is_a_miss(tmp_path):
    path = tmp_path / "case.json"
    path.write_text(json.dumps(CASE | {"finish_s": {"f": None}}))
    assert not verify(path)[0].is_passed


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "no such file"), ("", "not JSON"), ("{}", "network case"), ("[1]", "network case")],
)
def test_what_is_no_case_is_refused(tmp_path, text, said):
    path = Path(tmp_path) / "case.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ScenarioError, match=said):
        verify(path)
