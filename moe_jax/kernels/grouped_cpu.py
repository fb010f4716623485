"""Grouped matmul of rows sorted by group, as loops for CPUs.

A visit is a tile of rows that begins with its group or with a multiple of the tile
behind that. Its product is an ordinary matmul, which takes all cores; the loop runs as
often as the sizes of the groups need. `jax.lax.ragged_dot` is a masked dense product on
CPUs: G times the work.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.parallel.varying import alike, vary_like
from moe_jax.tree import struct

Array = jax.Array

# Rows of a visit. Fewer waste less at the end of a group; the matrix is packed for the
# cache anew in each. Measured at 128 and at 256 rows a group.
_TILE = 64


@struct(static=("tile",))
class Visits:
    """Which rows meet which group.

    Attributes:
      group_v: (V,) int32.
      first_v: (V,) int32, first row.
      until_v: (V,) int32, the row behind the last of the group.
      count: () int32, visits that take place.
      tile: rows of each, at most.
    """

    group_v: Array
    first_v: Array
    until_v: Array
    count: Array
    tile: int

    def of(self, v: Array, rows: int) -> tuple[Array, Array, Array]:
        """Group, first row of a tile within `rows`, and which of its rows count."""
        group, first, until = self.group_v[v], self.first_v[v], self.until_v[v]
        start = jnp.minimum(first, rows - self.tile)
        row_r = start + jnp.arange(self.tile, dtype=jnp.int32)
        return group, start, ((row_r >= first) & (row_r < until))[:, None]


def visits(sizes: Array, rows: int) -> Visits:
    """Cuts groups of `sizes` (G,) rows into tiles; their sum is at most `rows`."""
    tile, groups = min(_TILE, rows), sizes.shape[0]
    end_g = jnp.cumsum(sizes, dtype=jnp.int32)
    number_g = -(-sizes // tile)
    until_g = jnp.cumsum(number_g, dtype=jnp.int32)
    v = jnp.arange(rows // tile + groups, dtype=jnp.int32)
    group_v = jnp.sum(v[:, None] >= until_g, axis=1, dtype=jnp.int32)
    group_v = jnp.minimum(group_v, groups - 1)
    within_v = v - (until_g - number_g)[group_v]
    return Visits(
        group_v=group_v,
        first_v=(end_g - sizes)[group_v] + within_v * tile,
        until_v=end_g[group_v],
        count=until_g[-1],
        tile=tile,
    )


def gmm(
    x: Array, w: Array, sizes: Array, *, transposed: bool = False, interpret=False
) -> Array:
    """`out_r = x_r w_g` for the rows of each group g.

    Args:
      x: (R, K).
      w: (G, K, N), or (G, N, K) if `transposed`.
      sizes: (G,) int32, rows of each group.
      transposed: `out_r = x_r w_g^T`.
      interpret: nothing here needs it.

    Returns:
      (R, N) of the type of x; zero for rows of nobody.
    """
    x, w, sizes = alike(x, w, sizes)
    rows, seen = x.shape[0], visits(sizes, x.shape[0])
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def one(v, out):
        group, start, held = seen.of(v, rows)
        x_tile = lax.dynamic_slice_in_dim(x, start, seen.tile)
        w_g = lax.dynamic_index_in_dim(w, group, keepdims=False)
        product = lax.dot_general(x_tile, w_g, contract)
        kept = lax.dynamic_slice_in_dim(out, start, seen.tile)
        new = jnp.where(held, product, kept)
        return lax.dynamic_update_slice_in_dim(out, new, start, 0)

    zeros = jnp.zeros((rows, w.shape[1 if transposed else 2]), x.dtype)
    return lax.fori_loop(0, seen.count, one, vary_like(zeros, x))


def tgmm(x: Array, y: Array, sizes: Array, *, interpret=False) -> Array:
    """`out_g = sum_r x_r y_r^T` over the rows of each group g.

    Args:
      x: (R, K).
      y: (R, N).
      sizes: (G,) int32.
      interpret: nothing here needs it.

    Returns:
      (G, K, N) of the type of x, summed in float32 at least; zero for an empty group.
    """
    x, y, sizes = alike(x, y, sizes)
    rows, seen = x.shape[0], visits(sizes, x.shape[0])
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def one(v, out):
        group, start, held = seen.of(v, rows)
        # Both: what lies in rows of nobody may be infinite.
        x_tile, y_tile = (
            jnp.where(held, lax.dynamic_slice_in_dim(a, start, seen.tile), 0)
            for a in (x, y)
        )
        product = lax.dot_general(
            x_tile, y_tile, (((0,), (0,)), ((), ())), preferred_element_type=wide
        )
        total = lax.dynamic_index_in_dim(out, group, keepdims=False) + product
        return lax.dynamic_update_index_in_dim(out, total, group, 0)

    zeros = jnp.zeros((sizes.shape[0], x.shape[1], y.shape[1]), wide)
    return lax.fori_loop(0, seen.count, one, vary_like(zeros, x)).astype(x.dtype)
