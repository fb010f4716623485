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
from moe_jax.parallel import collectives, rules, varying

_GATHERED = "embed"


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
      weights: with one dimension "embed"; what is left of them is split alike.
      contracted: number of dimensions that go.

    Returns:
      For each weight (B, S, ...), split as `x` and the weight are, "embed" whole.
    """
    arrays = tuple(w[...] for w in weights)
    if jax.sharding.get_abstract_mesh().empty:
        return tuple(_product(x, w, contracted) for w in arrays)
    axes = rules.fitting(axes, x.shape)
    names, kept = rules.mesh_axes(_GATHERED), len(axes) - contracted
    split = tuple(name for axis in axes[kept:] for name in rules.mesh_axes(axis))

    def local(x, *arrays):
        found = []
        shards = [varying.vary_like(w, x) for w in arrays]
        x = varying.vary_like(x, shards[0])  # One sum for all in the derivative.
        for w, param in zip(shards, weights, strict=True):
            w = module.cast(w, x.dtype)
            w = collectives.gather(w, names, param.axes.index(_GATHERED))
            found.append(collectives.total(_product(x, w, contracted), split))
        return tuple(found)

    def out_spec(param):
        whole = (None if axis == _GATHERED else axis for axis in param.axes)
        return rules.spec((*axes[:kept], *tuple(whole)[contracted:]))

    return jax.shard_map(
        local,
        in_specs=(rules.spec(axes), *(rules.spec(w.axes) for w in weights)),
        out_specs=tuple(map(out_spec, weights)),
    )(x, *arrays)


def _product(x: jax.Array, w: jax.Array, contracted: int) -> jax.Array:
    return jnp.tensordot(x, module.cast(w, x.dtype), contracted)
