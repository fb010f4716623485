"""Weights that are gathered before they are used: once for many uses.

A split weight is gathered where a block uses it, for each micro-batch and each pass. In
place of the weight a caller may hand over a `Whole`: gathered before, with the place
where its gradient goes, which is split as the weight is.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.parallel import collectives, rules
from moe_jax.tree import struct

PyTree = Any


@struct
class Whole:
    """A weight that is whole on every shard, and whose gradient is not.

    Attributes:
      value: the weight in the type of the computation, with the dimensions whole that
        `rules.whole_axes` names; it gets no gradient.
      slot: of its shape, split as the weight is, never read; the gradient with respect
        to it is the weight's.
    """

    value: jax.Array
    slot: jax.Array

    def __getitem__(self, index: Any) -> "Whole":
        """The pair, where `param[...]` asks for what a parameter holds."""
        if index is not Ellipsis:
            raise TypeError(f"a gathered weight was indexed with {index!r}")
        return self


def is_whole(leaf: Any) -> bool:
    return isinstance(leaf, Whole)


def place(w: jax.Array | Whole) -> jax.Array:
    """What has the shape, the split and the type of a weight's gradient."""
    return w.slot if is_whole(w) else w


def spec(w: jax.Array | Whole, axes: rules.Axes) -> PyTree:
    """The PartitionSpecs for `shard_map` of a weight with these logical axes."""
    split = rules.spec(axes)
    if not is_whole(w):
        return split
    return Whole(value=rules.spec(rules.whole_axes(axes)), slot=split)


def bring(w: jax.Array | Whole, axes: rules.Axes) -> jax.Array:
    """The weight as a shard uses it, inside `shard_map`; its gradient is scattered.

    Args:
      w: a shard's part, or a `Whole`; marked as differing over the axes over which
        what it meets does.
      axes: its logical axes.
    """
    if is_whole(w):
        return _taken(axes, w.value, w.slot)
    for dim, names in _gathered(axes):
        w = collectives.gather(w, names, dim)
    return w


def _gathered(axes: rules.Axes) -> list[tuple[int, tuple[str, ...]]]:
    return [
        (dim, rules.mesh_axes(axis))
        for dim, axis in enumerate(axes)
        if rules.is_gathered(axis)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _taken(axes, value, slot):
    return value


def _scattered(axes, empty, grad):
    for dim, names in reversed(_gathered(axes)):
        grad = collectives.scatter(grad, names, dim)
    return None, grad.astype(empty.dtype)


_taken.defvjp(
    lambda axes, value, slot: (value, jnp.zeros((0,), slot.dtype)), _scattered
)
