"""One MoE layer, forward and backward, compiled for TPUs that are not there.

  python benchmarks/layer.py                                    # v5e:4x4, EP 4
  python benchmarks/layer.py --topology=v6e:4x4 --mesh=data=2,expert=8 Ragged Gather

4096 tokens a device, D 2048, 64 experts of width 1024, top-8, bfloat16, weights
replicated over `data`. One line a dispatch, each with its defaults. Nothing runs: times
are modelled (docs/planning.md) and mean something only beside each other.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from moe_jax.bench import layer as layer_lib
from moe_jax.cli import common
from moe_jax.config import DispatchConfig
from moe_jax.errors import UserError
from moe_jax.moe.dispatch import DISPATCHES
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel import rules
from moe_jax.plan import hlo, schedule, topology
from moe_jax.plan.collectives import Network

TOKENS, SIZES = 4096, dict(d_model=2048, d_ff=1024, num_experts=64, top_k=8)
NAMES = ("Einsum", "Bucket", "Exact", "Ragged", "Gather", "Ring")
# Rows that hold tokens in a list of sorted rows under a uniform routing: the rest is
# what `needed_rows` adds.
FILL = 0.97


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help=f"of {NAMES}; default: all")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--mesh", default="data=4,expert=4")
    parser.add_argument("--dump", default="", help="keeps each program's text here")
    options = parser.parse_args()
    kinds = {kind.__name__: kind for kind in DISPATCHES}
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no such dispatch: {sorted(unknown)}; there are {NAMES}")
    try:
        found = topology.find(options.topology)
        config = common.parse_mesh(options.mesh)
        mesh = mesh_lib.make_mesh(config, list(found.devices))
    except UserError as error:
        parser.error(str(error))
    layer = layer_lib.Layer(
        tokens=TOKENS * len(found.devices), dtype="bfloat16", **SIZES
    )
    if problem := next(layer_lib.problems(layer, config), None):
        parser.error(problem)
    print(f"{found}, {options.mesh}; jax {jax.__version__}")
    print("| dispatch | compile, s | peak, GB | work | HBM, GB | sent, GB | ", end="")
    print("exposed, ms | step, ms |\n|---|---|---|---|---|---|---|---|")
    for name in options.names or NAMES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = f"{options.dump}/{name}" if options.dump else scratch
            print(row(name, layer, kinds[name](), mesh, found, folder), flush=True)
    return 0


def arguments(layer: layer_lib.Layer, mesh: jax.sharding.Mesh) -> tuple:
    """Shapes of what a layer takes, with one row of the batch a device."""
    template = layer_lib.experts(layer)

    def shape(dims, dtype, axes):
        where = rules.sharding(mesh, axes)
        return jax.ShapeDtypeStruct(dims, dtype, sharding=where)

    weights = {
        name: shape(like.shape, jnp.bfloat16, template.axes[name])
        for name, like in jax.eval_shape(template.init, jax.random.key(0)).items()
    }
    rows = rules.size(mesh, "batch")
    of_tokens = lambda last, dtype: shape(
        (rows, layer.tokens // rows, last), dtype, ("batch", "sequence", None)
    )
    x = of_tokens(layer.d_model, jnp.bfloat16)
    of_choices = [
        of_tokens(layer.top_k, d) for d in (jnp.float32, jnp.int32, jnp.bool_)
    ]
    weight, expert, valid = of_choices
    return weights, x, weight, x, expert, valid


def row(
    name: str,
    layer: layer_lib.Layer,
    options: DispatchConfig,
    mesh: jax.sharding.Mesh,
    found: topology.Topology,
    folder: str,
) -> str:
    """A line of the table."""
    os.makedirs(folder, exist_ok=True)
    dump = {
        "xla_dump_to": folder,
        "xla_dump_hlo_as_text": True,
        "xla_dump_hlo_module_re": "jit_run",
    }
    begin, given = time.perf_counter(), arguments(layer, mesh)
    with jax.set_mesh(mesh):
        run = jax.jit(layer_lib.forward_and_backward(layer, options))
        compiled = run.lower(*given).compile(compiler_options=dump)
    seconds = time.perf_counter() - begin
    text = next(pathlib.Path(folder).glob("*after_codegen.txt")).read_text()
    network = Network.of(mesh, found.chip)
    totals = schedule.Walk(hlo.parse(text), network, fill=FILL).run()
    # Three matrices an expert, forward and twice backward.
    model = 3 * 3 * 2 * TOKENS * layer.top_k * layer.d_model * layer.d_ff
    sent = sum(traffic.wire for traffic in totals.traffic.values())
    peak = compiled.memory_analysis().peak_memory_in_bytes
    cells = [
        name,
        f"{seconds:.0f}",
        f"{peak / 1e9:.2f}",
        f"{totals.flops / model:.2f}",
        f"{totals.hbm_bytes / 1e9:.1f}",
        f"{sent / 1e9:.2f}",
        f"{totals.exposed_seconds * 1e3:.1f}",
        f"{totals.seconds * 1e3:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # It would dump nothing.
    sys.exit(main())
