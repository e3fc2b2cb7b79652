from pathlib import Path

import pandas as pd
import pytest

from fedsim.document import read_document
from fedsim.errors import ScenarioError
from fedsim.whatif import COLUMNS, evaluate_study, read_study, run_study, study_table
from fedsim.whatif.drawing import draw_topology, layout_of
from fedsim.whatif.study import build_topology
from topologies.collectives import ring
from topologies.families import FAMILIES
from topologies.schedules import to_json

SCENARIOS = Path(__file__).parents[3] / "scenarios/whatif"
SMALL = {
    "topologies": [
        {"kind": "bcube", "n": 3, "k": 2},
        {"kind": "fat_tree", "ports": 4, "devices": 9},
    ],
    "collectives": ["bml", "ring", "ps_colocated"],
    "payloads": ["lenet5", "vgg19", "100 MB"],
    "bandwidth": ["1 Gbit/s", "10 Gbit/s"],
    "latency": "20 us",
    "compute": "0.1 s",
    "failures": ["none", {"link": "worst", "at": "0 s"}],
    "losses": {"hash": "off", "incast": 1.0},
}


def result_of(**changes):
    return evaluate_study(read_study(SMALL | changes))


def row_of(frame, **values):
    for key, value in values.items():
        frame = frame[frame[key] == value]
    assert len(frame) == 1, frame
    return frame.iloc[0]


def test_the_form_of_the_design_gives_its_columns():
    frame = run_study(read_study(SMALL))
    assert tuple(frame.columns) == COLUMNS
    # Five pairs make sense, for 3 payloads, 2 rates and 2 failures; bml on a Fat-Tree does not.
    assert len(frame) == 5 * 3 * 2 * 2 + 1
    best = row_of(
        frame,
        topology="bcube(n=3, k=2)",
        collective="bml",
        payload="vgg19",
        bandwidth_bps=10e9,
        failure="none",
    )
    assert best["seconds"] == pytest.approx(4 * 20e-6 + 8 / 9 * 574_668_960 * 8 / 10e9)
    assert best["closed_form_seconds"] == pytest.approx(best["seconds"])
    assert best["iteration_seconds"] == pytest.approx(0.1 + best["seconds"])
    assert best["lower_bound_seconds"] == pytest.approx(best["seconds"] - 60e-6)
    assert best["gap"] == pytest.approx(best["seconds"] / best["lower_bound_seconds"] - 1)
    assert (best["switches"], best["nic_ports"], best["cables"], best["steps"]) == (6, 18, 18, 4)


def test_a_pair_that_makes_no_sense_is_a_row_with_the_reason():
    frame = result_of().frame
    row = frame[frame["payload"].isna()].iloc[0]
    assert row["note"] == "bml needs a BCube, not fat_tree(ports=4, devices=9)"
    with pytest.raises(ScenarioError, match=r"(?s)no pair .* makes sense.*bml needs a BCube"):
        result_of(topologies=[{"kind": "torus", "dims": [3, 3]}], collectives=["bml"])


def test_the_worst_failure_doubles_bml_and_cuts_off_a_single_port():
    frame = result_of(payloads="vgg19", bandwidth="10 Gbit/s", latency=0).frame
    bml = frame[frame["collective"] == "bml"]
    healthy = row_of(bml, failure="none", payload="vgg19")
    broken = row_of(bml, failure="worst down from 0 s, reroute")
    assert broken["seconds"] == pytest.approx(2 * healthy["seconds"])
    assert broken["note"] == "worst cable: 0-9"
    tree = frame[frame["topology"].str.startswith("fat_tree") & (frame["failure"] != "none")]
    assert tree["seconds"].isna().all()
    assert tree["note"].str.contains("no path exists while 0-16 is down").all()


