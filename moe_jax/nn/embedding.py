"""Token embedding with the vocabulary split over `tensor` (Megatron-LM, 2019)."""

import functools

import jax
import jax.numpy as jnp

from moe_jax.nn import module
from moe_jax.parallel import collectives, rules

_TABLE = ("vocab", "embed")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: jax.Array, tokens: jax.Array, dtype: str) -> jax.Array:
    """Rows of the table.

    Under a mesh it runs in `shard_map`, where a lookup left to the compiler may
    replicate the batch: the width is gathered, each tensor shard looks up the ids it
    holds, and the parts are summed. The derivative adds up the tokens of a shard in
    float32 at least, for many of them are the same, and then goes back by
    reduce-scatters.

    Args:
      table: (V, D), split as ("vocab", "embed").
      tokens: (B, S) int32, split as ("batch", "sequence").
      dtype: of the result, and of what is gathered and reduced.

    Returns:
      (B, S, D), split as ("batch", "sequence", None).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return module.cast(table, dtype)[tokens]
    axes = rules.fitting(("batch", "sequence"), tokens.shape)
    return jax.shard_map(
        functools.partial(_rows, dtype),
        in_specs=(rules.spec(_TABLE), rules.spec(axes)),
        out_specs=rules.spec((*axes, None)),
    )(table, tokens)


def _rows(dtype, table, tokens):
    table = module.cast(table, dtype)
    table = collectives.gather(table, rules.mesh_axes("embed"), 1)
    rows = table.at[_places(table, tokens)].get(mode="fill", fill_value=0)
    return collectives.total(rows, rules.mesh_axes("vocab"))


def _places(table, tokens):
    """Rows of this shard's part of a table; those of others lie beyond its end."""
    count = table.shape[0]
    places = tokens - jax.lax.axis_index(rules.mesh_axes("vocab")) * count
    return jnp.where((places >= 0) & (places < count), places, count)


def _forward(table, tokens, dtype):
    return lookup(table, tokens, dtype), (table, tokens)


def _backward(dtype, kept, rows):
    table, tokens = kept  # The table for its shape and type alone.
    if jax.sharding.get_abstract_mesh().empty:
        return _added(rows, tokens, table.shape).astype(table.dtype), None
    axes = rules.fitting(("batch", "sequence"), tokens.shape)
    return jax.shard_map(
        _add,
        in_specs=(*map(rules.spec, (_TABLE, axes, (*axes, None))),),
        out_specs=rules.spec(_TABLE),
    )(table, tokens, rows), None


lookup.defvjp(_forward, _backward)


def _add(table, tokens, rows):
    """The reverse of `_rows`: the gradient of this shard's part of the table."""
    shape = (table.shape[0], rows.shape[-1])
    whole = _added(rows, _places(table, tokens), shape).astype(rows.dtype)
    part = collectives.scatter(whole, rules.mesh_axes("embed"), 1)
    return collectives.total_like(part, table).astype(table.dtype)


def _added(rows, places, shape):
    wide = module.accumulation_dtype(rows.dtype)
    return jnp.zeros(shape, wide).at[places].add(rows.astype(wide), mode="drop")
