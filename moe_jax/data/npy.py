"""Arrays in files of numpy: the head is looked at before numpy believes it."""

import math
from pathlib import Path
from typing import BinaryIO

import numpy as np

_HEADS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def check_head(file: BinaryIO, size: int) -> None:
    """Reads the head of an npy file.

    Args:
      file: at its start.
      size: bytes of the whole file.

    Raises:
      ValueError: it is none, asks for more than the file holds, or has elements of
        no size (numpy divides by it).
    """
    version = np.lib.format.read_magic(file)
    if version not in _HEADS:
        raise ValueError(f"npy version {version}")
    shape, _, dtype = _HEADS[version](file)
    wanted = math.prod(shape) * dtype.itemsize
    if not dtype.itemsize or min(shape, default=0) < 0 or wanted > size:
        raise ValueError(f"{dtype} {shape} by its head, and {size} bytes")


def mapped(path: Path) -> np.ndarray:
    """The array of an npy file, mapped and not read.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no npy file, or damaged.
    """
    with path.open("rb") as file:
        check_head(file, path.stat().st_size)
    return np.load(path, mmap_mode="r", allow_pickle=False)
