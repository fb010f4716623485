"""Products with dense weights that are split over the mesh.

Left to the compiler, a split weight is multiplied piece by piece while the pieces go
round the mesh: hundreds of small sends a layer, and the result is read and written
again for each. Here it is gathered whole, and its gradient leaves by a reduce-scatter.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn import module
from moe_jax.parallel import collectives, rules, varying, whole


def products(
    x: jax.Array, axes: rules.Axes, weights: Sequence[nnx.Param], contracted: int = 1
) -> tuple[jax.Array, ...]:
    """`x` times each of the weights, over its last and their first dimensions.

    Under a mesh it runs in `shard_map`: weights are cast to the type of `x` and their
    dimension "embed" is gathered. Where a contracted dimension stays split, the
    results are summed over the mesh.

    Args:
      x: (B, S, ...), split as `axes`.
      axes: logical; a dimension that cannot be split so stays whole.
      weights: with one dimension "embed"; what is left of them is split alike. They
        may hold a `whole.Whole`.
      contracted: number of dimensions that go.

    Returns:
      For each weight (B, S, ...), split as `x` and the weight are, "embed" whole.
    """
    arrays = tuple(w[...] for w in weights)
    if jax.sharding.get_abstract_mesh().empty:
        return tuple(_product(x, w, contracted) for w in arrays)
    axes = rules.fitting(axes, x.shape)
    kept = len(axes) - contracted
    split = tuple(name for axis in axes[kept:] for name in rules.mesh_axes(axis))

    def local(x, *arrays):
        found = []
        shards = [varying.vary_like(w, x) for w in arrays]
        # One sum for all in the derivative.
        x = varying.vary_like(x, whole.place(shards[0]))
        for w, param in zip(shards, weights, strict=True):
            w = whole.bring(module.cast(w, x.dtype), param.axes)
            found.append(collectives.total(_product(x, w, contracted), split))
        return tuple(found)

    def out_spec(param):
        return rules.spec((*axes[:kept], *rules.whole_axes(param.axes)[contracted:]))

    return jax.shard_map(
        local,
        in_specs=(rules.spec(axes), *(whole.spec(w[...], w.axes) for w in weights)),
        out_specs=tuple(map(out_spec, weights)),
    )(x, *arrays)


def _product(x: jax.Array, w: jax.Array, contracted: int) -> jax.Array:
    return jnp.tensordot(x, module.cast(w, x.dtype), contracted)


class Affine(nnx.Module):
    """`x W + b`; the bias begins at zero.

    Args:
      into: width of x.
      out: sizes of what comes out.
      axes: logical, of the weight (into, *out).
      std: deviation of the initial weight, or a `module.Draw`; None: zero.
      dtype: of the weights.
      rngs: source of the initial weights.
    """

    def __init__(
        self,
        into: int,
        out: tuple[int, ...],
        axes: rules.Axes,
        *,
        std: float | module.Draw | None,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.w = module.matrix(rngs, (into, *out), axes, std=std, dtype=dtype)
        self.b = module.param(rngs, out, axes[1:], dtype=dtype)

    def __call__(self, x: jax.Array, axes: rules.Axes) -> jax.Array:
        """(..., into) with these logical axes -> (..., *out)."""
        (y,) = products(x, axes, (self.w,))
        return y + self.b[...].astype(y.dtype)


def row(weight: nnx.Param, index: jax.Array, dtype: str) -> jax.Array:
    """Rows of a small table (V, D) whose rows are all on every shard.

    Args:
      weight: with the axes (None, "embed").
      index: (B,) int32, split as ("batch",).
      dtype: of the result.

    Returns:
      (B, D), "embed" whole; NaN for an index beyond the table.
    """
    table = weight[...]
    if jax.sharding.get_abstract_mesh().empty:
        return _row(module.cast(table, dtype), index)
    axes = rules.fitting(("batch",), index.shape)

    def local(index, table):
        table = varying.vary_like(table, index)
        return _row(whole.bring(module.cast(table, dtype), weight.axes), index)

    return jax.shard_map(
        local,
        in_specs=(rules.spec(axes), whole.spec(table, weight.axes)),
        out_specs=rules.spec((*axes, None)),
    )(index, table)


def _row(table, index):
    return table.at[index].get(mode="fill", fill_value=jnp.nan)
