"""From files to arrays on a mesh, one leaf of one layer at a time.

Leaves that are stacked over layers are made on the devices and filled there. Of each
tensor a process reads what its devices hold, so the host's memory stays below one layer
of that and what the files' pages take.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.checkpoint import trees
from moe_jax.convert.mapping import Place
from moe_jax.convert.quantized import Tensor
from moe_jax.errors import UserError

_Bounds = tuple[tuple[int, int], ...]


def arrays(
    wanted: Sequence[Place], tensors: Mapping[str, Tensor], leaves: Mapping[str, Any]
) -> dict[str, Any]:
    """All leaves, filled.

    Args:
      wanted: where each tensor belongs, in the order of the layers; checked.
      tensors: of the checkpoint.
      leaves: `jax.ShapeDtypeStruct` with shardings, by path.

    Returns:
      Nested dicts of arrays.

    Raises:
      UserError: a value is not finite; in which tensor.
    """
    found: dict[str, jax.Array] = {}
    reader = _Reader(tensors)
    of_layer = lambda place: (place.layer, place.repeat)
    for (_, repeat), group in itertools.groupby(wanted, of_layer):
        made = {}
        for name, parts in itertools.groupby(group, lambda place: place.leaf):
            stacked = repeat is not None
            shape, where = _part(leaves[name], stacked)
            made[name] = _leaf(list(parts), reader, leaves[name].dtype, shape, where)
        if repeat is None:
            found |= made
            continue
        new = {name: leaves[name] for name in made.keys() - found.keys()}
        found |= _zeros(new)
        stacks = {name: found[name] for name in made}
        found |= _put(stacks, made, repeat)
    return trees.nested(found)


class _Reader:
    """Reads tensors; keeps the last quantised one, which may be of two leaves."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self._last: tuple[str, Any] = ("", None)

    def __call__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        if not tensor.quantized:
            return tensor.array()
        if self._last[0] != name:
            self._last = ("", None)  # Not two of them at once.
            self._last = (name, tensor.array())
        return self._last[1]


def _part(leaf: Any, stacked: bool) -> tuple[tuple[int, ...], NamedSharding]:
    """Shape and sharding of a leaf, or of one layer of it."""
    if not stacked:
        return leaf.shape, leaf.sharding
    spec = tuple(leaf.sharding.spec)
    if spec and spec[0] is not None:
        raise ValueError(f"{leaf}: the axis of layers is split")
    where = NamedSharding(leaf.sharding.mesh, PartitionSpec(*spec[1:]))
    return leaf.shape[1:], where


def _zeros(leaves: dict[str, Any]) -> dict[str, jax.Array]:
    if not leaves:
        return {}
    make = lambda: {n: jnp.zeros(leaf.shape, leaf.dtype) for n, leaf in leaves.items()}
    where = {name: leaf.sharding for name, leaf in leaves.items()}
    return jax.jit(make, out_shardings=where)()


def _put(stacks, layers, repeat: int) -> dict[str, jax.Array]:
    """The stacks, which are used up, with these layers at place `repeat`."""
    where = tuple((name, stack.sharding) for name, stack in stacks.items())
    return _putting(where)(stacks, layers, repeat)


@functools.lru_cache(maxsize=16)
def _putting(shardings: tuple[tuple[str, NamedSharding], ...]):
    def put(stacks, layers, repeat):
        update = jax.lax.dynamic_update_index_in_dim
        return {n: update(s, layers[n], repeat, 0) for n, s in stacks.items()}

    return jax.jit(put, donate_argnums=0, out_shardings=dict(shardings))


def _leaf(group, reader, dtype, shape, sharding) -> jax.Array:
    """One leaf, of one layer where it is stacked, from the tensors that make it up."""
    places = sharding.addressable_devices_indices_map(shape).values()
    buffers = {
        bounds: np.empty([last - first for first, last in bounds], dtype)
        for bounds in {_bounds(index, shape) for index in places}
    }
    for place in group:
        wanted = list(_parts(place.expert, buffers))
        if not wanted:
            continue  # Of an expert whose devices others have.
        view = place.weight.to_leaf(reader(place.hub), place.shape)
        for bounds, part in wanted:
            part[...] = view[tuple(itertools.starmap(slice, bounds))]
            if not np.isfinite(part).all():
                raise UserError(f"tensor {place.hub} has a value that is not finite")
    pick = lambda index: buffers[_bounds(index, shape)]
    return jax.make_array_from_callback(shape, sharding, pick)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> _Bounds:
    ends = (s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
    return tuple(ends)


def _parts(
    expert: int | None, buffers: Mapping[_Bounds, np.ndarray]
) -> Iterator[tuple[_Bounds, np.ndarray]]:
    """What each buffer takes of a tensor: bounds in it, and where they go."""
    for bounds, buffer in buffers.items():
        if expert is None:
            yield bounds, buffer
        elif bounds[0][0] <= expert < bounds[0][1]:
            yield bounds[1:], buffer[expert - bounds[0][0], ...]
