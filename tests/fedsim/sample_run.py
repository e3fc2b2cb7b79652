"""Write the files of a run that never happened, plausible enough to look at."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedsim.recorder import (
    ComputeRow,
    LinkRow,
    NetworkWorld,
    Recorder,
    RoundRow,
    TransferRow,
    World,
    summarise,
    write_summary,
    write_world,
)

SCENARIO = """name: {name}
seed: 7
rounds: {rounds}
data:
  dataset: digits
  devices: {devices}
  partition: {{kind: dirichlet, alpha: 0.3}}
training: {{optimizer: sgd, learning_rate: 0.1, batch_size: 32, local_epochs: 1}}
topology: {{kind: star, bandwidth: 20 Mbit/s, latency: 20 ms}}
links: {{kind: on_off, mean_up: 60 s, mean_down: 20 s}}
"""


@dataclass(frozen=True)
class Sample:
    names: tuple[str, ...] = ("fedavg", "fedprox", "fedadam", "fedmedian")
    title: str = "Digits on unequal links"
    devices: int = 20
    rounds: int = 40
    target: float | None = 0.9
    diverged: tuple[str, ...] = ()
    interrupted: tuple[str, ...] = ()
    unstarted: tuple[str, ...] = ()
    transfers: bool = False
    scenario: str = SCENARIO


def write_sample(directory: Path, sample: Sample = Sample()) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    n = sample.devices
    labels = rng.multinomial(60, rng.dirichlet(np.full(10, 0.3)), size=1)
    labels = np.stack([rng.multinomial(rng.integers(20, 110), rng.dirichlet(np.full(10, 0.3)))
                       for _ in range(n)])  # fmt: skip
    speed = 500 * rng.lognormal(0, 0.5, n)
    up = rng.choice([2e6, 5e6, 10e6, 20e6], n)
    world = World(
        name=sample.title,
        seed=7,
        strategies=sample.names,
        rounds=sample.rounds,
        target=sample.target,
        dataset="digits",
        partition="dirichlet (alpha 0.3)",
        classes=10,
        test_samples=450,
        model="mlp (hidden 64)",
        parameters=4_810,
        model_bytes=19_240,
        samples=labels.sum(1),
        label_counts=labels,
        speed=speed,
        networks=[
            NetworkWorld(
                strategies=sample.names,
                topology="star",
                servers=1,
                links=2 * n,
                uplink_bps=up,
                downlink_bps=4 * up,
                latency=rng.uniform(0.005, 0.08, n),
                server_uplink_bps=np.inf,
                server_downlink_bps=1e9,
                variation="on_off (mean_up 60 s, mean_down 20 s)",
                message_loss=0.02,
            )
        ],
    )
    text = sample.scenario.format(name=sample.title, rounds=sample.rounds, devices=n)
    (directory / "scenario.yaml").write_text(text, "utf-8")
    write_world(directory / "world.json", world)
    entries = {}
    for k, name in enumerate(sample.names):
        if name in sample.unstarted:
            continue
        with Recorder(directory, name, transfers=sample.transfers) as recorder:
            _play(recorder, sample, k, world, rng)
        diverged = name in sample.diverged
        if name not in sample.interrupted:
            device = 3 if diverged else None
            entries[name] = summarise(
                recorder.rows, target=sample.target, diverged=diverged, diverged_device=device
            )
    write_summary(
        directory / "summary.json",
        name=sample.title,
        seed=7,
        versions={"fedsim": "0.1.0", "flwr": "1.41.0", "torch": "2.13.0", "python": "3.11.9"},
        strategies=entries,
    )
    return directory


def _play(recorder, sample, k, world, rng):
    n, clock, message = sample.devices, 0.0, 0
    labels = np.asarray(world.samples)
    rounds = sample.rounds
    if recorder.name in sample.diverged:
        rounds = min(rounds, 6)
    if recorder.name in sample.interrupted:
        rounds //= 3
    for t in range(1, rounds + 1):
        chosen = rng.choice(n, max(1, n // 2), replace=False)
        lost = int(rng.binomial(2 * len(chosen), 0.02))
        start = clock
        for device in chosen:
            spans = np.array([
                0.1 + 0.2 * rng.random(),
                labels[device] / np.asarray(world.speed)[device],
                0.2 + rng.exponential(1.0),
            ])  # fmt: skip
            down, ready, end = start + np.cumsum(spans)
            clock = max(clock, end)
            if sample.transfers:
                common = {"round": t, "size_bytes": world.model_bytes, "outcome": "delivered"}
                recorder.transfer(
                    TransferRow(
                        message=message, kind="down", source=n, destination=int(device),
                        released=start, started=start, first_byte=start + 0.02, finished=down,
                        route=["server-down", f"down-{device}"], **common,
                    )
                )  # fmt: skip
                recorder.compute(
                    ComputeRow(round=t, device=int(device), kind="train", started=down,
                               finished=ready)
                )  # fmt: skip
                recorder.transfer(
                    TransferRow(
                        message=message + 1, kind="up", source=int(device), destination=n,
                        released=ready, started=ready, first_byte=ready + 0.02, finished=end,
                        route=[f"up-{device}"], **common,
                    )
                )  # fmt: skip
                message += 2
        progress = 1 - np.exp(-t / (6 + 3 * (k % 5)))
        accuracy = 0.1 + (0.82 + 0.012 * (k % 4)) * progress + rng.normal(0, 0.006)
        loss = 2.3 * np.exp(-t / (8 + 2 * k)) + 0.25 + rng.normal(0, 0.01)
        if recorder.name in sample.diverged:
            loss, accuracy = (10.0**t, 0.1) if t < rounds else (np.nan, 0.1)
        recorder.round(
            RoundRow(
                round=t,
                virtual_time=clock,
                wall_time=0.11 * t,
                train_loss=loss * 0.9,
                eval_loss=loss,
                eval_accuracy=accuracy,
                accuracy_std=0.05 * np.exp(-t / 20) if k % 2 else None,
                bytes_down=len(chosen) * world.model_bytes,
                bytes_up=(len(chosen) - lost // 2) * world.model_bytes * (1 + 3 * (k % 3)) // 4,
                messages_sent=2 * len(chosen),
                messages_lost=lost,
                devices_selected=len(chosen),
                devices_replied=len(chosen) - lost,
                extra={"server_momentum": 0.9**t} if k == 2 else {},
            )
        )
    if sample.transfers:
        for device in range(n):
            for side, rates in (("up", world.networks[0].uplink_bps),
                                ("down", world.networks[0].downlink_bps)):  # fmt: skip
                steps = np.cumsum(rng.exponential([60.0, 20.0] * 6))
                steps = [0.0, *steps[steps < clock].tolist()]
                rate = float(rates[device])
                recorder.link(
                    LinkRow(
                        link=f"{side}-{device}", bandwidth_bps=rate, latency=0.02,
                        carried_bytes=world.model_bytes * rounds / 2, busy_time=clock / 9,
                        change_times=steps,
                        change_rates_bps=[rate if i % 2 == 0 else 0.0 for i in range(len(steps))],
                    )
                )  # fmt: skip
