"""From a scenario to a run: the only place where the parts meet.

`build` connects one strategy with its world, nothing started; `run` does that for every strategy
of a scenario and writes the records.
"""

import logging
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from multiprocessing.connection import wait as wait_for
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simpy
from numpy.typing import NDArray
from pydantic import BaseModel

from fedsim import registry
from fedsim.data.datasets import Dataset, hold_out, shorten
from fedsim.data.federated import DeviceData, federate
from fedsim.data.partition import check_parts
from fedsim.devices import DeviceFleet, EnergyCosts, make_fleet
from fedsim.errors import FedsimError, MissingDataError, ScenarioError
from fedsim.executors.build import added_config, halves_of, make_executor, make_trainer
from fedsim.executors.crew import Crew
from fedsim.flower.compat import quiet_flower
from fedsim.flower.grid import Executor, NetworkGrid
from fedsim.flower.instructions import WorkPlan, training_config
from fedsim.flower.peers import PeerGraph
from fedsim.flower.records import array_bytes
from fedsim.flower.server import (
    initial_arrays,
    save_arrays,
    save_confusion,
    score,
    score_models,
)
from fedsim.flower.session import Outcome, StopRule, check_strategy, start
from fedsim.graphs import between_devices, build_graph, peer_graphs
from fedsim.learning.attacks import Attack, Attacks, choose_attackers, flip_labels
from fedsim.learning.config import LocalConfig
from fedsim.learning.convex import ConvexProblem, problem_of
from fedsim.learning.cost import model_cost
from fedsim.learning.models import build_model
from fedsim.learning.threads import one_thread
from fedsim.learning.trainer import Trainer
from fedsim.network import Network, graph_network, star_network
from fedsim.network.failures import Failure
from fedsim.recorder import (
    LinkRow,
    NetworkWorld,
    Recorder,
    RoundRow,
    World,
    summarise,
    write_summary,
    write_world,
)
from fedsim.report.html import write_report
from fedsim.results import FAILED, RunResult, StrategyResult, load_run, strategy_result
from fedsim.scenario import Data, Scenario, draw, load_scenario, place_of
from fedsim.streams import stream
from topologies.attributes import Graph, servers_of, switches_of
from topologies.dynamics import b_connectivity
from topologies.generators import star
from topologies.placement import COLLECTIVES

__all__ = [
    "Progress",
    "RunError",
    "Runs",
    "Simulation",
    "build",
    "check",
    "describe_world",
    "prepare",
    "record_links",
    "run",
]

_log = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
State = Literal["running", "done", "diverged", "failed"]
MakeExecutor = Callable[[Scenario, str], Executor]
"""From a strategy's scenario and its name to who computes, instead of the scenario's executor."""

_STARTS_WITH_PLACE = re.compile(rf"(--|device:|({'|'.join(Scenario.model_fields)})(\.[^ :]+)*: )")


class RunError(FedsimError):
    """A strategy could not be run to its end; the others were."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one strategy is.

    Attributes
    ----------
    strategy : str
    round, rounds : int
        Done, and asked for.
    virtual_time : float
        Seconds.
    accuracy : float or None
        The last one known.
    bytes_total : int
        In all directions, so far.
    state : {"running", "done", "diverged", "failed"}
    message : str
        Why it diverged or failed.
    """

    strategy: str
    round: int
    rounds: int
    virtual_time: float
    accuracy: float | None
    bytes_total: int
    state: State
    message: str = ""


@dataclass(frozen=True, slots=True)
class Simulation:
    """One strategy and its world, connected, nothing started.

    Attributes
    ----------
    scenario : Scenario
        As this strategy sees it, its overrides applied.
    name : str
        The strategy's name.
    strategy : flwr.serverapp.strategy.Strategy
    crew : Crew
        Worker processes, where the executor wants some.
    problem : ConvexProblem or None
        What training minimises, where the excess loss is asked for.
    """

    scenario: Scenario
    name: str
    env: simpy.Environment
    network: Network
    fleet: DeviceFleet
    trainer: Trainer
    executor: Executor
    grid: NetworkGrid
    strategy: Any
    crew: Crew
    problem: ConvexProblem | None = None

    def run(
        self,
        record: Callable[[RoundRow], None] = lambda row: None,
        recorder: Recorder | None = None,
    ) -> Outcome:
        """Run the strategy to its end.

        Parameters
        ----------
        record : callable
            Gets each line as it is closed.
        recorder : Recorder, optional
            Gets every transfer and every span of local work, where it keeps them.
        """
        if recorder is not None and recorder.has_transfers:
            self.grid.recorder = recorder
        scenario = self.scenario
        stop, on = scenario.stop, scenario.evaluation.on
        with self.crew:
            return start(
                self.strategy,
                self.grid,
                initial_arrays(self.trainer),
                rounds=scenario.rounds,
                seed=scenario.seed,
                timeout=scenario.round_timeout,
                train_config=training_config(_local_config(scenario), added_config(scenario)),
                evaluate=None
                if on == "devices"
                else partial(score, self.trainer, on=on, problem=self.problem),
                evaluate_models=partial(score_models, self.trainer, on=on),
                evaluate_every=scenario.evaluation.every,
                record=record,
                stop=StopRule(stop.accuracy, stop.time, stop.traffic) if stop else None,
            )


