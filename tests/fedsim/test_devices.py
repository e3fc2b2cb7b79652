import math
import re
from itertools import pairwise

import numpy as np
import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from fedsim import registry
from fedsim.devices import (
    Always,
    ClassSpeed,
    ConstantSpeed,
    CyclicTimetable,
    DayNight,
    DeviceClass,
    DeviceFleet,
    EnergyCosts,
    Intervals,
    Job,
    LognormalSpeed,
    MarkovTimetable,
    OnOffAvailability,
    RandomSlowdown,
    ScheduledSlowdown,
    StepTrace,
    TraceAvailability,
    TraceSpeed,
    UniformSpeed,
    energy_joules,
    make_fleet,
)
from fedsim.devices.timetables import _mix, toggles_of
from fedsim.errors import ScenarioError
from fedsim.network import star_network
from fedsim.network.exchange import Service, Trip
from fedsim.scenario import load_scenario
from fedsim.simulation import build
from fedsim.streams import mix64
from fedsim.units import ComputeRate

HUNDRED = ConstantSpeed(ComputeRate(100.0))


def fleet_of(n_devices=4, *, seed=1, speed=HUNDRED, **parts):
    return make_fleet(n_devices, seed, speed=speed, **parts)


def during(*intervals, repeat=None, others="always"):
    """Return device 0 there during these intervals."""
    return Intervals(devices={0: list(intervals)}, others=others, repeat=repeat)


def changes_of(timetable, device, end):
    """Return the times of change of a device up to `end`."""
    changes = []
    time = timetable.next_change(device, 0.0)
    while time <= end:
        changes.append(time)
        time = timetable.next_change(device, time)
    return changes


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- speeds -------------------------------------------------------------------------------------


def test_a_speed_in_flops_is_divided_by_the_operations_of_a_sample():
    speed = ConstantSpeed(ComputeRate(6e9, "FLOP/s"))
    fleet = fleet_of(speed=speed, flops_per_sample=3e6)
    assert fleet.speed.tolist() == [2000.0] * 4


def test_a_speed_in_flops_needs_the_operations_of_a_sample():
    with pytest.raises(ScenarioError, match=r"6e\+09 FLOP/s needs the operations"):
        fleet_of(speed=ConstantSpeed(ComputeRate(6e9, "FLOP/s")))


def test_lognormal_speeds_have_their_median_and_spread():
    speed = LognormalSpeed(ComputeRate(500.0), 0.5).start(20_000, 3).mean
    logs = np.log(speed / 500)
    assert abs(logs.mean()) < 3 * 0.5 / math.sqrt(20_000)
    assert logs.std() == pytest.approx(0.5, rel=0.02)


def test_uniform_speeds_lie_between_their_ends():
    speed = UniformSpeed(ComputeRate(10.0), ComputeRate(30.0)).start(20_000, 3).mean
    assert speed.min() >= 10
    assert speed.max() < 30
    assert speed.mean() == pytest.approx(20, abs=3 * 20 / math.sqrt(12 * 20_000))


def test_classes_come_in_their_shares_at_their_speeds():
    model = ClassSpeed(
        {
            "phone": DeviceClass(0.3, ComputeRate(50.0)),
            "laptop": DeviceClass(0.6, ComputeRate(500.0)),
            "server": DeviceClass(0.1, ComputeRate(2e9, "FLOP/s")),
        }
    )
    speed = model.start(20_000, 3, flops_per_sample=1e6).mean
    for value, share in ((50.0, 0.3), (500.0, 0.6), (2000.0, 0.1)):
        error = 3 * math.sqrt(share * (1 - share) / 20_000)
        assert abs(np.mean(speed == value) - share) < error


def test_a_class_may_be_spread():
    model = ClassSpeed({"phone": DeviceClass(1.0, ComputeRate(50.0), sigma=0.4)})
    logs = np.log(model.start(5000, 3).mean / 50)
    assert logs.std() == pytest.approx(0.4, rel=0.05)


