"""Batches from the rows that a host read to arrays over the mesh."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moe_jax.parallel import rules

Batch = dict[str, np.ndarray]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """(B, S) arrays: rows over data, fsdp and expert, positions over context."""
    return rules.sharding(mesh, ("batch", "sequence"))


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
    """Global (B, S) arrays from this process's rows [first, first + b)."""
    where = batch_sharding(mesh)

    def one(local: np.ndarray) -> jax.Array:
        def part(index):
            start, stop, _ = index[0].indices(batch_size)
            return local[start - first : stop - first, index[1]]

        shape = (batch_size, *local.shape[1:])
        return jax.make_array_from_callback(shape, where, part)

    return {name: one(local) for name, local in batch.items()}


def abstract(
    mesh: Mesh, batch_size: int, length: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of a batch."""
    where = batch_sharding(mesh)
    whole = lambda dtype: jax.ShapeDtypeStruct(
        (batch_size, length), dtype, sharding=where
    )
    names = ("tokens", "targets", "positions", "segments")
    return {n: whole(np.int32) for n in names} | {"weights": whole(np.float32)}
