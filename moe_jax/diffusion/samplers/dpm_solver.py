"""DPM-Solver++ (2M) (Lu et al. 2022, 2211.01095, algorithm 2)."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config
from moe_jax.diffusion.samplers import common


@config.node
class DPMSolverPP(common.GridSampler):
    """Second order in lambda = log(alpha / sigma), one evaluation a step.

    The first step and the one to clean data are of first order, which is DDIM's.
    """

    steps: int = 20


def coefficients(grid) -> dict[str, np.ndarray]:
    """`x' = carried x + data (x0 + slope (x0 - x0 before))`, each (N,) float64.

    With h the step in lambda, `alpha' e^-h = alpha sigma' / sigma`: so written, neither
    alpha = 0 nor sigma' = 0, where h is infinite, needs a case of its own.
    """
    alpha, sigma = grid.alpha, grid.sigma
    carried = sigma[1:] / sigma[:-1]
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(alpha) - np.log(sigma))
    slope = np.zeros_like(h)
    if len(h) > 2:
        slope[1:-1] = h[1:-1] / (2 * h[:-2])
    return {
        "carried": carried,
        "data": alpha[1:] - alpha[:-1] * carried,
        "slope": slope,
    }


def sample(options: DPMSolverPP, process, denoise, x, key) -> common.Sampled:
    def body(carry, point):
        x, before, count = carry
        x0, _, seen = common.look(
            denoise, process, x, point["time"], point["alpha"], point["sigma"]
        )
        guess = x0 + point["slope"] * (x0 - before)
        x = point["carried"] * x + point["data"] * guess
        return (x, x0, count + seen.evaluations), None

    grid = common.make_grid(options, process)
    points = common.scanned(grid, x.dtype, **coefficients(grid))
    start = (x, jnp.zeros_like(x), common.ZERO)
    (x, _, count), _ = jax.lax.scan(body, start, points)
    return common.Sampled(images=x, evaluations=count)
