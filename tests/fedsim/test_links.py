import math
from itertools import pairwise
from math import inf

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedsim import registry
from fedsim.errors import NetworkError, ScenarioError
from fedsim.network import (
    Correlated,
    Failure,
    GilbertElliott,
    Mobility,
    OnOff,
    Redraw,
    Scheduled,
    Sinusoid,
    Trace,
    read_trace,
)
from fedsim.network.failures import windows
from fedsim.network.links import Burst, LinkEnds
from fedsim.network.mobility import ContactHistory, Leg, Track, crossings

TRACE = "time_s,bandwidth_bps\n0,1000\n2,0\n3,0\n5,4000\n6,1\n"


@pytest.fixture
def trace_file(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


MODELS = {
    "on_off": OnOff(mean_up=3.0, mean_down=1.0),
    "fixed": OnOff(mean_up=3.0, mean_down=1.0, sojourn="fixed"),
    "gilbert_elliott": GilbertElliott(mean_good=2.0, mean_bad=1.0, loss_bad=0.5, scale_bad=0.1),
    "sinusoid": Sinusoid(period=24.0, amplitude=0.9, phase="random", steps=7),
    "correlated": Correlated(mean_up=3.0, mean_down=1.0, cells=2),
    "redraw": Redraw(density=0.4, period=2.5),
    "waypoint": Mobility(range=300.0, side=400.0, speed_min=20.0, speed_max=90.0, pause=1.0),
    "gauss_markov": Mobility(
        range=250.0, side=400.0, motion="gauss_markov", speed=60.0, rate="path_loss"
    ),
}


def steps(history, end):
    """Return [(time, state)] by following the changes."""
    found = [(0.0, history.state_at(0.0))]
    while (time := history.next_change(found[-1][0])) < end:
        found.append((time, history.state_at(time)))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_histories_depend_on_seed_and_name_only_not_on_what_was_asked(name):
    model, link = MODELS[name], LinkEnds("3-8", 3, 8)
    expected = steps(model.bind(5, link), 60.0)
    assert len(expected) > 3
    times = [time for time, _ in expected]
    assert times == sorted(set(times))
    other = model.bind(5, LinkEnds("3-8", 3, 8))
    for time, state in reversed(expected):
        assert other.state_at(time) == state
    for (time, state), (after, _) in pairwise(expected):
        assert other.state_at((time + after) / 2) == state
        assert other.next_change((time + after) / 2) == after
    assert steps(model.bind(6, LinkEnds("3-8", 3, 8)), 60.0) != expected


@pytest.mark.parametrize("sojourn", ["exponential", "fixed"])
def test_on_off_availability_is_the_share_of_mean_up(sojourn):
    # 3 standard errors; for exponential sojourns the variance over T is 2 U²D² / (U+D)³ / T.
    n_links, horizon, up, down = 50, 4000.0, 6.0, 2.0
    share = []
    for k in range(n_links):
        history = OnOff(mean_up=up, mean_down=down, sojourn=sojourn).bind(1, LinkEnds(str(k), 0, 1))
        found = [*steps(history, horizon), (horizon, None)]
        share.append(sum(b - a for (a, s), (b, _) in pairwise(found) if s.is_up) / horizon)
    error = math.sqrt(2 * up**2 * down**2 / (up + down) ** 3 / horizon / n_links)
    assert np.mean(share) == pytest.approx(up / (up + down), abs=3 * error)


def test_on_off_begins_in_the_stationary_state_or_as_told():
    def first(k, **kw):
        model = OnOff(mean_up=1.0, mean_down=3.0, **kw)
        return model.bind(2, LinkEnds(str(k), 0, 1)).state_at(0.0).is_up

    assert np.mean([first(k) for k in range(2000)]) == pytest.approx(0.25, abs=0.03)
    assert all(first(k, initial="up") for k in range(20))
    assert not any(first(k, initial="down") for k in range(20))


def test_gilbert_elliott_in_time_has_the_stationary_loss_and_mean_burst():
    good, bad, horizon = 4.0, 1.0, 100_000.0
    model = GilbertElliott(mean_good=good, mean_bad=bad, loss_bad=0.3, loss_good=0.01)
    found = [*steps(model.bind(1, LinkEnds("a", 0, 1)), horizon), (horizon, None)]
    spans = [(s.loss, b - a) for (a, s), (b, _) in pairwise(found)]
    bursts = [length for loss, length in spans if loss == 0.3]
    assert np.mean(bursts) == pytest.approx(bad, abs=3 * bad / math.sqrt(len(bursts)))
    error = 0.29 * math.sqrt(2 * good**2 * bad**2 / (good + bad) ** 3 / horizon)
    expected = (good * 0.01 + bad * 0.3) / (good + bad)
    assert sum(loss * length for loss, length in spans) / horizon == pytest.approx(
        expected, abs=3 * error
    )


def test_survival_of_a_burst_chain_equals_a_simulation_of_packets():
    burst = Burst(to_bad=0.02, to_good=0.2, loss_good=0.001, loss_bad=0.3)
    rng, n_messages, n_packets = np.random.default_rng(0), 20_000, 30
    is_bad = rng.random(n_messages) < 0.02 / 0.22
    alive = np.ones(n_messages, dtype=bool)
    for _ in range(n_packets):
        alive &= rng.random(n_messages) >= np.where(is_bad, 0.3, 0.001)
        is_bad ^= rng.random(n_messages) < np.where(is_bad, 0.2, 0.02)
    p = burst.survival(n_packets)
    assert alive.mean() == pytest.approx(p, abs=3 * math.sqrt(p * (1 - p) / n_messages))
    independent = Burst(to_bad=0.5, to_good=0.5, loss_good=0.1, loss_bad=0.1)
    assert independent.survival(12) == pytest.approx(0.9**12)
    assert burst.mean_loss == pytest.approx(0.2 / 0.22 * 0.001 + 0.02 / 0.22 * 0.3)


def test_a_trace_loops_holds_or_ends(trace_file):
    def rates(end, **kw):
        history = Trace(path=str(trace_file), end=end, **kw).bind(0, LinkEnds("a", 0, 1))
        return [(t, s.bandwidth_bps if s.is_up else None) for t, s in steps(history, 13.0)]

    once = [(0.0, 1000.0), (2.0, 0.0), (5.0, 4000.0)]
    assert rates("hold") == once
    assert rates("down") == [*once, (6.0, None)]
    assert rates("loop") == [*once, (6.0, 1000.0), (8.0, 0.0), (11.0, 4000.0), (12.0, 1000.0)]
    assert rates("loop", offset=2.5)[:3] == [(0.0, 0.0), (2.5, 4000.0), (3.5, 1000.0)]
    assert rates("hold", mean=2000.0)[2] == (5.0, 8000.0)


def test_trace_offsets_are_random_but_fixed_for_a_link(trace_file):
    model = Trace(path=str(trace_file), offset="random")
    first = [model.bind(3, LinkEnds(f"{k}", 0, 1)).next_change(0.0) for k in range(20)]
    assert first == [model.bind(3, LinkEnds(f"{k}", 0, 1)).next_change(0.0) for k in range(20)]
    assert len(set(first)) == 20


def test_links_share_the_files_of_a_trace_directory(tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.csv").write_text(f"time_s,bandwidth_bps\n0,{k + 1}\n1,0\n")
    model = Trace(path=str(tmp_path))
    seen = {model.bind(0, LinkEnds(str(k), 0, 1)).state_at(0.0).bandwidth_bps for k in range(40)}
    assert seen == {1.0, 2.0, 3.0}


def test_mahimahi_files_are_read_as_packets_a_bin(tmp_path):
    path = tmp_path / "cell"
    path.write_text("0\n5\n900\n1200\n2000\n")
    trace = read_trace(path)
    assert trace.times == [0.0, 1.0, 2.0]
    assert trace.rates_bps == [3 * 12_000.0, 2 * 12_000.0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ("a,b\n0,1\n", "line 1: should be 'time_s,bandwidth_bps'"),
        ("time_s,bandwidth_bps\n0,1\n", "two lines"),
        (
            "time_s,bandwidth_bps\n0,1\n2,1\n1,1\n",
            r"line 4: time 1 s is not after 2 s \(unsorted\)",
        ),
        ("time_s,bandwidth_bps\n0,1\n0,1\n", r"line 3: .*\(unsorted\)"),
        ("time_s,bandwidth_bps\n0,1\n1,\n2,1\n", r"line 3: a value is missing \(a gap\)"),
        ("time_s,bandwidth_bps\n0,1\n\n2,1\n", r"line 3: a value is missing \(a gap\)"),
        ("time_s,bandwidth_bps\n0,1\n1,nan\n2,1\n", "line 3: '1,nan' is not finite"),
        ("time_s,bandwidth_bps\n0,1\n1,-4\n2,1\n", "line 3: negative bandwidth -4"),
        ("time_s,bandwidth_bps\n0,1\n1,x\n2,1\n", "line 3: '1,x' is not two numbers"),
        ("time_s,bandwidth_bps\n4,1\n5,1\n", "line 2: a trace begins at time 0"),
        ("time_s,bandwidth_bps\n0,1\n1,1\n2,1\n900,1\n", "line 5: a gap of 898 s after 2 s"),
        ("1\n2\nx\n", "line 3: 'x' is not a millisecond"),
    ],
)
def test_a_bad_trace_is_refused_with_file_line_and_reason(tmp_path, text, reason):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=reason) as error:
        Trace(path=str(path))
    assert str(path) in str(error.value)


