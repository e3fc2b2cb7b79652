"""Flower arrays as views of stacked tensors, serialised only if somebody asks for bytes.

Flower's `Array` runs `numpy.save` when it is built and `numpy.load` whenever it is read. Here the
models of all devices of a round are one tensor per layer, `(n_devices, *shape)`, and a reply's
array is one row of it: `LazyArray` has the attributes `stack` and `row`, knows its size from the
dtype and shape, and becomes bytes only through `data`.

bfloat16, which numpy and therefore Flower cannot carry, weighs 2 bytes an element here and reads
as float32.
"""

import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import cache
from io import BytesIO
from operator import is_
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedsim.flower import compat

__all__ = [
    "FiniteCheck",
    "Intake",
    "LazyArray",
    "LazyArrayRecord",
    "array_bytes",
    "cast_like",
    "flower_bytes",
    "payload_bytes",
    "private_copy",
    "release_rows",
    "stack_records",
    "stacked_record",
    "stacked_records",
    "template_of",
    "tensor_of",
]

_log = logging.getLogger(__name__)


class LazyArray(Array):
    """A Flower `Array` over a tensor in memory, or over one row of a stacked tensor.

    Parameters
    ----------
    stack : Tensor or ndarray
        The values; with `row`, a stack `(n_devices, *shape)` of which one row is meant.
    row : int, optional
        The row of `stack`. Without it the array is `stack` itself and is no part of a stack.

    Attributes
    ----------
    stack : Tensor or None
        The stack this array is a row of.
    row : int or None
        Its row.
    """

    stack: torch.Tensor | None
    row: int | None

    def __init__(self, stack: torch.Tensor | NDArray[Any], row: int | None = None) -> None:
        if isinstance(stack, np.ndarray):
            stack = torch.from_numpy(stack)
        self._set(stack, row, tuple(stack.shape if row is None else stack.shape[1:]))

    def _set(self, stack: torch.Tensor, row: int | None, shape: tuple[int, ...]) -> None:
        self.__dict__.update(  # past Array.__setattr__, whose bookkeeping needs `data`
            stack=None if row is None else stack,
            row=row,
            _value=stack if row is None else None,
            _bytes=None,
            dtype=_name_of(stack.dtype),
            shape=shape,
            stype="numpy.ndarray",
        )

    def tensor(self) -> torch.Tensor:
        """Return the values as a tensor that shares memory with them: do not write to it."""
        value: torch.Tensor | None = self.__dict__["_value"]
        return self.__dict__["stack"][self.__dict__["row"]] if value is None else value

    def numpy(self) -> NDArray[Any]:
        """Return a private, writable copy: strategies write into what they are given."""
        tensor = self.tensor().detach()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        return np.array(tensor.cpu().numpy(), copy=True)

    @property
    def data(self) -> bytes:
        """The `.npy` bytes, built when first read."""
        if self.__dict__["_bytes"] is None:
            self.__dict__["_bytes"] = Array(self.numpy()).data
        return bytes(self.__dict__["_bytes"])

    @data.setter
    def data(self, value: bytes) -> None:
        plain = Array(dtype=self.dtype, shape=self.shape, stype=self.stype, data=value)
        fields = self.__dict__
        fields["_bytes"] = value
        values = plain.numpy() if value else np.empty(self.shape, self.dtype)
        fields["_value"] = torch.from_numpy(values)
        fields["stack"] = fields["row"] = None

    def deflate(self) -> bytes:
        """Return what a plain `Array` of these values deflates to: real grids know only that."""
        return Array(self.numpy()).deflate()

    def __repr__(self) -> str:
        return f"LazyArray(dtype={self.dtype}, shape={self.shape})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        mine, theirs = (self.dtype, self.shape), (other.dtype, other.shape)
        return mine == theirs and self.data == other.data

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[Array], tuple[str, tuple[int, ...], str, bytes]]:
        plain = Array(self.numpy())
        return Array, (plain.dtype, plain.shape, plain.stype, plain.data)

    def __copy__(self) -> "LazyArray":
        copied = LazyArray.__new__(LazyArray)
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "LazyArray":
        return LazyArray(self.numpy())


