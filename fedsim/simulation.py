"""From a scenario to its parts, connected: the only place where the parts meet.

`build` connects one strategy with its world, nothing started.
"""

import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

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
from fedsim.flower.server import initial_arrays, score, score_models, with_mean
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
from fedsim.network.edges import edge_of
from fedsim.network.failures import Failure
from fedsim.recorder import (
    Recorder,
    RoundRow,
)
from fedsim.scenario import Scenario, place_of
from fedsim.sections import Data, draw
from fedsim.streams import stream
from topologies.attributes import Graph, servers_of
from topologies.generators import star
from topologies.placement import COLLECTIVES

__all__ = [
    "Loader",
    "MakeExecutor",
    "Simulation",
    "access_links",
    "build",
    "check",
    "connect",
    "make_graph",
    "make_peers",
]

_log = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
MakeExecutor = Callable[[Scenario, str], Executor]
"""From a strategy's scenario and its name to who computes, instead of the scenario's executor."""

_STARTS_WITH_PLACE = re.compile(rf"(--|device:|({'|'.join(Scenario.model_fields)})(\.[^ :]+)*: )")


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
            outcome = start(
                self.strategy,
                self.grid,
                initial_arrays(self.trainer),
                rounds=scenario.rounds,
                seed=scenario.seed,
                timeout=scenario.round_timeout,
                train_config=training_config(_local_config(scenario), added_config(scenario)),
                evaluate=None
                if on == "devices"
                else lambda arrays: score(
                    self.trainer, self._completed(arrays), on=on, problem=self.problem
                ),
                evaluate_models=partial(score_models, self.trainer, on=on),
                evaluate_every=scenario.evaluation.every,
                record=record,
                stop=StopRule(stop.accuracy, stop.time, stop.traffic) if stop else None,
            )
        outcome.arrays = self._completed(outcome.arrays)
        return outcome

    def _completed(self, arrays: Any) -> Any:
        """Return a model whose local part is the mean of what the devices keep."""
        if self.scenario.training.keep_local is None:
            return arrays
        return with_mean(arrays, self.executor.kept("local"))  # type: ignore[attr-defined]


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
    return connect(scenario, strategy, device, Loader(scenario, data_dir), Crew(), executor)


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
    load, missing = Loader(scenario, data_dir), ""
    with one_thread():
        for name in scenario.strategies:
            try:
                connect(scenario, name, device, load, Crew())
            except MissingDataError as error:
                missing = str(error)
    return missing


def connect(
    scenario: Scenario,
    strategy: str | None,
    device: str,
    load: "Loader",
    crew: Crew,
    make: MakeExecutor | None = None,
) -> Simulation:
    """Connect as `build` does, with data and workers that strategies have in common."""
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
    _warn_of_waiting(made, strategy, world)
    local = None
    if world.training.keep_local is not None:
        with _at(f"{place}: training.keep_local"):
            local = made = _keeping_local(made, world, has_own_app=make is not None)
    if world.compression is not None:
        with _at(f"{place}: compression"), quiet_flower():
            made = _compressed(made, world)
    env = simpy.Environment()
    with _at("topology"):
        graph = make_graph(world)
        network = _build_network(env, world, graph)
        if _needs(made, "edges") and network.server is not None:
            edge_of(network, 0)  # refuses a device without one
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
        arrays = shared = initial_arrays(trainer)
        if local is not None:
            with _at(f"{place}: training.keep_local"):
                shared = local.begin(arrays)
        sizes = [math.prod(a.shape) for a in shared.values() if "float" in a.dtype]
        for half in halves_of(made):
            half.check(sizes)
    if hasattr(made, "check_models"):
        with _at(place, is_strategy=True):
            made.check_models(list(arrays), world.data.devices)
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
        peers = make_peers(world, graph)
        if peers is None and _needs(made, "peers"):
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
        broadcasts=world.network.downlink == "broadcast",
        cancel_late=world.network.late == "cancel",
        peers=peers,
        seed=world.seed,
        profile=trainer.stack.profile,
    )
    return Simulation(
        world, strategy, env, network, fleet, trainer, executor, grid, made, crew, problem
    )


def _needs(strategy: Any, what: str) -> bool:
    """Return whether a strategy, or one that it wraps, says that it needs peers or edges."""
    while strategy is not None:
        if getattr(strategy, f"needs_{what}", False):
            return True
        strategy = getattr(strategy, "strategy", None)
    return False


