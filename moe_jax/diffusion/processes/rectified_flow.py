"""Rectified flow: the straight path between data and noise (Liu et al. 2022)."""

import jax.numpy as jnp
import numpy as np

from moe_jax import config
from moe_jax.diffusion.posterior import spread
from moe_jax.diffusion.processes.base import Grid, Process
from moe_jax.diffusion.times import shifted
from moe_jax.errors import UserError

DIRECTIONS = ("noise_at_1", "data_at_1")
TIME_INPUTS = {"t": 1.0, "1000t": 1000.0}


@config.node
class RectifiedFlow(config.ProcessConfig):
    """A straight path, its velocity predicted; time is t in [0, 1], float32.

    Attributes:
      direction: "noise_at_1": `x_t = (1 - t) x0 + t eps`, velocity `eps - x0` (DiT-MoE,
        ProMoE, SD3); "data_at_1": `x_t = t x0 + (1 - t) eps`, velocity `x0 - eps`
        (SiT, DiffMoE). Both the time and the sign differ.
      time_input: what the network sees: "t" (DiT-MoE, SiT, DiffMoE) or "1000t"
        (ProMoE).
    """

    direction: str = "noise_at_1"
    time_input: str = "t"

    @property
    def network_ends(self) -> tuple[float, float]:
        """What the network sees as time of data, and of noise."""
        one = TIME_INPUTS.get(self.time_input, 1.0)
        return (one, 0.0) if self.direction == "data_at_1" else (0.0, one)

    def problems(self, path, root):
        for name, allowed in (
            ("direction", DIRECTIONS),
            ("time_input", tuple(TIME_INPUTS)),
        ):
            if getattr(self, name) not in allowed:
                yield f"{path}.{name}={getattr(self, name)!r}: must be one of {allowed}"


class RectifiedFlowProcess(Process):
    """Its velocity is dx/dt in its own direction of time."""

    answers_at_data = True

    def __init__(self, options: RectifiedFlow):
        self.options = options
        self.data_at_1 = options.direction == "data_at_1"
        self.kind = "flow_to_data" if self.data_at_1 else "flow"

    def levels(self, time, like):
        noise = spread(self.noise_time(time).astype(like.dtype), like)
        return 1 - noise, noise

    def network_time(self, time):
        return time * TIME_INPUTS[self.options.time_input]

    def noise_time(self, time):
        return 1 - time if self.data_at_1 else jnp.asarray(time)

    def from_noise_time(self, noise_time):
        return self.noise_time(noise_time)

    def grid(self, steps, spacing, shift):
        if spacing != "even":
            raise UserError(
                f"sampler spacing={spacing!r}: a flow takes 'even', with a shift"
            )
        if steps < 1 or shift <= 0:
            raise UserError(
                f"sampler steps={steps}, shift={shift:g}: must be at least 1 and "
                "more than 0"
            )
        noise = shifted(np.arange(steps, -1, -1) / steps, shift)
        times = 1 - noise if self.data_at_1 else noise
        return Grid(times=times, alpha=1 - noise, sigma=noise)

    def ratio(self, time):
        noise = 1 - time if self.data_at_1 else time
        return noise / (1 - noise)

    def slope(self, x0, eps):
        return eps - x0  # Of x itself, by noise time.

    def ode(self, grid):
        return {"keep": np.ones(len(grid.sigma) - 1), "reach": np.diff(grid.sigma)}
