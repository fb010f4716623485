"""Buckets of fixed capacity, one a (source shard, expert), sent by all_to_all.

Each assignment (token, choice) has a position in its bucket, counted in token order.
Round 0 serves the positions [0, C): rows are gathered into (E, C, D), travel to the
shards that hold the experts, go through one batched matmul, travel back, and are
added to their tokens with their weights.

`bucket` runs round 0 and drops the rest. `exact` goes on until all are served, in
rounds of C / 4 positions: a load a little above C, which is common, then costs a
quarter round more and not a whole one, and the buffers of the loop stay small. Round
0 is differentiated like any code; the later rounds stand in a loop whose trip count
depends on the routing, with its own derivative that keeps the layer's inputs only and
replays the rounds. Memory is that of one round whatever the imbalance. At worst, all
T tokens of a shard on one expert, there are 1 + 4 * (T / C - 1) rounds.
"""

import functools
import math

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.dispatch.common import (
    Axes,
    LocalExperts,
    from_experts,
    largest,
    local_counts,
    to_experts,
    total,
    vary,
)
from moe_jax.moe.routing import Array, Assignments, DispatchStats, PyTree
from moe_jax.tree import struct

_ROW_MULTIPLE = 8
# Rows of a later round: this part of the first one's.
_LATER_PART = 4


@config.node
class Bucket(config.DispatchConfig):
    """One round; what does not fit is dropped and counted.

    Attributes:
      capacity_factor: rows per bucket over the mean of a uniform routing.
    """

    capacity_factor: float = 1.25

    def problems(self, path, root):
        yield from _capacity_problems(self.capacity_factor, path)


@config.node
class Exact(config.DispatchConfig):
    """As many rounds as it takes; nothing is dropped.

    Attributes:
      capacity_factor: rows per bucket in the first round over the mean of a uniform
        routing; later rounds have a quarter of them.
    """

    capacity_factor: float = 1.25

    def problems(self, path, root):
        yield from _capacity_problems(self.capacity_factor, path)


def _capacity_problems(factor: float, path: str):
    if factor <= 0:
        yield f"{path}.capacity_factor={factor}: must be positive"


def expert_capacity(
    num_tokens: int, expected_k: float, num_experts: int, factor: float
) -> int:
    """Rows of one bucket: `factor * T * K / E`, up to a multiple of 8, at most T."""
    rows = math.ceil(factor * num_tokens * expected_k / num_experts)
    return min(num_tokens, -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE)


