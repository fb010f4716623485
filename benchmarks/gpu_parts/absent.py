"""The layer and the step, compiled for an H200 that is not there: memory, no times.

It needs the compiler that `jax[cuda12]` or `jax[cuda13]` brings, and no GPU. cuDNN does
not compile without one, so attention is `Blocked`; nothing is tuned.
"""

import pathlib

import jax
from jax.experimental import topologies

from gpu_parts import common, jax_common, layer, step
from moe_jax.config import MeshConfig
from moe_jax.nn.attention.blocked import Blocked
from moe_jax.parallel import rules
from moe_jax.parallel.mesh import make_mesh
from moe_jax.train import setup

TARGET = pathlib.Path(__file__).parent / "h200.txtpb"
UNTUNED = {"xla_gpu_autotune_level": 0}


def measure(sizes: common.Sizes):
    """Temporary and peak memory, and how many Triton kernels a program calls."""
    try:
        devices = topologies.get_topology_desc(
            platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
        ).devices
    except (NotImplementedError, RuntimeError) as reason:
        yield {"skipped": f"no compiler for GPUs: {reason}"}
        return
    yield {"jax": jax.__version__, "device": devices[0].device_kind}
    mesh = make_mesh(MeshConfig(), devices[:1])
    whole = rules.sharding(mesh, ())
    yield _step(sizes, devices)
    with jax.set_mesh(mesh):
        for name, dispatch in layer.ways():
            run, make = layer.program(dispatch, sizes)
            given = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole),
                jax.eval_shape(make),
            )
            yield {"rows": name} | _compiled(jax.jit(run).lower(*given))


def _step(sizes: common.Sizes, devices) -> dict:
    config = step.configured(sizes)
    config.model.attention = Blocked(block=min(512, sizes.length))
    lowered = setup.lower_step(setup.make_parts(config, devices[:1]))
    return {"step": f"{sizes.rows} rows of {sizes.length}"} | _compiled(lowered)


def _compiled(lowered: jax.stages.Lowered) -> dict:
    compiled = lowered.compile(compiler_options=UNTUNED)
    kernels = compiled.as_text().count("__gpu$xla.gpu.triton")
    return {"kernels": kernels} | jax_common.memory(compiled)
