"""Cache folders that several processes share, on one host or a file system."""

import contextlib
import errno
import fcntl
import shutil
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


def is_full_disk(error: BaseException) -> bool:
    """Whether the error says that no space or quota is left."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    # array_record raises a RuntimeError that only spells it out.
    return getattr(error, "errno", None) in numbers or "No space left" in str(error)


def full_disk_error(folder: Path) -> UserError:
    """What to tell the user once the half-written files are gone."""
    free = shutil.disk_usage(folder).free
    return UserError(
        f"data.folder: no space left in {str(folder)!r} ({free} bytes free without "
        "the files that were begun); free more or set --config.data.folder"
    )
