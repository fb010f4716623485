"""Weights of the squared error by time.

Each is `(options, process, time) -> weight`, (B,), on the squared error of what the
process predicts.
"""

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.diffusion import conversions
from moe_jax.diffusion.processes.base import Process

Array = jax.Array


@config.node
class Constant(config.LossWeightConfig):
    """1 at all times."""


@config.node
class MinSNR(config.LossWeightConfig):
    """`min(SNR, gamma)` on the error of x0 (Hang et al. 2023, 2303.09556).

    With SNR = (alpha / sigma)^2 that is `min(SNR, gamma) / SNR` for epsilon and
    `min(SNR, gamma) / (SNR + 1)` for v. Where SNR is 0 the weight is 1.

    Attributes:
      gamma: the cap.
    """

    gamma: float = 5.0

    def problems(self, path, root):
        if self.gamma <= 0:
            yield f"{path}.gamma={self.gamma}: must be more than 0"


@config.node
class EDM2(config.LossWeightConfig):
    """`(s^2 + d^2) / (s d)^2` on the error of x0, s = sigma / alpha.

    Karras et al. 2022 and 2024. Goes with `losses.uncertainty`, which divides the loss
    by what is learned of it.

    Attributes:
      data_std: d, the standard deviation of the data.
    """

    data_std: float = 0.5

    def problems(self, path, root):
        if self.data_std <= 0:
            yield f"{path}.data_std={self.data_std}: must be more than 0"


def _constant(options: Constant, process: Process, time: Array) -> Array:
    return jnp.ones(time.shape, jnp.float32)


def _levels(process, time):
    return process.levels(time, jnp.zeros(time.shape, jnp.float32))


def _min_snr(options: MinSNR, process: Process, time: Array) -> Array:
    alpha, sigma = _levels(process, time)
    snr = (alpha / sigma) ** 2
    capped = jnp.minimum(snr, options.gamma)
    weight = conversions.weight_from_x0(process.kind, capped, alpha, sigma)
    return jnp.where(snr == 0, 1.0, weight)


def _edm2(options: EDM2, process: Process, time: Array) -> Array:
    alpha, sigma = _levels(process, time)
    ratio, data = sigma / alpha, options.data_std
    weight = (ratio**2 + data**2) / (ratio * data) ** 2
    return conversions.weight_from_x0(process.kind, weight, alpha, sigma)


WEIGHTS = {Constant: _constant, MinSNR: _min_snr, EDM2: _edm2}
