"""What a scenario file may say: strict models, checked whole, with every default filled in.

Decision: everything is checked before anything is built, and all problems are reported together.
Arguments of parts chosen by name (`fedsim.registry`) are checked against the code they name, so the
resolved scenario spells out every default, those of Flower's strategies included.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Self, cast, get_args

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
)

from fedsim import registry
from fedsim.document import Document, Place, read_document, read_value, write_yaml
from fedsim.errors import ScenarioError
from fedsim.graphs import between_devices, build_graph, is_random
from fedsim.problems import Problem, choose, problems_of, shown
from fedsim.sections import (
    DISTRIBUTIONS,
    AttackEntry,
    Compression,
    Data,
    Devices,
    Evaluation,
    NetworkOptions,
    Peers,
    Record,
    Section,
    Spec,
    Stop,
    Topology,
    Training,
)
from fedsim.streams import stream
from fedsim.units import Duration

__all__ = [
    "Scenario",
    "StrategyEntry",
    "json_schema",
    "load_scenario",
    "place_of",
]

_STRATEGY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TAKEN_NAMES = frozenset({"plots", "report.html", "scenario.yaml", "summary.json", "world.json"})
_EITHER_OR = {"local_epochs": "local_steps", "local_steps": "local_epochs"}


class StrategyEntry(Spec):
    """A strategy: `kind`, constructor arguments, and top-level keys that override its world."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments as they are written in YAML."""
        return {k: v for k, v in (self.model_extra or {}).items() if k not in _OVERRIDABLE}

    @property
    def world(self) -> dict[str, Any]:
        """The keys of the scenario that this strategy overrides."""
        return {k: v for k, v in (self.model_extra or {}).items() if k in _OVERRIDABLE}


class Scenario(Section):
    """One comparison: data, devices, network, and the strategies that share them.

    Make one with `load_scenario` or `Scenario.from_mapping`, which check everything; the bare
    constructor does not look into `kind`s and fills nothing in.
    """

    name: str = Field(default="scenario", min_length=1)
    """Title of the report."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Every random number follows from it."""
    rounds: int = Field(ge=1)
    """Rounds of each strategy (server versions, for an asynchronous one)."""
    stop: Stop | None = None
    """Conditions that end a strategy earlier."""
    data: Data
    """The data and its split over the devices."""
    model: Spec = Spec(kind="softmax")
    """The model: a name, or 'package.module:name' of a torch module or of its maker."""
    training: Training = Training()
    """Local work."""
    devices: Devices = Devices()
    """The devices."""
    topology: Topology = Topology()
    """The network's shape and rates."""
    peers: Peers | None = None
    """Who exchanges with whom, routed over `topology`; by default, whom it links directly."""
    links: Spec = Spec(kind="constant")
    """How the devices' links change with time."""
    network: NetworkOptions = NetworkOptions()
    """Loss of messages, what happens when a link goes down, what a message weighs."""
    compression: Compression | None = None
    """How messages are compressed, of strategies that do not say so themselves."""
    round_timeout: Annotated[Duration, Field(gt=0)] | None = None
    """Virtual time after which a round goes on without the devices that have not replied."""
    attacks: list[AttackEntry] = Field(default_factory=list)
    """Devices that do harm."""
    evaluation: Evaluation = Evaluation()
    """How often and on what the model is scored, and the accuracy aimed at."""
    executor: Spec = Spec(kind="vectorised")
    """Who computes; results agree, speed differs."""
    record: Record = Record()
    """What is written."""
    strategies: dict[str, StrategyEntry] = Field(default_factory=dict)
    """Name → strategy. Each runs in the same world."""

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Self:
        """Return the checked scenario that a mapping describes, as YAML would.

        Raises
        ------
        ScenarioError
            Naming everything that is wrong.
        """
        return cast(Self, _finish(Document(deepcopy(dict(data)), {}, "the scenario"), overrides))

    def resolved(self) -> dict[str, Any]:
        """Return the scenario with every default filled in and units as text, ready for YAML."""
        return self.model_dump(mode="json")

    def to_yaml(self, versions: Mapping[str, str] | None = None) -> str:
        """Return `resolved` as YAML that loads back to an equal scenario.

        Parameters
        ----------
        versions : mapping, optional
            Name → version of the packages in use, for the record; ignored when read.
        """
        data = self.resolved() | ({"versions": dict(versions)} if versions else {})
        return write_yaml(data)

    def strategy_world(self, name: str) -> "Scenario":
        """Return the scenario of one strategy alone, with its overrides applied.

        Raises
        ------
        ScenarioError
            If there is no such strategy.
        """
        if name not in self.strategies:
            raise ScenarioError(choose(name, "strategy of this scenario", self.strategies))
        entry = self.strategies[name]
        base = self.resolved() | {"strategies": {}}
        world, problems = _check_world(_merge(base, _as_parts(entry.world)))
        if world is None or problems:
            raise ScenarioError("; ".join(map(str, problems)))
        alone = StrategyEntry(kind=entry.kind, **entry.arguments)
        return world.model_copy(update={"strategies": {name: alone}})


