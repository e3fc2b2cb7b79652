import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data import partition as p
from fedsim.data.datasets import Dataset
from fedsim.data.federated import federate
from fedsim.errors import ScenarioError
from fedsim.streams import stream

KINDS = {
    "iid": (p.partition_iid, {}),
    "dirichlet": (p.partition_dirichlet, {"alpha": 0.1}),
    "quantity": (p.partition_dirichlet_quantity, {"alpha": 0.3}),
    "shards": (p.partition_shards, {"shards_per_device": 2}),
    "pathological": (p.partition_pathological, {"classes_per_device": 2}),
}


def labels_of(n, n_classes, seed=0):
    return stream(seed, "labels").integers(n_classes, size=n)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 99), n_devices=st.integers(5, 40), min_samples=st.integers(1, 4))
def test_every_sample_goes_to_one_device_and_none_is_short(kind, seed, n_devices, min_samples):
    labels = labels_of(600, 10, seed)
    partition, arguments = KINDS[kind]
    rng = stream(seed, "partition")
    parts = partition(labels, n_devices, rng=rng, min_samples=min_samples, **arguments)
    assert len(parts) == n_devices
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(600))
    assert all(len(part) >= min_samples and (np.diff(part) > 0).all() for part in parts)
    again = partition(
        labels, n_devices, rng=stream(seed, "partition"), min_samples=min_samples, **arguments
    )
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_more_devices_than_samples_is_refused(kind):
    partition, arguments = KINDS[kind]
    with pytest.raises(ScenarioError, match=r"21 devices .* there are 20"):
        partition(labels_of(20, 4), 21, rng=stream(0, "partition"), **arguments)


def test_small_alpha_means_few_classes_and_large_alpha_all():
    labels = labels_of(20_000, 10)

    def entropy(alpha):
        parts = p.partition_dirichlet(labels, 20, rng=stream(1, "x"), alpha=alpha)
        counts = np.array([np.bincount(labels[part], minlength=10) for part in parts])
        share = counts / counts.sum(1, keepdims=True)
        return -(share * np.log(np.maximum(share, 1e-12))).sum(1).mean() / np.log(10)

    few, all_ = entropy(0.05), entropy(1000.0)
    assert few < 0.35
    assert all_ > 0.99


def test_tiny_alpha_still_serves_every_device():
    parts = p.partition_dirichlet(labels_of(500, 10), 100, rng=stream(0, "x"), alpha=1e-4)
    assert min(len(part) for part in parts) >= 1


def test_iid_sizes_differ_by_at_most_one():
    sizes = [len(part) for part in p.partition_iid(labels_of(103, 3), 10, rng=stream(0, "x"))]
    assert sorted(set(sizes)) == [10, 11]


def test_quantities_are_unequal_but_labels_alike():
    labels = labels_of(10_000, 2)
    parts = p.partition_dirichlet_quantity(labels, 10, rng=stream(2, "x"), alpha=0.5)
    sizes = np.array([len(part) for part in parts])
    assert sizes.max() > 5 * sizes.min()
    assert abs(labels[max(parts, key=len)].mean() - 0.5) < 0.05


def test_shards_hold_few_classes():
    labels = np.repeat(np.arange(10), 60)
    parts = p.partition_shards(labels, 20, rng=stream(0, "x"), shards_per_device=2)
    assert all(len(part) == 30 and len(np.unique(labels[part])) <= 2 for part in parts)


@given(n_devices=st.integers(5, 30), k=st.integers(2, 10), seed=st.integers(0, 20))
def test_pathological_devices_hold_exactly_k_classes_evenly_shared(n_devices, k, seed):
    labels = np.repeat(np.arange(10), 40)
    parts = p.partition_pathological(labels, n_devices, rng=stream(seed, "x"), classes_per_device=k)
    held = np.array([np.bincount(labels[part], minlength=10) > 0 for part in parts])
    assert (held.sum(1) == k).all()
    assert np.ptp(held.sum(0)) <= 1


