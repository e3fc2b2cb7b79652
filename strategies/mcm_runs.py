"""Runs of MCM and its family without messages: for studies of many rounds and seeds.

`simulate` calls the functions of `bidirectional` that the Flower strategy and its device half call,
with the same draws, so that it gives the same models without a network between them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.bidirectional import (
    Correction,
    Rate,
    Scheme,
    Server,
    catch_up,
    draw_active,
    for_participation,
    nearest,
    upload,
)
from strategies.compression import Compressor
from strategies.halves import RoundDraws

__all__ = ["Run", "simulate"]

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Run:
    """What `simulate` gives.

    Parameters
    ----------
    model : Tensor, shape (R, P)
        The server's last models.
    bytes_up, bytes_down : ndarray of int64, shape (rounds, R, N)
        Messages of each device; empty unless they were asked for.
    """

    model: Tensor
    bytes_up: IntArray
    bytes_down: IntArray


def simulate(
    scheme: Scheme,
    gradients: Callable[[Tensor, int], Tensor],
    start: Tensor,
    *,
    n_devices: int,
    rounds: int,
    step: Callable[[int], float],
    seeds: Sequence[int] = (0,),
    tensors: Sequence[int] = (),
    participation: float = 1.0,
    correction: Correction = "pp1",
    active: Callable[[int], BoolArray] | None = None,
    is_nearest: bool = False,
    observe: Callable[[int, Server], bool | None] = lambda k, server: None,
    count_bytes: bool = False,
) -> Run:
    """Run a scheme without messages, several runs at once; the same numbers as a Flower strategy.

    Parameters
    ----------
    gradients : callable
        ``(x (R N, P), k) -> (R N, P)``: each device's gradient at its own model, run by run.
    start : Tensor, shape (P,)
        w_0.
    n_devices : int
        N.
    step : callable
        Rounds (from 1) to γ_k.
    seeds : sequence of int
        One for each run.
    tensors : sequence of int
        Sizes of the tensors in a row; default: one.
    participation : float
        p, the probability with which a device takes part; below 1 every device has its own
        downlink memory.
    active : callable, optional
        Round to (R, N): who takes part, instead of draws.
    is_nearest : bool
        Round to the nearest instead of randomly.
    observe : callable
        Sees the server after every round; True ends the runs.

    Returns
    -------
    Run
    """
    scheme = for_participation(scheme, participation)
    runs, width = len(seeds), len(start)
    tensors = tuple(tensors) or (width,)
    server = Server(
        scheme,
        start.expand(runs, -1).clone(),
        tensors,
        step,
        correction=correction,
        seeds=seeds,
        is_nearest=is_nearest,
    )
    server.grow(n_devices)
    return _Devices(
        scheme, server, gradients, n_devices, seeds, participation, active, is_nearest, count_bytes
    ).run(rounds, observe)


@dataclass(frozen=True, slots=True)
class _Uplink:
    """Rows that compress alike."""

    used: Compressor
    rows: slice | IntArray
    rate: Rate
    draws: RoundDraws


class _Devices:
    """All devices of all runs as rows, run by run."""

    def __init__(
        self,
        scheme: Scheme,
        server: Server,
        gradients: Callable[[Tensor, int], Tensor],
        n_devices: int,
        seeds: Sequence[int],
        participation: float,
        active: Callable[[int], BoolArray] | None,
        is_nearest: bool,
        count_bytes: bool,
    ) -> None:
        self.scheme, self.server, self.gradients = scheme, server, gradients
        self.n, self.runs = n_devices, len(seeds)
        self.shape = (self.runs, n_devices)
        self.p, self.active, self.is_nearest = participation, active, is_nearest
        self.seeds, self.counts = seeds, count_bytes
        rows = server.model.repeat_interleave(n_devices, 0)
        self.model = rows
        self.uplinks = [self._uplink(choice) for choice in range(len(scheme.up))]
        groups = scheme.groups or n_devices
        number = np.arange(self.runs)[:, None] * groups + np.arange(n_devices) % groups
        self.message_of = number  # row of the message that each device of each run is sent
        self.message_rows = torch.from_numpy(number.ravel())
        self.rate_down = scheme.rate_down(server.blocks, rows)
        keeps = scheme.downlink == "model" and not scheme.moves_down_memory
        self.held = torch.zeros_like(rows) if keeps else rows
        self.velocity = torch.zeros_like(rows) if scheme.momentum else None
        self.memory = torch.zeros_like(rows) if scheme.up_memory else None
        self.error = torch.zeros_like(rows) if scheme.up_feedback else None
        self.owed = np.zeros(self.shape, np.int64)  # bytes that a device has missed
        self.is_known = np.zeros(self.shape, bool)  # whether a device was ever sent a model

    def _uplink(self, choice: int) -> "_Uplink":
        """Return the devices that use the compressor number `choice`, and how."""
        n_choices = len(self.scheme.up)
        seed = np.repeat(np.asarray(self.seeds, np.int64), self.n)
        device = np.tile(np.arange(self.n), self.runs)
        is_all = n_choices == 1
        rows = slice(None) if is_all else np.flatnonzero(device % n_choices == choice)
        rate = self.scheme.rate_up(choice, self.server.blocks, self.model)
        draws = RoundDraws(seed[rows], "mcm", device[rows], self.model.device)
        return _Uplink(self.scheme.up[choice], rows, rate, draws)

    def run(self, rounds: int, observe: Callable[[int, Server], bool | None]) -> Run:
        """Run all rounds."""
        bytes_up, bytes_down = [], []
        for k in range(1, rounds + 1):
            if self.active is not None:
                active = np.broadcast_to(self.active(k), self.shape).copy()
            else:
                active = draw_active(self.seeds, self.n, k, self.p)
            down = self.receive(k, active)
            up = self.work(k, active)
            if self.counts:
                bytes_down.append(down * active)
                bytes_up.append(up * active)
            if observe(k, self.server):
                break
        empty = np.zeros((0, *self.shape), np.int64)
        return Run(
            self.server.model,
            np.stack(bytes_up) if bytes_up else empty,
            np.stack(bytes_down) if bytes_down else empty,
        )

    def receive(self, k: int, active: BoolArray) -> IntArray:
        """Bring the messages of round k to the devices; return their bytes."""
        scheme, server = self.scheme, self.server
        dense = _dense_bytes(self.model)
        if scheme.downlink in ("plain", "ghost"):
            self.model = server.sent.repeat_interleave(self.n, 0)
            return np.full(self.shape, dense, np.int64)
        if scheme.downlink == "model":
            if k > 1:
                self._receive_models(k, active)
            charged = np.where(self.is_known, 0, dense) + self.owed
        else:
            full = dense * (2 if scheme.momentum and k > 1 else 1)
            is_full = ~self.is_known | (self.owed >= dense)
            charged = np.where(is_full, full, self.owed)
        self.owed[active] = 0
        self.is_known |= active
        return np.asarray(charged, np.int64)

    def _receive_models(self, k: int, active: BoolArray) -> None:
        scheme, server = self.scheme, self.server
        held = server.down_memory
        packed = server.send_model(k)
        messages = packed.values
        if scheme.groups:
            messages = messages[self.message_rows]
        model, moved, _ = catch_up(scheme, self.rate_down, self.held, None, messages, 0.0)
        if active.all():
            self.model, self.held = model, moved
        else:  # the memory of a device that is away stays as it is, on both sides
            mask = torch.from_numpy(active)[..., None]
            rows = mask.view(-1, 1)
            self.model = torch.where(rows, model, self.model)
            self.held = torch.where(rows, moved, self.held)
            server.down_memory = torch.where(mask, server.down_memory, held)
        if self.counts:
            self.owed = packed.sizes[self.message_of]

    def work(self, k: int, active: BoolArray) -> IntArray:
        """Compute, send and step; return the bytes that devices sent."""
        scheme, server = self.scheme, self.server
        gradient = self.gradients(self.model, k)
        dense = _dense_bytes(gradient)
        if k == 1 and scheme.begins_with_gradient:
            self.memory = gradient
            values = torch.zeros_like(gradient)
            server.start_memory(torch.arange(self.n), gradient.view(*self.shape, -1))
            sizes = np.full(self.shape, dense)
        else:
            values, sizes = self._upload(k, gradient, active)
        mask = None if active.all() else torch.from_numpy(active)[..., None]
        ghat = server.estimate(
            values.view(*self.shape, -1), slice(None), self.p * self.n, self.n, mask
        )
        message = server.update(ghat, k)
        if message is not None:
            packed, applied = message
            rows = packed.values.repeat_interleave(self.n, 0)
            self.model, self.held, self.velocity = catch_up(
                scheme, 0.0, self.held, self.velocity, rows, applied
            )
            if self.counts:
                self.owed = self.owed + packed.sizes[:, None]
        return sizes

    def _upload(self, k: int, gradient: Tensor, active: BoolArray) -> tuple[Tensor, IntArray]:
        scheme = self.scheme
        values: Tensor | None = None
        sizes = np.zeros(len(gradient), np.int64)
        memory, error = self.memory, self.error
        coefficient = scheme.coefficient(self.server.step, k) if scheme.up_feedback else 0.0
        for link in self.uplinks:
            rows = link.rows
            sent, moved, left = upload(
                link.used,
                link.rate,
                gradient[rows],
                None if memory is None else memory[rows],
                None if error is None else error[rows],
                coefficient,
                nearest if self.is_nearest else link.draws.at(k),
                self.server.blocks,
            )
            values = _put(gradient if values is None else values, rows, sent.values)
            if self.counts:
                sizes[rows] = sent.sizes
            self.memory = _put(self.memory, rows, moved)
            self.error = _put(self.error, rows, left)
        if not active.all():
            mask = torch.from_numpy(active.reshape(-1, 1))
            if memory is not None and self.memory is not None:
                self.memory = torch.where(mask, self.memory, memory)
            if error is not None and self.error is not None:
                self.error = torch.where(mask, self.error, error)
        assert values is not None
        return values, sizes.reshape(self.shape)


def _put(whole: Tensor | None, rows: slice | IntArray, part: Tensor | None) -> Tensor | None:
    """Return `whole` with some rows replaced, without writing into it."""
    if part is None or whole is None or isinstance(rows, slice):
        return part
    whole = whole.clone()
    whole[rows] = part
    return whole


def _dense_bytes(rows: Tensor) -> int:
    return int(rows.shape[1]) * rows.itemsize
