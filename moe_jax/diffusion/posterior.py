"""One step of DDPM backwards: q(x before | x, x0), its variance, and what it costs.

`at` is an index into the tables, () or (B,); results broadcast over images.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.diffusion.schedules import Tables
from moe_jax.errors import UserError

Array = jax.Array


def spread(value: Array, like: Array) -> Array:
    """A () or (B,) array with axes of 1 behind, to multiply `like` (B, ...)."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (like.ndim - 1)) if value.ndim else value


def looked_up(table: np.ndarray, at: Array, like: Array) -> Array:
    """Entries of a float64 table in the type of `like`, and ready to multiply it."""
    return spread(jnp.asarray(table, like.dtype)[at], like)


def mean(tables: Tables, x0: Array, x: Array, at: Array) -> Array:
    """The mean of q(x before | x, x0) (Ho et al. 2020, equation 7), (B, H, W, C)."""
    return (
        looked_up(tables.posterior_x0, at, x) * x0
        + looked_up(tables.posterior_x, at, x) * x
    )


def learned_part(variance: str, prediction: Array, channels: int) -> Array:
    """What `log_variance` takes as `learned` of a prediction (B, H, W, C_out).

    Raises:
      UserError: the variance is learned, and the network has no channels for it.
    """
    if variance != "learned_range":
        return prediction[..., :channels]
    if prediction.shape[-1] != 2 * channels:
        raise UserError(
            f"variance='learned_range': the network gives {prediction.shape[-1]} "
            f"channels for images of {channels}; it takes {2 * channels}, or a fixed "
            "variance"
        )
    return prediction[..., channels:]


def log_variance(tables: Tables, variance: str, learned: Array, at: Array) -> Array:
    """The logarithm of the variance of a step of the model.

    Args:
      tables: of the schedule.
      variance: "learned_range": `f log beta + (1 - f) log beta~`, f = (v + 1) / 2
        (Nichol & Dhariwal 2021, equation 15); "fixed_small": beta~; "fixed_large":
        beta, the first of them beta~ of the second step.
      learned: (B, H, W, C), the network's v, read by "learned_range"; the others take
        its type and number of axes.
      at: index into the tables.
    """
    if variance == "fixed_large":
        betas = np.append(tables.posterior_variance[1], tables.betas[1:])
        return looked_up(np.log(betas), at, learned)
    small = looked_up(tables.posterior_log_variance, at, learned)
    if variance == "fixed_small":
        return small
    share = (learned + 1) / 2
    return share * looked_up(np.log(tables.betas), at, learned) + (1 - share) * small


def kl(mean_a: Array, log_variance_a: Array, mean_b: Array, log_variance_b: Array):
    """KL(a || b) of normal distributions, element by element, in nats."""
    return 0.5 * (
        log_variance_b
        - log_variance_a
        - 1
        + jnp.exp(log_variance_a - log_variance_b)
        + (mean_a - mean_b) ** 2 * jnp.exp(-log_variance_b)
    )


def _cdf(x: Array) -> Array:
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def decoder_nll(x0: Array, mean: Array, log_variance: Array) -> Array:
    """-log of what a normal distribution gives the pixel's bin, in nats.

    Bins are 2 / 255 wide, those of -1 and 1 open outwards (Ho et al. 2020, equation
    13). The distribution function is the tanh approximation of the published code, and
    a probability counts as at least 1e-12.
    """
    inverse = jnp.exp(-0.5 * log_variance)
    below = _cdf((x0 - mean - 1 / 255) * inverse)
    above = _cdf((x0 - mean + 1 / 255) * inverse)
    share = jnp.where(x0 < -0.999, above, above - below)
    share = jnp.where(x0 > 0.999, 1 - below, share)
    return -jnp.log(jnp.maximum(share, 1e-12))
