"""HyperPrism: gossip in the dual space of a mirror map, whose degree may be learned.

Decision: devices send their raw models and the receiver raises all of them to its own degree. Then
equal models stay equal whatever the degrees, and a payload weighs what a linear one does.

Decision: a step is taken either before mixing (primal, the default) or in the dual space, never in
both, as a literal reading of the published algorithm would.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from strategies.arrivals import Arrivals, row_weights
from strategies.degrees import (
    Adaptation,
    Parameters,
    direct_degrees,
    hypernetwork_degrees,
    learn,
    new_direct,
    new_hypernetworks,
)
from strategies.mirror import (
    NEGATIVE_ENTROPY,
    MirrorMap,
    check_degree,
    mirror_mean,
    weighted_power_mean,
    weighted_power_mean_and_slope,
)
from strategies.peers import PeerStrategy, State

__all__ = ["HyperPrism", "part_columns"]

Degrees = (
    float | Literal["adaptive", "learned"] | dict[str, float] | list[float] | list[list[float]]
)


class HyperPrism(PeerStrategy):
    """Gossip by weighted power means of the neighbours' models.

    With Metropolis weights a_ij, S_p(x) = sign(x) |x|^p and local work X → Y, primal:
    x_i⁺ = S_p⁻¹(Σ_j a_ij S_p(y_j)), and dual: x_i⁺ = S_p⁻¹(Σ_j a_ij S_p(x_j) - (x_i - y_i)). The
    degree p = 1 is D-PSGD, adapt-then-combine and combine-then-adapt. What did not arrive counts
    for the receiver's own model. One model on each link and way a round.

    Parameters
    ----------
    degree : float, str, mapping or list
        One for all; ``adaptive``: a hypernetwork a device chooses one for each part; ``learned``:
        the same without a hypernetwork; a mapping from parts to degrees; a list of one degree a
        device, or of one list (over parts) a device. Default: adaptive, for the power map.
    last_degree, decay_rounds : float, int
        Degrees that are given go linearly to `last_degree` over that many rounds; 0: they stay.
    parts : mapping of str to list of str, or "layers", optional
        Name of a part → patterns (``*``, ``?``) of its parameters' names; a parameter belongs to
        the first part that fits. ``layers``: each layer is a part. Default: one part, ``all``.
    gradient_space : {"primal", "dual"}
        In the dual space the learning rate that is useful depends on the degree and on the size of
        the weights.
    mirror : {"power", "negative_entropy"}
        The latter is for positive parameters: weighted geometric means.
    forward, inverse : callable, optional
        φ' and its inverse, of a mirror map of one's own; Tensor → Tensor, element by element.
    signed : bool
        False: plain powers, as published, which must be odd integers.
    adaptation : Adaptation
        How degrees are learned.
    **kwargs
        See `strategies.peers.PeerStrategy`.

    Raises
    ------
    ValueError
        If a degree is not positive (or not odd, without signed powers), a pattern fits no
        parameter, or a parameter no pattern.

    References
    ----------
    .. [1] Du, Chen, Yang, Li, Kong, "HyperPrism: an adaptive non-linear aggregation framework for
       distributed machine learning over non-IID data and time-varying communication links",
       NeurIPS 2024, Algorithm 1 (primal) and Eq. (6) (dual).
    """

    def __init__(
        self,
        *,
        degree: Degrees | None = None,
        last_degree: float = 1.0,
        decay_rounds: int = 0,
        parts: dict[str, list[str]] | Literal["layers"] | None = None,
        gradient_space: Literal["primal", "dual"] = "primal",
        mirror: Literal["power", "negative_entropy"] = "power",
        forward: Callable[[Tensor], Tensor] | None = None,
        inverse: Callable[[Tensor], Tensor] | None = None,
        signed: bool = True,
        adaptation: Adaptation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if gradient_space not in ("primal", "dual"):
            raise ValueError(f"gradient_space = {gradient_space!r}: primal or dual")
        self.mirror = _mirror_of(mirror, forward, inverse)
        if self.mirror is not None and degree is not None:
            raise ValueError(f"degree = {degree!r}: only the power map has a degree")
        self.degree: Degrees = "adaptive" if degree is None else degree
        _check_degrees(self.degree, signed=signed)
        check_degree(last_degree, signed=signed)
        if decay_rounds < 0:
            raise ValueError(f"decay_rounds = {decay_rounds}: must be at least 0")
        if not signed and (decay_rounds or isinstance(self.degree, str)):
            raise ValueError(f"signed = {signed}: degrees that change need signed powers")
        self.last_degree = last_degree
        self.decay_rounds = decay_rounds
        self.parts = parts
        self.gradient_space = gradient_space
        self.adaptation = adaptation or Adaptation()
        self.when = "after" if gradient_space == "primal" else "with"

    @property
    def is_adaptive(self) -> bool:
        """Whether degrees are learned."""
        return self.mirror is None and isinstance(self.degree, str)

    def check_models(self, names: Sequence[str], n_devices: int) -> None:
        """Refuse parts that are none of the model's, and degrees that are too few or too many."""
        parts = part_columns({name: slice(0) for name in names}, self.parts)
        if isinstance(self.degree, dict) and self.degree.keys() != parts.keys():
            raise ValueError(
                f"degree names the parts {', '.join(self.degree)}; the parts are {', '.join(parts)}"
            )
        if isinstance(self.degree, list):
            shape = np.shape(self.degree)
            if shape not in ((n_devices,), (n_devices, 1), (n_devices, len(parts))):
                raise ValueError(
                    f"degree: a list of {len(self.degree)} for {n_devices} devices and "
                    f"{len(parts)} part(s)"
                )

    def initial(self, models: Tensor, nodes: Sequence[int]) -> State:
        """Remember the models; and what chooses degrees, and the slopes of the last mixing."""
        self.check_models(list(self.columns), len(models))
        self._columns = part_columns(self.columns, self.parts)
        if not self.is_adaptive:
            return {"models": models}
        new = new_hypernetworks if self.degree == "adaptive" else new_direct
        chooser = new(nodes, len(self._columns), self.adaptation)
        return {"models": models, "slopes": torch.zeros_like(models)} | chooser

    def metrics(self, state: State) -> dict[str, float]:
        """Return the mean degree of each part, as used in this round."""
        if self.mirror is not None:
            return {}
        means = dict(zip(self._columns, self._used.mean(0).tolist(), strict=True))
        return {f"degree_{part}" if len(means) > 1 else "degree": p for part, p in means.items()}

    def step(self, state: State, work: Tensor, arrivals: Arrivals) -> State:
        """Mix the models of the neighbours in the dual space."""
        weights = row_weights(arrivals)
        moved = state["models"] - work
        values, shift = (
            (work, None) if self.gradient_space == "primal" else (state["models"], moved)
        )
        if self.mirror is not None:
            return {"models": mirror_mean(values, weights, self.mirror, shift)}
        chooser = self._learn(state, moved)
        self._used = self._degrees(chooser, len(work))
        new = {"models": torch.empty_like(work), **chooser}
        if self.is_adaptive:
            new["slopes"] = torch.empty_like(work)
        for number, columns in enumerate(self._columns.values()):
            degree = _one_if_equal(self._used[:, number])
            for at in columns:
                part = values[:, at], weights, degree, None if shift is None else shift[:, at]
                if self.is_adaptive:
                    new["models"][:, at], new["slopes"][:, at] = weighted_power_mean_and_slope(
                        *part, clip=self.adaptation.clip
                    )
                else:
                    new["models"][:, at] = weighted_power_mean(*part)
        return new

    def _learn(self, state: State, moved: Tensor) -> Parameters:
        """Return the degrees' parameters, one step on.

        The gradient that local work has just taken at the last mixture times the mixture's slope by
        the degree is the slope of the loss: no gradient is evaluated for it.
        """
        if not self.is_adaptive:
            return {}
        chooser = {k: v for k, v in state.items() if k not in ("models", "slopes")}
        products = moved / self.rate * state["slopes"] if self.rate else torch.zeros_like(moved)
        slopes = torch.stack(
            [_sum_over(products, columns) for columns in self._columns.values()], dim=1
        )
        rate = self.adaptation.learning_rate
        return learn(
            chooser,
            slopes.to(torch.float32),
            len(self._columns),
            self.adaptation,
            self.rate if rate is None else rate,
        )

    def _degrees(self, chooser: Parameters, n_devices: int) -> Tensor:
        """Return the degrees of this round, ``(n_devices, n_parts)``."""
        n_parts = len(self._columns)
        if self.degree == "adaptive":
            return hypernetwork_degrees(chooser, n_parts, self.adaptation).double()
        if self.degree == "learned":
            return direct_degrees(chooser, n_parts, self.adaptation).double()
        if isinstance(self.degree, dict):
            given = np.array([self.degree[part] for part in self._columns])
        else:
            given = np.array(self.degree, np.float64)
            given = given[:, None] if given.ndim == 1 else given
        left = max(0.0, 1 - (self.round - 1) / self.decay_rounds) if self.decay_rounds else 1.0
        now = self.last_degree + (given - self.last_degree) * left
        return torch.from_numpy(np.broadcast_to(now, (n_devices, n_parts)).copy())