@pytest.mark.parametrize(
    "model",
    [
        LognormalSpeed(ComputeRate(500.0)),
        UniformSpeed(ComputeRate(10.0), ComputeRate(30.0)),
        ClassSpeed({c: DeviceClass(0.5, ComputeRate(v)) for c, v in (("a", 1.0), ("b", 2.0))}),
    ],
)
def test_more_devices_leave_the_speeds_of_the_others_alone(model):
    few, many = (model.start(n, 3).mean for n in (10, 1000))
    assert few.tolist() == many[:10].tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LognormalSpeed(ComputeRate(5.0), -1), "sigma is -1"),
        (lambda: UniformSpeed(ComputeRate(5.0), ComputeRate(4.0)), "low is 5, above high, 4"),
        (lambda: UniformSpeed(ComputeRate(5.0), ComputeRate(9.0, "FLOP/s")), "low is in samples/s"),
        (lambda: ClassSpeed({"a": DeviceClass(0.9, ComputeRate(5.0))}), "sum to 1, not to 0.9"),
        (lambda: ClassSpeed({}), "sum to 1, not to 0"),
        (
            lambda: ClassSpeed(
                {"a": DeviceClass(1.5, ComputeRate(5.0)), "b": DeviceClass(-0.5, ComputeRate(5.0))}
            ),
            "0 or more",
        ),
        (lambda: DeviceFleet(np.array([1.0, 0.0])), "above 0"),
        (lambda: DeviceFleet(np.array([1.0, -3.0])), "above 0"),
        (lambda: DeviceFleet(np.array([1.0, math.nan])), "above 0"),
        (lambda: RandomSlowdown(0.0, 1.0, 1.0), "factor is 0"),
        (lambda: RandomSlowdown(1.5, 1.0, 1.0), r"factor is 1\.5"),
        (lambda: RandomSlowdown(0.5, 1.0, 0.0), "mean_slow must be above 0"),
        (lambda: ScheduledSlowdown(0.5, [(5.0, 2.0)]), "5 s to 2 s is no interval"),
        (lambda: ScheduledSlowdown(0.5, [(1.0, 2.0)], repeat=0.0), "repeat must be above 0"),
        (lambda: ScheduledSlowdown(0.5, [(1.0, 2.0)], [9]).start(4, 1), "slowdown of device 9"),
        (lambda: OnOffAvailability(0.0, 1.0), "must be above 0 s"),
        (lambda: DayNight(90.0, 60.0), "below the period, 60 s"),
        (lambda: Intervals(), "one of the two"),
        (lambda: during((3.0, 5.0), (4.0, 6.0)), "device 0: 4 s to 6 s begins before"),
        (lambda: during((3.0, 5.0), repeat=4.0), "ends at 5 s, after the period of 4 s"),
        (lambda: during((3.0, 5.0), others=None).start(3, 1), "device 1 has no intervals"),
        (lambda: Intervals(devices={7: []}, others="always").start(3, 1), "intervals of device 7"),
        (lambda: Intervals(devices={-1: []}, others="always"), "device -1: devices are numbered"),
        (lambda: EnergyCosts(per_sample=1.0, per_flop=1.0), "per_sample or per_flop, not both"),
        (lambda: fleet_of(energy=EnergyCosts(per_flop=1e-9)), "per_flop needs the operations"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ScenarioError, match=message):
        make()


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("speed", {"kind": "constant", "value": "0 samples/s"}, r"x\.value: .*must be above 0"),
        ("speed", {"kind": "constant", "value": "-1 GFLOP/s"}, r"x\.value: .*negative"),
        ("speed", {"kind": "uniform", "low": "5", "high": "6 samples/s"}, r"x\.low: .*no unit"),
        (
            "speed",
            {"kind": "classes", "classes": {"a": {"share": 1.0, "spead": "1 samples/s"}}},
            r"x\.classes\.a\.speed: is missing.*x\.classes\.a\.spead: unknown key",
        ),
        ("speed", {"kind": "trace", "path": "nowhere.csv"}, r"nowhere\.csv: No such file"),
        ("slowdown", {"kind": "randm"}, "did you mean 'random'"),
        ("availability", {"kind": "day_night", "on": "2 d"}, "below the period"),
    ],
)
def test_a_scenario_hears_what_is_wrong_and_where(kind, spec, message):
    _, problems = registry.check(kind, spec, ("x",))
    assert re.search(message, " ".join(map(str, problems)))


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        (
            "speed",
            {
                "kind": "classes",
                "classes": {
                    "phone": {"share": 0.3, "speed": "50 samples/s"},
                    "server": {"share": 0.7, "speed": "2 GFLOP/s", "sigma": 0.1},
                },
            },
        ),
        ("slowdown", {"kind": "scheduled", "factor": 0.5, "periods": [["10 s", "40 s"]]}),
        (
            "availability",
            {"kind": "intervals", "devices": {"3": [["0 s", "10 s"]]}, "others": "never"},
        ),
    ],
)
def test_what_a_scenario_says_survives_being_written_and_read(kind, spec):
    filled, problems = registry.check(kind, spec)
    assert problems == []
    assert registry.check(kind, filled)[0] == filled
    assert registry.build(kind, filled) == registry.build(kind, spec)


# --- traces -------------------------------------------------------------------------------------

pieces = st.lists(
    st.tuples(st.floats(0.01, 50), st.sampled_from([0.0, 0.5, 1.0, 3.0, 700.0])),
    min_size=1,
    max_size=6,
).filter(lambda found: any(value for _, value in found))


def trace_of(found):
    return StepTrace(np.concatenate([[0], np.cumsum([length for length, _ in found])]).tolist(),
                     [value for _, value in found])  # fmt: skip


