"""Which assignment fills which slot: sorting into buckets, and rounds of them.

An assignment is a (token, choice); it has the number `t * K + k`. A bucket holds the
assignments of one expert (or of one destination), in the order of their tokens or by
weight; a round serves a window of positions of every bucket, or of the whole sorted
list.
"""

import math

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch.common import local_counts
from moe_jax.moe.routing import Array
from moe_jax.tree import struct

_ROW_MULTIPLE = 8
# Rows of a later round: this part of the first one's.
_LATER_PART = 4
# Of the rows of a list: tiles of 128, and a later round's too.
_LIST_MULTIPLE = 128 * _LATER_PART
# Deviations above the mean that a buffer has room for.
_DEVIATIONS = 5.0


def _round_up(rows: float) -> int:
    return -(-math.ceil(rows) // _ROW_MULTIPLE) * _ROW_MULTIPLE


def capacity_problems(factor: float, path: str, least: float = 0.0):
    if factor < least:
        yield (
            f"{path}.capacity_factor={factor}: must not be negative; 0 takes what a "
            "uniform routing needs"
        )


def needed_rows(mean: float) -> float:
    """Rows that hold one bucket of an independent uniform routing: `m + 5 sqrt(m) + 4`.

    The number of rows is binomial with mean m, and at most as wide as a Poisson
    variable, whose quantile at z deviations is `m + z sqrt(m) + (z^2 - 1) / 6 + ...`
    (Cornish and Fisher 1938). With z = 5 a bucket overflows with probability below
    1e-6, and any of a thousand in less than one of a thousand layers. A factor on the
    mean cannot do this: at m = 8 it would have to be 3.3, at m = 2048 1.11 is enough.
    """
    return mean + _DEVIATIONS * math.sqrt(mean) + (_DEVIATIONS**2 - 1) / 6


def bucket_rows(mean: float, factor: float, most: int) -> int:
    """Capacity: `factor * mean` rows, up to a multiple of 8, at most `most`.

    With factor 0: `needed_rows(mean)`.
    """
    wanted = factor * mean if factor else needed_rows(mean)
    return min(most, max(_ROW_MULTIPLE, _round_up(wanted)))


def list_rows(mean: float, factor: float, most: int) -> int:
    """Rows of a list of all experts at hand, by the rule of `bucket_rows`.

    Rounded up to whole tiles of a grouped matmul, in later rounds too; a matmul leaves
    out the tiles that hold nothing.
    """
    rows = bucket_rows(mean, factor, most)
    return min(most, -(-rows // _LIST_MULTIPLE) * _LIST_MULTIPLE)


def later_rows(capacity: int) -> int:
    """Capacity in the rounds after the first: a quarter, up to 8's multiple."""
    return min(capacity, _round_up(capacity / _LATER_PART))


def rounds_needed(fullest: Array, capacity: int) -> Array:
    """Rounds that serve a bucket of `fullest` rows, () int32, at least 1."""
    over = jnp.maximum(fullest - capacity, 0)
    return (1 + -(-over // later_rows(capacity))).astype(jnp.int32)


def window(index: Array | int, capacity: int) -> tuple[Array | int, int]:
    """First position and number of positions of round `index`; 0 is a Python int."""
    if isinstance(index, int) and index == 0:
        return 0, capacity
    size = later_rows(capacity)
    return capacity + (index - 1) * size, size


@struct(static=("capacity",))
class Plan:
    """Where each assignment of this shard's tokens stands.

    Attributes:
      order_n: (T * K,) int32, assignments sorted by bucket; invalid ones last.
      rank_tk: (T, K) int32, place of an assignment in `order_n`.
      starts_e: (E,) int32, where each bucket's assignments begin in `order_n`.
      counts_e: (E,) int32.
      bucket_tk: (T, K) int32.
      valid_tk: (T, K) bool.
      capacity: C, of a bucket (or of the list) in the first round.
    """

    order_n: Array
    rank_tk: Array
    starts_e: Array
    counts_e: Array
    bucket_tk: Array
    valid_tk: Array
    capacity: int


@struct
class Round:
    """One round of a plan, seen from the slots and from the tokens.

    Attributes:
      entry_s: (slots,) int32, the assignment that fills a slot.
      filled_s: (slots,) bool.
      slot_tk: (T, K) int32, the slot of an assignment.
      served_tk: (T, K) bool, whether this round serves it.
      order_s: (slots,) int32, the slots by their tokens, the empty ones last; None
        where slots are not a list.
    """

    entry_s: Array
    filled_s: Array
    slot_tk: Array
    served_tk: Array
    order_s: Array | None = None


def make_plan(
    bucket_tk: Array,
    valid_tk: Array,
    num_buckets: int,
    capacity: int,
    priority_tk: Array | None = None,
) -> Plan:
    """Sorts a shard's assignments by bucket.

    Args:
      bucket_tk: (T, K) int32 in [0, num_buckets).
      valid_tk: (T, K) bool.
      num_buckets: experts, or destinations.
      capacity: of the first round.
      priority_tk: (T, K) float; the largest come first in their bucket. None: the
        order of tokens is kept.
    """
    bucket_n = jnp.where(valid_tk, bucket_tk, num_buckets).reshape(-1)
    if priority_tk is None:
        order_n = jnp.argsort(bucket_n, stable=True)
    else:
        last_first_n = -jax.lax.stop_gradient(priority_tk).reshape(-1)
        order_n = jnp.lexsort((last_first_n, bucket_n))
    counts_e = local_counts(bucket_tk, valid_tk, num_buckets)
    return Plan(
        order_n=order_n.astype(jnp.int32),
        rank_tk=jnp.argsort(order_n).astype(jnp.int32).reshape(bucket_tk.shape),
        starts_e=jnp.cumsum(counts_e, dtype=jnp.int32) - counts_e,
        counts_e=counts_e,
        bucket_tk=bucket_tk,
        valid_tk=valid_tk,
        capacity=capacity,
    )


def bucket_round(plan: Plan, first: Array | int, capacity: int) -> Round:
    """Serves the positions [first, first + capacity) of each bucket: slots (E, C)."""
    position_ec = first + jnp.arange(capacity, dtype=jnp.int32)[None, :]
    filled_ec = position_ec < plan.counts_e[:, None]
    place_ec = jnp.minimum(
        plan.starts_e[:, None] + position_ec, plan.order_n.shape[0] - 1
    )
    local_tk = plan.rank_tk - jnp.take(plan.starts_e, plan.bucket_tk) - first
    served_tk = plan.valid_tk & (local_tk >= 0) & (local_tk < capacity)
    slot_tk = plan.bucket_tk * capacity + local_tk
    return Round(
        entry_s=jnp.take(plan.order_n, place_ec.reshape(-1)),
        filled_s=filled_ec.reshape(-1),
        slot_tk=jnp.where(served_tk, slot_tk, 0),
        served_tk=served_tk,
    )


def list_round(plan: Plan, first: Array | int, capacity: int) -> tuple[Round, Array]:
    """Serves the places [first, first + capacity) of the sorted list: slots (C,).

    Returns:
      The round, and how many of its slots belong to each bucket, (E,) int32.
    """
    place_s = first + jnp.arange(capacity, dtype=jnp.int32)
    local_tk = plan.rank_tk - first
    served_tk = plan.valid_tk & (local_tk >= 0) & (local_tk < capacity)
    inside = lambda place_e: jnp.clip(place_e, first, first + capacity)
    sizes_e = inside(plan.starts_e + plan.counts_e) - inside(plan.starts_e)
    entry_s = jnp.take(plan.order_n, place_s, mode="clip")
    filled_s = place_s < jnp.sum(plan.counts_e)
    last = jnp.iinfo(jnp.int32).max
    turn = Round(
        entry_s=entry_s,
        filled_s=filled_s,
        slot_tk=jnp.where(served_tk, local_tk, 0),
        served_tk=served_tk,
        order_s=jnp.argsort(jnp.where(filled_s, entry_s, last)).astype(jnp.int32),
    )
    return turn, sizes_e
