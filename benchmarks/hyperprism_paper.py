"""HyperPrism's experiments, at the published learning rate and with tuned ones.

    python benchmarks/hyperprism_paper.py [--cpu-minutes 60] [--data-dir DIR]    # resumable
    python benchmarks/hyperprism_paper.py --tables

Each run is one method of scenarios/paper/hyperprism_*.yaml, one learning rate and one seed, and
becomes one JSON line of results/hyperprism_paper.jsonl; runs that are there are not done again.

All devices wait for each other and no message is lost, so links decide when a round ends and not
what is learned in it: methods run in the scenario's world on a grid where everything arrives at
once, and one run of `fedsim.run` for each case and size of payload says what
rounds take in time and traffic. `--check` compares one method with `fedsim.run`, number by number.

Plan: the published base case and one factor at a time from it, the methods in turn. First the
rate of every method and case is tuned with seed 0: half-decades upwards from 0.01, the published
common rate, until two in a row are worse than the best so far, by the mean over all evaluations
of the accuracy on validation samples, which rewards an early gain and a late one. Then seeds 1, 2
and 3 run at the common rate and at the tuned one, scored on test samples. The hypernetworks learn
at the common rate too, as published; where rates are tuned at 1, which suited digits.
"""

import argparse
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid
from flwr.supercore.run import Run

import fedsim
from fedsim import registry
from fedsim.flower.compat import identity
from fedsim.flower.server import initial_arrays, score_models
from fedsim.graphs import peer_graphs

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "hyperprism_paper.jsonl"
PAPER = HERE.parent / "scenarios" / "paper"
COMMON, RATES = 0.01, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
TUNING_SEED, SEEDS = 0, (1, 2, 3)
METHODS = ("d_psgd", "p9", "mudag", "adom", "swarm_sgd", "adaptive")
PAYLOADS = ("d_psgd", "swarm_sgd", "adom")  # one model to all, one to one, two to all
NETWORK_ROUNDS = 20
CASES: dict[str, tuple[str, ...]] = {
    "base": (),
    "density 0.2": ("peers.density=0.2",),
    "m = 20": ("data.devices=20",),
    "alpha 10": ("data.partition.alpha=10",),
    "alpha 1": ("data.partition.alpha=1",),
    "density 0.8": ("peers.density=0.8",),
    "m = 100": ("data.devices=100",),
    # Gradients and scores of a net cost so much more that this one is cut short.
    "cifar10": ("rounds=50", "training.batch_size=32", "evaluation.every=10"),
}


@dataclass(frozen=True)
class Job:
    """One run: a method in a case, at a rate, from a seed, scored on test or validation samples."""

    case: str
    method: str
    learning_rate: float
    seed: int
    on: str = "global_test"
    tuned: bool = False

    def key(self) -> tuple[object, ...]:
        """Return what tells runs apart; `tuned` matters to the hypernetworks alone."""
        tuned = self.tuned and self.method == "adaptive"
        return self.case, self.method, self.learning_rate, self.seed, self.on, tuned


class Results:
    """The runs that there are, on file."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, []
        for text in path.read_text().splitlines() if path.exists() else ():
            self.lines.append(json.loads(text))
        self.found = {_job(line).key(): line for line in self.lines}

    def add(self, line: dict[str, Any]) -> None:
        """Append a line to the file."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.found[_job(line).key()] = line

    def __contains__(self, job: Job) -> bool:
        return job.key() in self.found

    def curve(self, job: Job) -> dict[str, Any] | None:
        """Return the line of a run, None if there is none."""
        return self.found.get(job.key())

    def mean_accuracy(self, job: Job) -> float:
        """Return what rates are tuned by; a run that diverged counts 0."""
        line = self.found[job.key()]
        return 0.0 if line["diverged"] else float(np.mean(line["accuracy"]))

    def next_rate(self, case: str, method: str) -> Job | None:
        """Return the next run of a method's tuning, None once it is over."""
        best, worse = -1.0, 0
        for rate in RATES:
            job = Job(case, method, rate, TUNING_SEED, "validation", tuned=True)
            if job not in self:
                return job
            score = self.mean_accuracy(job)
            best, worse = max(best, score), 0 if score > best else worse + 1
            if worse == 2:
                break
        return None

    def tuned_rate(self, case: str, method: str) -> float:
        """Return the best rate tried so far."""
        jobs = [Job(case, method, r, TUNING_SEED, "validation", tuned=True) for r in RATES]
        tried = [job for job in jobs if job in self]
        return max(tried, key=self.mean_accuracy).learning_rate if tried else COMMON

    def scored(self, case: str, method: str, tuned: bool) -> list[dict[str, Any]]:
        """Return the runs on test samples at the common rate, or at the tuned one."""
        rate = self.tuned_rate(case, method) if tuned else COMMON
        jobs = (Job(case, method, rate, seed, tuned=tuned) for seed in SEEDS)
        return [line for job in jobs if (line := self.curve(job))]

    def missing(self) -> Iterator[Job]:
        """Yield the runs of the plan that are still to do, in order of importance."""
        for job in self._plan():
            if job not in self:
                yield job

    def _plan(self) -> Iterator[Job]:
        for case in ("m = 20", "base"):  # the cheapest, and the one that the others differ from
            yield from self._case(case, SEEDS)
        for seeds in (SEEDS[:1], SEEDS):
            for case in CASES:
                if case != "cifar10":
                    yield from self._case(case, seeds)
        yield from self._case("cifar10", SEEDS[:1])

    def _case(self, case: str, seeds: tuple[int, ...]) -> Iterator[Job]:
        yield from (Job(case, method, COMMON, seeds[0]) for method in METHODS)
        for method in METHODS:
            while job := self.next_rate(case, method):
                yield job
            yield Job(case, method, self.tuned_rate(case, method), seeds[0], tuned=True)
        for method in PAYLOADS:
            yield Job(case, method, COMMON, SEEDS[0], "network")
        for seed in seeds[1:]:
            for method in METHODS:
                yield Job(case, method, COMMON, seed)
                yield Job(case, method, self.tuned_rate(case, method), seed, tuned=True)


