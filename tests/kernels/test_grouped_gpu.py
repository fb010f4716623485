"""What only the kernels of GPUs have: sizes that are multiples of nothing, and tiles.

They ran in the interpreter and were lowered for an absent GPU; none has run on one.
"""

import collections
import functools

import grouped
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import grouped_gpu, grouped_matmul

# Several blocks along every dimension of small matrices.
TILES = grouped_gpu.Tiles(rows=16, columns=32, depth=16, warps=4, stages=2)
ROWS, K, N, GROUPS = 70, 37, 50, 5


def draws():
    """Sizes of five groups over 70 rows, or fewer."""
    rng = np.random.default_rng(0)
    yield [0] * GROUPS
    yield [0, 0, 0, 0, ROWS]
    yield [ROWS, 0, 0, 0, 0]
    for served in (1, 16, 17, 33, 48, 69, ROWS, ROWS):
        yield rng.multinomial(served, rng.dirichlet(np.full(GROUPS, 0.5))).tolist()


@jax.jit
def products(x, w, grad, counts):
    call = functools.partial(grouped_gpu.gmm, tiles=TILES, interpret=True)
    grad_w = grouped_gpu.tgmm(x, grad, counts, tiles=TILES, interpret=True)
    return call(x, w, counts), call(grad, w, counts, transposed=True), grad_w


@pytest.mark.parametrize("sizes", list(draws()), ids=str)
def test_sizes_are_multiples_of_nothing(sizes):
    inputs = grouped.drawn(sizes, ROWS, K, N)
    found = products(*inputs, jnp.array(sizes, jnp.int32))
    grouped.check(sizes, inputs, *found)
    # A tile writes no rows but its own: on a device, those of the next are written by
    # another program. The interpreter begins with NaN.
    assert all(np.all(np.isnan(rows[sum(sizes) :])) for rows in found[:2])


@pytest.mark.parametrize("sizes", list(draws()), ids=str)
@pytest.mark.parametrize("tile", [1, 8, 16, 128])
def test_tiles_begin_with_their_group(sizes, tile):
    table = grouped_gpu.tiles_of_groups(jnp.array(sizes, jnp.int32), ROWS, tile)
    found = [tuple(map(int, row)) for row in zip(*table, strict=True)]
    want = [
        (g, first, held.stop)
        for g, held in enumerate(grouped.groups(sizes))
        for first in range(held.start, held.stop, tile)
    ]
    assert found[: len(want)] == want
    assert all(first >= end for _, first, end in found[len(want) :])


def test_the_table_has_room_for_the_worst_sizes():
    """One row in each group but the last: no other sizes need as many tiles."""
    sizes = jnp.array([1] * 7 + [57], jnp.int32)
    _, first, end = grouped_gpu.tiles_of_groups(sizes, 64, 8)
    assert int(jnp.sum(first < end)) == 7 + 8


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_sums_are_in_single_precision(dtype):
    """Against float64: the error is that of rounding the result."""
    rng = np.random.default_rng(1)
    cast = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    x, w, grad, sizes = cast(64, 96), cast(2, 96, 48), cast(64, 48), [40, 24]
    found = products(x, w, grad, jnp.array(sizes, jnp.int32))
    wide = [np.asarray(a, np.float64) for a in (x, w, grad)]
    ends = np.split(np.arange(64), [40])
    want = (
        np.concatenate([wide[0][r] @ wide[1][g] for g, r in enumerate(ends)]),
        np.concatenate([wide[2][r] @ wide[1][g].T for g, r in enumerate(ends)]),
        np.stack([wide[0][r].T @ wide[2][r] for r in ends]),
    )
    for a, b in zip(found, want, strict=True):
        limit = float(jnp.finfo(dtype).eps) * np.abs(b) + 1e-5
        assert np.all(np.abs(np.asarray(a, np.float64) - b) <= limit)


def kernels_in(lowered) -> dict[str, int]:
    """Names of the Triton kernels in a program, with how often they are called."""
    found = collections.Counter()

    def visit(op):
        if op.name == "stablehlo.custom_call":
            target = op.attributes["call_target_name"].value
            assert target == "__gpu$xla.gpu.triton", target
            found[op.attributes["mhlo.backend_config"]["name"].value] += 1
        for region in op.regions:
            for block in region:
                for inner in block:
                    visit(inner.operation)

    visit(lowered.compiler_ir("stablehlo").operation)
    return dict(found)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_value_and_gradients_are_kernels_on_a_gpu(absent_gpus, dtype):
    def gradients(x, w, sizes, grad):
        y, pull = jax.vjp(lambda x, w: grouped_matmul.matmul(x, w, sizes), x, w)
        return y, pull(grad)

    shape = lambda *dims: jax.ShapeDtypeStruct(dims, dtype)
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    given = shape(1000, 200), shape(4, 200, 300), sizes, shape(1000, 300)
    with absent_gpus():
        traced = jax.jit(gradients).trace(*given)
        lowered = traced.lower(lowering_platforms=("cuda",))
    assert kernels_in(lowered) == {"gmm": 2, "tgmm": 1}
    # Otherwise Triton would multiply float32 as TF32.
    exact = str(traced.jaxpr).count("Precision.HIGHEST, Precision.HIGHEST")
    assert exact == (3 if dtype == jnp.float32 else 0)


def test_double_precision_is_left_to_xla(absent_gpus, float64):
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float64)
    given = shape(32, 16), shape(2, 16, 16), jax.ShapeDtypeStruct((2,), jnp.int32)
    with absent_gpus():
        traced = jax.jit(grouped_matmul.matmul).trace(*given)
    assert "ragged_dot" in str(traced.jaxpr) and "pallas" not in str(traced.jaxpr)
