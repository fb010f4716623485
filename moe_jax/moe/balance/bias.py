"""The bias that balances without a loss (Wang et al. 2024, arXiv:2408.15664).

A selector compares `score + b` and weights with the score (`routing.biased`). After
each optimizer step b moves towards the experts that had less than the mean load. No
gradient meets it.
"""

from collections.abc import Mapping

import jax.numpy as jnp

from moe_jax.moe.balance.options import Balance
from moe_jax.moe.routing import Array, Observation

# Name in the router state and first value, by `bias_form`.
_STATE = {"additive": ("bias", 0.0), "multiplicative": ("factor", 1.0)}


def init_state(options: Balance, num_experts: int) -> dict[str, Array]:
    """Router state of one layer: {"bias": (E,)}, {"factor": (E,)}, or nothing."""
    if not options.bias_rate:
        return {}
    name, first = _STATE[options.bias_form]
    return {name: jnp.full((num_experts,), first, jnp.float32)}


def update(
    options: Balance, state: Mapping[str, Array], observation: Observation
) -> dict[str, Array]:
    """This part of the state after an optimizer step: `b_e += u * error_e`.

    With c the assignments and m their mean over the experts, the error is
    `sign(m - c_e)` (algorithm 1) or `(m - c_e) / m`.

    Args:
      options: holds the rate u, the rule, and the form.
      state: of one layer, or stacked on leading axes.
      observation: of the same layers, summed over the step's micro-batches.
    """
    name, _ = _STATE[options.bias_form]
    if name not in state:
        return {}
    error = {"sign": _sign, "proportional": _relative}[options.bias_rule]
    step = options.bias_rate * error(observation.sums["assignments"])
    return {name: state[name] + step.astype(state[name].dtype)}


def _sign(load: Array) -> Array:
    # The sign of mean(c) - c_e in integers: exact, and no product can overflow.
    whole, rest = jnp.divmod(jnp.sum(load, axis=-1, keepdims=True), load.shape[-1])
    below = jnp.where(load == whole, rest, whole - load)
    return jnp.sign(below).astype(jnp.float32)


def _relative(load: Array) -> Array:
    whole = jnp.sum(load, axis=-1, keepdims=True)
    share = load.astype(jnp.float32) / jnp.maximum(whole, 1).astype(jnp.float32)
    return jnp.where(whole > 0, 1 - load.shape[-1] * share, 0)
