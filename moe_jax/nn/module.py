"""How Flax NNX is used: as a container of weights and code, and nothing else.

Modules hold `nnx.Param`s that carry their logical axes as inert metadata. Everything
that runs takes plain nested dicts of arrays: `init` makes them, `bind` puts them back
into the module for a call. Stacking over layers is `jax.vmap` of `init`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.parallel import rules
from moe_jax.parallel.whole import Whole, is_whole
from moe_jax.tree import named_leaves, path_name, struct

Params = dict[str, Any]
Builder = Callable[[nnx.Rngs], nnx.Module]
# A key and a shape to initial values, where they are not normal.
Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def uniform(bound: float) -> Draw:
    """Draws from [-bound, bound]."""
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def xavier(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform with the variance 2 / (fan in + fan out) (Glorot and Bengio 2010).

    The fans are the last two dimensions; those before count matrices.
    """
    return uniform(math.sqrt(6 / sum(shape[-2:])))(key, shape)


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    std: float | Draw | None = None,
    value: float = 0.0,
    dtype: Any = jnp.float32,
    rounded: bool = False,
    whole: bool = False,
) -> nnx.Param:
    """A weight: normal with deviation `std` cut at 3 sigma, drawn, or constant `value`.

    Args:
      rngs: source of the initial values.
      shape: of the weight.
      axes: logical, one a dimension.
      std: or a `Draw`; None: constant.
      value: where constant.
      dtype: of the weight.
      rounded: whether every use of it goes through `cast`. Its gradient then has the
        digits of the computation's type, and is kept in that (see `slots`).
      whole: whether what uses it takes a `parallel.whole.Whole` in its place.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and axes {axes} differ in length")
    facts = dict(axes=axes, rounded=rounded, whole=whole)
    if std is None:
        return nnx.Param(jnp.full(shape, value, dtype), **facts)
    if callable(std):
        return nnx.Param(std(rngs.params(), shape).astype(dtype), **facts)
    draw = jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32)
    return nnx.Param((draw * std).astype(dtype), **facts)


# A weight that the computation rounds to its own type wherever it meets it, and that
# meets it where split weights are gathered: in `linear.products`, or as an expert's.
matrix = functools.partial(param, rounded=True, whole=True)


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
      whole: the same.
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
        self.whole = facts(lambda p: p.whole)

    def init(self, key: jax.Array) -> Params:
        """Fresh weights: nested dict of arrays."""
        return nnx.to_pure_dict(nnx.split(self._build(nnx.Rngs(params=key)))[1])

    def init_stacked(self, key: jax.Array, count: int) -> Params:
        """Weights of `count` modules, stacked on a leading axis."""
        return jax.vmap(self.init)(jax.random.split(key, count))

    def bind(self, params: Params) -> nnx.Module:
        """The module with these weights, ready to call.

        Args:
          params: arrays, or `Slotted` ones, or `Whole` ones where `whole` allows it.
        """
        is_pair = lambda leaf: isinstance(leaf, Slotted | Whole)
        weight = lambda leaf: leaf.weight() if isinstance(leaf, Slotted) else leaf
        return nnx.merge(self._graph, jax.tree.map(weight, params, is_leaf=is_pair))


def stacked_axes(axes: Params) -> Params:
    """Logical axes of weights that got a leading layer axis."""
    return jax.tree.map(
        lambda a: (None, *a), axes, is_leaf=lambda v: isinstance(v, tuple)
    )


def cast(w: jax.Array | Whole, dtype: Any) -> jax.Array | Whole:
    """A weight in the type of the computation, rounded where it is used.

    A `Whole` was cast before. With a plain cast XLA:TPU takes bfloat16 for all that
    leads to it, and so keeps a copy of the weights of all layers before the loop over
    them.
    """
    if is_whole(w):
        return w
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


def slotted(values: Params, slots: Params) -> Params:
    """Parameters whose gradients come out in these slots.

    Args:
      values: nested dict of arrays or `Whole` ones.
      slots: of their shapes.
    """
    pair = lambda value, slot: (
        Whole(value=value.value, slot=slot)
        if is_whole(value)
        else Slotted(value=value, slot=slot)
    )
    return jax.tree.map(pair, values, slots, is_leaf=is_whole)


def gathered(params: Params, facts: Any) -> Params:
    """The parameters, each as a `Whole` that can be: cast and gathered here.

    Args:
      params: nested dict of arrays.
      facts: with `axes`, `rounded`, `whole` and `dtype`, as those of a model.
    """
    axes = named_leaves(facts.axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    takes, places = named_leaves(facts.whole), slots(params, facts.rounded, facts.dtype)

    def gather(path, value, slot):
        name = path_name(path)
        if not takes[name] or not any(map(rules.is_gathered, axes[name])):
            return value
        value = rules.constrain(cast(value, facts.dtype), *rules.whole_axes(axes[name]))
        return Whole(value=value, slot=slot)

    return jax.tree_util.tree_map_with_path(gather, params, places)


def accumulation_dtype(dtype: Any) -> Any:
    """float32, or float64 where the computation itself is in float64."""
    return jnp.promote_types(dtype, jnp.float32)
