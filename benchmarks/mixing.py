"""Cost of a round's aggregation: power means against linear mixing, one core.

python benchmarks/mixing.py [--devices 100] [--parameters 1000000] [--degree 10]
"""

import argparse
import json
import resource
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from strategies.arrivals import mix
from strategies.degrees import Adaptation, hypernetwork_degrees, learn, new_hypernetworks
from strategies.mirror import (
    _power_means,
    weighted_power_mean,
    weighted_power_mean_and_slope,
)
from topologies import metropolis, random_regular


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=100)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--degree", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    n = arguments.devices
    generator = torch.Generator().manual_seed(0)
    models = torch.randn(n, arguments.parameters, generator=generator) * 0.05
    weights = metropolis(random_regular(n, arguments.degree, seed=0))
    degrees = torch.linspace(1, 15, n)
    cases: dict[str, Callable[[], object]] = {
        "linear (W @ X)": lambda: mix(weights, models),
        **{f"power mean, degree {p:g}": _power(models, weights, p) for p in (3.0, 5.0, 9.0, 7.3)},
        "power mean, degree 9, receiver by receiver": lambda: _power_means(
            models, weights, 9.0, None, with_slope=False
        ),
        "power mean, a degree for each device": _power(models, weights, degrees),
        "the same with slopes (adaptive)": lambda: weighted_power_mean_and_slope(
            models, weights, degrees
        ),
        "hypernetworks, one step of all devices": _hypernetworks(n),
    }
    linear = 0.0
    for name, work in cases.items():
        seconds = min(_timed(work) for _ in range(arguments.repeats))
        linear = linear or seconds
        _print(case=name, seconds=round(seconds, 3), ratio=round(seconds / linear, 2))
    _print(
        case="memory",
        devices=n,
        parameters=arguments.parameters,
        degree=arguments.degree,
        models_gb=round(models.numel() * 4 / 1e9, 2),
        peak_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    )


def _print(**line: object) -> None:
    print(json.dumps(line), flush=True)


def _power(models: Tensor, weights: np.ndarray, degree: float | Tensor) -> Callable[[], object]:
    return lambda: weighted_power_mean(models, weights, degree)


def _hypernetworks(n: int) -> Callable[[], object]:
    how = Adaptation()
    parameters = new_hypernetworks(range(n), 2, how)
    slopes = torch.ones(n, 2)

    def work() -> Tensor:
        return hypernetwork_degrees(learn(parameters, slopes, 2, how, 0.1), 2, how)

    return work


def _timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