def _job(line: dict[str, Any]) -> Job:
    return Job(**{name: line[name] for name in Job.__dataclass_fields__})


class InstantGrid(Grid):
    """The devices of a simulation, on a network where everything arrives at once."""

    run = property(lambda self: Run.create_empty(1))

    def __init__(self, simulation: Any) -> None:
        self.devices, self.executor = simulation.trainer.data.n_devices, simulation.executor

    def set_run(self, run: Run) -> None: ...

    def create_message(self, *arguments: object) -> Message:
        raise NotImplementedError

    push_messages = pull_messages = create_message

    def get_node_ids(self) -> list[int]:
        return list(range(1000, 1000 + self.devices))

    def send_and_receive(self, messages, *, timeout=None):
        asked = list(messages)
        return self.executor(asked) if asked else []


class DivergedError(Exception):
    """A loss is no number any more."""


def scenario_of(job: Job) -> fedsim.Scenario:
    """Return the job's scenario, with its method alone."""
    name = "cifar10" if job.case == "cifar10" else "mnist"
    overrides = [
        *CASES[job.case],
        f"seed={job.seed}",
        f"training.learning_rate={job.learning_rate}",
    ]
    if job.on == "network":
        overrides.append(f"rounds={NETWORK_ROUNDS}")
    if job.tuned:
        overrides.append("strategies.adaptive.adaptation={learning_rate: 1}")
    scenario = fedsim.load_scenario(PAPER / f"hyperprism_{name}.yaml", overrides)
    return scenario.model_copy(update={"strategies": {job.method: scenario.strategies[job.method]}})


@lru_cache(maxsize=1)
def world_of(case: str, seed: int, data_dir: Path | None) -> Any:
    """Return the simulation whose data and devices the methods share, and the graphs by round."""
    scenario = scenario_of(Job(case, METHODS[0], COMMON, seed))
    peers = scenario.peers
    draw = peer_graphs(peers.spec(), scenario.data.devices, seed, redraw=peers.redraw)
    graphs = [draw(number) for number in range(1, scenario.rounds + 1)]
    return fedsim.build(scenario, data_dir=data_dir), graphs


def learn(job: Job, data_dir: Path | None) -> dict[str, Any]:
    """Return a method's accuracies, by round."""
    scenario = scenario_of(job)
    world, graphs = world_of(job.case, job.seed, data_dir)
    strategy = registry.build("strategy", scenario.strategies[job.method].spec())
    strategy.graph = graphs.__getitem__
    every, rounds, found = scenario.evaluation.every, scenario.rounds, {}

    def evaluate(number: int, _: ArrayRecord) -> None:
        if number and (number % every == 0 or number == rounds):
            scores = score_models(world.trainer, strategy.device_models, on=job.on)
            if not np.isfinite(scores.loss):
                raise DivergedError
            found[number] = round(scores.accuracy, 4)

    initial = initial_arrays(world.trainer)
    try:
        with identity():
            result = strategy.start(
                InstantGrid(world), initial, num_rounds=rounds, evaluate_fn=evaluate
            )
        degree = result.train_metrics_clientapp[rounds].get("degree")
    except DivergedError:
        degree = None
    return {
        "rounds": list(found),
        "accuracy": list(found.values()),
        "degree": degree,
        "diverged": rounds not in found,
    }