def summed(found, start, end):
    """Integrate a repeated trace piece by piece."""
    total, time = 0.0, 0.0
    while time < end:
        for length, value in found:
            total += value * max(0.0, min(time + length, end) - max(time, start))
            time += length
    return total


def test_a_trace_integrated_by_hand():
    trace = StepTrace([0.0, 2.0, 3.0, 5.0], [10.0, 0.0, 30.0])
    assert trace.total == 80
    assert trace.mean == 16
    assert trace.integral(1.0, 4.0) == 10 + 0 + 30
    assert trace.integral(4.0, 13.0) == 30 + 80 + (20 + 0)
    assert trace.reach(1.0, 10.0) == 2.0
    assert trace.reach(1.0, 10.5) == pytest.approx(3 + 0.5 / 30, abs=1e-12)
    assert trace.reach(0.0, 160.0) == 10.0
    assert trace.reach(2.5, 0.0) == 2.5


@given(pieces, st.floats(0, 200), st.floats(0, 200))
def test_integrals_of_traces_are_exact(found, start, length):
    trace = trace_of(found)
    exact = summed(found, start, start + length)
    assert trace.integral(start, start + length) == pytest.approx(exact, rel=1e-9, abs=1e-9)


@given(pieces, st.floats(0, 200), st.floats(0, 1e4))
def test_work_ends_when_its_integral_is_reached(found, start, amount):
    trace = trace_of(found)
    end = trace.reach(start, amount)
    assert end >= start
    assert trace.integral(start, end) == pytest.approx(amount, rel=1e-9, abs=1e-7)
    if amount > 1:
        earlier = end - 1e-6 * (1 + end)
        assert trace.integral(start, max(start, earlier)) < amount


def test_a_device_follows_its_speed_trace(tmp_path):
    path = written(tmp_path / "a.csv", "time_s,speed\n0,100\n10,50\n20,0\n30,0\n")
    speed = TraceSpeed(path=path, offset=0.0)
    fleet = fleet_of(1, speed=speed)
    assert fleet.speed.tolist() == [50.0]
    assert fleet.occupy(0, 0.0, 1250.0) == pytest.approx(Job(0.0, 15.0, True), abs=1e-9)
    assert fleet.occupy(0, 1.0, 750.0) == pytest.approx(Job(15.0, 35.0, True), abs=1e-9)


def test_each_device_has_an_offset_in_the_trace(tmp_path):
    path = written(tmp_path / "a.csv", "time_s,speed\n0,100\n10,300\n20,100\n")
    speeds = TraceSpeed(path=path).start(1000, 5)
    offset = speeds.traces.offset
    assert speeds.mean.tolist() == [200.0] * 1000
    assert offset.mean() == pytest.approx(10, abs=3 * 20 / math.sqrt(12 * 1000))
    fleet = DeviceFleet(speeds.mean, traces=speeds.traces)
    for device in range(50):
        end = fleet.occupy(device, 0.0, 2000.0).ended
        found = summed([(10.0, 100.0), (10.0, 300.0)], offset[device], offset[device] + end)
        assert found == pytest.approx(2000, rel=1e-9)


def test_a_trace_can_be_scaled_and_be_in_flops(tmp_path):
    path = written(tmp_path / "a.csv", "time_s,speed\n0,1\n10,3\n20,1\n")
    scaled = TraceSpeed(path=path, mean=ComputeRate(500.0)).start(2, 1)
    assert scaled.mean.tolist() == [500.0, 500.0]
    assert scaled.traces.traces[0].mean == pytest.approx(1)
    in_flops = TraceSpeed(path=path, unit="FLOP/s").start(2, 1, flops_per_sample=4.0)
    assert in_flops.mean.tolist() == [0.5, 0.5]


