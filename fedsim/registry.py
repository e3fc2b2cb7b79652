"""Names in a scenario and the code behind them.

One table per kind maps a name to an import string; nothing is imported until a scenario uses it.
Code outside this repository is reached by writing the import string itself, "package.module:name",
where a name is expected. The arguments that a scenario may give are read from the factory's own
signature, so adding a strategy, a partitioner or a link model is one line here and no schema.

Parameters that the runner fills in (labels, generators, sizes: see `SUPPLIED`) cannot be set in a
scenario. A parameter whose type is a Flower strategy takes a mapping with `kind`, which is checked
and built first; one whose type is a callable takes "package.module:name".
"""

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, is_dataclass
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PydanticSchemaGenerationError,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    create_model,
)
from pydantic.fields import FieldInfo
from pydantic_core import SchemaError

from fedsim import units
from fedsim.errors import FedsimError, ScenarioError
from fedsim.problems import Problem, choose, nearest, problems_of, shown

__all__ = [
    "SUPPLIED",
    "TABLES",
    "Entry",
    "Parameter",
    "PartError",
    "arguments_model",
    "as_mapping",
    "bind",
    "build",
    "check",
    "import_object",
    "list_names",
    "parameters",
    "reason",
    "resolve",
    "spec_schema",
]

IMPORT_STRING = r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"

