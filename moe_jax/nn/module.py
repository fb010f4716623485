"""How Flax NNX is used: as a container of weights and code, and nothing else.

Modules hold `nnx.Param`s that carry their logical axes as inert metadata. Everything
that runs takes plain nested dicts of arrays: `init` makes them, `bind` puts them back
into the module for a call. Stacking over layers is `jax.vmap` of `init`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.tree import named_leaves, path_name, struct

Params = dict[str, Any]
Builder = Callable[[nnx.Rngs], nnx.Module]


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    std: float | None = None,
    value: float = 0.0,
    dtype: Any = jnp.float32,
    rounded: bool = False,
) -> nnx.Param:
    """A weight: normal with deviation `std` cut at 3 sigma, or constant `value`.

    Args:
      rngs: source of the initial values.
      shape: of the weight.
      axes: logical, one a dimension.
      std: None: constant.
      value: where constant.
      dtype: of the weight.
      rounded: whether every use of it goes through `cast`. Its gradient then has the
        digits of the computation's type, and is kept in that (see `slots`).
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and axes {axes} differ in length")
    facts = dict(axes=axes, rounded=rounded)
    if std is None:
        return nnx.Param(jnp.full(shape, value, dtype), **facts)
    draw = jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32)
    return nnx.Param((draw * std).astype(dtype), **facts)


# A weight that the computation rounds to its own type wherever it meets it.
matrix = functools.partial(param, rounded=True)


def rename_axes(owner: nnx.Module, rename: Callable[[str | None], str | None]) -> None:
    """Gives the dimensions of all weights of a module other logical axes."""
    for _, node in nnx.iter_graph(owner):
        if isinstance(node, nnx.Param):
            node.set_metadata(axes=tuple(map(rename, node.axes)))


@struct
class Slotted:
    """A weight whose gradient comes out in another place, and in another type.

    JAX gives a gradient the type of what it belongs to. In a scan over layers, float32
    weights would have float32 gradients of all layers, twice the bytes of the bfloat16
    sums that are put there.

    Attributes:
      value: the weight; it gets no gradient.
      slot: of its shape, never read; the gradient with respect to it is the weight's.
    """

    value: jax.Array
    slot: jax.Array

    def weight(self) -> jax.Array:
        return _with_slot(self.value, self.slot)


@jax.custom_vjp
def _with_slot(value, slot):
    return value


_with_slot.defvjp(
    lambda value, slot: (value, jnp.zeros((0,), slot.dtype)),
    lambda empty, grad: (None, grad.astype(empty.dtype)),
)


class Template:
    """A module's code and the facts of its weights, without the weights.

    Attributes:
      axes: nested dict of tuples of logical axes, one a weight.
      rounded: nested dict of bools, as `param` was told.
      hollow: the module with the shapes of its weights, for what needs no more.
    """

    def __init__(self, build: Builder):
        self._build = build
        self.hollow = nnx.eval_shape(lambda: build(nnx.Rngs(params=0)))
        self._graph, state = nnx.split(self.hollow)
        is_param = lambda v: isinstance(v, nnx.Variable)
        facts = lambda of: nnx.to_pure_dict(jax.tree.map(of, state, is_leaf=is_param))
        self.axes = facts(lambda p: p.axes)
        self.rounded = facts(lambda p: p.rounded)

    def init(self, key: jax.Array) -> Params:
        """Fresh weights: nested dict of arrays."""
        return nnx.to_pure_dict(nnx.split(self._build(nnx.Rngs(params=key)))[1])

    def init_stacked(self, key: jax.Array, count: int) -> Params:
        """Weights of `count` modules, stacked on a leading axis."""
        return jax.vmap(self.init)(jax.random.split(key, count))

    def bind(self, params: Params) -> nnx.Module:
        """The module with these weights (arrays or `Slotted`), ready to call."""
        is_slotted = lambda leaf: isinstance(leaf, Slotted)
        weight = lambda leaf: leaf.weight() if is_slotted(leaf) else leaf
        return nnx.merge(self._graph, jax.tree.map(weight, params, is_leaf=is_slotted))


def stacked_axes(axes: Params) -> Params:
    """Logical axes of weights that got a leading layer axis."""
    return jax.tree.map(
        lambda a: (None, *a), axes, is_leaf=lambda v: isinstance(v, tuple)
    )


def cast(w: jax.Array, dtype: Any) -> jax.Array:
    """A weight in the type of the computation, rounded where it is used.

    With a plain cast XLA:TPU takes bfloat16 for all that leads to it, and so keeps a
    copy of the weights of all layers before the loop over them.
    """
    if jnp.dtype(dtype) == jnp.bfloat16 and w.dtype == jnp.float32:
        w = jax.lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7)
    return w.astype(dtype)


def slots(params: Params, rounded: Params, dtype: Any) -> Params:
    """The parameters' slots: zeros, for gradients in the type of the computation.

    Args:
      params: nested dict of arrays.
      rounded: nested dict of bools, of all of them or more.
      dtype: of the gradient of a weight that is rounded; others keep their own.
    """
    by_name = named_leaves(rounded)

    def slot(path, value):
        kept = dtype if by_name[path_name(path)] else value.dtype
        return jnp.zeros(value.shape, kept)

    return jax.tree_util.tree_map_with_path(slot, params)


def accumulation_dtype(dtype: Any) -> Any:
    """float32, or float64 where the computation itself is in float64."""
    return jnp.promote_types(dtype, jnp.float32)