@pytest.mark.parametrize(
    ("failure", "seconds"),
    [
        ({"link": "0-9", "at": "200 ms", "until": "500 ms", "on_failure": "wait"}, 1.18889),
        ({"link": "0-9", "at": "444.4444444444 ms", "rate": 0.5}, 4 / 3),
        ({"link": "9", "at": "0 s"}, 16 / 9),
    ],
)
def test_bar_7_failures_of_a_study(failure, seconds):
    run = {"payloads": "1 MB", "bandwidth": "8 Mbit/s", "latency": 0, "collectives": "bml"}
    frame = result_of(**run, topologies=SMALL["topologies"][:1], failures=failure).frame
    assert frame["seconds"].tolist() == [pytest.approx(seconds, rel=1e-5)]


@pytest.mark.parametrize(
    ("trace", "seconds"),
    [
        ({"times": ["400 ms"], "rates": [0.25]}, 2.3555556),
        ({"times": ["0 s", "100 ms"], "rates": [1.0, 0.5], "repeat": 20}, 1.1777778),
    ],
)
def test_bar_7_traces_of_a_study(trace, seconds):
    run = {"payloads": "1 MB", "bandwidth": "8 Mbit/s", "latency": 0, "collectives": "bml"}
    frame = result_of(
        **run, topologies=SMALL["topologies"][:1], failures="none", traces=[trace]
    ).frame
    assert frame["seconds"].tolist() == [pytest.approx(seconds, rel=1e-6)]


def test_losses_are_shown_and_reach_the_papers_reduction():
    size, rate = 574_668_960, 10e9
    server = (2 * 8 / 9 * size * 8 / rate) / 0.8
    result = result_of(
        payloads="vgg19",
        bandwidth="10 Gbit/s",
        latency=0,
        failures="none",
        compute=f"{0.064 * server:.9f} s",
        losses={"incast": 0.8, "incast_fan_in": 4},
    )
    job = row_of(
        result.job_completion,
        collective="bml",
        baseline_topology="fat_tree(ports=4, devices=9)",
    )
    assert job["reduction"] == pytest.approx(0.564, abs=0.005)
    assert "beyond the ideal 50.0%" in job["note"]
    made = result.frame[result.frame["payload"].notna()]
    assert made["note"].str.contains("losses: incast 0.8 above 4 messages").all()
    assert made["closed_form_seconds"].isna().all()


def test_ideal_jobs_are_shortened_by_the_table_of_the_spec():
    for ratio, reduction in ((0.25, 0.4), (1.0, 0.25), (4.0, 0.1)):
        compute = ratio * 2 * 8 / 9
        result = result_of(
            payloads="1 MB",
            bandwidth="8 Mbit/s",
            latency=0,
            failures="none",
            compute=f"{compute:.9f} s",
            iterations=10,
        )
        base = "fat_tree(ports=4, devices=9)"
        job = row_of(result.job_completion, collective="bml", baseline_topology=base)
        assert job["reduction"] == pytest.approx(reduction, abs=1e-6)
        assert job["job_seconds"] == pytest.approx(10 * (compute + 8 / 9))


def test_crossovers_are_exact():
    result = result_of(bandwidth="10 Gbit/s", failures="none")
    tree = "fat_tree(ports=4, devices=9)"
    at = row_of(
        result.crossovers,
        collective_below="ps_colocated",
        topology_below=tree,
        collective_above="bml",
    )
    assert at["at_bytes"] == pytest.approx(56_250)
    envelope = result.fastest[result.fastest["scope"] == "bcube(n=3, k=2)"]
    assert envelope["collective"].tolist() == ["ps_colocated", "bml"]
    assert envelope["from_bytes"].tolist() == pytest.approx([0, 112_500])


def test_recommendation_gives_its_reason():
    result = result_of(bandwidth="10 Gbit/s", failures="none", payloads="vgg19")
    (said,) = result.recommendations
    assert said.startswith("vgg19, 9 devices at 10 Gbit/s, 20 us a step: bml on bcube(n=3, k=2)")
    assert "it reaches the lower bound of its network" in said
    assert "takes 2.00 times as long" in said