def _warn_of_waiting(strategy: Any, name: str, world: Scenario) -> None:
    """Tell of servers that are not meant to wait, where they do or are not scored."""
    outer, inner = None, strategy
    while getattr(inner, "strategy", None) is not None:
        outer, inner = inner, inner.strategy
    if not isinstance(inner, registry.import_object("strategies.asynchronous:AsyncStrategy")):
        return
    kind = type(inner).__name__
    if outer is not None:
        _log.warning(
            "strategies.%s: %s works in rounds, and so does the %s in it: it waits for all that "
            "it has asked (by itself it drops what is not finite with 'drop_non_finite: true')",
            name,
            type(outer).__name__,
            kind,
        )
    elif world.evaluation.on == "devices":
        _log.warning(
            "strategies.%s: %s asks no device to evaluate; without 'evaluation.on: global_test' "
            "its lines have no scores, and stop.accuracy never holds",
            name,
            kind,
        )


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


class Loader:
    """Loads and splits the data when it is first asked, once for all strategies."""

    def __init__(self, scenario: Scenario, data_dir: Path | None) -> None:
        samples = scenario.evaluation.samples
        self._load = cache(partial(_load_data, scenario.data, scenario.seed, data_dir, samples))
        self._problems: dict[tuple[str, bool], ConvexProblem] = {}

    def __call__(self) -> DeviceData:
        """Return the devices' data."""
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


def access_links(scenario: Scenario) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return uplink and downlink (bit/s) and one-way latency (s) of each device of a star."""
    topology, n_devices, seed = scenario.topology, scenario.data.devices, scenario.seed
    up = topology.bandwidth if topology.uplink is None else topology.uplink
    down = topology.bandwidth if topology.downlink is None else topology.downlink
    return (
        draw(up, n_devices, stream(seed, "uplink")),
        draw(down, n_devices, stream(seed, "downlink")),
        draw(topology.latency, n_devices, stream(seed, "latency")),
    )


def make_graph(scenario: Scenario) -> Graph | None:
    """Return the topology's graph with the rates and latencies of its links; None for a star."""
    topology, seed = scenario.topology, scenario.seed
    if topology.kind == "star":
        return None
    spread = {"bandwidth": topology.bandwidth, "latency": topology.latency}
    given = {"bandwidth": math.inf, "latency": 0.0}
    figures: dict[str, Any] = {
        k: v for k, v in spread.items() if isinstance(v, float | list) and v != given[k]
    }
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
    up, down, latency = access_links(scenario)
    return star_network(
        env,
        uplink_bps=up,
        downlink_bps=down,
        latency=latency,
        server_up_bps=topology.server_bandwidth,
        server_down_bps=topology.server_bandwidth,
        **options,
    )


def make_peers(scenario: Scenario, graph: Graph | None) -> PeerGraph | None:
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
    not_the_networks = {
        "loss_reply",
        "accounting",
        "header_bytes",
        "failures",
        "late",
        "downlink",
    }
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
        loss=_loss(scenario.training.loss),
        seed=scenario.seed,
        device=device,
        attacks=attacks,
    )


def _loss(name: str | None) -> Any:
    """Return the function that ``package.module:name`` names; any other name as it is."""
    if name is None or ":" not in name:
        return name
    with _at("training.loss"):
        found = registry.import_object(name)
    if not callable(found):
        raise ScenarioError(f"training.loss: '{name}' is a {type(found).__name__}, not a function")
    return found


def _compressed(strategy: Any, scenario: Scenario) -> Any:
    """Return a strategy whose messages are compressed as the scenario says."""
    given = _given(scenario.compression)  # type: ignore[arg-type]
    for way in ("up", "down"):
        if way in given:
            given[way] = registry.build("compressor", given[way].spec())
    wrapper = registry.import_object("strategies.compressed:Compressed")
    return wrapper(strategy, seed=scenario.seed, **given)


def _keeping_local(strategy: Any, scenario: Scenario, *, has_own_app: bool) -> Any:
    """Return a strategy that leaves a part of the model on the devices."""
    if has_own_app or scenario.executor.arguments.get("app") is not None:
        raise ScenarioError(
            "an app of one's own decides what it keeps (in Context.state); leave this out"
        )
    local = scenario.training.keep_local
    wrapper = registry.import_object("strategies.personal:KeepLocal")
    return wrapper(strategy, local=[local] if isinstance(local, str) else local)


def _local_config(scenario: Scenario) -> LocalConfig:
    given = _given(scenario.training)
    given.pop("loss", None)
    given.pop("keep_local", None)
    given["betas"] = tuple(given["betas"])
    if isinstance(given.get("local_steps"), list):
        given["local_steps"] = tuple(given["local_steps"])
    if "schedule" in given:
        given["schedule"] = registry.build("schedule", given["schedule"].spec())
    return LocalConfig(**given)
