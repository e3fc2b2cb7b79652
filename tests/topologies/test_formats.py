import json

import networkx as nx
import pytest

import topologies as tp
from topologies.schedules import from_json, to_json


def test_research_networks_have_the_published_sizes():
    for name, sites, links in (("abilene", 11, 14), ("nsfnet", 14, 21)):
        graph = tp.research_network(name, bandwidth=1e10)
        assert (len(tp.devices_of(graph)), graph.number_of_edges()) == (sites, links)
        assert nx.is_connected(graph)
        assert all(1e-4 < d["latency"] < 0.02 for *_, d in graph.edges(data=True))
    assert graph.graph["name"] == "research_network(network=nsfnet)"
    with pytest.raises(ValueError, match="network = 'arpanet'"):
        tp.research_network("arpanet")


def test_great_circle_latency_is_that_of_the_distance():
    graph = tp.research_network("abilene")
    label = nx.get_node_attributes(graph, "label")
    at = {name: node for node, name in label.items()}
    # New York to Chicago is 1145 km.
    assert graph.edges[at["New York"], at["Chicago"]]["latency"] == pytest.approx(
        1145e3 / 2e8, rel=0.01
    )
    assert tp.research_network("abilene", latency=0.5).edges[0, 1]["latency"] == 0.5


def test_csv_with_rates_delays_and_roles(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "source,target,bandwidth,latency,source_role,target_role\n"
        "sw,a,1e9,0.001,switch,\n"
        "sw,b,2e9,,switch,\n"
        "sw,b,1e9,0.003,switch,\n"
        "sw,boss,,0.002,,server\n"
    )
    graph = tp.from_file(path, bandwidth=5e6)
    assert nx.get_node_attributes(graph, "label") == {0: "a", 1: "b", 2: "boss", 3: "sw"}
    assert [graph.nodes[v]["role"] for v in range(4)] == ["device", "device", "server", "switch"]
    assert graph.edges[1, 3] == {"bandwidth": 3e9, "latency": 0.003}
    assert graph.edges[2, 3] == {"bandwidth": 5e6, "latency": 0.002}


@pytest.mark.parametrize("suffix", ["json", "graphml"])
def test_a_written_graph_comes_back(tmp_path, suffix):
    graph = tp.tree((2, 3), bandwidth=(1e9, 1e6), latency=(0.01, 0.02))
    path = tmp_path / f"tree.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(nx.node_link_data(graph, edges="edges")))
    else:
        plain = nx.Graph()
        plain.add_nodes_from(graph.nodes(data=True))
        plain.add_edges_from(graph.edges(data=True))
        nx.write_graphml_xml(plain, path)
    back = tp.from_file(path)
    assert nx.utils.edges_equal(back.edges(data="bandwidth"), graph.edges(data="bandwidth"))
    assert nx.get_node_attributes(back, "role") == nx.get_node_attributes(graph, "role")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "must end in one of .graphml, .json, .csv"),
        ("a.json", "{", "not a graph"),
        ("a.graphml", "<html>", "not a graph"),
        (
            "a.csv",
            "source,target,bandwidth\na,b,20 Mbit/s\n",
            "bandwidth = '20 Mbit/s' of link a-b",
        ),
        ("a.csv", "source,target,source_role\na,b,king\n", "role 'king' of 'a'"),
        ("a.csv", "source,target,source_role\na,b,switch\n", "devices = 1: must be at least 2"),
    ],
)
def test_wrong_files_say_what_is_wrong(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        tp.from_file(path)
    with pytest.raises(ValueError, match="no such file"):
        tp.from_file(tmp_path / "none.csv")


def test_schedules_survive_json(tmp_path):
    path = tmp_path / "bml.json"
    schedule = tp.collectives.bml(3, 2)
    to_json(schedule, path)
    back = from_json(path)
    assert [s.sends() for s in back.steps] == [s.sends() for s in schedule.steps]
    data = json.loads(path.read_text())
    del data["steps"][-1]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"piece \d+ at rank \d lacks the contribution"):
        from_json(path)
    path.write_text('{"ranks": 2, "chunks": 1, "steps": [[[0, 1, 0, 1, "add"]]]}')
    with pytest.raises(ValueError, match="operation must be 'reduce' or 'copy'"):
        from_json(path)
    path.write_text('{"ranks": 2}')
    with pytest.raises(ValueError, match="not a schedule: 'chunks'"):
        from_json(path)


def ring_xml(ranks):
    """Return the ring all-reduce as MSCCL's compiler writes it, one thread block for each gpu."""
    lines = [f'<algo name="ring" nchunksperloop="{ranks}" ngpus="{ranks}" coll="allreduce">']
    for gpu in range(ranks):
        lines.append(f'<gpu id="{gpu}" i_chunks="{ranks}" o_chunks="0" s_chunks="0">')
        lines.append(f'<tb id="0" send="{(gpu + 1) % ranks}" recv="{(gpu - 1) % ranks}" chan="0">')
        kinds = ["s"] + ["rrcs"] * (ranks - 1) + ["rcs"] * (ranks - 2) + ["r"]
        for number, kind in enumerate(kinds):
            piece = (gpu - number) % ranks
            lines.append(
                f'<step s="{number}" type="{kind}" srcbuf="i" srcoff="{piece}" dstbuf="i" '
                f'dstoff="{piece}" cnt="1" depid="-1" deps="-1" hasdep="0"/>'
            )
        lines += ["</tb>", "</gpu>"]
    return "\n".join([*lines, "</algo>"])


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_msccl_ring_is_our_ring(tmp_path, ranks):
    path = tmp_path / "ring.xml"
    path.write_text(ring_xml(ranks))
    schedule = tp.from_msccl_xml(path)
    ours = tp.collectives.ring(ranks)
    assert [sorted(s.sends()) for s in schedule.steps] == [sorted(s.sends()) for s in ours.steps]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('type="r"', 'type="nop"', "sends 4 messages to gpu .*, which receives 3"),
        ('type="s"', 'type="re"', "type 're': must be one of"),
        ('cnt="1"', "", "attribute cnt = None"),
        ('dstbuf="i"', 'dstbuf="s"', "dstbuf = 's': only the buffers i and o"),
        ('depid="-1" deps="-1"', 'depid="0" deps="3"', "waits forever"),
        ('depid="-1" deps="-1"', 'depid="4" deps="3"', "depends on tb 4, step 3: none"),
        ('type="rcs"', 'type="rrcs"', "gets the contribution of rank . twice"),
        ("allreduce", "allgather", "only allreduce"),
        ("<algo", "<other", "not XML"),
        ('nchunksperloop="3"', 'nchunksperloop="4"', "piece 3 at rank 0 lacks"),
    ],
)
def test_msccl_mistakes_are_found(tmp_path, old, new, message):
    path = tmp_path / "ring.xml"
    path.write_text(ring_xml(3).replace(old, new))
    with pytest.raises(ValueError, match=message):
        tp.from_msccl_xml(path)