# --- building -------------------------------------------------------------------------------------


def build(
    scenario: Scenario,
    strategy: str | None = None,
    *,
    device: str = "auto",
    data_dir: Path | None = None,
    executor: MakeExecutor | None = None,
) -> Simulation:
    """Connect one strategy of a scenario with its world.

    Parameters
    ----------
    scenario : Scenario
    strategy : str, optional
        Its name; may be left out where there is only one.
    device : str
        Where tensors live: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
    data_dir : Path, optional
        Where data files are looked for.
    executor : callable, optional
        Makes who computes, instead of what the scenario says.

    Raises
    ------
    ScenarioError
        If the parts do not fit together; names the place in the scenario.
    """
    return _connect(scenario, strategy, device, _Loader(scenario, data_dir), Crew(), executor)


def check(scenario: Scenario, *, device: str = "auto", data_dir: Path | None = None) -> str:
    """Build every strategy of a scenario, as `run` does before it writes anything.

    Returns
    -------
    str
        What could not be checked, since the data set's files are not on this machine; else "".

    Raises
    ------
    ScenarioError
        If the parts do not fit together; names the place in the scenario.
    """
    load, missing = _Loader(scenario, data_dir), ""
    with one_thread():
        for name in scenario.strategies:
            try:
                _connect(scenario, name, device, load, Crew())
            except MissingDataError as error:
                missing = str(error)
    return missing


def _connect(
    scenario: Scenario,
    strategy: str | None,
    device: str,
    load: "_Loader",
    crew: Crew,
    make: MakeExecutor | None = None,
) -> Simulation:
    names = list(scenario.strategies)
    if strategy is None and len(names) == 1:
        strategy = names[0]
    if strategy not in scenario.strategies:
        raise ScenarioError(f"strategies: name one of {', '.join(names)}, not {strategy!r}")
    world = scenario.strategy_world(strategy)
    place = f"strategies.{strategy}"
    with _at(place, is_strategy=True), quiet_flower():
        made = registry.build("strategy", world.strategies[strategy].spec())
        check_strategy(made, world.data.devices)
    if world.compression is not None:
        with _at(f"{place}: compression"), quiet_flower():
            made = _compressed(made, world)
    env = simpy.Environment()
    with _at("topology"):
        graph = _build_graph(world)
        network = _build_network(env, world, graph)
    with _at(f"{place}.collective"):
        _check_collective(made, graph, world.data.devices)
    with _at("training"):
        config = _local_config(world)
    with _at("data"):
        data = load()
    with _at("attacks"):
        attacks = _attacks_of(world)
        data = data if attacks is None else flip_labels(data, attacks)
    if world.evaluation.on == "validation" and getattr(data, "x_validation", None) is None:
        raise ScenarioError(
            "evaluation.on: 'validation' needs data.validation_fraction above 0 "
            f"(it is {world.data.validation_fraction})"
        )
    with _at("model"):
        trainer = _build_trainer(world, data, device, crew, attacks)
    with _at(place if world.compression is None else f"{place}: compression"):
        arrays = initial_arrays(trainer).values()
        sizes = [math.prod(array.shape) for array in arrays if "float" in array.dtype]
        for half in halves_of(made):
            half.check(sizes)
    loss = trainer.stack.loss
    if world.evaluation.confusion and (loss.predict is None or trainer.stack.n_classes == 0):
        raise ScenarioError(
            f"evaluation.confusion: the loss {loss.name!r} knows no classes to confuse"
        )
    problem = None
    if world.evaluation.excess_loss:
        with _at("evaluation.excess_loss"):
            problem = load.problem(trainer)
    with _at("devices"):
        fleet = _build_fleet(world, trainer)
    idle = frozenset() if attacks is None else attacks.idle
    plan = WorkPlan(config, data.size, world.seed, idle)
    with _at("executor"):
        if make is None:
            executor = make_executor(world, trainer, plan, made, crew)
        else:
            executor = make(world, strategy)
    with _at("peers"):
        peers = _build_peers(world, graph)
        if peers is None and _needs_peers(made):
            raise ScenarioError(
                f"peers: strategy '{strategy}' exchanges with neighbours, and the topology "
                f"'{world.topology.kind}' links no two devices directly; set 'peers', for example "
                "peers: {kind: ring}"
            )
    grid = NetworkGrid(
        env,
        network,
        fleet,
        executor,
        plan,
        loss_reply=world.network.loss_reply,
        header_bytes=world.network.header_bytes,
        accounting=world.network.accounting,
        free_evaluation=world.evaluation.cost == "free",
        cancel_late=world.network.late == "cancel",
        peers=peers,
        seed=world.seed,
        profile=trainer.stack.profile,
    )
    return Simulation(
        world, strategy, env, network, fleet, trainer, executor, grid, made, crew, problem
    )


