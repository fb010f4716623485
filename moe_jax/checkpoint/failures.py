"""What goes wrong with files, in one line each, and the same on all processes."""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import absl.logging  # noqa: F401  It makes the logger that is filtered below.
import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.errors import RunError, UserError

_T = TypeVar("_T")


class DamagedError(Exception):
    """A step that cannot be used; the message says why."""


class SaveError(RunError):
    """A save that failed; the steps before it are untouched."""


def on_all_processes(read: Callable[[], _T]) -> _T:
    """Runs `read`; raises DamagedError on all processes if it fails on any.

    Otherwise one process would go on to an older step while the others load this one.

    Raises:
      DamagedError: it failed for a reason that lies in the files.
    """
    value, why = None, ""
    try:
        value = read()
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise  # Not the checkpoint's fault.
    except Exception as error:
        why = reason(error)
        hide_loose_ends()
    good = not why
    if jax.process_count() > 1:
        good = bool(multihost_utils.process_allgather(np.array(good)).all())
    if not good:
        raise DamagedError(why or "another process could not read it")
    return value


def reason(error: BaseException) -> str:
    """One line for the first cause; Orbax's own message hides it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if len(lines[0]) <= 300 else lines[0][:300] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def probe(folder: Any) -> str:
    """Why a small file cannot be written to a folder, or "".

    Args:
      folder: an `epath.Path`.
    """
    path = folder / f".probe-{jax.process_index()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        path.unlink()
    except Exception as error:  # Of a bucket: any type.
        return reason(error)
    return ""


@functools.cache
def hide_loose_ends() -> None:
    """Drops tracebacks of reads and writes that end after Orbax gave the step up.

    Tensorstore reports each of them to an event loop that Orbax has closed, from its
    own threads, at any later time: hundreds of lines for one damaged file.
    """
    previous = sys.unraisablehook

    def hook(args) -> None:
        closed = isinstance(args.exc_value, RuntimeError)
        if not (closed and str(args.exc_value) == "Event loop is closed"):
            previous(args)

    sys.unraisablehook = hook
    warnings.filterwarnings("ignore", message=r"coroutine 'Store\.\w+' was never")


def _hide_orbax(record: logging.LogRecord) -> bool:
    # Each failure becomes an exception or a note here, which the user sees once.
    # asyncio reports the tasks that Orbax leaves behind, a page for each leaf.
    text = record.pathname + record.getMessage()
    return "/orbax/" not in text and "OCDBT" not in text


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_hide_orbax)
