import copy
import gzip
import json
from pathlib import Path

import pytest

from topologies.replay import is_collective_reference, replay_collectives

REFERENCE = json.loads(
    gzip.decompress(
        (Path(__file__).parents[2] / "fedsim/reference/collectives.json.gz").read_bytes()
    )
)


def misses(content):
    return [row.case for row in replay_collectives(content) if not row.error <= row.tolerance]


@pytest.mark.parametrize("part", sorted(REFERENCE))
def test_every_reference_answer_is_met(part):
    assert is_collective_reference(REFERENCE[part])
    assert len(list(replay_collectives(REFERENCE[part]))) >= 5
    assert misses(REFERENCE[part]) == []


def test_families_are_told_apart():
    assert is_collective_reference(REFERENCE)
    assert not is_collective_reference([{"links": [], "flows": []}])
    assert not is_collective_reference({"links": [], "flows": []})
    assert not is_collective_reference(7)


def test_wrong_answers_are_noticed():
    wrong = copy.deepcopy(REFERENCE)
    wrong["counts"]["bcube"][0]["bcube_switches"] += 1
    wrong["schedules"][1]["steps"][0][0][0] = 2
    wrong["times"]["cases"] = wrong["times"]["cases"][:1]
    wrong["times"]["cases"][0]["bw_coeff"] *= 1 + 1e-8
    wrong["degraded"]["cases"] = wrong["degraded"]["cases"][:1]
    wrong["degraded"]["cases"][0]["coeff"] *= 1.01
    wrong["degraded"]["ecmp_hash_fattree4"] = {"ring": {"hash_mean": 2.0, "spray": 1.875}}
    found = misses(wrong)
    assert found[:3] == ["bcube(3,2)", "bml(3,2)", "ring on star(4)"]
    assert len(found) == 5