def _needs_peers(strategy: Any) -> bool:
    """Return whether a strategy, or one that it wraps, must be told who neighbours are."""
    while strategy is not None:
        if getattr(strategy, "needs_peers", False):
            return True
        strategy = getattr(strategy, "strategy", None)
    return False


def _check_collective(strategy: object, graph: Graph | None, devices: int) -> None:
    """Refuse a collective that the topology cannot run, with the reason that `placement` gives."""
    make = COLLECTIVES.get(getattr(strategy, "collective", ""))
    if make is not None:
        make(star(devices) if graph is None else graph)


@contextmanager
def _at(place: str, *, is_strategy: bool = False) -> Iterator[None]:
    """Turn whatever goes wrong while a part is built into an error that names its place."""
    try:
        yield
    except Exception as error:  # a part may be anybody's code
        said = registry.reason(error)
        cause = error
        while isinstance(cause, registry.PartError) and isinstance(cause.__cause__, FedsimError):
            cause = cause.__cause__
        if _STARTS_WITH_PLACE.match(registry.reason(cause)):
            said = registry.reason(cause)
        elif isinstance(error, registry.PartError) and not is_strategy:
            said = f"{place_of(error.kind)}: {said}"
        else:
            said = f"{place}: {said}"
        if not isinstance(error, FedsimError):
            _log.debug("%s cannot be built", place, exc_info=True)
        kind = MissingDataError if isinstance(cause, MissingDataError) else ScenarioError
        raise kind(said) from error


class _Loader:
    """Loads and splits the data when it is first asked, once for all strategies."""

    def __init__(self, scenario: Scenario, data_dir: Path | None) -> None:
        samples = scenario.evaluation.samples
        self._load = cache(partial(_load_data, scenario.data, scenario.seed, data_dir, samples))
        self._problems: dict[tuple[str, bool], ConvexProblem] = {}

    def __call__(self) -> DeviceData:
        return self._load()

    def problem(self, trainer: Trainer) -> ConvexProblem:
        """Return what training minimises, the same object where strategies have it in common."""
        module, loss = trainer.stack.module, trainer.stack.loss.name
        key = loss, getattr(module, "bias", None) is not None
        found = problem_of(module, self._load(), loss)
        return self._problems.setdefault(key, found)


def _load_data(data: Data, seed: int, data_dir: Path | None, samples: int | None) -> DeviceData:
    dataset = registry.build(
        "dataset",
        data.dataset.spec(),
        test_fraction=data.test_fraction,
        n_devices=data.devices,
        seed=seed,
        data_dir=data_dir,
    )
    if not isinstance(dataset, Dataset):  # made for so many devices, nothing is left to split
        if samples is not None:
            kind = data.dataset.kind
            raise ScenarioError(f"evaluation.samples: {kind} is made on the devices, leave it out")
        return _made(dataset, data)
    if data.validation_fraction:
        dataset = hold_out(dataset, validation_fraction=data.validation_fraction, seed=seed)
    if samples is not None:
        dataset = shorten(dataset, samples=samples, seed=seed)
    parts = registry.build(
        "partition",
        data.partition.spec(),
        labels=dataset.y_train,
        n_devices=data.devices,
        rng=stream(seed, "partition"),
        device_ids=dataset.device_train,
    )
    parts = check_parts(parts, data.devices, len(dataset.y_train))
    return federate(
        dataset,
        parts,
        local_test_fraction=data.local_test_fraction,
        rng=stream(seed, "local-test"),
    )


