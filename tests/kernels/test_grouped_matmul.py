"""The grouped matmul kernels in the interpreter, against one matmul a group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import grouped_matmul

# Rows of the groups, and of the buffer.
CASES = [
    ([100, 0, 156, 64], 384),  # A tile of two groups, an empty one, rows of nobody.
    ([128, 128, 0, 128], 384),  # Borders of groups are borders of tiles.
    ([1, 2, 3, 250], 256),  # A tile of four groups.
    ([0, 0, 0, 0], 128),
    ([0, 384, 0, 0], 384),
    ([5, 3, 0, 8], 24),  # Tiles of 8.
]


def drawn(sizes, rows, k, n, dtype=np.float32):
    """Integers, so that sums are exact; NaN in rows of nobody."""
    rng = np.random.default_rng(rows)
    draw = lambda *shape: rng.integers(-3, 4, shape).astype(dtype)
    x, w, grad = draw(rows, k), draw(len(sizes), k, n), draw(rows, n)
    x[sum(sizes) :] = grad[sum(sizes) :] = np.nan
    return x, w, grad


def groups(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize(("sizes", "rows"), CASES, ids=str)
@pytest.mark.parametrize(("k", "n"), [(128, 256), (24, 40)])
def test_values_and_gradients(sizes, rows, k, n):
    x, w, grad = drawn(sizes, rows, k, n)
    counts = jnp.array(sizes, jnp.int32)
    call = lambda x, w: grouped_matmul.matmul(x, w, counts, interpret=True)
    y, pull = jax.vjp(call, x, w)
    grad_x, grad_w = pull(jnp.asarray(grad))
    for g, held in enumerate(groups(sizes)):
        np.testing.assert_array_equal(y[held], x[held] @ w[g])
        np.testing.assert_array_equal(grad_x[held], grad[held] @ w[g].T)
        np.testing.assert_array_equal(grad_w[g], x[held].T @ grad[held])


def test_several_tiles_along_every_dimension(monkeypatch):
    """Blocks of 128 columns, as large matrices have."""
    monkeypatch.setattr(grouped_matmul, "_VMEM_BYTES", 0)
    monkeypatch.setattr(grouped_matmul, "_SUM_TILE", 128)
    test_values_and_gradients([200, 0, 130, 40], 384, 256, 384)


def test_sums_are_taken_in_single_precision():
    x = jnp.ones((512, 128), jnp.bfloat16)
    y = jnp.full((512, 128), 1 + 2.0**-7, jnp.bfloat16)
    sizes = jnp.array([512], jnp.int32)
    sums = grouped_matmul.tgmm(x, y, sizes, interpret=True)
    np.testing.assert_array_equal(sums.astype(np.float32), 516.0)


@pytest.mark.parametrize(("sizes", "rows"), CASES, ids=str)
@pytest.mark.parametrize("empty_too", [False, True])
def test_visits_are_the_pairs_of_tile_and_group(sizes, rows, empty_too):
    tile = min(128, rows & -rows)
    found = grouped_matmul.visits(jnp.array(sizes, jnp.int32), rows, tile, empty_too)
    want = []
    for g, held in enumerate(groups(sizes)):
        tiles = sorted({row // tile for row in range(held.start, held.stop)})
        want += [(g, t) for t in tiles]
        if empty_too and not tiles:
            want.append((g, None))
    count = int(found.count)
    assert count == len(want) <= len(found.group_v)
    for g, t, (want_g, want_t) in zip(found.group_v, found.tile_v, want, strict=False):
        assert g == want_g
        assert t == want_t or want_t is None
    assert np.all(np.asarray(found.tile_v) < rows // tile)


def test_elsewhere_xla_multiplies():
    """The same contract without kernels, for the tests of what is built on it."""
    x, w, grad = drawn([100, 0, 156, 64], 384, 24, 40)
    x[320:] = grad[320:] = 0
    sizes = jnp.array([100, 0, 156, 64], jnp.int32)
    y = grouped_matmul.matmul(x, w, sizes)
    sums = grouped_matmul.transposed_matmul(jnp.asarray(x), jnp.asarray(grad), sizes)
    for g, held in enumerate(groups([100, 0, 156, 64])):
        np.testing.assert_allclose(y[held], x[held] @ w[g], rtol=1e-5, atol=1e-4)
        want = x[held].T @ grad[held]
        np.testing.assert_allclose(sums[g], want, rtol=1e-5, atol=1e-4)
