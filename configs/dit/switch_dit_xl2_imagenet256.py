"""Switch-DiT-XL/2 (Park et al. 2024, arXiv:2403.09176) on latents of 256 x 256 pixels.

28 layers, width 1152, 16 heads. All else is that of Switch-DiT-S/2.
"""

from configs.dit import switch_dit_s2_imagenet256 as base
from moe_jax.config import Config


def get_config() -> Config:
    """786.5 million parameters, 749.3 million of them active for a patch."""
    return base.sized("XL")
