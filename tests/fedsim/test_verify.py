import json
from pathlib import Path

import numpy as np
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


# --- golden traces of compression of another problem ---------------------------------------------


def problem(folder, n_devices=3, d=4):
    """Write a least-squares problem and its gradient descent; return the files' arrays."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((n_devices, 10, d))
    y = np.einsum("inj,j->in", x, np.arange(1.0, d + 1)) + rng.standard_normal((n_devices, 10))
    step = 1 / np.mean([2 * np.linalg.norm(each.T @ each) / 10 for each in x])
    w, iterates = np.zeros(d), []
    for _ in range(6):
        residual = np.einsum("inj,j->in", x, w) - y
        w = w - step * 2 * np.einsum("inj,in->ij", x, residual).mean(0) / 10
        iterates.append(w)
    data, golden = {"X": x, "Y": y, "w_star": w}, {"SGD": np.array(iterates)}
    write(folder, data, golden)
    return data, golden


def write(folder, data, golden, rest=""):
    np.savez(folder / "own_data.npz", **data)
    np.savez(folder / f"own_golden{rest}.npz", **golden)


def test_golden_traces_of_another_problem_are_replayed(tmp_path):
    data, golden = problem(tmp_path)
    (tmp_path / "own_summary.json").write_text(json.dumps({"problem": {"N": 3}}))
    (found,) = verify(tmp_path)
    assert (found.family, found.n_cases, found.is_passed) == ("compression", 1, True)
    assert found.worst < 1e-14
    assert verify(tmp_path / "own_golden.npz") == [found]
    write(tmp_path, data, {"SGD": golden["SGD"] + 1e-8})
    (found,) = verify(tmp_path)
    assert not found.is_passed
    assert found.worst == pytest.approx(1e-8 / np.abs(golden["SGD"]).max(), rel=0.01)
    write(tmp_path, data, golden | {"MCM": golden["SGD"]})
    (found,) = verify(tmp_path)
    assert (found.worst_case, found.is_passed) == ("own_golden.npz MCM", False)


def logistic_problem(folder):
    """Write clustered samples of two classes and their gradient descent; return the arrays."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((60, 3)) * (rng.random((60, 3)) < 0.6)
    y = np.where(x.sum(1) + rng.standard_normal(60) > 0, 1, -1)
    rows, columns = np.nonzero(x)
    data = {
        "indptr": np.searchsorted(rows, np.arange(61)),
        "indices": columns,
        "data": x[rows, columns],
        "shape": np.array(x.shape),
        "y": y.astype(np.int8),
        "cluster": np.repeat([0, 1, 2], [40, 17, 3]),  # 13 to 1: half of the first goes to the last
    }
    x = np.insert((x - x.mean(0)) / x.std(0), 0, 1.0, axis=1)
    parts = [(x[p], y[p]) for p in (np.r_[20:40], np.r_[40:57], np.r_[57:60, 0:20])]
    step = 1 / np.mean([np.linalg.norm(a.T @ a) / (4 * len(a)) for a, _ in parts])
    w, iterates = np.zeros(4), []
    for _ in range(6):
        w = w - step * np.mean(
            [(-b / (1 + np.exp(b * (a @ w)))) @ a / len(b) for a, b in parts], axis=0
        )
        iterates.append(w)
    golden = {"SGD": np.array(iterates)}
    write(folder, data, golden)
    return data, golden


def test_golden_traces_of_a_logistic_problem_are_replayed(tmp_path):
    data, golden = logistic_problem(tmp_path)
    (found,) = verify(tmp_path)
    assert (found.family, found.n_cases, found.is_passed) == ("compression", 1, True)
    assert found.worst < 1e-14
    write(tmp_path, data, {"SGD": golden["SGD"] + 1e-8})
    assert not verify(tmp_path)[0].is_passed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("y"), "has no array 'y'"),
        (lambda d: d.pop("cluster"), "has no array 'cluster'"),
        (lambda d: d.update(shape=np.array([61, 3])), r"do not fit the shape \[61, 3\]"),
        (lambda d: d.update(indices=d["indices"] + 1), "no rows of that shape"),
        (lambda d: d.update(data=d["data"] * np.nan), "not finite"),
        (lambda d: d.update(cluster=d["cluster"] * 2), "a number from 0 to 2"),
    ],
)
def test_malformed_logistic_problems_are_refused_by_name(tmp_path, change, said):
    data, golden = logistic_problem(tmp_path)
    change(data)
    write(tmp_path, data, golden)
    with pytest.raises(ScenarioError, match=said):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d, g: d.pop("Y"), "has no array 'Y'"),
        (lambda d, g: d.update(X=d["X"][0]), r"X has the shape \(10, 4\).*devices, samples"),
        (lambda d, g: d.update(Y=d["Y"][:, :5]), r"Y has the shape \(3, 5\).*\(3, 10\)"),
        (lambda d, g: d.update(X=d["X"] * np.nan), "X.*not finite"),
        (lambda d, g: d.update(X=d["X"].astype(str)), "X.*numbers"),
        (lambda d, g: g.update(FedAvg=g["SGD"]), "'FedAvg' is none of.*SGD"),
        (lambda d, g: g.update(SGD=g["SGD"][:, :3]), r"SGD has the shape \(6, 3\).*\(rounds, 4\)"),
        (lambda d, g: g.clear(), "no iterates"),
        (lambda d, g: g.update(mask=np.ones((6, 2), bool)), r"mask has the shape \(6, 2\)"),
        (lambda d, g: g.update(mask=np.zeros((6, 3), bool)), "mask.*nobody.*round 1"),
        (lambda d, g: g.update(SGD_PP3=g["SGD"]), "'SGD_PP3' is none of"),
    ],
)
def test_malformed_golden_traces_are_refused_by_name(tmp_path, change, said):
    data, golden = problem(tmp_path)
    change(data, golden)
    write(tmp_path, data, golden)
    with pytest.raises(ScenarioError, match=said):
        verify(tmp_path)


def test_golden_traces_without_their_problem_or_of_no_archive_are_refused(tmp_path):
    problem(tmp_path)
    (tmp_path / "own_data.npz").unlink()
    with pytest.raises(ScenarioError, match="own_data"):
        verify(tmp_path)
    (tmp_path / "own_data.npz").write_bytes(b"PK not really")
    with pytest.raises(ScenarioError, match="cannot be read as arrays"):
        verify(tmp_path)
