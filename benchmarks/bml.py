"""BML against parameter servers, by real runs: job times over compute and communication.

    python benchmarks/bml.py [--figure docs/bml_jct.png]

Runs `scenarios/paper/bml_vgg19.yaml` (VGG-19's bytes, a stand-in learns) on BCube(n, k) and on a
Fat-Tree with devices of several speeds, and prints one JSON line per case with C, S and the
reduction as they were in virtual time, beside the closed form. Then the stand-in with its own bytes
under wire formats, sparse vectors, lost and bad chunks. Nothing is timed on the wall clock.
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import fedsim
from fedsim.learning.threads import one_thread
from fedsim.simulation import build
from fedsim.whatif.plots import SETTINGS, save_figure
from topologies import job_reduction, required_efficiency

SCENARIO = Path(__file__).parents[1] / "scenarios/paper/bml_vgg19.yaml"
SIZES = ((3, 2), (4, 2), (2, 3), (2, 4))  # n, k
RATIOS = (0.01, 0.064, 0.25, 1.0, 4.0)  # C / S of the parameter server
ROUNDS, BATCH, VGG19, RATE = 3, 32, 574_668_960, 10e9
LENETS = {"classic": 246_824, "caffe": 1_724_320, "tensorflow": 13_098_536}
COLOURS = {2: "#0072b2", 3: "#009e73", 4: "#cc79a7"}
MARKERS = {(3, 2): "o", (4, 2): "s", (2, 3): "o", (2, 4): "o"}


def job(strategy, n, k, seconds, *changes):
    """Return compute and synchronisation of an iteration, and how long the job took."""
    speed = BATCH / seconds
    overrides = [
        f"rounds={ROUNDS}",
        f"data.devices={n**k}",
        f"topology.n={n}",
        f"topology.k={k}",
        f"devices.speed.value={speed!r} samples/s",
        "training.batch_size=32",
        *changes,
    ]
    rows = []
    scenario = fedsim.load_scenario(SCENARIO, overrides)
    with one_thread():
        build(scenario, strategy, device="cpu").run(rows.append)
    extra = rows[-1].extra
    return extra["compute_seconds"], extra["sync_seconds"], rows[-1].virtual_time


def ideal(n_devices, size_bytes=VGG19):
    """Return S of the co-located parameter server on a network without losses or latency."""
    return 2 * (n_devices - 1) / n_devices * 8 * size_bytes / RATE


def against(baseline, n, k, ratio, size=None, efficiency=1.0):
    """Return one case: BML against a baseline at C = ratio x its S."""
    bytes_sent = VGG19 if size is None else size
    seconds = ratio * ideal(n**k, bytes_sent) / efficiency
    charged = [] if size is None else [f"strategies.{s}.payload={size}" for s in ("bml", baseline)]
    compute, bml, ours = job("bml", n, k, seconds, *charged)
    _, server, theirs = job(baseline, n, k, seconds, *charged)
    return {
        "n": n,
        "k": k,
        "devices": n**k,
        "baseline": baseline,
        "bytes": bytes_sent,
        "compute": compute,
        "sync_bml": bml,
        "sync_baseline": server,
        "ratio": compute / server,
        "jct_bml": ours / ROUNDS,
        "jct_baseline": theirs / ROUNDS,
        "reduction": 1 - ours / theirs,
        "ideal_reduction": job_reduction(k, ratio, efficiency=efficiency),
    }


WIRES = {
    "float32": "collective: bml",
    "float16": "collective: bml, wire_dtype: float16, arithmetic: schedule",
    "bfloat16": "collective: bml, wire_dtype: bfloat16, arithmetic: schedule",
    "top 10 %": "collective: all_to_all, top_k: 0.1",
    "top 1 %": "collective: all_to_all, top_k: 0.01",
    "top 1 %, no feedback": "collective: all_to_all, top_k: 0.01, error_feedback: false",
    "0.1 % of chunks lost": "collective: bml, arithmetic: schedule, chunk_loss: 0.001",
    "1 % of chunks lost": "collective: bml, arithmetic: schedule, chunk_loss: 0.01",
    "5 % of chunks lost": "collective: bml, arithmetic: schedule, chunk_loss: 0.05",
    "0.1 % of chunks bad": "collective: bml, arithmetic: schedule, chunk_corruption: 0.001",
    "10 local steps": "collective: bml, exchange_period: 10",
}


def wire(name, options):
    """Return what 100 rounds of the stand-in come to, on nine servers."""
    changes = ["rounds=100", "evaluation.every=10"]
    entry = f"strategies.bml={{kind: allreduce, {options}}}"
    scenario = fedsim.load_scenario(SCENARIO, [*changes, entry])
    rows = []
    with one_thread():
        outcome = build(scenario, "bml", device="cpu").run(rows.append)
    return {
        "baseline": "none",
        "bytes": 0,
        "case": name,
        "rounds": len(rows),
        "accuracy": rows[-1].eval_accuracy,
        "loss": rows[-1].eval_loss,
        "bytes_a_round": rows[-1].bytes_peer,
        "consensus_distance": rows[-1].consensus_distance,
        "diverged": outcome.diverged,
    }


def overlapped(seconds):
    """Return one case: buckets of 25 MB that leave while the backward pass goes on."""
    found = {}
    for strategy in ("bml", "fat_tree"):
        entry = f"strategies.{strategy}."
        changes = [f"{entry}fusion_bytes=25000000", f"{entry}overlap=true"]
        compute, _, found[strategy] = job(strategy, 3, 2, seconds, *changes)
    return {
        "baseline": "fat_tree, overlapped",
        "bytes": VGG19,
        "compute": compute,
        "exposed_bml": found["bml"] / ROUNDS - compute,
        "exposed_baseline": found["fat_tree"] / ROUNDS - compute,
        "reduction": 1 - found["bml"] / found["fat_tree"],
    }


def cases():
    """Yield all cases, in the order of the page on BML."""
    for n, k in SIZES:
        for ratio in RATIOS:
            yield against("fat_tree", n, k, ratio)
    for ratio in RATIOS:
        yield against("fat_tree_lossy", 3, 2, ratio, efficiency=0.8)
    for size in LENETS.values():
        for ratio in (0.25, 2.5):
            yield against("fat_tree", 3, 2, ratio, size=size)
    for seconds in (0.0654, 0.5, 1.0, 2.0):
        yield overlapped(seconds)
    for name, options in WIRES.items():
        yield wire(name, options)


def draw(rows, path):
    """Draw reductions and job completion times over C / S, the runs as points on the formulas."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(8.6, 3.9), dpi=110, layout="constrained")
        left, right = figure.subplots(1, 2)
        _reductions(left, rows)
        _times(right, rows)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xlabel("compute C / parameter server's S")
            axes.set_xticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
            axes.minorticks_off()
        png, svg = save_figure(figure, path.with_suffix(""))
        svg.unlink()
    return png


