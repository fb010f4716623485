"""Ragged exchange of rows between the shards of an axis, on every platform."""

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch.common import exchanged
from moe_jax.moe.routing import Array
from moe_jax.parallel.mesh import platform
from moe_jax.parallel.varying import vary_like


def ragged_all_to_all(
    operand: Array,
    output: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    axes: tuple[str, ...],
) -> Array:
    """`jax.lax.ragged_all_to_all`, emulated where the platform lacks it.

    XLA on CPUs has no such operation; there every shard gathers all operands and takes
    its rows, which costs memory but gives the same result.
    """
    if platform() != "cpu":
        return jax.lax.ragged_all_to_all(
            operand,
            output,
            input_offsets,
            send_sizes,
            output_offsets,
            recv_sizes,
            axis_name=axes,
        )
    gather = lambda x: jax.lax.all_gather(x, axes)
    me = jax.lax.axis_index(axes)
    start_s, size_s, place_s = (
        gather(x)[:, me] for x in (input_offsets, send_sizes, output_offsets)
    )
    row_s1 = jnp.arange(output.shape[0])[None, :] - place_s[:, None]
    from_sr = (row_s1 >= 0) & (row_s1 < size_s[:, None])
    source_r = jnp.argmax(from_sr, axis=0)
    row_r = jnp.take_along_axis(start_s[:, None] + row_s1, source_r[None], axis=0)[0]
    found = gather(operand)[source_r, row_r]
    here = jnp.any(from_sr, axis=0)
    return jnp.where(here.reshape(-1, *(1,) * (found.ndim - 1)), found, output)


def _swap(axes: tuple[str, ...], x: Array, sent_n: Array, received_n: Array) -> Array:
    shards = sent_n.shape[0]
    window = x.shape[0] // shards
    here = jax.lax.axis_index(axes).astype(jnp.int32) * window
    starts_n = jnp.arange(shards, dtype=jnp.int32) * window
    return ragged_all_to_all(
        x,
        vary_like(jnp.zeros_like(x), x),
        vary_like(starts_n, x),
        vary_like(sent_n, x),
        vary_like(jnp.full_like(starts_n, here), x),
        vary_like(received_n, x),
        axes,
    )


_differentiable_swap = jax.custom_vjp(_swap, nondiff_argnums=(0,))
_differentiable_swap.defvjp(
    lambda axes, x, sent, received: (_swap(axes, x, sent, received), (sent, received)),
    lambda axes, sizes, grad: (_swap(axes, grad, *sizes[::-1]), None, None),
)


def swap(axes: tuple[str, ...], x: Array, sent_n: Array, received_n: Array) -> Array:
    """Sends window d of this shard's rows to shard d, as many rows as there are.

    Args:
      axes: mesh axes whose n shards exchange.
      x: (n * C, ...): window d holds the rows for shard d.
      sent_n: (n,) int32, rows at the head of each window to send, at most C.
      received_n: (n,) int32, rows that come from each shard: its `sent_n` for this one.

    Returns:
      (n * C, ...): window s holds the rows of shard s, zeros behind them. The
      derivative is the same exchange with the sizes swapped.
    """
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    move = _differentiable_swap if floating else _swap
    return exchanged(move(axes, x, sent_n, received_n))
