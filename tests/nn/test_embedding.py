"""The lookup in a split table is a lookup."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.nn import embedding
from moe_jax.parallel import rules

V, D, B, S = 12, 8, 8, 4


@pytest.mark.parametrize(
    "sizes",
    [None, dict(fsdp=2, expert=2, tensor=2), dict(data=2, context=2, tensor=2)],
)
def test_rows_and_gradients(axes_mesh, sizes):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(V, D)).astype(np.float32)
    tokens = rng.integers(0, V - 1, (B, S)).astype(np.int32)  # V - 1 never occurs.
    factors = rng.normal(size=(B, S, D)).astype(np.float32)

    def run(table, tokens):
        rows, pull = jax.vjp(lambda t: embedding.lookup(t, tokens), table)
        return rows, pull(jnp.asarray(factors))[0]

    if sizes is None:
        rows, grad = jax.jit(run)(table, tokens)
    else:
        mesh = axes_mesh(**sizes)
        where = rules.sharding(mesh, ("vocab", "embed"))
        with jax.set_mesh(mesh):
            split = jax.device_put(table, where)
            rows, grad = jax.jit(run, out_shardings=(None, where))(split, tokens)
    np.testing.assert_array_equal(rows, table[tokens])
    want = np.zeros((V, D))
    np.add.at(want, tokens, factors)
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(grad)[V - 1] == 0)
