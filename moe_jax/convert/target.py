"""A folder that is there whole or not at all."""

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
