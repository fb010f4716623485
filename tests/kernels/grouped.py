"""Groups of rows, and one matmul a group by numpy."""

import numpy as np

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


def check(sizes, inputs, y, grad_x, grad_w):
    """Value and gradients are those of one matmul a group, exactly."""
    x, w, grad = inputs
    for g, held in enumerate(groups(sizes)):
        np.testing.assert_array_equal(y[held], x[held] @ w[g])
        np.testing.assert_array_equal(grad_x[held], grad[held] @ w[g].T)
        np.testing.assert_array_equal(grad_w[g], x[held].T @ grad[held])
