"""Compiles the train step for a topology, and keeps what the compiler writes down.

The text of the scheduled program is read from the compiler's dump: the text that the
compiled object itself gives fails for programs with work on the SparseCores.
"""

import dataclasses
import pathlib
import re
import shutil
import tempfile
import time

import jax

from moe_jax.config import Config
from moe_jax.errors import RunError, UserError
from moe_jax.plan.topology import Topology
from moe_jax.train import setup
from moe_jax.train.setup import Parts

_MODULE = "jit_train_step"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled train step.

    Attributes:
      parts: what it was made of.
      topology: what it was compiled for.
      text: scheduled HLO; "" where memory ran out before there was any.
      buffers: the compiler's buffer assignment.
      live_ranges: when each value lives.
      peak_bytes: of HBM per device; None where it did not fit.
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
    config: Config, topology: Topology, dump_folder: str | None = None
) -> Program:
    """Compiles the step that `train` would run; nothing is allocated.

    Args:
      config: the experiment; its mesh must fit the topology.
      topology: what to compile for.
      dump_folder: where the compiler's files stay; None: nowhere.

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
    try:
        compiled = lowered.compile(compiler_options=options)
        peak = compiled.memory_analysis().peak_memory_in_bytes
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise RunError(f"the compiler failed for {topology}: {error}") from None
        failure = str(error)
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
        shutil.rmtree(folder)
    return program


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