def test_a_missing_trace_is_refused(tmp_path):
    with pytest.raises(ScenarioError, match=r"nowhere\.csv: No such file"):
        Trace(path=str(tmp_path / "nowhere.csv"))
    with pytest.raises(ScenarioError, match=r"no \*\.csv"):
        Trace(path=str(tmp_path))


def test_a_sinusoid_has_mean_one_over_a_period():
    history = Sinusoid(period=10.0, amplitude=0.8, steps=9).bind(0, LinkEnds("a", 0, 1))
    found = [*steps(history, 10.0 - 1e-9), (10.0, None)]
    assert len(found) == 10
    assert sum(s.scale * (b - a) for (a, s), (b, _) in pairwise(found)) == pytest.approx(10.0)
    assert max(s.scale for _, s in found[:-1]) > 1.7


def test_links_of_one_cell_fail_together():
    shared = {}
    model = Correlated(mean_up=5.0, mean_down=5.0, groups=[[0, 1], [2, 3]])

    def history(a, b):
        return model.bind(4, LinkEnds(f"{a}-{b}", a, b, server=9, shared=shared))

    def up(h):
        return [h.state_at(t).is_up for t in np.arange(0, 200, 0.7)]

    first, second, both = up(history(0, 9)), up(history(2, 9)), up(history(1, 3))
    assert first == up(history(1, 9))
    assert first != second
    assert both == [a and b for a, b in zip(first, second, strict=True)]
    assert history(7, 9) is None


