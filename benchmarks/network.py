"""How fast the network is: flows per second on a star and a Fat-Tree, rounds, traces.

    python benchmarks/network.py [--repeats 3] [--quick]

Prints one JSON line per case: best CPU seconds of the repeats, flows per second, and where it is
run, the ratio to a plain SimPy version (one process per flow, a full solve and interrupts at each
change) of the same flows in the same run. SimGrid's seconds are those that its C++ version 4.1 took
on another machine, alone on one core; they are there for orientation, not for a ratio. As in
timeit, the garbage collector is off while measuring (it adds a third at 10,000 clients).
"""

import argparse
import gc
import itertools
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import simpy

from fedsim.network import Trace, max_min_rates, star_network
from fedsim.network.options import TransferOptions
from fedsim.network.transfers import Network
from fedsim.network.wiring import LinkTable, ListedWiring

SIMGRID_ELSEWHERE = {
    "star, 1000 staggered": 0.013,
    "star, 10000 staggered": 0.27,
    "fat-tree k=8, 1000 staggered": 0.025,
    "fat-tree k=8, 10000 staggered": 1.6,
    "round of 1000 clients": 0.22,
    "round of 10000 clients": 183.0,
}


def star(n_flows, seed=0):
    """Return (capacities, flows) of clients that upload and download at random times."""
    rng = np.random.default_rng(seed)
    n_clients = n_flows // 10
    capacity = [*(rng.uniform(1, 20, 2 * n_clients) * 1e6), 4e8, 4e8]
    flows, now = [], 0.0
    for _ in range(n_flows):
        now += rng.exponential(1 / 60)
        client, is_up = int(rng.integers(n_clients)), rng.random() < 0.5
        route = (client, 2 * n_clients) if is_up else (n_clients + client, 2 * n_clients + 1)
        flows.append((now, route, float(rng.uniform(1e5, 1.2e6))))
    return capacity, flows


