"""As many rounds as it takes, in the memory of one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch.common import Axes, from_experts, to_experts
from moe_jax.moe.dispatch.permute import combine, fill
from moe_jax.moe.dispatch.plan import Plan, bucket_round
from moe_jax.moe.routing import Array, PyTree
from moe_jax.parallel.varying import vary_like

# (index, inputs, plan) -> (T, D): what round `index` adds.
Step = Callable[[Any, PyTree, PyTree], Array]


def _loop(
    first: int, rounds: Array, start: PyTree, step: Callable[[Array], PyTree]
) -> PyTree:
    """Adds `step(r)` to `start` for r in [first, rounds)."""

    def body(carry):
        index, value = carry
        return index + 1, jax.tree.map(jnp.add, value, step(index))

    keep_on = lambda carry: carry[0] < rounds
    return jax.lax.while_loop(keep_on, body, (jnp.int32(first), start))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_rounds(step: Step, inputs: PyTree, plan: PyTree, rounds: Array) -> Array:
    """`sum_r step(r, inputs, plan)` for r in [0, rounds), (T, D).

    Round 0 is differentiated like any code and may overlap with what stands around
    it. The others stand in a loop, whose length depends on the routing; its derivative
    keeps the inputs only and replays the rounds, adding to the gradients of round 0
    in place. Memory is that of round 0 and one later round, whatever the imbalance.

    Args:
      step: what a round adds; its index is the Python int 0 for the first.
      inputs: floating point pytree, differentiable; must vary over every mesh axis, so
        that the only collectives in the loop are those of `step`.
      plan: integers; not differentiable.
      rounds: () int32; where `step` has collectives all shards must agree on it.
    """
    return _loop(1, rounds, step(0, inputs, plan), lambda r: step(r, inputs, plan))


def _forward(step, inputs, plan, rounds):
    first, pull = jax.vjp(lambda given: step(0, given, plan), inputs)
    y = _loop(1, rounds, first, lambda r: step(r, inputs, plan))
    return y, (pull, inputs, plan, rounds)


def _reverse(step, saved, grad):
    pull, inputs, plan, rounds = saved

    replay = _replay(step, inputs, plan, grad)
    return _loop(1, rounds, pull(grad)[0], replay), None, None


in_rounds.defvjp(_forward, _reverse)


def _replay(step, inputs, plan, grad):
    """The gradients that a round adds."""

    def replay(index):
        return jax.vjp(lambda given: step(index, given, plan), inputs)[1](grad)[0]

    return replay


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_loop(step: Step, inputs: PyTree, plan: PyTree, rounds: Array) -> Array:
    """`in_rounds` with round 0 in the loop too: half the program, no overlap.

    For rounds within a later round, which seldom run.
    """
    shape = jax.eval_shape(lambda: step(jnp.int32(0), inputs, plan))
    start = vary_like(jnp.zeros(shape.shape, shape.dtype), jax.tree.leaves(inputs)[0])
    return _loop(0, rounds, start, lambda r: step(r, inputs, plan))


def _loop_reverse(step, saved, grad):
    inputs, plan, rounds = saved
    start = jax.tree.map(lambda x: vary_like(jnp.zeros_like(x), x), inputs)
    replay = _replay(step, inputs, plan, grad)
    return _loop(0, rounds, start, replay), None, None


in_loop.defvjp(
    lambda step, *given: (in_loop(step, *given), given),
    _loop_reverse,
)


def serve_buckets(
    run: Callable[..., Array],
    axes: Axes,
    span: tuple[Array | int, int],
    inputs,
    plan: Plan,
) -> Array:
    """One round of padded buckets: (T, D), zero for what it does not serve.

    Args:
      run: the experts.
      axes: over whose expert axes the buckets are exchanged; none: they stay.
      span: first position of each bucket that is served, and their number.
      inputs: (rows (T, ...), weight_tk, weights of the experts).
      plan: of buckets, one an expert.
    """
    rows, weight_tk, weights = inputs
    first, capacity = span
    turn = bucket_round(plan, first, capacity)
    num_experts = plan.counts_e.shape[0]

    def send(leaf):
        slots = fill(leaf, turn)
        shape = (num_experts, capacity, *leaf.shape[1:])
        return to_experts(slots.reshape(shape), axes)

    with jax.named_scope("dispatch"):
        sent = jax.tree.map(send, rows)
    with jax.named_scope("experts"):
        out = run(weights, sent, None)
    with jax.named_scope("combine"):
        back = from_experts(out, axes)
        slots_sd = back.reshape(num_experts * capacity, back.shape[-1])
        return combine(slots_sd, weight_tk, turn)
