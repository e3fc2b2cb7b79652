"""Speed of local training, one JSON line for each measurement, every ratio taken inside one run.

    python benchmarks/learning.py [NAME ...] [--repeats 3] [--threads 1]

Figures are processor time with one thread, best of the repeats. `loop` is the trainer's own loop
engine, `plain` the loop that anybody would write: one module, one torch.optim.SGD, device after
device. Images come from Fashion-MNIST below FEDSIM_DATA, else they are random.
"""

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedsim.data.datasets import Dataset
from fedsim.data.federated import federate
from fedsim.data.images import load_fashion_mnist
from fedsim.data.synthetic import load_synthetic
from fedsim.errors import ScenarioError
from fedsim.learning.batches import make_batches
from fedsim.learning.config import LocalConfig
from fedsim.learning.models import build_model, cnn, lenet5, mlp, softmax
from fedsim.learning.shares import RunningMean
from fedsim.learning.trainer import Trainer
from fedsim.streams import stream

MODELS = {
    "softmax 64-10": (softmax, {}, (64,)),
    "mlp 64-128-10": (mlp, {"hidden": (128,)}, (64,)),
    "mlp 784-200-10": (mlp, {"hidden": (200,)}, (784,)),
    "lenet5": (lenet5, {}, (1, 28, 28)),
    "cnn": (cnn, {}, (1, 28, 28)),
}


def show(name, **values):
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps({"benchmark": name, **rounded}), flush=True)


def machine():
    show("machine", torch=torch.__version__, processor=platform.machine(), cores=os.cpu_count())


def images(n):
    try:
        data = load_fashion_mnist()
        x, y = data.x_train[:n, 0], data.y_train[:n]
    except ScenarioError:
        rng = stream(0, "pixels")
        x, y = rng.integers(256, size=(n, 28, 28), dtype=np.uint8), rng.integers(10, size=n)
    return ((x / 255 - 0.2860) / 0.3530).astype(np.float32), y


def uneven_data(shape, n_devices, *, even=False):
    """Log-normal sizes (4 to about 480, mean 54), skewed labels; `even`: all like the longest."""
    rng = stream(0, "sizes")
    drawn = rng.lognormal(0, 0.8, n_devices)
    size = np.maximum(4, (drawn / drawn.mean() * 54).astype(int))
    if even:
        size[:] = size.max()
    x, y = images(60_000)
    if shape == (64,):
        pooled = nn.functional.avg_pool2d(torch.from_numpy(x)[:, None], 4, padding=2)
        x = pooled.numpy()[:, :, :8, :8]
    x = x.reshape(len(x), *shape)
    by_label = np.argsort(y, kind="stable")
    start = rng.integers(len(y), size=n_devices)
    parts = [
        by_label[(s + rng.integers(9000, size=n)) % len(y)]
        for s, n in zip(start, size, strict=False)
    ]
    return federate(Dataset("images", x, y, x[:1000], y[:1000], 10), parts)


def trainer_of(model, data, **arguments):
    factory, more, shape = MODELS[model]
    return Trainer(build_model(factory, shape, 10, seed=1, **more), data, seed=1, **arguments)


def cpu_time(function, repeats):
    best, result = float("inf"), None
    for _ in range(repeats):
        begin = time.process_time()
        result = function()
        best = min(best, time.process_time() - begin)
    return best, result


def train_all(trainer, config):
    k = trainer.data.n_devices
    base, one = trainer.initial()[None], np.ones(k, int)
    return trainer.train(base, 0 * one, np.arange(k), one, config)


