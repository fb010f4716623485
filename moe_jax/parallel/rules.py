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
    "expert_mlp": ("tensor",),
}

# Dimensions of weights that no product leaves split.
_GATHERED = ("embed", "expert_embed")

Axes = tuple[str | None, ...]


def grouped(axis: str | None, expert_axes: tuple[str, ...]) -> str | None:
    """A logical axis as it is where the experts are split over `expert_axes`.

    Its name then says so: "expert_mlp@expert+tensor" is whole, because the tensor axis
    holds other experts, and "sequence@expert+tensor" is split over tensor too, because
    every shard of the group brings tokens of its own.
    """
    if axis is None or expert_axes == RULES["expert"]:
        return axis
    return f"{axis}@{'+'.join(expert_axes)}"


def mesh_axes(axis: str | None) -> tuple[str, ...]:
    """Mesh axes over which a logical axis is split.

    Raises:
      KeyError: a logical axis that the table does not have.
    """
    if axis is None:
        return ()
    name, _, group = axis.partition("@")
    if not group:
        return RULES[name]
    expert_axes = tuple(group.split("+"))
    if name == "expert":
        return expert_axes
    if name == "sequence":
        tokens = RULES["batch"] + RULES["sequence"]
        return RULES[name] + tuple(a for a in expert_axes if a not in tokens)
    if name == "batch":
        return RULES[name]
    return tuple(a for a in RULES[name] if a not in expert_axes)


def spec(axes: Axes) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical axes.

    Raises:
      KeyError: a logical axis that the table does not have.
    """
    entries = []
    for names in map(mesh_axes, axes):
        entries.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*entries)


def is_gathered(axis: str | None) -> bool:
    """Whether a weight's dimension is brought together where the weight is used."""
    return axis is not None and axis.partition("@")[0] in _GATHERED


def counts_experts(axis: str | None) -> bool:
    """Whether the positions of a weight's dimension are experts."""
    return axis is not None and axis.partition("@")[0] == "expert"


def whole_axes(axes: Axes) -> Axes:
    """The axes of a weight that is gathered."""
    return tuple(None if is_gathered(axis) else axis for axis in axes)


def sharding(mesh: Mesh, axes: Axes) -> NamedSharding:
    return NamedSharding(mesh, spec(axes))


def whole(w: jax.Array) -> jax.Array:
    """A small weight, gathered; its gradient is summed on every device.

    Left to the compiler, its product goes round the mesh in as many small sends as
    there are devices.
    """
    return constrain(w, *[None] * w.ndim)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the layout of an activation; does nothing where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def size(mesh: Any, axis: str) -> int:
    """Devices over which a logical axis is split; 1 without a mesh."""
    total = 1
    for name in mesh_axes(axis):
        total *= mesh.shape.get(name, 1)
    return total


def fitting(axes: Axes, shape: tuple[int, ...]) -> Axes:
    """The axes of an activation; None for a dimension that cannot be split so.

    One position at a time, in decoding, is fewer than there are shards of a sequence.
    """
    mesh = jax.sharding.get_abstract_mesh()
    fits = lambda axis, dim: axis is None or dim % size(mesh, axis) == 0
    return tuple(a if fits(a, d) else None for a, d in zip(axes, shape, strict=True))


def tree_shardings(mesh: Mesh, axes_tree: Any) -> Any:
    """Shardings for a tree whose leaves are tuples of logical axes."""
    return jax.tree.map(
        lambda axes: sharding(mesh, axes),
        axes_tree,
        is_leaf=lambda v: isinstance(v, tuple),
    )