def _made(dataset: Any, data: Any) -> DeviceData:
    """Return data that are born on devices, if the scenario does not ask to split them."""
    kind = data.dataset.kind
    if not hasattr(dataset, "pack"):
        raise ScenarioError(
            f"data.dataset: '{kind}' makes a {type(dataset).__name__}, not a "
            "fedsim.data.datasets.Dataset"
        )
    if data.partition.kind != "iid":
        raise ScenarioError(
            f"data.partition: {kind} is made on the devices; leave the partition out"
        )
    for key in ("validation_fraction", "local_test_fraction"):
        if getattr(data, key):
            raise ScenarioError(f"data.{key}: {kind} is made on the devices and has none")
    made: DeviceData = dataset
    return made


def _build_fleet(scenario: Scenario, trainer: Trainer) -> DeviceFleet:
    devices = scenario.devices
    needs_flops = "FLOP/s" in devices.speed.model_dump_json() or (
        devices.energy is not None and devices.energy.per_flop is not None
    )
    return make_fleet(
        scenario.data.devices,
        scenario.seed,
        speed=registry.build("speed", devices.speed.spec()),
        availability=registry.build("availability", devices.availability.spec()),
        slowdown=registry.build("slowdown", devices.slowdown.spec()),
        on_leave=devices.on_leave,
        energy=EnergyCosts(**_given(devices.energy)) if devices.energy else None,
        flops_per_sample=_flops_per_sample(trainer) if needs_flops else None,
    )


def _flops_per_sample(trainer: Trainer) -> float:
    """Count the operations of one sample; only where asked, since not every model can be traced."""
    data = trainer.data
    is_symbols = str(data.x_test.dtype) == "torch.int64"
    cost = model_cost(trainer.stack.module, data.input_shape, tokens=is_symbols)
    return float(cost.training_flops)


def _access_links(scenario: Scenario) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return uplink and downlink (bit/s) and one-way latency (s) of each device of a star."""
    topology, n_devices, seed = scenario.topology, scenario.data.devices, scenario.seed
    up = topology.bandwidth if topology.uplink is None else topology.uplink
    down = topology.bandwidth if topology.downlink is None else topology.downlink
    return (
        draw(up, n_devices, stream(seed, "uplink")),
        draw(down, n_devices, stream(seed, "downlink")),
        draw(topology.latency, n_devices, stream(seed, "latency")),
    )


def _build_graph(scenario: Scenario) -> Graph | None:
    """Return the topology's graph with the rates and latencies of its links; None for a star."""
    topology, seed = scenario.topology, scenario.seed
    if topology.kind == "star":
        return None
    spread = {"bandwidth": topology.bandwidth, "latency": topology.latency}
    given = {"bandwidth": math.inf, "latency": 0.0}
    figures = {k: v for k, v in spread.items() if isinstance(v, float) and v != given[k]}
    devices, rng = scenario.data.devices, stream(seed, "topology")
    graph = build_graph(topology.spec(), devices, rng, **figures)
    for key in spread.keys() - figures.keys():
        for a, b, link in graph.edges(data=True):
            if link[key] == given[key]:
                name = f"{min(a, b)}-{max(a, b)}"
                link[key] = float(draw(spread[key], 1, stream(seed, f"link-{key}", name))[0])
    return graph


def _build_network(env: simpy.Environment, scenario: Scenario, graph: Graph | None) -> Network:
    options = _transfer_options(scenario) | {
        "link_model": registry.build("link", scenario.links.spec()),
        "seed": scenario.seed,
        "failures": [Failure(**_given(entry)) for entry in scenario.network.failures],
    }
    if graph is not None:
        network = graph_network(env, graph, **options)
        network.server = min(servers_of(graph), default=None)  # of a tree: its root
        return network
    topology = scenario.topology
    up, down, latency = _access_links(scenario)
    return star_network(
        env,
        uplink_bps=up,
        downlink_bps=down,
        latency=latency,
        server_up_bps=topology.server_bandwidth,
        server_down_bps=topology.server_bandwidth,
        **options,
    )


