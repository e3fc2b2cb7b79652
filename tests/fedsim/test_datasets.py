import numpy as np
import pytest

from fedsim.data import datasets
from fedsim.data.datasets import Dataset, hold_out, load_digits, load_npz, shorten
from fedsim.errors import ScenarioError


def write_npz(path, **changes):
    arrays = {
        "x_train": np.zeros((6, 4), np.float32),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": np.zeros((2, 4), np.float32),
        "y_test": np.array([0, 2]),
    } | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


@pytest.mark.parametrize("has_moved", [False, True])
def test_digits_are_those_of_scikit_learn(monkeypatch, has_moved):
    from sklearn.datasets import load_digits as reference

    if has_moved:
        monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    digits = load_digits(test_fraction=0.5, seed=1)
    images, labels = reference(return_X_y=True)
    ours = np.concatenate([digits.x_train, digits.x_test])
    whose = np.concatenate([digits.y_train, digits.y_test])
    both = [np.column_stack([16 * ours, whose]), np.column_stack([images, labels])]
    one, other = (table[np.lexsort(table.T)] for table in both)
    assert np.array_equal(one, other)


def test_digits_are_split_by_seed_and_fraction():
    digits = load_digits(test_fraction=0.25, seed=3)
    assert digits.x_train.shape == (1348, 64)
    assert digits.x_test.shape == (449, 64)
    assert digits.x_train.dtype == np.float32
    assert 0 <= digits.x_train.min() < digits.x_train.max()
    assert digits.x_train.max() == 1
    assert digits.n_classes == 10
    again, other = (load_digits(test_fraction=0.25, seed=seed) for seed in (3, 4))
    assert np.array_equal(digits.y_test, again.y_test)
    assert not np.array_equal(digits.y_test, other.y_test)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 0.0001])
def test_a_split_that_leaves_a_part_empty_is_refused(fraction):
    with pytest.raises(ScenarioError, match="test_fraction"):
        load_digits(test_fraction=fraction)


def test_held_out_samples_leave_the_training_part():
    digits = load_digits(seed=1)
    held = hold_out(digits, validation_fraction=0.1, seed=1)
    assert len(held.y_validation) == 135
    assert len(held.y_train) == 1213
    together = np.concatenate([held.x_train, held.x_validation])
    assert np.array_equal(np.sort(together.sum(1)), np.sort(digits.x_train.sum(1)))
    assert hold_out(digits, validation_fraction=0, seed=1) is digits


def test_a_shortened_set_keeps_training_samples_and_chooses_the_same_others():
    digits = hold_out(load_digits(seed=1), validation_fraction=0.1, seed=1)
    short = shorten(digits, samples=100, seed=3)
    assert (len(short.y_test), len(short.y_validation)) == (100, 100)
    assert short.x_train is digits.x_train
    assert set(map(bytes, short.x_test)) <= set(map(bytes, digits.x_test))
    again = shorten(digits, samples=100, seed=3)
    assert np.array_equal(short.x_test, again.x_test)
    assert not np.array_equal(short.x_test, shorten(digits, samples=100, seed=4).x_test)
    assert len(shorten(digits, samples=10_000, seed=3).y_test) == len(digits.y_test)


def test_npz_brings_its_own_data_and_device_ids(tmp_path):
    path = write_npz(tmp_path / "mine.npz", device_train=np.array([5, 5, 7, 7, 7, 9]))
    data = load_npz(path=path)
    assert (data.name, data.n_classes, data.input_shape) == ("mine", 3, (4,))
    assert data.device_train.tolist() == [5, 5, 7, 7, 7, 9]
    assert load_npz(path="mine.npz", data_dir=tmp_path).name == "mine"


def test_npz_with_float_targets_is_a_regression(tmp_path):
    path = write_npz(tmp_path / "r.npz", y_train=np.linspace(0, 1, 6), y_test=np.zeros(2))
    assert load_npz(path=path).n_classes == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "lacks y_test"),
        ({"y_test": np.zeros(0, int), "x_test": np.zeros((0, 3))}, "x_test has no samples"),
        ({"y_train": np.arange(5) % 3}, "x_train has 6 samples, y_train has 5"),
        ({"y_train": np.array([1, 2, 3, 1, 2, 3])}, "labels must be 0..C-1"),
        ({"y_test": np.array([0, 3])}, "0..3; 3 classes need labels 0..2"),
        ({"x_train": np.full((6, 4), np.nan, np.float32)}, "NaN or infinity, first in row 0"),
        ({"x_test": np.zeros((2, 5), np.float32)}, r"x_test is float32\(5,\)"),
        ({"device_train": np.arange(4)}, "device_train has 4 entries for 6"),
        ({"device_train": np.zeros(6)}, "device_train must hold integers"),
        ({"x_train": np.array(["a"] * 6)}, "numbers are needed|x_test is"),
        ({"y_train": np.array(3)}, "single number"),
    ],
)
def test_npz_says_what_is_wrong(tmp_path, changes, message):
    path = write_npz(tmp_path / "bad.npz", **changes)
    with pytest.raises(ScenarioError, match=message):
        load_npz(path=path)


def test_npz_that_is_missing_or_no_npz_is_refused(tmp_path):
    with pytest.raises(ScenarioError, match=r"no file 'none\.npz'"):
        load_npz(path="none.npz")
    (tmp_path / "text.npz").write_text("not a zip file")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("text.npz", "empty.npz"):
        with pytest.raises(ScenarioError, match=r"is no \.npz file"):
            load_npz(path=tmp_path / name)


def test_labels_must_be_integers_for_a_classification():
    x, y = np.zeros((2, 3), np.float32), np.array([0.0, 1.0])
    with pytest.raises(ScenarioError, match="not integers"):
        Dataset("d", x, y, x, y, n_classes=2)
