"""ProMoE-B/2 (Wei et al. 2025, arXiv:2510.24711) on latents of 256 x 256 pixels.

12 layers, width 768, 12 heads, experts of width 1536. All else is that of ProMoE-S/2.
"""

from configs.dit import promoe_s2_imagenet256 as base
from moe_jax.config import Config


def get_config() -> Config:
    """300.4 million parameters, 130.4 million of them active for a patch."""
    return base.sized("B")
