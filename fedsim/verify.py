"""Replay of reference cases through the real engines, to see whether answers are still right.

The cases ship with the package (`fedsim/reference`), so that a user can check an installation, and
the tests read the same files. Those of the network were computed by SimGrid, an independent
simulator (the tolerance is relative to each flow's duration); those of collectives are exact
counts, send lists and times. Those of compression are iterates of every algorithm of the MCM family
on least squares, with deterministic rounding: they go through the real strategy, its device half,
the vectorised executor and the network grid; so do those of another problem, logistic regression
on clustered samples included.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from math import inf
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import simpy
import torch
from numpy.typing import NDArray

from fedsim import registry
from fedsim.data.federated import FederatedData, federate
from fedsim.data.tables import clustered
from fedsim.devices import DeviceFleet
from fedsim.errors import ScenarioError
from fedsim.executors.vectorised import VectorisedExecutor
from fedsim.flower.compat import quiet_flower
from fedsim.flower.grid import NODE_BASE, NetworkGrid
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.server import initial_arrays
from fedsim.flower.session import session
from fedsim.learning.config import LocalConfig
from fedsim.learning.convex import ConvexProblem
from fedsim.learning.models import linear_regression, logistic_regression
from fedsim.learning.threads import one_thread
from fedsim.learning.trainer import Trainer
from fedsim.network import replay, star_network
from topologies.replay import Replayed, is_collective_reference, replay_collectives

__all__ = ["COMPRESSION_TOLERANCE", "TOLERANCE", "FamilyResult", "network_error", "verify"]

TOLERANCE = 1e-6
"""Of the network's answers."""

COMPRESSION_TOLERANCE = 1e-9
"""Of the iterates of compressed algorithms, relative to the largest entry of a trace (or 1)."""

FloatArray = NDArray[np.float64]

_SHIPPED = ("collectives.json.gz", "encoding_vectors.json", "network.json.gz")
_LEVELS = 3  # of the quantisation in golden traces
_VECTOR_KEYS = {"v", "u", "s", "dense_hex", "sparse_hex"}
_ALGORITHMS = {
    "ArtemisND": "artemis_nd",
    "BiQSGD": "bi_qsgd",
    "DblSqz": "double_squeeze",
    "MCM-a0": "mcm_no_memory",
    "MCM-a1": "mcm_undamped",
    "MCM-noDwnMem": "mcm_no_memory",
    "RandMCM": "rand_mcm",
}


@dataclass(frozen=True, slots=True)
class FamilyResult:
    """How well the cases of one family agree.

    Attributes
    ----------
    family : str
    n_cases : int
    worst : float
        Largest relative error; inf if something failed that should not have, or the reverse.
    worst_case : str
        The case where it occurs.
    tolerance : float
    """

    family: str
    n_cases: int
    worst: float
    worst_case: str
    tolerance: float

    @property
    def is_passed(self) -> bool:
        """Whether the worst error is within the tolerance."""
        return self.worst <= self.tolerance


def verify(cases: Path | None = None) -> list[FamilyResult]:
    """Replay reference cases.

    Parameters
    ----------
    cases : Path, optional
        A directory of ``*.json`` or ``*.json.gz`` files, or one such file; by default the cases
        that ship with the package. A file holds one network case, a list of them, or answers for
        collectives. Golden traces of compression are ``NAME_golden.npz`` (or
        ``NAME_golden_pp.npz``, under partial participation) beside ``NAME_data.npz``: least squares
        ``X``, ``Y``, or the sparse rows and clusters of a logistic regression
        (`fedsim.data.tables.load_libsvm`). A ``NAME_summary.json`` is left alone.

    Returns
    -------
    list of FamilyResult
        One for each family, in order of its name.

    Raises
    ------
    ScenarioError
        If there are no cases, or a file is not readable as one.
    """
    found: dict[str, list[Replayed]] = {}
    traces = list(_traces(cases))
    for name, content in _read(cases):
        try:
            for answer in _replay(name, content):
                found.setdefault(answer.family, []).append(answer)
        except ScenarioError:
            if not traces:  # beside golden traces there may be tables of other things
                raise
    for name, problem, golden in traces:
        for answer in _replay_traces(name, problem, golden):
            found.setdefault(answer.family, []).append(answer)
    if not found:
        raise ScenarioError(f"{cases}: no reference cases (*.json, *_golden.npz) there")
    results = []
    for family, answers in sorted(found.items()):
        worst = max(answers, key=lambda answer: (answer.error > answer.tolerance, answer.error))
        results.append(FamilyResult(family, len(answers), worst.error, worst.case, worst.tolerance))
    return results


