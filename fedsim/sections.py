"""The sections of a scenario file, as strict models, and quantities that are drawn."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from fedsim.units import Bandwidth, Duration, Energy, Size

__all__ = [
    "DISTRIBUTIONS",
    "AttackEntry",
    "ClientAppExecution",
    "Compression",
    "Data",
    "Devices",
    "Evaluation",
    "FailureEntry",
    "FlowerExecution",
    "NetworkOptions",
    "Peers",
    "Quantity",
    "RayExecution",
    "Record",
    "Section",
    "Spec",
    "Stop",
    "Topology",
    "Training",
    "VectorisedExecution",
    "draw",
]

FloatArray = NDArray[np.float64]


class Section(BaseModel):
    """A mapping of the scenario: nothing unknown, nothing converted, nothing changed later."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Spec(Section):
    """A part chosen by name: `kind`, and the arguments of what it names."""

    model_config = ConfigDict(extra="allow")

    kind: str

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments as they are written in YAML."""
        return dict(self.model_extra or {})

    def spec(self) -> dict[str, Any]:
        """Return `kind` and arguments, as `fedsim.registry.build` takes them."""
        return {"kind": self.kind} | self.arguments


# ── quantities that may differ between devices ──────────────────────────────────────────────────

QuantityT = TypeVar("QuantityT")


class Lognormal(Section, Generic[QuantityT]):
    """Spread lognormally around a median."""

    kind: Literal["lognormal"]
    median: QuantityT
    sigma: float = Field(ge=0)
    """Spread of the logarithm: 0.5 puts 95 % within a factor 2.7 of the median."""


class Uniform(Section, Generic[QuantityT]):
    """Uniform between two values."""

    kind: Literal["uniform"]
    low: QuantityT
    high: QuantityT

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if cast(float, self.low) > cast(float, self.high):
            raise ValueError("low is above high")
        return self


class Choice(Section, Generic[QuantityT]):
    """Each device draws one of several values, all equally likely."""

    kind: Literal["choice"]
    values: tuple[QuantityT, ...] = Field(min_length=1)


DISTRIBUTIONS = ("quantity", "lognormal", "uniform", "choice", "tiers")


def _distribution(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("kind"))
    if isinstance(value, list):
        return "tiers"
    return value.kind if isinstance(value, Lognormal | Uniform | Choice) else "quantity"


_Rate = Annotated[Bandwidth, Field(gt=0)]
_Rates = Annotated[
    Annotated[_Rate, Tag("quantity")]
    | Annotated[Lognormal[_Rate], Tag("lognormal")]
    | Annotated[Uniform[_Rate], Tag("uniform")]
    | Annotated[Choice[_Rate], Tag("choice")]
    | Annotated[list[_Rate], Tag("tiers")],
    Discriminator(_distribution),
]
_Durations = Annotated[
    Annotated[Duration, Tag("quantity")]
    | Annotated[Lognormal[Duration], Tag("lognormal")]
    | Annotated[Uniform[Duration], Tag("uniform")]
    | Annotated[Choice[Duration], Tag("choice")]
    | Annotated[list[Duration], Tag("tiers")],
    Discriminator(_distribution),
]
Quantity = float | Lognormal[Any] | Uniform[Any] | Choice[Any] | list[float]
"""One value for all, how the values are spread, or one for each tier of a tree (base units)."""


def draw(quantity: Quantity, n: int, rng: np.random.Generator) -> FloatArray:
    """Return the value of each of `n` devices.

    Parameters
    ----------
    quantity : float, Lognormal, Uniform or Choice
    n : int
        How many values.
    rng : numpy.random.Generator
        Not used where all values are equal.

    Returns
    -------
    ndarray of float64, shape (n,)
        In the quantity's own base unit (bit/s or s).
    """
    match quantity:
        case Lognormal(median=median, sigma=sigma):
            values = median * np.exp(sigma * rng.standard_normal(n))
        case Uniform(low=low, high=high):
            values = rng.uniform(low, high, n)
        case Choice(values=options):
            values = np.asarray(options, np.float64)[rng.integers(len(options), size=n)]
        case _:
            values = np.full(n, quantity, np.float64)
    return np.asarray(values, np.float64)


@dataclass(frozen=True, slots=True)
class VectorisedExecution:
    """All devices that wait are trained together, in this process, over stacked parameters.

    Parameters
    ----------
    chunk : int, optional
        Devices trained at once; fewer need less memory. By default as many as fit. Results do not
        depend on it.
    engine : {"auto", "linear", "vmap", "loop"}
        Hand-batched products for stacks of linear layers, any module mapped over devices, or one
        device after the other; `auto` takes the first that serves.
    precision : {"exact", "tf32", "bfloat16"}
        Of the arithmetic; weights and results keep their type.
    """

    chunk: Annotated[int, Field(ge=1)] | None = None
    engine: Literal["auto", "linear", "vmap", "loop"] = "auto"
    precision: Literal["exact", "tf32", "bfloat16"] = "exact"


@dataclass(frozen=True, slots=True)
class ClientAppExecution:
    """An ordinary Flower `ClientApp` is called for each device, in this process.

    Parameters
    ----------
    app : callable, optional
        The `ClientApp`, as "package.module:name". By default fedsim's own, which does the same
        work as `vectorised`, one device at a time.
    run_config : dict, optional
        What the app finds in `context.run_config` (int, float, str or bool), beside the local
        work of `training` (`local-epochs`, `batch-size`, `learning-rate`) and
        `num-server-rounds`.
    train_config : dict, optional
        What the strategy sends with each train instruction beside the local work of `training`
        (int, float, str or bool).
    """

    app: Callable[..., Any] | None = None
    run_config: dict[str, bool | int | float | str] | None = None
    train_config: dict[str, bool | int | float | str] | None = None


_Workers = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class RayExecution(VectorisedExecution):
    """As `vectorised`, with the devices shared out to workers on Ray, here or on a cluster.

    Parameters
    ----------
    address : str, optional
        Of a Ray cluster, "host:port"; `local` starts Ray for this run. By default the cluster that
        `RAY_ADDRESS` or `ray start` on this machine offers, else `local`.
    workers : int, optional
        Processes; by default as many as fit.
    cpus : float
        Processors of each.
    gpus : float
        GPUs of each; half a one puts two workers on a GPU.
    """

    address: str | None = None
    workers: _Workers | None = None
    cpus: Annotated[float, Field(gt=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0


@dataclass(frozen=True, slots=True)
class FlowerExecution(ClientAppExecution):
    """As `client_app`, in worker processes on Ray, the engine of Flower's own simulation.

    Parameters
    ----------
    address : str, optional
        Of a Ray cluster, "host:port"; `local` starts Ray for this run. By default the cluster that
        `RAY_ADDRESS` or `ray start` on this machine offers, else `local`.
    workers : int, optional
        Processes; by default as many as fit.
    cpus : float
        Processors of each.
    gpus : float
        GPUs of each; half a one puts two workers on a GPU.
    """

    address: str | None = None
    workers: _Workers | None = None
    cpus: Annotated[float, Field(gt=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0


class Stop(Section):
    """Ends a strategy before its last round; whichever comes first."""

    accuracy: float | None = Field(default=None, gt=0, le=1)
    """Evaluation accuracy reached."""
    time: Annotated[Duration, Field(gt=0)] | None = None
    """Virtual time passed."""
    traffic: Annotated[Size, Field(gt=0)] | None = None
    """Bytes sent by server and devices together."""


class Data(Section):
    """What is learned from, and who holds what."""

    dataset: Spec = Spec(kind="digits")
    """The data set: a name or a mapping with `kind`."""
    devices: int = Field(ge=1)
    """How many devices there are."""
    partition: Spec = Spec(kind="iid")
    """How the training samples are split over the devices."""
    test_fraction: float = Field(default=0.25, gt=0, lt=1)
    """Share of the samples kept for testing, for data sets without a test set of their own."""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training samples kept for validation, on no device."""
    local_test_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of its samples that a device keeps to test models on (`evaluation.on: devices`)."""

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.test_fraction + self.validation_fraction >= 1:
            raise ValueError("test_fraction and validation_fraction leave nothing to train on")
        return self


_Pair = Annotated[list[QuantityT], Field(min_length=2, max_length=2)]


class Training(Section):
    """What a device does with its data in a round, unless the strategy says otherwise."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """SGD, with `momentum` and the like; Adam or AdamW, whose moments start at zero every round."""
    learning_rate: float = Field(default=0.1, ge=0)
    """Step size."""
    batch_size: int = Field(default=32, ge=0)
    """Samples a step; 0 means all of the device's samples."""
    schedule: Spec | None = None
    """How the learning rate changes with the round: a name or a mapping with `kind`."""
    loss: str | None = None
    """The loss; by default what the model was made for."""
    drop_last: bool = False
    """Leave out the last batch of an epoch when it is smaller than the others."""
    local_epochs: int | None = Field(default=None, ge=1)
    """Passes over the device's data in a round; 1 unless `local_steps` is given."""
    local_steps: Annotated[int, Field(ge=1)] | _Pair[int] | None = None
    """Steps in a round, instead of `local_epochs`; of a pair each device draws from that range."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Heavy-ball momentum; starts at zero in every round."""
    betas: _Pair[float] = [0.9, 0.999]
    """Decay rates of Adam's moments."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of Adam's second moment."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Coefficient of the L2 penalty."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of a device's gradient."""
    keep_local: str | list[str] | None = None
    """Tensors that stay on their devices: `batch_norm`, `batch_norm_statistics`, name patterns."""

    @model_validator(mode="before")
    @classmethod
    def _fill_epochs(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and not (data.get("local_epochs") or data.get("local_steps")):
            return {**data, "local_epochs": data.get("local_epochs", 1)}
        return data

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError("give local_epochs or local_steps, not both")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class DeviceEnergy(Section):
    """What a device spends on work and on messages."""

    per_sample: Energy | None = None
    """For one training sample; evaluation counts a third."""
    per_flop: Energy | None = None
    """For one operation of the model, instead of `per_sample`."""
    per_byte_sent: Energy = 0.0
    """For one byte that leaves the device, headers included, lost messages as well."""
    per_byte_received: Energy = 0.0
    """For one byte that reaches the device."""

    @model_validator(mode="after")
    def _check_work(self) -> Self:
        if self.per_sample is not None and self.per_flop is not None:
            raise ValueError("give per_sample or per_flop, not both")
        return self


class Devices(Section):
    """How fast devices compute, when they are there, and what they spend."""

    speed: Spec = Spec(kind="constant", value="500 samples/s")  # type: ignore[call-arg]
    """Training samples or operations per second of each device."""
    slowdown: Spec = Spec(kind="none")
    """When devices are slower than that."""
    availability: Spec = Spec(kind="always")
    """When each device can be reached."""
    on_leave: Literal["pause", "drop"] = "pause"
    """What becomes of the work of a device that goes away: it waits, or is lost."""
    energy: DeviceEnergy | None = None
    """What work and messages cost a device; none: not counted."""


class Topology(Spec):
    """Who is linked with whom, and how fast the links are."""

    kind: str = "star"
    """The shape: `star` puts one server in the middle; `fedsim list topology` names the others."""
    bandwidth: _Rates = Field(default=math.inf, json_schema_extra={"default": "unlimited"})
    """Rate of each link, per direction: one value, how values are spread, or a list (tree only):
    one value for each tier, from the root down."""
    latency: _Durations = 0.0
    """One-way delay of each link."""
    uplink: _Rates | None = None
    """Rate from device to server where it differs from `bandwidth` (star only)."""
    downlink: _Rates | None = None
    """Rate from server to device where it differs from `bandwidth` (star only)."""
    server_bandwidth: _Rate = Field(default=math.inf, json_schema_extra={"default": "unlimited"})
    """Rate of the server's own link, shared by all devices, per direction (star only)."""


class Peers(Spec):
    """Who exchanges with whom, where devices exchange with each other."""

    redraw: bool = False
    """Draw a random graph anew in every round."""


class FailureEntry(Section):
    """Something that is down from one time to another: a link, a node, or a partition."""

    link: str | None = None
    """A link's name: `access-17` (both directions of a device's link), `up-17`, `3-7`, `3>7`."""
    node: int | None = None
    """A node: a device's number; in a star the server is the number of devices."""
    parts: list[list[int]] | None = None
    """A partition: links between nodes of different parts are down."""
    start: Duration = 0.0
    """When it goes down."""
    end: Duration | None = None
    """When it comes back; never, by default."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = sum(each is not None for each in (self.link, self.node, self.parts))
        if given != 1:
            raise ValueError(f"a failure has one of link, node and parts; this one has {given}")
        if self.end is not None and not self.start < self.end:
            raise ValueError("a failure must end after its start")
        return self


class NetworkOptions(Section):
    """How messages fare."""

    message_loss: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a message is lost as a whole."""
    loss_reply: Literal["missing", "error"] = "missing"
    """What a strategy sees of a lost message: no reply, or a reply with an error."""
    link_down: Literal["stall", "fail", "reroute"] = "stall"
    """What a transfer does when its link goes down: wait for it, fail, or take another route."""
    loss: Literal["none", "goodput", "tcp", "drop"] = "none"
    """What a link's own packet loss does: nothing; lost packets are sent again at the cost of
    rate; the same, and TCP's congestion control caps the rate; the whole message is lost with the
    first of its packets."""
    stall_timeout: Annotated[Duration, Field(gt=0)] | None = None
    """A transfer whose rate has been 0 for so long fails."""
    transfer_timeout: Annotated[Duration, Field(gt=0)] | None = None
    """A transfer fails so long after it was sent, whatever its state."""
    retries: int = Field(default=0, ge=0)
    """How often a message that was lost or failed is sent again."""
    backoff: Duration = 1.0
    """Wait before the first retry; doubles with each."""
    handshake_rtts: float = Field(default=0.0, ge=0)
    """Round trips before a transfer sets off."""
    startup: Literal["none", "slow_start"] = "none"
    """Whether a transfer starts slowly, as TCP's do."""
    header_efficiency: float = Field(default=1.0, gt=0, le=1)
    """Share of a link's rate that is payload: 0.9653 for TCP over 1500-byte packets."""
    fairness: Literal["maxmin", "rtt", "none"] = "maxmin"
    """How transfers share a link: equally; in inverse proportion to their latency; not at all."""
    multipath: Literal["spray", "hash", "single"] = "spray"
    """How a collective's messages use several equally short routes: split evenly over them; each
    pair of devices one, drawn by a hash; always the first."""
    late: Literal["finish", "cancel"] = "finish"
    """What becomes of messages on their way when a round times out."""
    failures: list[FailureEntry] = Field(default_factory=list)
    """What fails when, whatever the `links` do."""
    header_bytes: int = Field(default=0, ge=0)
    """Bytes added to every message."""
    downlink: Literal["unicast", "broadcast"] = "unicast"
    """Whether what the server sends to several devices alike crosses links that they share, and
    counts, once for each of them or once for all, as in a radio cell."""
    accounting: Literal["dense", "flower"] = "dense"
    """What a payload weighs: its numbers, or all that Flower would serialise."""


class Compression(Section):
    """How the messages of strategies that know nothing of it are compressed."""

    up: Spec | None = None
    """Of the changes that devices send: a name or a mapping with `kind`."""
    down: Spec | None = None
    """Of the model that devices are sent: a name or a mapping with `kind`."""
    down_rate: float | None = Field(default=None, ge=0, le=1)
    """Rate of the reference that models are sent as differences to; by default what suits `down`,
    and 0 compresses the model itself."""
    error_feedback: bool | None = None
    """Whether devices add what was left out to their next change; by default where `up` is
    biased, but for casts."""
    per_tensor: bool = True
    """Whether each tensor is compressed by itself, with a scale of its own."""

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if self.up is None and self.down is None:
            raise ValueError("give up, down or both, for example 'up: quantise'")
        if self.down_rate is not None and self.down is None:
            raise ValueError("down_rate needs down")
        if self.error_feedback is not None and self.up is None:
            raise ValueError("error_feedback needs up")
        return self


class AttackEntry(Section):
    """Devices that do harm, all in the same way."""

    kind: Literal["label_flip", "sign_flip", "noise", "nan", "free_rider"]
    """What they do: train on flipped labels, send the opposite of what they learnt, add noise, send
    NaN, or send back what came without working."""
    share: float | None = Field(default=None, gt=0, le=1)
    """Their share of the devices, which are drawn by the seed."""
    devices: list[int] | None = Field(default=None, min_length=1)
    """The devices themselves, instead of a share."""
    scale: float = Field(default=1.0, gt=0)
    """Of `sign_flip` the factor, of `noise` the standard deviation."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.share is None) == (self.devices is None):
            raise ValueError("give share or devices, one of the two")
        if self.scale != 1 and self.kind not in ("sign_flip", "noise"):
            raise ValueError(f"scale has no meaning for {self.kind}")
        return self


class Evaluation(Section):
    """When and on what the model is scored."""

    every: int = Field(default=1, ge=1)
    """Rounds from one evaluation to the next."""
    on: Literal["global_test", "validation", "devices"] = "global_test"
    """The common test set, the validation samples, or each device's own data (Flower's way)."""
    cost: Literal["charged", "free"] | None = None
    """Whether evaluation on devices takes time and traffic; by default it does."""
    target: float | None = Field(default=None, gt=0, le=1)
    """Accuracy for the time, the rounds and the bytes to target in the summary."""
    samples: int | None = Field(default=None, ge=1)
    """At most so many of the test or validation samples, the same ones always; none: all."""
    excess_loss: bool = False
    """Record `strategy.excess_loss`: the devices' mean training loss above its minimum (linear
    and logistic regression)."""
    confusion: bool = False
    """Write the last model's confusion matrix, classes taken for others, to `confusion.csv`."""

    @model_validator(mode="before")
    @classmethod
    def _fill_cost(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("cost") is None:
            return {**data, "cost": "charged" if data.get("on") == "devices" else "free"}
        return data

    @model_validator(mode="after")
    def _check_cost(self) -> Self:
        if self.cost == "charged" and self.on != "devices":
            raise ValueError(f"cost 'charged' needs 'on: devices'; evaluation on {self.on} is free")
        if self.excess_loss and self.on == "devices":
            raise ValueError("excess_loss needs evaluation on common samples, not 'on: devices'")
        if self.confusion and self.on == "devices":
            raise ValueError("confusion needs evaluation on common samples, not 'on: devices'")
        return self


class Record(Section):
    """What is written beside one line a round."""

    transfers: bool = False
    """Write every transfer to transfers.parquet."""