def test_devices_draw_their_trace_from_a_directory(tmp_path):
    for name, speed in (("a", 10), ("b", 20)):
        written(tmp_path / f"{name}.csv", f"time_s,speed\n0,{speed}\n60,{speed}\n")
    mean = TraceSpeed(path=str(tmp_path)).start(1000, 1).mean
    assert set(mean) == {10.0, 20.0}
    assert np.mean(mean == 10) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("time_s,speed\n", r"no line after the header \(empty\)"),
        ("time,speed\n0,1\n", "line 1: should be 'time_s,speed'"),
        ("time_s,speed\n0,1\n5,2\n5,3\n", r"line 4: time 5 s is not after 5 s \(unsorted\)"),
        ("time_s,speed\n0,1\n5,2\n4,3\n", r"line 4: time 4 s is not after 5 s \(unsorted\)"),
        ("time_s,speed\n0,1\n5,nan\n6,1\n", "line 3: '5,nan' is not finite"),
        ("time_s,speed\n0,1\n5,inf\n6,1\n", "line 3: '5,inf' is not finite"),
        ("time_s,speed\n0,1\n5,\n6,1\n", r"line 3: '5,' should be 2 values \(a gap\)"),
        ("time_s,speed\n0,1\n\n6,1\n", r"line 3: '' should be 2 values \(a gap\)"),
        ("time_s,speed\n0,1\n5,fast\n", "line 3: '5,fast' is not 2 numbers"),
        ("time_s,speed\n0,1\n5,-2\n6,1\n", "line 3: speed is -2; it must be 0 or more"),
        ("time_s,speed\n1,1\n5,2\n", "line 2: a trace begins at time 0, not at 1 s"),
        ("time_s,speed\n0,1\n", "two lines of values"),
        ("time_s,speed\n0,0\n5,0\n", "the speed is 0 all the time"),
    ],
)
def test_a_bad_trace_is_an_error_with_file_line_and_reason(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    if text is not None:
        written(path, text)
    with pytest.raises(ScenarioError, match=rf"bad\.csv.*{message}"):
        TraceSpeed(path=str(path))


def test_a_directory_without_traces_is_an_error(tmp_path):
    with pytest.raises(ScenarioError, match=r"no \*\.csv in this directory"):
        TraceSpeed(path=str(tmp_path))


# --- slow-downs ---------------------------------------------------------------------------------


def test_a_scheduled_slowdown_stretches_the_work_that_it_meets():
    slowdown = ScheduledSlowdown(0.5, [(10.0, 20.0), (30.0, 40.0)], devices=[0])
    fleet = fleet_of(slowdown=slowdown)
    assert fleet.occupy(0, 0.0, 2000.0) == Job(0.0, 25.0, True)
    assert fleet.occupy(1, 0.0, 2000.0) == Job(0.0, 20.0, True)
    assert fleet.occupy(0, 5.0, 1000.0) == Job(25.0, 40.0, True)


def test_a_slowdown_that_repeats():
    fleet = fleet_of(slowdown=ScheduledSlowdown(0.25, [(0.0, 4.0)], repeat=8.0))
    assert fleet.occupy(0, 0.0, 1000.0).ended == pytest.approx(16.0, abs=1e-9)


def test_random_slowdowns_last_their_share_of_time():
    model = RandomSlowdown(0.1, mean_normal=30.0, mean_slow=10.0)
    fleet = fleet_of(200, slowdown=model)
    work = 1e5 * np.ones(200)
    ended = np.array([fleet.occupy(i, 0.0, work[i]).ended for i in range(200)])
    rate = 0.75 + 0.25 * 0.1
    assert ended.mean() == pytest.approx(1000 / rate, rel=0.02)


def test_a_slowdown_multiplies_a_trace(tmp_path):
    path = written(tmp_path / "a.csv", "time_s,speed\n0,100\n10,50\n20,0\n")
    fleet = fleet_of(
        1,
        speed=TraceSpeed(path=path, offset=0.0),
        slowdown=ScheduledSlowdown(0.5, [(5.0, 15.0)]),
    )
    # 5 s at 100, 5 at 50, 5 at 25, 5 at 50; then from the beginning at 100
    assert fleet.occupy(0, 0.0, 1125.0).ended == pytest.approx(20.0, abs=1e-9)
    assert fleet.occupy(0, 0.0, 300.0).ended == pytest.approx(23.0, abs=1e-9)


# --- who is there -------------------------------------------------------------------------------


def test_an_event_of_one_device_hashes_as_those_of_many():
    words = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    assert [_mix(int(word)) for word in words] == mix64(words).tolist()


def test_everybody_is_always_there_by_default():
    fleet = fleet_of(availability=Always())
    assert fleet.available(3.0).tolist() == [0, 1, 2, 3]
    assert fleet.next_change(0.0) == math.inf


@pytest.mark.parametrize(("mean_on", "mean_off"), [(30.0, 10.0), (5.0, 50.0), (20.0, 20.0)])
def test_devices_are_there_for_their_share_of_time(mean_on, mean_off):
    """The time average over T has the variance 2 p (1 - p) τ / T, with τ = UV / (U + V)."""
    n_devices, end = 100, 2000.0
    timetable = OnOffAvailability(mean_on, mean_off).start(n_devices, 11)
    there = 0.0
    for device in range(n_devices):
        times = [0.0, *changes_of(timetable, device, end), end]
        is_on = timetable.is_on(device, 0.0)
        there += sum(b - a for k, (a, b) in enumerate(pairwise(times)) if (k % 2 == 0) == is_on)
    share = mean_on / (mean_on + mean_off)
    tau = mean_on * mean_off / (mean_on + mean_off)
    error = math.sqrt(2 * share * (1 - share) * tau / (end * n_devices))
    assert abs(there / (end * n_devices) - share) < 3 * error


def test_devices_begin_in_their_long_run_state():
    timetable = OnOffAvailability(30.0, 10.0).start(20_000, 2)
    everybody = np.arange(20_000)
    for time in (0.0, 3.0, 1e6):
        share = timetable.is_on(everybody, time).mean()
        assert abs(share - 0.75) < 3 * math.sqrt(0.75 * 0.25 / 20_000)


def test_sojourns_are_exponential():
    timetable = MarkovTimetable(40, 5, "test", 8.0, 3.0)
    stays = {True: [], False: []}
    for device in range(40):
        for start, end in pairwise(changes_of(timetable, device, 1000.0)):
            stays[timetable.is_on(device, start)].append(end - start)
    for is_on, mean in ((True, 8.0), (False, 3.0)):
        found = np.sort(stays[is_on])
        n = len(found)
        assert abs(found.mean() - mean) < 3 * mean / math.sqrt(n)
        law = 1 - np.exp(-found / mean)
        distance = np.max(np.abs(law - (np.arange(n) + 0.5) / n))
        assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, 0.1 %


def test_devices_come_and_go_by_themselves():
    """States of two devices, and of one device at two seeds, are uncorrelated."""
    times = np.arange(0.0, 40_000.0, 100.0)
    first, second = (OnOffAvailability(10.0, 10.0).start(2, seed) for seed in (1, 2))
    series = [
        [t.is_on(i, time) for time in times] for t, i in ((first, 0), (first, 1), (second, 0))
    ]
    correlation = np.corrcoef(np.array(series, float))[np.triu_indices(3, 1)]
    assert np.abs(correlation).max() < 4 / math.sqrt(len(times))


TIMETABLES = {
    "on_off": lambda seed: OnOffAvailability(3.0, 1.5).start(20, seed),
    "rare": lambda seed: OnOffAvailability(0.5, 20.0).start(20, seed),
    "day_night": lambda seed: DayNight(8.0, 24.0).start(20, seed),
    "one day": lambda seed: DayNight(8.0, 24.0, phase=3.0).start(20, seed),
    "intervals": lambda seed: Intervals(
        devices={3: [(0.0, 2.0), (5.0, 9.0)], 4: [], 7: [(1.0, 10.0)]}, others="always", repeat=10.0
    ).start(20, seed),
    "once": lambda seed: during((1.0, 2.0), (2.0, 4.5), others="never").start(20, seed),
}


@pytest.mark.parametrize("name", TIMETABLES)
@given(
    seed=st.integers(0, 10),
    queries=st.lists(
        st.tuples(st.integers(0, 19), st.floats(0, 500), st.booleans()), min_size=1, max_size=12
    ),
)
def test_answers_do_not_depend_on_what_was_asked_before(name, seed, queries):
    """One device or all at once, in any order of time and device."""
    timetable = TIMETABLES[name](seed)
    everybody = np.arange(20)
    for device, time, is_change in queries:
        ask = "next_change" if is_change else "is_on"
        fresh = getattr(TIMETABLES[name](seed), ask)
        expected = fresh(device, time)
        assert getattr(timetable, ask)(device, time) == expected
        assert fresh(everybody, time)[device] == expected


@pytest.mark.parametrize("name", TIMETABLES)
@given(seed=st.integers(0, 10), device=st.integers(0, 19), time=st.floats(0, 1e5))
def test_states_alternate_at_the_changes(name, seed, device, time):
    timetable = TIMETABLES[name](seed)
    for _ in range(5):
        change = timetable.next_change(device, time)
        is_on = timetable.is_on(device, time)
        if change == math.inf:
            assert timetable.is_on(device, time + 1e6) == is_on
            return
        assert change > time
        assert timetable.is_on(device, np.nextafter(change, 0)) == is_on
        assert timetable.is_on(device, change) != is_on
        time = change


@pytest.mark.parametrize("name", ["on_off", "day_night"])
def test_the_state_between_changes_is_the_same(name):
    timetable = TIMETABLES[name](4)
    rng = np.random.default_rng(1)
    for time in rng.uniform(0, 300, 200):
        change, is_on = timetable.next_change(2, time), timetable.is_on(2, time)
        between = rng.uniform(time, change, 5)
        assert all(timetable.is_on(2, each) == is_on for each in between)


def test_other_devices_do_not_change_a_device():
    few, many = (OnOffAvailability(30.0, 10.0).start(n, 3) for n in (2, 500))
    assert changes_of(few, 1, 500.0) == changes_of(many, 1, 500.0)


def test_day_and_night_repeat_with_a_phase():
    timetable = DayNight(8.0, 24.0, phase=3.0).start(2, 1)
    assert changes_of(timetable, 0, 60.0) == [5.0, 21.0, 29.0, 45.0, 53.0]
    assert timetable.is_on(0, 0.0)


def test_phases_of_days_differ_between_devices():
    timetable = DayNight(6.0, 24.0).start(10_000, 1)
    everybody = np.arange(10_000)
    for time in (0.0, 7.0, 1000.0):
        share = timetable.is_on(everybody, time).mean()
        assert abs(share - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 10_000)


def test_a_million_devices_are_told_apart_without_a_history_each():
    fleet = make_fleet(1_000_000, 3, speed=HUNDRED, availability=OnOffAvailability(60.0, 20.0))
    there = fleet.available(1e5)
    assert len(there) / 1e6 == pytest.approx(0.75, abs=0.002)
    assert fleet.is_available(int(there[5]), 1e5)
    kept = [value for value in vars(fleet.timetable).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in kept) == 8_000_000


def test_availability_follows_a_recording(tmp_path):
    path = written(tmp_path / "a.csv", "time_s,available\n0,1\n3,0\n4,0\n9,1\n10,0\n")
    timetable = TraceAvailability(path, offset=0.0).start(2, 1)
    assert changes_of(timetable, 1, 25.0) == [3.0, 9.0, 13.0, 19.0, 23.0]
    shifted = TraceAvailability(path, offset=2.0).start(2, 1)
    assert changes_of(shifted, 1, 10.0) == [1.0, 7.0]
    share = TraceAvailability(path).start(4000, 1).is_on(np.arange(4000), 77.0).mean()
    assert share == pytest.approx(0.4, abs=0.025)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time_s,available\n0,1\n3,0.5\n9,1\n", "available is 0.5; it is 0 or 1"),
        ("time_s,available\n0,0\n3,0\n", "nobody is ever available"),
        ("time_s,speed\n0,1\n3,0\n", "line 1: should be 'time_s,available'"),
    ],
)
def test_a_bad_recording_of_availability_is_an_error(tmp_path, text, message):
    with pytest.raises(ScenarioError, match=message):
        TraceAvailability(written(tmp_path / "a.csv", text))