def test_all_files_are_written(tmp_path):
    study = read_study(SMALL | {"payloads": ["vgg19"], "bandwidth": "1 Gbit/s"})
    frame = run_study(study, tmp_path)
    read = pd.read_parquet(tmp_path / "results.parquet")
    pd.testing.assert_frame_equal(read, frame, check_dtype=False)
    assert tuple(pd.read_csv(tmp_path / "results.csv").columns) == COLUMNS
    names = {path.name for path in tmp_path.iterdir()}
    assert {"crossovers.csv", "fastest.csv", "links.csv", "job_completion.csv"} <= names
    assert {"recommendations.txt", "study.yaml", "plots"} <= names
    again = read_study(read_document(tmp_path / "study.yaml").data)
    assert again == study
    links = pd.read_csv(tmp_path / "links.csv")
    assert links[links["is_critical"]].groupby(["topology", "collective"]).size().min() >= 2
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"time_cost_1.png", "time_cost_1.svg", "time_size_1.png", "time_size_2.svg"} <= plots


@pytest.mark.slow
def test_processes_change_nothing():
    study = read_study(SMALL | {"payloads": "lenet5", "bandwidth": "1 Gbit/s"})
    pd.testing.assert_frame_equal(run_study(study), run_study(study, jobs=2))


def test_fusion_and_overlap_show_exposed_time():
    common = {"payloads": "resnet50", "bandwidth": "10 Gbit/s", "failures": "none"}
    whole = row_of(result_of(**common).frame, collective="bml", payload="resnet50")
    parts = row_of(result_of(**common, fusion="4 MB").frame, collective="bml", payload="resnet50")
    assert parts["seconds"] > whole["seconds"]
    assert "buckets" in parts["note"]
    assert parts["closed_form_seconds"] == pytest.approx(parts["seconds"])
    hidden = result_of(**common, fusion="4 MB", overlap=True).frame
    hidden = row_of(hidden, collective="bml", payload="resnet50")
    assert hidden["iteration_seconds"] < 0.11
    assert "% hidden behind the backward pass" in hidden["note"]


def test_a_users_own_schedule_is_timed_and_checked(tmp_path):
    to_json(ring(9), tmp_path / "mine.json")
    own = {"kind": "json", "path": str(tmp_path / "mine.json")}
    frame = result_of(collectives=[own], bandwidth="10 Gbit/s", failures="none").frame
    assert frame["seconds"].notna().all()
    assert set(frame["collective"]) == {"ring"}
    text = (
        (tmp_path / "mine.json")
        .read_text()
        .replace('[0, 1, 0, 1, "reduce"]', '[0, 1, 1, 2, "copy"]')
    )
    (tmp_path / "mine2.json").write_text(text)
    own["path"] = str(tmp_path / "mine2.json")
    with pytest.raises(ScenarioError, match=r"piece \d at rank \d"):
        result_of(collectives=[own])


def test_a_dedicated_server_of_a_star_has_one_port():
    frame = result_of(
        topologies=[{"kind": "star", "devices": 9}],
        collectives=["ps_dedicated", {"kind": "ps_dedicated", "servers": 3}],
        payloads="1 MB",
        bandwidth="8 Mbit/s",
        latency=0,
        failures="none",
    ).frame
    assert frame["seconds"].tolist() == pytest.approx([18.0, 6.0])
    assert frame["closed_form_seconds"].tolist() == pytest.approx([18.0, 6.0])


