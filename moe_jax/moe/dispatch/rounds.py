"""As many rounds as it takes, in the memory of one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch.common import Axes, Bring, from_experts, to_experts
from moe_jax.moe.dispatch.permute import combine, fill
from moe_jax.moe.dispatch.plan import Plan, bucket_round
from moe_jax.moe.routing import Array, PyTree
from moe_jax.parallel import compiler, varying
from moe_jax.parallel.collectives import largest
from moe_jax.parallel.mesh import AXES
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


def _once(wanted: Array, start: PyTree, step: Callable[[PyTree], PyTree]) -> PyTree:
    """`step(start)` if `wanted`, else `start`: a loop that ends after one pass.

    A branch would do, but the cost of one is that of its dearest side wherever a
    program is judged before it runs.
    """
    last = vary_like(jnp.bool_(False), wanted)
    body = lambda carry: (last, step(carry[1]))
    return jax.lax.while_loop(lambda carry: carry[0], body, (wanted, start))[1]


@jax.custom_vjp
def _tie(rows: PyTree, weights: PyTree) -> tuple[PyTree, PyTree]:
    return rows, weights


# The chip's queue of transfers is in order. Were the gradients of weights not asked for
# before those of rows go on, they would stand behind all that these go through.
_tie.defvjp(
    lambda rows, weights: ((rows, weights), None),
    lambda _, grads: jax.lax.optimization_barrier(grads),
)


def bring_for(bring: Bring | None, rows: PyTree, weights: PyTree):
    """The rows, and the weights made whole for them; as they are without `bring`.

    The reverse: the weights' gradients have been split when the rows' is handed on.
    """
    if bring is None or not bring.names:
        return rows, weights
    rows, weights = _tie(rows, weights)
    return rows, bring.gather(weights)


@jax.custom_vjp
def _behind(before: PyTree, rows: PyTree, plan: PyTree) -> tuple[PyTree, PyTree]:
    return jax.lax.optimization_barrier((before, rows, plan))[1:]


_behind.defvjp(
    lambda *given: (_behind(*given), None), lambda _, grads: (None, grads[0], None)
)


def behind_first(bring: Bring, inputs: PyTree, plan: PyTree) -> tuple[PyTree, PyTree]:
    """Inputs and plan, of use only once the weight that rows meet first is whole.

    Where chips send weights aside, it then travels while what comes before the experts
    is computed. Without this it waits behind the rows, and the experts for it. (XLA
    makes one of this gather and that of round 0.)
    """
    if not (bring.names and bring.first and compiler.sends_aside()):
        return inputs, plan
    rows, *others = inputs
    whole = bring.gather(jax.lax.stop_gradient(inputs[-1]))[bring.first]
    rows, plan = _behind(whole, rows, plan)
    return (rows, *others), plan


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_rounds(
    step: Step, bring: Bring, inputs: PyTree, plan: PyTree, rounds: Array
) -> Array:
    """`sum_r step(r, inputs, plan)` for r in [0, rounds), (T, D).

    Round 0 is differentiated like any code and may overlap with what stands around
    it: each weight's gradient leaves as soon as it is there. The others stand in a
    loop, whose length depends on the routing; its derivative keeps the inputs only and
    replays the rounds. They bring the weights for themselves and send their gradients
    apart once, after the last of them, so that round 0 need not wait. Memory is that
    of round 0 and one later round, whatever the imbalance.

    Args:
      step: what a round adds. Round 0, whose index is the Python int 0, gets the inputs
        as they are; the others get whole weights.
      bring: makes the weights of the inputs whole.
      inputs: floating point pytree, differentiable; the last is that of the weights.
        Must vary over every mesh axis, so that the only collectives in the loop are
        those of `step`.
      plan: integers; not differentiable.
      rounds: () int32; where `step` has collectives all shards must agree on it.
    """
    more = _more(bring, rounds)
    return _add_later(step, bring, inputs, plan, rounds, more, step(0, inputs, plan))


def _more(bring, rounds):
    """Whether any shard has a later round: all take part in bringing its weights."""
    differs = varying.axes(rounds) if bring.names else ()
    return largest(rounds, tuple(name for name in AXES if name in differs)) > 1


def _add_later(step, bring, inputs, plan, rounds, more, y):
    def add(y, whole):
        return _loop(1, rounds, y, lambda r: step(r, whole, plan))

    if not bring.names:
        return add(y, inputs)
    return _once(more, y, lambda y: add(y, (*inputs[:-1], bring.gather(inputs[-1]))))


def _forward(step, bring, inputs, plan, rounds):
    first, pull = jax.vjp(lambda given: step(0, given, plan), inputs)
    more = _more(bring, rounds)
    y = _add_later(step, bring, inputs, plan, rounds, more, first)
    return y, (pull, inputs, plan, rounds, more)


def _reverse(step, bring, saved, grad):
    pull, inputs, plan, rounds, more = saved
    grads = pull(grad)[0]

    def add(grads, whole):
        return _loop(1, rounds, grads, _replay(step, whole, plan, grad))

    def add_apart(grads):
        weights, apart = jax.vjp(bring.gather, inputs[-1])
        zeros = jax.tree.map(lambda w: vary_like(jnp.zeros_like(w), w), weights)
        later = add((*grads[:-1], zeros), (*inputs[:-1], weights))
        # Else XLA takes the reduce-scatters out of the loop and behind round 0's sum.
        (parts,) = jax.lax.optimization_barrier(apart(later[-1]))
        return (*later[:-1], jax.tree.map(jnp.add, grads[-1], parts))

    if not bring.names:
        return add(grads, inputs), None, None
    return _once(more, grads, add_apart), None, None


in_rounds.defvjp(_forward, _reverse)


def _replay(step, inputs, plan, grad):
    """The gradients that a round adds."""

    def replay(index):
        return jax.vjp(lambda given: step(index, given, plan), inputs)[1](grad)[0]

    return replay


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_loop(step: Step, inputs: PyTree, plan: PyTree, rounds: Array) -> Array:
    """Round 0 in the loop too, with whole weights: half the program, no overlap.

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
    bring: Bring | None,
    axes: Axes,
    span: tuple[Array | int, int],
    inputs,
    plan: Plan,
) -> Array:
    """One round of padded buckets: (T, D), zero for what it does not serve.

    Args:
      run: the experts.
      bring: makes their weights whole; None: they are.
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
    sent, weights = bring_for(bring, sent, weights)
    with jax.named_scope("experts"):
        out = run(weights, sent, None)
    with jax.named_scope("combine"):
        back = from_experts(out, axes)
        slots_sd = back.reshape(num_experts * capacity, back.shape[-1])
        return combine(slots_sd, weight_tk, turn)
