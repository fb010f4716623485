"""Grouped matmul of rows sorted by group, as kernels for NVIDIA GPUs (Pallas, Triton).

The grid of a kernel is fixed before the sizes of the groups are known. `gmm` cuts each
group into tiles of rows that begin with the group; there are at most R / tile + G of
them, and those that a routing leaves idle return at once. `tgmm` has one program a
group and block of its matrix, which walks over the group's rows.

Operands stay in the device's memory; a program loads the blocks that it multiplies, so
that no size need be a multiple of anything. Sums are taken in single precision.

Why kernels of our own: XLA (jax 0.11.2) makes a dense product of `jax.lax.ragged_dot`,
and of the weights' gradient even where a flag gives the rest to cuDNN. tokamax 0.0.17
needs jax 0.11.1, brings xprof, qwix and pydantic, and for GPUs jax-triton and more; the
ragged products that come with JAX are examples, each for one generation of GPUs. jax
0.11 deprecates Pallas' Triton backend: later versions need a port to Mosaic.

The kernels ran in the interpreter and were compiled for an H200; none has run on one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moe_jax.parallel.varying import alike

Array = jax.Array

# Tiles of rows that run beside each other for every block of columns, so that what is
# read of the matrices is in the cache for all of them.
_BAND = 8
# The least side of a block that matrix units take.
_LEAST = 16
# Compute capabilities with 100 KB of shared memory a block, where others have 160.
_SMALL = ("8.6", "8.7", "8.9", "12.0", "12.1")


class Tiles(NamedTuple):
    """How a kernel is cut up, in powers of two.

    Attributes:
      rows: of a block of the result.
      columns: of a block of the result.
      depth: what a step contracts.
      warps: of 32 threads, which share a block.
      stages: steps whose operands are on their way at a time.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def fitted(self, rows: int, columns: int, depth: int) -> "Tiles":
        """No larger than these sizes need."""
        fit = lambda most, size: min(most, max(_LEAST, pl.next_power_of_2(size)))
        return self._replace(
            rows=fit(self.rows, rows),
            columns=fit(self.columns, columns),
            depth=fit(self.depth, depth),
        )


LARGE = Tiles(rows=128, columns=256, depth=64, warps=8, stages=3)
SMALL = Tiles(rows=128, columns=128, depth=64, warps=4, stages=3)
# Single precision is multiplied without matrix units.
SINGLE = Tiles(rows=64, columns=64, depth=32, warps=4, stages=2)


def _tiles(dtype) -> Tiles:
    if dtype == jnp.float32:
        return SINGLE
    if jax.default_backend() == "gpu":
        capability = getattr(jax.local_devices()[0], "compute_capability", "")
        return SMALL if capability in _SMALL else LARGE
    return LARGE