TABLES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "strategy": {
            "ad_psgd": "strategies.pairwise:ADPSGD",
            "adom": "strategies.accelerated:ADOM",
            "allreduce": "strategies.allreduce:AllReduceSGD",
            "bulyan": "strategies.linear:Bulyan",
            "choco_sgd": "strategies.choco:ChocoSGD",
            "compressed_sgd": "strategies.mcm:CompressedSGD",
            "d2": "strategies.tracking:D2",
            "deadline_fedavg": "strategies.asynchronous:DeadlineFedAvg",
            "dp_client_adaptive": "flwr.serverapp.strategy:"
            "DifferentialPrivacyClientSideAdaptiveClipping",
            "dp_client_fixed": "flwr.serverapp.strategy:DifferentialPrivacyClientSideFixedClipping",
            "dp_server_adaptive": "flwr.serverapp.strategy:"
            "DifferentialPrivacyServerSideAdaptiveClipping",
            "dp_server_fixed": "flwr.serverapp.strategy:DifferentialPrivacyServerSideFixedClipping",
            "drop_non_finite": "strategies.screening:DropNonFinite",
            "dsgt": "strategies.tracking:DSGT",
            "extra": "strategies.tracking:EXTRA",
            "fedadagrad": "strategies.linear:FedAdagrad",
            "fedadam": "strategies.linear:FedAdam",
            "fedasync": "strategies.asynchronous:FedAsync",
            "fedavg": "strategies.linear:FedAvg",
            "fedavgm": "strategies.linear:FedAvgM",
            "fedbuff": "strategies.asynchronous:FedBuff",
            "feddyn": "strategies.drift:FedDyn",
            "fedmedian": "strategies.linear:FedMedian",
            "fednova": "strategies.drift:FedNova",
            "fedprox": "strategies.linear:FedProx",
            "fedtrimmedavg": "strategies.linear:FedTrimmedAvg",
            "fedyogi": "strategies.linear:FedYogi",
            "gossip": "strategies.gossip:DPSGD",
            "hierarchical_fedavg": "strategies.hierarchical:HierarchicalFedAvg",
            "hyperprism": "strategies.hyperprism:HyperPrism",
            "krum": "strategies.linear:Krum",
            "mudag": "strategies.accelerated:Mudag",
            "multikrum": "strategies.linear:MultiKrum",
            "oort": "strategies.selection:Oort",
            "push_diging": "strategies.push_sum:PushDIGing",
            "qfedavg": "strategies.linear:QFedAvg",
            "scaffold": "strategies.drift:SCAFFOLD",
            "sgp": "strategies.push_sum:SGP",
            "swarm_sgd": "strategies.pairwise:SwarmSGD",
            "tifl": "strategies.selection:TiFL",
        },
        "compressor": {
            "cast": "strategies.compression:Cast",
            "identity": "strategies.compression:Identity",
            "natural": "strategies.compression:Natural",
            "quantise": "strategies.compression:Quantise",
            "random_k": "strategies.compression:RandomK",
            "sign": "strategies.compression:Sign",
            "sparsify": "strategies.compression:Sparsify",
            "top_k": "strategies.compression:TopK",
        },
        "topology": {
            "barabasi_albert": "topologies.random_graphs:barabasi_albert",
            "bcube": "topologies.datacentre:bcube",
            "complete": "topologies.generators:complete",
            "dcell": "topologies.datacentre:dcell",
            "dragonfly": "topologies.datacentre:dragonfly",
            "erdos_renyi": "topologies.random_graphs:erdos_renyi",
            "expander": "topologies.random_graphs:expander",
            "exponential": "topologies.generators:exponential",
            "fat_tree": "topologies.datacentre:fat_tree",
            "file": "topologies.formats:from_file",
            "grid": "topologies.generators:grid",
            "hypercube": "topologies.generators:hypercube",
            "leaf_spine": "topologies.datacentre:leaf_spine",
            "line": "topologies.generators:line",
            "random_geometric": "topologies.random_graphs:random_geometric",
            "random_regular": "topologies.random_graphs:random_regular",
            "research_network": "topologies.formats:research_network",
            "ring": "topologies.generators:ring",
            "star": "topologies.generators:star",
            "torus": "topologies.generators:torus",
            "tree": "topologies.generators:tree",
            "watts_strogatz": "topologies.random_graphs:watts_strogatz",
        },
        "link": {
            "constant": "fedsim.network.links:Constant",
            "correlated": "fedsim.network.links:Correlated",
            "gilbert_elliott": "fedsim.network.links:GilbertElliott",
            "mobility": "fedsim.network.mobility:Mobility",
            "on_off": "fedsim.network.links:OnOff",
            "redraw": "fedsim.network.links:Redraw",
            "sinusoid": "fedsim.network.links:Sinusoid",
            "trace": "fedsim.network.traces:Trace",
        },
        "dataset": {
            "a9a": "fedsim.data.tables:load_a9a",
            "cifar10": "fedsim.data.images:load_cifar10",
            "digits": "fedsim.data.datasets:load_digits",
            "fashion_mnist": "fedsim.data.images:load_fashion_mnist",
            "image_folder": "fedsim.data.images:load_image_folder",
            "least_squares": "fedsim.data.synthetic:load_least_squares",
            "libsvm": "fedsim.data.tables:load_libsvm",
            "logistic": "fedsim.data.synthetic:load_logistic",
            "mnist": "fedsim.data.images:load_mnist",
            "npz": "fedsim.data.datasets:load_npz",
            "quadratic": "fedsim.data.synthetic:load_quadratic",
            "synthetic": "fedsim.data.synthetic:load_synthetic",
            "tinyshakespeare": "fedsim.data.tables:load_tinyshakespeare",
            "w8a": "fedsim.data.tables:load_w8a",
        },
        "partition": {
            "dirichlet": "fedsim.data.partition:partition_dirichlet",
            "dirichlet_quantity": "fedsim.data.partition:partition_dirichlet_quantity",
            "flower": "fedsim.data.partition:partition_flower",
            "iid": "fedsim.data.partition:partition_iid",
            "natural": "fedsim.data.partition:partition_natural",
            "pathological": "fedsim.data.partition:partition_pathological",
            "shards": "fedsim.data.partition:partition_shards",
        },
        "model": {
            "char_lstm": "fedsim.learning.models:char_lstm",
            "char_transformer": "fedsim.learning.models:char_transformer",
            "cifar_lenet": "fedsim.learning.models:cifar_lenet",
            "cnn": "fedsim.learning.models:cnn",
            "fashion_cnn": "fedsim.learning.models:fashion_cnn",
            "lenet5": "fedsim.learning.models:lenet5",
            "linear_regression": "fedsim.learning.models:linear_regression",
            "logistic_regression": "fedsim.learning.models:logistic_regression",
            "mlp": "fedsim.learning.models:mlp",
            "mnist_cnn": "fedsim.learning.models:mnist_cnn",
            "quadratic": "fedsim.learning.models:quadratic",
            "resnet20": "fedsim.learning.models:resnet20",
            "resnet8": "fedsim.learning.models:resnet8",
            "softmax": "fedsim.learning.models:softmax",
        },
        "schedule": {
            "cosine": "fedsim.learning.schedules:Cosine",
            "exponential": "fedsim.learning.schedules:Exponential",
            "inverse_sqrt": "fedsim.learning.schedules:InverseSqrt",
            "step_decay": "fedsim.learning.schedules:StepDecay",
        },
        "executor": {
            "client_app": "fedsim.sections:ClientAppExecution",
            "flower": "fedsim.sections:FlowerExecution",
            "ray": "fedsim.sections:RayExecution",
            "vectorised": "fedsim.sections:VectorisedExecution",
        },
        "speed": {
            "classes": "fedsim.devices:ClassSpeed",
            "constant": "fedsim.devices:ConstantSpeed",
            "lognormal": "fedsim.devices:LognormalSpeed",
            "trace": "fedsim.devices:TraceSpeed",
            "uniform": "fedsim.devices:UniformSpeed",
        },
        "slowdown": {
            "none": "fedsim.devices:NoSlowdown",
            "random": "fedsim.devices:RandomSlowdown",
            "scheduled": "fedsim.devices:ScheduledSlowdown",
        },
        "availability": {
            "always": "fedsim.devices:Always",
            "day_night": "fedsim.devices:DayNight",
            "intervals": "fedsim.devices:Intervals",
            "on_off": "fedsim.devices:OnOffAvailability",
            "trace": "fedsim.devices:TraceAvailability",
        },
    }
)
"""Kind → name in a scenario → import string."""

