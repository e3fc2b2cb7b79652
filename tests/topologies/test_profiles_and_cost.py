import pytest

import topologies as tp
from topologies.overlap import buckets_of
from topologies.profiles import PROFILES


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("lenet5", 61_706, 10),
        ("lenet5_caffe", 431_080, 8),
        ("lenet5_tensorflow", 3_274_634, 8),
        ("vgg19", 143_667_240, 38),
        ("resnet50", 25_557_032, 161),
        ("bert_large", 335_141_888, 391),
        ("gpt2", 124_439_808, 148),
    ],
)
def test_profiles_have_the_published_parameters(name, parameters, tensors):
    profile = tp.profile(name)
    assert (profile.parameters, len(profile.tensors)) == (parameters, tensors)
    assert profile.n_bytes == 4 * parameters
    assert tp.profile(name, itemsize=2).n_bytes == 2 * parameters
    assert len({t.name for t in profile.tensors}) == tensors


def test_flops_are_the_published_ones():
    assert tp.profile("resnet50").flops / 2e9 == pytest.approx(4.09, abs=0.01)
    assert tp.profile("vgg19").flops / 2e9 == pytest.approx(19.6, abs=0.1)


def test_unknown_models_and_sizes_are_refused():
    with pytest.raises(ValueError, match="model 'lenet': must be one of"):
        tp.profile("lenet")
    with pytest.raises(ValueError, match="n_bytes = 0"):
        tp.custom_profile(0)
    assert tp.custom_profile(1000).n_bytes == 1000


@pytest.mark.parametrize("name", sorted(PROFILES))
@pytest.mark.parametrize("fusion", [0, 1_000_000, 25_000_000, None])
def test_buckets_hold_every_byte_once(name, fusion):
    profile = tp.profile(name)
    buckets = buckets_of(profile, fusion)
    assert sum(size for size, _ in buckets) == profile.n_bytes
    if fusion == 0:
        assert len(buckets) == len(profile.tensors)
    if fusion is None:
        assert len(buckets) == 1
    ready = [share for _, share in buckets]
    assert ready == sorted(ready)
    assert ready[-1] == pytest.approx(1.0)


def test_each_bucket_pays_the_latency():
    profile = tp.profile("vgg19")
    alone = tp.iteration_time(profile, lambda size, start: 1.0, fusion_bytes=0)
    assert alone.sync == alone.seconds == 38.0
    assert tp.iteration_time(profile, lambda size, start: 1.0).sync == 1.0


def test_overlap_hides_what_back_propagation_covers():
    profile = tp.profile("resnet50")
    run = {"compute": 3.0, "fusion_bytes": 4_000_000}
    apart = tp.iteration_time(profile, lambda size, start: size * 1e-8, **run)
    assert apart.exposed == pytest.approx(apart.sync)
    hidden = tp.iteration_time(profile, lambda size, start: size * 1e-8, overlap=True, **run)
    assert hidden.sync == pytest.approx(apart.sync)
    last = hidden.buckets[-1] * 1e-8  # the first layer's gradients come last
    assert hidden.exposed == pytest.approx(last)
    slow = tp.iteration_time(profile, lambda size, start: size * 1e-6, overlap=True, **run)
    assert slow.sync - slow.exposed < 2.0  # no more than the backward pass can hide


def test_sync_is_asked_at_the_time_it_starts():
    starts = []

    def sync(size, start):
        starts.append(start)
        return 0.5

    tp.iteration_time(tp.profile("lenet5"), sync, compute=1.0, fusion_bytes=100_000)
    assert starts == [1.0, 1.5]


def test_prices_add_up():
    prices = tp.Prices(switch=10, switch_port=1, nic_port=2, cable=3, switches=((4, 99.0),))
    assert prices.of(tp.bcube_counts(3, 2)) == 6 * 13 + 18 * 2 + 18 * 3
    assert prices.of(tp.fat_tree_counts(4)) == 20 * 99 + 16 * 2 + 48 * 3


def test_spare_hosts_are_bought_only_when_used():
    graph = tp.fat_tree(4, devices=9)
    assert tp.hardware(graph).nic_ports == 9
    assert tp.hardware(graph).cables == 48 - 7
    assert tp.hardware(graph).switch_ports == 80
    assert tp.hardware(graph, spares_used=2).nic_ports == 11


def test_equal_ports_make_equal_ideal_times():
    k = 2
    planes = tp.fat_tree(4, planes=k, bandwidth=8.0)
    bcube = tp.bcube(4, k, bandwidth=8.0)
    assert tp.hardware(planes).nic_ports == tp.hardware(bcube).nic_ports
    times = [
        tp.time_schedule(tp.LoadPlan(make(graph), tp.Router(graph)), 1.0).seconds
        for make, graph in ((tp.ps_colocated_schedule, planes), (tp.bml_schedule, bcube))
    ]
    assert times[0] == pytest.approx(times[1])


def test_description_of_a_bcube():
    found = tp.describe(tp.bcube(4, 2, bandwidth=1e9))
    assert found["topology"] == "bcube(n=4, k=2)"
    assert found["device_degrees"] == {2: 16}
    assert (found["switches"], found["cables"], found["diameter"]) == (8, 32, 4)
    assert found["bisection_bps"] == 8e9
    assert found["fat_tree_switches_pro_rated"] == 20


@pytest.mark.parametrize(
    ("graph", "bisection", "gap"),
    [
        (tp.fat_tree(4, bandwidth=1.0), 8.0, 1.0),
        (tp.ring(8, bandwidth=1.0), 2.0, 1 - 0.8047378541),
        (tp.torus((4, 4), bandwidth=1.0), 8.0, 0.4),
        (tp.star(4, bandwidth=1.0), 2.0, None),
        (tp.hypercube(3, bandwidth=1.0), 4.0, 0.5),
    ],
)
def test_description_of_known_graphs(graph, bisection, gap):
    found = tp.describe(graph)
    assert found["bisection_bps"] == bisection
    assert found["spectral_gap"] == (None if gap is None else pytest.approx(gap))


def test_description_of_what_is_undefined():
    found = tp.describe(tp.erdos_renyi(5, 0.0, bandwidth=1.0))
    assert found["is_connected"] is False
    assert found["diameter"] is None
    assert found["spectral_gap"] is None
    assert tp.describe(tp.ring(4))["bisection_bps"] is None  # unlimited links


def test_device_graph_sees_through_switches_only():
    near = tp.device_graph(tp.bcube(2, 2))
    assert sorted(near.edges) == [(0, 1), (0, 2), (1, 3), (2, 3)]
    assert tp.device_graph(tp.tree((2, 2))).number_of_edges() == 0
    assert sorted(tp.device_graph(tp.ring(3)).edges) == [(0, 1), (0, 2), (1, 2)]


def test_lower_bound_counts_dedicated_servers():
    graph = tp.star(4, servers=4, bandwidth=8.0)
    assert tp.lower_bound(graph, 1.0) == pytest.approx(1.5)
    assert tp.lower_bound(graph, 1.0, servers_used=4, step_latency=0.5) == pytest.approx(1.5)
    assert tp.bus_bandwidth(1.0, 4, 1.5) == pytest.approx(8.0)


def test_crossover_needs_a_change_of_order():
    assert tp.crossover_bytes((1, 2), (1, 2), (3, 4)) is None
