"""Grouped matmul of rows sorted by group, as TPU kernels (Gale et al. 2022).

Rows [start_g, end_g) of x belong to group g and meet its matrix. The work is cut into
visits: pairs of a group and a tile of `tm` rows that holds some of its rows, in the
order of the rows; a tile on the border of two groups is visited by both. The number of
visits is known on the device only and bounds the grid, so that buffers may be larger
than what is in them.

A visit meets a whole column block of the matrix (one tile along the contraction), so a
group's block is read once however many rows it has.
"""

import json
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_jax.parallel.varying import alike
from moe_jax.tree import struct

Array = jax.Array

_LANES = 128
# VMEM that the blocks of a kernel may take, two of each in flight.
_VMEM_BYTES = 44 << 20
_VMEM_LIMIT = 64 << 20
_ROW_TILE = 128
# Sides of the sums that a kernel over groups holds in single precision.
_SUM_TILE = 2048


@struct
class Visits:
    """Which tile of rows meets which group, in this order.

    Attributes:
      group_v: (V,) int32.
      tile_v: (V,) int32.
      start_g: (G,) int32, first row of a group.
      end_g: (G,) int32.
      count: () int32, visits that take place.
    """

    group_v: Array
    tile_v: Array
    start_g: Array
    end_g: Array
    count: Array


def visits(sizes: Array, rows: int, tm: int, empty_too: bool) -> Visits:
    """Cuts groups of `sizes` (G,) rows into visits of tiles of `tm` rows.

    Args:
      sizes: int32, their sum is at most `rows`.
      rows: R, a multiple of `tm`.
      tm: rows of a tile.
      empty_too: an empty group is visited once, so that its result can be zeroed.
    """
    num_groups, tiles = sizes.shape[0], rows // tm
    end_g = jnp.cumsum(sizes, dtype=jnp.int32)
    start_g = end_g - sizes
    first_g = jnp.minimum(start_g // tm, tiles - 1)
    number_g = jnp.where(sizes > 0, -(-end_g // tm) - first_g, int(empty_too))
    until_g = jnp.cumsum(number_g, dtype=jnp.int32)
    v = jnp.arange(tiles + num_groups - 1, dtype=jnp.int32)
    group_v = jnp.sum(v[:, None] >= until_g[None, :], axis=1, dtype=jnp.int32)
    group_v = jnp.minimum(group_v, num_groups - 1)
    tile_v = jnp.take(first_g, group_v) + v - jnp.take(until_g - number_g, group_v)
    return Visits(
        group_v=group_v,
        tile_v=jnp.clip(tile_v, 0, tiles - 1),
        start_g=start_g,
        end_g=end_g,
        count=until_g[-1],
    )


def _block(size: int, most: int) -> int:
    """The largest multiple of 128 that divides `size`, at most `most`."""
    if size <= most:
        return size
    return max(
        (b for b in range(_LANES, most + 1, _LANES) if size % b == 0), default=size
    )


def _precision(dtype) -> jax.lax.Precision | None:
    """Float32 is multiplied as such, not as bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _held(visit, tm: int, start_ref, end_ref, group_ref, tile_ref) -> Array:
    """(tm, 1) bool: rows of the tile that belong to the visit's group."""
    row = tile_ref[visit] * tm + jax.lax.broadcasted_iota(jnp.int32, (tm, 1), 0)
    group = group_ref[visit]
    return (row >= start_ref[group]) & (row < end_ref[group])


def _cost(inputs, out) -> pl.CostEstimate:
    """What the compiler's scheduler takes for the time of a full buffer of rows."""
    (rows, k), n = inputs[0].shape, out[0][-1]
    arrays = [(a.shape, a.dtype) for a in inputs] + [out]
    moved = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in arrays)
    return pl.CostEstimate(
        flops=2 * rows * k * n, bytes_accessed=moved, transcendentals=0
    )


def _call(kernel, seen: Visits, inputs, out, grid_spec, name, tiles, interpret):
    scalars = (seen.group_v, seen.tile_v, seen.start_g, seen.end_g)
    sizes = dict(zip(("tile_m", "tile_k", "tile_n"), tiles, strict=True))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(
            *out, manual_axis_type=jax.typeof(inputs[0]).manual_axis_type
        ),
        grid_spec=grid_spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * (len(grid_spec.grid) - 1)
            + ("arbitrary",),
            vmem_limit_bytes=_VMEM_LIMIT,
        ),
        cost_estimate=_cost(inputs, out),
        interpret=interpret,
        name=name,
        metadata={"xprof_metadata": json.dumps(sizes)},
    )(*scalars, *inputs)