def plain_loop(trainer, config):
    """Train as anybody would, in the trainer's order of samples."""
    data, module = trainer.data, copy.deepcopy(trainer.stack.module).train()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    for device in range(data.n_devices):
        module.load_state_dict(start)
        optimizer = torch.optim.SGD(module.parameters(), lr=config.learning_rate)
        n = int(data.size[device])
        rows = data.start[device] + torch.randperm(n)
        for a in range(0, n, config.batch_size):
            chosen = rows[a : a + config.batch_size]
            loss = nn.functional.cross_entropy(module(data.x[chosen]), data.y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def speed(repeats):
    """Bars 3 to 5: our choice of engine, the mapped one, and both loops."""
    cases = [
        ("softmax 64-10", 100, 10),
        ("softmax 64-10", 1000, 10),
        ("softmax 64-10", 1000, 32),
        ("mlp 64-128-10", 100, 10),
        ("mlp 784-200-10", 100, 10),
        ("mlp 784-200-10", 1000, 10),
        ("lenet5", 100, 10),
        ("lenet5", 300, 10),
        ("cnn", 100, 10),
    ]
    for model, n_devices, batch in cases:
        data = uneven_data(MODELS[model][2], n_devices)
        config = LocalConfig(batch_size=batch, learning_rate=0.05)
        loop_trainer = trainer_of(model, data, engine="loop")
        few = min(repeats, 2)
        loop, reference = cpu_time(lambda t=loop_trainer, c=config: train_all(t, c), few)
        plain, _ = cpu_time(lambda t=loop_trainer, c=config: plain_loop(t, c), few)
        for engine in ("auto", "vmap"):
            trainer = trainer_of(model, data, engine=engine)
            train_all(trainer, config)
            ours, result = cpu_time(lambda t=trainer, c=config: train_all(t, c), repeats)
            steps = int(result.steps.sum())
            difference = (result.params - reference.params).abs().amax(1)
            show(
                "speed",
                model=model,
                devices=n_devices,
                batch=batch,
                engine=engine,
                ms=ours * 1e3,
                loop_ms=loop * 1e3,
                plain_ms=plain * 1e3,
                times_loop=loop / ours,
                times_plain=plain / ours,
                device_steps=steps,
                device_steps_per_s=steps / ours,
                share_within_1e5=float((difference <= 1e-5).double().mean()),
                largest_difference=difference.max().item(),
            )


def gradients(repeats):
    """Bar 3, second part: one stochastic gradient a device."""
    data = uneven_data((64,), 1000)
    config = LocalConfig(batch_size=10, mode="gradient")
    loop_trainer = trainer_of("softmax 64-10", data, engine="loop")
    loop, _ = cpu_time(lambda: train_all(loop_trainer, config), 1)
    for engine in ("auto", "vmap"):
        trainer = trainer_of("softmax 64-10", data, engine=engine)
        ours, _ = cpu_time(lambda t=trainer, c=config: train_all(t, c), repeats)
        show("gradients", devices=1000, engine=engine, ms=ours * 1e3, times_loop=loop / ours)


def chunks(repeats):
    """Bar 4, second part: the default chunk against others."""
    for model, sizes in (
        ("mlp 784-200-10", (2, 5, 10, 25, 100, 1000)),
        ("softmax 64-10", (50, 250, 1000)),
        ("lenet5", (10, 25, 100)),
    ):
        data = uneven_data(MODELS[model][2], 100 if model == "lenet5" else 1000)
        config = LocalConfig(batch_size=10, learning_rate=0.05)
        for engine in ("auto", "vmap"):
            trainers = {
                str(c): trainer_of(model, data, engine=engine, chunk=c) for c in (None, *sizes)
            }
            train_all(trainers["None"], config)
            times = dict.fromkeys(trainers, float("inf"))
            for _ in range(repeats):  # in turn: whatever else the machine does meets all alike
                for chunk, trainer in trainers.items():
                    took, _ = cpu_time(lambda t=trainer, c=config: train_all(t, c), 1)
                    times[chunk] = min(times[chunk], took)
            best = min(times.values())
            ms = {k: round(v * 1e3, 1) for k, v in times.items()}
            ratio = times["None"] / best
            show("chunks", model=model, engine=engine, ms=ms, default_over_best=ratio)


def uneven(repeats):
    """Bar 6: the same devices against all of them as long as the longest."""
    config = LocalConfig(batch_size=10)
    times = {}
    for even in (False, True):
        trainer = trainer_of("softmax 64-10", uneven_data((64,), 1000, even=even))
        times[even], result = cpu_time(lambda t=trainer, c=config: train_all(t, c), repeats)
        show("uneven", padded=even, ms=times[even] * 1e3, device_steps=int(result.steps.sum()))
    show("uneven", time_over_padded=times[False] / times[True])


def schedule(repeats):
    """Cost of the order of samples alone."""
    data = uneven_data((64,), 1000)
    order = np.argsort(-data.size)
    size, one = data.size[order], np.ones(1000, int)
    ours, _ = cpu_time(
        lambda: make_batches(
            1, one, order, data.start[order], size, np.minimum(size, 10), -(-size // 10)
        ),
        repeats,
    )
    show("schedule", devices=1000, samples=int(size.sum()), ms=ours * 1e3)


def doubling(repeats):
    """Cost a device as devices double."""
    for n_devices in (100, 200, 400, 800, 1600):
        trainer = trainer_of("softmax 64-10", uneven_data((64,), n_devices))
        ours, result = cpu_time(lambda t=trainer: train_all(t, LocalConfig(batch_size=10)), repeats)
        show(
            "doubling",
            devices=n_devices,
            us_a_device=ours / n_devices * 1e6,
            us_a_device_step=ours / int(result.steps.sum()) * 1e6,
        )


def peak_mb():
    """Resident peak since the last reset (Linux); a child's ru_maxrss begins at its parent's."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 1024


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def memory_of(kind):
    """Print the growth of the peak in MB; runs in a process of its own."""
    if kind == "mlp mean":
        trainer = trainer_of("mlp 784-200-10", uneven_data((784,), 1000))
        n_devices, devices = 1000, np.arange(1000)
    elif kind == "10,000 devices":
        trainer = trainer_of("softmax 64-10", uneven_data((64,), 10_000))
        n_devices, devices = 10_000, np.arange(10_000)
    else:
        data = load_synthetic(
            n_devices=1_000_000, log_mean=3.5, log_sigma=0.8, min_samples=10, n_features=64
        )
        trainer = trainer_of("softmax 64-10", data)
        n_devices, devices = 1_000_000, stream(1, "sample").choice(1_000_000, 1000, replace=False)
    k, warm = len(devices), devices[:2]
    base, config = trainer.initial()[None], LocalConfig(batch_size=10)
    trainer.train(base, 0 * warm, warm, 1 + 0 * warm, config)
    mean, one = RunningMean(np.ones(k)), np.ones(k, int)
    reset_peak()
    before, begin = peak_mb(), time.process_time()
    trainer.train(base, 0 * one, devices, one, config, collect=mean)
    show(
        "memory",
        case=kind,
        registered=n_devices,
        devices=k,
        seconds=time.process_time() - begin,
        growth_mb=peak_mb() - before,
        peak_mb=peak_mb(),
    )


def memory(_repeats):
    """Bar 8, a round of 10,000 devices, and a million registered ones."""
    for kind in ("mlp mean", "10,000 devices", "a million registered"):
        subprocess.run([sys.executable, __file__, "--memory-of", kind], check=True)


BENCHMARKS = (speed, gradients, chunks, uneven, schedule, doubling, memory)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    names = [function.__name__ for function in BENCHMARKS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        memory_of(arguments.memory_of)
        return
    machine()
    for function in BENCHMARKS:
        if not arguments.names or function.__name__ in arguments.names:
            function(arguments.repeats)


if __name__ == "__main__":
    main()
