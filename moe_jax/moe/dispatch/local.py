"""Rows that are here, served by the experts that are here, in rounds.

Two layouts give the same result. Where grouped matmuls do the work of the rows there
are (`kernels.grouped_matmul.KERNELS`: TPUs, GPUs and CPUs) rows stand in one list,
sorted by expert. Elsewhere each expert has a bucket, for one batched matmul over padded
rows.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.kernels import grouped_matmul
from moe_jax.moe.dispatch.common import Axes, Bring
from moe_jax.moe.dispatch.permute import collect, fill, fill_weights
from moe_jax.moe.dispatch.plan import (
    Plan,
    bucket_rows,
    later_rows,
    list_round,
    list_rows,
    make_plan,
    rounds_needed,
    window,
)
from moe_jax.moe.dispatch.rounds import (
    behind_first,
    bring_for,
    in_loop,
    in_rounds,
    serve_buckets,
)
from moe_jax.moe.routing import Array
from moe_jax.parallel.mesh import platform
from moe_jax.tree import struct


@struct(static=("in_lists",))
class Local:
    """How the rows at hand are laid out.

    Attributes:
      plan: of buckets, one an expert, or of the list.
      in_lists: which of the two.
    """

    plan: Plan
    in_lists: bool

    @property
    def counts(self) -> Array:
        """Rows that each bucket, or the list, was to hold."""
        counts_e = self.plan.counts_e
        return jnp.sum(counts_e, dtype=jnp.int32) if self.in_lists else counts_e

    @property
    def holds_all(self) -> bool:
        """Whether one round serves any routing."""
        plan = self.plan
        most = plan.valid_tk.size if self.in_lists else plan.valid_tk.shape[0]
        return plan.capacity >= most

    @property
    def rounds(self) -> Array:
        """Rounds that serve them, () int32."""
        return rounds_needed(jnp.max(self.counts), self.plan.capacity)


def uses_lists() -> bool:
    """Whether the platform has kernels for grouped matmuls."""
    return platform() in grouped_matmul.KERNELS


def mean_rows(mean: float, num_local: int) -> float:
    """Rows of the list, or of a bucket, where `mean` assignments come uniformly."""
    return mean if uses_lists() else mean / num_local


def make_local(
    expert_rk: Array, valid_rk: Array, num_local: int, mean: float, factor: float
) -> Local:
    """Plans rows (R,) with choices (R, K) among the experts that are here.

    Args:
      expert_rk: (R, K) int32 in [0, num_local).
      valid_rk: (R, K) bool.
      num_local: experts that are here.
      mean: assignments to all of them in a uniform routing.
      factor: rows of the first round over their mean; 0: what a uniform routing needs.
    """
    in_lists, mean = uses_lists(), mean_rows(mean, num_local)
    if in_lists:
        capacity = list_rows(mean, factor, most=expert_rk.size)
    else:
        capacity = bucket_rows(mean, factor, most=expert_rk.shape[0])
    plan = make_plan(expert_rk, valid_rk, num_local, capacity)
    return Local(plan=plan, in_lists=in_lists)


def serve(run: Callable[..., Array], bring: Bring, inputs, local: Local) -> Array:
    """`y_r = sum_k weight_rk f_k(x_r)`, (R, D).

    Args:
      run: the experts.
      bring: makes their weights whole.
      inputs: (rows (R, ...), weight_rk, weights of the experts), varying alike.
      local: the plan.
    """
    step, rounds = functools.partial(_step, run, bring), local.rounds
    inputs, local = behind_first(bring, inputs, local)
    if local.holds_all:  # A loop costs GPUs a wait, even where it does not run.
        return step(0, inputs, local)
    return in_rounds(step, bring, inputs, local, rounds)


def serve_later(run: Callable[..., Array], inputs, local: Local) -> Array:
    """`serve` within a later exchange, which seldom runs: small rounds in one loop.

    The weights are whole.
    """
    size = later_rows(local.plan.capacity)
    rounds = -(-jnp.max(local.counts) // size)
    return in_loop(functools.partial(_small_step, run), inputs, local, rounds)


def _step(run, bring, index, inputs, local: Local) -> Array:
    bring = bring if isinstance(index, int) else None
    return _serve_span(run, bring, window(index, local.plan.capacity), inputs, local)


def _small_step(run, index, inputs, local: Local) -> Array:
    size = later_rows(local.plan.capacity)
    return _serve_span(run, None, (index * size, size), inputs, local)


def _serve_span(run, bring, span, inputs, local: Local) -> Array:
    if not local.in_lists:
        return serve_buckets(run, bring, Axes(), span, inputs, local.plan)
    rows, weight_rk, weights = inputs
    turn, sizes_e = list_round(local.plan, *span)
    with jax.named_scope("dispatch"):
        sent = jax.tree.map(lambda leaf: fill(leaf, turn), rows)
        weight_s = fill_weights(weight_rk, turn)
    sent, weights = bring_for(bring, sent, weights)
    with jax.named_scope("experts"):
        out = run(weights, sent, sizes_e, weight_s)
    with jax.named_scope("combine"):
        return collect(out, turn)
