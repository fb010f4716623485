"""Switch-DiT-B/2 (Park et al. 2024, arXiv:2403.09176) on latents of 256 x 256 pixels.

12 layers, width 768, 12 heads. All else is that of Switch-DiT-S/2.
"""

from configs.dit import switch_dit_s2_imagenet256 as base
from moe_jax.config import Config


def get_config() -> Config:
    """151.6 million parameters, 144.5 million of them active for a patch."""
    return base.sized("B")
