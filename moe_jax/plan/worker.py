"""Compiles one config in a process of its own, and remembers what came out.

python -m moe_jax.plan.worker REQUEST.json RESULT.json

Two compilations do not share a process: libtpu takes a lock, and a failure inside the
compiler can end it. Results are kept by a hash of all that they depend on: config,
topology, versions of jax and libtpu, and the source of this package.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import moe_jax
from moe_jax import config_json
from moe_jax.config import Config
from moe_jax.errors import RunError, UserError
from moe_jax.observe.writers import write_atomically

CACHE = "~/.cache/moe_jax/plans"
_MODULE = "moe_jax.plan.worker"
_LIMIT_SECS = 3600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One compilation.

    Attributes:
      config: as JSON.
      topology: name.
      slices: of the topology.
      quick: without machine code, see `program.compile_program`.
    """

    config: str
    topology: str
    slices: int = 1
    quick: bool = False

    @classmethod
    def of(
        cls, config: Config, topology: str, slices: int = 1, *, quick: bool = False
    ) -> "Request":
        text = config_json.to_json(config)
        return cls(config=text, topology=topology, slices=slices, quick=quick)


Plan = dict[str, Any]
Compile = Callable[[Request], Plan]


@functools.cache
def _source_hash() -> str:
    root = pathlib.Path(moe_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def key(request: Request) -> str:
    """The name under which a plan is kept."""
    parts = (
        *dataclasses.astuple(request),
        *(_version(name) for name in ("jax", "jaxlib", "libtpu")),
        _source_hash(),
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def compile_apart(request: Request) -> Plan:
    """Compiles in a new process.

    Returns:
      `report.Plan.to_json`, or {"error": text} where the compiler failed for another
      reason than memory.
    """
    with tempfile.TemporaryDirectory(prefix="moe_jax_plan_") as folder:
        asked, found = (os.path.join(folder, name) for name in ("ask", "plan"))
        with open(asked, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(request), file)
        command = [sys.executable, "-m", _MODULE, asked, found]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_LIMIT_SECS
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not compiled within {_LIMIT_SECS} seconds"}
        if not os.path.exists(found):
            said = done.stderr.strip().splitlines() or ["no message"]
            return {"error": f"exit status {done.returncode}: {said[-1]}"}
        with open(found, encoding="utf-8") as file:
            return json.load(file)


def plan(
    request: Request, cache: str = CACHE, compile_one: Compile = compile_apart
) -> Plan:
    """The plan of a request, from the cache where it is known.

    Args:
      request: what to compile.
      cache: folder; "" keeps nothing. Failures are not kept.
      compile_one: makes what is not known.
    """
    if not cache:
        return compile_one(request)
    path = pathlib.Path(cache).expanduser() / f"{key(request)}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        found = compile_one(request)
    if "error" not in found:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found))
    return found


def main(argv: list[str]) -> int:
    """Reads a request, writes a plan; see `compile_apart`."""
    from moe_jax.plan import program, report, topology

    with open(argv[0], encoding="utf-8") as file:
        request = Request(**json.load(file))
    try:
        config = config_json.from_json(request.config)
        where = topology.find(request.topology, request.slices)
        found = report.make_plan(config, where, quick=request.quick).to_json()
    except (UserError, RunError) as error:
        found = {"error": str(error)}
    write_atomically(argv[1], json.dumps(found))
    return program.leave(0) if request.quick else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
