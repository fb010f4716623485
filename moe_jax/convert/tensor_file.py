"""Files of tensors in the safetensors format: read by pages, written as a stream.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name to
type, shape, and where the bytes lie), and the bytes of the tensors, without gaps. A
reader maps one tensor at a time, so that only what is touched is read, and nothing of a
file can be executed. (The format's own library, `safetensors`, has no FP8 for numpy,
and writes a file only of tensors that are all in memory.)
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from moe_jax.errors import UserError

# By their names in a header.
TYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in TYPES.items()}
_LENGTH = 8
_LONGEST_HEADER = 100_000_000  # As the format's own library has it.
_METADATA = "__metadata__"


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
      path: of the file.
      name: of the tensor.
      type_name: one of `TYPES`.
      shape: of the tensor.
      start: where its bytes begin in the file.
    """

    path: str
    name: str
    type_name: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> np.dtype:
        return TYPES[self.type_name]

    def array(self) -> np.ndarray:
        """The tensor as it lies in the file, mapped and not read."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(
            self.path, self.dtype, mode="r", offset=self.start, shape=self.shape
        )


def read_header(path: str) -> dict[str, Stored]:
    """The tensors of a file, by name.

    Raises:
      UserError: the file cannot be read, or is damaged: cut short, or its header says
        what cannot be.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH), "little")
            if size < _LENGTH or length > min(size - _LENGTH, _LONGEST_HEADER):
                raise UserError(
                    f"{path} is cut short, or no safetensors file: of a header of "
                    f"{length} bytes it holds {max(0, size - _LENGTH)}; fetch it again"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is not a table of tensors")
    header.pop(_METADATA, None)
    begin = _LENGTH + length
    found, ends = {}, []
    for name, entry in header.items():
        type_name, shape, first, last = _entry(path, name, entry)
        ends.append((first, last, name))
        found[name] = Stored(path, name, type_name, shape, begin + first)
    _check_layout(path, ends, size - begin)
    return found


def _entry(path: str, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    is_size = lambda v: type(v) is int and v >= 0
    try:
        type_name, shape = entry["dtype"], tuple(entry["shape"])
        first, last = entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{path}: the header's entry of {name} is damaged") from None
    if not isinstance(type_name, str) or type_name not in TYPES:
        raise UserError(f"{path}: {name} is of type {type_name!r}, which is not known")
    if not all(map(is_size, (*shape, first, last))):
        raise UserError(f"{path}: the header's entry of {name} is damaged")
    if last - first != math.prod(shape) * TYPES[type_name].itemsize:
        raise UserError(
            f"{path}: {name} is {type_name}{list(shape)}, but the header gives it "
            f"{last - first} bytes"
        )
    return type_name, shape, first, last


def _check_layout(path: str, ends: list[tuple[int, int, str]], size: int) -> None:
    """Tensors must lie one after the other, and fill the file."""
    at = 0
    for first, last, name in sorted(ends):
        if first != at:
            how = "overlaps the tensor before it" if first < at else "leaves a gap"
            raise UserError(f"{path}: {name} {how}; the header is damaged")
        at = last
    if at != size:
        what = "is cut short" if size < at else "is longer than its header says"
        raise UserError(
            f"{path} {what}: {size} bytes of tensors, {at} expected; fetch it again"
        )


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor to be written. Attributes: as those of `Stored`."""

    name: str
    type_name: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * TYPES[self.type_name].itemsize


def write(path: str, tensors: Iterable[Planned], values: Iterator[np.ndarray]) -> None:
    """Writes a file, one tensor after the other.

    Args:
      path: of the file.
      tensors: all of them, in order.
      values: of the same length; each of the type and shape that is planned.

    Raises:
      OSError: the file cannot be written.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.type_name,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(_LENGTH, "little"))
        file.write(text)
        for tensor in tensors:
            value = next(values)
            if value.shape != tensor.shape or NAMES[value.dtype] != tensor.type_name:
                raise ValueError(f"{tensor} got {value.dtype}{value.shape}")
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def save(path: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes arrays that are at hand to a file."""
    planned = [Planned(n, NAMES[a.dtype], a.shape) for n, a in tensors.items()]
    write(path, planned, iter(tensors.values()))