def test_pathological_must_be_able_to_hold_all_classes():
    labels = labels_of(100, 10)
    with pytest.raises(ScenarioError, match="cannot hold all 10 classes"):
        p.partition_pathological(labels, 3, rng=stream(0, "x"), classes_per_device=2)
    with pytest.raises(ScenarioError, match=r"not in 1\.\.10"):
        p.partition_pathological(labels, 30, rng=stream(0, "x"), classes_per_device=11)


def test_natural_devices_are_the_ids_of_the_data():
    ids = np.array([7, 3, 3, 9, 7, 3])
    parts = p.partition_natural(np.zeros(6, int), 3, rng=stream(0, "x"), device_ids=ids)
    assert [part.tolist() for part in parts] == [[1, 2, 5], [0, 4], [3]]
    two = p.partition_natural(
        np.zeros(6, int), 2, rng=stream(0, "x"), device_ids=ids, min_samples=2
    )
    assert [part.tolist() for part in two] == [[1, 2, 5], [0, 4]]
    with pytest.raises(ScenarioError, match="3 natural devices with at least 1"):
        p.partition_natural(np.zeros(6, int), 4, rng=stream(0, "x"), device_ids=ids)
    with pytest.raises(ScenarioError, match="needs a data set with device ids"):
        p.partition_natural(np.zeros(6, int), 2, rng=stream(0, "x"), device_ids=None)


def test_class_partitions_of_a_regression_are_refused():
    with pytest.raises(ScenarioError, match="no class per sample"):
        p.partition_dirichlet(np.linspace(0, 1, 50), 3, rng=stream(0, "x"), alpha=1.0)


def small_dataset():
    rng = stream(0, "small")
    y = rng.integers(3, size=60)
    return Dataset("small", rng.random((60, 4)), y, rng.random((9, 4)), y[:9], 3)


def test_federated_data_lie_side_by_side_with_label_counts():
    data = small_dataset()
    parts = p.partition_dirichlet(data.y_train, 7, rng=stream(0, "x"), alpha=0.5)
    fed = federate(data, parts)
    for i, part in enumerate(parts):
        rows = slice(fed.start[i], fed.start[i] + fed.size[i])
        assert np.array_equal(fed.x[rows].numpy(), data.x_train[part])
        counts = np.bincount(data.y_train[part], minlength=3)
        assert fed.label_counts()[i].tolist() == counts.tolist()


def test_local_test_samples_are_no_training_samples():
    data = small_dataset()
    parts = p.partition_iid(data.y_train, 12, rng=stream(0, "x"))
    fed = federate(data, parts, local_test_fraction=0.4, rng=stream(0, "local-test"))
    assert fed.size.tolist() == [3] * 12
    assert fed.local_test_size.tolist() == [2] * 12
    assert np.array_equal(fed.local_test_start, fed.start + fed.size)
    assert fed.label_counts().sum() == 36


def test_an_empty_device_is_refused():
    with pytest.raises(ScenarioError, match="device 1 holds no sample"):
        federate(small_dataset(), [np.arange(60), np.array([], int)])


def test_flowers_partitioners_are_adapted_or_said_to_be_missing():
    labels = labels_of(300, 5)
    arguments = {"alpha": 0.5, "min_partition_size": 3}

    def split(name="DirichletPartitioner", **more):
        return p.partition_flower(
            labels, 6, rng=stream(0, "x"), partitioner=name, arguments=arguments | more
        )

    try:
        import flwr_datasets  # noqa: F401
    except ImportError:
        with pytest.raises(ScenarioError, match="pip install flwr-datasets"):
            split()
        return
    assert np.array_equal(np.sort(np.concatenate(split())), np.arange(300))
    with pytest.raises(ScenarioError, match="has no 'MyPartitioner'"):
        split("MyPartitioner")
    with pytest.raises(ScenarioError, match="DirichletPartitioner: "):
        split(colour="red")
