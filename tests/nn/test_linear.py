"""Products with split weights are products."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.nn import linear, module
from moe_jax.parallel import rules

B, S, D, H, K = 8, 4, 8, 4, 6
IN, OUT = ("embed", "heads", None), ("heads", None, "embed")
ROWS, HEADS = ("batch", "sequence", None), ("batch", "sequence", "heads", None)


class Weight:
    """Stands for an `nnx.Param`."""

    def __init__(self, value, axes):
        self.value, self.axes = value, axes

    def __getitem__(self, index):
        return self.value


def run(x, w_q, w_v, w_o):
    q, v = linear.products(x, ROWS, (Weight(w_q, IN), Weight(w_v, IN)))
    (y,) = linear.products(q * v, HEADS, (Weight(w_o, OUT),), contracted=2)
    return y


def plain(x, w_q, w_v, w_o):
    q, v = (jnp.einsum("bsd,dhk->bshk", x, w) for w in (w_q, w_v))
    return jnp.einsum("bshk,hkd->bsd", q * v, w_o)


def draw(length=S):
    rng = np.random.default_rng(0)
    shapes = ((B, length, D), (D, H, K), (D, H, K), (H, K, D))
    return [rng.normal(size=shape) for shape in shapes]


@pytest.mark.parametrize(
    "sizes",
    [
        None,
        dict(data=2, expert=2, tensor=2),
        dict(context=2, fsdp=2, tensor=2),
        dict(fsdp=8),
    ],
    ids=str,
)
def test_values_and_gradients(float64, axes_mesh, sizes):
    given = draw()
    loss = lambda f: lambda *args: (jnp.sum(jnp.sin(f(*args))), f(*args))
    gradient = lambda f: jax.grad(loss(f), argnums=(0, 1, 2, 3), has_aux=True)
    want, y = gradient(plain)(*given)
    if sizes is None:
        found, z = gradient(run)(*given)
    else:
        mesh = axes_mesh(**sizes)
        places = [rules.sharding(mesh, axes) for axes in (ROWS, IN, IN, OUT)]
        with jax.set_mesh(mesh):
            split = map(jax.device_put, given, places)
            found, z = jax.jit(gradient(run))(*split)
        assert found[1].sharding.is_equivalent_to(places[1], 3)
    np.testing.assert_allclose(z, y, rtol=1e-12)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_one_position_on_a_mesh_that_splits_positions(axes_mesh):
    given = [a.astype(np.float32) for a in draw(length=1)]
    with jax.set_mesh(axes_mesh(context=2, fsdp=2)):
        found = jax.jit(run)(*given)
    np.testing.assert_allclose(found, plain(*given), rtol=1e-4)


def test_gradients_are_reduced_in_the_type_of_the_computation(axes_mesh):
    x, *weights = (a.astype(np.float32) for a in draw())
    loss = lambda *args: jnp.sum(run(*args).astype(jnp.float32))
    with jax.set_mesh(axes_mesh(fsdp=2, expert=2, tensor=2)):
        step = jax.jit(jax.grad(loss, argnums=1))
        text = step.lower(x.astype(jnp.bfloat16), *weights).as_text()
    lines = [line for line in text.split("\n") if "tensor<" in line]
    gathers = [line for line in lines if "stablehlo.all_gather" in line]
    assert gathers and all("bf16" in line for line in gathers)
    assert "stablehlo.reduce_scatter" in text


def test_weights_with_one_input_share_a_sum(axes_mesh):
    """Over tensor: of the result, and of the input's gradient from both weights."""
    given = [a.astype(np.float32) for a in draw()]
    with jax.set_mesh(axes_mesh(fsdp=2, tensor=2)):
        traced = jax.make_jaxpr(jax.grad(lambda *args: jnp.sum(run(*args))))(*given)
    assert len(re.findall(r"= psum", str(traced))) == 2


def test_a_cast_rounds_as_any(float64):
    rng = np.random.default_rng(0)
    values = rng.normal(size=1000).astype(np.float32) * 10.0 ** rng.integers(-30, 30)
    values = np.append(values, [0.0, -0.0, np.inf, np.nan, 3.4e38]).astype(np.float32)
    for dtype in ("bfloat16", "float32", "float64"):
        found = module.cast(jnp.asarray(values), dtype)
        want = jnp.asarray(values).astype(dtype)
        assert found.dtype == dtype
        as_float = lambda a: np.asarray(a, np.float64)
        np.testing.assert_array_equal(as_float(found), as_float(want))
