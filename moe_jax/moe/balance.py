"""Balance: losses on the routing, and the bias that is learned without gradients.

All statistics are over the whole micro-batch in the global view: a sum over T is a
sum over all tokens of all devices.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.moe.routing import Array, Observation, Routing, counts_per_expert


@config.node
class Balance(config.Node):
    """Weights of the balance losses and the rate of the bias.

    Attributes:
      load_balance_weight: of the load-balance loss (Switch, Fedus et al. 2021).
      z_weight: of the router z-loss (ST-MoE, Zoph et al. 2022).
      bias_rate: step of the loss-free bias (Wang et al. 2024); 0 keeps no bias.
    """

    load_balance_weight: float = 0.01
    z_weight: float = 0.001
    bias_rate: float = 0.0

    def problems(self, path, root):
        for name in ("load_balance_weight", "z_weight", "bias_rate"):
            if getattr(self, name) < 0:
                yield f"{path}.{name}={getattr(self, name)}: must not be negative"


def load_balance_loss(routing: Routing) -> Array:
    """`E * sum_e f_e P_e`, () float: 1 for a uniform load.

    f_e is the share of the assignments that go to expert e (Fedus et al. 2021, eq. 4,
    with f divided by K, as DeepSeek does; Hugging Face's value is K times this one),
    P_e the mean probability of e. The gradient flows through P only.
    """
    probs_te = routing.probs_te
    counts_e = counts_per_expert(routing).astype(probs_te.dtype)
    share_e = counts_e / jnp.maximum(jnp.sum(counts_e), 1)
    valid_t = routing.valid_t.astype(probs_te.dtype)
    mean_e = (valid_t @ probs_te) / jnp.maximum(jnp.sum(valid_t), 1)
    return routing.num_experts * jnp.sum(share_e * mean_e)


def z_loss(routing: Routing) -> Array:
    """Mean over tokens of `logsumexp(logits)^2` (Zoph et al. 2022, eq. 5), ()."""
    size_t = jnp.square(jax.nn.logsumexp(routing.logits_te, axis=-1))
    valid_t = routing.valid_t.astype(size_t.dtype)
    return jnp.sum(size_t * valid_t) / jnp.maximum(jnp.sum(valid_t), 1)


def losses(options: Balance, routing: Routing) -> dict[str, Array]:
    """The weighted losses by name; one that has weight 0 is left out."""
    found = {}
    if options.load_balance_weight:
        value = load_balance_loss(routing)
        found["load_balance_loss"] = options.load_balance_weight * value
    if options.z_weight:
        found["router_z_loss"] = options.z_weight * z_loss(routing)
    return found


def init_state(options: Balance, num_experts: int) -> dict[str, Array]:
    """Router state of one layer: {"bias": (E,)}, or nothing."""
    if not options.bias_rate:
        return {}
    return {"bias": jnp.zeros((num_experts,), jnp.float32)}


def observe(routing: Routing) -> Observation:
    """What `update` needs, to be summed over micro-batches."""
    return Observation(
        sums={"assignments": counts_per_expert(routing)},
        count=jnp.sum(routing.valid_t, dtype=jnp.int32),
    )


def update(
    options: Balance, state: Mapping[str, Array], observation: Observation
) -> dict[str, Array]:
    """The state after an optimizer step: `b_e += u * sign(mean(c) - c_e)`.

    Args:
      options: holds the rate u.
      state: of one layer, or stacked on leading axes.
      observation: of the same layers, summed over the step's micro-batches.
    """
    if not state:
        return {}
    load = observation.sums["assignments"]
    # The sign of mean(c) - c_e in integers: exact, and no product can overflow.
    whole, rest = jnp.divmod(jnp.sum(load, axis=-1, keepdims=True), load.shape[-1])
    below = jnp.where(load == whole, rest, whole - load)
    bias = state["bias"]
    return {"bias": bias + options.bias_rate * jnp.sign(below).astype(bias.dtype)}
