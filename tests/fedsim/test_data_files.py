"""Loaders of files: on small files written here, and on the real ones where they are."""

import gzip
import io
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsim.data import files
from fedsim.data.federated import federate
from fedsim.data.images import load_cifar10, load_fashion_mnist, load_image_folder, load_mnist
from fedsim.data.tables import load_a9a, load_libsvm, load_tinyshakespeare, load_w8a
from fedsim.errors import ScenarioError
from fedsim.learning.convex import ConvexProblem

SHARED = Path(os.environ.get("FEDSIM_DATA", Path(__file__).parents[2] / "../shared/data"))


def real(name):
    if not (SHARED / name).exists():
        pytest.skip(f"no {name} in {SHARED}")
    return SHARED


def write_idx(path, array, *, compress=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if compress else raw)


def write_mnist(folder, *, compress=True):
    rng = np.random.default_rng(0)
    for part, n in (("train", 30), ("t10k", 10)):
        suffix = ".gz" if compress else ""
        images = rng.integers(256, size=(n, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images, compress=compress)
        labels = (np.arange(n) % 10).astype(np.uint8)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels, compress=compress)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("folder", ["mnist", "MNIST/raw"])
def test_idx_files_are_read_in_both_wrappers(tmp_path, folder, compress):
    write_mnist(tmp_path / folder, compress=compress)
    data = load_mnist(data_dir=tmp_path)
    assert data.x_train.shape == (30, 1, 28, 28)
    assert data.x_train.dtype == np.uint8
    assert data.y_test.tolist() == list(range(10))


def test_a_missing_file_lists_what_was_searched_and_where_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(ScenarioError) as caught:
        load_mnist(data_dir=tmp_path)
    for part in (str(tmp_path), "mnist/train-images-idx3-ubyte.gz", "MNIST/raw", "https://"):
        assert part in str(caught.value)
    write_mnist(tmp_path / "second" / "fashion-mnist")
    monkeypatch.setenv("FEDSIM_DATA", f"{tmp_path}{os.pathsep}{tmp_path / 'second'}")
    assert load_fashion_mnist().name == "fashion_mnist"
    monkeypatch.delenv("FEDSIM_DATA")
    monkeypatch.chdir(tmp_path)
    assert files.data_directories() == [Path("data")]


def test_a_cut_off_file_is_refused(tmp_path):
    write_mnist(tmp_path / "mnist", compress=False)
    path = tmp_path / "mnist/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ScenarioError, match="not an IDX file of bytes, or is cut off"):
        load_mnist(data_dir=tmp_path)
    path.write_bytes(b"ab")
    with pytest.raises(ScenarioError, match="cannot read"):
        load_mnist(data_dir=tmp_path)
    path.unlink()
    (tmp_path / "mnist/train-images-idx3-ubyte.gz").write_bytes(b"no gzip at all")
    with pytest.raises(ScenarioError, match="cannot read"):
        load_mnist(data_dir=tmp_path)


def test_present_files_tell_known_content_from_other(tmp_path):
    write_mnist(tmp_path / "mnist")
    shown = {(f.file.dataset, f.file.part): f for f in files.present_files(tmp_path)}
    assert len(shown) == len(files.DATA_FILES)
    found = shown["mnist", "train-labels"]
    assert found.path == tmp_path / "mnist/train-labels-idx1-ubyte.gz"
    assert found.is_known is False
    assert found.size_bytes == found.path.stat().st_size
    assert shown["w8a", "train"].path is None
    assert shown["w8a", "train"].is_known is None


def write_cifar_batches(folder):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {
            b"data": rng.integers(256, size=(10, 3072), dtype=np.uint8),
            b"labels": list(range(10)),
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def test_cifar_batches_are_read_without_running_code(tmp_path):
    write_cifar_batches(tmp_path / "cifar-10-batches-py")
    data = load_cifar10(data_dir=tmp_path)
    assert data.x_train.shape == (50, 3, 32, 32)
    assert data.y_test.tolist() == list(range(10))

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    (tmp_path / "cifar-10-batches-py/data_batch_2").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ScenarioError, match=r"not a CIFAR-10 batch: holds .*mkdir"):
        load_cifar10(data_dir=tmp_path)
    assert not (tmp_path / "harm").exists()


