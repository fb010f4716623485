"""How Flax NNX is used: as a container of weights and code, and nothing else.

Modules hold `nnx.Param`s that carry their logical axes as inert metadata. Everything
that runs takes plain nested dicts of arrays: `init` makes them, `bind` puts them back
into the module for a call. Stacking over layers is `jax.vmap` of `init`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

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
) -> nnx.Param:
    """A weight: normal with deviation `std` cut at 3 sigma, or constant `value`."""
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and axes {axes} differ in length")
    if std is None:
        return nnx.Param(jnp.full(shape, value, dtype), axes=axes)
    draw = jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32)
    return nnx.Param((draw * std).astype(dtype), axes=axes)


def rename_axes(owner: nnx.Module, rename: Callable[[str | None], str | None]) -> None:
    """Gives the dimensions of all weights of a module other logical axes."""
    for _, node in nnx.iter_graph(owner):
        if isinstance(node, nnx.Param):
            node.set_metadata(axes=tuple(map(rename, node.axes)))


class Template:
    """A module's code and the facts of its weights, without the weights.

    Attributes:
      axes: nested dict of tuples of logical axes, one a weight.
    """

    def __init__(self, build: Builder):
        self._build = build
        abstract = nnx.eval_shape(lambda: build(nnx.Rngs(params=0)))
        self._graph, state = nnx.split(abstract)
        self.axes = nnx.to_pure_dict(
            jax.tree.map(
                lambda p: p.axes, state, is_leaf=lambda v: isinstance(v, nnx.Variable)
            )
        )

    def init(self, key: jax.Array) -> Params:
        """Fresh weights: nested dict of arrays."""
        return nnx.to_pure_dict(nnx.split(self._build(nnx.Rngs(params=key)))[1])

    def init_stacked(self, key: jax.Array, count: int) -> Params:
        """Weights of `count` modules, stacked on a leading axis."""
        return jax.vmap(self.init)(jax.random.split(key, count))

    def bind(self, params: Params) -> nnx.Module:
        """The module with these weights, ready to call."""
        return nnx.merge(self._graph, params)


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


def accumulation_dtype(dtype: Any) -> Any:
    """float32, or float64 where the computation itself is in float64."""
    return jnp.promote_types(dtype, jnp.float32)