def part_columns(
    columns: dict[str, slice], parts: dict[str, list[str]] | Literal["layers"] | None
) -> dict[str, list[slice]]:
    """Return the columns of a row that belong to each part.

    Parameters
    ----------
    columns : dict
        Name of a parameter → its columns.
    parts : dict, "layers" or None
        See `HyperPrism`.

    Raises
    ------
    ValueError
        If a pattern fits no parameter, or a parameter no pattern.
    """
    if parts == "layers":
        layers: dict[str, list[slice]] = {}
        for name, at in columns.items():
            layers.setdefault(name.rpartition(".")[0] or name, []).append(at)
        return layers
    if isinstance(parts, str):
        raise ValueError(f"parts = {parts!r}: 'layers', or names with patterns")
    parts = parts or {"all": ["*"]}
    for part, patterns in parts.items():
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in columns):
                valid = ", ".join(columns)
                raise ValueError(f"parts.{part}: {pattern!r} fits no parameter; there are {valid}")
    found: dict[str, list[slice]] = {part: [] for part in parts}
    for name, at in columns.items():
        fitting = [p for p in parts if any(fnmatchcase(name, x) for x in parts[p])]
        if not fitting:
            raise ValueError(f"parts: no pattern fits the parameter {name!r}; add '*' to a part")
        found[fitting[0]].append(at)
    return found