class LazyArrayRecord(ArrayRecord):
    """An `ArrayRecord` that keeps lazy arrays lazy (the base class degrades them to bytes)."""

    def __init__(self, arrays: Mapping[str, Array] | None = None) -> None:
        super().__init__()
        for key, array in (arrays or {}).items():
            self[key] = array

    def to_numpy_ndarrays(self, *, keep_input: bool = True) -> list[NDArray[Any]]:
        """Return private copies of the arrays in order (no serialisation, no `gc.collect`)."""
        arrays = [array.numpy() for array in self.values()]
        if not keep_input:
            self.clear()
        return arrays

    def to_torch_state_dict(self, *, keep_input: bool = True) -> OrderedDict[str, torch.Tensor]:
        """Return private copies of the arrays as a PyTorch state dict."""
        state = OrderedDict((key, torch.from_numpy(a.numpy())) for key, a in self.items())
        if not keep_input:
            self.clear()
        return state

    def count_bytes(self) -> int:
        """Return what the base class counts, headers and keys included, without serialising."""
        return sum(
            len(key) + _header_bytes(array.dtype, tuple(array.shape)) + array_bytes(array)
            for key, array in self.items()
        )

    def deflate(self) -> bytes:
        """Return what a plain `ArrayRecord` of these arrays deflates to."""
        plain = ArrayRecord()
        for key, array in self.items():
            plain[key] = array
        return plain.deflate()

    def __reduce__(self) -> tuple[type[ArrayRecord], tuple[dict[str, Array]]]:
        return ArrayRecord, ({key: Array(array.numpy()) for key, array in self.items()},)


@cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _header_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the length of the `.npy` header of a C-ordered array."""
    name = "float32" if dtype == "bfloat16" else dtype
    header = BytesIO()
    description = {"descr": np.dtype(name).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.tell()


def stacked_record(stacks: Mapping[str, torch.Tensor], row: int) -> LazyArrayRecord:
    """Return the record whose arrays are row `row` of `stacks`, each `(n_devices, *shape)`."""
    arrays = {key: LazyArray(stack, row) for key, stack in stacks.items()}
    return compat.record_of(LazyArrayRecord, arrays)


def stacked_records(stacks: Mapping[str, torch.Tensor]) -> list[LazyArrayRecord]:
    """Return `stacked_record` of every row; what the rows have in common is worked out once."""
    firsts = [(key, LazyArray(stack, 0).__dict__) for key, stack in stacks.items()]
    records = []
    for row in range(len(next(iter(stacks.values())))):
        arrays = {}
        for key, first in firsts:
            array = arrays[key] = LazyArray.__new__(LazyArray)
            array.__dict__.update(first, row=row)
        records.append(compat.record_of(LazyArrayRecord, arrays))
    return records


def stack_records(records: Sequence[ArrayRecord]) -> dict[str, torch.Tensor]:
    """Stack records of equal keys and shapes: one tensor `(len(records), *shape)` per key.

    Rows of one common stack are gathered in one indexing operation; anything else is stacked from
    its values. The result is private to the caller.
    """
    stacks = {}
    for key in records[0]:
        arrays = [record[key] for record in records]
        common: torch.Tensor | None = getattr(arrays[0], "stack", None)
        is_common = common is not None and all(getattr(a, "stack", None) is common for a in arrays)
        if common is not None and is_common:
            rows = [a.row for a in arrays]  # type: ignore[attr-defined]
            stacks[key] = common.index_select(0, torch.tensor(rows, device=common.device))
        else:
            rows_of_all = [tensor_of(array) for array in arrays]
            place = next((t.device for t in rows_of_all if t.device.type != "cpu"), None)
            stacks[key] = torch.stack([t.to(place) if place else t for t in rows_of_all])
    return stacks


def release_rows(records: Iterable[ArrayRecord]) -> None:
    """Copy rows out of stacks of which less than a half is in use, so that the rest can go.

    Parameters
    ----------
    records : iterable of ArrayRecord
        All that still holds rows; lazy arrays are changed to rows of the copies.
    """
    users: dict[int, tuple[torch.Tensor, list[LazyArray]]] = {}
    for record in records:
        for array in record.values():
            if isinstance(array, LazyArray) and array.stack is not None:
                users.setdefault(id(array.stack), (array.stack, []))[1].append(array)
    for stack, arrays in users.values():
        if 2 * len(arrays) < len(stack):
            index = torch.tensor([array.row for array in arrays], device=stack.device)
            rows = stack.index_select(0, index)
            for row, array in enumerate(arrays):
                array.__dict__.update(stack=rows, row=row)


def tensor_of(array: Array) -> torch.Tensor:
    """Return an array's values, of a row of a stack (a strategy's, too) a view."""
    if isinstance(array, LazyArray):
        return array.tensor()
    stack: torch.Tensor | None = getattr(array, "stack", None)
    return torch.from_numpy(array.numpy()) if stack is None else stack[array.row]  # type: ignore[attr-defined]


class FiniteCheck:
    """Tells which records hold numbers that are not finite; looks at a common stack once.

    What it has found is kept for as long as the stack: replies of one batch are asked for one by
    one where their server does not wait for all.
    """

    def __init__(self) -> None:
        self._bad: dict[int, tuple[weakref.ref[torch.Tensor], frozenset[int]]] = {}

    def __call__(self, record: ArrayRecord) -> bool:
        """Return whether all numbers are finite (encoded arrays are not looked into)."""
        for array in compat.values_of(record).values():
            stack: torch.Tensor | None = getattr(array, "stack", None)
            if stack is None:
                is_float = array.dtype in ("float16", "bfloat16", "float32", "float64")
                if is_float and not bool(torch.isfinite(tensor_of(array)).all()):
                    return False
                continue
            known = self._bad.get(id(stack))
            if known is None or known[0]() is not stack:
                known = self._bad[id(stack)] = self._watch(stack), _rows_not_finite(stack)
            if array.row in known[1]:
                return False
        return True

    def _watch(self, stack: torch.Tensor) -> "weakref.ref[torch.Tensor]":
        bad, key = self._bad, id(stack)

        def forget(gone: "weakref.ref[torch.Tensor]") -> None:
            if key in bad and bad[key][0] is gone:
                del bad[key]

        return weakref.ref(stack, forget)


def _rows_not_finite(stack: torch.Tensor) -> frozenset[int]:
    """Return the rows with a NaN or an infinity; a sum has one where its terms have."""
    if not stack.is_floating_point():
        return frozenset()
    sums = stack.flatten(1).sum(1) if stack.dim() > 1 else stack
    suspects = torch.nonzero(~torch.isfinite(sums)).flatten().tolist()
    return frozenset(row for row in suspects if not bool(torch.isfinite(stack[row]).all()))


def array_bytes(array: Array) -> int:
    """Return elements × itemsize of an array without serialising it."""
    return math.prod(array.shape) * _itemsize(array.dtype)


@cache
def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def payload_bytes(content: RecordDict) -> int:
    """Return the dense payload of a message: elements × itemsize of its arrays.

    Metrics and configs weigh nothing (the field's convention); see `flower_bytes`.
    """
    return sum(
        array_bytes(array)
        for record in compat.values_of(content).values()
        if isinstance(record, ArrayRecord)
        for array in compat.values_of(record).values()
    )


def flower_bytes(content: RecordDict) -> int:
    """Return what Flower counts: the `count_bytes` of every record, array headers included."""
    return sum(_count_bytes(record) for record in content.values())


def _count_bytes(record: Any) -> int:
    if isinstance(record, ConfigRecord):  # its count_bytes raises on an empty list
        filled = {key: value for key, value in record.items() if value != []}
        empty = sum(len(key) for key in record if key not in filled)
        return ConfigRecord(filled).count_bytes() + empty
    return int(record.count_bytes())


class Intake:
    """Copies what is pushed, so that later changes by its sender are not seen, and weighs it.

    Flower puts one `RecordDict` into all messages of a round and changes its config in the next; a
    straggler must still read the old one. Array values are shared, they are never written to.
    Contents that carry the very same arrays get one ArrayRecord, copied, cast and weighed once: an
    asynchronous strategy pushes a content for each device, and all of one version share a model.

    Parameters
    ----------
    accounting : {"dense", "flower"}
        `payload_bytes` or `flower_bytes`.
    keep_dtypes : bool
        Cast float arrays to the dtype that their key first had; see `cast_like`.
    """

    def __init__(self, accounting: Literal["dense", "flower"], *, keep_dtypes: bool) -> None:
        self._is_dense = accounting == "dense"
        self._keep_dtypes = keep_dtypes
        self._template: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._taken: dict[str, tuple[dict[str, Array], ArrayRecord, int]] = {}
        self._copied: dict[str, tuple[dict[str, Any], Any]] = {}

    def __call__(self, content: RecordDict) -> tuple[RecordDict, int]:
        """Return a copy of a content, and its payload in bytes."""
        size = 0
        records: dict[str, Any] = {}
        for name, record in compat.values_of(content).items():
            if isinstance(record, ArrayRecord):
                records[name], weight = self._take(name, record, content)
                size += weight
            else:
                records[name] = self._copy(name, record)
        copied = compat.record_of(RecordDict, records)
        return copied, size if self._is_dense else flower_bytes(copied)

    def _copy(self, name: str, record: Any) -> Any:
        """Return a copy of a config: what was made last, if it holds the very same values."""
        values = compat.values_of(record)
        given, copied = self._copied.get(name, ({}, None))
        if copied is None or not _are_same(given, values):
            copied = record.copy()
            self._copied[name] = dict(values), copied
        return copied

    def _take(self, name: str, record: ArrayRecord, content: RecordDict) -> tuple[ArrayRecord, int]:
        """Return the copy of a record of arrays, and its weight: what was made last, if it fits."""
        arrays = compat.values_of(record)
        if name in self._taken:
            given, copied, size = self._taken[name]
            if _are_same(given, arrays):
                return copied, size
        copied = record.copy()
        if self._keep_dtypes:
            records = (r for r in content.values() if isinstance(r, ArrayRecord))
            self._template = self._template or template_of(records)
            copied = cast_like(copied, self._template)
        size = sum(map(array_bytes, compat.values_of(copied).values()))
        self._taken[name] = dict(arrays), copied, size
        return copied, size


def _are_same(given: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Return whether a record still has these very values, in this order."""
    return list(given) == list(values) and all(map(is_, given.values(), values.values()))


def private_copy(content: RecordDict) -> RecordDict:
    """Copy a content for one receiver, which may then change it as it likes."""
    copied = RecordDict()
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            copied[name] = LazyArrayRecord({key: copy(array) for key, array in record.items()})
        else:
            copied[name] = record.copy()
            for key, value in record.items():
                if isinstance(value, list):
                    copied[name][key] = list(value)  # type: ignore[assignment]
    return copied


def cast_like(
    record: ArrayRecord, template: Mapping[str, tuple[str, tuple[int, ...]]]
) -> ArrayRecord:
    """Return a record whose float arrays have the dtype they first had: itself if they have.

    NumPy 2 turns float32 times a float64 scalar into float64, which doubles the download of
    several of Flower's strategies from round 2 on. Only float arrays whose key and shape are in
    `template` (key → (dtype, shape)) are touched.
    """
    arrays = compat.values_of(record)
    changed = {
        key: _cast(array, template[key][0])
        for key, array in arrays.items()
        if _drifted(array, template.get(key))
    }
    if not changed:
        return record
    _log.info("cast %d array(s) on the way down to the dtype they first had", len(changed))
    return compat.record_of(LazyArrayRecord, {**arrays, **changed})


def _drifted(array: Array, wanted: tuple[str, tuple[int, ...]] | None) -> bool:
    return (
        wanted is not None
        and array.dtype != wanted[0]
        and tuple(array.shape) == wanted[1]
        and array.dtype in ("float16", "float32", "float64")
    )


def _cast(array: Array, dtype: str) -> LazyArray:
    if dtype == "bfloat16":
        return LazyArray(torch.from_numpy(array.numpy()).to(torch.bfloat16))
    values = array.numpy()
    if np.issubdtype(np.dtype(dtype), np.integer):
        values = np.rint(values)  # a counter that was averaged
    return LazyArray(np.asarray(values, dtype))


def template_of(records: Iterable[ArrayRecord]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return key → (dtype, shape) of the arrays in `records`."""
    return {
        key: (array.dtype, tuple(array.shape))
        for record in records
        for key, array in record.items()
    }