SUPPLIED: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "strategy": frozenset(),
        "compressor": frozenset(),
        "topology": frozenset({"bandwidth", "devices", "latency", "rng", "seed", "servers"}),
        "link": frozenset({"name", "seed"}),
        "dataset": frozenset({"data_dir", "n_devices", "rng", "seed", "test_fraction"}),
        "partition": frozenset({"device_ids", "labels", "n_devices", "rng"}),
        "model": frozenset({"input_shape", "n_classes", "seed"}),
        "schedule": frozenset(),
        "executor": frozenset(),
        "speed": frozenset({"n_devices", "rng", "seed"}),
        "slowdown": frozenset({"n_devices", "rng", "seed"}),
        "availability": frozenset({"n_devices", "rng", "seed"}),
    }
)
"""Kind → parameters that the runner fills in, so that a scenario cannot set them."""

_CLOSED = frozenset({"executor", "topology"})
"""Kinds of which the runner must know every name."""

_NOUNS: Mapping[str, str] = MappingProxyType(
    {
        "availability": "availability model",
        "dataset": "data set",
        "link": "link model",
        "partition": "way to split data",
        "slowdown": "slow-down",
        "speed": "speed model",
    }
)

_UNIT_NAMES = (
    (units.Duration, "time"),
    (units.Size, "size"),
    (units.Bandwidth, "bandwidth"),
    (units.Speed, "speed"),
    (units.FlopRate, "FLOP rate"),
    (units.ComputeSpeed, "speed"),
    (units.Energy, "energy"),
)