def network_error(case: Mapping[str, Any]) -> float:
    """Return the largest error of a flow's completion, relative to its duration.

    Parameters
    ----------
    case : mapping
        As `fedsim.network.replay` takes it, with the answers ``finish_s`` (flow id → time, null if
        the flow fails).
    """
    worst = 0.0
    for flow, finished in zip(case["flows"], replay(case), strict=True):
        expected = case["finish_s"].get(flow["id"])
        if (expected is None) != (finished is None):
            return inf
        if expected is not None and finished is not None:
            duration = max(expected - flow["start_s"], 1e-9)
            worst = max(worst, abs(finished - expected) / duration)
    return worst


def _replay(name: str, content: Any) -> Iterator[Replayed]:
    if is_collective_reference(content):
        yield from replay_collectives(content)
        return
    if isinstance(content, list) and all(
        isinstance(each, dict) and each.keys() >= _VECTOR_KEYS for each in content
    ):
        yield from _replay_messages(name, content)
        return
    for index, case in enumerate(content if isinstance(content, list) else [content]):
        if not isinstance(case, dict) or not {"links", "flows", "finish_s"} <= case.keys():
            raise ScenarioError(
                f"{name}: entry {index} is neither a network case (links, flows, finish_s) nor "
                "answers for collectives"
            )
        family = f"network {case.get('family', 'case')}"
        yield Replayed(family, str(case.get("name", name)), network_error(case), TOLERANCE)


def _read(cases: Path | None) -> Iterator[tuple[str, Any]]:
    """Yield the name and content of every file."""
    if cases is None:
        for name in _SHIPPED:
            data = resources.files("fedsim").joinpath("reference", name).read_bytes()
            yield name, _content(name, data)
        return
    if not cases.exists():
        raise ScenarioError(f"{cases}: no such file or directory")
    files: Iterable[Path] = [] if cases.suffix == ".npz" else [cases]
    if cases.is_dir():
        found = [*cases.glob("*.json"), *cases.glob("*.json.gz")]
        files = sorted(file for file in found if not file.name.endswith("_summary.json"))
    for file in files:
        yield str(file), _content(str(file), file.read_bytes())


def _content(name: str, data: bytes) -> Any:
    try:
        return json.loads(gzip.decompress(data) if name.endswith(".gz") else data)
    except (OSError, EOFError, ValueError) as error:
        raise ScenarioError(f"{name}: not JSON ({error})") from error


# --- golden traces of compression -----------------------------------------------------------------


