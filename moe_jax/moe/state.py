"""Router state: what a layer learns without gradients, by name.

Two parts are joined: the bias of the balance, and what the selector keeps for itself
(`selectors.STATES`). Both learn once per optimizer step, from an `Observation` that is
summed over micro-batches and the mesh.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from moe_jax.moe import balance
from moe_jax.moe.routing import Array, Observation, Routing, Tokens
from moe_jax.moe.selectors import STATES


def _of_selector(options: Any):
    return STATES.get(type(options.selector))


def init_state(options: Any) -> dict[str, Array]:
    """The first state of one layer; `options` is an `MoE`, here and below."""
    selector, own = options.selector, _of_selector(options)
    routed = selector.num_routed(options.num_experts)
    state = balance.init_state(options.balance, routed)
    if own is not None:
        state |= own.init(selector, options.num_experts)
    return state


def observe(
    options: Any, routing: Routing, balanced: Routing, tokens: Tokens
) -> Observation:
    """What `update` needs.

    Args:
      options: of the layer.
      routing: over all tokens at hand.
      balanced: the part of it that is balanced (`routing.among`).
      tokens: that were routed.
    """
    seen, own = balance.observe(options.balance, balanced), _of_selector(options)
    sums = dict(seen.sums)
    if own is not None:
        sums |= own.observe(options.selector, routing, tokens)
    count = seen.count
    if balanced is not routing:
        count = jnp.sum(routing.valid_t, dtype=jnp.int32)
    return Observation(sums=sums, count=count)


def update(
    options: Any, state: Mapping[str, Array], observation: Observation
) -> dict[str, Array]:
    """The state after an optimizer step.

    Args:
      options: of the layer.
      state: of one layer, or stacked on leading axes.
      observation: of the same layers, summed over the step's micro-batches.
    """
    new = balance.update(options.balance, state, observation)
    own = _of_selector(options)
    if own is not None:
        new |= own.update(options.selector, state, observation.sums)
    return new


def with_step_load(
    options: Any, state: Mapping[str, Array], observation: Observation
) -> dict[str, Array]:
    """See `balance.with_step_load`."""
    return balance.with_step_load(options.balance, state, observation)