def _precision(dtype) -> jax.lax.Precision | None:
    """Float32 is multiplied as such, not as TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def tiles_of_groups(sizes: Array, rows: int, tile: int) -> tuple[Array, Array, Array]:
    """Cuts groups of `sizes` (G,) rows into tiles that begin with their group.

    Args:
      sizes: int32, their sum is at most `rows`.
      rows: R.
      tile: rows of a tile.

    Returns:
      For each tile its group, its first row, and the end of the group's rows, (V,)
      int32, with V the number that no sizes exceed, filled up to whole bands. A tile
      that does not take place begins where its group ends.
    """
    num_groups = sizes.shape[0]
    most = (rows + num_groups * (tile - 1)) // tile
    v = jnp.arange(pl.cdiv(most, _BAND) * _BAND, dtype=jnp.int32)
    end_g = jnp.cumsum(sizes, dtype=jnp.int32)
    number_g = (sizes + tile - 1) // tile
    until_g = jnp.cumsum(number_g, dtype=jnp.int32)
    group_v = jnp.sum(v[:, None] >= until_g[None, :], axis=1, dtype=jnp.int32)
    group_v = jnp.minimum(group_v, num_groups - 1)
    of_group = lambda value_g: jnp.take(value_g, group_v)
    end_v = of_group(end_g)
    first_v = end_v - of_group(sizes) + tile * (v - of_group(until_g - number_g))
    return group_v, jnp.minimum(first_v, end_v), end_v


def _span(start, size: int) -> Array:
    return start + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)


def _within(start, size: int, limit: int) -> Array | None:
    """(size,) bool: which places from `start` on there are; None: all of them."""
    return None if limit % size == 0 else _span(start, size) < limit


def _mask(row: Array | None, column: Array | None) -> Array | None:
    row = None if row is None else row[:, None]
    column = None if column is None else column[None, :]
    if row is None or column is None:
        return column if row is None else row
    return row & column


def _load(ref, shape: tuple[int, int], row: Array | None, column: Array | None):
    """A block, zero where a mask is False: what lies there may be infinite."""
    mask = _mask(row, column)
    if mask is None:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=jnp.broadcast_to(mask, shape), other=0)


def _store(ref, block: Array, row: Array | None, column: Array | None) -> None:
    mask = _mask(row, column)
    mask = None if mask is None else jnp.broadcast_to(mask, block.shape)
    plgpu.store(ref, block, mask=mask)


def _loop(steps: Array | int, step, shape: tuple[int, int]) -> Array:
    """Sums `step(i)` in single precision for i in [0, steps)."""
    zero = jnp.zeros(shape, jnp.float32)
    bounds = jnp.int32(0), jnp.int32(steps)
    return jax.lax.fori_loop(*bounds, lambda i, total: total + step(i), zero)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """`a b` in single precision, over the dimensions `contract` of the two."""
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _call(name, kernel, inputs, out, grid, tiles: Tiles, interpret: bool) -> Array:
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(
            *out, manual_axis_type=jax.typeof(inputs[-1]).manual_axis_type
        ),
        in_specs=[pl.no_block_spec] * len(inputs),
        out_specs=pl.no_block_spec,
        grid=grid,
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.warps, num_stages=tiles.stages
        ),
        interpret=interpret,
        name=name,
    )(*inputs)


def gmm(
    x: Array,
    w: Array,
    sizes: Array,
    *,
    transposed: bool = False,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Array:
    """`out_r = x_r w_g` for the rows of each group g.

    Args:
      x: (R, K), of two or four bytes a number.
      w: (G, K, N), or (G, N, K) if `transposed`; of the same type.
      sizes: (G,) int32, rows of each group; what lies beyond their sum is not computed.
      transposed: `out_r = x_r w_g^T`.
      tiles: rows and columns of the result, and K; None: by the type and the device.
      interpret: run without a GPU.

    Returns:
      (R, N) of the type of x; rows of nobody hold anything.
    """
    x, w, sizes = alike(x, w, sizes)
    (rows, k), n = x.shape, w.shape[1 if transposed else 2]
    tiles = (tiles or _tiles(x.dtype)).fitted(rows, n, k)
    tm, tn, tk = tiles[:3]
    table = tiles_of_groups(sizes, rows, tm)

    def gmm_kernel(group_ref, first_ref, end_ref, x_ref, w_ref, out_ref):
        visit = pl.program_id(2) * _BAND + pl.program_id(0)
        column = pl.program_id(1) * tn
        group, first, end = group_ref[visit], first_ref[visit], end_ref[visit]
        held_m, there_n = _span(first, tm) < end, _within(column, tn, n)

        def step(i):
            there_k = _within(i * tk, tk, k)
            along_k, along_n = pl.ds(i * tk, tk), pl.ds(column, tn)
            a = _load(x_ref.at[pl.ds(first, tm), along_k], (tm, tk), held_m, there_k)
            if transposed:
                block = w_ref.at[group, along_n, along_k]
                return _dot(a, _load(block, (tn, tk), there_n, there_k), (1, 1))
            block = w_ref.at[group, along_k, along_n]
            return _dot(a, _load(block, (tk, tn), there_k, there_n), (1, 0))

        @pl.when(first < end)
        def _():
            total = _loop(pl.cdiv(k, tk), step, (tm, tn)).astype(out_ref.dtype)
            place = out_ref.at[pl.ds(first, tm), pl.ds(column, tn)]
            _store(place, total, held_m, there_n)

    grid = (_BAND, pl.cdiv(n, tn), table[0].shape[0] // _BAND)
    out = ((rows, n), x.dtype)
    return _call("gmm", gmm_kernel, (*table, x, w), out, grid, tiles, interpret)


def tgmm(
    x: Array,
    y: Array,
    sizes: Array,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Array:
    """`out_g = sum_r x_r y_r^T` over the rows of each group g.

    Args:
      x: (R, K), of two or four bytes a number.
      y: (R, N), of the same type.
      sizes: (G,) int32.
      tiles: rows and columns of a group's result, and R; None: by type and device.
      interpret: run without a GPU.

    Returns:
      (G, K, N) of the type of x; zero for an empty group.
    """
    x, y, sizes = alike(x, y, sizes)
    (rows, k), n, num_groups = x.shape, y.shape[1], sizes.shape[0]
    tiles = (tiles or _tiles(x.dtype)).fitted(k, n, rows)
    tk, tn, tm = tiles[:3]
    end_g = jnp.cumsum(sizes, dtype=jnp.int32)

    def tgmm_kernel(first_ref, end_ref, x_ref, y_ref, out_ref):
        group = pl.program_id(2)
        row, column = pl.program_id(0) * tk, pl.program_id(1) * tn
        first, end = first_ref[group], end_ref[group]
        there_k, there_n = _within(row, tk, k), _within(column, tn, n)

        def step(i):
            start = first + i * tm
            held_m, along_m = _span(start, tm) < end, pl.ds(start, tm)
            a = _load(x_ref.at[along_m, pl.ds(row, tk)], (tm, tk), held_m, there_k)
            b = _load(y_ref.at[along_m, pl.ds(column, tn)], (tm, tn), held_m, there_n)
            return _dot(a, b, (0, 0))

        total = _loop((end - first + tm - 1) // tm, step, (tk, tn))
        place = out_ref.at[group, pl.ds(row, tk), pl.ds(column, tn)]
        _store(place, total.astype(out_ref.dtype), there_k, there_n)

    grid = (pl.cdiv(k, tk), pl.cdiv(n, tn), num_groups)
    inputs, out = (end_g - sizes, end_g, x, y), ((num_groups, k, n), x.dtype)
    return _call("tgmm", tgmm_kernel, inputs, out, grid, tiles, interpret)