class PartError(ScenarioError):
    """What a scenario names cannot be made; `kind` says which part of it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.kind, str(self))


@dataclass(frozen=True, slots=True)
class Parameter:
    """An argument that a scenario may give.

    Attributes
    ----------
    name, type, description : str
        The key, what may be written there, and what its docstring says about it.
    is_required : bool
    default : object
        None if required.
    is_nested : bool
        The value is itself a mapping with `kind`.
    is_import : bool
        The value is "package.module:name".
    annotation : object
        The type that the value is checked against.
    """

    name: str
    type: str
    description: str
    is_required: bool
    default: object
    is_nested: bool
    is_import: bool
    annotation: Any


@dataclass(frozen=True, slots=True)
class Entry:
    """One registered name, for listings; `error` says why its code cannot be imported."""

    kind: str
    name: str
    target: str
    summary: str
    parameters: tuple[Parameter, ...]
    error: str | None


def import_object(text: str) -> Any:
    """Return what "package.module:name" names.

    Raises
    ------
    ScenarioError
        If the text has another form, the module cannot be imported or lacks the name.
    """
    if not re.match(IMPORT_STRING, text):
        raise ScenarioError(f"'{text}' is not of the form 'package.module:name'")
    module_name, _, attribute = text.partition(":")
    try:
        found: Any = import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything on import
        reason = f"{type(error).__name__}: {error}"
        raise ScenarioError(f"cannot import '{text}' ({reason})") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = nearest(part, dir(found))
            meant = f"; did you mean '{near}'?" if near else ""
            raise ScenarioError(f"cannot import '{text}': '{module_name}' has no '{part}'{meant}")
        found = getattr(found, part)
    return found


def resolve(kind: str, name: str) -> Callable[..., Any]:
    """Return the factory behind a name.

    Parameters
    ----------
    kind : str
        A key of `TABLES`.
    name : str
        A registered name, or "package.module:name".

    Raises
    ------
    ScenarioError
        If the name is unknown (the nearest one is suggested) or cannot be imported.
    """
    table = TABLES[kind]
    if ":" not in name and name not in table:
        hint = "" if kind in _CLOSED else ", or 'package.module:name' of your own"
        raise ScenarioError(choose(name, _NOUNS.get(kind, kind), table) + hint)
    if ":" in name and kind in _CLOSED:
        raise ScenarioError(choose(name, kind, table))
    factory = import_object(table.get(name, name))
    if not callable(factory):
        raise ScenarioError(f"'{table.get(name, name)}' is not a function or class")
    return typing.cast(Callable[..., Any], factory)


def _check_import(value: str) -> str:
    try:
        is_callable = callable(import_object(value))
    except ScenarioError as error:
        raise ValueError(str(error)) from error
    if not is_callable:
        raise ValueError(f"'{value}' cannot be called")
    return value


_Importable = Annotated[
    str,
    AfterValidator(_check_import),
    WithJsonSchema({"type": "string", "pattern": IMPORT_STRING}),
]


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _is_strategy(annotation: Any) -> bool:
    """Tell whether a type is Flower's `Strategy`, without importing Flower."""
    bases = annotation.__mro__ if isinstance(annotation, type) else ()
    return any(b.__name__ == "Strategy" and b.__module__.startswith("flwr.") for b in bases)


def _is_callable_type(annotation: Any) -> bool:
    return typing.get_origin(annotation) is Callable or annotation is Callable


def _readable(annotation: Any) -> Any:
    """Replace callable types by ones that read import strings."""
    if _is_callable_type(annotation):
        return _Importable
    if typing.get_origin(annotation) is Annotated and "seconds" in annotation.__metadata__:
        return units.Duration  # how code that does not know our units says it
    members = _members(annotation)
    if len(members) > 1:
        return typing.Union[tuple(_readable(member) for member in members)]  # noqa: UP007
    return annotation


def _can_be_read(annotation: Any) -> bool:
    """Tell whether a value of this type can be written in YAML at all."""
    try:
        TypeAdapter(annotation)
    except (PydanticSchemaGenerationError, SchemaError):
        return False
    return True


