"""Iterations of compressed SGD without messages: seconds for 10,000, one JSON line a case.

    python -m benchmarks.mcm_speed > benchmarks/results/mcm_speed.jsonl

The published least squares: 20 devices, 20 numbers, batches of one sample (or all), five seeds at
once. `cpu_seconds` is what the process used, `seconds` the time that passed on a shared machine.
"""

import json
import time

import torch

from benchmarks.mcm import problem_named
from strategies.bidirectional import SCHEMES
from strategies.mcm_runs import simulate

ROUNDS, SEEDS = 10_000, range(5)


def main() -> None:
    torch.set_num_threads(1)
    problem = problem_named("lsrB")
    for algorithm in ("sgd", "diana", "mcm", "rand_mcm"):
        for batch in (0, 1):
            wall, cpu = time.perf_counter(), time.process_time()
            simulate(
                SCHEMES[algorithm],
                problem.gradients(batch, SEEDS),
                torch.zeros(problem.width, dtype=torch.float64),
                n_devices=problem.n_devices,
                rounds=ROUNDS,
                step=lambda k: k**-0.5 / problem.smoothness,
                seeds=SEEDS,
            )
            line = {
                "algorithm": algorithm,
                "batch": batch or "all",
                "rounds": ROUNDS,
                "devices": problem.n_devices,
                "seeds": len(SEEDS),
                "cpu_seconds": round(time.process_time() - cpu, 2),
                "seconds": round(time.perf_counter() - wall, 2),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
