"""What a process is: the path from data to noise, and its network's conventions."""

import dataclasses

import jax
import numpy as np

from moe_jax.diffusion import conversions

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Grid:
    """The points that a sampler visits, from the noisiest to clean data, on the host.

    Attributes:
      times: (N + 1,), in the unit of the process: int64 indices or float64 times.
      alpha: (N + 1,) float64.
      sigma: (N + 1,) float64; the last is 0.
    """

    times: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray


class Process:
    """A path x = alpha(t) x0 + sigma(t) eps; code without weights and without state.

    Times are (B,), in the process's own unit. Levels come in the type of `like`.

    Attributes:
      options: the config.
      kind: what the network predicts, of `conversions.KINDS`.
      answers_at_data: whether the network can be asked where sigma is 0.
    """

    options: object
    kind: str
    answers_at_data: bool

    def levels(self, time: Array, like: Array) -> tuple[Array, Array]:
        """Returns alpha and sigma, with axes that multiply `like` (B, ...)."""
        raise NotImplementedError

    def network_time(self, time: Array) -> Array:
        """(B,) float32: what the network sees as time."""
        raise NotImplementedError

    def noise_time(self, time: Array) -> Array:
        """(B,) float32 in [0, 1]: 0 is data and 1 is noise, in every convention."""
        raise NotImplementedError

    def from_noise_time(self, noise_time: Array) -> Array:
        """(B,): the inverse of `noise_time`."""
        raise NotImplementedError

    def grid(self, steps: int, spacing: str, shift: float) -> Grid:
        """The points of a sampler; raises UserError where it has no such spacing."""
        raise NotImplementedError

    def ratio(self, time: np.ndarray) -> np.ndarray:
        """Returns sigma / alpha, on the host, also between the points of a grid."""
        raise NotImplementedError

    def slope(self, x0: Array, eps: Array) -> Array:
        """The slope of the probability flow in the coordinates of `ode`, at a point.

        On the path of a schedule `d(x / alpha) / d(sigma / alpha) = eps` (Karras et al.
        2022); a process may choose other coordinates.
        """
        return eps

    def ode(self, grid: Grid) -> dict[str, np.ndarray]:
        """A step along the slope: `x' = keep x + reach slope`, each (N,) float64."""
        ratio = grid.sigma / grid.alpha
        return {
            "keep": grid.alpha[1:] / grid.alpha[:-1],
            "reach": grid.alpha[1:] * np.diff(ratio),
        }

    def add_noise(self, x0: Array, eps: Array, time: Array) -> Array:
        """Returns x at the times, (B, H, W, C)."""
        alpha, sigma = self.levels(time, x0)
        return alpha * x0 + sigma * eps

    def target(self, x0: Array, eps: Array, time: Array) -> Array:
        """What the first C channels of the network should be, (B, H, W, C)."""
        return conversions.target(self.kind, x0, eps, *self.levels(time, x0))

    def split(self, prediction: Array, x: Array, alpha, sigma) -> tuple[Array, Array]:
        """Returns x0 and eps by a prediction (B, H, W, C_out) at x (B, H, W, C).

        The levels broadcast against x.
        """
        first = prediction[..., : x.shape[-1]]
        return conversions.split(self.kind, first, x, alpha, sigma)