def _type_text(annotation: Any) -> str:
    """Return a type as a user would say it."""
    for unit, text in _UNIT_NAMES:
        if annotation == unit:
            return text
    members = _members(annotation)
    if len(members) > 1:
        return " | ".join(_type_text(member) for member in members)
    if annotation in (inspect.Parameter.empty, Any):
        return "any"
    if annotation is type(None):
        return "null"
    if annotation == _Importable:
        return "package.module:name"
    if _is_strategy(annotation):
        return "strategy"
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _type_text(typing.get_args(annotation)[0])
    if origin is Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if origin is not None:
        inner = ", ".join(map(_type_text, typing.get_args(annotation)))
        return f"{origin.__name__}[{inner}]"
    if annotation is Ellipsis:
        return "..."
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _descriptions(factory: Callable[..., Any]) -> dict[str, str]:
    """Return what a numpydoc docstring says about each parameter (and dataclass field)."""
    bases = reversed(factory.__mro__) if isinstance(factory, type) else (factory,)
    text = "\n".join(inspect.cleandoc(base.__doc__ or "") for base in bases if base is not object)
    found: dict[str, list[str]] = {}
    names: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"(\*?\w+(?:, \w+)*) ?:(?: |$)", line):
            names = match[1].split(", ")
            found |= {name: [] for name in names}
        elif line.startswith("    ") and names:
            for name in names:
                found[name].append(line.strip())
        elif line.strip():
            names = []
    return {name: " ".join(lines) for name, lines in found.items() if lines}


def parameters(kind: str, name: str) -> tuple[Parameter, ...]:
    """Return the arguments that a scenario may give to a name, in the factory's order.

    Raises
    ------
    ScenarioError
        As `resolve` does.
    """
    factory = resolve(kind, name)
    supplied = SUPPLIED[kind]
    described = _descriptions(factory)
    found = []
    for each in _signature(factory).parameters.values():
        if each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL, each.POSITIONAL_ONLY):
            continue
        if each.name in supplied:
            continue
        annotation = Any if isinstance(each.annotation, str) else each.annotation
        annotation = Any if annotation is each.empty else _readable(annotation)
        is_required = each.default is each.empty
        is_nested = kind == "strategy" and any(map(_is_strategy, _members(annotation)))
        if not is_nested and not _can_be_read(annotation):
            if not is_required:
                continue
            annotation = Any
        found.append(
            Parameter(
                name=each.name,
                type=_type_text(annotation),
                description=described.get(each.name, ""),
                is_required=is_required,
                default=None if is_required else each.default,
                is_nested=is_nested,
                is_import=_Importable in _members(annotation),
                annotation=annotation,
            )
        )
    return tuple(found)


def _signature(factory: Callable[..., Any]) -> inspect.Signature:
    """Return the signature, its annotations as types where they can be evaluated."""
    try:
        return inspect.signature(factory, eval_str=True)
    except NameError:  # annotations that exist for type checkers only
        return inspect.signature(factory)
    except ValueError:  # a builtin that has none
        return inspect.Signature()


def arguments_model(kind: str, name: str) -> type[BaseModel]:
    """Return a pydantic model of the arguments that a scenario may give to a name.

    Fields carry the argument names as aliases, because an argument may have a name that pydantic
    keeps for itself. Nested strategies are left to `check`.

    Raises
    ------
    ScenarioError
        As `resolve` does.
    """
    fields: dict[str, tuple[Any, FieldInfo]] = {}
    for index, parameter in enumerate(parameters(kind, name)):
        described: dict[str, Any] = {
            "alias": parameter.name,
            "description": parameter.description or None,
        }
        if not parameter.is_required and _is_plain(parameter.default):
            described["default"] = parameter.default
        elif not parameter.is_required:
            described["default_factory"] = partial(copy, parameter.default)
        annotation = Any if parameter.is_nested else parameter.annotation
        if not parameter.is_required and parameter.default is None:
            annotation = annotation | None
        fields[f"argument_{index}"] = (annotation, Field(**described))
    found = _signature(resolve(kind, name)).parameters.values()
    takes_all = any(each.kind is each.VAR_KEYWORD for each in found)
    config = ConfigDict(
        extra="allow" if takes_all else "forbid",
        strict=True,
        allow_inf_nan=False,
        title=name,
    )
    model: type[BaseModel] = create_model("Arguments", __config__=config, **fields)  # type: ignore[call-overload]
    return model


def as_mapping(spec: object) -> dict[str, Any] | None:
    """Return a part of a scenario as a mapping with `kind`: "iid" is {kind: iid}."""
    if isinstance(spec, str):
        return {"kind": spec}
    if isinstance(spec, Mapping):
        return dict(spec)
    return None


