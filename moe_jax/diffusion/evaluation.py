"""How a model of images is evaluated: `config.eval=ImageEvalConfig(...)`."""

import dataclasses

from moe_jax import config
from moe_jax.diffusion.guidance import Unguided
from moe_jax.diffusion.samplers.dpm_solver import DPMSolverPP


@config.node
class ImageEvalConfig(config.BaseEvalConfig):
    """Held-out denoising loss by time, and what samples look like.

    Attributes:
      samples: images drawn at the end, as a grid, the classes in turn.
      sampler: by which they are drawn.
      guidance: of the sampler.
      judged: further images drawn at the end and compared with real ones, by a
        classifier of the same data; 0: none.
      bits: held-out images whose bits per dimension are measured at the end, with T
        evaluations each; 0: none. For a process with a variational bound, on pixels.
    """

    kind = "images"
    samples: int = 0
    sampler: config.SamplerConfig = dataclasses.field(default_factory=DPMSolverPP)
    guidance: config.GuidanceConfig = dataclasses.field(default_factory=Unguided)
    judged: int = 0
    bits: int = 0

    def problems(self, path, root):
        yield from config.BaseEvalConfig.problems(self, path, root)
        for name in ("samples", "judged", "bits"):
            if getattr(self, name) < 0:
                yield f"{path}.{name}={getattr(self, name)}: must not be negative"
        channels = getattr(root.model, "in_channels", 3)
        if self.samples > 0 and channels not in (1, 3):
            yield (
                f"{path}.samples={self.samples}: a picture shows 1 or 3 channels, and "
                f"config.model.in_channels={channels}; leave it 0, and take latents "
                "from `moe-jax sample --npz`"
            )
        process = getattr(root.objective, "process", None)
        if self.bits and not hasattr(process, "variance"):
            yield (
                f"{path}.bits={self.bits}: {type(process).__name__} has no variational "
                "bound; leave it 0"
            )
