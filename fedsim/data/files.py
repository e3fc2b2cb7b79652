"""Where data files are looked for, and which are there.

Nothing is ever downloaded: a missing file is an error that lists the names searched and says where
to get it.
"""

import gzip
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from fedsim.errors import MissingDataError

__all__ = ["DATA_FILES", "DataFile", "PresentFile", "data_directories", "find", "present_files"]


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of a data set.

    Parameters
    ----------
    dataset, part : str
    names : tuple of str
        Paths below a data directory, in the order searched; `.gz` may be missing.
    sha256 : str, optional
        Of the content, uncompressed if the name ends in `.gz` (the same pixels come in different
        wrappers); None: not known.
    """

    dataset: str
    part: str
    names: tuple[str, ...]
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class PresentFile:
    """A data file that was looked for: where it is, and whether its content is the known one."""

    file: DataFile
    path: Path | None
    size_bytes: int
    sha256: str | None

    @property
    def is_known(self) -> bool | None:
        """Whether the checksum is the expected one; None if there is nothing to compare."""
        if self.sha256 is None or self.file.sha256 is None:
            return None
        return self.sha256 == self.file.sha256


SOURCES = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion_mnist": "https://github.com/zalandoresearch/fashion-mnist",
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html (python version, unpacked)",
    "a9a": "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html#a9a",
    "w8a": "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html#w8a",
    "tinyshakespeare": "https://github.com/karpathy/char-rnn/tree/master/data/tinyshakespeare",
}

_IDX = ("train-images", "train-labels", "t10k-images", "t10k-labels")
_IDX_SHA256 = {
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion_mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
_IDX_FOLDERS = {
    "mnist": ("mnist", "MNIST/raw"),
    "fashion_mnist": ("fashion-mnist", "FashionMNIST/raw"),
}


def _idx_files(dataset: str) -> list[DataFile]:
    files = []
    for part, sha256 in zip(_IDX, _IDX_SHA256[dataset], strict=True):
        name = f"{part}-idx{3 if 'images' in part else 1}-ubyte.gz"
        names = tuple(f"{folder}/{name}" for folder in _IDX_FOLDERS[dataset])
        files.append(DataFile(dataset, part, names, sha256))
    return files


def _libsvm_file(dataset: str, part: str, npz_sha256: str) -> DataFile:
    suffix = ".t" if part == "test" else ""
    names = (f"{dataset}/{dataset}.npz", f"{dataset}/{dataset}{suffix}", f"{dataset}{suffix}")
    return DataFile(dataset, part, names, npz_sha256)


_A9A = "ad36954de517ab3411b8da458de69efa25eb652811e7efcfe0d0f2d905a67a3b"
_W8A = "be06894c7d7c45aeb94346b5ea1ed745df252ef5f20780df13491a48cda47da2"
DATA_FILES: tuple[DataFile, ...] = (
    *_idx_files("mnist"),
    *_idx_files("fashion_mnist"),
    *(
        DataFile("cifar10", name, (f"cifar-10-batches-py/{name}", f"cifar10/{name}"))
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    ),
    DataFile(
        "cifar10",
        "jpeg",
        ("cifar10/cifar10-jpeg.npz",),
        "40998d72431d2dcf5701fb26786c62e51111766b2d00f34a3702326cf909e751",
    ),
    DataFile(
        "cifar10",
        "6k",
        ("cifar10/cifar10-6k.npz",),
        "4b025e2184fa20a96e31416276b949f7e52ccd904f381c3bbc03324ff28eee56",
    ),
    _libsvm_file("a9a", "train", _A9A),
    _libsvm_file("a9a", "test", _A9A),
    _libsvm_file("w8a", "train", _W8A),
    DataFile("w8a", "test", ("w8a/w8a.t", "w8a.t")),
    DataFile(
        "tinyshakespeare",
        "text",
        ("tinyshakespeare/input.txt", "tinyshakespeare.txt"),
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
)


def data_directories(data_dir: Path | None = None) -> list[Path]:
    """Return the directories searched: `data_dir`, else `FEDSIM_DATA`, else `data` here.

    Parameters
    ----------
    data_dir : Path, optional
        What the user chose; then nothing else is searched. `FEDSIM_DATA` may hold several
        directories, parted as in PATH.
    """
    if data_dir is not None:
        return [Path(data_dir)]
    listed = os.environ.get("FEDSIM_DATA")
    return [Path(part) for part in listed.split(os.pathsep) if part] if listed else [Path("data")]


def _search(file: DataFile, data_dir: Path | None) -> Path | None:
    for directory in data_directories(data_dir):
        for name in file.names:
            for candidate in (directory / name, directory / name.removesuffix(".gz")):
                if candidate.is_file():
                    return candidate
    return None


def find(dataset: str, part: str, data_dir: Path | None = None) -> Path | None:
    """Return where a part of a data set lies, or None."""
    for file in DATA_FILES:
        if (file.dataset, file.part) == (dataset, part):
            return _search(file, data_dir)
    raise KeyError(f"{dataset}/{part}")


def need(dataset: str, part: str, data_dir: Path | None = None) -> Path:
    """Return where a part of a data set lies.

    Raises
    ------
    MissingDataError
        If it is nowhere: lists the names searched and where to get the file.
    """
    path = find(dataset, part, data_dir)
    if path is None:
        raise missing(dataset, (part,), data_dir)
    return path


def missing(dataset: str, parts: tuple[str, ...], data_dir: Path | None) -> MissingDataError:
    """Return the error for parts of a data set that are nowhere."""
    names = [n for f in DATA_FILES if f.dataset == dataset and f.part in parts for n in f.names]
    where = ", ".join(str(directory.absolute()) for directory in data_directories(data_dir))
    return MissingDataError(
        f"data.dataset: {dataset} is not there; looked in {where} for {', '.join(names)}; get it "
        f"from {SOURCES[dataset]} and name its directory with --data-dir or FEDSIM_DATA"
    )


def present_files(data_dir: Path | None = None) -> list[PresentFile]:
    """Return every known data file with its place and checksum, absent ones with `path` None."""
    return [_inspect(file, _search(file, data_dir)) for file in DATA_FILES]


def _inspect(file: DataFile, path: Path | None) -> PresentFile:
    if path is None:
        return PresentFile(file, None, 0, None)
    digest = hashlib.sha256()
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return PresentFile(file, path, path.stat().st_size, digest.hexdigest())
