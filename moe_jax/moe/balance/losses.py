"""All losses of one layer by name, and what is observed of it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.scipy.special import entr, ndtr

from moe_jax.moe.balance import load
from moe_jax.moe.balance.options import Balance
from moe_jax.moe.routing import Array, Observation, Routing, counts_per_expert


def mean_over_tokens(x_t: Array, routing: Routing) -> Array:
    """The mean of (T,) over valid tokens, (); 0 where there are none."""
    tokens = jnp.maximum(jnp.sum(routing.valid_t), 1).astype(x_t.dtype)
    return jnp.sum(jnp.where(routing.valid_t, x_t, 0)) / tokens


def z_loss(routing: Routing) -> Array:
    """Mean over tokens of `logsumexp(logits)^2` (Zoph et al. 2022, eq. 5), ()."""
    size_t = jnp.square(jax.nn.logsumexp(routing.logits_te, axis=-1))
    return mean_over_tokens(size_t, routing)


def entropy(routing: Routing) -> Array:
    """Mean over tokens of `-sum_e p_e log p_e`, nats, ()."""
    return mean_over_tokens(jnp.sum(entr(routing.probs_te), axis=-1), routing)


def squared_variation(x_e: Array) -> Array:
    """`(deviation / mean)^2` over the experts, (); 0 where the mean is 0."""
    mean = jnp.mean(x_e)
    mean = jnp.where(mean == 0, 1, mean)
    return jnp.var(x_e) / jnp.square(mean)


def importance_loss(routing: Routing) -> Array:
    """Variation of the experts' summed probabilities, without noise, ().

    Riquelme et al. 2021, appendix A.
    """
    probs_te = routing.probs_te
    if routing.noisy_te is not None:
        probs_te = jax.nn.softmax(routing.logits_te, axis=-1)
    return squared_variation(
        jnp.sum(jnp.where(routing.valid_t[:, None], probs_te, 0), axis=0)
    )


def load_loss(routing: Routing) -> Array:
    """Variation of the experts' expected load, ().

    An expert's load is the sum over tokens of the probability that its noisy logit
    passes the token's K-th largest one if its own noise is drawn anew (Riquelme et
    al. 2021, appendix A).
    """
    top_k = routing.expert_tk.shape[1]
    last_t = jax.lax.top_k(routing.noisy_te, top_k)[0][:, -1]
    missing_te = (last_t[:, None] - routing.logits_te) / routing.noise_std
    stays_te = jnp.where(routing.valid_t[:, None], ndtr(-missing_te), 0)
    return squared_variation(jnp.sum(stays_te, axis=0))


def losses(
    options: Balance,
    routing: Routing,
    batch_shape: tuple[int, int],
    router_state: Mapping[str, Array],
) -> dict[str, Array]:
    """The weighted losses by name; one that has weight 0 is left out.

    Args:
      options: the config.
      routing: over all tokens at hand.
      batch_shape: (B, S) with B * S = T.
      router_state: of the layer; see `with_step_load`.
    """
    found = {
        "load_balance_loss": (
            options.load_balance_weight,
            lambda: load.loss(options, load.of_batch(options, routing)),
        ),
        "sequence_balance_loss": (
            options.sequence_weight,
            lambda: load.sequence_loss(options, routing, batch_shape),
        ),
        "global_balance_loss": (
            options.global_weight,
            lambda: load.global_loss(options, routing, router_state),
        ),
        "device_balance_loss": (
            options.device_weight,
            lambda: load.loss(
                options,
                load.in_groups(load.of_batch(options, routing), options.device_groups),
            ),
        ),
        "router_z_loss": (options.z_weight, lambda: z_loss(routing)),
        "importance_loss": (
            options.importance_weight,
            lambda: importance_loss(routing),
        ),
        "load_loss": (options.load_weight, lambda: load_loss(routing)),
        "router_entropy_loss": (options.entropy_weight, lambda: entropy(routing)),
    }
    return {name: weight * value() for name, (weight, value) in found.items() if weight}


def observe(options: Balance, routing: Routing) -> Observation:
    """What `update` and `with_step_load` need, to be summed over micro-batches."""
    sums = {"assignments": counts_per_expert(routing)}
    if options.global_weight:
        sums["load"] = load.counted(options, routing)
        sums["tokens"] = jnp.sum(routing.valid_t, dtype=jnp.int32)
    return Observation(sums=sums, count=jnp.sum(routing.valid_t, dtype=jnp.int32))
