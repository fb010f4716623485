"""How long a train step takes to trace, lower and compile, and in what memory."""

import dataclasses
import resource
import sys
import time

import jax

from moe_jax.bench.timing import Times
from moe_jax.errors import RunError
from moe_jax.train import setup
from moe_jax.train.setup import Parts

PHASES = ("trace", "lower", "compile")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compilation:
    """One step, compiled from nothing.

    Attributes:
      seconds: of each of `PHASES`: Python to a jaxpr, that to StableHLO, that to a
        program.
      program: what came out.
    """

    seconds: dict[str, float]
    program: jax.stages.Compiled


def compile_step(parts: Parts) -> Compilation:
    """Compiles the step of `parts`; nothing of an earlier compilation is used again.

    Raises:
      RunError: the compiler failed, for want of memory perhaps.
    """
    jax.clear_caches()
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    seconds = {}

    def timed(phase, call):
        begin = time.perf_counter()
        result = call()
        seconds[phase] = time.perf_counter() - begin
        return result

    try:
        with jax.set_mesh(parts.mesh):
            traced = timed("trace", lambda: setup.trace_step(parts))
            lowered = timed("lower", traced.lower)
            program = timed("compile", lowered.compile)
    except jax.errors.JaxRuntimeError as error:
        raise RunError(f"the compiler failed: {error}") from None
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    return Compilation(seconds=seconds, program=program)


def times(seconds: list[dict[str, float]]) -> dict[str, Times]:
    """Of each phase, and of all of them together ("total"), from `seconds` of each."""
    rows = [one | {"total": sum(one.values())} for one in seconds]
    return {name: Times(tuple(row[name] for row in rows)) for name in rows[0]}


def peak_host_bytes() -> int:
    """The most memory that this process has had so far."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024
