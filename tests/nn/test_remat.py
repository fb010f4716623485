"""A scan under policies taken in turn is a scan."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.nn.remat import scan_blocks

LAYERS, WIDTH = 6, 4
FULL = jax.checkpoint_policies.nothing_saveable


def body(x, layer):
    x = jnp.tanh(x @ layer["w"]) + 0.1 * layer["index"]
    return x, {"sum": jnp.sum(x), "x": x}


def given():
    rng = np.random.default_rng(0)
    ws = rng.normal(size=(LAYERS, WIDTH, WIDTH))
    return jnp.asarray(rng.normal(size=WIDTH)), jnp.asarray(ws)


def run(policies, x, ws):
    layers = {"w": ws, "index": jnp.arange(LAYERS)}
    return scan_blocks(body, policies, x, layers)


@pytest.mark.parametrize(
    "policies", [(None,), (FULL,), (FULL, None), (None, FULL, FULL), (FULL,) * LAYERS]
)
def test_values_outputs_and_gradients_are_those_of_a_loop(float64, policies):
    x, ws = given()

    def loop(x, ws):
        outs = []
        for i in range(LAYERS):
            x, out = body(x, {"w": ws[i], "index": i})
            outs.append(out)
        return x, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)

    total = lambda f: lambda x, ws: jnp.sum(jnp.sin(f(x, ws)[0]))
    scan = lambda x, ws: run(policies, x, ws)
    want, found = loop(x, ws), scan(x, ws)
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14)
    jax.tree.map(same, found, want)
    grads = [jax.grad(total(f), argnums=(0, 1))(x, ws) for f in (scan, loop)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-15), *grads
    )


def tanhs(policies):
    """Tangent functions that are computed forward, and backward."""
    x, ws = given()
    value = lambda x, ws: jnp.sum(run(policies, x, ws)[0])

    def count(jaxpr):
        inner = [getattr(v, "jaxpr", v) for e in jaxpr.eqns for v in e.params.values()]
        inner = [one for one in inner if isinstance(one, jax.extend.core.Jaxpr)]
        here = sum(eqn.primitive.name == "tanh" for eqn in jaxpr.eqns)
        return here + sum(map(count, inner))

    return count(jax.make_jaxpr(jax.grad(value, argnums=1))(x, ws).jaxpr)


def test_only_blocks_with_a_policy_are_made_again():
    # Once in the forward loop for each block of a turn; again where it was not kept.
    assert tanhs((None, None)) == 2
    assert tanhs((FULL, None)) == 3
    assert tanhs((FULL, FULL)) == 4


def test_stacked_arrays_are_not_cut_in_two():
    x, ws = given()
    scan = lambda ws: run((FULL, None), x, ws)[0]
    eqns = jax.make_jaxpr(scan)(ws).jaxpr.eqns
    assert not any("slice" in eqn.primitive.name for eqn in eqns)