def test_the_table_lists_the_fastest_first_and_reasons_last():
    table = study_table(result_of(failures="none").frame)
    assert table.row_count == 5 * 3 * 2 + 1
    assert next(iter(table.columns[1].cells)) == "bml"
    assert list(table.columns[-1].cells)[-1].startswith("bml needs a BCube")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"topologies": [{"kind": "bcub", "n": 3}]},
            "topologies.0.kind: 'bcub' is unknown; did you mean 'bcube'",
        ),
        ({"topologies": [{"kind": "bcube", "n": 3}]}, "topologies.0.k: is missing for bcube"),
        (
            {"topologies": [{"kind": "bcube", "n": 3, "k": 2, "x": 1}]},
            "topologies.0.x: unknown key",
        ),
        ({"collectives": ["rng"]}, "collectives.0.kind: 'rng' is unknown; did you mean 'ring'"),
        ({"payloads": ["vgg"]}, "payloads.0: 'vgg' is no model"),
        ({"bandwidth": "1 Gbps"}, "1 Gbit/s"),
        ({"latency": 20}, "'20 s'"),
        ({"bandwith": "1 Gbit/s"}, "bandwith: unknown key; did you mean 'bandwidth'"),
        ({"failures": [{"link": "best"}]}, "link 'best'"),
        ({"failures": [{"at": "2 s", "until": "1 s"}]}, "is not after"),
        ({"losses": {"incast": 0}}, "incast"),
        ({"traces": [{"times": ["1 s"], "rates": [1, 2]}]}, "one for each"),
        ({"study": "weather"}, "collectives"),
    ],
)
def test_wrong_studies_name_the_place(changes, message):
    with pytest.raises(ScenarioError) as caught:
        read_study(SMALL | changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ({"kind": "bcube", "n": 1, "k": 2}, "n = 1: must be at least 2"),
        ({"kind": "fat_tree", "ports": 5}, "ports = 5: a Fat-Tree needs an even number"),
        ({"kind": "file", "path": "nowhere.csv"}, "no such file"),
        ({"kind": "ring", "devices": "many"}, "topology ring"),
        ({"kind": "star", "devices": 3, "bandwidth": "fast"}, "'fast' is not a bandwidth"),
    ],
)
def test_wrong_topologies_are_errors(topology, message):
    with pytest.raises(ScenarioError) as caught:
        result_of(topologies=[topology])
    assert message in str(caught.value)


def test_a_disconnected_graph_says_so():
    with pytest.raises(ScenarioError, match="disconnected: no path from 0 to device"):
        result_of(
            topologies=[{"kind": "erdos_renyi", "devices": 9, "density": 0.1}],
            collectives=["ring"],
            failures="none",
        )


def test_unlimited_links_are_refused():
    with pytest.raises(ScenarioError, match="no link has a finite bandwidth"):
        result_of(bandwidth="unlimited")


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_studies_run(path):
    result = evaluate_study(read_study(read_document(path).data))
    timed = result.frame[result.frame["seconds"].notna()]
    assert len(timed) >= 20
    assert (timed["gap"] >= -1e-9).all()
    explained = timed.dropna(subset="closed_form_seconds")
    assert (abs(explained["seconds"] / explained["closed_form_seconds"] - 1) < 1e-9).all()
    assert result.recommendations


SIZES = {
    "barabasi_albert": {"devices": 9, "attachments": 2},
    "bcube": {"n": 3, "k": 2},
    "dcell": {"n": 3, "k": 1},
    "dragonfly": {"routers": 2, "hosts_per_router": 1, "global_links": 1},
    "erdos_renyi": {"devices": 9, "density": 0.5},
    "expander": {"devices": 10, "degree": 3},
    "fat_tree": {"ports": 4, "devices": 9},
    "grid": {"dims": [3, 4]},
    "hypercube": {"dimension": 3},
    "leaf_spine": {"leaves": 2, "spines": 2, "hosts_per_leaf": 2},
    "random_geometric": {"devices": 9, "radius": 0.5},
    "random_regular": {"devices": 10, "degree": 3},
    "research_network": {"network": "abilene"},
    "torus": {"dims": [3, 4, 3]},
    "tree": {"fanouts": [2, 3]},
    "watts_strogatz": {"devices": 9, "neighbours": 4, "rewiring": 0.1},
}


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - {"file"}))
def test_every_family_can_be_built_and_laid_out(kind):
    graph = build_topology({"kind": kind, **SIZES.get(kind, {"devices": 6})}, bandwidth=1e9)
    places = layout_of(graph)
    assert set(places) == set(graph)
    assert len(set(places.values())) == len(graph)


def test_a_drawing_is_the_same_every_time(tmp_path):
    graph = build_topology({"kind": "bcube", "n": 3, "k": 2})
    first = [path.read_bytes() for path in draw_topology(graph, tmp_path / "a")]
    assert first == [path.read_bytes() for path in draw_topology(graph, tmp_path / "b")]
    assert first[0].startswith(b"\x89PNG")