def _traces(cases: Path | None) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Yield the name, problem and golden iterates of every pair of files."""
    root: Any = resources.files("fedsim").joinpath("reference") if cases is None else cases
    if cases is not None and cases.is_file():
        root = cases.parent
        files = [cases] if cases.suffix == ".npz" else []
    else:
        files = sorted(root.iterdir(), key=lambda file: file.name) if root.is_dir() else []
    for file in files:
        name, marked, rest = file.name.partition("_golden")
        if not marked or rest not in (".npz", "_pp.npz"):
            continue
        yield file.name, _arrays(root.joinpath(f"{name}_data.npz")), _arrays(file)


def _arrays(file: Any) -> dict[str, NDArray[Any]]:
    try:
        with file.open("rb") as opened, np.load(opened) as arrays:
            found = dict(arrays)
    except (OSError, ValueError, BadZipFile) as error:
        raise ScenarioError(f"{file}: cannot be read as arrays ({error})") from error
    return found


def _replay_messages(name: str, vectors: Sequence[Mapping[str, Any]]) -> Iterator[Replayed]:
    """Compare encoded messages byte for byte: an error is the number of bytes that differ."""
    quantise = registry.import_object("strategies.compression:Quantise")
    pack = registry.import_object("strategies.compression:pack")
    for i, vector in enumerate(vectors):
        rows, draws = (torch.tensor([vector[key]], dtype=torch.float64) for key in "vu")
        for encoding in ("dense", "sparse"):
            used = quantise(levels=vector["s"], encoding=encoding)
            found = pack(used, rows, lambda shape, dtype, draws=draws: draws).encode(0)
            expected = bytes.fromhex(vector[f"{encoding}_hex"])
            n_wrong = sum(a != b for a, b in zip(found, expected, strict=False))
            error = float(n_wrong + abs(len(found) - len(expected)))
            yield Replayed("compression messages", f"{name} {i} {encoding}", error, 0.0)


def _replay_traces(
    name: str, problem: Mapping[str, Any], golden: Mapping[str, Any]
) -> Iterator[Replayed]:
    """Run every algorithm of a file; an error is relative to the largest entry, or 1."""
    data = _logistic(name, problem) if "indptr" in problem else _least_squares(name, problem)
    d = data.x.shape[1]
    mask = golden.get("mask")
    if mask is not None:
        _check_mask(name, mask, len(data.size))
    smoothness = ConvexProblem(data, "logistic" if data.n_classes else "squared_error").smoothness
    rate = 1 / smoothness if mask is None else 1 / (2 * smoothness)
    traces = {key: trace for key, trace in golden.items() if key != "mask"}
    if not traces:
        raise ScenarioError(f"{name}: no iterates there; an array for each algorithm is needed")
    for key, expected in traces.items():
        algorithm, correction = _algorithm(name, key)
        if expected.ndim != 2 or expected.shape[1] != d or not len(expected):
            raise ScenarioError(
                f"{name}: {key} has the shape {expected.shape}, and should have (rounds, {d})"
            )
        settings: dict[str, Any] = {"learning_rate": rate}
        if mask is not None:
            settings |= {"participation": 0.5, "correction": correction}
            if len(mask) < len(expected):
                raise ScenarioError(
                    f"{name}: mask has {len(mask)} rounds, {key} has {len(expected)}"
                )
        found = _iterates(data, algorithm, settings, len(expected), mask)
        scale = max(1.0, float(np.abs(expected).max()))
        error = float(np.abs(found - expected).max()) / scale
        family = "compression" if mask is None else "compression, partial participation"
        yield Replayed(
            family, f"{name} {key}", error if error == error else inf, COMPRESSION_TOLERANCE
        )


def _algorithm(name: str, key: str) -> tuple[str, str]:
    """Return the algorithm and the correction that an array's name stands for."""
    schemes = registry.import_object("strategies.bidirectional:SCHEMES")
    known = {scheme.replace("_", ""): scheme for scheme in schemes}
    label, _, correction = key.partition("_PP")
    algorithm = _ALGORITHMS.get(label, known.get(label.lower().replace("_", "")))
    if algorithm is None or correction not in ("", "1", "2"):
        valid = ", ".join(sorted({*_ALGORITHMS, *(scheme.upper() for scheme in schemes)}))
        raise ScenarioError(
            f"{name}: '{key}' is none of {valid}, with _PP1 or _PP2 under partial participation"
        )
    return algorithm, f"pp{correction or 1}"


def _logistic(name: str, problem: Mapping[str, Any]) -> FederatedData:
    """Return classes 0 and 1, standardised features with a column of ones, cluster by cluster."""
    dataset = clustered(name, problem)
    device = dataset.device_train
    assert device is not None
    n_devices = int(device.max()) + 1
    return federate(dataset, [np.flatnonzero(device == i) for i in range(n_devices)])


