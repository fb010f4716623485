"""What training minimises and evaluation reports, one number an image, (B,)."""

import math

import jax
import jax.numpy as jnp

from moe_jax.diffusion import posterior
from moe_jax.diffusion.processes.variance_preserving import VariancePreservingProcess
from moe_jax.tree import struct

Array = jax.Array


def _mean(values: Array) -> Array:
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def mse(prediction: Array, target: Array) -> Array:
    """Mean squared error of the first C channels; target is (B, H, W, C)."""
    return _mean((prediction[..., : target.shape[-1]] - target) ** 2)


def cosine(prediction: Array, target: Array) -> Array:
    """Mean over positions of 1 - cos of the angle in channels (FasterDiT, 2410.10356).

    A prediction shorter than 0.01 counts as that long: the gradient, which grows as one
    over the length, is bounded where a new network gives 0.
    """
    first = prediction[..., : target.shape[-1]]
    dot = jnp.sum(first * target, axis=-1)
    square = jnp.maximum(jnp.sum(first**2, axis=-1), 1e-4)
    target_square = jnp.maximum(jnp.sum(target**2, axis=-1), 1e-12)
    return _mean(1 - dot * jax.lax.rsqrt(square * target_square))


def uncertainty(loss: Array, log_variance: Array) -> Array:
    """`L / e^u + u`, with a learned u (EDM2, Karras et al. 2024).

    Half of it is the weight of tasks of Kendall et al. 2018.
    """
    return loss * jnp.exp(-log_variance) + log_variance


def vb_bits(
    process: VariancePreservingProcess,
    prediction: Array,
    x0: Array,
    x: Array,
    time: Array,
) -> Array:
    """The term of the variational bound at `time`, in bits per dimension.

    KL(q(x before | x, x0) || p), or at index 0 the negative log-likelihood of pixels of
    255 levels. Only the variance gets a gradient: what predicts the mean is stopped
    (Nichol & Dhariwal 2021, section 3.1).

    Args:
      process: with its tables.
      prediction: (B, H, W, C_out).
      x0: data.
      x: at the times.
      time: (B,) indices.
    """
    tables, channels = process.tables, x.shape[-1]
    stopped = jax.lax.stop_gradient(prediction[..., :channels])
    x0_hat, _ = process.split(stopped, x, *process.levels(time, x))
    variance = process.options.variance
    learned = posterior.learned_part(variance, prediction, channels)
    log_variance = posterior.log_variance(tables, variance, learned, time)
    mean = posterior.mean(tables, x0_hat, x, time)
    terms = posterior.kl(
        posterior.mean(tables, x0, x, time),
        posterior.looked_up(tables.posterior_log_variance, time, x),
        mean,
        log_variance,
    )
    nll = posterior.decoder_nll(x0, mean, log_variance)
    first = posterior.spread(time == 0, x)
    return _mean(jnp.where(first, nll, terms)) / math.log(2)


def prior_bits(process: VariancePreservingProcess, x0: Array) -> Array:
    """KL of the noisiest step from N(0, I), in bits per dimension."""
    alpha_bar = float(process.tables.alpha_bar[-1])
    mean = math.sqrt(alpha_bar) * x0
    nats = posterior.kl(mean, math.log1p(-alpha_bar), 0.0, 0.0)
    return _mean(nats) / math.log(2)


@struct
class Bits:
    """The variational bound, in bits per dimension.

    Attributes:
      total: (B,), sum of the terms and the prior.
      terms: (T, B), by index; term 0 is the decoder's.
      prior: (B,).
    """

    total: Array
    terms: Array
    prior: Array


def noise_of_images(keys: Array, number: Array, like: Array) -> Array:
    """Noise for images `like` (B, H, W, C), each by its own key, (B,), and a number."""

    def draw(key):
        key = jax.random.fold_in(key, number)
        return jax.random.normal(key, like.shape[1:], like.dtype)

    return jax.vmap(draw)(keys)


def bits_per_dimension(
    process: VariancePreservingProcess, denoise, x0: Array, keys: Array
) -> Bits:
    """The bound, every term with fresh noise: T evaluations of the network.

    Args:
      process: with its tables.
      denoise: `(x, time) -> prediction`.
      x0: (B, H, W, C) in [-1, 1], of 255 levels.
      keys: (B,), of each image's noise.
    """

    def term(index):
        eps = noise_of_images(keys, index, x0)
        time = jnp.full(x0.shape[:1], index)
        x = process.add_noise(x0, eps, time)
        return vb_bits(process, denoise(x, time), x0, x, time)

    terms = jax.lax.map(term, jnp.arange(process.options.steps))
    prior = prior_bits(process, x0)
    return Bits(total=terms.sum(axis=0) + prior, terms=terms, prior=prior)
