"""The directory of a run: made ready, taken up again, and what it tells of the world."""

import logging
import platform
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedsim.errors import ScenarioError
from fedsim.flower.records import array_bytes
from fedsim.flower.server import (
    initial_arrays,
)
from fedsim.recorder import (
    NetworkWorld,
    World,
    write_world,
)
from fedsim.results import StrategyResult, load_run
from fedsim.scenario import Scenario, load_scenario
from fedsim.simulation import Simulation, access_links, make_graph, make_peers
from topologies.attributes import servers_of, switches_of
from topologies.dynamics import b_connectivity

__all__ = ["describe_world", "prepare", "versions"]

_log = logging.getLogger(__name__)


def prepare(
    scenario: Scenario, out: Path, *, resume: bool = False, force: bool = False
) -> dict[str, StrategyResult]:
    """Make `out` ready; return the strategies that a resumed run keeps."""
    text = scenario.to_yaml(versions())
    finished: dict[str, StrategyResult] = {}
    if out.exists() and not out.is_dir():
        raise ScenarioError(f"--out: {out} is not a directory")
    try:
        if out.is_dir() and any(out.iterdir()):
            if resume:
                finished = _finished(scenario, out)
            elif force:
                _remove_run(out)
            else:
                raise ScenarioError(
                    f"--out: {out} exists and is not empty; give --resume to go on with the run "
                    "in it, --force to replace it, or another directory"
                )
        out.mkdir(parents=True, exist_ok=True)
        (out / "scenario.yaml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ScenarioError(f"--out: cannot write {out}: {error.strerror}") from error
    return finished


def _finished(scenario: Scenario, out: Path) -> dict[str, StrategyResult]:
    """Return the complete strategies of an earlier run of the same scenario."""
    try:
        earlier = load_run(out)
        before = load_scenario(out / "scenario.yaml").resolved()
    except ScenarioError as error:
        raise ScenarioError(f"--resume: {error}") from error
    if before != scenario.resolved():
        changed = _first_difference(before, scenario.resolved())
        raise ScenarioError(
            f"--resume: {out} holds a run of another scenario (first difference: {changed}); "
            "give --force to replace it, or another directory"
        )
    kept = earlier.strategies.items()
    return {name: r for name, r in kept if r.complete and name in scenario.strategies}


def _first_difference(before: Any, after: Any, path: str = "") -> str:
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        return f"{path or 'the whole file'}: {before!r}, now {after!r}"
    for key in {**before, **after}:
        if before.get(key) != after.get(key):
            where = f"{path}.{key}" if path else str(key)
            return _first_difference(before.get(key), after.get(key), where)
    return "none"


def _remove_run(out: Path) -> None:
    """Remove the files of an earlier run, and nothing else that may lie beside them.

    They are moved aside first: all of them, or, where one cannot be moved, none.
    """
    files = ("scenario.yaml", "summary.json", "world.json", "report.html")
    old = [
        path
        for path in out.iterdir()
        if path.name in files
        or (path.is_dir() and (path.name == "plots" or (path / "rounds.jsonl").exists()))
    ]
    aside = Path(tempfile.mkdtemp(prefix=".replaced-", dir=out))
    moved: list[Path] = []
    try:
        for path in old:
            path.rename(aside / path.name)
            moved.append(path)
    except OSError:
        for path in moved:
            (aside / path.name).rename(path)
        aside.rmdir()
        raise
    try:
        shutil.rmtree(aside)
    except OSError as error:
        _log.warning("cannot remove the earlier run, now in %s: %s", aside, error.strerror)


@cache
def versions() -> dict[str, str]:
    """Return the versions that results depend on, by name."""
    from fedsim import __version__

    packages = ("flwr", "torch", "numpy", "simpy")
    found = {name: version(name) for name in packages}
    return {"fedsim": __version__, "python": platform.python_version()} | found


def describe_world(path: Path, scenario: Scenario, simulations: Mapping[str, Simulation]) -> None:
    """Write what a report tells of the world that strategies were compared in."""
    first = next(iter(simulations.values()))
    data, layout = first.trainer.data, first.trainer.layout
    labels = data.label_counts()  # no rows where data are made when they are asked for
    target = scenario.evaluation.target or (scenario.stop.accuracy if scenario.stop else None)
    write_world(
        path,
        World(
            name=scenario.name,
            seed=scenario.seed,
            strategies=list(scenario.strategies),
            rounds=scenario.rounds,
            target=target,
            dataset=_in_words(scenario.data.dataset.spec()),
            partition=_in_words(scenario.data.partition.spec()),
            classes=data.n_classes,
            test_samples=len(data.y_test),
            model=_in_words(scenario.model.spec()),
            parameters=layout.size,
            model_bytes=sum(map(array_bytes, initial_arrays(first.trainer).values())),
            samples=data.size,
            label_counts=labels if len(labels) == data.n_devices and data.n_classes else None,
            speed=first.fleet.speed,
            availability=_in_words(scenario.devices.availability.spec()),
            networks=_networks(simulations),
        ),
    )


def _networks(simulations: Mapping[str, Simulation]) -> list[NetworkWorld]:
    """Describe each different network of the comparison once."""
    users: dict[str, list[str]] = {}
    for name, simulation in simulations.items():
        world = simulation.scenario
        key = world.model_dump_json(include={"topology", "peers", "links", "network"})
        users.setdefault(key, []).append(name)
    described = []
    for names in users.values():
        world = simulations[names[0]].scenario
        described.append(
            NetworkWorld(
                strategies=names,
                variation=_in_words(world.links.spec()),
                message_loss=world.network.message_loss,
                **_shape(world),
            )
        )
    return described


def _shape(world: Scenario) -> dict[str, Any]:
    """Return what a report tells of the links, as fields of a `NetworkWorld`."""
    graph = make_graph(world)
    measures = _connectivity(world)
    if graph is not None:
        links = [link for _, _, link in graph.edges(data=True) for _ in range(2)]
        return {
            "topology": graph.name,
            "switches": len(switches_of(graph)),
            "servers": len(servers_of(graph)),
            "links": len(links),
            "link_bps": [link["bandwidth"] for link in links],
            "link_latency": [link["latency"] for link in links],
            "measures": measures,
        }
    up, down, latency = access_links(world)
    return {
        "topology": "star",
        "servers": 1,
        "links": 2 * world.data.devices,
        "uplink_bps": up,
        "downlink_bps": down,
        "latency": latency,
        "server_uplink_bps": world.topology.server_bandwidth,
        "server_downlink_bps": world.topology.server_bandwidth,
        "measures": measures,
    }


def _connectivity(world: Scenario) -> dict[str, float]:
    """Return how well graphs that are drawn anew in each round connect the devices."""
    peers = make_peers(world, None)
    if peers is None or not world.peers or not world.peers.redraw:
        return {}
    found = b_connectivity(lambda number: peers(number + 1), world.rounds)
    measures = {
        "share of rounds connected": found.connected_share,
        "mean isolated devices": found.mean_isolated,
        "mean neighbours": found.mean_degree,
    }
    return measures | ({} if found.window is None else {"b_connectivity": found.window})


def _in_words(spec: Mapping[str, Any]) -> str:
    """Return "kind (argument value, ...)" for a part of a scenario."""
    arguments = ", ".join(f"{k} {v}" for k, v in spec.items() if k != "kind" and v is not None)
    return f"{spec['kind']} ({arguments})" if arguments else str(spec["kind"])
