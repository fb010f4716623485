"""A folder or file that is there whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator

from moe_jax.errors import UserError
from moe_jax.parallel import distributed


def check_free(folder: str, flag: str) -> None:
    """Refuses a folder that holds something.

    Raises:
      UserError: it is not empty, or no folder.
    """
    if not folder:
        raise UserError(f"--{flag} is missing: a folder that is not there yet")
    if os.path.exists(folder) and not (
        os.path.isdir(folder) and not os.listdir(folder)
    ):
        raise UserError(
            f"--{flag}={folder} exists and is not empty; name another folder, or move "
            "it away"
        )


@contextlib.contextmanager
def made_whole(folder: str, flag: str) -> Iterator[str]:
    """A sibling to write into, which takes the folder's name if all goes well.

    All processes of a run take part; the first makes and renames.

    Raises:
      UserError: the folder cannot be made.
    """
    folder = os.path.abspath(os.path.expanduser(folder))
    sibling = f"{folder}.unfinished"
    try:
        if distributed.is_primary():
            shutil.rmtree(sibling, ignore_errors=True)
            os.makedirs(sibling)
        distributed.barrier("convert:begin")
        yield sibling
        distributed.barrier("convert:end")
        if distributed.is_primary():
            os.rename(sibling, folder)  # An empty folder of that name gives way.
    except OSError as error:
        raise UserError(f"--{flag}={folder} cannot be written: {error}") from None
    finally:
        if distributed.is_primary():
            shutil.rmtree(sibling, ignore_errors=True)


def check_free_file(path: str, flag: str) -> None:
    """Refuses a file that exists.

    Raises:
      UserError: it does, or none is named.
    """
    if not path:
        raise UserError(f"--{flag} is missing: a file that is not there yet")
    if os.path.exists(path):
        raise UserError(f"--{flag}={path} exists; name another file, or move it away")


@contextlib.contextmanager
def file_made_whole(path: str, flag: str) -> Iterator[str]:
    """A sibling to write, which takes the file's name if all goes well; one process.

    Raises:
      UserError: the file cannot be written.
    """
    path = os.path.abspath(os.path.expanduser(path))
    sibling = f"{path}.unfinished"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        yield sibling
        os.rename(sibling, path)
    except OSError as error:
        raise UserError(f"--{flag}={path} cannot be written: {error}") from None
    finally:
        if os.path.exists(sibling):
            os.remove(sibling)
