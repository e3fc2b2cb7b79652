import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_run import Sample, write_sample

from fedsim.recorder import ComputeRow, LinkRow, Recorder, RoundRow, TransferRow, summarise
from fedsim.report import timeline
from fedsim.report.trace import trace_events, write_chrome_trace
from fedsim.results import RunResult, StrategyResult, load_run, strategy_result

SERVER = 9


def transfer(kind: str, ends: tuple[int, int], times: tuple[float, float | None], **more):
    return TransferRow(
        round=more.pop("round", 1), message=0, kind=kind, source=ends[0], destination=ends[1],
        released=times[0], started=times[0], first_byte=None, finished=times[1],
        size_bytes=more.pop("size_bytes", 1000), outcome=more.pop("outcome", "delivered"), **more,
    )  # fmt: skip


def work(device: int, start: float, end: float, number: int = 1) -> ComputeRow:
    return ComputeRow(round=number, device=device, kind="train", started=start, finished=end)


def recorded(rows, *, ends=(10.0,), links=()) -> StrategyResult:
    with Recorder(None, "s", transfers=True) as recorder:
        for number, time in enumerate(ends, start=1):
            recorder.round(RoundRow(round=number, virtual_time=time, wall_time=0.0))
        for row in rows:
            (recorder.compute if isinstance(row, ComputeRow) else recorder.transfer)(row)
        for link in links:
            recorder.link(link)
    return strategy_result(recorder, summarise(recorder.rows))


def link(name: str, **more) -> LinkRow:
    values = {"bandwidth_bps": 8e3, "latency": 0.0, "carried_bytes": 0.0, "busy_time": 0.0}
    return LinkRow(link=name, **values | more)


ROUND = [
    transfer("down", (SERVER, 0), (0.0, 1.0), route=["down-0"]),
    transfer("down", (SERVER, 1), (0.0, 2.0), route=["down-1"]),
    work(0, 1.0, 9.0),
    work(1, 2.0, 3.0),
    transfer("up", (0, SERVER), (9.0, 10.0), route=["up-0", "server-up"]),
    transfer("up", (1, SERVER), (3.0, 4.0), route=["up-1", "server-up"]),
]


def test_the_critical_path_of_a_server_round_is_the_last_devices():
    result = recorded(ROUND)
    spans = timeline.spans_of(result)
    [path] = timeline.round_paths(result, spans)
    steps = [(spans.kind[i], float(spans.start[i])) for i in path.path]
    assert steps == [("down", 0.0), ("train", 1.0), ("up", 9.0)]
    assert (path.network, path.compute, path.device) == (2.0, 8.0, 0)


def test_waiting_is_what_neither_network_nor_work_explains():
    rows = [work(0, 4.0, 9.0), transfer("up", (0, SERVER), (9.0, 10.0))]
    result = recorded(rows, ends=(20.0,))
    share = timeline.time_share(timeline.round_paths(result, timeline.spans_of(result)))
    assert (share.network, share.compute, share.waiting) == pytest.approx((0.05, 0.25, 0.7))


def test_the_tightest_link_is_the_one_occupied_longest_on_the_path():
    links = [link("up-0", bandwidth_bps=80e3), link("server-up", bandwidth_bps=80e3)]
    result = recorded(ROUND, links=links)
    [path] = timeline.round_paths(result, timeline.spans_of(result))
    assert path.link == "server-up"


def test_a_path_between_devices_goes_back_through_their_neighbours():
    rows = [
        work(0, 0.0, 5.0),
        work(1, 0.0, 1.0),
        transfer("peer", (0, 1), (5.0, 6.0)),
        transfer("peer", (1, 2), (6.0, 8.0)),
        transfer("peer", (1, 0), (1.0, 2.0)),
    ]
    result = recorded(rows)
    spans = timeline.spans_of(result)
    [path] = timeline.round_paths(result, spans)
    assert [(int(spans.source[i]), int(spans.destination[i])) for i in path.path] == [
        (0, 0), (0, 1), (1, 2),
    ]  # fmt: skip


def test_stragglers_and_transfers_without_an_end_are_not_critical():
    rows = [*ROUND, transfer("up", (5, SERVER), (1.0, 99.0)), transfer("up", (6, 9), (1.0, None))]
    result = recorded(rows)
    spans = timeline.spans_of(result)
    assert len(spans.round) == 7
    assert timeline.round_paths(result, spans)[0].device == 0


@given(
    st.lists(
        st.tuples(*[st.integers(0, 3)] * 2, *[st.floats(0, 9, width=16)] * 2, st.booleans()),
        min_size=1,
        max_size=12,
    )
)
def test_a_critical_path_is_a_chain_in_time_and_place(drawn):
    rows = [
        work(a, min(s, e), max(s, e)) if local else transfer("peer", (a, b), (min(s, e), max(s, e)))
        for a, b, s, e, local in drawn
    ]
    result = recorded(rows)
    spans = timeline.spans_of(result)
    path = timeline.critical_path(spans, np.arange(len(rows)))
    assert spans.end[path[-1]] == spans.end.max()
    for before, after in pairwise(path):
        assert spans.destination[before] == spans.source[after]
        assert spans.end[before] <= spans.start[after] + 1e-8
    assert len(set(path)) == len(path)