def test_cifar_variants_from_one_file(tmp_path):
    folder = tmp_path / "cifar10"
    folder.mkdir()
    images = np.full((4, 32, 32, 3), 100, np.uint8)
    images[2:, :, :, 1] = 200
    labels = np.arange(4, dtype=np.uint8)
    both = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(folder / "cifar10-6k.npz", **both)
    jpegs = []
    for image in images:
        Image.fromarray(image).save(buffer := io.BytesIO(), "JPEG")
        jpegs.append(buffer.getvalue())
    stream = np.frombuffer(b"".join(jpegs), np.uint8)
    offset = np.cumsum([0, *map(len, jpegs)])
    arrays = {}
    for part in ("train", "test"):
        arrays |= {f"jpeg_{part}": stream, f"offset_{part}": offset, f"y_{part}": labels}
    np.savez(folder / "cifar10-jpeg.npz", **arrays)
    small = load_cifar10(variant="6k", data_dir=tmp_path)
    decoded = load_cifar10(variant="jpeg", data_dir=tmp_path)
    assert small.x_train.shape == decoded.x_train.shape == (4, 3, 32, 32)
    assert np.abs(small.x_train.astype(int) - decoded.x_train).max() < 8
    with pytest.raises(ScenarioError, match=r"cifar-10-batches-py/data_batch_1.*cifar10-6k"):
        load_cifar10(data_dir=tmp_path)
    with pytest.raises(ScenarioError, match="'full' is not one of batches, jpeg, 6k"):
        load_cifar10(variant="full", data_dir=tmp_path)


def write_pictures(root, n=4):
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (20, 10), (label * 200, i, 0)).save(root / name / f"{i}.png")


def test_pictures_in_class_folders(tmp_path):
    write_pictures(tmp_path / "pets")
    data = load_image_folder(path="pets", size=8, test_fraction=0.25, data_dir=tmp_path)
    assert data.x_train.shape == (6, 3, 8, 8)
    assert ((data.x_train[:, 0, 0, 0] == 200) == (data.y_train == 1)).all()
    write_pictures(tmp_path / "split/train")
    write_pictures(tmp_path / "split/test", n=2)
    data = load_image_folder(path=tmp_path / "split", size=8, colour=False)
    assert data.x_train.shape == (8, 1, 8, 8)
    assert len(data.y_test) == 4


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(ScenarioError, match="no directory"):
        load_image_folder(path=tmp_path / "none")
    (tmp_path / "one").mkdir()
    with pytest.raises(ScenarioError, match="1 class folders, 2 are needed"):
        load_image_folder(path=tmp_path)
    (tmp_path / "two").mkdir()
    with pytest.raises(ScenarioError, match="no pictures"):
        load_image_folder(path=tmp_path)
    (tmp_path / "two/a.png").write_bytes(b"no picture")
    with pytest.raises(ScenarioError, match=r"cannot read the picture .*a\.png"):
        load_image_folder(path=tmp_path)


def test_libsvm_text_and_npz_give_the_same_table(tmp_path):
    (tmp_path / "a9a").mkdir()
    (tmp_path / "a9a/a9a").write_text("-1 3:1 11:1\n+1 1:1\n-1 123:1\n")
    (tmp_path / "a9a/a9a.t").write_text("+1 2:1\n-1 3:1\n")
    text = load_a9a(data_dir=tmp_path)
    arrays = {
        "indices_train": np.array([2, 10, 0, 122], np.uint16),
        "indptr_train": np.array([0, 2, 3, 4], np.int32),
        "y_train": np.array([-1, 1, -1], np.int8),
        "indices_test": np.array([1, 2], np.uint16),
        "indptr_test": np.array([0, 1, 2], np.int32),
        "y_test": np.array([1, -1], np.int8),
    }
    np.savez(tmp_path / "a9a/a9a.npz", **arrays)
    table = load_a9a(data_dir=tmp_path)
    for key in ("x_train", "y_train", "x_test", "y_test"):
        assert np.array_equal(getattr(text, key), getattr(table, key))
    assert table.y_train.tolist() == [0, 1, 0]
    scaled = load_a9a(standardise=True, bias=True, data_dir=tmp_path)
    assert scaled.input_shape == (124,)
    assert (scaled.x_train[:, 0] == 1).all()
    assert np.allclose(scaled.x_train[:, 1:].mean(0), 0)
    (tmp_path / "a9a/a9a.npz").write_bytes(b"no zip")
    with pytest.raises(ScenarioError, match="cannot read"):
        load_a9a(data_dir=tmp_path)


def test_speakers_are_devices_and_their_last_words_the_test(tmp_path):
    (tmp_path / "tinyshakespeare").mkdir()
    lines = "abcdefghij" * 4
    text = f"Romeo:\n{lines}\n\nJuliet:\n{lines[::-1]}\n\nRomeo:\n{lines}\n\nNurse:\nno\n"
    (tmp_path / "tinyshakespeare/input.txt").write_text(text)
    data = load_tinyshakespeare(length=8, test_fraction=0.3, data_dir=tmp_path)
    symbols = sorted(set(text))
    assert data.n_classes == len(symbols)
    assert data.device_train.tolist() == [0] * 7 + [1] * 3
    assert np.array_equal(data.x_train[:, 1:], data.y_train[:, :-1])
    first = "".join(symbols[c] for c in data.x_train[0])
    last = "".join(symbols[c] for c in data.x_test[-1])
    assert first == lines[:8]
    assert last in lines[::-1]
    with pytest.raises(ScenarioError, match="no speaker says 101 characters"):
        load_tinyshakespeare(length=100, data_dir=tmp_path)


