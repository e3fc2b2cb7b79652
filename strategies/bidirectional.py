"""Distributed SGD with compression in both directions: the equations of MCM and its family.

A `Scheme` says what travels: which compressor in which direction, with a memory or with error
feedback, and whether the server goes on from the compressed or the uncompressed step. The named
algorithms are schemes (`SCHEMES`). The functions of devices work on rows ``(n, P)``, those of the
server (`Server`) on a leading axis of runs, so that a driver without messages can make several runs
at once (`mcm_runs`) and a Flower strategy one (`mcm`), with the same code.

With g_i a device's gradient at its model x_i, h_i its memory (on both sides) and C compressors:

- uplink: ``D_i = g_i - h_i + c e_i``, ``Q_i = C_up(D_i)``, ``h_i += a_up Q_i``, ``e_i = D_i-Q_i``;
- server: ``ghat = mean(Q_i + h_i)``;
- downlink ``plain``: ``w -= γ ghat`` and w is sent (SGD, QSGD, DIANA);
- ``gradient``: ``O = C_down(ghat + c E)``, ``E = (ghat + c E) - O``, ``w -= γ O``, O is sent: the
  server's model is degraded (Bi-QSGD, Artemis, DORE, Double-Squeeze);
- ``model``: ``w -= γ ghat``, ``O = C_down(w - H)`` is sent, ``x = H + O``, ``H += a_down O``: the
  server's model is preserved (MCM; with a memory and message for each device Rand-MCM);
- ``ghost``: ``x = w_before - γ C_down(ghat)``, which no device could compute;
- ``drifting``: O = C_down(ghat) is sent, but ``w -= γ ghat``: devices drift away (an ablation).

References
----------
.. [1] Philippenko, Dieuleveut, "Preserved central model for faster bidirectional compression in
   distributed settings", NeurIPS 2021 (MCM, Rand-MCM, Ghost).
.. [2] Philippenko, Dieuleveut, "Bidirectional compression in heterogeneous settings for distributed
   or federated learning with partial participation", 2020 (Artemis, PP1, PP2).
.. [3] Mishchenko et al., "Distributed learning with compressed gradient differences", 2019 (DIANA).
.. [4] Liu et al., "A double residual compression algorithm for efficient distributed learning",
   AISTATS 2020 (DORE).
.. [5] Tang et al., "DoubleSqueeze", ICML 2019; Zheng et al., NeurIPS 2019 (Dist-EF-SGD).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.compression import (
    Compressor,
    Identity,
    Packed,
    Quantise,
    Sign,
    check_sizes,
    pack,
    runs_of,
)
from strategies.halves import Draws, KeyedDraws, RoundDraws

__all__ = [
    "SCHEMES",
    "Correction",
    "Scheme",
    "Server",
    "catch_up",
    "draw_active",
    "for_participation",
    "memory_rate",
    "moves_memory",
    "nearest",
    "scheme_of",
    "upload",
]

Downlink = Literal["plain", "gradient", "model", "ghost", "drifting"]
Correction = Literal["pp1", "pp2"]
Rate = float | Tensor
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Scheme:
    """What travels between server and devices, and what both remember.

    Parameters
    ----------
    up : tuple of Compressor
        C_up; several: device i uses number i modulo their count.
    down : Compressor
        C_down; unused with a plain downlink.
    downlink : str
        See the module.
    up_memory : bool
        Whether h_i exists.
    up_rate, down_rate : float, optional
        a_up and a_down, in [0, 1]; default: what suits the compressor. A down rate of 0 compresses
        the model itself.
    up_feedback, down_feedback : bool
        Whether e_i and E exist.
    feedback : float, "first_step" or "rescaled"
        The coefficient c: a number, γ_1 (as in the published comparison), or γ_{k-1}/γ_k
        (Dist-EF-SGD).
    groups : int
        Downlink memories: 1 is shared by all devices (MCM), 0 one for each (Rand-MCM), else device
        i uses number i modulo `groups`.
    momentum : float
        m in ``v = m v + (what is stepped with)``, in [0, 1); on the devices too if they step.
    damping : float, optional
        DORE as published: the error is kept in units of the model, ``O = C_down(γ ghat + c E)``,
        and ``w -= damping * O``. None is the gradient form of the table.
    starts_at_gradient : bool, optional
        Whether h_i starts at the device's first gradient, sent uncompressed, instead of 0. Default:
        where there is a memory that moves (and everybody takes part).
    per_tensor : bool
        Whether each tensor of a model is compressed by itself, with its own ω and memory rate.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    up: tuple[Compressor, ...] = (Identity(),)
    down: Compressor = field(default_factory=Identity)
    downlink: Downlink = "plain"
    up_memory: bool = False
    up_rate: float | None = None
    down_rate: float | None = None
    up_feedback: bool = False
    down_feedback: bool = False
    feedback: float | Literal["first_step", "rescaled"] = "first_step"
    groups: int = 1
    momentum: float = 0.0
    damping: float | None = None
    starts_at_gradient: bool | None = None
    per_tensor: bool = True

    def __post_init__(self) -> None:
        for name in ("up_rate", "down_rate", "damping"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; a rate must be between 0 and 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must be in [0, 1)")
        if self.groups < 0:
            raise ValueError(f"groups is {self.groups}; it must be at least 1, or 0 for all")
        if isinstance(self.feedback, str) and self.feedback not in ("first_step", "rescaled"):
            raise ValueError(f"feedback is {self.feedback!r}; a number, 'first_step' or 'rescaled'")
        if not self.up:
            raise ValueError("up is empty; name at least one compressor")

    @property
    def moves_up_memory(self) -> bool:
        """Whether the uplink memories change after they were set."""
        return self.up_memory and any(moves_memory(used, self.up_rate) for used in self.up)

    @property
    def moves_down_memory(self) -> bool:
        """Whether the downlink memories change; if not, they are zero for ever."""
        return moves_memory(self.down, self.down_rate)

    @property
    def begins_with_gradient(self) -> bool:
        """Whether a device's first reply is its uncompressed gradient, under full participation."""
        if self.starts_at_gradient is None:
            return self.moves_up_memory
        return self.up_memory and self.starts_at_gradient

    def coefficient(self, step: Callable[[int], float], k: int) -> float:
        """Return c in round k."""
        if self.feedback == "first_step":
            return step(1)
        if self.feedback == "rescaled":
            return step(k - 1) / step(k) if k > 1 else 1.0
        return float(self.feedback)

    def blocks(self, tensors: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes of what is compressed together."""
        return tuple(tensors) if self.per_tensor else (sum(tensors),)

    def check(self, tensors: Sequence[int]) -> None:
        """Raise a ValueError if tensors of these sizes cannot be compressed."""
        for name, used in (*(("up", each) for each in self.up), ("down", self.down)):
            check_sizes(used, self.blocks(tensors), name)

    def rate_up(self, choice: int, blocks: Sequence[int], like: Tensor) -> Rate:
        """Return a_up for devices that use the compressor number `choice`."""
        return memory_rate(self.up[choice], self.up_rate, blocks, like) if self.up_memory else 0.0

    def rate_down(self, blocks: Sequence[int], like: Tensor) -> Rate:
        """Return a_down."""
        return memory_rate(self.down, self.down_rate, blocks, like)


def moves_memory(used: Compressor, given: float | None) -> bool:
    """Return whether a memory of compressed differences is ever moved at a rate (None: its own)."""
    if given is None or used.is_exact:
        return used.memory_rate(1) > 0
    return given > 0


def memory_rate(used: Compressor, given: float | None, blocks: Sequence[int], like: Tensor) -> Rate:
    """Return the rate of a memory in each coordinate (P,), a number if it is the same in all."""
    if given is not None and not used.is_exact:
        return given
    runs = runs_of(used, blocks)
    rates = [used.memory_rate(run.size) for run in runs]
    if len(set(rates)) == 1:
        return rates[0]
    lengths = torch.tensor([run.count * run.size for run in runs])
    spread = torch.tensor(rates, dtype=torch.float64).repeat_interleave(lengths)
    return spread.to(like.device, like.dtype)


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "sgd": Scheme(),
        "qsgd": Scheme((Quantise(),)),
        "diana": Scheme((Quantise(),), up_memory=True),
        "bi_qsgd": Scheme((Quantise(),), Quantise(), "gradient"),
        "artemis": Scheme((Quantise(),), Quantise(), "gradient", up_memory=True),
        "dore": Scheme((Quantise(),), Quantise(), "gradient", up_memory=True, down_feedback=True),
        "dore_original": Scheme(
            (Quantise(),),
            Quantise(),
            "gradient",
            up_memory=True,
            down_feedback=True,
            feedback=0.1,
            damping=1.0,
        ),
        "double_squeeze": Scheme(
            (Quantise(),), Quantise(), "gradient", up_feedback=True, down_feedback=True
        ),
        "dist_ef_sgd": Scheme(
            (Sign(),), Sign(), "gradient", up_feedback=True, down_feedback=True, feedback="rescaled"
        ),
        "ghost": Scheme((Quantise(),), Quantise(), "ghost", up_memory=True),
        "mcm": Scheme((Quantise(),), Quantise(), "model", up_memory=True),
        "rand_mcm": Scheme((Quantise(),), Quantise(), "model", up_memory=True, groups=0),
        "mcm_no_memory": Scheme((Quantise(),), Quantise(), "model", up_memory=True, down_rate=0.0),
        "mcm_undamped": Scheme((Quantise(),), Quantise(), "model", up_memory=True, down_rate=1.0),
        "artemis_nd": Scheme((Quantise(),), Quantise(), "drifting", up_memory=True),
    }
)
"""The named algorithms, with ternary quantisation (scaled signs in Dist-EF-SGD)."""


def scheme_of(
    algorithm: str,
    up: Compressor | Sequence[Compressor] | None = None,
    down: Compressor | None = None,
    **changes: object,
) -> Scheme:
    """Return a named algorithm with other compressors or settings.

    A direction that the algorithm leaves uncompressed stays so.

    Raises
    ------
    ValueError
        If the algorithm is unknown, or a setting out of its range.

    Examples
    --------
    >>> scheme_of("diana", Quantise(levels=4)).up[0].levels
    4
    """
    if algorithm not in SCHEMES:
        raise ValueError(f"algorithm {algorithm!r} is not one of {', '.join(SCHEMES)}")
    scheme = SCHEMES[algorithm]
    if up is not None and not scheme.up[0].is_exact:
        changes["up"] = (up,) if isinstance(up, Compressor) else tuple(up)
    if down is not None and not scheme.down.is_exact:
        changes["down"] = down
    return replace(scheme, **changes)  # type: ignore[arg-type]


def nearest(shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return 0.5 instead of uniform draws: rounding to the nearest, the same in every run."""
    return torch.full((1, *shape), 0.5, dtype=dtype)


def for_participation(scheme: Scheme, participation: float) -> Scheme:
    """Return the scheme as it is under partial participation.

    A shared downlink memory would have to be replayed by every device that was away: each gets its
    own. Memories start at zero, since not all devices are there to begin with their gradients.

    Raises
    ------
    ValueError
        If the probability is not above 0 and at most 1.
    """
    if not 0 < participation <= 1:
        raise ValueError(f"participation is {participation}; it must be above 0 and at most 1")
    if participation == 1:
        return scheme
    groups = 0 if scheme.downlink == "model" else scheme.groups
    return replace(scheme, groups=groups, starts_at_gradient=False)


def draw_active(seeds: Sequence[int], n_devices: int, k: int, probability: float) -> BoolArray:
    """Return who takes part in round k, (R, n_devices); somebody always does."""
    active = np.ones((len(seeds), n_devices), bool)
    if probability < 1:
        draws = KeyedDraws(np.asarray(seeds), "participation", k)
        active[:] = False
        while not active.any(1).all():
            drawn = draws((n_devices,)).numpy() < probability
            active = np.where(active.any(1, keepdims=True), active, drawn)
    return active


# --- what devices do ------------------------------------------------------------------------------


def upload(
    used: Compressor,
    rate: Rate,
    gradient: Tensor,
    memory: Tensor | None,
    error: Tensor | None,
    coefficient: float,
    draws: Draws,
    blocks: Sequence[int],
) -> tuple[Packed, Tensor | None, Tensor | None]:
    """Return what devices send of their gradients (n, P), their new memories and errors.

    Parameters
    ----------
    used : Compressor
        C_up.
    rate : float or Tensor (P,)
        a_up.
    gradient : Tensor, shape (n, P)
        g_i.
    memory, error : Tensor, shape (n, P), optional
        h_i and e_i.
    coefficient : float
        c.
    """
    difference = gradient if memory is None else gradient - memory
    if error is not None:
        difference = difference + coefficient * error
    sent = pack(used, difference, draws, blocks)
    if memory is not None:
        memory = memory + rate * sent.values
    if error is not None:
        error = difference - sent.values
    return sent, memory, error


def catch_up(
    scheme: Scheme,
    rate: Rate,
    held: Tensor,
    velocity: Tensor | None,
    message: Tensor,
    step: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Apply one downlink message; return the model to work on, and what devices hold then.

    Parameters
    ----------
    held : Tensor, shape (n, P)
        The downlink memory H if models are sent, else the devices' model x.
    velocity : Tensor, shape (n, P), optional
        v, if there is momentum.
    message : Tensor, shape (n, P)
        O, decoded.
    step : float
        What the server stepped with.
    """
    if scheme.downlink == "model":
        moved = held + rate * message if scheme.moves_down_memory else held
        return held + message, moved, velocity
    if scheme.momentum:
        assert velocity is not None
        velocity = message = scheme.momentum * velocity + message
    held = held - step * message
    return held, held, velocity


# --- what the server does -------------------------------------------------------------------------


class Server:
    """The server's side, for several runs at once.

    Parameters
    ----------
    scheme : Scheme
    model : Tensor, shape (R, P)
        w_0 of each run.
    tensors : sequence of int
        Sizes of the tensors in a row.
    step : callable
        Rounds (from 1) to γ_k.
    correction : {"pp1", "pp2"}
        Under partial participation: pp1 averages ``Q_i + h_i`` over those active; pp2 keeps the
        mean of all h_i, which removes the noise of who is active.
    seeds : sequence of int, length R
    is_nearest : bool
        Round to the nearest instead of randomly.

    Attributes
    ----------
    model : Tensor, shape (R, P)
        w, never degraded by what the devices are sent, except with a ``gradient`` downlink.
    sent : Tensor, shape (R, P)
        The model that devices are sent with a plain or ghost downlink.
    memory : Tensor, shape (R, n, P), or (R, 1, P) with pp2
        h_i of every device, or their mean.
    down_memory : Tensor, shape (R, groups, P)
        H.
    """

    def __init__(
        self,
        scheme: Scheme,
        model: Tensor,
        tensors: Sequence[int],
        step: Callable[[int], float],
        *,
        correction: Correction = "pp1",
        seeds: Sequence[int] = (0,),
        is_nearest: bool = False,
    ) -> None:
        runs, width = model.shape
        self._is_nearest = is_nearest
        self.scheme, self.step, self.correction = scheme, step, correction
        self.blocks = scheme.blocks(tensors)
        scheme.check(tensors)
        self.model = self.sent = model
        self.velocity = torch.zeros_like(model) if scheme.momentum else None
        self._first = model
        self._seeds = np.asarray(seeds, np.int64)
        self._ahead: dict[int, RoundDraws] = {}  # number of groups → draws of messages to them
        self._error = torch.zeros_like(model) if scheme.down_feedback else None
        self._rates: Tensor | None = None  # (n, 1) or (n, P), where devices differ
        self._rate_down = scheme.rate_down(self.blocks, model)
        is_mean = scheme.up_memory and correction == "pp2"
        self.memory = model.new_zeros((runs, int(is_mean), width))
        self.down_memory = model.new_zeros((runs, 0, width))

    def grow(self, n_devices: int) -> None:
        """Make room for this many devices, known by number from now on."""
        scheme = self.scheme
        if scheme.up_memory and self.correction == "pp1":
            self.memory = _longer(self.memory, n_devices, 0.0)
        if len(scheme.up) > 1 and scheme.up_memory:
            rates = [scheme.rate_up(i, self.blocks, self.model) for i in range(len(scheme.up))]
            wide = [torch.as_tensor(r, dtype=self.model.dtype).view(-1) for r in rates]
            width = max(len(r) for r in wide)
            rows = torch.stack([r.expand(width) for r in wide])
            self._rates = rows[torch.arange(n_devices) % len(rows)]
        if scheme.downlink == "model":
            start: Tensor | float = self._first[:, None] if scheme.moves_down_memory else 0.0
            self.down_memory = _longer(self.down_memory, scheme.groups or n_devices, start)

    def start_memory(self, rows: Tensor, gradients: Tensor) -> None:
        """Set h_i of some devices (n,) to their first gradients (R, n, P)."""
        self.memory[:, rows] = gradients

    def estimate(
        self,
        sent: Tensor,
        rows: Tensor | slice,
        divisor: float | Tensor,
        n_devices: int,
        active: Tensor | None = None,
    ) -> Tensor:
        """Return ghat (R, P) from decoded messages, and move the memories.

        Parameters
        ----------
        sent : Tensor, shape (R, n, P)
            Q_i.
        rows : Tensor of int64, shape (n,), or slice
            Whose they are.
        divisor : float or Tensor
            p N, or the number of devices.
        n_devices : int
            N.
        active : Tensor of bool, shape (R, n, 1), optional
            Who takes part; default: all of `rows`.
        """
        scheme = self.scheme
        if not scheme.up_memory:
            return (sent if active is None else torch.where(active, sent, 0.0)).sum(1) / divisor
        choice = self._rates
        rate: Rate = scheme.rate_up(0, self.blocks, self.model) if choice is None else choice[rows]
        if self.correction == "pp2":
            masked = sent if active is None else torch.where(active, sent, 0.0)
            mean = self.memory[:, 0]
            ghat = mean + masked.sum(1) / divisor
            self.memory = (mean + (rate * masked).sum(1) / n_devices)[:, None]
            return ghat
        before = self.memory[:, rows]
        decoded, moved = sent + before, before + rate * sent
        if active is not None:
            decoded, moved = torch.where(active, decoded, 0.0), torch.where(active, moved, before)
        if isinstance(rows, slice):
            self.memory = moved
        else:
            self.memory[:, rows] = moved
        return decoded.sum(1) / divisor

    def update(self, ghat: Tensor, k: int) -> tuple[Packed, float] | None:
        """Make step k; return the message to all devices and the step to apply it with, if any."""
        scheme, step = self.scheme, self.step(k)
        if scheme.downlink == "gradient":
            packed, applied = self._compress_step(ghat, k, step)
            self._move(packed.values, applied)
            return packed, applied
        before = self.model
        self._move(ghat, step)
        self.sent = self.model
        if scheme.downlink in ("plain", "model"):
            return None
        packed = pack(scheme.down, ghat, self._draws(k), self.blocks)
        if scheme.downlink == "ghost":
            self.sent = before - step * packed.values
            return None
        return packed, step

    def _compress_step(self, ghat: Tensor, k: int, step: float) -> tuple[Packed, float]:
        scheme = self.scheme
        wanted = ghat if scheme.damping is None else step * ghat
        if self._error is not None:
            wanted = wanted + scheme.coefficient(self.step, k) * self._error
        packed = pack(scheme.down, wanted, self._draws(k), self.blocks)
        if self._error is not None:
            self._error = wanted - packed.values
        return packed, step if scheme.damping is None else scheme.damping

    def _move(self, direction: Tensor, step: float) -> None:
        if self.velocity is not None:
            self.velocity = direction = self.scheme.momentum * self.velocity + direction
        self.model = self.model - step * direction

    def send_model(self, k: int, groups: Tensor | slice = slice(None)) -> Packed:
        """Return the messages of round k for groups (g,), as rows (R g, P), and move memories."""
        memory = self.down_memory[:, groups]
        difference = (self.model[:, None] - memory).flatten(0, 1)
        packed = pack(self.scheme.down, difference, self._draws(k, groups), self.blocks)
        if self.scheme.moves_down_memory:
            moved = memory + self._rate_down * packed.values.view_as(memory)
            if isinstance(groups, slice):
                self.down_memory = moved
            else:
                self.down_memory[:, groups] = moved
        return packed

    def _draws(self, k: int, groups: Tensor | slice | None = None) -> Draws:
        """Return the draws of a message to all (None), or of those to some groups."""
        if self._is_nearest:
            return nearest
        number = np.zeros(1, np.int64) if groups is None else np.arange(self.down_memory.shape[1])
        if isinstance(groups, Tensor):
            number = number[groups.numpy()]
        seeds, device = np.repeat(self._seeds, len(number)), np.tile(number, len(self._seeds))
        place = self.model.device
        if isinstance(groups, Tensor):
            return KeyedDraws(seeds, "downlink", k, device, device=place)
        if len(number) not in self._ahead:
            self._ahead[len(number)] = RoundDraws(seeds, "downlink", device, place)
        return self._ahead[len(number)].at(k)


def _longer(rows: Tensor, n: int, fill: Tensor | float) -> Tensor:
    """Return (R, m, P) with more rows, m becoming n, at twice the room if it grows later."""
    if rows.shape[1] >= n:
        return rows
    n = n if rows.shape[1] == 0 else max(n, 2 * rows.shape[1])
    longer = rows.new_zeros((rows.shape[0], n, rows.shape[2])) + fill
    longer[:, : rows.shape[1]] = rows
    return longer
