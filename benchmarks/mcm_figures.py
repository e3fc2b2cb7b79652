"""Figures of docs/mcm.md, from recorded runs and the study's committed output.

fedsim run scenarios/paper/mcm_least_squares_a.yaml --out runs/mcm_least_squares_a
fedsim run scenarios/paper/mcm_a9a.yaml --out runs/mcm_a9a
python benchmarks/mcm_figures.py runs/mcm_least_squares_a runs/mcm_a9a
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from fedsim.results import load_run
from fedsim.scenario import load_scenario

ROOT = Path(__file__).parents[1]
LABELS = {
    "sgd": "SGD",
    "diana": "DIANA",
    "artemis": "Artemis",
    "mcm": "MCM",
    "rand_mcm": "Rand-MCM",
    "dore": "DORE",
}
COLOURS = {
    "sgd": "#444444",
    "diana": "#0072b2",
    "artemis": "#d55e00",
    "mcm": "#009e73",
    "rand_mcm": "#cc79a7",
    "dore": "#e69f00",
}
# log10 of the excess at the end, read off the published figures (to 0.05).
PUBLISHED = {
    "B1": {
        "sgd": -4.2,
        "diana": -3.5,
        "artemis": -3.0,
        "dore": -3.05,
        "mcm": -3.6,
        "rand_mcm": -3.55,
    },
    "a9a": {
        "sgd": -3.4,
        "diana": -2.8,
        "artemis": -1.9,
        "dore": -1.95,
        "mcm": -2.75,
        "rand_mcm": -2.75,
    },
}


def network_figure(directory: Path, n_devices: int) -> None:
    """Draw the excess loss of a run against rounds, bytes and time."""
    run = load_run(directory)
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), sharey=True, layout="constrained")
    for name, result in run.strategies.items():
        algorithm, _, world = name.partition("-")
        rows = [row for row in result.rounds if row.extra.get("excess_loss") is not None]
        excess = [row.extra["excess_loss"] for row in rows]
        sent = np.cumsum([row.bytes_down + row.bytes_up for row in result.rounds])
        style = {"color": COLOURS[algorithm], "label": LABELS[algorithm], "lw": 1.4}
        times = [row.virtual_time for row in rows]
        if world == "fast":
            continue
        if world == "slow_down":
            axes[3].plot(times, excess, **style)
            continue
        axes[0].plot([row.round for row in rows], excess, **style)
        axes[1].plot([8e-3 * sent[row.round - 1] / n_devices for row in rows], excess, **style)
        axes[2].plot(times, excess, **style)
    names = ("rounds", "kbit sent and received by a device", "virtual time (s), slow uplinks")
    for axis, name in zip(axes, (*names, "virtual time (s), slow downlinks"), strict=True):
        axis.set(yscale="log", xlabel=name)
        axis.grid(alpha=0.3)
        if name != "rounds":
            axis.set_xscale("log")
    axes[0].set_ylabel("excess loss")
    axes[0].legend(fontsize=8)
    save(figure, directory.name)


def reference_figure(lines: Sequence[dict]) -> None:
    """Draw the study's curves, with the ends of the published ones."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    titles = {
        "A1": "lsrA, batch 10, step 1/(8L)",
        "B1": "published least squares, batch 1, 1/(L √k)",
        "a9a": "a9a, batch 50, step 1/L, published split",
    }
    for axis, (setting, title) in zip(axes, titles.items(), strict=True):
        draw_curves(axis, [line for line in lines if line.get("setting") == setting])
        axis.set_title(title, fontsize=9)
        for algorithm, end in PUBLISHED.get(setting, {}).items():
            axis.plot(axis.get_xlim()[1], end, "<", color=COLOURS[algorithm], clip_on=False, ms=6)
    axes[0].set_ylabel("log10 excess loss, mean over seeds")
    axes[0].legend(fontsize=8)
    save(figure, "mcm_reference")


def draw_curves(axis: Axes, lines: Sequence[dict]) -> None:
    for line in lines:
        if line["algorithm"] in LABELS:
            rounds, excess = line["curve"]
            colour, label = COLOURS[line["algorithm"]], LABELS[line["algorithm"]]
            axis.plot(rounds, excess, color=colour, label=label, lw=1.2)
    axis.set(xscale="log", xlabel="rounds")
    axis.margins(x=0)
    axis.grid(alpha=0.3)


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(ROOT / "docs" / f"{name}.png", dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path)
    for directory in parser.parse_args().runs:
        network_figure(directory, load_scenario(directory / "scenario.yaml").data.devices)
    results = ROOT / "benchmarks/results/mcm.jsonl"
    if results.exists():
        reference_figure([json.loads(line) for line in results.read_text("utf-8").splitlines()])


if __name__ == "__main__":
    main()