def _is_plain(value: object) -> bool:
    """Tell whether a default can be written in YAML."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def check(
    kind: str, spec: object, path: tuple[str | int, ...] = (), *, beside: Iterable[str] = ()
) -> tuple[dict[str, Any], list[Problem]]:
    """Check one part of a scenario, a name or a mapping with `kind` and arguments.

    Parameters
    ----------
    kind : str
        A key of `TABLES`.
    spec : object
        What the scenario says.
    path : tuple
        Where it says so.
    beside : iterable of str
        Keys that may stand beside the arguments and are checked elsewhere, to be suggested.

    Returns
    -------
    dict
        `kind` and all arguments, defaults filled in, as they would be written in YAML. What was
        given if there are problems.
    list of Problem
    """
    given = as_mapping(spec)
    if given is None:
        expected = f"a name or a mapping with 'kind'; names: {', '.join(TABLES[kind])}"
        return {}, [Problem(path, f"{shown(spec)} should be {expected}")]
    name = given.pop("kind", None)
    if not isinstance(name, str):
        said = "is missing" if name is None else f"{shown(name)} should be text"
        valid = ", ".join(TABLES[kind])
        return dict(given), [Problem((*path, "kind"), f"{said}; one of: {valid}")]
    try:
        known = {parameter.name: parameter for parameter in parameters(kind, name)}
        model = arguments_model(kind, name)
    except ScenarioError as error:
        is_short = isinstance(spec, str)
        return {"kind": name} | given, [
            Problem(path if is_short else (*path, "kind"), str(error)),
        ]
    problems: list[Problem] = []
    for key, parameter in known.items():
        if parameter.is_nested and given.get(key) is not None:
            given[key], found = check(kind, given[key], (*path, key))
            problems += found
    reserved = SUPPLIED[kind] & given.keys()
    problems += [
        Problem((*path, key), f"'{key}' is filled in by fedsim and cannot be set here")
        for key in sorted(reserved)
    ]
    rest = {key: value for key, value in given.items() if key not in reserved}
    try:
        arguments = model.model_validate_json(json.dumps(rest))
    except ValidationError as error:
        problems += problems_of(error, path, lambda _: (*known, *beside))
        return {"kind": name} | given, problems
    unwritable = {
        f"argument_{index}"
        for index, (key, parameter) in enumerate(known.items())
        if key not in given and not _is_plain(parameter.default)
    }
    dumped = arguments.model_dump(mode="json", by_alias=True, exclude=unwritable, warnings=False)
    filled = {"kind": name} | dumped
    if not problems and is_dataclass(resolve(kind, name)):
        problems += _refusal(kind, filled, path)
    return filled, problems


def _refusal(kind: str, filled: dict[str, Any], path: tuple[str | int, ...]) -> list[Problem]:
    """Make a parameter bundle, so that its own checks speak while a scenario is validated."""
    factory, arguments = _parsed(kind, filled)
    if SUPPLIED[kind] & _signature(factory).parameters.keys():
        return []
    try:
        factory(**arguments)
    except (FedsimError, TypeError, ValueError) as error:
        return [Problem(path, str(error))]
    return []


def bind(kind: str, spec: object) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the factory of one part of a scenario and its arguments, parsed, nested parts built.

    Parameters
    ----------
    kind : str
        A key of `TABLES`.
    spec : str or mapping
        A name, or a mapping with `kind` and arguments.

    Raises
    ------
    ScenarioError
        If the arguments are wrong.
    """
    filled, problems = check(kind, spec)
    if problems:
        raise ScenarioError("; ".join(map(str, problems)))
    return _parsed(kind, filled)


