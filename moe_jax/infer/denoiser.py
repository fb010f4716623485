"""A trained diffusion transformer as a function of images and times."""

import jax

from moe_jax.diffusion.guidance import Denoiser
from moe_jax.diffusion.processes.base import Process
from moe_jax.models.base import ImageInputs, ImageModel, RouterState
from moe_jax.moe.routing import EVAL, Override
from moe_jax.nn.module import Params


def denoiser(
    model: ImageModel,
    params: Params,
    router_state: RouterState,
    process: Process,
    *,
    label: jax.Array | None = None,
    none: jax.Array | None = None,
    valid: jax.Array | None = None,
    override: Override | None = None,
) -> Denoiser:
    """`(x, time) -> prediction`, time in the unit of the process.

    Args:
      model: the code.
      params: its weights.
      router_state: of its routers.
      process: with which it was trained.
      label: (B,) int32 classes, or (B, W) vectors; None for a model without condition.
      none: (B,) bool, images without condition; None: all have theirs.
      valid: (B,) bool, images that count; None: all.
      override: imposed on the routers.
    """

    def denoise(x, time):
        inputs = ImageInputs(
            x=x,
            time=process.network_time(time),
            label=label,
            none=none,
            valid=valid,
        )
        found = model.apply(
            params, router_state, inputs, key=None, mode=EVAL, override=override
        )
        return found.prediction

    return denoise