def gmm(
    x: Array, w: Array, sizes: Array, *, transposed: bool = False, interpret=False
) -> Array:
    """`out_r = x_r w_g` for the rows of each group g.

    Args:
      x: (R, K); R a multiple of 128.
      w: (G, K, N), or (G, N, K) if `transposed`.
      sizes: (G,) int32, rows of each group; what lies beyond their sum is not computed.
      transposed: `out_r = x_r w_g^T`.
      interpret: run without a TPU.

    Returns:
      (R, N) of the type of x; rows of nobody hold anything.
    """
    x, w, sizes = alike(x, w, sizes)
    (rows, k), n = x.shape, w.shape[1 if transposed else 2]
    tm = math.gcd(rows, _ROW_TILE)
    tn = _block(n, max(_LANES, _VMEM_BYTES // (2 * w.dtype.itemsize * k)))
    seen = visits(sizes, rows, tm, empty_too=False)
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def kernel(group, tile, start, end, x_ref, w_ref, out_ref):
        product = jax.lax.dot_general(
            x_ref[...],
            w_ref[...],
            contract,
            precision=_precision(x.dtype),
            preferred_element_type=jnp.float32,
        )
        held = _held(pl.program_id(1), tm, start, end, group, tile)
        out_ref[...] = jnp.where(held, product.astype(out_ref.dtype), out_ref[...])

    w_block = (None, tn, k) if transposed else (None, k, tn)
    w_index = (
        (lambda n, v, group, *_: (group[v], n, 0))
        if transposed
        else (lambda n, v, group, *_: (group[v], 0, n))
    )
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(n // tn, seen.count),
        in_specs=[
            pl.BlockSpec((tm, k), lambda n, v, group, tile, *_: (tile[v], 0)),
            pl.BlockSpec(w_block, w_index),
        ],
        out_specs=pl.BlockSpec((tm, tn), lambda n, v, group, tile, *_: (tile[v], n)),
    )
    out = ((rows, n), x.dtype)
    return _call(kernel, seen, (x, w), out, spec, "gmm", (tm, k, tn), interpret)


def tgmm(x: Array, y: Array, sizes: Array, *, interpret=False) -> Array:
    """`out_g = sum_r x_r y_r^T` over the rows of each group g.

    Args:
      x: (R, K).
      y: (R, N).
      sizes: (G,) int32.
      interpret: run without a TPU.

    Returns:
      (G, K, N) of the type of x; zero for an empty group.
    """
    x, y, sizes = alike(x, y, sizes)
    (rows, k), n = x.shape, y.shape[1]
    tm, tk, tn = math.gcd(rows, _ROW_TILE), _block(k, _SUM_TILE), _block(n, _SUM_TILE)
    seen = visits(sizes, rows, tm, empty_too=True)

    def kernel(group, tile, start, end, x_ref, y_ref, out_ref, sum_ref):
        visit = pl.program_id(2)
        before = group[jnp.maximum(visit - 1, 0)]
        after = group[jnp.minimum(visit + 1, pl.num_programs(2) - 1)]
        is_last = (visit == pl.num_programs(2) - 1) | (after != group[visit])

        @pl.when((visit == 0) | (before != group[visit]))
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        held = _held(visit, tm, start, end, group, tile)
        # Both: what lies in rows of nobody may be infinite.
        mine = lambda ref: jnp.where(held, ref[...], 0).astype(ref.dtype)
        sum_ref[...] += jax.lax.dot_general(
            mine(x_ref),
            mine(y_ref),
            (((0,), (0,)), ((), ())),
            precision=_precision(x.dtype),
            preferred_element_type=jnp.float32,
        )

        @pl.when(is_last)
        def _():
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(k // tk, n // tn, seen.count),
        in_specs=[
            pl.BlockSpec((tm, tk), lambda k, n, v, group, tile, *_: (tile[v], k)),
            pl.BlockSpec((tm, tn), lambda k, n, v, group, tile, *_: (tile[v], n)),
        ],
        out_specs=pl.BlockSpec(
            (None, tk, tn), lambda k, n, v, group, *_: (group[v], k, n)
        ),
        scratch_shapes=[pltpu.VMEM((tk, tn), jnp.float32)],
    )
    out = ((sizes.shape[0], k, n), x.dtype)
    return _call(kernel, seen, (x, y), out, spec, "tgmm", (tm, tk, tn), interpret)