def _vgg19(rows, baseline):
    return [r for r in rows if r["baseline"] == baseline and r["bytes"] == VGG19]


def _reductions(axes, rows):
    ratio = np.geomspace(0.008, 5, 200)
    for k, colour in COLOURS.items():
        axes.plot(ratio, 100 * (1 - 1 / k) / (1 + ratio), color=colour, lw=1.2)
        axes.annotate(f"k = {k}", (0.0085, 100 * (1 - 1 / k) + 1), color=colour, va="bottom")
    axes.plot(ratio, 100 * 0.6 / (1 + ratio), color=COLOURS[2], lw=1.2, ls=(0, (4, 2)))
    axes.annotate("k = 2, e = 0.8", (0.0085, 60.3), color=COLOURS[2], va="bottom")
    for baseline, fill in (("fat_tree", None), ("fat_tree_lossy", "white")):
        for r in _vgg19(rows, baseline):
            colour = COLOURS[r["k"]]
            axes.plot(
                r["ratio"], 100 * r["reduction"], MARKERS[r["n"], r["k"]], color=colour, ms=4,
                mfc=fill or colour,
            )  # fmt: skip
    axes.axhline(56.4, color="#555555", lw=0.8, ls=":")
    axes.annotate("56.4 % (the paper)", (5, 57.2), color="#555555", ha="right", fontsize=8)
    axes.set_ylim(0, 82)
    axes.set_ylabel("shorter job, %")
    axes.set_title("What BML saves", loc="left", fontsize=9)


def _times(axes, rows):
    ratio = np.geomspace(0.008, 5, 200)
    lines = [("parameter server on a Fat-Tree, one port", 1.0, "#4d4d4d")]
    lines += [(f"BML, k = {k}", 1 / k, colour) for k, colour in COLOURS.items()]
    for name, sync, colour in lines:
        axes.plot(ratio, ratio + sync, color=colour, lw=1.2, label=name)
    for r in _vgg19(rows, "fat_tree"):
        unit, shape = r["sync_baseline"], MARKERS[r["n"], r["k"]]
        axes.plot(r["ratio"], r["jct_bml"] / unit, shape, color=COLOURS[r["k"]], ms=4)
        axes.plot(r["ratio"], r["jct_baseline"] / unit, shape, color="#4d4d4d", ms=4)
    axes.set_yscale("log")
    axes.set_yticks([0.25, 0.5, 1, 2, 5], ["0.25", "0.5", "1", "2", "5"])
    axes.set_ylabel("iteration / parameter server's S")
    axes.set_title("Job completion time", loc="left", fontsize=9)
    axes.legend(loc="upper left", fontsize=8)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", type=Path, help="where to draw the picture")
    parser.add_argument("--from", dest="source", type=Path, help="draw an earlier output")
    arguments = parser.parse_args()
    if arguments.source:
        rows = [json.loads(line) for line in arguments.source.read_text().splitlines()]
    else:
        rows = []
        for row in cases():
            print(json.dumps(row), flush=True)
            rows.append(row)
        efficiencies = {
            str(c): round(required_efficiency(0.564, 2, c), 3)
            for c in (0, 0.064, 0.152, 0.241, 0.33)
        }
        print(json.dumps({"baseline": "none", "bytes": 0, "efficiency_for_56.4": efficiencies}))
    if arguments.figure:
        draw(rows, arguments.figure)


if __name__ == "__main__":
    main()
