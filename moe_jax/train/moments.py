"""Adam's moments in eight bits a number, in blocks (after Dettmers et al. 2022).

A block of numbers shares a scale, its largest magnitude s, in float32. A number x is
kept as a level i of a fixed code that is finer towards zero,

    first moment:   x = s * sign(i) * (|i| / 127) ** 4
    second moment:  x = s * (i / 255) ** 6

The powers are ours, in place of the paper's dynamic tree (arXiv:2110.02861): they need
no table. Levels lie 3 % and 2.4 % apart at the top of a block, 18 % and 7 % at a
thousandth of it, and reach down to 4e-9 and 4e-15 of it. Numbers are rounded up or
down by chance, such that the mean is right: with the nearest level, a decay of the
moments by less than half a step would never happen. Chance is a hash of position and
step, so it is the same on every mesh and in a run that was resumed. A second moment
that is not zero is never rounded to zero, for the step is divided by its root.

A block is a run along one dimension, the last but one or, where that is no multiple of
a block, one before it: so on a TPU no array is laid out anew. Small weights, and those
without such a dimension, keep their type. The optimizer's state is split as the
parameter is.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.nn.module import Params
from moe_jax.tree import named_leaves, path_name

INT8 = "int8"
_POWERS = {jnp.int8: 4, jnp.uint8: 6}
_TOPS = {jnp.int8: 127, jnp.uint8: 255}
_LEAST = 4096  # Entries of a weight; fewer are not worth it.


def axis_of(shape: tuple[int, ...], block: int) -> int | None:
    """The dimension along which a moment of this shape has blocks, if it has any."""
    if math.prod(shape) < _LEAST:
        return None
    fits = (dim for dim in reversed(range(len(shape) - 1)) if not shape[dim] % block)
    return next(fits, None)


def check(params: Params, block: int) -> None:
    """Raises where a mesh would cut a block in two.

    Args:
      params: abstract, with shardings.
      block: entries that share a scale.

    Raises:
      UserError: it would.
    """
    for name, leaf in named_leaves(params).items():
        axis = axis_of(leaf.shape, block)
        local = leaf.sharding.shard_shape(leaf.shape)
        if axis is not None and local[axis] % block:
            raise UserError(
                f"--config.optimizer.block_size={block} does not divide the "
                f"{local[axis]} of {leaf.shape[axis]} entries that a device holds of "
                f"{name} along dimension {axis}: a block would lie on several; set one "
                "that does, or keep no moment in int8"
            )


def is_blocks(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether a shape has a number for each block of one dimension of another."""
    if len(shape) != len(whole):
        return False
    other = [dim for dim in range(len(shape)) if shape[dim] != whole[dim]]
    return (
        len(other) == 1
        and 0 < shape[other[0]]
        and not whole[other[0]] % shape[other[0]]
    )


def pack(tree: Params, block: int, signed: bool, step: jax.Array) -> dict[str, Params]:
    """Moments to codes and scales.

    Args:
      tree: nested dict of floats.
      block: entries that share a scale.
      signed: the first moment has a sign.
      step: () int32, for the rounding.

    Returns:
      "code": like the tree, int8 or uint8, or the float where that is kept; "scale":
      float32, with a scale for each block, and without the weights that are kept.
    """
    codes, scales = {}, {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        axis, code = axis_of(leaf.shape, block), leaf
        if axis is not None:
            kind = jnp.int8 if signed else jnp.uint8
            code, scale = _encode(leaf, axis, block, kind, step)
            _put(scales, path, scale)
        _put(codes, path, code)
    return {"code": codes, "scale": scales}


def is_pack(tree: Params) -> bool:
    """Whether a tree is what `pack` returns."""
    return set(tree) == {"code", "scale"}


def unpack(packed: dict[str, Params], like: Params) -> Params:
    """The moments again, in the types of the parameters."""
    scales = named_leaves(packed["scale"])

    def one(path, code, leaf):
        name = path_name(path)
        wide = _decode(code, scales[name]) if name in scales else code
        return wide.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, packed["code"], like)


def _put(tree: dict[str, Any], path, leaf) -> None:
    *above, last = (key.key for key in path)
    for key in above:
        tree = tree.setdefault(key, {})
    tree[last] = leaf


def _blocks(x: jax.Array, axis: int, count: int) -> jax.Array:
    """(..., count * b, ...) -> (..., count, b, ...)."""
    return x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])


def _encode(x, axis, block, kind, step):
    count, top, power = x.shape[axis] // block, _TOPS[kind], _POWERS[kind]
    share = _blocks(jnp.abs(x.astype(jnp.float32)), axis, count)
    scale = jnp.max(share, axis=axis + 1, keepdims=True)
    share = share / jnp.where(scale > 0, scale, 1)
    below = jnp.minimum(jnp.floor(top * share ** (1 / power)), top - 1)
    low, high = (below / top) ** power, ((below + 1) / top) ** power
    chance = _blocks(_chance(x.shape, step, kind), axis, count)
    up = (share - low) / (high - low) > chance
    if kind == jnp.uint8:
        up |= (below == 0) & (share > 0)
    level = (below + up).reshape(x.shape)
    if kind == jnp.int8:
        level = jnp.where(x < 0, -level, level)
    return level.astype(kind), jnp.squeeze(scale, axis + 1)


def _decode(code, scale):
    kind = jnp.int8 if code.dtype == jnp.int8 else jnp.uint8
    (axis,) = (d for d in range(code.ndim) if code.shape[d] != scale.shape[d])
    level = code.astype(jnp.float32) / _TOPS[kind]
    value = level ** _POWERS[kind]
    if kind == jnp.int8:
        value = jnp.where(level < 0, -value, value)
    wide = _blocks(value, axis, scale.shape[axis]) * jnp.expand_dims(scale, axis + 1)
    return wide.reshape(code.shape)


def _chance(shape: tuple[int, ...], step: jax.Array, kind: Any) -> jax.Array:
    """Numbers in [0, 1) that depend on position, step and moment alone.

    The finalizer of MurmurHash3 (A. Appleby, public domain), twice.
    """
    place, stride = jnp.uint32(0), 1
    for dim in reversed(range(len(shape))):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
        place = place + along * jnp.uint32(stride % 2**32)
        stride *= shape[dim]
    salt = _mixed(2 * step.astype(jnp.uint32) + jnp.uint32(kind == jnp.int8))
    return (_mixed(place ^ salt) >> 8).astype(jnp.float32) * 2.0**-24


def _mixed(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
