"""One table from logical axes to mesh axes: the only place that makes shardings."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Tokens are split over data, fsdp and expert; dense weights over fsdp and expert
# together, so that the expert axis saves memory outside the experts too.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "expert_embed": ("fsdp",),
}

Axes = tuple[str | None, ...]


def spec(axes: Axes) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical axes.

    Raises:
      KeyError: a logical axis that the table does not have.
    """
    entries = []
    for axis in axes:
        mesh_axes = () if axis is None else RULES[axis]
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return PartitionSpec(*entries)


def sharding(mesh: Mesh, axes: Axes) -> NamedSharding:
    return NamedSharding(mesh, spec(axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the layout of an activation; does nothing where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def size(mesh: Any, axis: str) -> int:
    """Devices over which a logical axis is split; 1 without a mesh."""
    total = 1
    for name in RULES[axis]:
        total *= mesh.shape.get(name, 1)
    return total


def tree_shardings(mesh: Mesh, axes_tree: Any) -> Any:
    """Shardings for a tree whose leaves are tuples of logical axes."""
    return jax.tree.map(
        lambda axes: sharding(mesh, axes),
        axes_tree,
        is_leaf=lambda v: isinstance(v, tuple),
    )
