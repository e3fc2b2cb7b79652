"""How long studies of topologies and collectives take.

    python benchmarks/studies.py [--repeats 3]

Prints one JSON line per case: wall seconds (best of the repeats) and what came out. One process.
"""

import argparse
import json
import time

from fedsim.whatif import evaluate_study, read_study
from topologies import LoadPlan, Router, bcube, bml_schedule, time_schedule
from topologies.schedules import check

SWEEP = {
    "topologies": [
        {"kind": "bcube", "n": 4, "k": 2},
        {"kind": "bcube", "n": 2, "k": 4},
        {"kind": "fat_tree", "ports": 4},
        {"kind": "torus", "dims": [4, 4]},
    ],
    "collectives": ["ring", "ps_colocated", "halving_doubling", "double_binary_tree"],
    "payloads": ["lenet5", "resnet50", "vgg19"],
    "bandwidth": ["10 Gbit/s", "40 Gbit/s"],
    "latency": "20 us",
}
LARGE = {
    "payloads": ["vgg19", "gpt2"],
    "bandwidth": ["10 Gbit/s", "40 Gbit/s"],
    "latency": "20 us",
    "collectives": ["bml", "ring", "ps_colocated", "halving_doubling"],
}
BCUBE_8_3 = {"kind": "bcube", "n": 8, "k": 3}
FAT_TREE_16 = {"kind": "fat_tree", "ports": 16}


def sweep():
    """16 pairs x 3 sizes x 2 rates."""
    result = evaluate_study(read_study(SWEEP))
    return {"rows": len(result.frame)}


def bml_5_4():
    """625 servers, 80 000 messages: made, checked, routed and timed."""
    graph = bcube(5, 4, bandwidth=10e9)
    schedule = bml_schedule(graph)
    check(schedule)
    plan = LoadPlan(schedule, Router(graph))
    seconds = time_schedule(plan, 574_668_960).seconds
    return {"messages": schedule.n_sends, "seconds": seconds}


def study_of(topology, **changes):
    """Return a case that runs all collectives of LARGE on one topology."""

    def case():
        result = evaluate_study(read_study(LARGE | {"topologies": [topology]} | changes))
        return {"rows": len(result.frame), "devices": int(result.frame["devices"].iloc[0])}

    return case


CASES = {
    "sweep of 16 pairs, 3 sizes, 2 rates": sweep,
    "bml(5,4)": bml_5_4,
    "study on bcube(8,3)": study_of(BCUBE_8_3),
    "study on bcube(8,3), worst port dead": study_of(
        BCUBE_8_3, collectives=["bml"], failures=[{"link": "worst"}]
    ),
    "study on fat_tree(16)": study_of(FAT_TREE_16),
    "study on fat_tree(16), hashed": study_of(FAT_TREE_16, losses={"hash": "on"}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    for name, case in CASES.items():
        walls = []
        for _ in range(repeats):
            start = time.perf_counter()
            found = case()
            walls.append(time.perf_counter() - start)
        print(json.dumps({"case": name, "wall_seconds": round(min(walls), 3)} | found), flush=True)


if __name__ == "__main__":
    main()
