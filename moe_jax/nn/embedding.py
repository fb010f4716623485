"""Token embedding with the vocabulary split over `tensor` (Megatron-LM, 2019).

Under a mesh it runs in `shard_map`, where a lookup left to the compiler may replicate
the batch. The width of the table is split too. Each shard of it looks its part up for
the tokens of all the others, and an all-to-all brings the parts to their tokens; in
the derivative it takes them back, and no gradient of a whole table is ever summed.
Where the tokens would be more than the table, that is gathered instead.
"""

import functools
import math

import jax
import jax.numpy as jnp

from moe_jax.nn import module
from moe_jax.parallel import collectives, rules

_TABLE = ("vocab", "embed")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: jax.Array, tokens: jax.Array, dtype: str) -> jax.Array:
    """Rows of the table.

    Each tensor shard looks up the ids it holds, and the results are summed. The
    derivative adds up tokens in float32 at least, for many of them are the same.

    Args:
      table: (V, D), split as ("vocab", "embed").
      tokens: (B, S) int32, split as ("batch", "sequence").
      dtype: of the result, and of what travels.

    Returns:
      (B, S, D), split as ("batch", "sequence", None).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return module.cast(table, dtype)[tokens]
    axes = rules.fitting(("batch", "sequence"), tokens.shape)
    look = _look_up_and_exchange if _exchanges(table, tokens, axes) else _look_up
    return jax.shard_map(
        functools.partial(look, dtype),
        in_specs=(rules.spec(_TABLE), rules.spec(axes)),
        out_specs=rules.spec((*axes, None)),
    )(table, tokens)


def exchanges(tokens: float, entries: float) -> bool:
    """Whether tokens are exchanged, and not the table gathered.

    An all-to-all over a ring goes over a few links where a gather goes over one.

    Args:
      tokens: of one shard.
      entries: of the vocabulary, on one shard.
    """
    return 2 * tokens <= entries


def _exchanges(table, tokens, axes):
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(rules.size(mesh, axis) for axis in axes if axis)
    return "batch" in axes and exchanges(
        tokens.size / shards, table.shape[0] / rules.size(mesh, "vocab")
    )


def _look_up(dtype, table, tokens):
    table = module.cast(table, dtype)
    return _rows(collectives.gather(table, rules.mesh_axes("embed"), 1), tokens)


def _look_up_and_exchange(dtype, table, tokens):
    parts = _rows(module.cast(table, dtype), _of_all(tokens))
    return collectives.bring(parts, rules.mesh_axes("embed"))


def _of_all(tokens):
    """(n B, S): the tokens of all shards among which a width is split."""
    names = rules.mesh_axes("embed")
    return jax.lax.all_gather(tokens, names, axis=0, tiled=True)


def _rows(table, tokens):
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
        return _added(rows, tokens, table.shape[0]).astype(table.dtype), None
    axes = rules.fitting(("batch", "sequence"), tokens.shape)
    add = _exchange_and_add if _exchanges(table, tokens, axes) else _add
    return jax.shard_map(
        add,
        in_specs=(*map(rules.spec, (_TABLE, axes, (*axes, None))),),
        out_specs=rules.spec(_TABLE),
    )(table, tokens, rows), None


lookup.defvjp(_forward, _backward)


def _add(table, tokens, rows):
    """The reverse of `_look_up`: the gradient of this shard's part of the table."""
    whole = _added(rows, _places(table, tokens), table.shape[0]).astype(rows.dtype)
    part = collectives.scatter(whole, rules.mesh_axes("embed"), 1)
    return collectives.total_like(part, table).astype(table.dtype)


def _exchange_and_add(table, tokens, rows):
    """The reverse of `_look_up_and_exchange`."""
    parts = collectives.send(rows, rules.mesh_axes("embed"))
    places = _places(table, _of_all(tokens))
    part = _added(parts, places, table.shape[0]).astype(rows.dtype)
    return collectives.total_like(part, table).astype(table.dtype)


def _added(rows, places, count):
    """(count, D) of rows (B, S, D), added up by their places (B, S)."""
    wide = module.accumulation_dtype(rows.dtype)
    zeros = jnp.zeros((count, rows.shape[-1]), wide)
    return zeros.at[places].add(rows.astype(wide), mode="drop")
