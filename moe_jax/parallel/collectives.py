"""Weights inside `shard_map`: brought together, and their gradients split again.

XLA:TPU makes an all-reduce of a reduce-scatter over the whole mesh, which sends twice
the bytes. So both go one mesh axis after another, and in two steps over an axis that is
the whole mesh.
"""

import math

import jax
from jax.ad_checkpoint import checkpoint_name

from moe_jax.parallel.mesh import AXES

Names = tuple[str, ...]
Groups = list[list[int]]

# Name of gathered weights for rematerialisation.
GATHERED = "gathered_weights"


def gather(w: jax.Array, names: Names, dim: int) -> jax.Array:
    """The whole of a dimension that is split over mesh axes; reversed by `scatter`."""
    for name, groups in reversed(_steps(names)):
        w = jax.lax.all_gather(w, name, axis=dim, tiled=True, axis_index_groups=groups)
    return checkpoint_name(w, GATHERED) if names else w


def scatter(g: jax.Array, names: Names, dim: int) -> jax.Array:
    """Sums over mesh axes; each shard keeps its part of a dimension."""
    for name, groups in _steps(names):
        g = jax.lax.psum_scatter(
            g, name, scatter_dimension=dim, tiled=True, axis_index_groups=groups
        )
    return g


def bring(parts: jax.Array, names: Names) -> jax.Array:
    """All-to-all: (n B, ..., d), of all shards' rows, to (B, ..., n d), all of its own.

    One mesh axis after another: each is a short ring of its own.
    """
    sizes = [jax.lax.axis_size(name) for name in names]
    x = parts.reshape(*sizes, -1, *parts.shape[1:])
    for dim, name in reversed(list(enumerate(names))):
        x = jax.lax.all_to_all(x, name, dim, x.ndim - 1, tiled=True)
    return x.reshape(x.shape[len(names) :])


def send(rows: jax.Array, names: Names) -> jax.Array:
    """The reverse of `bring`: (B, ..., n d) to (n B, ..., d)."""
    x = rows.reshape(*[1] * len(names), *rows.shape)
    for dim, name in enumerate(names):
        x = jax.lax.all_to_all(x, name, x.ndim - 1, dim, tiled=True)
    return x.reshape(-1, *x.shape[len(names) + 1 :])


def _steps(names: Names) -> list[tuple[str, Groups | None]]:
    """Axes of more than one shard, the slowest first; the whole mesh in two steps."""
    whole = math.prod(jax.lax.axis_size(name) for name in AXES)
    found: list[tuple[str, Groups | None]] = []
    for name in names:
        n = jax.lax.axis_size(name)
        near = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
        if n == whole and near > 1:
            apart = [list(range(i, n, near)) for i in range(near)]
            beside = [list(range(i, i + near)) for i in range(0, n, near)]
            found += [(name, apart), (name, beside)]
        elif n > 1:
            found.append((name, None))
    return found


def total_like(g: jax.Array, w: jax.Array) -> jax.Array:
    """The sum over the axes over which a gradient differs and its weight does not."""
    axes = lambda a: jax.typeof(a).manual_axis_type.varying
    return total(g, tuple(name for name in AXES if name in axes(g) - axes(w)))


def total(x: jax.Array, names: Names) -> jax.Array:
    """The sum over mesh axes; `x` where there are none."""
    return jax.lax.psum(x, names) if names else x


def largest(x: jax.Array, names: Names) -> jax.Array:
    """The maximum over mesh axes; `x` where there are none."""
    return jax.lax.pmax(x, names) if names else x