def _sum_over(rows: Tensor, columns: Sequence[slice]) -> Tensor:
    """Return the sum of some columns of each row."""
    return sum((rows[:, at].sum(1) for at in columns), rows.new_zeros(len(rows)))


def _one_if_equal(degrees: Tensor) -> float | Tensor:
    """Return one number where all degrees are the same: integers are then cheap to raise to."""
    first = float(degrees[0])
    return first if bool((degrees == first).all()) else degrees


def _mirror_of(
    name: str,
    forward: Callable[[Tensor], Tensor] | None,
    inverse: Callable[[Tensor], Tensor] | None,
) -> MirrorMap | None:
    """Return the mirror map, None for the power map."""
    if (forward is None) != (inverse is None):
        raise ValueError("forward and inverse: give both or neither")
    if forward is not None and inverse is not None:
        return MirrorMap(forward, inverse)
    if name not in ("power", "negative_entropy"):
        raise ValueError(f"mirror = {name!r}: power or negative_entropy")
    return NEGATIVE_ENTROPY if name == "negative_entropy" else None


def _check_degrees(degree: Degrees, *, signed: bool) -> None:
    if isinstance(degree, str):
        if degree not in ("adaptive", "learned"):
            raise ValueError(f"degree = {degree!r}: a number, adaptive or learned")
        return
    given = list(degree.values()) if isinstance(degree, dict) else degree
    if isinstance(given, list) and len({np.shape(each) for each in given}) > 1:
        raise ValueError(f"degree = {given!r}: each device needs as many as the others")
    for value in np.ravel(np.array(given, np.float64)).tolist():
        check_degree(value, signed=signed)