def fat_tree(n_flows, ports=8, per_second=150, seed=0):
    """Return (capacities, flows) between random hosts of a Fat-Tree, one random path each."""
    rng = random.Random(seed)
    links = {}
    half, now, flows = ports // 2, 0.0, []
    for _ in range(n_flows):
        now += rng.expovariate(per_second)
        source, destination = rng.sample(range(ports**3 // 4), 2)
        edges = [host // half for host in (source, destination)]
        pods = [edge // half for edge in edges]
        up, down = [("host", source), ("edge", edges[0])], [("edge", edges[1])]
        if edges[0] != edges[1]:
            column = rng.randrange(half)
            up.append(("aggregation", pods[0], column))
            if pods[0] != pods[1]:
                up.append(("core", column, rng.randrange(half)))
                up.append(("aggregation", pods[1], column))
            up += down
        path = [*up, ("host", destination)]
        route = tuple(links.setdefault(hop, len(links)) for hop in itertools.pairwise(path))
        flows.append((now, route, rng.uniform(1e6, 1e7)))
    return [1e8] * len(links), flows


def round_of(n_clients, seed=0):
    """Return (capacities, flows) of one server that sends to all clients at once."""
    rng = np.random.default_rng(seed)
    capacity = [*(rng.uniform(1, 20, n_clients) * 1e6), n_clients * 3e6]
    sizes = rng.uniform(5e5, 2e6, n_clients)
    return capacity, [(0.0, (k, n_clients), float(size)) for k, size in enumerate(sizes)]


def fedsim_seconds(capacity, flows):
    """Run flows on the network; return (CPU seconds, completion times)."""
    env = simpy.Environment()
    names = [str(k) for k in range(len(capacity))]
    table = LinkTable(np.array(capacity, dtype=float), np.zeros(len(capacity)))
    network = Network(env, table, ListedWiring(names), options=TransferOptions())
    done = []
    network.on_close = lambda delivery: done.append(delivery.finished)
    routes = [[names[link] for link in route] for _, route, _ in flows]

    def send(number):
        network.transfer(0, 0, flows[number][2], route=routes[number])

    started = time.process_time()
    for number, (start, _, _) in enumerate(flows):
        if start > 0:
            event = env.timeout(start)
            event.callbacks.append(lambda _, number=number: send(number))
        else:
            send(number)
    env.run()
    return time.process_time() - started, done


def plain_seconds(capacity, flows):
    """Run flows as one SimPy process each: every change interrupts and re-solves all."""
    env = simpy.Environment()
    active = {}
    done = []

    def settle(now):
        for flow in active.values():
            flow["left"] -= flow["rate"] * (now - flow["since"])
            flow["since"] = now

    def share(but=None):
        """Give every flow its rate and wake it to look at the clock again."""
        if not active:
            return
        order = list(active.values())
        uses = [(k, link) for k, flow in enumerate(order) for link in flow["route"]]
        index, link = np.array(uses).T
        ones = np.ones(len(order))
        rates = max_min_rates(
            np.array(capacity), index, link, np.ones(len(uses)), ones, ones * np.inf
        )
        for flow, rate in zip(order, rates.tolist(), strict=True):
            flow["rate"] = rate
            if flow is not but:
                flow["process"].interrupt()

    def run(number, start, route, size):
        yield env.timeout(start)
        settle(env.now)
        flow = {"left": 8.0 * size, "route": route, "since": env.now, "rate": 0.0}
        flow["process"] = env.active_process
        active[number] = flow
        share(but=flow)
        while True:
            try:
                yield env.timeout(max(flow["left"], 0.0) / flow["rate"])
                break
            except simpy.Interrupt:
                continue
        settle(env.now)
        del active[number]
        done.append(env.now)
        share()

    started = time.process_time()
    for number, (start, route, size) in enumerate(flows):
        env.process(run(number, start, route, size))
    env.run()
    return time.process_time() - started, done


def shared_flows(name, case, repeats, compare):
    """Measure one case and print its line."""
    capacity, flows = case
    runs = []
    for _ in range(repeats):
        gc.collect()
        runs.append(fedsim_seconds(capacity, flows))
    seconds, done = min(runs, key=lambda run: run[0])
    line = {
        "case": name,
        "seconds": round(seconds, 4),
        "flows_per_second": round(len(flows) / seconds),
        "last_completion": round(max(done), 6),
    }
    if compare:
        plain, plain_done = plain_seconds(capacity, flows)
        assert abs(max(plain_done) - max(done)) < 1e-6 * max(done)
        line |= {"plain_simpy_seconds": round(plain, 3), "times_faster": round(plain / seconds, 1)}
    if name in SIMGRID_ELSEWHERE:
        line["simgrid_seconds_on_another_machine"] = SIMGRID_ELSEWHERE[name]
    print(json.dumps(line), flush=True)


def star_round(n_devices, repeats):
    """Measure a round on `star_network`: every device downloads, then uploads."""
    best = min(one_star_round(n_devices) for _ in range(repeats))
    each = best / (2 * n_devices) * 1e6
    line = {"case": f"star round, {n_devices} devices", "seconds": round(best, 4)}
    print(json.dumps(line | {"microseconds_per_message": round(each, 1)}), flush=True)


def one_star_round(n_devices):
    """Return the CPU seconds of one round."""
    rng = np.random.default_rng(0)
    gc.collect()
    env = simpy.Environment()
    network = star_network(
        env,
        uplink_bps=rng.uniform(1, 20, n_devices) * 1e6,
        downlink_bps=rng.uniform(5, 50, n_devices) * 1e6,
        latency=rng.uniform(0.005, 0.1, n_devices),
        server_up_bps=n_devices * 2e6,
        server_down_bps=n_devices * 5e6,
    )
    started = time.process_time()
    for device in range(n_devices):
        network.transfer(n_devices, device, 1_000_000).callbacks.append(
            lambda _, device=device: network.transfer(device, n_devices, 1_000_000)
        )
    env.run()
    return time.process_time() - started


def hour_of_traces(n_clients=100):
    """Measure clients whose links follow one-second traces for an hour."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.csv"
        rows = "".join(f"{t},{rate:.0f}\n" for t, rate in enumerate(rng.uniform(1e6, 9e6, 3601)))
        path.write_text("time_s,bandwidth_bps\n" + rows)
        env = simpy.Environment()
        network = star_network(
            env,
            uplink_bps=np.full(n_clients, 1e9),
            downlink_bps=np.full(n_clients, 1e9),
            link_model=Trace(path=str(path), offset="random"),
        )
        started = time.process_time()
        for client in range(n_clients):
            network.transfer(client, n_clients, 3_000_000_000)
        env.run(until=3600)
        seconds = time.process_time() - started
    line = {"case": f"{n_clients} clients, 1 h of 1 s traces", "seconds": round(seconds, 3)}
    print(json.dumps(line), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="1000 flows only")
    arguments = parser.parse_args()
    gc.disable()
    for n_flows in (1000,) if arguments.quick else (1000, 10_000):
        compare = n_flows == 1000
        shared_flows(f"star, {n_flows} staggered", star(n_flows), arguments.repeats, compare)
        shared_flows(
            f"fat-tree k=8, {n_flows} staggered", fat_tree(n_flows), arguments.repeats, compare
        )
        shared_flows(f"round of {n_flows} clients", round_of(n_flows), arguments.repeats, compare)
    for n_devices in (100, 1000) if arguments.quick else (100, 1000, 10_000):
        star_round(n_devices, arguments.repeats)
    hour_of_traces()


if __name__ == "__main__":
    main()