_OVERRIDABLE = (
    "model",
    "training",
    "topology",
    "links",
    "peers",
    "network",
    "compression",
    "round_timeout",
    "executor",
    "attacks",
)
_SHARED = tuple(key for key in Scenario.model_fields if key not in _OVERRIDABLE)
_PARTS: Mapping[tuple[str, ...], str] = {
    ("data", "dataset"): "dataset",
    ("data", "partition"): "partition",
    ("model",): "model",
    ("training", "schedule"): "schedule",
    ("devices", "speed"): "speed",
    ("devices", "slowdown"): "slowdown",
    ("devices", "availability"): "availability",
    ("topology",): "topology",
    ("peers",): "topology",
    ("links",): "link",
    ("compression", "up"): "compressor",
    ("compression", "down"): "compressor",
    ("executor",): "executor",
}


def place_of(kind: str) -> str:
    """Return where a scenario chooses a part of this kind: "data.dataset" for a data set."""
    return next((".".join(path) for path, part in _PARTS.items() if part == kind), kind)


# ── checks ──────────────────────────────────────────────────────────────────────────────────────


def _check_world(data: Mapping[str, Any]) -> tuple[Scenario | None, list[Problem]]:
    """Check all of a scenario but its strategies, which are left out of the result."""
    filled, problems = _fill_parts({k: v for k, v in data.items() if k != "strategies"})
    try:
        world = Scenario.model_validate_json(_as_json(filled))
    except ValidationError as error:
        found = problems_of(error, (), _valid_keys)
        problems += [Problem(_without_tags(each.path, filled), each.message) for each in found]
        return None, _one_each(problems)
    return world, _one_each(problems + list(_clashes(world)))


def _as_json(data: Mapping[str, Any]) -> str:
    try:
        return json.dumps(data)
    except (TypeError, ValueError) as error:
        raise ScenarioError(f"a scenario holds what YAML can: {error}") from error


def _one_each(problems: list[Problem]) -> list[Problem]:
    """Keep the first problem of each place, and none above or below it."""
    kept: list[Problem] = []
    for problem in problems:
        depths = ((other.path, min(len(other.path), len(problem.path))) for other in kept)
        if all(path[:depth] != problem.path[:depth] for path, depth in depths):
            kept.append(problem)
    return kept


