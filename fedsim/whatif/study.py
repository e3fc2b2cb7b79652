"""What a study file may say, and the graphs, schedules and payloads that it names."""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fedsim.errors import ScenarioError
from fedsim.problems import Problem, nearest, problems_of, shown
from fedsim.registry import as_mapping
from fedsim.units import Bandwidth, Duration, Size, parse_bandwidth, parse_size, parse_time
from topologies.attributes import Graph, label
from topologies.cost import Prices
from topologies.families import FAMILIES
from topologies.msccl import from_msccl_xml
from topologies.placement import COLLECTIVES
from topologies.profiles import PROFILES, Profile, custom_profile, profile
from topologies.schedules import Schedule, from_json
from topologies.timing import CostModel

__all__ = [
    "Failure",
    "Losses",
    "Study",
    "Trace",
    "build_topology",
    "payload_of",
    "read_study",
    "schedule_on",
]

T = TypeVar("T")
_LINK = re.compile(r"(\d+)-(\d+)")
# Arguments of generators that carry units in a study.
_UNITS: dict[str, Callable[[object], float]] = {"bandwidth": parse_bandwidth, "latency": parse_time}


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


Many = Annotated[tuple[T, ...], BeforeValidator(lambda v: tuple(_as_list(v))), Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Failure(_Section):
    """A cable or a switch that is slow or down for some time."""

    link: str = "worst"
    """A cable as `3-17`, a node as `17` (all its cables), or `worst`: the one that costs most."""
    at: Duration = 0.0
    """When it begins."""
    until: Duration | None = None
    """When it ends; absent: never."""
    rate: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the bandwidth that is left; 0 is down."""
    on_failure: Literal["error", "reroute", "wait"] = "reroute"
    """What messages do on a cable that is down."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.link != "worst" and not _LINK.fullmatch(self.link) and not self.link.isdigit():
            raise ValueError(f"link '{self.link}': write 'worst', a cable '3-17' or a node '17'")
        if self.until is not None and self.until <= self.at:
            raise ValueError(f"until = {self.until:g} s is not after at = {self.at:g} s")
        return self

    @property
    def target(self) -> tuple[int, int] | int | None:
        """The cable or node; None for the worst."""
        if match := _LINK.fullmatch(self.link):
            return int(match[1]), int(match[2])
        return None if self.link == "worst" else int(self.link)

    def __str__(self) -> str:
        until = "" if self.until is None else f" to {self.until:g} s"
        what = "down" if self.rate == 0 else f"at {100 * self.rate:g} %"
        policy = "" if self.rate else f", {self.on_failure}"
        return f"{self.link} {what} from {self.at:g} s{until}{policy}"


class Trace(_Section):
    """A bandwidth that changes: the share of it that is there from each time on."""

    link: str = "all"
    """`all`, a cable as `3-17`, or a node as `17`."""
    times: tuple[Duration, ...] = Field(min_length=1)
    """Ascending; before the first the bandwidth is whole."""
    rates: tuple[float, ...] = Field(min_length=1)
    """Shares of the bandwidth, 0 or more."""
    repeat: int = Field(default=1, ge=1)
    """How often the pattern is played; the period is the last time plus the mean step."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.times) != len(self.rates) or list(self.times) != sorted(set(self.times)):
            raise ValueError("times must ascend, one for each of the rates")
        if any(not rate >= 0 for rate in self.rates):
            raise ValueError(f"rates {self.rates} must not be negative")
        if self.link != "all" and not _LINK.fullmatch(self.link) and not self.link.isdigit():
            raise ValueError(f"link '{self.link}': write 'all', a cable '3-17' or a node '17'")
        return self

    @property
    def target(self) -> tuple[int, int] | int | None:
        """The cable or node; None for every link."""
        if match := _LINK.fullmatch(self.link):
            return int(match[1]), int(match[2])
        return None if self.link == "all" else int(self.link)

    def points(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return times and rates, the pattern repeated."""
        span = self.times[-1] - self.times[0]
        period = span + (span / (len(self.times) - 1) if len(self.times) > 1 else 1.0)
        times = tuple(t + turn * period for turn in range(self.repeat) for t in self.times)
        return times, self.rates * self.repeat

    def __str__(self) -> str:
        again = f" x{self.repeat}" if self.repeat > 1 else ""
        return f"trace of {len(self.times)} rates{again} on {self.link}"


class Losses(_Section):
    """What the ideal model leaves out; off unless asked for."""

    hash: Literal["off", "on"] = "off"
    """One path per pair of hosts, drawn by a hash, instead of an even split."""
    incast: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of its rate that a host's link delivers under many messages at once."""
    incast_fan_in: int = Field(default=4, ge=1)
    """More messages at once than this are many."""
    message: Duration = 0.0
    """Cost of starting a message, one after the other on a port."""

    def __str__(self) -> str:
        parts = ["single hashed paths"] if self.hash == "on" else []
        if self.incast < 1:
            parts.append(f"incast {self.incast:g} above {self.incast_fan_in} messages")
        if self.message:
            parts.append(f"{self.message:g} s a message")
        return ", ".join(parts)


class PriceTable(_Section):
    """Prices in any currency; the defaults are round numbers, not quotations."""

    switch: float = Field(default=0.0, ge=0.0)
    switch_port: float = Field(default=100.0, ge=0.0)
    nic_port: float = Field(default=50.0, ge=0.0)
    cable: float = Field(default=20.0, ge=0.0)
    switches: dict[int, float] = {}
    """Whole switches by number of ports."""

    def prices(self) -> Prices:
        """Return the table as `topologies.cost` takes it."""
        listed = tuple(sorted(self.switches.items()))
        return Prices(self.switch, self.switch_port, self.nic_port, self.cable, listed)


def _unless_none(value: Any) -> Any:
    return None if value == "none" else value


class Study(_Section):
    """Topologies x collectives x payloads x networks, without training."""

    name: str = "study"
    study: Literal["collectives"] = "collectives"
    seed: int = 0
    topologies: Many[dict[str, Any]]
    collectives: Many[dict[str, Any]]
    payloads: Many[str]
    """A model profile or a number of bytes."""
    bandwidth: Many[Bandwidth]
    latency: Many[Duration] = (0.0,)
    """alpha, once per step whatever the hops."""
    reduction: Bandwidth = float("inf")
    """What a rank adds up per second (1/gamma)."""
    compute: Duration | None = None
    """Per iteration; gives iteration and job completion times."""
    iterations: int = Field(default=1, ge=1)
    """Of a job."""
    baseline: str = "ps_colocated"
    """The collective against which job completion times are compared."""
    engine: Literal["load", "fluid"] = "load"
    """`load`: a step lasts as long as its busiest link; `fluid`: max-min fair sharing, slower."""
    barrier: Literal["global", "local"] = "global"
    fusion: Size | None = None
    """Bucket size of tensor fusion; 0: every tensor alone; absent: all in one."""
    overlap: bool = False
    """Whether buckets are synchronised while back-propagation goes on."""
    routing: Literal["spray", "single"] = "spray"
    failures: Many[Annotated[Failure | None, BeforeValidator(_unless_none)]] = (None,)
    traces: Many[Annotated[Trace | None, BeforeValidator(_unless_none)]] = (None,)
    losses: Losses = Losses()
    prices: PriceTable = PriceTable()

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any) -> Any:
        """Read a name where a mapping with `kind` may stand."""
        data = dict(data)
        for key in ("topologies", "collectives"):
            if key in data:
                data[key] = [
                    as_mapping(v) if isinstance(v, str) else v for v in _as_list(data[key])
                ]
        if "payloads" in data:
            data["payloads"] = _as_list(data["payloads"])
        return data

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        problems = []
        for i, spec in enumerate(self.topologies):
            problems += _misspelt(FAMILIES, spec, ("topologies", i))
        known = {**COLLECTIVES, "json": from_json, "msccl": from_msccl_xml}
        for i, spec in enumerate(self.collectives):
            problems += _misspelt(known, spec, ("collectives", i))
        for i, payload in enumerate(self.payloads):
            try:
                payload_of(payload)
            except ScenarioError as error:
                problems.append(Problem(("payloads", i), str(error)))
        if problems:
            raise ValueError("; ".join(map(str, problems)))
        return self

    def model(self, latency: float) -> CostModel:
        """Return what a step costs besides its bytes."""
        return CostModel(
            step_latency=latency,
            reduce_seconds_per_byte=8.0 / self.reduction,
            incast_efficiency=self.losses.incast,
            incast_fan_in=self.losses.incast_fan_in,
            message_seconds=self.losses.message,
        )


