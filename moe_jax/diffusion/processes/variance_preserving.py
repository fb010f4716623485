"""The process of DDPM: T noise levels, alpha^2 + sigma^2 = 1 (Ho et al. 2020)."""

import jax.numpy as jnp
import numpy as np

from moe_jax import config
from moe_jax.diffusion import posterior, schedules
from moe_jax.diffusion.processes.base import Grid, Process
from moe_jax.errors import UserError

PREDICTIONS = ("epsilon", "x0", "v")
VARIANCES = ("learned_range", "fixed_small", "fixed_large")
SPACINGS = ("even", "ddim", "karras")


@config.node
class VariancePreserving(config.ProcessConfig):
    """`x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps`; time is the index t, int32.

    The network sees the index, as float, that of the schedule of training also where a
    sampler visits few of them.

    Attributes:
      schedule: "linear" (Ho et al. 2020) or "cosine" (Nichol & Dhariwal 2021).
      steps: T.
      prediction: "epsilon", "x0" or "v".
      variance: of the reverse steps: "learned_range" (further C channels of the
        network), "fixed_small" (beta~) or "fixed_large" (beta).
    """

    schedule: str = "linear"
    steps: int = 1000
    prediction: str = "epsilon"
    variance: str = "learned_range"

    @property
    def network_ends(self) -> tuple[float, float]:
        """What the network sees as time of data, and of noise."""
        return 0.0, self.steps - 1.0

    def problems(self, path, root):
        for name, allowed in (
            ("schedule", tuple(schedules.BETAS)),
            ("prediction", PREDICTIONS),
            ("variance", VARIANCES),
        ):
            if getattr(self, name) not in allowed:
                yield f"{path}.{name}={getattr(self, name)!r}: must be one of {allowed}"
        # Below, the linear schedule's last beta would be more than 1.
        if self.steps < 21:
            yield f"{path}.steps={self.steps}: must be at least 21"


class VariancePreservingProcess(Process):
    """Attributes: tables, of the whole schedule."""

    answers_at_data = False

    def __init__(self, options: VariancePreserving):
        self.options = options
        self.kind = options.prediction
        betas = schedules.BETAS[options.schedule](options.steps)
        self.tables = schedules.make_tables(betas)

    def levels(self, time, like):
        alpha_bar = self.tables.alpha_bar
        return (
            posterior.looked_up(np.sqrt(alpha_bar), time, like),
            posterior.looked_up(np.sqrt(1 - alpha_bar), time, like),
        )

    def network_time(self, time):
        return time.astype(jnp.float32)

    def noise_time(self, time):
        return (time + 0.5) / self.options.steps

    def from_noise_time(self, noise_time):
        index = jnp.floor(noise_time * self.options.steps).astype(jnp.int32)
        return jnp.clip(index, 0, self.options.steps - 1)

    def kept(self, steps: int, spacing: str, shift: float) -> np.ndarray:
        """The indices that a sampler visits, ascending."""
        if shift != 1.0:
            raise UserError(
                f"sampler shift={shift:g}: a process with a schedule has no shift; "
                "leave it 1"
            )
        if spacing == "karras":
            return schedules.karras_indices(self.tables, steps)
        if spacing not in SPACINGS:
            raise UserError(f"sampler spacing={spacing!r}: must be one of {SPACINGS}")
        text = f"ddim{steps}" if spacing == "ddim" else steps
        return schedules.kept_indices(self.options.steps, text)

    def grid(self, steps, spacing, shift):
        kept = self.kept(steps, spacing, shift)[::-1]
        alpha_bar = np.append(self.tables.alpha_bar[kept], 1.0)
        return Grid(
            times=np.append(kept, -1),  # Clean data stand one before the first index.
            alpha=np.sqrt(alpha_bar),
            sigma=np.sqrt(1 - alpha_bar),
        )

    def ratio(self, time):
        alpha_bar = np.append(1.0, self.tables.alpha_bar)
        known = np.sqrt((1 - alpha_bar) / alpha_bar)
        return np.interp(time, np.arange(-1, self.options.steps), known)
