"""Folders of flat files, made once from a source and found again by a key.

A folder is filled under another name and put in its place by one rename, so that it is
there whole or not at all, whenever the process ends. Its manifest has the size and the
SHA-256 of every file.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moe_jax.data import folders

_MANIFEST = "manifest.json"
_log = logging.getLogger(__name__)
Opened = TypeVar("Opened")


class DamagedError(Exception):
    """A prepared folder is not what its manifest says."""


def open_or_build(
    folder: Path,
    key: dict[str, Any],
    read: Callable[[Path], Opened],
    write: Callable[[Path], None],
) -> Opened:
    """What `read` gives of the key's folder; `write` makes it where it is not there.

    Several processes may call this at once: one works and the others wait.

    Args:
      folder: of all prepared folders.
      key: JSON-ready; what the files depend on.
      read: opens a folder; raises FileNotFoundError or DamagedError.
      write: fills an empty folder.

    Raises:
      UserError: a full disk, a folder that cannot be written, or by `write`.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = folder / digest[:16]
    # Without the lock first, for a cache that others prepared and may only be read.
    # A rename put the folder there, so no one sees it half written.
    with contextlib.suppress(FileNotFoundError, DamagedError):
        return read(path)
    with folders.exclusive(folder / f"{path.name}.lock"):
        for leftover in folder.glob(f"{path.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            return read(path)
        except FileNotFoundError:
            pass
        except DamagedError as error:
            _log.warning("%s is damaged (%s) and is made again", path, error)
        _build(path, write)
        return read(path)


def _build(path: Path, write: Callable[[Path], None]) -> None:
    """Fills a temporary folder beside `path` and renames it."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir()
        write(temporary)
        if path.exists():  # the damaged one; a folder cannot be renamed onto it
            shutil.rmtree(path)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:
        if not folders.is_full_disk(error):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        raise folders.full_disk_error(path.parent) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def damage():
    """Within it, what a wrong manifest or file makes Python raise is a DamagedError."""
    try:
        yield
    except DamagedError:
        raise
    except Exception as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from None


def read_manifest(path: Path, format_version: int) -> dict[str, Any]:
    """The manifest of a folder; within `damage`.

    Raises:
      DamagedError: it is of another version.
    """
    manifest = json.loads((path / _MANIFEST).read_text())
    if manifest["format_version"] != format_version:
        raise DamagedError(f"format version {manifest['format_version']!r}")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes what `read_manifest` reads; the last file of a folder."""
    with (folder / _MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=2)
        _flush(file)
    _sync(folder)


def checked(path: Path, entry: dict[str, Any]) -> Path:
    """The file of an entry of the manifest.

    Raises:
      DamagedError: it lies elsewhere or has another size.
    """
    name = entry["name"]
    if not name or name != os.path.basename(name) or name in (".", ".."):
        raise DamagedError(f"file name {name!r}")
    if (path / name).resolve().parent != path.resolve():
        raise DamagedError(f"{name} is a link that leads out of the folder")
    size = (path / name).stat().st_size
    if size != entry["size_bytes"]:
        raise DamagedError(f"{name} has {size} bytes, not {entry['size_bytes']}")
    return path / name


def write_array(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Writes an npy file and returns its entry of the manifest."""
    # Through memory: np.save to a file hides the error number of a full disk.
    buffer = io.BytesIO()
    np.save(buffer, array)
    with Hashed(path) as file:
        file.write(buffer.getbuffer())
    return file.entry()


class Hashed:
    """A file that is written once, and hashed as it is."""

    def __init__(self, path: Path):
        self._path, self._digest = path, hashlib.sha256()

    def __enter__(self) -> "Hashed":
        self._file = self._path.open("wb")
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        try:
            if kind is None:
                _flush(self._file)
        finally:
            self._file.close()

    def write(self, content: bytes | memoryview) -> None:
        self._digest.update(content)
        self._file.write(content)

    def entry(self) -> dict[str, Any]:
        """Of the manifest: name, size and hash."""
        return {
            "name": self._path.name,
            "size_bytes": self._path.stat().st_size,
            "sha256": self._digest.hexdigest(),
        }


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
