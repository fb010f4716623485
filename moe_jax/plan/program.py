"""Compiles the train step for a topology, and keeps what the compiler writes down.

The text of the scheduled program is read from the compiler's dump: the text that the
compiled object itself gives fails for programs with work on the SparseCores.
"""

import dataclasses
import os
import pathlib
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import jax

from moe_jax.config import Config
from moe_jax.errors import RunError, UserError
from moe_jax.plan.topology import Topology
from moe_jax.train import setup
from moe_jax.train.setup import Parts

_MODULE = "jit_train_step"
# The last file before machine code is made.
_LAST = "*after_optimizations_after_buffer_assignment.txt"
_POLL_SECS = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled train step.

    Attributes:
      parts: what it was made of.
      topology: what it was compiled for.
      text: scheduled HLO; "" where memory ran out before there was any.
      buffers: the compiler's buffer assignment.
      live_ranges: when each value lives.
      peak_bytes: of HBM per device, as the compiler counts; None where it did not
        fit, or was not asked.
      out_of_memory: the compiler's words; "" where it fits.
      compile_seconds: of this machine.
    """

    parts: Parts
    topology: Topology
    text: str
    buffers: str
    live_ranges: str
    peak_bytes: int | None
    out_of_memory: str
    compile_seconds: float


def compile_program(
    config: Config,
    topology: Topology,
    *,
    dump_folder: str | None = None,
    quick: bool = False,
) -> Program:
    """Compiles the step that `train` would run; nothing is allocated.

    Nearly all of the time goes into machine code, which is written after the program
    is scheduled and its memory assigned. `quick` does not wait for it: the program is
    the same, without the compiler's cycle estimates. The compiler's thread goes on;
    the process should end with `leave`.

    Args:
      config: the experiment; its mesh must fit the topology.
      topology: what to compile for.
      dump_folder: where the compiler's files stay; None: nowhere.
      quick: without machine code; of TPUs only.

    Raises:
      UserError: the config cannot be split so, or the folder cannot be written.
      RunError: the compiler failed, other than for want of memory.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # It would dump nothing.
    parts = setup.make_parts(config, list(topology.devices))
    lowered = setup.lower_step(parts)
    folder = _make_folder(dump_folder)
    options = {
        "xla_dump_to": str(folder),
        "xla_dump_hlo_as_text": True,
        "xla_dump_hlo_module_re": _MODULE,
    }
    begin, peak, failure = time.monotonic(), None, ""
    job = _Job(lambda: lowered.compile(compiler_options=options))
    job.wait(folder if quick and topology.chip is not None else None)
    if job.error is not None:
        failure = str(job.error)
        if "RESOURCE_EXHAUSTED" not in failure:
            raise RunError(f"the compiler failed for {topology}: {failure}") from None
    elif job.result is not None:
        peak = _peak_bytes(job.result, topology)
    seconds = time.monotonic() - begin
    program = Program(
        parts=parts,
        topology=topology,
        text=_read(folder, "*after_codegen.txt", "*after_optimizations.txt"),
        buffers=_read(folder, "*buffer-assignment.txt"),
        live_ranges=_read(folder, "*live-range.txt"),
        peak_bytes=peak,
        out_of_memory=failure,
        compile_seconds=seconds,
    )
    if dump_folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return program


class _Job(threading.Thread):
    """A compilation in a thread; its result, or the compiler's error."""

    def __init__(self, compile_it: Callable[[], jax.stages.Compiled]):
        super().__init__(daemon=True)
        self._compile = compile_it
        self.result: jax.stages.Compiled | None = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._compile()
        except Exception as error:
            self.error = error

    def wait(self, folder: pathlib.Path | None) -> None:
        """Until it ends, or until the last file of `folder` grows no more."""
        size = 0
        while self.is_alive():
            self.join(_POLL_SECS)
            before, size = size, len(_read(folder, _LAST)) if folder else 0
            if size and size == before:
                return


def leave(status: int) -> NoReturn:
    """Ends the process with a compilation still in flight."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _peak_bytes(compiled: jax.stages.Compiled, topology: Topology) -> int:
    found = compiled.memory_analysis()
    if topology.chip is not None:
        return found.peak_memory_in_bytes
    # The host's compiler leaves temporaries out of its peak.
    kept = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + kept + found.temp_size_in_bytes


def _make_folder(dump_folder: str | None) -> pathlib.Path:
    if dump_folder is None:
        return pathlib.Path(tempfile.mkdtemp(prefix="moe_jax_plan_"))
    folder = pathlib.Path(dump_folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--dump-hlo={dump_folder} cannot be made: {error}") from None
    if any(folder.iterdir()):
        raise UserError(f"--dump-hlo={dump_folder} is not empty: name a new folder")
    return folder


def _read(folder: pathlib.Path, *patterns: str) -> str:
    """The text of the one file of the first pattern that matches; "" if none."""
    for pattern in patterns:
        files = [f for f in folder.glob(pattern) if re.search(_MODULE, f.name)]
        if files:
            newest = max(files, key=lambda f: f.stat().st_mtime)
            return newest.read_text(encoding="utf-8", errors="replace")
    return ""