def _build_peers(scenario: Scenario, graph: Graph | None) -> PeerGraph | None:
    """Return who may exchange with whom in a round; None if nobody is linked directly."""
    peers, devices = scenario.peers, scenario.data.devices
    if peers is not None:
        return peer_graphs(peers.spec(), devices, scenario.seed, redraw=peers.redraw)
    linked = None if graph is None else between_devices(graph)
    if linked is None or not linked.number_of_edges():
        return None
    return lambda number: linked


def _transfer_options(scenario: Scenario) -> dict[str, Any]:
    """Return how payloads travel; headers are the grid's, which counts them in the records."""
    options = scenario.network
    not_the_networks = {"loss_reply", "accounting", "header_bytes", "failures", "late"}
    found = {k: v for k, v in _given(options).items() if k not in not_the_networks}
    if "transfer_timeout" in found:
        found["timeout"] = found.pop("transfer_timeout")
    return found


def _given(section: BaseModel) -> dict[str, Any]:
    """Return the values of a section that are not None, in base units."""
    return {key: value for key, value in section if value is not None}


def _attacks_of(scenario: Scenario) -> Attacks | None:
    """Return who attacks and how; None if nobody does."""
    entries = [(Attack(e.kind, e.scale), e.share, e.devices) for e in scenario.attacks]
    return choose_attackers(entries, scenario.data.devices, scenario.seed)


def _build_trainer(
    scenario: Scenario, data: DeviceData, device: str, crew: Crew, attacks: Attacks | None
) -> Trainer:
    factory, arguments = registry.bind("model", scenario.model.spec())
    with warnings.catch_warnings():  # torch warns of layers without weights, refused below
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model = build_model(
            factory, data.input_shape, data.n_classes, seed=scenario.seed, **arguments
        )
    if not hasattr(model, "named_parameters"):
        raise ScenarioError(f"model: this makes a {type(model).__name__}, not a torch module")
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            raise ScenarioError(f"model: {name} has shape {tuple(parameter.shape)}: no weights")
    return make_trainer(
        model,
        data,
        scenario.executor,
        crew,
        loss=scenario.training.loss,
        seed=scenario.seed,
        device=device,
        attacks=attacks,
    )


def _compressed(strategy: Any, scenario: Scenario) -> Any:
    """Return a strategy whose messages are compressed as the scenario says."""
    given = _given(scenario.compression)  # type: ignore[arg-type]
    for way in ("up", "down"):
        if way in given:
            given[way] = registry.build("compressor", given[way].spec())
    wrapper = registry.import_object("strategies.compressed:Compressed")
    return wrapper(strategy, seed=scenario.seed, **given)


def _local_config(scenario: Scenario) -> LocalConfig:
    given = _given(scenario.training)
    given.pop("loss", None)
    given["betas"] = tuple(given["betas"])
    if isinstance(given.get("local_steps"), list):
        given["local_steps"] = tuple(given["local_steps"])
    if "schedule" in given:
        given["schedule"] = registry.build("schedule", given["schedule"].spec())
    return LocalConfig(**given)


# --- running --------------------------------------------------------------------------------------