def test_intervals_come_from_a_file_or_the_scenario(tmp_path):
    path = written(tmp_path / "a.csv", "device,start_s,end_s\n2,0,5\n0,1,2\n2,7,9\n")
    read = Intervals(path=path, others="never").start(3, 1)
    said = Intervals(devices={2: [(0.0, 5.0), (7.0, 9.0)], 0: [(1.0, 2.0)]}, others="never")
    said = said.start(3, 1)
    for device, changes in ((0, [1.0, 2.0]), (1, []), (2, [5.0, 7.0, 9.0])):
        assert changes_of(read, device, 100.0) == changes
        assert changes_of(said, device, 100.0) == changes
    assert [read.is_on(i, 0.0) for i in range(3)] == [False, False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("device,start_s,end_s\n0,5,7\n0,2,3\n", r"line 3: .*7 s \(unsorted or overlapping\)"),
        ("device,start_s,end_s\n0,5,5\n", "line 2: 5 s to 5 s is no interval"),
        ("device,start_s,end_s\n0.5,5,6\n", "line 2: 0.5 is no device"),
        ("device,start_s,end_s\n0,nan,6\n", "line 2: '0,nan,6' is not finite"),
        ("device,start_s,end_s\n0,3\n", r"line 2: '0,3' should be 3 values"),
    ],
)
def test_a_bad_file_of_intervals_is_an_error(tmp_path, text, message):
    with pytest.raises(ScenarioError, match=rf"a\.csv.*{message}"):
        Intervals(path=written(tmp_path / "a.csv", text), others="always")