def read_study(data: Mapping[str, Any]) -> Study:
    """Return a study from a mapping as a YAML reader gives it.

    Raises
    ------
    ScenarioError
        Names each key that is wrong, its value and what is valid.
    """
    try:
        return Study.model_validate(dict(data))
    except ValidationError as error:

        def keys_at(place: tuple[str | int, ...]) -> list[str]:
            inner: dict[str, type[BaseModel]]
            inner = {"losses": Losses, "prices": PriceTable, "failures": Failure, "traces": Trace}
            model = inner.get(str(place[0]), Study) if place else Study
            return list(model.model_fields)

        problems = problems_of(error, (), keys_at)
        raise ScenarioError("\n".join(map(str, problems))) from error


def _misspelt(
    known: Mapping[str, Callable[..., Any]], spec: Mapping[str, Any], path: tuple[str | int, ...]
) -> list[Problem]:
    """Return what is wrong with the names in a mapping with `kind`."""
    kind = str(spec.get("kind"))
    if kind not in known:
        near = nearest(kind, known)
        meant = f"; did you mean '{near}'?" if near else ""
        return [
            Problem((*path, "kind"), f"{shown(kind)} is unknown{meant} One of: {', '.join(known)}")
        ]
    takes = inspect.signature(known[kind]).parameters
    hidden = {"graph", "n_bytes"}
    valid = [name for name in takes if name not in hidden]
    given = spec.keys() - {"kind"}
    found = [
        Problem((*path, key), f"unknown key. Valid for {kind}: {', '.join(valid) or 'none'}")
        for key in sorted(given - set(valid))
    ]
    missing = [
        name
        for name in valid
        if takes[name].default is inspect.Parameter.empty and name not in given
    ]
    return found + [Problem((*path, name), f"is missing for {kind}") for name in missing]


