"""DEIS: eps extrapolated as a polynomial in time (Zhang & Chen 2023, 2204.13902)."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config
from moe_jax.diffusion.samplers import common

CELLS = 2000  # Of the quadrature, a step.


@config.node
class DEIS(common.GridSampler):
    """tAB: `x / alpha` moves by the integral of eps over sigma / alpha.

    Attributes:
      order: evaluations before the current one that the polynomial goes through; 0 is
        DDIM. The first steps have fewer.
    """

    steps: int = 20
    order: int = 2

    def problems(self, path, root):
        yield from common.GridSampler.problems(self, path, root)
        if not 0 <= self.order <= 3:
            yield f"{path}.order={self.order}: must lie in [0, 3]"


def lagrange(nodes: np.ndarray, j: int, at: np.ndarray) -> np.ndarray:
    """The polynomial that is 1 at node j and 0 at the others, at points `at`."""
    others = np.delete(nodes, j)
    return np.prod([(at - o) / (nodes[j] - o) for o in others], axis=0)


def coefficients(process, grid, order: int) -> np.ndarray:
    """(N, order) float64: what `eps_j before - eps` adds, j = 1 the latest.

    The step is DDIM's plus that sum, since the polynomials add up to 1. Each is
    next_alpha times the integral over a step of its polynomial in time, with respect to
    sigma / alpha.
    """
    found = np.zeros((len(grid.times) - 1, order))
    for i in range(len(found)):
        known = min(order, i)
        if not known:
            continue
        edges = np.linspace(grid.times[i], grid.times[i + 1], CELLS + 1)
        weights = np.diff(process.ratio(edges))
        middles = (edges[1:] + edges[:-1]) / 2
        nodes = grid.times[i - np.arange(known + 1)].astype(np.float64)
        for j in range(1, known + 1):
            found[i, j - 1] = np.sum(weights * lagrange(nodes, j, middles))
    return grid.alpha[1:, None] * found


def sample(options: DEIS, process, denoise, x, key) -> common.Sampled:
    def body(carry, point):
        x, history, count = carry
        x0, eps, seen = common.look(
            denoise, process, x, point["time"], point["alpha"], point["sigma"]
        )
        x = point["next_alpha"] * x0 + point["next_sigma"] * eps
        for j in range(options.order):
            x = x + point["history"][j] * (history[j] - eps)
        history = jnp.concatenate([eps[None], history])[: options.order]
        return (x, history, count + seen.evaluations), None

    grid = common.make_grid(options, process)
    factors = coefficients(process, grid, options.order)
    points = common.scanned(grid, x.dtype, history=factors)
    history = jnp.zeros((options.order, *x.shape), x.dtype)
    (x, _, count), _ = jax.lax.scan(body, (x, history, common.ZERO), points)
    return common.Sampled(images=x, evaluations=count)
