"""A lock between processes, on one host or on a shared file system."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from moe_jax.errors import UserError


def make_folder(folder: Path) -> Path:
    """Creates a cache folder.

    Raises:
      UserError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.folder: cannot create {str(folder)!r} ({error.strerror}); set "
            "--config.data.folder to a folder that you can write to"
        ) from None
    return folder


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds the lock file `path`; waits while another process holds it.

    The file stays behind: removing it would let two processes lock different files
    of the same name. The kernel frees the lock when its holder dies.

    Raises:
      UserError: the lock file cannot be written.
    """
    make_folder(path.parent)
    try:
        file = path.open("a")
    except OSError as error:
        raise UserError(
            f"data.folder: cannot write to {str(path.parent)!r} ({error.strerror}); "
            "set --config.data.folder to a folder that you can write to"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