def _least_squares(name: str, problem: Mapping[str, Any]) -> FederatedData:
    """Return samples and labels of an array (devices, n, d) and one (devices, n).

    Raises
    ------
    ScenarioError
        If they are no numbers or do not fit together.
    """
    for key in ("X", "Y"):
        if key not in problem:
            raise ScenarioError(f"{name}: its data has no array {key!r}, only {', '.join(problem)}")
        if problem[key].dtype.kind not in "fiu":
            raise ScenarioError(f"{name}: {key} holds {problem[key].dtype}, not numbers")
        if not np.isfinite(problem[key]).all():
            raise ScenarioError(f"{name}: {key} has entries that are not finite")
    x, y = (np.asarray(problem[key], np.float64) for key in ("X", "Y"))
    if x.ndim != 3 or 0 in x.shape:
        raise ScenarioError(
            f"{name}: X has the shape {x.shape}, and should have (devices, samples, dimension)"
        )
    if y.shape != x.shape[:2]:
        raise ScenarioError(
            f"{name}: Y has the shape {y.shape}, and should have {x.shape[:2]} as X has"
        )
    n_devices, n, d = x.shape
    rows, labels = torch.from_numpy(x.reshape(-1, d).copy()), torch.from_numpy(y.reshape(-1).copy())
    size = np.full(n_devices, n)
    start = np.cumsum(size) - size
    return FederatedData("least squares", rows, labels, start, size, rows[:1], labels[:1], 0)


def _check_mask(name: str, mask: NDArray[Any], n_devices: int) -> None:
    if mask.ndim != 2 or mask.shape[1] != n_devices:
        raise ScenarioError(
            f"{name}: mask has the shape {mask.shape}, and should have (rounds, {n_devices})"
        )
    for number, active in enumerate(mask, start=1):
        if not active.any():
            raise ScenarioError(f"{name}: mask has nobody take part in round {number}")


def _iterates(
    data: FederatedData,
    algorithm: str,
    settings: Mapping[str, Any],
    rounds: int,
    mask: NDArray[Any] | None,
) -> NDArray[np.float64]:
    """Return w_1, w_2, ... of a strategy on a network grid, (rounds, d)."""
    n_devices, d = len(data.size), data.x.shape[1]
    quantise = {"kind": "quantise", "levels": _LEVELS, "precision": "float64"}
    participants = None
    if mask is not None:

        def participants(server_round: int, nodes: Sequence[int]) -> list[int]:
            return [
                node for node, takes in zip(nodes, mask[server_round - 1], strict=True) if takes
            ]

    with quiet_flower(), one_thread():
        strategy = registry.resolve("strategy", "compressed_sgd")(
            algorithm=algorithm,
            up=quantise,
            down=quantise,
            rounding="nearest",
            participants=participants,
            **settings,
        )
        made = logistic_regression if data.n_classes else linear_regression
        trainer = Trainer(made((d,), data.n_classes, bias=False), data, seed=0)
        plan = WorkPlan(LocalConfig(batch_size=0), data.size)
        env = simpy.Environment()
        fast = np.full(n_devices, np.inf)
        network = star_network(env, uplink_bps=fast, downlink_bps=fast, latency=np.zeros(n_devices))
        executor = VectorisedExecutor(
            trainer, plan, node_base=NODE_BASE, halves=strategy.device_halves
        )
        fleet = DeviceFleet(np.ones(n_devices), None)
        grid = NetworkGrid(env, network, fleet, executor, plan)
        iterates: list[NDArray[np.float64]] = []

        def note(server_round: int, arrays: Any) -> None:
            if server_round:
                iterates.append(next(iter(arrays.values())).numpy().reshape(-1))

        with session(grid, 0):
            strategy.start(grid, initial_arrays(trainer), num_rounds=rounds, evaluate_fn=note)
    return np.array(iterates)
