"""Ancestral sampling, respaced (Ho et al. 2020, Nichol & Dhariwal 2021)."""

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.diffusion import posterior, schedules
from moe_jax.diffusion.processes.variance_preserving import VariancePreservingProcess
from moe_jax.diffusion.samplers import common
from moe_jax.errors import UserError


@config.node
class DDPM(common.GridSampler):
    """A draw from p(x before | x), step by step; for a process with a schedule alone.

    `steps` may be all T (no respacing). Takes the variance that the process names.
    """

    steps: int = 250


def step(tables, variance, x0, x, learned, at, eps):
    """One draw: the mean by x0, the variance by `learned`, no noise at index 0.

    Args:
      tables: respaced.
      variance: as in `posterior.log_variance`.
      x0: (B, H, W, C), predicted.
      x: (B, H, W, C).
      learned: (B, H, W, C), see `posterior.learned_part`.
      at: () int32, index into the tables.
      eps: (B, H, W, C), noise.
    """
    log_variance = posterior.log_variance(tables, variance, learned, at)
    scatter = jnp.exp(0.5 * log_variance) * eps
    return posterior.mean(tables, x0, x, at) + jnp.where(at == 0, 0, scatter)


def sample(options: DDPM, process, denoise, x, key) -> common.Sampled:
    if not isinstance(process, VariancePreservingProcess):
        raise UserError(
            "sampler DDPM: a flow has no table of posteriors; DDIM(eta=1) is the same "
            "draw with the variance that is right for its steps"
        )
    kept = process.kept(options.steps, options.spacing, options.shift)
    tables = schedules.respace(process.tables, kept)
    variance, channels = process.options.variance, x.shape[-1]

    def body(carry, point):
        x, count = carry
        x0, _, seen = common.look(
            denoise, process, x, point["time"], point["alpha"], point["sigma"]
        )
        learned = posterior.learned_part(variance, seen.prediction, channels)
        eps = common.noise(key, point, x)
        x = step(tables, variance, x0, x, learned, len(kept) - 1 - point["i"], eps)
        return (x, count + seen.evaluations), None

    points = common.scanned(common.make_grid(options, process), x.dtype)
    (x, count), _ = jax.lax.scan(body, (x, common.ZERO), points)
    return common.Sampled(images=x, evaluations=count)
