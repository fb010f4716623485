"""Patches in their order, and positions by numbers from the published formula."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.nn import images


def test_a_patch_is_read_row_by_row_with_channels_last():
    """Pixel (h, w) of channel c has the value 100 h + 10 w + c."""
    h, w, c = np.mgrid[:4, :6, :2]
    x = jnp.asarray(100 * h + 10 * w + c)[None]
    tokens = np.asarray(images.patchify(x, 2))
    assert tokens.shape == (1, 6, 8)
    assert tokens[0, 0].tolist() == [0, 1, 10, 11, 100, 101, 110, 111]
    assert tokens[0, 1].tolist() == [20, 21, 30, 31, 120, 121, 130, 131]
    assert tokens[0, 3].tolist() == [200, 201, 210, 211, 300, 301, 310, 311]


@pytest.mark.parametrize("shape, size", [((2, 4, 6, 3), 2), ((1, 8, 8, 1), 4)])
def test_the_way_back(shape, size):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape))
    back = images.unpatchify(images.patchify(x, size), size, *shape[1:3])
    np.testing.assert_array_equal(back, x)


def test_positions_of_a_small_grid():
    """The first half tells the column, in float64."""
    table = images.positions_2d(2, 2, 8)
    column = [0.841471, 0.010000, 0.540302, 0.999950]
    none = [0, 0, 1, 1]
    assert table.dtype == np.float64
    np.testing.assert_allclose(table[0], none + none, atol=1e-12)
    np.testing.assert_allclose(table[1], column + none, atol=1e-6)
    np.testing.assert_allclose(table[2], none + column, atol=1e-6)
    np.testing.assert_allclose(table[3], column + column, atol=1e-6)


@pytest.mark.parametrize("rows, columns, width", [(4, 4, 16), (16, 16, 64), (2, 3, 8)])
def test_positions_by_loops(rows, columns, width):
    table = images.positions_2d(rows, columns, width)
    quarter = width // 4
    for n, d in np.ndindex(table.shape):
        place = n % columns if d < width // 2 else n // columns
        wave = np.sin if d % (width // 2) < quarter else np.cos
        angle = place / 10000 ** (d % quarter / quarter)
        assert abs(table[n, d] - wave(angle)) < 1e-12
