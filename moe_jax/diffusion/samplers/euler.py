"""Euler's method: first order, one evaluation a step."""

import jax

from moe_jax import config
from moe_jax.diffusion.samplers import common


@config.node
class Euler(common.GridSampler):
    """`x' = x + dt v` for a flow; on a schedule a step in sigma / alpha.

    On both paths that is the same step as `DDIM`'s with eta 0.
    """


def sample(options: Euler, process, denoise, x, key) -> common.Sampled:
    def body(carry, point):
        x, count = carry
        x0, eps, seen = common.look(
            denoise, process, x, point["time"], point["alpha"], point["sigma"]
        )
        x = point["keep"] * x + point["reach"] * process.slope(x0, eps)
        return (x, count + seen.evaluations), None

    grid = common.make_grid(options, process)
    points = common.scanned(grid, x.dtype, **process.ode(grid))
    (x, count), _ = jax.lax.scan(body, (x, common.ZERO), points)
    return common.Sampled(images=x, evaluations=count)
