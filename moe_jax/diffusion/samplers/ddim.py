"""DDIM: x0 and noise, mixed anew for the next level (Song et al. 2021, 2010.02502)."""

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.diffusion.samplers import common


@config.node
class DDIM(common.GridSampler):
    """`x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s z`, equation 12, on any path.

    `s = eta sigma' / sigma sqrt(sigma^2 - (alpha sigma' / alpha')^2)`, which is the
    posterior's standard deviation for eta = 1.

    Attributes:
      eta: share of fresh noise, 0 (deterministic) to 1 (ancestral).
    """

    eta: float = 0.0

    def problems(self, path, root):
        yield from common.GridSampler.problems(self, path, root)
        if not 0 <= self.eta <= 1:
            yield f"{path}.eta={self.eta}: must lie in [0, 1]"


def step(x0, eps, fresh, eta, alpha, sigma, next_alpha, next_sigma):
    """One step; `fresh` is noise (B, H, W, C), the levels are () arrays."""
    kept = jnp.maximum(sigma**2 - (alpha * next_sigma / next_alpha) ** 2, 0)
    scale = eta * next_sigma / sigma * jnp.sqrt(kept)
    rest = jnp.sqrt(jnp.maximum(next_sigma**2 - scale**2, 0))
    return next_alpha * x0 + rest * eps + scale * fresh


def sample(options: DDIM, process, denoise, x, key) -> common.Sampled:
    def body(carry, point):
        x, count = carry
        levels = [point[name] for name in ("alpha", "sigma")]
        x0, eps, seen = common.look(denoise, process, x, point["time"], *levels)
        following = point["next_alpha"], point["next_sigma"]
        fresh = common.noise(key, point, x) if options.eta else 0.0
        x = step(x0, eps, fresh, options.eta, *levels, *following)
        return (x, count + seen.evaluations), None

    points = common.scanned(common.make_grid(options, process), x.dtype)
    (x, count), _ = jax.lax.scan(body, (x, common.ZERO), points)
    return common.Sampled(images=x, evaluations=count)