def travel(job: Job, data_dir: Path | None) -> dict[str, Any]:
    """Return what rounds take on the scenario's network."""
    result = fedsim.run(scenario_of(job), data_dir=data_dir).strategies[job.method]
    megabytes = np.cumsum([row.bytes_peer for row in result.rounds]) / 1e6
    return {
        "rounds": [row.round for row in result.rounds],
        "accuracy": [row.eval_accuracy and round(row.eval_accuracy, 4) for row in result.rounds],
        "virtual_time": [round(row.virtual_time, 3) for row in result.rounds],
        "megabytes": [round(value, 2) for value in megabytes.tolist()],
    }


TARGETS = {"cifar10": (0.20, 0.25)}
MODELS_SENT = {"swarm_sgd": "swarm_sgd", "adom": "adom"}  # whose exchanges are not like D-PSGD's


def tables(results: Results) -> None:
    """Print what there is, in Markdown, a table for each case."""
    for case in CASES:
        low, high = TARGETS.get(case, (0.80, 0.85))
        rows = [
            _row(results, case, method, rate, tuned, low, high)
            for method in METHODS
            for rate, tuned in ((COMMON, False), (results.tuned_rate(case, method), True))
        ]
        if any(rows):
            print(f"\n**{case}**\n")
            print(f"| method | learning rate | seeds | final | to {low} | to {high} | time | MB |")
            print("| --- | --- | --- | --- | --- | --- | --- | --- |")
            print("\n".join(row for row in rows if row))


def overview(results: Results) -> None:
    """Print what methods reach at the common rate and at tuned ones, a column for each case."""
    cases = [case for case in CASES if case != "cifar10"]
    for title, tuned, goal in (
        ("accuracy after 100 rounds, common rate", False, None),
        ("rounds to 0.8, common rate", False, 0.80),
        ("accuracy after 100 rounds, tuned rate", True, None),
        ("rounds to 0.85, tuned rate", True, 0.85),
    ):
        print(f"\n| {title} | " + " | ".join(cases) + " |\n" + "| --- " * (len(cases) + 1) + "|")
        for method in METHODS:
            cells = [_cell(results.scored(case, method, tuned), goal) for case in cases]
            print(f"| {method} | " + " | ".join(cells) + " |")


def _cell(found: list[dict[str, Any]], goal: float | None) -> str:
    if goal is None:
        values = [0.0 if line["diverged"] else line["accuracy"][-1] for line in found]
        text = _spread(values, 3) if values else "–"
    else:
        at = [_rounds_to(line, goal) for line in found]
        text = "–" if None in at or not at else _spread(at, 0)
    return text if len(found) in (0, len(SEEDS)) else f"{text} ({len(found)})"


def _row(
    results: Results, case: str, method: str, rate: float, tuned: bool, low: float, high: float
) -> str:
    """Return a line of the table: means over the seeds, ± their standard deviation."""
    found = results.scored(case, method, tuned)
    if not found or (tuned and results.next_rate(case, method)):
        return ""
    finals = [0.0 if line["diverged"] else line["accuracy"][-1] for line in found]
    at = {goal: [_rounds_to(line, goal) for line in found] for goal in (low, high)}
    cells = [
        method,
        f"{rate:g}, tuned" if tuned else f"{rate:g}",
        str(len(found)),
        _spread(finals, 3),
        *("–" if None in at[goal] else _spread(at[goal], 0) for goal in (low, high)),
    ]
    payload = MODELS_SENT.get(method, METHODS[0])
    network = results.curve(Job(case, payload, COMMON, SEEDS[0], "network"))
    if network and None not in at[high]:
        share = float(np.mean(at[high])) / network["rounds"][-1]
        cells += [f"{share * network[key][-1]:.3g}" for key in ("virtual_time", "megabytes")]
    else:
        cells += ["–", "–"]
    return "| " + " | ".join(cells) + " |"


def _rounds_to(line: dict[str, Any], goal: float) -> int | None:
    pairs = zip(line["rounds"], line["accuracy"], strict=True)
    return next((number for number, accuracy in pairs if accuracy >= goal), None)


def _spread(values: list[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def check(data_dir: Path | None) -> None:
    """Compare the two ways of running, for a method whose pairs the network does not draw.

    Raises
    ------
    SystemExit
        If they differ.
    """
    for method in ("d_psgd", "p9", "adom"):
        job = Job("base", method, 0.03, 1)
        one, other = learn(job, data_dir)["accuracy"], travel(job, data_dir)["accuracy"]
        print(method, one)
        if one != [value for value in other if value is not None]:
            raise SystemExit(f"{method}: fedsim.run has {other}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu-minutes", type=float, default=float("inf"))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if given.check:
        check(given.data_dir)
        return
    results = Results(RESULTS)
    if given.tables:
        tables(results)
        overview(results)
        return
    for job in results.missing():
        if time.process_time() > 60 * given.cpu_minutes:
            break
        wall, cpu = time.perf_counter(), time.process_time()
        found = (travel if job.on == "network" else learn)(job, given.data_dir)
        spent = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        results.add(vars(job) | found | {k: round(v, 1) for k, v in spent.items()})


if __name__ == "__main__":
    main()
