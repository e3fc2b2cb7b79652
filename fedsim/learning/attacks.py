"""Devices that do harm: what they do to their data or to what they reply.

Decision: an attack is on the result of local work, before anything encodes it. Every executor, and
every strategy whatever it compresses, therefore meets the same attackers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.federated import DeviceData, FederatedData
from fedsim.errors import ScenarioError
from fedsim.streams import bits, stream

__all__ = ["Attack", "Attacks", "choose_attackers", "flip_labels"]

IntArray = NDArray[np.int64]
Kind = Literal["label_flip", "sign_flip", "noise", "nan", "free_rider"]


@dataclass(frozen=True, slots=True)
class Attack:
    """What one class of attackers does.

    Parameters
    ----------
    kind : str
        ``label_flip``: trains on data in which class c is called C - 1 - c. ``sign_flip``: sends
        x - scale (y - x) instead of what it learnt, y, from x; of a gradient g, -scale g.
        ``noise``: adds normal noise of standard deviation `scale` to each number. ``nan``: sends
        NaN. ``free_rider``: sends back the model that came, without any work (a gradient of 0).
    scale : float
    """

    kind: Kind
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Attacks:
    """Who attacks, and how.

    Parameters
    ----------
    by_device : mapping of int to Attack
    seed : int
        Of the noise.
    """

    by_device: Mapping[int, Attack]
    seed: int = 0

    @property
    def idle(self) -> frozenset[int]:
        """The devices that do no work."""
        return frozenset(d for d, attack in self.by_device.items() if attack.kind == "free_rider")

    def apply(
        self,
        base: Tensor,
        work: Tensor,
        devices: Sequence[int] | IntArray,
        rounds: Sequence[int] | IntArray,
        *,
        is_gradient: bool = False,
    ) -> None:
        """Replace the work of attackers by what they send, in place.

        Parameters
        ----------
        base, work : Tensor, shape (k, P)
            The models that came, and what was learnt from them or their gradients.
        devices, rounds : sequence of int, length k
        is_gradient : bool
            Whether `work` is gradients.
        """
        for row, (device, number) in enumerate(zip(devices, rounds, strict=True)):
            attack = self.by_device.get(int(device))
            if attack is None:
                continue
            if attack.kind == "nan":
                work[row] = torch.nan
            elif attack.kind == "free_rider":
                work[row] = 0.0 if is_gradient else base[row]
            elif attack.kind == "sign_flip":
                origin = torch.zeros_like(work[row]) if is_gradient else base[row]
                work[row] = origin - attack.scale * (work[row] - origin)
            elif attack.kind == "noise":
                key = int(bits(self.seed, "attack-noise", int(device), int(number)))
                drawn = np.random.default_rng(key).standard_normal(work.shape[1])
                work[row] += attack.scale * torch.from_numpy(drawn).to(work)


def choose_attackers(
    entries: Sequence[tuple[Attack, float | None, Sequence[int] | None]], n_devices: int, seed: int
) -> Attacks | None:
    """Return who attacks: of each entry the devices named, or a share of them drawn by the seed.

    A share is of all devices, rounded, at least one; devices that attack already are not drawn.

    Raises
    ------
    ScenarioError
        If a device is named twice or does not exist, or no device is left to be drawn.
    """
    chosen: dict[int, Attack] = {}
    for i, (attack, _, named) in enumerate(entries):
        for device in named or ():
            if not 0 <= device < n_devices:
                raise ScenarioError(
                    f"attacks.{i}.devices: there is no device {device}; they are 0 to "
                    f"{n_devices - 1} (data.devices is {n_devices})"
                )
            if device in chosen:
                raise ScenarioError(f"attacks.{i}.devices: device {device} attacks already")
            chosen[device] = attack
    order = stream(seed, "attackers").permutation(n_devices).tolist()
    for i, (attack, share, _) in enumerate(entries):
        if share is None:
            continue
        free = [device for device in order if device not in chosen]
        wanted = max(1, round(share * n_devices))
        if wanted > len(free):
            raise ScenarioError(
                f"attacks.{i}.share: {share:g} of {n_devices} devices are {wanted}, but only "
                f"{len(free)} are no attackers yet"
            )
        chosen.update(dict.fromkeys(free[:wanted], attack))
    return Attacks(dict(sorted(chosen.items())), seed) if chosen else None


def flip_labels(data: DeviceData, attacks: Attacks) -> DeviceData:
    """Return the data as label flippers train on them: class c is called C - 1 - c.

    Raises
    ------
    ScenarioError
        If the data have no classes, or are made when they are sampled.
    """
    flippers = [d for d, attack in attacks.by_device.items() if attack.kind == "label_flip"]
    if not flippers:
        return data
    if not isinstance(data, FederatedData) or data.n_classes < 2 or data.y.dim() != 1:
        raise ScenarioError(
            f"attacks: label_flip needs data in memory with one class a sample; {data.name} has not"
        )
    y: Any = data.y.clone()
    for device in flippers:
        mine = slice(int(data.start[device]), int(data.start[device] + data.size[device]))
        y[mine] = data.n_classes - 1 - y[mine]
    return replace(data, y=y)
