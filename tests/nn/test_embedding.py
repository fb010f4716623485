"""The lookup in a split table is a lookup."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.nn import embedding
from moe_jax.parallel import rules

V, D, B, S = 12, 8, 8, 4


@pytest.mark.parametrize("count", [V, 128])  # 128: more than the tokens.
@pytest.mark.parametrize(
    "sizes",
    [
        None,
        dict(fsdp=2, expert=2, tensor=2),
        dict(data=2, context=2, tensor=2),
        dict(data=2, fsdp=2, expert=2),
        dict(fsdp=4, context=2),
    ],
)
def test_rows_and_gradients(axes_mesh, sizes, count):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(count, D)).astype(np.float32)
    tokens = rng.integers(0, count - 1, (B, S)).astype(np.int32)  # The last is absent.
    factors = rng.normal(size=(B, S, D)).astype(np.float32)

    def run(table, tokens):
        look = lambda table: embedding.lookup(table, tokens, "float32")
        rows, pull = jax.vjp(look, table)
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
    want = np.zeros((count, D))
    np.add.at(want, tokens, factors)
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(grad)[-1] == 0)


@pytest.mark.parametrize("sizes", [None, dict(fsdp=2, expert=2, tensor=2)])
def test_a_frequent_token_loses_nothing_in_bfloat16(axes_mesh, sizes):
    """Sums of ones stay at 256 in bfloat16."""
    table, tokens = np.ones((V, D), np.float32), np.full((B, 125), 7, np.int32)

    def run(table):
        rows = embedding.lookup(table, tokens, "bfloat16")
        assert rows.dtype == jnp.bfloat16
        return jnp.sum(rows.astype(jnp.float32))

    with jax.set_mesh(axes_mesh(**sizes)) if sizes else contextlib.nullcontext():
        step = jax.jit(jax.value_and_grad(run)).lower(table)
        _, grad = step.compile()(table)
    gathers = re.findall(r"stablehlo.all_gather.*", step.as_text())
    assert len(gathers) == (2 if sizes else 0)
    assert all("bf16" in line for line in gathers)
    assert grad.dtype == jnp.float32
    np.testing.assert_array_equal(grad[7], 1000.0)
    assert np.count_nonzero(grad) == D


def test_few_tokens_travel_or_a_small_table(axes_mesh):
    def kinds(count):
        tokens = np.zeros((B, S), np.int32)
        look = lambda table: jnp.sum(embedding.lookup(table, tokens, "bfloat16"))
        with jax.set_mesh(axes_mesh(fsdp=4, expert=2)):
            table = jax.ShapeDtypeStruct((count, D), jnp.float32)
            text = jax.jit(jax.value_and_grad(look)).lower(table).as_text()
        return re.findall(r"stablehlo\.(all_to_all|reduce_scatter)", text)

    # One mesh axis after another.
    assert kinds(8) == ["all_to_all"] * 4
    assert kinds(7) == ["reduce_scatter"] * 2


def test_one_position_on_a_mesh_that_splits_positions(axes_mesh):
    table = np.arange(V * D, dtype=np.float32).reshape(V, D)
    tokens = np.arange(B, dtype=np.int32)[:, None]
    with jax.set_mesh(axes_mesh(context=2, fsdp=2, tensor=2)):
        rows = jax.jit(embedding.lookup, static_argnums=2)(table, tokens, "float32")
    np.testing.assert_array_equal(rows, table[tokens])
