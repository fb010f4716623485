"""Samplers of images: noise to data in one `jax.lax.scan`, as pure functions.

Each is `(options, process, denoise, x, key) -> Sampled`, with a guided denoiser
(`guidance.guide`) and x (B, H, W, C) ~ N(0, I) at the noisiest point. Step i draws its
noise from `fold_in(key, i)`, over the whole batch: the mesh does not matter. Tables of
coefficients are made on the host in float64.
"""

import jax

from moe_jax import config
from moe_jax.diffusion import guidance
from moe_jax.diffusion.processes.base import Process
from moe_jax.diffusion.samplers import ddim, ddpm, deis, dpm_solver, euler, heun
from moe_jax.diffusion.samplers.common import Sampled
from moe_jax.errors import UserError

SAMPLERS = {
    ddpm.DDPM: ddpm.sample,
    ddim.DDIM: ddim.sample,
    euler.Euler: euler.sample,
    heun.Heun: heun.sample,
    dpm_solver.DPMSolverPP: dpm_solver.sample,
    deis.DEIS: deis.sample,
}


def sample(
    options: config.SamplerConfig,
    guided_by: config.GuidanceConfig,
    process: Process,
    main: guidance.Denoiser,
    other: guidance.Denoiser | None,
    x: jax.Array,
    key: jax.Array,
) -> Sampled:
    """Images from noise, guided.

    Args:
      options: the sampler.
      guided_by: the guidance; `guidance` says which denoisers it takes.
      process: of training.
      main: the conditional denoiser.
      other: the second one, or None.
      x: (B, H, W, C), noise.
      key: for samplers that draw.

    Raises:
      UserError: what does not combine, or a grid that the process does not have.
    """
    renoises = isinstance(options, ddim.DDIM)
    if isinstance(guided_by, guidance.CFGPlusPlus) and not renoises:
        raise UserError(
            f"guidance CFGPlusPlus with sampler {type(options).__name__}: it changes "
            "the noise that a step of DDIM puts back; choose DDIM()"
        )
    for node in (options, guided_by):
        found = list(node.problems(type(node).__name__, None))
        if found:
            raise UserError("\n".join(found))
    denoise = guidance.guide(guided_by, process, main, other)
    return SAMPLERS[type(options)](options, process, denoise, x, key)