def build_topology(
    spec: Mapping[str, Any], *, bandwidth: float = float("inf"), seed: int = 0
) -> Graph:
    """Return the graph that a mapping with `kind` describes.

    Parameters
    ----------
    spec : mapping
        `kind` and the arguments of its generator; ``bandwidth`` and ``latency`` with units, one
        text or a list of them.
    bandwidth : float
        bit/s, where the mapping does not say.
    seed : int
        Where the mapping does not say.

    Raises
    ------
    ScenarioError
        If the kind or an argument is unknown, or the sizes make no sense.
    """
    problems = _misspelt(FAMILIES, spec, ())
    if problems:
        raise ScenarioError("; ".join(map(str, problems)))
    kind = str(spec["kind"])
    arguments = {key: value for key, value in spec.items() if key != "kind"}
    takes = inspect.signature(FAMILIES[kind]).parameters
    try:
        for key in _UNITS.keys() & arguments.keys():
            value, parse = arguments[key], _UNITS[key]
            arguments[key] = [parse(v) for v in value] if isinstance(value, list) else parse(value)
        arguments.setdefault("bandwidth", bandwidth)
        if "seed" in takes:
            arguments.setdefault("seed", seed)
        graph = FAMILIES[kind](**arguments)
    except (TypeError, ValueError) as error:
        raise ScenarioError(f"topology {kind}: {error}") from error
    if kind != "file":
        # What the generator does not count among its sizes (rates, seeds) tells graphs apart too.
        extra = {key: _written(value) for key, value in spec.items() if key != "kind"}
        graph.graph["name"] = label(kind, extra | graph.graph["parameters"])
    return graph


def _written(value: Any) -> Any:
    is_text = isinstance(value, list) and all(isinstance(v, str) for v in value)
    return " / ".join(value) if is_text else value


def schedule_on(spec: Mapping[str, Any], graph: Graph) -> Schedule:
    """Return a collective's schedule on a graph.

    Raises
    ------
    ValueError
        If the pair makes no sense; says why.
    """
    kind = str(spec["kind"])
    arguments = {key: value for key, value in spec.items() if key != "kind"}
    if kind in ("json", "msccl"):
        return _from_file(kind, str(arguments["path"]))
    return COLLECTIVES[kind](graph, **arguments)


@lru_cache(maxsize=32)
def _from_file(kind: str, path: str) -> Schedule:
    return from_json(Path(path)) if kind == "json" else from_msccl_xml(Path(path))


def payload_of(text: str) -> Profile:
    """Return the model profile of a payload, which is its name or a number of bytes.

    Raises
    ------
    ScenarioError
        If it is neither.
    """
    if text in PROFILES:
        return profile(text)
    try:
        return custom_profile(parse_size(text), name=text)
    except ValueError as error:
        models = ", ".join(PROFILES)
        raise ScenarioError(f"'{text}' is no model ({models}) and no size: {error}") from error
