"""What is gathered is whole, what is scattered is summed, in steps on any mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.parallel import collectives, rules, varying

MESHES = [
    dict(fsdp=2, expert=4),
    dict(fsdp=4, expert=2),
    dict(fsdp=8),
    dict(fsdp=6),
    dict(data=2, fsdp=2, expert=2),
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_gather_and_its_reverse(axes_mesh, sizes, dim):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(24, 24)).astype(np.float32)
    x = rng.normal(size=(24, 24)).astype(np.float32)
    axes = ("embed", None) if dim == 0 else (None, "embed")

    def local(w, x):
        w = collectives.gather(varying.vary_like(w, x), rules.mesh_axes("embed"), dim)
        return x @ w

    def run(w, x):
        call = jax.shard_map(
            local,
            in_specs=(rules.spec(axes), rules.spec(("batch", None))),
            out_specs=rules.spec(("batch", None)),
        )
        return jnp.sum(jnp.square(call(w, x))), call(w, x)

    with jax.set_mesh(axes_mesh(**sizes)):
        step = jax.jit(jax.grad(run, has_aux=True)).lower(weight, x)
        grad, out = step.compile()(weight, x)
    np.testing.assert_allclose(out, x @ weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad, 2 * x.T @ (x @ weight), rtol=1e-4, atol=1e-4)
    # The groups of each reduce-scatter are smaller than the mesh.
    groups = re.findall(
        r"reduce_scatter.*?replica_groups = .*?tensor<\d+x(\d+)xi64>",
        step.as_text(),
        re.DOTALL,
    )
    assert groups and max(map(int, groups)) < 8


def test_scatter_sums(axes_mesh):
    x = np.arange(8 * 8 * 4, dtype=np.float32).reshape(8, 8, 4)

    def local(x):
        return collectives.scatter(x[0], ("fsdp", "expert"), 0)[None]

    for sizes in (dict(fsdp=2, expert=4), dict(fsdp=8)):
        with jax.set_mesh(axes_mesh(**sizes)):
            spec = jax.P(("fsdp", "expert"))
            found = jax.jit(jax.shard_map(local, in_specs=spec, out_specs=spec))(x)
        np.testing.assert_array_equal(np.reshape(found, (8, 4)), x.sum(0))