def _fill_parts(data: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return a copy in which each part chosen by name has its arguments, and what is wrong."""
    filled, problems = deepcopy(data), []
    for path, kind in _PARTS.items():
        holder: Any = filled
        for key in path[:-1]:
            is_there = Scenario.model_fields[key].default is not None or key in filled
            holder = holder.setdefault(key, {}) if is_there else None
        if not isinstance(holder, dict):
            continue
        spec: Any = holder.get(path[-1], _default(path))
        if spec is None:
            continue
        beside = _BESIDE.get(path, ())
        own = _pick(spec, beside)
        rest = {k: v for k, v in spec.items() if k not in own} if own else spec
        checked, found = registry.check(kind, rest, path, beside=beside)
        holder[path[-1]] = checked | own if checked else spec
        problems += found
    return filled, problems


def _default(path: Place) -> dict[str, Any] | None:
    section: Any = Scenario
    for key in path[:-1]:
        section = next(_models(section.model_fields[str(key)].annotation))
    default: Spec | None = section.model_fields[path[-1]].default
    return None if default is None else default.spec()


_BESIDE: Mapping[Place, tuple[str, ...]] = {
    ("topology",): tuple(key for key in Topology.model_fields if key != "kind"),
    ("peers",): ("redraw",),
}
"""Keys of the scenario that stand beside the arguments of what `kind` names."""


def _pick(spec: Any, keys: Sequence[str]) -> dict[str, Any]:
    return {k: v for k, v in spec.items() if k in keys} if isinstance(spec, Mapping) else {}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models within a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for inner in get_args(annotation):
            yield from _models(inner)


def _valid_keys(location: Place) -> list[str]:
    """Return the keys that the mapping at a place may have."""
    found: list[type[BaseModel]] = [Scenario]
    for step in location:
        below = [
            model
            for each in found
            if step in each.model_fields
            for model in _models(each.model_fields[str(step)].annotation)
        ]
        found = below or [
            each
            for each in found
            if "kind" in each.model_fields
            and step in get_args(each.model_fields["kind"].annotation)
        ]
    return list(dict.fromkeys(key for model in found for key in model.model_fields))


def _without_tags(path: Place, data: Any) -> Place:
    """Leave out of a place the steps that only say which form of a quantity was meant."""
    kept: list[str | int] = []
    for step in path:
        if isinstance(step, int) or (isinstance(data, Mapping) and step in data):
            data = data[step]
        elif step in DISTRIBUTIONS:
            continue
        kept.append(step)
    return tuple(kept)


def _clashes(world: Scenario) -> Iterator[Problem]:
    """Yield combinations of sections that make no sense together."""
    if world.evaluation.on == "devices" and world.evaluation.every != 1:
        yield Problem(
            ("evaluation", "every"),
            f"{world.evaluation.every} needs evaluation on common samples; with 'on: devices' "
            "Flower evaluates in every round",
        )
    if world.evaluation.on == "validation" and world.data.validation_fraction == 0:
        yield Problem(
            ("evaluation", "on"),
            "'validation' needs samples: set data.validation_fraction above 0, for example 0.1",
        )
    topology = world.topology
    tiers = [k for k in ("bandwidth", "latency", "uplink", "downlink") if _is_list(topology, k)]
    if tiers and (topology.kind != "tree" or not {*tiers} <= {"bandwidth", "latency"}):
        yield Problem(
            ("topology", tiers[-1]),
            "a list is a value for each tier, which is for the bandwidth and latency of a tree",
        )
        return
    yield from _graph_problems(world, {key: getattr(topology, key) for key in tiers})
    if topology.kind == "star":
        if world.network.link_down == "reroute":
            yield Problem(
                ("network", "link_down"),
                "'reroute' needs a second route, and a star has one; use 'stall' or 'fail'",
            )
        return
    for key in ("uplink", "downlink", "server_bandwidth"):
        if getattr(topology, key) != Topology.model_fields[key].default:
            yield Problem(("topology", key), "only a star has it; use 'bandwidth'")


def _is_list(section: Spec, key: str) -> bool:
    return isinstance(getattr(section, key), list)


def _graph_problems(world: Scenario, tiers: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with the graphs; families check their own arguments as they build."""
    devices, seed = world.data.devices, world.seed
    if world.topology.kind != "star":
        try:
            build_graph(world.topology.spec(), devices, stream(seed, "topology"), **tiers)
        except ScenarioError as error:
            yield Problem(("topology",), str(error))
    peers = world.peers
    if peers is None:
        return
    try:
        if peers.redraw and not is_random(peers.kind):
            drawn = [kind for kind in registry.TABLES["topology"] if is_random(kind)]
            said = f"'{peers.kind}' is the same in every round; one of: {', '.join(drawn)}"
            yield Problem(("peers", "redraw"), said)
        whole = build_graph(peers.spec(), devices, stream(seed, "peers", int(peers.redraw)))
    except ScenarioError as error:
        yield Problem(("peers",), str(error))
        return
    if whole.number_of_edges() and not between_devices(whole).number_of_edges():
        yield Problem(
            ("peers", "kind"),
            f"'{peers.kind}' links devices with other machines only; 'peers' says which devices "
            "exchange, for example ring, complete, erdos_renyi",
        )


def _merge(base: Any, override: Any) -> Any:
    """Return `override` laid over `base`; a mapping with another `kind` replaces."""
    if not (isinstance(base, Mapping) and isinstance(override, Mapping)):
        return override
    if override.get("kind", base.get("kind")) != base.get("kind"):
        return override
    replaced = {_EITHER_OR[key] for key in override if key in _EITHER_OR}
    kept = {key: value for key, value in base.items() if key not in replaced}
    return kept | {key: _merge(kept.get(key), value) for key, value in override.items()}


def _as_parts(world: Mapping[str, Any]) -> dict[str, Any]:
    """Write out parts that are given by their bare name."""
    return {
        key: {"kind": value} if (key,) in _PARTS and isinstance(value, str) else value
        for key, value in world.items()
    }


def _check_strategies(
    data: Mapping[str, Any], world: Scenario | None, known: list[Problem]
) -> tuple[dict[str, StrategyEntry], list[Problem]]:
    """Check each strategy's name, its world and its arguments."""
    given = data.get("strategies")
    if not isinstance(given, Mapping) or not given:
        said = "is missing" if given is None else f"{shown(given)} should be a mapping"
        example = "name at least one, for example 'linear: {kind: fedavg}'"
        return {}, [Problem(("strategies",), f"{said}; {example}")]
    entries, problems, folded = {}, [], dict[str, str]()
    for name, entry in given.items():
        path = ("strategies", name)
        if not _STRATEGY_NAME.fullmatch(str(name)) or name.lower() in _TAKEN_NAMES:
            problems.append(
                Problem(
                    path,
                    "the name becomes a directory: use letters, digits, '.', '-', '_'"
                    f" (at most 64), and none of {', '.join(sorted(_TAKEN_NAMES))}",
                )
            )
        elif (twin := folded.setdefault(str(name).lower(), name)) != name:
            problems.append(
                Problem(
                    path,
                    f"differs from '{twin}' by upper and lower case only, which is one "
                    "directory on some machines",
                )
            )
        checked, found = _check_strategy(path, entry, data, world, known)
        problems += found
        if checked is not None:
            entries[name] = checked
    return entries, problems


def _check_strategy(
    path: Place, entry: Any, data: Mapping[str, Any], world: Scenario | None, known: list[Problem]
) -> tuple[StrategyEntry | None, list[Problem]]:
    given = registry.as_mapping(entry)
    if given is None or not isinstance(given.get("kind"), str):
        return None, registry.check("strategy", entry, path)[1]
    problems: list[Problem] = []
    try:
        takes = {parameter.name for parameter in registry.parameters("strategy", given["kind"])}
    except ScenarioError:
        takes = set()
    for key in [key for key in given if key in _SHARED and key not in takes]:
        del given[key]
        problems.append(
            Problem(
                (*path, key),
                f"all strategies share the scenario's '{key}'; a strategy can override "
                f"{', '.join(_OVERRIDABLE)}",
            )
        )
    overrides = _as_parts({key: given.pop(key) for key in _OVERRIDABLE if key in given})
    own_world = world
    if overrides:
        base = _fill_parts(dict(data))[0]
        own_world, found = _check_world(_merge(base, overrides))
        said = {each.message for each in known}
        problems += [
            Problem((*path, *each.path), each.message) for each in found if each.message not in said
        ]
    filled = _fill_from_world(given, own_world)
    checked, found = registry.check("strategy", filled, path)
    if isinstance(entry, str):
        found = [Problem(path if p.path == (*path, "kind") else p.path, p.message) for p in found]
    problems += found
    if world is not None and not found:
        problems += _too_few_devices(path, checked, given, world)
        problems += _out_of_range(path, checked, world.data.devices)
    return StrategyEntry(**(checked | overrides)), problems


def _fill_from_world(given: Mapping[str, Any], world: Scenario | None) -> dict[str, Any]:
    """Fill in the constructor arguments that the scenario already says elsewhere."""
    training = world.training if world else Training()
    values: dict[str, Any] = {
        "learning_rate": training.learning_rate,
        "client_learning_rate": training.learning_rate,
        "batch_size": training.batch_size,
        "seed": world.seed if world else 0,
    }
    if training.local_steps is not None:
        values["local_steps"] = training.local_steps
    if world is None or world.evaluation.on != "devices":
        values["fraction_evaluate"] = 0.0
    return _fill(given, values)


def _fill(given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    filled = dict(given)
    try:
        takes = registry.parameters("strategy", filled["kind"])
    except ScenarioError:
        return filled
    for parameter in takes:
        if parameter.is_nested:
            inner = registry.as_mapping(filled.get(parameter.name))
            if inner and isinstance(inner.get("kind"), str):
                filled[parameter.name] = _fill(inner, values)
        elif parameter.name in values:
            filled.setdefault(parameter.name, values[parameter.name])
    return filled


def _too_few_devices(
    path: Place, checked: Mapping[str, Any], given: Mapping[str, Any], world: Scenario
) -> Iterator[Problem]:
    """Yield minimal numbers of nodes for which a strategy would wait for ever."""
    devices = world.data.devices
    keys = ["min_available_nodes", "min_train_nodes"]
    if checked.get("fraction_evaluate"):
        keys.append("min_evaluate_nodes")
    for key in keys:
        least = checked.get(key)
        if isinstance(least, int) and least > devices:
            origin = "" if key in given else ", the strategy's default"
            yield Problem(
                (*path, key),
                f"{least}{origin}, is above the number of devices (data.devices is {devices}); "
                f"write {devices} or less",
            )
    for key, inner in checked.items():
        if isinstance(inner, Mapping) and "kind" in inner:
            outer = given.get(key)
            said = outer if isinstance(outer, Mapping) else {}
            yield from _too_few_devices((*path, key), inner, said, world)


def _out_of_range(path: Place, checked: Mapping[str, Any], devices: int) -> Iterator[Problem]:
    """Yield arguments that Flower takes, and that no round could work with."""
    for key, value in checked.items():
        is_number = isinstance(value, int | float)
        if key in ("fraction_train", "fraction_evaluate") and is_number and not 0 <= value <= 1:
            yield Problem((*path, key), f"{shown(value)} is not between 0 and 1")
        if key in ("proximal_mu", "num_malicious_nodes") and is_number and value < 0:
            yield Problem((*path, key), f"{shown(value)} should be greater than or equal to 0")
        if isinstance(value, Mapping):
            yield from _out_of_range((*path, key), value, devices)
    bad = checked.get("num_malicious_nodes", 0)
    if checked.get("kind") == "bulyan" and isinstance(bad, int) and 4 * bad + 3 > devices:
        most = (devices - 3) // 4
        remedy = f"write {most} at most" if devices >= 3 else "take more devices"
        yield Problem(
            (*path, "num_malicious_nodes"),
            f"{bad} needs the replies of 4 · {bad} + 3 = {4 * bad + 3} devices, else a round "
            f"changes nothing (data.devices is {devices}); {remedy}",
        )


# ── from a file to a scenario ───────────────────────────────────────────────────────────────────


def load_scenario(path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """Read, check and fill in a scenario file.

    Parameters
    ----------
    path : str or Path
        A YAML file.
    overrides : sequence of str
        "training.learning_rate=0.05": values that replace the file's, themselves YAML.

    Raises
    ------
    ScenarioError
        If the file cannot be read or anything in it is wrong; the message names each YAML path,
        the value and what is valid.
    """
    document = read_document(Path(path))
    document.data.setdefault("name", Path(path).stem)
    _find_files(document.data, Path(path).parent)
    return _finish(document, overrides)


def _find_files(value: Any, folder: Path) -> None:
    """Let a relative `path` that is not below the working directory mean one beside the file."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, dict | list):
            _find_files(inner, folder)
        elif key == "path" and isinstance(inner, str) and not Path(inner).exists():
            beside = folder / inner
            value[key] = str(beside) if beside.exists() else inner


def _finish(document: Document, overrides: Sequence[str]) -> Scenario:
    """Apply overrides, check everything, report all problems in one error."""
    data = document.data
    for override in overrides:
        _override(document, override)
    data.pop("versions", None)
    if "study" in data:
        raise ScenarioError(f"{document.source} is a study without training: use 'fedsim whatif'")
    problems = []
    if data.pop("sweep", None) is not None:
        problems.append(
            Problem(
                ("sweep",),
                "a file with a sweep is for 'fedsim sweep', which this version does not have; "
                "take the key out to run one scenario",
            )
        )
    world, found = _check_world(data)
    problems += found
    entries, found = _check_strategies(data, world, problems)
    problems = _one_each(problems + found)
    if world is None or problems:
        raise ScenarioError(_report(document, problems))
    return world.model_copy(update={"strategies": entries})


def _report(document: Document, problems: list[Problem]) -> str:
    """Return one message about all problems, each with the line it comes from."""
    texts = []
    for problem in problems:
        places = (problem.path[:length] for length in range(len(problem.path), 0, -1))
        origin = next((document.origin[p] for p in places if p in document.origin), "")
        line = int(origin.removeprefix("line ")) if origin.startswith("line ") else 0
        texts.append((line, f"{origin}: {problem}" if origin else str(problem)))
    texts.sort(key=lambda text: text[0])
    if len(texts) == 1:
        return f"{document.source}: {texts[0][1]}"
    return f"{document.source}: {len(texts)} problems\n" + "\n".join(
        f"  {text}" for _, text in texts
    )


def _override(document: Document, override: str) -> None:
    """Apply one "a.b=value" to a document, in place."""
    option = f"--set {override}"
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip("."):
        raise ScenarioError(f"{option}: write KEY=VALUE, for example training.learning_rate=0.05")
    value = read_value(text, option)
    here: Any = document.data
    steps = dotted.strip().split(".")
    path: Place = ()
    while True:
        step, steps = _next_step(here, steps)
        path = (*path, step)
        if not steps:
            break
        inside = here.get(step)
        if isinstance(inside, str) and (path in _PARTS or path[:-1] == ("strategies",)):
            inside = {"kind": inside}
        if inside is None:
            inside = (_default(path) or {}) if path in _PARTS else {}
            document.origin[path] = option
        if not isinstance(inside, dict):
            where = ".".join(map(str, path))
            raise ScenarioError(f"{option}: {where} is {shown(inside)}, not a mapping")
        here[step] = inside
        here = inside
    if step == "kind" and here.get("kind") != value:
        here.clear()
    here.pop(_EITHER_OR.get(step), None)
    here[step] = value
    document.origin[path] = option


def _next_step(here: Mapping[str, Any], steps: list[str]) -> tuple[str, list[str]]:
    """Return the next key and the steps after it; a key that exists may contain dots."""
    for length in range(len(steps), 1, -1):
        if (key := ".".join(steps[:length])) in here:
            return key, steps[length:]
    return steps[0], steps[1:]


# ── schema for editors ──────────────────────────────────────────────────────────────────────────


def json_schema() -> dict[str, Any]:
    """Return a JSON Schema (draft 2020-12) of scenario files, for editors.

    It knows every registered name with its arguments and lets "package.module:name" take any.
    """
    schema = Scenario.model_json_schema(by_alias=True)
    definitions: dict[str, Any] = schema.setdefault("$defs", {})
    link_keys = dict(definitions["Topology"]["properties"])
    del link_keys["kind"]
    overrides = {
        key: {"description": f"Overrides the scenario's '{key}' for this strategy."}
        for key in _OVERRIDABLE
    }
    extras = {"topology": link_keys, "strategy": overrides}
    redraw = dict(definitions["Peers"]["properties"]["redraw"])
    definitions["peers"] = registry.spec_schema("topology", {"redraw": redraw})
    for kind in registry.TABLES:
        definitions[kind] = registry.spec_schema(kind, extras.get(kind))
        for choice in definitions[kind]["anyOf"]:
            definitions.update(choice.pop("$defs", {}))
    for path, kind in _PARTS.items():
        holder = schema if len(path) == 1 else definitions[path[0].capitalize()]
        described = holder["properties"][path[-1]].get("description", "")
        name = "peers" if path == ("peers",) else kind
        part: dict[str, Any] = {"$ref": f"#/$defs/{name}"}
        if _default(path) is None:
            part = {"anyOf": [part, {"type": "null"}]}
        holder["properties"][path[-1]] = part | {"description": described}
    schema["properties"]["strategies"] |= {
        "minProperties": 1,
        "propertyNames": {"pattern": f"^{_STRATEGY_NAME.pattern}$"},
        "additionalProperties": {"$ref": "#/$defs/strategy"},
    }
    schema["properties"]["versions"] = {"type": "object", "description": "Written by a run."}
    schema["required"] = sorted({*schema.get("required", []), "strategies"})
    for unused in ("Peers", "Spec", "StrategyEntry", "Topology"):
        definitions.pop(unused, None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema
