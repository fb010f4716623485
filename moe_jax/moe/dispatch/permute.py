"""Carrying rows into slots and back; every derivative is a gather, none scatters."""

import math

import jax
import jax.numpy as jnp

from moe_jax.kernels import grouped_matmul
from moe_jax.moe.dispatch.plan import Round
from moe_jax.moe.routing import Array
from moe_jax.parallel.mesh import platform
from moe_jax.parallel.varying import vary_like

# Up to here the K slots of a token are summed by K gathers without a loop,
_MOST_UNROLLED = 16
# of which so many (T, D) are in memory at a time.
_AT_ONCE = 4
# Tokens of a group where the slots of a list are summed.
_TOKENS = 128


def take_rows(x: Array, index: Array, keep: Array) -> Array:
    """Rows of x by index, zero where `keep` is False."""
    rows = jnp.take(x, index, axis=0, mode="clip")
    return jnp.where(keep.reshape(keep.shape + (1,) * (rows.ndim - keep.ndim)), rows, 0)


def _sum_of_slots(x_sd: Array, turn: Round, weight_tk: Array | None = None) -> Array:
    """(slots, ...) -> (T, ...): `sum_k weight_tk * x[slot_tk]` over what is served.

    Where K is large and few choices are valid (expert choice, top-p), a loop over the
    served ones keeps work and memory those of the busiest token, not of K.
    """

    def part(slot_t, served_t, weight_t):
        rows = take_rows(x_sd, slot_t, served_t)
        if weight_t is None:
            return rows
        shape = weight_t.shape + (1,) * (rows.ndim - 1)
        return rows * weight_t.reshape(shape).astype(rows.dtype)

    in_list = turn.order_s is not None and x_sd.ndim == 2 and weight_tk is None
    # Elsewhere rows are gathered and added in one pass; this puts them in order first.
    if in_list and platform() == "tpu":
        return _sum_of_list(x_sd, turn)
    slot_tk, served_tk = turn.slot_tk, turn.served_tk
    top_k = slot_tk.shape[1]
    if top_k <= _MOST_UNROLLED:
        column = lambda a, k: None if a is None else a[:, k]
        total = None
        for k in range(top_k):
            if k and k % _AT_ONCE == 0:
                total, slot_tk = jax.lax.optimization_barrier((total, slot_tk))
            rows = part(slot_tk[:, k], served_tk[:, k], column(weight_tk, k))
            total = rows if total is None else total + rows
        return total
    order_tk = jnp.argsort(~served_tk, axis=1, stable=True)
    first = lambda a: None if a is None else jnp.take_along_axis(a, order_tk, axis=1)
    slot_tk, served_tk, weight_tk = first(slot_tk), first(served_tk), first(weight_tk)
    most = jnp.max(jnp.sum(served_tk, axis=1, dtype=jnp.int32))

    def body(k, total):
        column = lambda a: (
            None
            if a is None
            else jax.lax.dynamic_index_in_dim(a, k, axis=1, keepdims=False)
        )
        return total + part(column(slot_tk), column(served_tk), column(weight_tk))

    zeros = jnp.zeros((slot_tk.shape[0], *x_sd.shape[1:]), x_sd.dtype)
    return jax.lax.fori_loop(0, most, body, vary_like(zeros, x_sd))


def _sum_of_list(x_sd: Array, turn: Round) -> Array:
    """The same, unweighted, for the slots of a list: each row is read once.

    Rows are put in the order of their tokens. A tile of tokens is a group of a grouped
    matmul; the matrix that sums its rows has a one at (row, token of the row).
    """
    num_tokens, top_k = turn.slot_tk.shape
    tile = math.gcd(num_tokens, _TOKENS)
    entry_s = jnp.take(turn.entry_s, turn.order_s, mode="clip")
    here_st = (entry_s // top_k % tile)[:, None] == jnp.arange(tile, dtype=jnp.int32)
    ones_st = here_st.astype(x_sd.dtype)
    sizes = jnp.sum(turn.served_tk.reshape(-1, tile * top_k), axis=1, dtype=jnp.int32)
    rows_sd = jnp.take(x_sd, turn.order_s, axis=0, mode="clip")
    sums = grouped_matmul.transposed_matmul(ones_st, rows_sd, sizes)
    return sums.reshape(num_tokens, -1)


@jax.custom_vjp
def fill(rows_td: Array, turn: Round) -> Array:
    """(T, ...) -> (slots, ...): the rows of the tokens that fill the slots.

    Empty slots are zero in buckets, and hold anything in lists. The derivative is
    `collect`.
    """
    token_s = turn.entry_s // turn.slot_tk.shape[1]
    if turn.order_s is not None:  # A grouped matmul leaves out the rows of nobody.
        return jnp.take(rows_td, token_s, axis=0, mode="clip")
    return take_rows(rows_td, token_s, turn.filled_s)


@jax.custom_vjp
def collect(out_sd: Array, turn: Round) -> Array:
    """(slots, ...) -> (T, ...): `y_t = sum_k out[slot_tk]`; the reverse is `fill`."""
    return _sum_of_slots(out_sd, turn)


fill.defvjp(
    lambda rows_td, turn: (fill(rows_td, turn), turn),
    lambda turn, grad_sd: (_sum_of_slots(grad_sd, turn), None),
)
collect.defvjp(
    lambda out_sd, turn: (collect(out_sd, turn), turn),
    lambda turn, grad_td: (fill(grad_td, turn), None),
)


@jax.custom_vjp
def fill_weights(weight_tk: Array, turn: Round) -> Array:
    """(T, K) -> (slots,): the weights of the assignments that fill the slots."""
    return jnp.take(weight_tk.reshape(-1), turn.entry_s, mode="clip")


fill_weights.defvjp(
    lambda weight_tk, turn: (fill_weights(weight_tk, turn), turn),
    lambda turn, grad_s: (take_rows(grad_s, turn.slot_tk, turn.served_tk), None),
)


@jax.custom_vjp
def combine(out_sd: Array, weight_tk: Array, turn: Round) -> Array:
    """(slots, D) -> (T, D): `y_t = sum_k weight_tk * out[slot_tk]`.

    The weights' gradient is taken slot by slot, `grad_y . out`, and then carried to
    the assignments: one row a slot is read, not K rows a token.
    """
    return _sum_of_slots(out_sd, turn, weight_tk)


def _combine_forward(out_sd, weight_tk, turn):
    return combine(out_sd, weight_tk, turn), (out_sd, weight_tk, turn)


def _combine_reverse(saved, grad_td):
    out_sd, weight_tk, turn = saved
    grad_sd = fill(grad_td, turn)
    weight_s = fill_weights(weight_tk, turn)
    wide = lambda a: a.astype(weight_tk.dtype)
    grad_weight_s = jnp.sum(wide(out_sd) * wide(grad_sd), axis=-1)
    grad_weight_tk = take_rows(grad_weight_s, turn.slot_tk, turn.served_tk)
    return grad_sd * weight_s[:, None].astype(grad_sd.dtype), grad_weight_tk, None


combine.defvjp(_combine_forward, _combine_reverse)


@jax.custom_vjp
def _reorder(x_tk: Array, order_tk: Array, inverse_tk: Array) -> Array:
    return jnp.take_along_axis(x_tk, order_tk, axis=1)


_reorder.defvjp(
    lambda x, order, inverse: (_reorder(x, order, inverse), (order, inverse)),
    lambda saved, grad: (_reorder(grad, *saved[::-1]), None, None),
)


def valid_first(
    expert_tk: Array, weight_tk: Array, valid_tk: Array, columns: int
) -> tuple[Array, Array, Array]:
    """(T, K) -> (T, columns): each token's valid entries, of which there are no more.

    With K experts chosen of which at most e lie on a shard, min(K, e) columns hold
    what the shard needs.
    """
    if expert_tk.shape[1] <= columns:
        return expert_tk, weight_tk, valid_tk
    order_tk = jnp.argsort(~valid_tk, axis=1, stable=True)
    inverse_tk = jnp.argsort(order_tk, axis=1)
    take = lambda a: jnp.take_along_axis(a, order_tk, axis=1)[:, :columns]
    weight_tk = _reorder(weight_tk, order_tk, inverse_tk)[:, :columns]
    return take(expert_tk), weight_tk, take(valid_tk)
