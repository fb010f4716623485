"""Single files of a source: reading them, and what stands for their content."""

import hashlib
import math
import zipfile
from pathlib import Path

import numpy as np

from moe_jax.errors import UserError, nearest

_HEADS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read(path: str, field: str) -> bytes:
    """The content of a file.

    Args:
      path: where it is; `~` is the home folder.
      field: of the source, that names it.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise unreadable(path, field, error.strerror) from None


def digest(path: str, field: str) -> str:
    """The SHA-256 of a file, in hexadecimal digits; raises as `read`."""
    try:
        with Path(path).expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, field, error.strerror) from None


def unreadable(path: str, field: str, why: object) -> UserError:
    """What to say of a file that cannot be read."""
    return UserError(f"data.source.{field}={path!r}: cannot be read ({why})")


def arrays(path: str, field: str, names: list[str]) -> list[np.ndarray]:
    """The arrays of these names in an npz file.

    Raises:
      UserError: it cannot be read, is no npz file, or lacks one.
    """
    found = _numpy(path, field)
    if isinstance(found, np.ndarray):
        raise UserError(
            f"data.source.{field}={path!r}: is one array; an npz file with the arrays "
            f"{names} is needed"
        )
    with found:
        for name in names:
            if name not in found:
                raise UserError(
                    f"data.source.{field}={path!r}: has no array {name!r}, but "
                    f"{sorted(found)}{nearest(name, found)}"
                )
        try:
            for name in names:
                _check_member(found.zip, name)
            return [found[name] for name in names]
        except Exception as error:  # numpy, zipfile and zlib raise many classes
            raise unreadable(path, field, error) from None


def _check_member(archive: zipfile.ZipFile, name: str) -> None:
    """Checks the head of an array before memory is taken for it.

    Raises:
      ValueError: it asks for more than the archive holds.
    """
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in _HEADS:
            raise ValueError(f"array {name!r} is of npy version {version}")
        shape, _, dtype = _HEADS[version](member)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > info.file_size:
        raise ValueError(
            f"array {name!r} is {dtype} {shape} by its head, and has {info.file_size} "
            "bytes"
        )


def array(path: str, field: str) -> np.ndarray:
    """The array of an npy file, mapped and not read; raises as `arrays`."""
    found = _numpy(path, field)
    if not isinstance(found, np.ndarray):
        found.close()
        raise UserError(
            f"data.source.{field}={path!r}: is an npz file; an npy file is needed"
        )
    return found


def _numpy(path: str, field: str) -> np.ndarray | np.lib.npyio.NpzFile:
    try:
        return np.load(Path(path).expanduser(), mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise unreadable(path, field, error.strerror or error) from None
    except Exception as error:  # numpy raises many classes for damaged files
        raise unreadable(path, field, f"no npy or npz file: {error}") from None