def later_capacity(capacity: int) -> int:
    """Rows of a bucket in the rounds after the first: a quarter, up to 8's multiple."""
    rows = -(-capacity // _LATER_PART)
    return min(capacity, -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE)


@struct(static=("capacity",))
class Plan:
    """Where each assignment of this shard's tokens stands.

    Attributes:
      order_n: (T * K,) int32, assignments (t * K + k) sorted by expert.
      starts_e: (E,) int32, where each expert's assignments begin in `order_n`.
      counts_e: (E,) int32.
      position_tk: (T, K) int32, position in the bucket.
      expert_tk: (T, K) int32.
      valid_tk: (T, K) bool.
      capacity: C, of the first round.
    """

    order_n: Array
    starts_e: Array
    counts_e: Array
    position_tk: Array
    expert_tk: Array
    valid_tk: Array
    capacity: int


@struct(static=("capacity",))
class Round:
    """One round of a plan, seen from the slots and from the tokens.

    Attributes:
      capacity: rows of a bucket in this round, its C.
      entry_s: (E * C,) int32, the assignment that fills a slot.
      filled_s: (E * C,) bool.
      slot_tk: (T, K) int32, the slot of an assignment.
      served_tk: (T, K) bool, whether this round serves it.
    """

    capacity: int
    entry_s: Array
    filled_s: Array
    slot_tk: Array
    served_tk: Array


def make_plan(routing: Assignments, capacity: int) -> Plan:
    """Sorts a shard's assignments by expert; the order of tokens is kept."""
    num_experts = routing.num_experts
    expert_n = jnp.where(routing.valid_tk, routing.expert_tk, num_experts).reshape(-1)
    order_n = jnp.argsort(expert_n, stable=True).astype(jnp.int32)
    rank_n = jnp.argsort(order_n).astype(jnp.int32)
    counts_e = local_counts(routing.expert_tk, routing.valid_tk, num_experts)
    starts_e = jnp.cumsum(counts_e) - counts_e
    start_n = jnp.take(starts_e, routing.expert_tk.reshape(-1))
    return Plan(
        order_n=order_n,
        starts_e=starts_e,
        counts_e=counts_e,
        position_tk=(rank_n - start_n).reshape(routing.expert_tk.shape),
        expert_tk=routing.expert_tk,
        valid_tk=routing.valid_tk,
        capacity=capacity,
    )


def make_round(plan: Plan, first: Array | int, capacity: int) -> Round:
    """The round that serves the positions [first, first + capacity)."""
    position_ec = first + jnp.arange(capacity, dtype=jnp.int32)[None, :]
    filled_ec = position_ec < plan.counts_e[:, None]
    place_ec = jnp.minimum(
        plan.starts_e[:, None] + position_ec, plan.order_n.shape[0] - 1
    )
    local_tk = plan.position_tk - first
    served_tk = plan.valid_tk & (local_tk >= 0) & (local_tk < capacity)
    slot_tk = plan.expert_tk * capacity + local_tk
    return Round(
        capacity=capacity,
        entry_s=jnp.take(plan.order_n, place_ec.reshape(-1)),
        filled_s=filled_ec.reshape(-1),
        slot_tk=jnp.where(served_tk, slot_tk, 0),
        served_tk=served_tk,
    )


def _take(x: Array, index: Array, keep: Array) -> Array:
    """Rows of x by index, zero where `keep` is False."""
    rows = jnp.take(x, index, axis=0)
    return jnp.where(keep.reshape(keep.shape + (1,) * (rows.ndim - keep.ndim)), rows, 0)


@jax.custom_vjp
def fill(rows_td: Array, turn: Round) -> Array:
    """(T, ...) -> (E * C, ...): the rows of the tokens that fill the slots.

    The derivative gathers too: token t's gradient is the sum over its K slots.
    """
    top_k = turn.slot_tk.shape[1]
    return _take(rows_td, turn.entry_s // top_k, turn.filled_s)


def _fill_forward(rows_td, turn):
    return fill(rows_td, turn), turn


def _fill_reverse(turn, grad_sd):
    parts = (
        _take(grad_sd, turn.slot_tk[:, k], turn.served_tk[:, k])
        for k in range(turn.slot_tk.shape[1])
    )
    return functools.reduce(jnp.add, parts), None


fill.defvjp(_fill_forward, _fill_reverse)


@jax.custom_vjp
def combine(out_sd: Array, weight_tk: Array, turn: Round) -> Array:
    """(E * C, D) -> (T, D): `y_t = sum_k weight_tk * out[slot_tk]`."""
    parts = (
        _take(out_sd, turn.slot_tk[:, k], turn.served_tk[:, k])
        * weight_tk[:, k : k + 1].astype(out_sd.dtype)
        for k in range(turn.slot_tk.shape[1])
    )
    return functools.reduce(jnp.add, parts)


def _combine_forward(out_sd, weight_tk, turn):
    return combine(out_sd, weight_tk, turn), (out_sd, weight_tk, turn)


def _combine_reverse(saved, grad_td):
    out_sd, weight_tk, turn = saved
    top_k = turn.slot_tk.shape[1]
    weight_s = jnp.take(weight_tk.reshape(-1), turn.entry_s).astype(grad_td.dtype)
    grad_out_sd = _take(grad_td, turn.entry_s // top_k, turn.filled_s)
    grad_weight = [
        jnp.sum(
            _take(out_sd, turn.slot_tk[:, k], turn.served_tk[:, k]).astype(
                weight_tk.dtype
            )
            * grad_td.astype(weight_tk.dtype),
            axis=-1,
        )
        for k in range(top_k)
    ]
    return grad_out_sd * weight_s[:, None], jnp.stack(grad_weight, axis=1), None


combine.defvjp(_combine_forward, _combine_reverse)


def serve(
    run, axes: Axes, turn: Round, rows: PyTree, weight_tk: Array, weights: PyTree
) -> Array:
    """One round: (T, D), zero for the assignments that it does not serve."""
    num_experts = turn.entry_s.shape[0] // turn.capacity

    def send(leaf):
        slots = fill(leaf, turn)
        shape = (num_experts, turn.capacity, *leaf.shape[1:])
        return to_experts(slots.reshape(shape), axes)

    with jax.named_scope("dispatch"):
        sent = jax.tree.map(send, rows)
    with jax.named_scope("experts"):
        out = run(weights, sent, None)
    with jax.named_scope("combine"):
        back = from_experts(out, axes)
        slots_sd = back.reshape(num_experts * turn.capacity, back.shape[-1])
        return combine(slots_sd, weight_tk, turn)


def _later_round(plan: Plan, index: Array) -> Round:
    """Round `index`, from 1 on."""
    size = later_capacity(plan.capacity)
    return make_round(plan, plan.capacity + (index - 1) * size, size)


def _loop(rounds: Array, start: PyTree, step) -> PyTree:
    """Adds `step(r)` to `start` for r in [1, rounds)."""

    def body(carry):
        index, value = carry
        return index + 1, jax.tree.map(jnp.add, value, step(index))

    keep_on = lambda carry: carry[0] < rounds
    return jax.lax.while_loop(keep_on, body, (jnp.int32(1), start))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def later_rounds(
    run,
    axes: Axes,
    rows: PyTree,
    weight_tk: Array,
    weights: PyTree,
    plan: Plan,
    rounds: Array,
) -> Array:
    """The sum of rounds 1 to `rounds` - 1, (T, D).

    `rounds` must agree over every mesh axis, and the floating point inputs must vary
    over every axis: then the only collectives in the loop are the exchanges.
    """
    step = lambda index: serve(
        run, axes, _later_round(plan, index), rows, weight_tk, weights
    )
    shape = jax.eval_shape(lambda: step(jnp.int32(1)))
    start = vary(jnp.zeros(shape.shape, shape.dtype), axes.every)
    return _loop(rounds, start, step)


def _later_forward(run, axes, rows, weight_tk, weights, plan, rounds):
    y_td = later_rounds(run, axes, rows, weight_tk, weights, plan, rounds)
    return y_td, (rows, weight_tk, weights, plan, rounds)


def _later_reverse(run, axes, saved, grad_td):
    rows, weight_tk, weights, plan, rounds = saved

    def step(index):
        turn = _later_round(plan, index)
        served = lambda *inputs: serve(run, axes, turn, *inputs)
        return jax.vjp(served, rows, weight_tk, weights)[1](grad_td)

    start = jax.tree.map(jnp.zeros_like, (rows, weight_tk, weights))
    return (*_loop(rounds, vary(start, axes.every), step), None, None)


later_rounds.defvjp(_later_forward, _later_reverse)


def _prepare(options, rows, routing, experts, axes):
    capacity = expert_capacity(
        routing.expert_tk.shape[0],
        routing.expected_k,
        routing.num_experts,
        options.capacity_factor,
    )
    plan = make_plan(routing, capacity)
    inputs = vary((rows, routing.weight_tk, experts.weights), axes.every)
    return plan, inputs


def _stats(
    routing: Assignments, plan: Plan, dropped: Array, rounds: Array, axes: Axes
) -> DispatchStats:
    num_tokens = routing.expert_tk.shape[0]
    mean_fill = num_tokens * routing.expected_k / routing.num_experts
    return DispatchStats(
        assignments=total(jnp.sum(plan.counts_e), axes.tokens),
        dropped=dropped,
        rounds=rounds,
        peak_fill=largest(jnp.max(plan.counts_e), axes.tokens),
        capacity=jnp.int32(plan.capacity),
        mean_fill=jnp.float32(mean_fill),
    )


def bucket(
    options: Bucket,
    rows: PyTree,
    routing: Assignments,
    experts: LocalExperts,
    axes: Axes,
) -> tuple[Array, DispatchStats]:
    """Round 0 only; see `DISPATCHES`."""
    plan, inputs = _prepare(options, rows, routing, experts, axes)
    turn = make_round(plan, 0, plan.capacity)
    y_td = serve(experts.run, axes, turn, *inputs)
    over_e = jnp.maximum(plan.counts_e - plan.capacity, 0)
    dropped = total(jnp.sum(over_e), axes.tokens)
    return y_td, _stats(routing, plan, dropped, jnp.int32(1), axes)


def exact(
    options: Exact,
    rows: PyTree,
    routing: Assignments,
    experts: LocalExperts,
    axes: Axes,
) -> tuple[Array, DispatchStats]:
    """Rounds until all assignments are served; see `DISPATCHES`."""
    plan, inputs = _prepare(options, rows, routing, experts, axes)
    fullest = largest(jnp.max(plan.counts_e), axes.tokens)
    over = jnp.maximum(fullest - plan.capacity, 0)
    rounds = 1 + -(-over // later_capacity(plan.capacity))
    turn = make_round(plan, 0, plan.capacity)
    y_td = serve(experts.run, axes, turn, *inputs)
    y_td = y_td + later_rounds(experts.run, axes, *inputs, plan, rounds)
    return y_td, _stats(routing, plan, jnp.int32(0), rounds, axes)
