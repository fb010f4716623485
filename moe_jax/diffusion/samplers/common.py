"""What samplers share: their settings, their result, and the tables they scan over."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config
from moe_jax.diffusion.guidance import GuidedDenoiser
from moe_jax.diffusion.processes.base import Grid, Process
from moe_jax.tree import struct

Array = jax.Array


@config.node
class GridSampler(config.SamplerConfig):
    """A sampler that visits a grid of times.

    Attributes:
      steps: N.
      spacing: "even"; with a schedule also "ddim" (an integer stride from index 0) and
        "karras" (even in (sigma / alpha)^(1/7)).
      shift: of a flow's times, `s t / (1 + (s - 1) t)`; 1: none.
    """

    steps: int = 50
    spacing: str = "even"
    shift: float = 1.0

    def problems(self, path, root) -> Iterator[str]:
        if self.steps < 1:
            yield f"{path}.steps={self.steps}: must be at least 1"
        if self.spacing not in ("even", "ddim", "karras"):
            yield (
                f"{path}.spacing={self.spacing!r}: must be 'even', 'ddim' or 'karras'"
            )
        if self.shift <= 0:
            yield f"{path}.shift={self.shift}: must be more than 0"


@struct
class Sampled:
    """What a sampler returns.

    Attributes:
      images: (B, H, W, C).
      evaluations: () int32, networks that were evaluated on the batch.
    """

    images: Array
    evaluations: Array


def make_grid(options: GridSampler, process: Process) -> Grid:
    return process.grid(options.steps, options.spacing, options.shift)


def scanned(grid: Grid, dtype, **more: np.ndarray) -> dict[str, Array]:
    """What a scan over the N steps of a grid takes, each (N,).

    `i` counts; `time`, `alpha`, `sigma` are where a step begins, `next_time`,
    `next_alpha`, `next_sigma` where it ends; `more` are further columns.
    """
    columns = {
        f"{prefix}{name}": getattr(grid, field)[part]
        for prefix, part in (("", slice(None, -1)), ("next_", slice(1, None)))
        for name, field in (("time", "times"), ("alpha", "alpha"), ("sigma", "sigma"))
    }
    columns["i"] = np.arange(len(grid.times) - 1)
    return {
        name: jnp.asarray(column, jnp.int32 if column.dtype.kind == "i" else dtype)
        for name, column in (columns | more).items()
    }


def look(denoise: GuidedDenoiser, process: Process, x: Array, time, alpha, sigma):
    """The data, the noise to put back, and the answer itself, at one time.

    Returns:
      x0 (B, H, W, C), eps (B, H, W, C), `Guided`.
    """
    seen = denoise(x, jnp.broadcast_to(time, x.shape[:1]))
    x0, _ = process.split(seen.prediction, x, alpha, sigma)
    _, eps = process.split(seen.renoise, x, alpha, sigma)
    return x0, eps, seen


def noise(key: Array, step: dict[str, Array], x: Array) -> Array:
    """The noise of a step, by its number."""
    return jax.random.normal(jax.random.fold_in(key, step["i"]), x.shape, x.dtype)


ZERO = np.int32(0)
