"""Single files of a source: reading them, and what stands for their content."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np

from moe_jax.data import npy
from moe_jax.errors import UserError, nearest


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
    if not _is_archive(path, field):
        why = f"no npz file; one with the arrays {names} is needed"
        raise unreadable(path, field, why)
    with _opened(np.load, path, field, allow_pickle=False) as found:
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
    """Checks the head of an array before memory is taken for it; raises ValueError."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        npy.check_head(member, info.file_size)


def array(path: str, field: str) -> np.ndarray:
    """The array of an npy file, mapped and not read; raises as `arrays`."""
    if _is_archive(path, field):
        raise UserError(
            f"data.source.{field}={path!r}: is an npz file; an npy file is needed"
        )
    return _opened(npy.mapped, path, field)


def _is_archive(path: str, field: str) -> bool:
    def looks_like_one(path: Path) -> bool:
        with path.open("rb") as file:
            return zipfile.is_zipfile(file)

    return _opened(looks_like_one, path, field)


def _opened(opener, path: str, field: str, **options):
    try:
        return opener(Path(path).expanduser(), **options)
    except OSError as error:
        raise unreadable(path, field, error.strerror or error) from None
    except Exception as error:  # numpy raises many classes for damaged files
        raise unreadable(path, field, f"no npy or npz file: {error}") from None