def run(
    scenario: Scenario,
    out: Path | str | None = None,
    *,
    jobs: int = 1,
    device: str = "auto",
    data_dir: Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    executor: MakeExecutor | None = None,
) -> RunResult:
    """Run every strategy of a scenario in the same world, and write the records.

    Parameters
    ----------
    scenario : Scenario
        From `fedsim.load_scenario`.
    out : Path, optional
        The directory to write (see the file contract in docs); None keeps everything in memory.
    jobs : int
        Strategies to run side by side, in processes; the files are the same. More than 1 needs
        ``if __name__ == "__main__":`` around the call in a script, which each process imports.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    data_dir : Path, optional
        Where data files are looked for.
    resume : bool
        Keep the strategies that `out` has complete, under the same scenario; run the others.
    force : bool
        Replace an earlier run in `out`.
    progress : callable
        Called after each round of each strategy, in this process.
    executor : callable, optional
        Makes who computes, instead of what the scenario says; goes with one job.

    Returns
    -------
    RunResult

    Raises
    ------
    ScenarioError
        If the scenario or `out` cannot be used; nothing is written then.
    RunError
        If a strategy failed; all the others are complete and on disk.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False) and jobs > 1:
        raise SystemExit(1)  # a process of ours imports an unguarded script; the parent tells
    if jobs < 1:
        raise ScenarioError(f"jobs: {jobs} is not at least 1")
    if jobs > 1 and executor is not None:
        raise ScenarioError(f"jobs: {jobs} strategies at once cannot share one executor")
    out = None if out is None else Path(out)
    names = list(scenario.strategies)
    with one_thread(), ExitStack() as stack:
        load, crew = _Loader(scenario, data_dir), stack.enter_context(Crew())
        simulations = {
            name: _connect(scenario, name, device, load, crew, executor) for name in names
        }
        manager = stack.enter_context(_manager()) if jobs > 1 and len(names) > 1 else None
        finished: dict[str, StrategyResult] = {}
        if out is not None:
            finished = prepare(scenario, out, resume=resume, force=force)
            describe_world(out / "world.json", scenario, simulations)
        runs = Runs(scenario, out, finished)
        for name, kept in finished.items():
            progress(_kept(name, kept, scenario.rounds))
        todo = [name for name in names if name not in finished]
        if manager is None or len(todo) < 2:
            for name in todo:
                runs.note(name, *_run_one(simulations.pop(name), out, progress))
        else:
            simulations.clear()
            settings = (scenario, out, device, data_dir)
            queue = manager.Queue()
            _run_in_processes(runs, todo, min(jobs, len(todo)), settings, queue, progress)
    result = runs.result()
    if out is not None:
        write_report(out)
    if runs.failures:
        failed = "; ".join(f"{name}: {why.rstrip('. ')}" for name, why in runs.failures.items())
        others = " Every other strategy is complete." if len(runs.failures) < len(names) else ""
        raise RunError(f"{failed}.{others}")
    return result


class Runs:
    """What has been run so far; `summary.json` is replaced after each strategy."""

    def __init__(
        self, scenario: Scenario, out: Path | None, finished: Mapping[str, StrategyResult]
    ) -> None:
        self._scenario = scenario
        self._out = out
        self._results = dict(finished)
        self.failures: dict[str, str] = {}
        self._save()

    def note(self, name: str, result: StrategyResult | None, failure: str) -> None:
        """Take up the end of one strategy."""
        if result is not None:
            self._results[name] = result
        if failure:
            self.failures[name] = failure
        self._save()

    def _ordered(self) -> dict[str, StrategyResult]:
        return {n: self._results[n] for n in self._scenario.strategies if n in self._results}

    def _save(self) -> None:
        if self._out is not None:
            write_summary(
                self._out / "summary.json",
                name=self._scenario.name,
                seed=self._scenario.seed,
                versions=_versions(),
                strategies={name: r.summary for name, r in self._ordered().items()},
            )

    def result(self) -> RunResult:
        """Return all that is complete."""
        if self._out is not None:
            return load_run(self._out)
        return RunResult(
            name=self._scenario.name,
            seed=self._scenario.seed,
            strategies=self._ordered(),
            versions=_versions(),
            scenario=self._scenario.to_yaml(_versions()),
        )


def _kept(name: str, result: StrategyResult, rounds: int) -> Progress:
    """Return what to tell of a strategy that a resumed run keeps."""
    summary = result.summary
    return Progress(
        strategy=name,
        round=result.rounds[-1].round if result.rounds else 0,
        rounds=rounds,
        virtual_time=summary["virtual_time"],
        accuracy=summary["final_accuracy"],
        bytes_total=summary["bytes_total"],
        state="diverged" if summary["diverged"] else "done",
    )


def _run_one(
    simulation: Simulation, out: Path | None, progress: Callable[[Progress], None]
) -> tuple[StrategyResult | None, str]:
    """Run one strategy; return its result, or why it failed."""
    scenario, name = simulation.scenario, simulation.name
    accuracy: float | None = None
    traffic = 0

    def tell(row: RoundRow | None, state: State, message: str = "") -> None:
        rounds, now = scenario.rounds, simulation.env.now
        number = row.round if row is not None else 0
        progress(Progress(name, number, rounds, now, accuracy, traffic, state, message))

    with Recorder(out, name, transfers=scenario.record.transfers) as recorder:

        def record(row: RoundRow) -> None:
            nonlocal accuracy, traffic
            recorder.round(row)
            traffic += row.bytes_total
            accuracy = accuracy if row.eval_accuracy is None else row.eval_accuracy
            tell(row, "running")

        failed = None if recorder.directory is None else recorder.directory / FAILED
        if failed is not None:
            failed.unlink(missing_ok=True)
        tell(None, "running")
        try:
            outcome = simulation.run(record, recorder)
        except Exception as error:  # of the strategy, which may be anybody's code
            _log.debug("strategy %s failed", name, exc_info=True)
            why = str(error) if isinstance(error, FedsimError) else repr(error)
            if failed is not None:
                failed.write_text(f"{why}\n", encoding="utf-8")
            tell(recorder.rows[-1] if recorder.rows else None, "failed", why)
            return None, why
        target = scenario.evaluation.target
        if target is None and scenario.stop is not None:
            target = scenario.stop.accuracy
        if recorder.has_transfers:
            record_links(recorder, simulation.network)
        summary = summarise(
            recorder.rows,
            target=target,
            diverged=outcome.diverged is not None,
            diverged_device=outcome.diverged_device,
            diverged_reason=outcome.diverged,
        )
        if recorder.directory is not None:
            save_arrays(recorder.directory / "model.safetensors", outcome.arrays)
            if scenario.evaluation.confusion:
                path = recorder.directory / "confusion.csv"
                save_confusion(path, simulation.trainer, outcome.arrays, scenario.evaluation.on)
        last = recorder.rows[-1] if recorder.rows else None
        tell(last, "diverged" if outcome.diverged else "done", outcome.diverged or "")
    return strategy_result(recorder, summary), ""


def record_links(recorder: Recorder, network: Network) -> None:
    """Record what each link that was used has carried, and how it varied."""
    end = network.env.now
    for use in network.link_uses():
        history = network.timeline(use.name, 0.0, end)
        is_constant = len(history) < 2 and history[:1] == [(0.0, use.bandwidth_bps)]
        recorder.link(
            LinkRow(
                link=use.name,
                bandwidth_bps=use.bandwidth_bps,
                latency=use.latency,
                carried_bytes=use.carried_bytes,
                busy_time=use.busy_time,
                change_times=[] if is_constant else [time for time, _ in history],
                change_rates_bps=[] if is_constant else [rate for _, rate in history],
            )
        )


def _run_in_processes(
    runs: Runs,
    names: Sequence[str],
    jobs: int,
    settings: tuple[Scenario, Path | None, str, Path | None],
    queue: Any,
    progress: Callable[[Progress], None],
) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        futures = {pool.submit(_work, settings, name, queue): name for name in names}
        pending = set(futures)
        try:
            while pending or not queue.empty():
                while not queue.empty():
                    progress(queue.get())
                done = {future for future in pending if future.done()}
                for future in sorted(done, key=lambda f: names.index(futures[f])):
                    runs.note(futures[future], *future.result())
                pending -= done
                if pending and not done:
                    wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
        except BaseException:
            for process in pool._processes.values():
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _manager() -> SyncManager:
    """Return a started process for the queue of progress.

    Raises
    ------
    ScenarioError
        If processes cannot be started, since the script that calls would start itself again.
    """
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    try:
        manager.start(initializer=_die_with_parent)
    except EOFError:
        raise ScenarioError(
            "jobs: more than 1 needs processes, which import the script that calls fedsim.run; "
            "put the call under  if __name__ == '__main__':"
        ) from None
    return manager


def _start_worker() -> None:
    """Let the parent alone decide when a worker ends: on Ctrl-C, SIGTERM, or its own death."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception: files are closed


def _die_with_parent() -> None:
    """End this process as soon as its parent is no more, even if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(
    settings: tuple[Scenario, Path | None, str, Path | None], name: str, queue: Any
) -> tuple[StrategyResult | None, str]:
    """Run one strategy in a process of its own."""
    scenario, out, device, data_dir = settings
    with one_thread():
        simulation = build(scenario, name, device=device, data_dir=data_dir)
        return _run_one(simulation, out, queue.put)


# --- files ----------------------------------------------------------------------------------------


def prepare(
    scenario: Scenario, out: Path, *, resume: bool = False, force: bool = False
) -> dict[str, StrategyResult]:
    """Make `out` ready; return the strategies that a resumed run keeps."""
    text = scenario.to_yaml(_versions())
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
def _versions() -> dict[str, str]:
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
    graph = _build_graph(world)
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
    up, down, latency = _access_links(world)
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
    peers = _build_peers(world, None)
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