def test_a_round_redraws_links_with_the_density():
    history = Redraw(density=0.3).bind(0, LinkEnds("0-1", 0, 1))
    up = []
    for number in range(3000):
        history.start_round(number)
        up.append(history.state_at(0.0).is_up)
    assert np.mean(up) == pytest.approx(0.3, abs=3 * math.sqrt(0.21 / 3000))
    history.start_round(7)
    assert history.state_at(123.0).is_up == up[7]
    assert history.next_change(0.0) == inf


def test_contacts_of_straight_paths_begin_and_end_at_the_roots():
    moving = Leg(0.0, 100.0, -50.0, 3.0, 1.0, 0.0)
    standing = Leg(0.0, inf, 0.0, 0.0)
    assert crossings(moving, standing, 5.0) == pytest.approx([46.0, 54.0], rel=1e-12)
    assert crossings(moving, standing, 2.9) == []
    assert crossings(moving, moving, 1.0) == []
    tracks = [Track(iter([leg, Leg(leg.end, inf, *leg.at(leg.end))])) for leg in (moving,)]
    history = ContactHistory(tracks[0], Track(iter([standing])), [5.0], [OnOff])
    assert history.state_at(45.9).is_up is False
    assert [history.next_change(0.0), history.next_change(50.0)] == pytest.approx([46.0, 54.0])
    assert history.next_change(60.0) == inf


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.floats(-100, 100)] * 8), st.floats(1, 200))
@example((0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0), 1.0)  # at the radius when the legs begin
def test_at_a_crossing_the_distance_is_the_radius(numbers, radius):
    a, b = Leg(0.0, 50.0, *numbers[:4]), Leg(0.0, 50.0, *numbers[4:])

    def distance(t):
        return math.dist(a.at(t), b.at(t))

    found = crossings(a, b, radius)
    scale = 1 + math.dist(a.at(0), b.at(0)) + 50 * math.hypot(a.vx - b.vx, a.vy - b.vy)
    assert [distance(t) for t in found] == pytest.approx([radius] * len(found), abs=1e-9 * scale)
    sampled = [distance(t) for t in np.linspace(0.0, 50.0, 200)]
    inside = [d < radius for d in sampled if abs(d - radius) > 1e-9 * scale]  # where it is clear
    assert sum(x != y for x, y in pairwise(inside)) <= len(found)


def test_contacts_agree_with_sampled_distances():
    model = MODELS["waypoint"]
    link = LinkEnds("0-1", 0, 1)
    history = model.bind(9, link)
    first, second = link.shared["track", 0], link.shared["track", 1]
    for time in np.linspace(0.01, 500, 3000):
        distance = math.dist(first.position(time), second.position(time))
        if abs(distance - model.range) > 1e-6:
            assert history.state_at(time).is_up == (distance < model.range)