@pytest.mark.parametrize("load", [load_mnist, load_fashion_mnist])
def test_real_image_sets_have_their_published_sizes(load):
    name = load.__name__.removeprefix("load_").replace("_", "-")
    data = load(data_dir=real(name))
    assert data.x_train.shape == (60_000, 1, 28, 28)
    assert data.x_test.shape == (10_000, 1, 28, 28)
    assert abs(data.x_train.mean() / 255 - data.mean[0]) < 1e-3
    assert abs(data.x_train.std() / 255 - data.std[0]) < 1e-3
    if name == "fashion-mnist":
        assert np.bincount(data.y_train).tolist() == [6000] * 10


def test_real_tables_have_their_published_sizes():
    a9a = load_a9a(data_dir=real("a9a"))
    assert a9a.x_train.shape == (32_561, 123)
    assert a9a.x_test.shape == (16_281, 123)
    assert abs(a9a.y_train.mean() - 0.241) < 0.001
    w8a = load_w8a(data_dir=real("w8a"))
    assert len(w8a.y_train) + len(w8a.y_test) == 49_749
    assert w8a.input_shape == (300,)
    cifar = load_cifar10(variant="6k", data_dir=real("cifar10"))
    assert np.bincount(cifar.y_train).tolist() == [500] * 10


def test_a9a_comes_with_the_published_split():
    a9a = load_a9a(standardise=True, bias=True, workers="published", data_dir=real("a9a"))
    counts = np.bincount(a9a.device_train)
    assert [len(counts), counts.min(), counts.max(), counts[0]] == [20, 535, 3225, 1059]
    parts = [np.flatnonzero(a9a.device_train == i) for i in range(20)]
    problem = ConvexProblem(federate(a9a, parts), "logistic")
    assert problem.smoothness == pytest.approx(11.697374282785784)
    assert problem.minimum.value == pytest.approx(0.31962594849110265, abs=1e-12)


def test_real_shakespeare_has_its_speakers():
    data = load_tinyshakespeare(data_dir=real("tinyshakespeare"))
    assert data.n_classes == 65
    assert 141 <= len(np.unique(data.device_train)) <= 299


def test_real_files_are_the_known_ones():
    shown = [f for f in files.present_files(real("a9a")) if f.path is not None]
    assert shown
    assert all(f.is_known is not False for f in shown)


# --- tables of one's own --------------------------------------------------------------------------

LINES = "+1 1:2 3:1\n-1 2:4\n-1 1:1 2:1 3:1\n+1 3:3\n"


def test_a_table_of_two_classes_is_read_from_text_and_from_sparse_rows(tmp_path):
    (tmp_path / "mine").write_text(LINES)
    text = load_libsvm(path="mine", data_dir=tmp_path, test_fraction=0)
    dense = [[2, 0, 1], [0, 4, 0], [1, 1, 1], [0, 0, 3]]
    assert text.x_train.tolist() == text.x_test.tolist() == dense
    assert text.y_train.tolist() == [1, 0, 0, 1]
    np.savez(
        tmp_path / "mine.npz",
        indptr=[0, 2, 3, 6, 7],
        indices=[0, 2, 1, 0, 1, 2, 2],
        data=[2.0, 1, 4, 1, 1, 1, 3],
        shape=[4, 3],
        y=[1, -1, -1, 1],
        cluster=[1, 0, 1, 0],
    )
    rows = load_libsvm(path=tmp_path / "mine.npz", workers="file", n_devices=2, test_fraction=0)
    assert rows.x_train.tolist() == dense
    assert rows.device_train.tolist() == [1, 0, 1, 0]
    ready = load_libsvm(path=tmp_path / "mine.npz", standardise=True, bias=True, test_fraction=0)
    np.testing.assert_allclose(ready.x_train[:, 1:].mean(0), 0, atol=1e-15)
    np.testing.assert_allclose(ready.x_train[:, 1:].std(0), 1)
    assert (ready.x_train[:, 0] == 1).all()
    assert len(load_libsvm(path=tmp_path / "mine", test_fraction=0.25).y_test) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": "none"}, "no file 'none'"),
        ({"path": "mine", "workers": "published"}, "not one of none, file, clusters"),
        ({"path": "mine", "workers": "file"}, "has no array 'cluster'"),
        ({"path": "bad"}, "cannot read"),
        ({"path": "bad.npz"}, "cannot read"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path, options, said):
    (tmp_path / "mine").write_text(LINES)
    (tmp_path / "bad").write_text("one two\n")
    (tmp_path / "bad.npz").write_bytes(b"PK not really")
    with pytest.raises(ScenarioError, match=said):
        load_libsvm(data_dir=tmp_path, **options)
