"""Switch-DiT's diffusion prior: how times should share the experts of all blocks.

The prior has a row a time and a column an expert of a block, as in Denoising Task
Routing: times that are near share most. Which expert plays which column is free, so
columns are matched with what the routers choose now.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.models.masks.by_time import noise_level
from moe_jax.models.masks.switch_dit import SwitchDiT, chosen
from moe_jax.models.masks.task_routing import windows
from moe_jax.moe.routing import Array, Condition
from moe_jax.moe.scorers.timestep import logits
from moe_jax.parallel import rules

# Axis letters here: M times of the prior, U = L * E experts of all blocks.
_ALPHA = 4.0
_TINY = 1e-6


def prior(options: SwitchDiT, layers: int) -> Array:
    """(M, U) bool; K L are True in each row."""
    level = jnp.linspace(0, 1, options.prior_steps)
    sizes = layers * options.num_experts, layers * options.top_k
    return windows(level, _ALPHA, *sizes)


def times(options: SwitchDiT) -> np.ndarray:
    """(M,) times of the network, from data to noise."""
    level = np.linspace(0, 1, options.prior_steps)
    return options.data_time + level * (options.noise_time - options.data_time)


def matched(chosen_mu: Array, prior_mu: Array, key: jax.Array) -> Array:
    """The prior (M, U) with its columns in the places of the nearest chosen ones.

    Least `sum |chosen - prior|` over all one-to-one matchings; the key decides between
    equal ones.
    """
    order_u = jax.random.permutation(key, prior_mu.shape[1])
    ours = chosen_mu[:, order_u].astype(jnp.float32)
    theirs = prior_mu.astype(jnp.float32)
    # |a - b| = a + b - 2 a b of zeros and ones; sums of them are exact in any order.
    both = jnp.matmul(ours.T, theirs, precision="highest")
    cost = jnp.sum(ours, axis=0)[:, None] + jnp.sum(theirs, axis=0) - 2 * both
    rows, columns = optax.assignment.hungarian_algorithm(rules.whole(cost))
    return prior_mu[:, jnp.zeros_like(columns).at[order_u[rows]].set(columns)]


def divergence(a: Array, b: Array) -> Array:
    """Jensen and Shannon's, of distributions along the last axis."""
    log = lambda x: jnp.log(x + _TINY)
    middle = log((a + b) / 2)
    total = a * (log(a) - middle) + b * (log(b) - middle)
    return jnp.sum(total, axis=-1) / 2


def losses(
    options: SwitchDiT,
    embed: Callable[[Array], Array],
    routers: dict[str, Array],
    condition: Condition,
    valid: Array | None,
    key: jax.Array | None,
) -> dict[str, Array]:
    """The mean divergence of the images' routing from the prior of their times.

    Args:
      options: the config.
      embed: times (M,) -> their embeddings (M, D).
      routers: "w" (L, D, E) and "b" (L, E) of all blocks.
      condition: with a row an image.
      valid: (B,) bool; the others do not count. None: all are.
      key: decides between matchings that are equally good.

    Raises:
      ValueError: no key.
    """
    if not options.prior_weight:
        return {}
    if key is None:
        raise ValueError("SwitchDiT's prior draws in training: pass a key")

    def probs(embedding):
        probs_lbe = jax.nn.softmax(logits(embedding, **routers), axis=-1)
        return jnp.moveaxis(probs_lbe, 0, 1)

    layers, steps = routers["w"].shape[0], options.prior_steps
    at_times = embed(jnp.asarray(times(options), condition.time.dtype))
    chosen_mle = chosen(jax.lax.stop_gradient(probs(at_times)), options.top_k)
    prior_mu = matched(chosen_mle.reshape(steps, -1), prior(options, layers), key)
    level = noise_level(options, condition.time)
    row_b = jnp.round(level * (steps - 1)).astype(jnp.int32)
    probs_ble = probs(condition.time_embedding)
    ours_bu = probs_ble.reshape(len(probs_ble), -1) / layers
    wanted_bu = prior_mu[row_b].astype(ours_bu.dtype) / (layers * options.top_k)
    found_b = divergence(ours_bu, wanted_bu)
    counted_b = jnp.ones_like(found_b) if valid is None else valid.astype(found_b.dtype)
    mean = jnp.sum(found_b * counted_b) / jnp.maximum(jnp.sum(counted_b), 1)
    return {"diffusion_prior_loss": options.prior_weight * mean}