def _parsed(kind: str, filled: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    given = dict(filled)
    name = given.pop("kind")
    parsed = arguments_model(kind, name).model_validate_json(json.dumps(given))
    arguments = dict(parsed.model_extra or {})
    for parameter, field in zip(parameters(kind, name), type(parsed).model_fields, strict=True):
        if field not in parsed.model_fields_set:
            continue
        value = getattr(parsed, field)
        if parameter.is_nested and value is not None:
            value = build(kind, value)
        elif parameter.is_import and isinstance(value, str):
            value = import_object(value)
        arguments[parameter.name] = value
    return resolve(kind, name), arguments


def build(kind: str, spec: object, /, **supplied: Any) -> Any:
    """Call the factory of one part of a scenario, nested parts first.

    Parameters
    ----------
    kind : str
        A key of `TABLES`.
    spec : str or mapping
        A name, or a mapping with `kind` and arguments.
    **supplied
        What the runner fills in; passed on where the factory has such a parameter.

    Raises
    ------
    PartError
        If the arguments are wrong, or the factory refuses them or fails.
    """
    factory, arguments = bind(kind, spec)
    takes = _signature(factory).parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in takes.values())
    arguments |= {key: value for key, value in supplied.items() if takes_all or key in takes}
    try:
        return factory(**arguments)
    except Exception as error:  # the factory may be anybody's code
        name = (as_mapping(spec) or {})["kind"]
        raise PartError(
            kind, f"{kind} '{name}': {reason(error)}{_meant(factory, error)}"
        ) from error


def reason(error: Exception) -> str:
    """Return what an error says, with its type where its message alone says little."""
    if isinstance(error, FedsimError | TypeError | ValueError | RuntimeError) and str(error):
        return str(error)
    return repr(error)


def _meant(factory: Callable[..., Any], error: Exception) -> str:
    """Return a hint where a base class refuses a keyword that `**kwargs` has let through."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if not (found and isinstance(error, TypeError) and isinstance(factory, type)):
        return ""
    known = (name for base in factory.__mro__ for name in _signature(base).parameters)
    near = nearest(found[1], known)
    return f"; did you mean '{near}'?" if near else ""


def list_names(kind: str) -> list[Entry]:
    """Return the registered names of one kind with their arguments, sorted by name."""
    return [_entry(kind, name, target) for name, target in sorted(TABLES[kind].items())]


def _entry(kind: str, name: str, target: str) -> Entry:
    try:
        summary = inspect.cleandoc(resolve(kind, name).__doc__ or "").partition("\n")[0]
        return Entry(kind, name, target, summary, parameters(kind, name), None)
    except ScenarioError as error:
        return Entry(kind, name, target, "", (), str(error))


def spec_schema(kind: str, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON Schema of one part: a name, or a mapping with `kind` and arguments.

    Parameters
    ----------
    kind : str
        A key of `TABLES`.
    extra : mapping
        Property schemas that stand beside the arguments.
    """
    entries = [entry for entry in list_names(kind) if entry.error is None]
    bare = [e.name for e in entries if not any(p.is_required for p in e.parameters)]
    choices: list[dict[str, Any]] = [{"enum": bare, "description": f"the name of a {kind}"}]
    choices += [_entry_schema(entry, extra or {}) for entry in entries]
    if kind in _CLOSED:
        return {"anyOf": choices}
    own = {"type": "string", "pattern": IMPORT_STRING}
    choices += [
        own | {"description": f"your own {kind}, as 'package.module:name'"},
        {
            "type": "object",
            "title": "your own",
            "properties": {"kind": own} | dict(extra or {}),
            "required": ["kind"],
        },
    ]
    return {"anyOf": choices}


def _entry_schema(entry: Entry, extra: Mapping[str, Any]) -> dict[str, Any]:
    model = arguments_model(entry.kind, entry.name)
    schema = model.model_json_schema(by_alias=True)
    properties = {
        key: {k: v for k, v in value.items() if k != "title"}
        for key, value in schema.get("properties", {}).items()
    }
    for parameter in entry.parameters:
        if parameter.is_nested:
            properties[parameter.name] = {"$ref": f"#/$defs/{entry.kind}"}
    return {
        "type": "object",
        "title": entry.name,
        "description": entry.summary,
        "properties": {"kind": {"const": entry.name}} | dict(extra) | properties,
        "required": ["kind", *schema.get("required", [])],
        "additionalProperties": bool(schema.get("additionalProperties", False)),
        **({"$defs": schema["$defs"]} if "$defs" in schema else {}),
    }
