"""Groups of samples by their features."""

import numpy as np
import pytest

from fedsim.data.clusters import cluster, rebalance
from fedsim.errors import ScenarioError


def test_separate_clouds_are_found():
    rng = np.random.default_rng(0)
    true = rng.integers(4, size=400)
    x = 20 * np.eye(4)[true] + rng.standard_normal((400, 4))
    group = cluster(x, 4, seed=1)
    assert len(set(zip(true.tolist(), group.tolist(), strict=True))) == 4
    assert np.array_equal(group, cluster(x, 4, seed=1))


def test_no_group_is_more_than_ten_times_another():
    group = np.array([0] * 100 + [1] * 5 + [2] * 30)
    balanced = rebalance(group, 3)
    assert np.bincount(balanced).tolist() == [50, 55, 30]
    assert (balanced[:50] == 1).all()  # the first half of the largest
    assert np.bincount(group).tolist() == [100, 5, 30]  # the argument is as it was
    x = np.concatenate([np.zeros((99, 1)), np.ones((1, 1))])
    counts = np.bincount(cluster(x, 2))
    assert counts.min() * 10 >= counts.max()


def test_equal_samples_still_make_groups():
    assert np.bincount(cluster(np.zeros((40, 2)), 4), minlength=4).min() >= 1


def test_more_groups_than_samples_are_refused():
    with pytest.raises(ScenarioError, match="5 groups of 3 samples"):
        cluster(np.zeros((3, 1)), 5)