def test_mobile_nodes_stay_in_the_square_and_the_server_in_its_middle():
    for name in ("waypoint", "gauss_markov"):
        track = MODELS[name].track(1, 0)
        for time in np.linspace(0, 300, 1000):
            assert all(-1e-6 <= c <= 400 + 1e-6 for c in track.position(time))
    assert MODELS["waypoint"].track(1, 5, is_server=True).position(77.0) == (200.0, 200.0)


def test_waypoints_begin_in_the_stationary_distribution():
    # Navidi and Camp: the middle of the square is fuller than its rim, from the first moment on.
    model = Mobility(range=1.0, side=1.0, speed_min=0.1, speed_max=1.0)

    def share(time):
        at = np.array([model.track(0, node).position(time) for node in range(2000)])
        return np.mean(np.abs(at - 0.5).max(axis=1) < 0.25)

    assert share(0.0) == pytest.approx(share(30.0), abs=0.05)
    assert share(0.0) > 0.3


def test_rates_fall_with_distance_in_levels_up_to_the_range():
    model = Mobility(range=100.0, rate="path_loss", levels=4)
    radii, states = model.rings()
    assert radii == sorted(radii)
    assert radii[-1] == pytest.approx(100.0)
    assert [state.scale for state in states] == [1.0, 0.75, 0.5, 0.25]


def test_nodes_that_never_part_do_not_stop_the_search_for_a_change():
    history = Mobility(range=10_000.0).bind(0, LinkEnds("0-1", 0, 1))
    time = history.next_change(0.0)
    assert 0 < time < inf
    assert history.state_at(time).is_up


def test_windows_of_failures_are_merged():
    spans = [(5.0, 8.0), (1.0, 2.0), (7.0, 9.0), (2.0, 3.0)]
    failures = [Failure(link="a", start=a, end=b) for a, b in spans]
    assert windows(failures) == [(1.0, 3.0), (5.0, 9.0)]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OnOff(mean_up=0.0, mean_down=1.0), "must be positive"),
        (lambda: GilbertElliott(mean_good=1.0), "give mean_good and mean_bad, or"),
        (lambda: GilbertElliott(to_bad=0.5, to_good=2.0), "to_good"),
        (lambda: GilbertElliott(mean_good=1.0, mean_bad=1.0, loss_bad=1.0), "below 1"),
        (lambda: Sinusoid(amplitude=2.0), "amplitude within 0 and 1"),
        (lambda: Correlated(mean_up=1.0, mean_down=1.0), "either cells"),
        (lambda: Redraw(density=1.5), "density"),
        (lambda: Mobility(range=0.0), "range must be positive"),
        (lambda: Mobility(range=1.0, memory=1.0), "memory"),
        (lambda: Failure(start=1.0), "one of link, node and parts; this one has 0"),
        (lambda: Failure(node=1, start=5.0, end=5.0), "must end after its start"),
        (lambda: Failure(parts=[[1, 2], [2]]), "without common nodes"),
    ],
)
def test_impossible_models_are_refused(make, reason):
    with pytest.raises((ScenarioError, NetworkError), match=reason):
        make()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            {"kind": "links:OnOff", "mean_up": "1 min", "mean_down": "20 s"},
            OnOff(mean_up=60.0, mean_down=20.0),
        ),
        (
            {"kind": "links:GilbertElliott", "to_bad": 0.1, "to_good": 0.5, "loss_bad": 0.2},
            GilbertElliott(to_bad=0.1, to_good=0.5, loss_bad=0.2),
        ),
        ({"kind": "links:Sinusoid", "phase": "random"}, Sinusoid(phase="random")),
        (
            {"kind": "links:Correlated", "mean_up": "1 h", "mean_down": "5 s", "groups": [[1, 2]]},
            Correlated(mean_up=3600.0, mean_down=5.0, groups=[[1, 2]]),
        ),
        ({"kind": "links:Redraw", "density": 0.5, "period": "9 s"}, Redraw(density=0.5, period=9)),
        ({"kind": "mobility:Mobility", "range": 9.0, "pause": "2 s"}, Mobility(range=9.0, pause=2)),
        (
            {"kind": "failures:Scheduled", "failures": [{"link": "up-3", "start": "10 s"}]},
            Scheduled(failures=[Failure(link="up-3", start=10.0)]),
        ),
    ],
)
def test_models_can_be_written_in_a_scenario(spec, expected):
    assert registry.build("link", spec | {"kind": f"fedsim.network.{spec['kind']}"}) == expected
