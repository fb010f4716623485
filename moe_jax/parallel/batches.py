"""Batches from the rows that a host read to arrays over the mesh."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moe_jax.parallel import rules

Batch = dict[str, np.ndarray]


def axes(ndim: int) -> rules.Axes:
    """Logical axes of a batch's array: (B, S) of text; of an image its row alone."""
    return ("batch", "sequence") if ndim == 2 else ("batch",) + (None,) * (ndim - 1)


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """Rows over data, fsdp and expert; positions, where there are, over context."""
    return rules.sharding(mesh, axes(ndim))


def rows_of_process(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """First row and number of rows of the global batch that this process needs.

    Processes whose devices differ only along context or tensor need the same rows.
    """
    shape = (batch_size, rules.size(mesh, "sequence"))
    where = batch_sharding(mesh).addressable_devices_indices_map(shape)
    rows = [index[0].indices(batch_size) for index in where.values()]
    first = min(start for start, _, _ in rows)
    return first, max(stop for _, stop, _ in rows) - first


def put(batch: Batch, mesh: Mesh, batch_size: int, first: int) -> dict[str, jax.Array]:
    """Global (B, ...) arrays from this process's rows [first, first + b)."""

    def one(local: np.ndarray) -> jax.Array:
        def part(index):
            start, stop, _ = index[0].indices(batch_size)
            return local[(slice(start - first, stop - first), *index[1:])]

        shape = (batch_size, *local.shape[1:])
        where = batch_sharding(mesh, local.ndim)
        return jax.make_array_from_callback(shape, where, part)

    return {name: one(local) for name, local in batch.items()}


def abstract(
    mesh: Mesh, batch_size: int, rows: Mapping[str, tuple[tuple[int, ...], str]]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of a batch.

    Args:
      mesh: over the devices.
      batch_size: B.
      rows: shape and type of each array, of one row.
    """

    def one(shape, dtype):
        where = batch_sharding(mesh, 1 + len(shape))
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=where)

    return {name: one(*row) for name, row in rows.items()}
