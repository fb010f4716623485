"""Images as rows of tokens: patches, and where they stand."""

import jax
import numpy as np


def patchify(x: jax.Array, size: int) -> jax.Array:
    """(B, H, W, C) -> (B, N, size * size * C): patches row by row.

    In a patch the order is (row, column, channel), the last fastest; `size` divides H
    and W.
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, -1, size * size * channels)


def unpatchify(tokens: jax.Array, size: int, height: int, width: int) -> jax.Array:
    """The way back: (B, N, size * size * C) -> (B, height, width, C)."""
    batch, rows, columns = tokens.shape[0], height // size, width // size
    x = tokens.reshape(batch, rows, columns, size, size, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)


def positions_2d(rows: int, columns: int, width: int) -> np.ndarray:
    """Fixed sines and cosines of a patch's place (DiT, Peebles and Xie 2023).

    The first half of the channels tells the column and the second the row. A half is
    [sin(p w), cos(p w)] with w_i = 10000^(-i / (width / 4)).

    Args:
      rows: of patches.
      columns: of patches.
      width: channels, a multiple of 4.

    Returns:
      (rows * columns, width) float64, row by row.
    """
    speeds = 10000.0 ** (-np.arange(width // 4) / (width // 4))

    def waves(places):
        angles = places.reshape(-1, 1) * speeds
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.mgrid[:rows, :columns].astype(np.float64)
    return np.concatenate([waves(column), waves(row)], axis=1)
