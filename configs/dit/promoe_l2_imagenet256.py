"""ProMoE-L/2 (Wei et al. 2025, arXiv:2510.24711) on latents of 256 x 256 pixels.

24 layers, width 1024, 16 heads, experts of width 2048. All else is that of ProMoE-S/2.
"""

from configs.dit import promoe_s2_imagenet256 as base
from moe_jax.config import Config


def get_config() -> Config:
    """1.06 billion parameters, 458.0 million of them active for a patch."""
    return base.sized("L")
