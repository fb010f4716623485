"""Token embedding with the vocabulary split over `tensor` (Megatron-LM, 2019)."""

import jax
import jax.numpy as jnp

from moe_jax.parallel import rules

_TABLE = ("vocab", "embed")


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of the table.

    Under a mesh it runs in `shard_map`: the width is gathered (the derivative is a
    reduce-scatter, where a lookup left to the compiler may replicate the batch), each
    tensor shard looks up the ids it holds, and the parts are summed.

    Args:
      table: (V, D), split as ("vocab", "embed").
      tokens: (B, S) int32, split as ("batch", "sequence").

    Returns:
      (B, S, D), split as ("batch", "sequence", None).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.take(table, tokens, axis=0)
    vocab_axes, width_axes = (rules.RULES[axis] for axis in _TABLE)

    def local(table, tokens):
        table = jax.lax.all_gather(table, width_axes, axis=1, tiled=True)
        first = jax.lax.axis_index(vocab_axes) * table.shape[0]
        here = (tokens >= first) & (tokens < first + table.shape[0])
        rows = jnp.take(table, jnp.where(here, tokens - first, 0), axis=0)
        return jax.lax.psum(jnp.where(here[..., None], rows, 0), vocab_axes)

    return jax.shard_map(
        local,
        in_specs=(rules.spec(_TABLE), rules.spec(("batch", "sequence"))),
        out_specs=rules.spec(("batch", "sequence", None)),
    )(table, tokens)