def test_a_network_off_the_critical_path_is_said_so():
    result = recorded([work(0, 0.0, 9.999), transfer("up", (0, SERVER), (9.999, 10.0))])
    run = RunResult("r", 1, {"s": result})
    [note] = timeline.timeline_notes(timeline.timelines(run))
    assert note.startswith("s: the network is not on the critical path; transfers take 0.0 %")
    assert (
        timeline.timeline_notes(timeline.timelines(RunResult("r", 1, {"s": recorded(ROUND)}))) == []
    )


def test_utilisation_counts_what_a_link_could_have_carried():
    links = [
        link("steady", carried_bytes=5_000, busy_time=6.0),
        link("halved", carried_bytes=5_000, change_times=[0, 5], change_rates_bps=[8e3, 0.0]),
        link("unlimited", bandwidth_bps=math.inf, carried_bytes=10.0),
        link("later", carried_bytes=5_000, change_times=[0, 50], change_rates_bps=[8e3, 0.0]),
    ]
    uses = {use.link: use for use in timeline.link_uses(recorded(ROUND, links=links))}
    assert list(uses) == ["halved", "steady", "later", "unlimited"]
    assert uses["steady"].utilisation == pytest.approx(0.5)
    assert uses["steady"].busy == pytest.approx(0.6)
    assert uses["halved"].utilisation == pytest.approx(1.0)
    assert uses["unlimited"].utilisation is None
    assert uses["later"].utilisation == pytest.approx(0.5)


def test_strips_show_the_mean_rate_of_each_bin_and_only_links_that_change():
    links = [
        link("a-10", change_times=[0, 2.5], change_rates_bps=[8e3, 0.0]),
        link("a-9", change_times=[0, 5, 7.5], change_rates_bps=[0.0, 4e3, 2e3]),
        link("still"),
    ]
    run = RunResult("r", 1, {"s": recorded(ROUND, links=links)})
    states = timeline.link_states(run, max_links=5, bins=2)
    assert (states.links, states.until, states.changing) == (["a-9", "a-10"], 10.0, 2)
    assert states.level == pytest.approx(np.array([[0.0, 0.75], [0.5, 0.0]]))
    assert (
        timeline.link_states(RunResult("r", 1, {"s": recorded(ROUND)}), max_links=5, bins=2) is None
    )


def test_rounds_worth_a_picture_are_few_and_say_why():
    ends = [(0, 2), (2, 3), (3, 9), (9, 10), (10, 13)]
    paths = [timeline.RoundPath(1, start, end, [], 0, 0, None, None) for start, end in ends]
    chosen = timeline.telling_rounds(paths)
    assert chosen == {2: "slowest", 0: "median", 4: "last"}
    assert timeline.telling_rounds(paths[:1]) == {0: "slowest"}
    assert timeline.telling_rounds([]) == {}


def test_a_picture_of_a_round_shows_the_last_nodes_whole():
    spans = timeline.spans_of(recorded([*ROUND, work(4, 0.0, 0.5), work(5, 0.0, 0.1)]))
    path = timeline.RoundPath(1, 0.0, 10.0, [], 0, 0, None, None)

    def shown(max_nodes: int, max_spans: int) -> dict[int, int]:
        rows, nodes = timeline.node_rows(spans, path, max_nodes=max_nodes, max_spans=max_spans)
        assert nodes == 4
        return {node: len(members) for node, members in rows.items()}

    assert shown(9, 99) == {0: 3, 1: 3, 4: 1, 5: 1}
    assert shown(3, 99) == {0: 3, 1: 3, 4: 1}
    assert shown(9, 5) == {0: 3}
    assert shown(9, 2) == {0: 2}


def test_the_trace_holds_rounds_work_transfers_and_links(tmp_path):
    links = [link("up-0", change_times=[0, 5], change_rates_bps=[8e3, 0.0])]
    run = RunResult("r", 1, {"s": recorded(ROUND, links=links)})
    path = tmp_path / "trace.json"
    write_chrome_trace(path, trace_events(run))
    events = json.loads(path.read_text())["traceEvents"]
    slices = [(e["cat"], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert ("round", "round 1", 0.0, 10e6) in slices
    assert ("compute", "train", 1e6, 8e6) in slices
    assert ("transfer", "up", 9e6, 1e6) in slices
    assert len(slices) == 7
    assert [e["args"]["Mbit/s"] for e in events if e["ph"] == "C"] == [0.008, 0.0]
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {"rounds", *(f"device {d} {s}" for d in (0, 1) for s in ("in", "work", "out"))}


def test_slices_of_one_thread_never_overlap(tmp_path):
    run = load_run(write_sample(tmp_path, Sample(rounds=5, transfers=True)))
    overlapping = recorded(
        [transfer("peer", (0, d), (0.1 * d, 5.0 - 0.1 * d)) for d in range(1, 5)]
    )
    run.strategies["peer"] = overlapping
    threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in trace_events(run):
        if event["ph"] == "X":
            lane = threads.setdefault((event["pid"], event["tid"]), [])
            lane.append((event["ts"], event["ts"] + event["dur"]))
    assert len(threads) > 60
    for lane in threads.values():
        lane.sort()
        assert all(a[1] <= b[0] + 1e-3 for a, b in pairwise(lane))


def test_without_recorded_transfers_the_trace_has_the_rounds(tmp_path):
    run = load_run(write_sample(tmp_path, Sample(names=("a",), rounds=3)))
    assert [e["name"] for e in trace_events(run) if e["ph"] == "X"] == [
        "round 1", "round 2", "round 3",
    ]  # fmt: skip
    assert timeline.timelines(run) == {}
