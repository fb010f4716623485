"""Heun's method: second order, two evaluations a step (Karras et al. 2022)."""

import jax

from moe_jax import config
from moe_jax.diffusion.samplers import common


@config.node
class Heun(common.GridSampler):
    """A step of Euler's, then the mean of the slopes at its two ends.

    With a schedule, which has no index for clean data, the last step is Euler's alone:
    2 N - 1 evaluations, for a flow 2 N. No fresh noise is added on the way.
    """

    steps: int = 25


def sample(options: Heun, process, denoise, x, key) -> common.Sampled:
    def slope_at(x, time, alpha, sigma):
        x0, eps, seen = common.look(denoise, process, x, time, alpha, sigma)
        return process.slope(x0, eps), seen.evaluations

    def body(carry, point):
        x, count = carry
        first, spent = slope_at(x, point["time"], point["alpha"], point["sigma"])
        there = point["keep"] * x + point["reach"] * first

        def corrected():
            following = (point[f"next_{n}"] for n in ("time", "alpha", "sigma"))
            second, more = slope_at(there, *following)
            return there + point["reach"] * (second - first) / 2, more

        if process.answers_at_data:
            x, more = corrected()
            return (x, count + spent + more), None
        last = point["i"] == len(grid.times) - 2
        x, more = jax.lax.cond(last, lambda: (there, common.ZERO), corrected)
        return (x, count + spent + more), None

    grid = common.make_grid(options, process)
    points = common.scanned(grid, x.dtype, **process.ode(grid))
    (x, count), _ = jax.lax.scan(body, (x, common.ZERO), points)
    return common.Sampled(images=x, evaluations=count)