def test_intervals_that_meet_make_no_change():
    assert toggles_of([(0.0, 3.0), (3.0, 5.0)], 10.0, "") == (True, [5.0, 10.0])
    assert toggles_of([(0.0, 3.0), (8.0, 10.0)], 10.0, "") == (True, [3.0, 8.0])
    assert toggles_of([(0.0, 10.0)], 10.0, "") == (True, [])
    assert toggles_of([(2.0, math.inf)], math.inf, "") == (False, [2.0])
    always = CyclicTimetable([(True, [])], 10.0, np.zeros(1, np.int64))
    assert always.next_change(0, 5.0) == math.inf


# --- jobs ---------------------------------------------------------------------------------------


def test_jobs_wait_for_their_turn():
    fleet = fleet_of()
    assert fleet.occupy(0, 0.0, 100.0) == Job(0.0, 1.0, True)
    assert fleet.occupy(0, 0.5, 50.0) == Job(1.0, 1.5, True)
    assert fleet.occupy(1, 0.5, 50.0) == Job(0.5, 1.0, True)
    assert fleet.occupy(0, 3.0, 0.0) == Job(3.0, 3.0, True)


def test_a_paused_job_goes_on_when_its_device_comes_back():
    fleet = fleet_of(availability=during((0.0, 10.0), (15.0, 17.0), (20.0, 90.0)))
    assert fleet.occupy(0, 5.0, 800.0) == Job(5.0, 21.0, True)
    assert fleet.occupy(0, 6.0, 100.0) == Job(21.0, 22.0, True)


def test_a_queued_job_of_a_paused_device_begins_after_its_return():
    fleet = fleet_of(availability=during((0.0, 10.0), (15.0, 99.0)))
    assert fleet.occupy(0, 5.0, 500.0) == Job(5.0, 10.0, True)
    assert fleet.occupy(0, 6.0, 100.0) == Job(15.0, 16.0, True)


def test_pausing_for_ever_is_dropping():
    fleet = fleet_of(availability=during((0.0, 10.0)))
    assert fleet.occupy(0, 5.0, 800.0) == Job(5.0, 10.0, False)
    started, ended, is_done = fleet.occupy(0, 6.0, 100.0)
    assert math.isnan(started)
    assert (ended, is_done) == (10.0, False)


def test_a_device_that_drops_its_work_loses_all_and_comes_back_idle():
    fleet = fleet_of(availability=during((0.0, 10.0), (15.0, 99.0)), on_leave="drop")
    assert fleet.occupy(0, 1.0, 500.0) == Job(1.0, 6.0, True)
    assert fleet.occupy(0, 2.0, 800.0) == Job(6.0, 10.0, False)
    started, ended, is_done = fleet.occupy(0, 3.0, 100.0)
    assert math.isnan(started)
    assert (ended, is_done) == (10.0, False)
    assert fleet.occupy(0, 16.0, 100.0) == Job(16.0, 17.0, True)


def test_a_job_that_ends_as_its_device_leaves_is_done():
    fleet = fleet_of(availability=during((0.0, 10.0)), on_leave="drop")
    assert fleet.occupy(0, 5.0, 500.0) == Job(5.0, 10.0, True)


@given(
    seed=st.integers(0, 100),
    on_leave=st.sampled_from(["pause", "drop"]),
    jobs=st.lists(st.tuples(st.integers(0, 3), st.floats(0, 9), st.floats(0, 2000)), max_size=12),
)
def test_a_device_does_one_job_at_a_time_while_it_is_there(seed, on_leave, jobs):
    fleet = fleet_of(
        seed=seed,
        availability=OnOffAvailability(6.0, 3.0),
        slowdown=RandomSlowdown(0.5, 4.0, 4.0),
        on_leave=on_leave,
    )
    last, now = np.zeros(4), 0.0
    for device, wait, samples in jobs:
        now += wait
        if not fleet.is_available(device, now):
            continue
        started, ended, is_done = fleet.occupy(device, now, samples)
        assert is_done or on_leave == "drop"
        if is_done:
            assert started >= max(now, last[device])
            assert ended - started >= samples / 100 - 1e-9
            assert fleet.is_available(device, started)
        else:
            assert not fleet.is_available(device, ended)
        if on_leave == "drop":
            assert fleet.timetable.next_change(device, now) >= ended
        last[device] = ended


@given(
    seed=st.integers(0, 50),
    work=st.floats(1, 5000),
    on=st.lists(st.floats(0.5, 20), min_size=2, max_size=6),
)
def test_the_work_done_while_there_is_the_work_asked_for(seed, work, on):
    """Integrate slow-downs and presence by a fine grid of their own changes."""
    edges = np.cumsum(on)
    stays = [(0.0, edges[0]), *zip(edges[1::2], [*edges[2::2], 1e6], strict=False)]  # or no 1e6
    fleet = fleet_of(seed=seed, availability=during(*stays), slowdown=RandomSlowdown(0.3, 5.0, 2.0))
    job = fleet.occupy(0, 0.0, work)
    slow = RandomSlowdown(0.3, 5.0, 2.0).start(4, seed).is_slow
    grid = {0.0, job.ended, *(time for stay in stays for time in stay)}
    grid = sorted(t for t in grid | set(changes_of(slow, 0, job.ended)) if t <= job.ended)
    done = 0.0
    for start, end in pairwise(grid):
        middle = (start + end) / 2
        if fleet.is_available(0, middle):
            done += (end - start) * (30.0 if slow.is_on(0, middle) else 100.0)
    if job.is_done:
        assert done == pytest.approx(work, rel=1e-9)
    else:
        assert job.ended == pytest.approx(stays[-1][1])  # it left for good
        assert done < work


# --- trips --------------------------------------------------------------------------------------


def trip_through(fleet, *, pushed=0.0, samples=500.0):
    """Serve one instruction over links of 1000 bit/s and return its trip."""
    env = simpy.Environment(pushed)
    n = len(fleet)
    rate = np.full(n, 1000.0)
    network = star_network(env, uplink_bps=rate, downlink_bps=rate, latency=0.0)
    trip = Trip("1", 0, "train", pushed, samples=samples, bytes_down=125)
    Service(network, fleet, lambda _: 250, lambda _: None).serve(trip)
    env.run()
    return trip


def test_a_trip_ends_when_its_device_drops_the_work():
    trip = trip_through(fleet_of(availability=during((0.0, 4.0), (5.0, 99.0)), on_leave="drop"))
    assert (trip.outcome, trip.received, trip.started, trip.finished) == (
        "failed-device",
        1.0,
        1.0,
        4.0,
    )
    assert math.isnan(trip.computed)
    assert trip.is_lost
    assert trip.bytes_up == 0


def test_a_trip_waits_for_a_device_that_pauses():
    trip = trip_through(fleet_of(availability=during((0.0, 4.0), (5.0, 99.0))))
    assert (trip.outcome, trip.computed, trip.finished) == ("ok", 7.0, 9.0)


def test_a_trip_to_a_device_that_never_comes_back_ends():
    trip = trip_through(fleet_of(availability=during((0.0, 4.0))))
    assert (trip.outcome, trip.finished) == ("failed-device", 4.0)


def test_a_message_that_arrives_while_the_device_is_away_is_lost():
    trip = trip_through(fleet_of(availability=during((0.0, 0.5), (5.0, 99.0))))
    assert (trip.outcome, trip.finished) == ("offline", 1.0)


# --- energy -------------------------------------------------------------------------------------


def test_energy_adds_up_work_and_bytes():
    costs = EnergyCosts(per_flop=1e-9, per_byte_sent=2e-6, per_byte_received=1e-6)
    found = energy_joules(
        costs,
        samples=np.array([10.0, 0.0]),
        sent_bytes=np.array([1e6, 0.0]),
        received_bytes=np.array([0.0, 3e6]),
        flops_per_sample=1e6,
    )
    assert found == pytest.approx([0.01 + 2.0, 3.0])


def test_energy_is_not_counted_unless_asked_for():
    fleet = fleet_of()
    fleet.count_bytes(0, sent=5)
    assert fleet.energy(10.0) is None


def test_energy_of_a_trip_counts_when_it_is_spent():
    costs = EnergyCosts(per_sample=0.01, per_byte_sent=0.002, per_byte_received=0.001)
    fleet = fleet_of(energy=costs)
    trip_through(fleet)
    assert fleet.energy(5.9)[0] == pytest.approx(0.125 + 0.5)  # bytes; the work ends at 6 s
    assert fleet.energy(6.0).tolist() == pytest.approx([0.125 + 0.5 + 5.0, 0, 0, 0])


def test_dropped_work_costs_what_was_done_of_it():
    fleet = fleet_of(
        availability=during((0.0, 4.0), (5.0, 99.0)),
        on_leave="drop",
        slowdown=ScheduledSlowdown(0.5, [(2.0, 3.0)]),
        energy=EnergyCosts(per_sample=1.0),
    )
    fleet.occupy(0, 1.0, 1e4)
    fleet.occupy(0, 1.5, 1e4)
    assert fleet.energy(3.9).sum() == 0
    assert fleet.energy(4.0)[0] == pytest.approx(250.0)


# --- scenarios ----------------------------------------------------------------------------------

SCENARIO = """\
rounds: 3
data: {dataset: digits, devices: 8}
model: softmax
devices:
  speed: {kind: constant, value: 400 kFLOP/s}
  slowdown: {kind: scheduled, factor: 0.5, periods: [[0 s, 1 min]]}
  availability: {kind: on_off, mean_on: 20 s, mean_off: 10 s}
  on_leave: drop
  energy: {per_flop: 1 nJ, per_byte_sent: 2 uJ}
topology: {kind: star, bandwidth: 1 Mbit/s}
round_timeout: 1 min
strategies: {linear: {kind: fedavg, min_available_nodes: 2, min_train_nodes: 2}}
"""


def test_a_scenario_says_all_of_a_fleet(tmp_path):
    simulation = build(load_scenario(written(tmp_path / "a.yaml", SCENARIO)))
    flops = 3 * 2 * 64 * 10  # forward and backward of a 64 × 10 matrix
    assert simulation.fleet.speed == pytest.approx(np.full(8, 400e3 / flops))
    simulation.grid.trips = trips = []
    simulation.run()
    assert {trip.outcome for trip in trips} >= {"ok", "failed-device"}
    slow = next(trip for trip in trips if trip.outcome == "ok" and trip.computed < 60)
    assert slow.computed - slow.started == pytest.approx(slow.samples / 0.5 / (400e3 / flops))
    work = sum(trip.samples for trip in trips if trip.outcome == "ok") * flops * 1e-9
    sent = sum(trip.bytes_up for trip in trips) * 2e-6
    assert simulation.fleet.energy(simulation.env.now).sum() >= work + sent - 1e-9
